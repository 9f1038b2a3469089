"""The far side of a replica elsewhere, without a network: in the place of ssh runs the keeper."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tests.blockdev import TOP


def pipe(folder: Path, *options: str) -> str:
    """A command for BLKTRACK_SSH that runs `blktrack recv --serve` here, over pipes.

    folder -- a scratch folder, which holds the script and the state of the far side.
    options -- of the keeper, such as --restrict DIR.
    """
    script = folder / "pipe"
    root = folder / "far"
    keeper = [sys.executable, "-m", "blktrack", "recv", *(options or ("--serve",))]
    script.write_text(
        "#!/bin/sh\n"
        f"cd {shlex.quote(str(TOP))} || exit 255\n"
        f"BLKTRACK_ROOT={shlex.quote(str(root))} exec {shlex.join(keeper)}\n"
    )
    script.chmod(0o755)
    return str(script)
