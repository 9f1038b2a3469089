"""python -m blktrack, and the installed command."""

import codecs
import os
import signal
import sys


def run() -> int:
    _stand_in()
    _let_print()
    # Python would answer SIGINT with a traceback, of the imports below to begin with. As any death
    # is harmless, only commands that have something to tell catch signals, for that time.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from blktrack.cli import main

    return main()


def _stand_in() -> None:
    """Open what of the standard streams is closed: its number would be that of the next file, a
    replica perhaps, and what a library or a hook says on standard error would go into that."""
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free, as are the next
        sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        os.open(os.devnull, os.O_RDONLY)  # cannot be written: that nobody gets it is an error
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        os.open(os.devnull, os.O_WRONLY)
        sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    for number in range(3):  # also to hooks
        os.set_inheritable(number, True)


def _let_print() -> None:
    """A name may be any bytes: they are printed as they are. What a terminal has no letter for is
    printed as "?"."""
    codecs.register_error("printed", _printed)
    sys.stdout.reconfigure(errors="printed")  # type: ignore[union-attr]


def _printed(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


if __name__ == "__main__":
    sys.exit(run())
