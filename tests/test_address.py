"""Addresses of replicas on other hosts: what is written reads back, what could be taken for
something else by ssh, a shell or the far side is refused.
"""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blktrack.errors import UsageError
from blktrack.ship.address import Address, is_remote


@pytest.mark.parametrize(
    ("text", "expected", "canonical"),
    [
        ("ssh://host/disk.img", Address(None, "host", None, "/disk.img"), None),
        ("SSH://host/disk.img", Address(None, "host", None, "/disk.img"), "ssh://host/disk.img"),
        (
            "ssh://admin@backup.example:2222/srv/replicas/vm 1.img",
            Address("admin", "backup.example", 2222, "/srv/replicas/vm 1.img"),
            "ssh://admin@backup.example:2222/srv/replicas/vm%201.img",
        ),
        ("ssh://host:22/a", Address(None, "host", 22, "/a"), None),
        ("ssh://Host_1/a", Address(None, "Host_1", None, "/a"), None),
        ("ssh://192.0.2.7/dev/vg/disk", Address(None, "192.0.2.7", None, "/dev/vg/disk"), None),
        (
            "ssh://[2001:DB8::0:7]/a",
            Address(None, "2001:db8::7", None, "/a"),
            "ssh://[2001:db8::7]/a",
        ),
        ("ssh://u@[::1]:2222/a", Address("u", "::1", 2222, "/a"), None),
        ("ssh://[fe80::1%25eth0]/a", Address(None, "fe80::1%eth0", None, "/a"), None),
        (
            "ssh://[fe80::1%eth0]/a",
            Address(None, "fe80::1%eth0", None, "/a"),
            "ssh://[fe80::1%25eth0]/a",
        ),
        ("ssh://[fe80::1%25]/a", Address(None, "fe80::1%25", None, "/a"), "ssh://[fe80::1%2525]/a"),
        ("ssh://me@corp@host/a", Address("me@corp", "host", None, "/a"), "ssh://me%40corp@host/a"),
        ("ssh://me%40corp@host/a", Address("me@corp", "host", None, "/a"), None),
        ("ssh://host//a/./b///c/", Address(None, "host", None, "/a/b/c"), "ssh://host/a/b/c"),
        ("ssh://host/a%3fb%23%25", Address(None, "host", None, "/a?b#%"), "ssh://host/a%3Fb%23%25"),
        ("ssh://host/lost+found/a@b:c", Address(None, "host", None, "/lost+found/a@b:c"), None),
        ("ssh://host/M%C3%BCller", Address(None, "host", None, "/Müller"), "ssh://host/Müller"),
        ("ssh://host/-a/...", Address(None, "host", None, "/-a/..."), None),
    ],
)
def test_parse(text: str, expected: Address, canonical: str | None) -> None:
    address = Address.parse(text)
    assert address == expected
    assert str(address) == (canonical or text)
    assert Address.parse(str(address)) == address
    assert address.name == address.host


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/srv/disk.img", "is not an address"),
        ("host:/srv/disk.img", "is not an address"),
        ("ssh:/host/a", "is not an address"),
        ("ssh://", "names no host"),
        ("ssh:///a", "names no host"),
        ("ssh://u@/a", "names no host"),
        ("ssh://:22/a", "names no host"),
        ("ssh://-oProxyCommand=x/a", "does not name a host"),
        ("ssh://u@-J/a", "does not name a host"),
        ("ssh://h;reboot/a", "does not name a host"),
        ("ssh://h%41/a", "does not name a host"),
        ("ssh://h h/a", "does not name a host"),
        ("ssh://$(id)/a", "does not name a host"),
        ("ssh://hôte/a", "does not name a host"),
        ("ssh://h?x/a", "does not name a host"),
        ("ssh://[::1/a", "more than one port"),
        ("ssh://[::1]x/a", "does not name a host"),
        ("ssh://x[::1]/a", "does not name a host"),
        ("ssh://[::1%25-]x/a", "does not name a host"),
        ("ssh://[192.0.2.7]/a", "no IPv6 address"),
        ("ssh://[]/a", "no IPv6 address"),
        ("ssh://[fe80::1%]/a", "no IPv6 address"),
        ("ssh://[fe80::1%25e;d]/a", "no IPv6 address"),
        ("ssh://2001:db8::7/a", "more than one port"),
        ("ssh://host:22:23/a", "more than one port"),
        ("ssh://host:/a", "no valid port"),
        ("ssh://host:0/a", "no valid port"),
        ("ssh://host:65536/a", "no valid port"),
        ("ssh://host:+22/a", "no valid port"),
        ("ssh://host:ssh/a", "no valid port"),
        ("ssh://host:٢٢/a", "no valid port"),
        ("ssh://@host/a", "does not name a user"),
        ("ssh://-l@host/a", "does not name a user"),
        ("ssh://%2dl@host/a", "does not name a user"),
        ("ssh://a%20-oX@host/a", "does not name a user"),
        ("ssh://%60id%60@host/a", "does not name a user"),
        ("ssh://u%25h@host/a", "does not name a user"),
        ("ssh://u%00@host/a", "control characters"),
        ("ssh://u:secret@host/a", "has a password in it"),
        ("ssh://u:secret@host:1:2", "has a password in it"),
        ("ssh://host", "names no file"),
        ("ssh://host:22", "names no file"),
        ("ssh://host/", "names no file"),
        ("ssh://host//.//", "names no file"),
        ("ssh://host/a?b=c", "has a query"),
        ("ssh://host/a#b", "has a fragment"),
        ("ssh://host/a/../b", "goes up"),
        ("ssh://host/a/%2e%2E/b", "goes up"),
        ("ssh://host/..", "goes up"),
        ("ssh://host/~/a", "somebody's home"),
        ("ssh://host/~root/a", "somebody's home"),
        ("ssh://host/a%", "no two hexadecimal digits"),
        ("ssh://host/a%+1", "no two hexadecimal digits"),
        ("ssh://host/a%00b", "control characters"),
        ("ssh://host/a\nb", "control characters"),
        ("ssh://host/a%1b[2J", "control characters"),
        ("ssh://host/a%C2%85", "control characters"),
        ("ssh://host/a%E2%80%A8", "control characters"),
        ("ssh://host/a%FF", "is not in UTF-8"),
        ("ssh://host/a\udcff", "is not in UTF-8"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    assert message in str(caught.value)
    assert caught.value.hint
    assert "secret" not in str(caught.value)


def test_what_is_meant_as_one() -> None:
    for text in ("ssh://host/a", "Ssh://host/a", "ssh://", "ssh:///"):
        assert is_remote(text)
    for text in ("/ssh://a", "./ssh://a", "host:/a", "ssh:/a", "", "sshx://h/a"):
        assert not is_remote(text)


NAME = st.text(string.ascii_letters + string.digits + "._-", min_size=1)
HOSTS = st.one_of(
    NAME.filter(lambda name: name[0] != "-"),
    st.ip_addresses(v=6).map(str),
    st.tuples(st.ip_addresses(v=6).map(str), NAME).map("%".join),
)
USERS = st.text(string.ascii_letters + string.digits + "._-+@ü", min_size=1)
PARTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="/"))
PATHS = st.lists(PARTS.filter(lambda part: part not in ("", ".", "..")), min_size=1)
ADDRESSES = st.builds(
    Address,
    st.none() | USERS.filter(lambda user: user[0] != "-"),
    HOSTS,
    st.none() | st.integers(1, 65535),
    PATHS.filter(lambda parts: parts[0][0] != "~").map(lambda parts: "/" + "/".join(parts)),
)


@given(ADDRESSES)
def test_round_trip(address: Address) -> None:
    text = str(address)
    assert Address.parse(text) == address
    assert not set(text) & set(' \t\n?#"<>\\^`{|}')


@given(st.text().map(lambda rest: f"ssh://{rest}") | st.text(string.printable))
def test_whatever_is_read_is_safe(text: str) -> None:
    try:
        address = Address.parse(text)
    except UsageError:
        return
    assert Address.parse(str(address)) == address
    assert address.host[0] != "-" and (address.user is None or address.user[0] != "-")
    assert address.path[0] == "/" and ".." not in address.path.split("/")
    assert not set(f"{address.user}{address.host}") & set(" '\"`$;&|<>(){}\n\0")
