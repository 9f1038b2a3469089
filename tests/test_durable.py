"""Files that are whole whatever dies when, and locks that a death releases."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blktrack import durable
from blktrack.errors import BlktrackError, Busy

# Kills itself before the line of durable.py that it reaches as the N-th; 0: prints how many it ran.
KILLED_AT_A_LINE = """
import json, os, signal, sys
from pathlib import Path
from blktrack import durable

path, fatal, seen = Path(sys.argv[1]), int(sys.argv[2]), 0

def trace(frame, event, argument):
    global seen
    if frame.f_code.co_filename != durable.__file__:
        return None
    if event == "line":
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

sys.settrace(trace)
durable.write_json(path, {"value": "new"})
sys.settrace(None)
print(seen)
"""

# Replaces the file for ever with values of changing length that prove themselves.
WRITER = """
import sys
from pathlib import Path
from blktrack import durable

path, number = Path(sys.argv[1]), int(sys.argv[2])
while True:
    number += 1
    durable.write_json(path, {"number": number, "text": "x" * (number * 7919 % 100_000)})
    print(number, flush=True)
"""

HOLDER = """
import sys, time
from pathlib import Path
from blktrack import durable

with durable.lock(Path(sys.argv[1]), what="the lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/state.json"
    assert durable.read_json(path) is None
    for value in ({}, {"a": 1, "ü": ["x", None, 2.5]}, {"b": {"c": "d" * 100_000}}):
        durable.write_json(path, value)
        assert durable.read_json(path) == value
    assert os.listdir(path.parent) == ["state.json"]


def test_killed_at_every_line(tmp_path: Path) -> None:
    path = tmp_path / "state.json"

    def run(fatal: int) -> subprocess.Popen[str]:
        durable.write_json(path, {"value": "old"})
        return start(KILLED_AT_A_LINE, path, fatal)

    whole = run(0)
    lines = int(whole.communicate()[0])
    assert lines > 10
    values = []
    for fatal in range(1, lines + 1):
        assert run(fatal).wait() == -signal.SIGKILL
        value = durable.read_json(path)
        assert value in ({"value": "old"}, {"value": "new"})
        values.append(value["value"] if value else "")
    # The old one before the rename and the new one after it, and both happen.
    assert values == sorted(values, reverse=True)
    assert set(values) == {"old", "new"}


def test_killed_at_any_time(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "state.json"
    chance = random.Random(seed)
    last = 0
    for _ in range(25):
        with start(WRITER, path, last) as writer:
            assert writer.stdout
            said = int(writer.stdout.readline())
            time.sleep(chance.random() * 0.02)
            writer.kill()
            said = max([said, *map(int, writer.stdout.read().split())])
        value = durable.read_json(path)
        assert value
        # What was said to be written is there, or the one after it.
        assert value["number"] in (said, said + 1)
        assert value["text"] == "x" * (value["number"] * 7919 % 100_000)
        last = value["number"]


def test_the_new_name_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content before name, name before return: else a power cut leaves an empty file."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def note_rename(old: Path, new: Path) -> None:
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    durable.write_json(tmp_path / "state.json", {})
    assert done == ["file", "rename", "folder"]
    done.clear()
    durable.write_json(tmp_path / "new/folder/state.json", {})
    assert done == ["folder", "folder", "file", "rename", "folder"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b"[1, 2]", b"7", b"null", b"\0" * 64, b'{"a": "\xff"}']
)
def test_damaged_content(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(BlktrackError, match="is damaged") as caught:
        durable.read_json(path)
    assert str(path) in str(caught.value)
    assert str(path) in caught.value.hint
    assert path.read_bytes() == content


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(BlktrackError, match="cannot read"):
        durable.read_json(tmp_path)  # a folder


def test_unwritable(tmp_path: Path) -> None:
    """Whatever cannot be made, folder, file or name, is one sentence, and nothing is left over."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder/state.json").mkdir(parents=True)
    for path in (tmp_path / "file/state.json", tmp_path / "folder/state.json"):
        with pytest.raises(BlktrackError, match="cannot write") as caught:
            durable.write_json(path, {})
        assert str(path) in str(caught.value)
        assert caught.value.hint
    assert os.listdir(tmp_path / "folder") == ["state.json"]


def test_read_only_folder(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "state.json", {"value": "old"})
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_write_as_nobody, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert durable.read_json(tmp_path / "state.json") == {"value": "old"}
    assert os.listdir(tmp_path) == ["state.json"]


def _write_as_nobody(folder: Path) -> None:
    """Permissions bind only others than root."""
    folder.chmod(0o555)
    os.chdir(folder)  # the folders above it are not open to all
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    with pytest.raises(BlktrackError, match="cannot write"):
        durable.write_json(Path("state.json"), {"value": "new"})
    with pytest.raises(BlktrackError, match="cannot write"):
        durable.write_json(Path("new/state.json"), {"value": "new"})
    with pytest.raises(BlktrackError, match="cannot lock"), durable.lock(Path("lock"), what="x"):
        pass


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "state.json", {"value": "old"})
    with pytest.raises(TypeError):
        durable.write_json(tmp_path / "state.json", {"value": object()})
    assert durable.read_json(tmp_path / "state.json") == {"value": "old"}
    assert os.listdir(tmp_path) == ["state.json"]


def test_people_can_read_it(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "state.json", {"a": 1, "b": 2})
    text = (tmp_path / "state.json").read_text()
    assert len(text.splitlines()) == 4
    assert json.loads(text) == {"a": 1, "b": 2}


def test_lock_excludes(tmp_path: Path) -> None:
    path = tmp_path / "run/lock"
    with durable.lock(path, what="device /dev/sdx"):
        begun = time.monotonic()
        with pytest.raises(Busy) as caught, durable.lock(path, what="device /dev/sdx"):
            pass
        assert time.monotonic() - begun < 5
        with pytest.raises(Busy), durable.lock(path, what="device /dev/sdx", wait=0.2):
            pass
        assert time.monotonic() - begun >= 0.2
        with durable.lock(tmp_path / "run/other", what="device /dev/sdy"):
            pass
    assert "device /dev/sdx" in str(caught.value)
    assert caught.value.exit_code == 6
    with durable.lock(path, what="device /dev/sdx"):
        pass


def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), durable.lock(tmp_path / "lock", what="x"):
        raise KeyError
    with durable.lock(tmp_path / "lock", what="x"):
        pass


def test_a_killed_holder_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with start(HOLDER, path) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy), durable.lock(path, what="x"):
            pass
        holder.kill()
        with durable.lock(path, what="x", wait=30):
            pass


def test_waiting_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with start(HOLDER, path) as holder:
        assert holder.stdout
        assert holder.stdin
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Busy), durable.lock(path, what="x", wait=0.05):
            pass
        holder.stdin.close()
        with durable.lock(path, what="x", wait=30):
            pass


def test_a_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A program that was started under the lock and outlives it must not keep it."""
    with durable.lock(tmp_path / "lock", what="x"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with durable.lock(tmp_path / "lock", what="x"):
            pass
    finally:
        child.kill()
        child.wait()
