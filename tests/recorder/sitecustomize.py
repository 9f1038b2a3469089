"""Notes which error and warning places of the product are reached, in every process of a test run.

Python loads a module of this name by itself wherever its folder is in PYTHONPATH, so that commands
that tests start are watched too. With BLKTRACK_REACHED=DIR, modules of blktrack get marks
(tests/message_sites.py) that set a byte each in one file in DIR, mapped shared: what a process
reached is on record whatever kills it, and no limit of open files or sizes is in the way.

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
    from types import CodeType, ModuleType

VARIABLE = "BLKTRACK_REACHED"
HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
MODULES, MARKS = "modules", "marks"  # files in DIR: names, and ROOM bytes for each of them
ROOM = 256  # more places than any module has


class Marking(SourceFileLoader):
    """Loads a module of blktrack with marks."""

    def __init__(self, name: str, path: str, folder: str, marks: memoryview | bytearray) -> None:
        super().__init__(name, path)
        self._folder, self._marks = folder, marks

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__reached__"] = self._marks
        super().exec_module(module)

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
        from mmap import mmap

        self._folder = folder
        with open(f"{folder}/{MODULES}", encoding="utf-8") as file:
            self._modules = file.read().split()
        # One descriptor, whatever limit of them a test sets.
        with open(f"{folder}/{MARKS}", "r+b") as marks:
            self._marks = memoryview(mmap(marks.fileno(), 0))

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # runpy has no use for a loader of its own kind, and there is no place in that module.
        if name.partition(".")[0] != "blktrack" or name == "blktrack.__main__":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin and spec.origin.startswith(f"{TOP}/blktrack/"):
            spec.loader = Marking(name, spec.origin, self._folder, self._marks_of(name))
        return spec

    def _marks_of(self, name: str) -> memoryview | bytearray:
        if name not in self._modules:  # it is new: the next run has it
            return bytearray(ROOM)
        start = self._modules.index(name) * ROOM
        return self._marks[start : start + ROOM]


def install(folder: str) -> None:
    """Before anything of blktrack is imported."""
    if not any(type(finder).__name__ == "BlktrackFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, BlktrackFinder(folder))


if __name__ == "sitecustomize" and (folder := os.environ.get(VARIABLE)):
    install(folder)
