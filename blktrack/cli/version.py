"""The versions of blktrack and of what it stands on."""

from __future__ import annotations

import argparse
import ctypes
import platform
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blktrack import __version__

_MISSING = "not installed"


class Version(argparse.Action):
    """--version."""

    def __init__(self, option_strings: Sequence[str], dest: str, **rest: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **rest)

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(text())
        parser.exit()


def text() -> str:
    versions = {
        "blktrack": __version__,
        "bcc": _bcc(),
        "libbpf": _libbpf(),
        "python": platform.python_version(),
        "linux": platform.release(),
    }
    return "\n".join(f"{name:9}{version}" for name, version in versions.items())


def _bcc() -> str:
    """Without an import, which would load LLVM. It is bcc's own file: Debian's package has no
    metadata that always agrees with it, and other builds have none."""
    spec = find_spec("bcc")
    for folder in (spec and spec.submodule_search_locations) or ():
        try:
            found = re.search(
                r"^__version__ *= *['\"]([^'\"]+)",
                (Path(folder) / "version.py").read_text(encoding="utf-8"),
                re.MULTILINE,
            )
        except OSError:
            found = None
        return found[1] if found else "unknown"
    return _MISSING


def _libbpf() -> str:
    from blktrack.bpf.libbpf import SONAME

    try:
        library = ctypes.CDLL(SONAME)
    except OSError:
        return _MISSING
    try:
        tell = library.libbpf_version_string
    except AttributeError:  # before 0.8
        return "unknown"
    tell.restype = ctypes.c_char_p
    return str(tell().decode()).removeprefix("v")
