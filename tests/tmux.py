"""A real terminal for tests: tmux with a server of its own, so that two runs do not meet."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.blockdev import TOP, wait_until

PROMPT = "ready$ "


class Terminal:
    """A shell in a pane of `width` by `height`; a context."""

    def __init__(self, width: int, height: int, env: Mapping[str, str] | None = None) -> None:
        # A socket's path has to be short.
        self.folder = Path(tempfile.mkdtemp(prefix="blktrack-", dir="/tmp"))
        self._env = {
            **{name: value for name, value in os.environ.items() if name not in ("CI", "TMUX")},
            "TMUX_TMPDIR": str(self.folder),
            "LC_ALL": "C.UTF-8",
        }
        self._size = (width, height)
        self._more = dict(env or {})

    def __enter__(self) -> Self:
        columns, rows = map(str, self._size)
        set_up = [word for name, value in self._more.items() for word in ("-e", f"{name}={value}")]
        shell = f"PS1='{PROMPT}' exec bash --norc --noprofile"
        size = ("-x", columns, "-y", rows)
        self.tmux("-f", "/dev/null", "new-session", "-d", *size, *set_up, "-c", str(TOP), shell)
        try:
            self.wait(PROMPT.strip())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.tmux("kill-server")
        finally:
            shutil.rmtree(self.folder)

    def tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-u", "-L", "test", *words],
            capture_output=True,
            encoding="utf-8",
            env=self._env,
            check=False,
        )
        assert done.returncode == 0, f"tmux {words}: {done.stderr}"
        return done.stdout

    def screen(self, *options: str) -> list[str]:
        """The rows as they are seen, blanks at their ends left out."""
        return [
            line.rstrip() for line in self.tmux("capture-pane", "-p", *options).split("\n")[:-1]
        ]

    @property
    def text(self) -> str:
        return "\n".join(self.screen())

    def tell(self, name: str) -> str:
        """A variable of tmux: alternate_on, cursor_flag, pane_pid."""
        return self.tmux("display-message", "-p", f"#{{{name}}}").strip()

    def keys(self, *names: str) -> None:
        self.tmux("send-keys", *names)

    def type(self, line: str) -> None:
        self.tmux("send-keys", "-l", line)
        self.keys("Enter")

    def resize(self, width: int, height: int) -> None:
        self.tmux("resize-window", "-x", str(width), "-y", str(height))

    def wait(self, text: str, *, gone: bool = False) -> str:
        """Until it is seen, or no longer is; the screen then."""
        wait_until(lambda: (text in self.text) is not gone, f"{text!r}{' gone' * gone}")
        return self.text

    def child(self) -> int:
        """The process that the shell runs in the foreground."""
        path = Path(f"/proc/{self.tell('pane_pid')}/task/{self.tell('pane_pid')}/children")
        wait_until(lambda: path.read_text(encoding="ascii") != "", "a child of the shell")
        return int(path.read_text(encoding="ascii").split()[0])
