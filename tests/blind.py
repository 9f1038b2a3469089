"""Programs that overlook some changes, as where the kernel does not run them and counts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from blktrack.bpf import compile

# Where a program sees a request end, a bio end, a request begin.
COMPLETE = "int blk_rq_complete(u64 *ctx)\n{\n"
REMEMBERED = "\tif (!found)\n\t\treturn false;\n"
ISSUE = "int blk_rq_issue(u64 *ctx)\n{\n"
BLIND_TO_BIO = "\tif (found->sector == 10240)\n\t\treturn true;\n"


def blind(sector: int) -> str:
    """To requests that begin there."""
    return f"\tif (FIELD(u64, (void *)ctx[0], RQ_SECTOR) == {sector})\n\t\treturn 0;\n"


def blinded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *programs: str, code: str = blind(10240)
) -> None:
    """Compile programs with `code` put in, from a copy of their text in `folder`."""
    here = Path(compile.__file__).parent
    copy = folder / "bpf"
    copy.mkdir()
    text = (here / "track.c").read_text()
    for program in programs:
        assert program in text
        text = text.replace(program, program + code)
    (copy / "track.c").write_text(text)
    (copy / "track.h").write_text((here / "track.h").read_text())
    monkeypatch.setattr(compile, "_HERE", copy)
