"""Where a replica on another host is: `ssh://[user@]host[:port]/path`.

It is read as other tools that take such an address read it (git; OpenSSH's own scp and sftp): user
and path may be percent-encoded, an IPv6 address stands in brackets. Unlike with scp the path is
absolute, and unlike in a form of the web a plus is a plus.

Links remember an address in one way of writing it, `str(address)`. A port that was given is kept,
22 too: what ssh takes without one is for its configuration to say.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
import unicodedata
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from blktrack.errors import UsageError

SCHEME = "ssh://"
_FORM = "write ssh://[user@]host[:port]/path"

_HOST = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
# Both may come to stand in a ProxyCommand or a Match of ssh's configuration, which a shell runs
# (CVE-2023-51385): what ssh refuses since 9.6, and all else that a shell or ssh would expand.
_NOT_IN_USER = set("'`\";&<>|(){}[]$%*?!#~\\/:")
# Which sub-delims and others of RFC 3986 (pchar) stand in a path as they are.
_PLAIN = set("/-._~!$&'()*+,;=:@")


@dataclass(frozen=True)
class Address:
    """A replica on another host. The path is absolute, without `.`, `..` and doubled slashes."""

    user: str | None  # None: whom ssh's configuration says
    host: str  # a name for ssh, which may be one of its configuration alone, or an IP address
    port: int | None  # None: what ssh's configuration says
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """UsageError if it is none, or one that ssh or the far side could take for another."""
        if not is_remote(text):
            raise UsageError(f"{text!r} is not an address of another host", hint=_FORM)
        authority, slash, path = text[len(SCHEME) :].partition("/")
        user, at, place = authority.rpartition("@")
        login = _user(text, user) if at else None  # first: no message may show a password
        host, port = _split_port(text, place)
        number = None if port is None else _port(text, port)
        return cls(login, _host(text, host), number, _path(text, slash + path))

    @property
    def name(self) -> str:
        """The host alone, as messages name it."""
        return self.host

    def __str__(self) -> str:
        user = "" if self.user is None else f"{_encode(self.user, _PLAIN - set('/:@'))}@"
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{SCHEME}{user}{host}{port}{_encode(self.path, _PLAIN)}"


def is_remote(text: str) -> bool:
    """Whether this is meant as an address of another host, well-formed or not."""
    return text[: len(SCHEME)].lower() == SCHEME


def short_name(target: str) -> str:
    """What a replica is called where there is no room for more: `disk.img`, `disk.img@vault`."""
    if not is_remote(target):
        return posixpath.basename(target)
    try:
        address = Address.parse(target)
    except UsageError:  # of a later version
        return posixpath.basename(target)
    return f"{posixpath.basename(address.path)}@{address.host}"


def _split_port(text: str, place: str) -> tuple[str, str | None]:
    """The host, in its brackets if it has any, and the port."""
    host, colon, port = place.rpartition("]")[2].partition(":")
    host = place.rpartition("]")[0] + "]" * ("]" in place) + host
    if ":" in port:
        raise UsageError(
            f"{text!r} has more than one port",
            hint="put an IPv6 address in brackets: ssh://[2001:db8::7]/path",
        )
    return host, port if colon else None


def _user(text: str, encoded: str) -> str:
    if ":" in encoded:
        raise UsageError(
            f"{without_secret(text)!r} has a password in it",
            hint="leave it out: ssh asks for it, or better takes a key",
        )
    user = _decode(text, encoded)
    if not user or user[0] == "-" or any(c.isspace() or c in _NOT_IN_USER for c in user):
        raise UsageError(f"{text!r} does not name a user that ssh could log in as", hint=_FORM)
    return user


def _host(text: str, host: str) -> str:
    if not host:
        raise UsageError(f"{text!r} names no host", hint=_FORM)
    if host[0] == "[" and host[-1] == "]":
        return _ipv6(text, host[1:-1])
    if not _HOST.fullmatch(host):
        raise UsageError(
            f"{text!r} does not name a host: {host!r} is neither a name nor an address",
            hint="names are of letters, digits, dots, hyphens and underscores, the first no hyphen",
        )
    return host


def _ipv6(text: str, inside: str) -> str:
    """An address of a link has a zone, its percent sign encoded (RFC 6874) or as people write it"""
    number, percent, zone = inside.partition("%")
    zone = zone.removeprefix("25") if len(zone) > 2 else zone
    try:
        host = str(ipaddress.IPv6Address(number))
    except ValueError:
        host = ""
    if not host or (percent and not _ZONE.fullmatch(zone)):
        raise UsageError(
            f"{text!r} does not name a host: [{inside}] is no IPv6 address", hint=_FORM
        )
    return host + percent + zone


def _port(text: str, port: str) -> int:
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 0 < int(port) < 1 << 16:
        raise UsageError(f"{text!r} has no valid port: {port!r}", hint="ports are 1 to 65535")
    return int(port)


def _path(text: str, encoded: str) -> str:
    for character, name, code in (("?", "a query", "%3F"), ("#", "a fragment", "%23")):
        if character in encoded:
            raise UsageError(
                f"{text!r} has {name}, which means nothing here",
                hint=f"if the path has a {character} in it, write it as {code}",
            )
    parts = [part for part in _decode(text, encoded).split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UsageError(
            f"the path of {text!r} goes up by `..`", hint="write where it leads to on that host"
        )
    if not parts:
        raise UsageError(
            f"{text!r} names no file or device on its host", hint="add it: ssh://host/path"
        )
    if parts[0].startswith("~"):
        raise UsageError(
            f"the path of {text!r} begins in somebody's home", hint="write it out, from the root on"
        )
    return "/" + "/".join(parts)


def _decode(text: str, encoded: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", encoded):
        raise UsageError(
            f"{text!r} has a % that no two hexadecimal digits follow",
            hint="write a % of the name itself as %25",
        )
    try:
        decoded = unquote_to_bytes(encoded).decode()
    except ValueError:  # of either way: the argument, or what it encodes
        raise UsageError(f"{text!r} is not in UTF-8", hint="use another name there") from None
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in decoded):
        raise UsageError(f"{text!r} has control characters", hint="use another name there")
    return decoded


def _encode(text: str, plain: set[str]) -> str:
    """Letters of every language stay readable."""
    return "".join(
        c if c in plain or c.isalnum() else "".join(f"%{byte:02X}" for byte in c.encode())
        for c in text
    )


def without_secret(text: str) -> str:
    """The address as a message may show it."""
    return SCHEME + re.sub(r":[^/]*@", ":…@", text[len(SCHEME) :], count=1)
