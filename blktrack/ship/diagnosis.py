"""Why a connection failed: from what ssh wrote last and how it ended, what to tell the operator.

ssh ends with 255 for every failure of its own, so its words are all there is to tell them apart. It
has them in English only: it sets the locale for LC_CTYPE and no other category (OpenSSH, utf8.c).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from blktrack.errors import BlktrackError

_FAILED = 255  # ssh itself failed, or the command was killed on the far side


class ConnectionFailed(BlktrackError):
    """The far side cannot be reached, or was lost.

    `retriable` says whether the same may succeed by itself a little later: a network may come back,
    a key or a package will not. `code` is what ssh ended with, negative for a signal, None if it
    had not ended or not begun; all but 255 are the far command's.
    """

    def __init__(
        self, message: str, *, hint: str = "", retriable: bool, code: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retriable = retriable
        self.code = code


@dataclass(frozen=True)
class _Cause:
    line: str  # what ssh says of it: the last line that has this is shown
    hint: str  # {ssh}: what to type to log in
    retriable: bool = False


_BY_HAND = "run `{ssh}` once by hand, and accept its key only if the fingerprint is right"

# In this order: what stands further up is the cause where both were said.
_CAUSES = (
    _Cause(
        r"Host key for .* has changed|host key for .* (was|is marked as) revoked",
        "it may be another machine that answers: ask who runs it, then correct known_hosts",
    ),
    _Cause(r"No \S+ host key is known for", _BY_HAND),
    _Cause(r"Host key verification failed", _BY_HAND),
    _Cause(
        r"Permission denied|Too many authentication failures|No supported authentication",
        "`{ssh}` has to log in, and without being asked where nobody is there to answer: put a "
        "public key of this user into its authorized_keys",
    ),
    _Cause(
        r"Could not resolve hostname .*: (?!Temporary|System error)",
        "check the name, or its Host entry in ssh's configuration",
    ),
    _Cause(
        r"[Bb]ad configuration option|Bad owner or permissions on|Cannot execute command-line"
        r"|^\S+( |: )line \d+: ",
        "correct the configuration of ssh",
    ),
    _Cause(r"Unable to negotiate", "the two versions of ssh have no algorithm in common"),
    _Cause(r"Connection refused", "check that sshd runs there, and on that port", True),
    _Cause(
        r"Could not resolve hostname|No route to host|unreachable|timed out|not responding"
        r"|Connection (to .* )?(closed|reset)|Broken pipe|open failed|disconnect",
        "check the network and that host",
        True,
    ),
)
_UNKNOWN = _Cause("", "see what `{ssh}` says", True)
_NETWORK = _CAUSES[-1]


def diagnose(host: str, ssh: str, code: int | None, said: str, *, up: bool) -> ConnectionFailed:
    """Why there is no connection to `host`, or none any more where it was `up`.

    `code` is as in ConnectionFailed, `said` what came from the standard error of ssh, its own words
    and those of the far side, and `ssh` what a person would type to log in.
    """
    lines = [line.removeprefix("ssh: ") for line in said.splitlines() if line.strip()]
    last = f": {lines[-1]}" if lines else ""
    if code == 127:
        return ConnectionFailed(
            f"{host} has no blktrack{last}",
            hint="install it there, where a shell that is not interactive finds it in its PATH",
            retriable=False,
            code=code,
        )
    if code == 126:
        return ConnectionFailed(
            f"{host} cannot run blktrack{last}",
            hint="check its permissions there",
            retriable=False,
            code=code,
        )
    if own := _own_words(said) if code is not None and 0 < code < _FAILED else None:
        message, hint = own
        error = ConnectionFailed(f"{host}: {message}", hint=hint, retriable=False, code=code)
        error.exit_code = code or error.exit_code
        return error
    if code is not None and 0 <= code != _FAILED:
        return ConnectionFailed(
            f"what ssh ran on {host} ended with code {code}{last}",
            hint=f"see what `{ssh} blktrack recv --serve` says",
            retriable=up,  # it spoke as it should before, and may again
            code=code,
        )
    what, cause = _cause(lines, code)
    goes_on = "; the next run goes on with what is there" if up else ""
    return ConnectionFailed(
        f"the connection to {host} was lost: {what}" if up else f"cannot connect to {host}: {what}",
        hint=cause.hint.format(ssh=ssh) + goes_on,
        retriable=cause.retriable,
        code=code,
    )


def _own_words(said: str) -> tuple[str, str] | None:
    """What a blktrack there said last of why it ended, and what to do."""
    found = re.findall(r"^blktrack: (.*)(?:\n *-> (.*))?", said, re.MULTILINE)
    return found[-1] if found else None


def _cause(lines: list[str], code: int | None) -> tuple[str, _Cause]:
    """What happened, as a clause."""
    for cause in _CAUSES:
        for line in reversed(lines):
            if re.search(cause.line, line):
                return line.rstrip("."), cause
    if code is None:
        return "it does not answer", _NETWORK
    if code < 0:
        return f"ssh was ended by signal {-code}", _UNKNOWN
    if lines:
        return lines[-1].rstrip("."), _UNKNOWN
    # ssh tells of a lost connection, but not of a signal that ended its command.
    return "what ran there was killed", _UNKNOWN
