"""Notes which error and warning places of the product are reached, in every process of a test run.

Python loads a module of this name by itself wherever its folder is in PYTHONPATH, so that commands
that tests start are watched too. With BLKTRACK_REACHED=DIR, modules of blktrack get marks
(tests/message_sites.py) that set a byte each in a file in DIR, mapped shared: what a process
reached is on record whatever kills it, and no limit of files or sizes is in the way.

Every process pays for what is imported here, so it is little.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from mmap import mmap
    from types import CodeType, ModuleType

VARIABLE = "BLKTRACK_REACHED"
HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
ROOM = 4096  # bytes, one for each place of a module


class Marking(SourceFileLoader):
    """Loads a module of blktrack with marks."""

    def __init__(self, name: str, path: str, folder: str) -> None:
        super().__init__(name, path)
        self._folder = folder

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__reached__"] = self._bytes()
        super().exec_module(module)

    def _bytes(self) -> mmap | bytearray:
        from mmap import mmap

        try:
            fd = os.open(f"{self._folder}/{self.name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError:
            return bytearray(ROOM)
        try:
            if os.fstat(fd).st_size < ROOM:
                os.fchmod(fd, 0o666)  # another user may come next
                os.truncate(fd, ROOM)
            return mmap(fd, ROOM)
        except OSError:
            return bytearray(ROOM)
        finally:
            os.close(fd)

    def get_code(self, fullname: str) -> CodeType:
        """Kept in the folder: to make it takes longer than most commands."""
        import marshal

        kept = f"{self._folder}/{self.name}.{os.stat(self.path).st_mtime_ns}.code"
        try:
            with open(kept, "rb") as file:
                code: CodeType = marshal.load(file)
        except OSError:
            code = self._marked()
            self._keep(kept, marshal.dumps(code))
        return code

    def _keep(self, path: str, data: bytes) -> None:
        """Without it, which may be for a limit that a test sets, the next one makes it again."""
        try:
            with open(f"{path}.{os.getpid()}", "xb") as file:
                file.write(data)
            os.rename(file.name, path)
        except OSError:
            pass

    def _marked(self) -> CodeType:
        if TOP not in sys.path:
            sys.path.append(TOP)
        from tests.message_sites import marked_code

        return marked_code(self.get_data(self.path), self.path)


class BlktrackFinder:
    """Finds the modules of the blktrack that these tests are of; other copies go unwatched."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # runpy has no use for a loader of its own kind, and there is no place in that module.
        if name.partition(".")[0] != "blktrack" or name == "blktrack.__main__":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin and spec.origin.startswith(f"{TOP}/blktrack/"):
            spec.loader = Marking(name, spec.origin, self._folder)
        return spec


def install(folder: str) -> None:
    """Before anything of blktrack is imported."""
    if not any(type(finder).__name__ == "BlktrackFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, BlktrackFinder(folder))


if folder := os.environ.get(VARIABLE):
    install(folder)
