"""python -m blktrack, and the installed command."""

import signal
import sys


def run() -> int:
    # Python would answer SIGINT with a traceback, of the imports below to begin with. As any death
    # is harmless, only commands that have something to tell catch signals, for that time.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from blktrack.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
