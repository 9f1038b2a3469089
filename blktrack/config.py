"""Where this instance of blktrack keeps its things."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

BPFFS = Path("/sys/fs/bpf")


@dataclass(frozen=True)
class Paths:
    """The places of design section 7; `BLKTRACK_ROOT` moves them, so that instances do not meet."""

    pins: Path  # kernel programs and maps
    run: Path  # survives a process, not a boot
    lib: Path  # survives a boot
    policy: Path

    @classmethod
    def from_environment(cls) -> Paths:
        root = os.environ.get("BLKTRACK_ROOT")
        return cls.below(Path(root)) if root else cls.of_host()

    @classmethod
    def of_host(cls) -> Paths:
        """Those of the host's own instance."""
        return cls(
            BPFFS / "blktrack",
            Path("/run/blktrack"),
            Path("/var/lib/blktrack"),
            Path("/etc/blktrack/blktrack.toml"),
        )

    @classmethod
    def below(cls, root: Path) -> Paths:
        """Those of an instance of its own."""
        import hashlib  # 25 ms that only this case needs

        base = root.resolve()
        tag = hashlib.sha256(os.fsencode(base)).hexdigest()[:12]
        return cls(
            BPFFS / f"blktrack-{tag}",
            base / "run/blktrack",
            base / "var/lib/blktrack",
            base / "etc/blktrack/blktrack.toml",
        )
