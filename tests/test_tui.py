"""What `top` draws: from made-up reports, and in a real terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from blktrack.report import Past, TopReport
from blktrack.tui import board, help, look, plain, words
from blktrack.tui.board import View
from blktrack.tui.keys import Keys
from blktrack.tui.look import ASCII, UNICODE, Glyphs, Line
from blktrack.tui.screen import Screen
from blktrack.tui.trend import SPAN, Trend, step_of
from tests.blockdev import wait_until
from tests.boards import HEAT, NOW, device, link, report, some, usual
from tests.tmux import PROMPT, Terminal

WIDTHS = (80, 120, 200)


def text_of(line: Line) -> str:
    return "".join(segment.text for segment in line)


def drawn(
    told: TopReport, width: int, height: int = 40, *, shapes: Glyphs = UNICODE, **chosen: object
) -> list[str]:
    view = View()
    for name, value in chosen.items():
        setattr(view, name, value)
    trends = {found.device: Trend() for found in told.devices}
    for number, trend in enumerate(trends.values()):
        for second in range(0, SPAN, 5):
            trend.add(NOW - SPAN + second, float(number + second % 60))
    lines = board.draw(told, trends, view, shapes, width=width, height=height)
    assert len(lines) == height
    return [text_of(line) for line in lines]


def row(lines: list[str], text: str) -> str:
    (found,) = [line for line in lines if text in line]
    return found


@pytest.mark.parametrize("shapes", [UNICODE, ASCII], ids=["unicode", "ascii"])
@pytest.mark.parametrize("width", [*WIDTHS, 40, 4, 1])
def test_no_line_is_wider_than_the_terminal(seed: int, width: int, shapes: Glyphs) -> None:
    for told in (usual(), report(), *some(seed)):
        for height in (3, 10, 24):
            for order in (0, 4):
                lines = drawn(told, width, height, shapes=shapes, order=order, paused=bool(order))
                assert [line for line in lines if cell_len(line) > width] == []
    for line in help.page(width, 30, shapes):
        assert cell_len(text_of(line)) <= width


@pytest.mark.parametrize("shapes", [UNICODE, ASCII], ids=["unicode", "ascii"])
def test_the_help_page_loses_nothing_at_80_columns(shapes: Glyphs) -> None:
    narrow, wide = (
        [text_of(line).rstrip() for line in help.page(width, 30, shapes)] for width in (80, 200)
    )
    assert narrow == wide


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_stand_below_their_headings(width: int) -> None:
    lines = drawn(usual(), width)
    head, link_head = lines[1], lines[2]
    data, link_row = row(lines, "vg0/data"), row(lines, "/backup/data.img"[-10:])
    names = ["BYTES/s", "WRITES/s" if width > 100 else "WR./s", "DIRTY/s", " DIRTY "]
    for name, figure in zip(names, ["12.4 MiB", "3.1k", "1.2k", "312 MiB"], strict=True):
        end = head.index(name) + len(name.rstrip())
        assert data[:end].endswith(figure), (name, data)
    for name, figure in (("LAG", "2:05"), ("RPO", "5:00"), ("TO GO", "312 MiB"), ("ETA", "1:05")):
        end = link_head.index(name) + len(name)
        assert link_row[:end].endswith(figure), (name, link_row)
    at = time.strftime("%H:%M:%S", time.localtime(NOW - 125))
    assert link_row[link_head.index("POINT") :].startswith(at)
    assert "crash" in link_row and "→" in link_row


def test_a_wide_terminal_shows_more() -> None:
    narrow, wide = (drawn(usual(), width) for width in (80, 200))
    assert "412 ns" in row(wide, "/dev/vg0/data") and "381 MiB/s" in row(wide, "/backup/data.img")
    assert "filesystem" in row(wide, "/mnt/offsite/data.img")
    assert "64 GiB by 4 KiB" in "\n".join(wide)
    # On a narrow one they stand beside the strip.
    assert row(narrow, "3 lost").rstrip().endswith("64 GiB, 3 lost, 412 ns")
    assert re.search(r"\d\d:\d\d:\d\d fs$", row(narrow, "1:06:40").rstrip())


def test_what_is_wrong_is_said() -> None:
    lines = drawn(usual(), 80)
    assert "3 devices, 1 gap, 1 link over RPO, 1 link late" in lines[0]
    assert f"{UNICODE.bad} gap" in row(lines, "sdc ")
    assert row(lines, "the host was rebooted").startswith("    ")
    assert f"{UNICODE.late} ready" in row(lines, "6:20")
    assert f"{UNICODE.bad} tracking" in row(lines, "sdb "), "it lost marks"


def test_lag_has_the_colour_of_the_promise() -> None:
    frame = board.draw(usual(), {}, View(), UNICODE, width=120, height=30)
    styles = {
        segment.text.strip(): segment.style for line in frame for segment in line if segment.text
    }
    assert styles["2:05"] is look.GOOD
    assert styles["6:20"] is look.LATE
    assert styles["1:06:40"] is look.BAD


def test_where_there_is_no_room_the_chosen_device_is_whole() -> None:
    many = report(
        *(device(f"/dev/sd{letter}", link(f"/b/{letter}")) for letter in "abcdefghij"),
        device("/dev/sdk", link("/b/k", lateness="broken", lag_s=9000.0)),
    )
    lines = drawn(many, 80, 24, chosen="/dev/sdc")
    assert UNICODE.chosen in row(lines, "/dev/sdc")
    assert row(lines, "/b/c") and not any("/b/d" in line for line in lines)
    assert f"{UNICODE.bad} over RPO" in row(lines, "/dev/sdk")
    short = drawn(many, 80, 12, chosen="/dev/sdk")
    assert row(short, "/b/k") and "of 11" in short[-1]
    assert row(drawn(many, 80, 12, chosen="/dev/sda"), "/b/a")


def test_orders() -> None:
    told = report(
        device("/dev/sd10", link("/x", lag_s=5.0), write_rate=3.0, dirty_bytes=10, dirty_rate=2.0),
        device("/dev/sd9", link("/y", lag_s=9.0), write_rate=5.0, dirty_bytes=30, dirty_rate=1.0),
        device("/dev/sd8", write_rate=None, dirty_bytes=20, dirty_rate=9.0),
    )
    found = {
        name: [d.device[-2:].strip("d") for d in board.ordered(told.devices, View(order=number))]
        for number, (name, *_) in enumerate(board.ORDERS)
    }
    assert found == {
        "name": ["8", "9", "10"],
        "write rate": ["9", "10", "8"],
        "dirty rate": ["8", "10", "9"],
        "dirty bytes": ["9", "8", "10"],
        "lag": ["9", "10", "8"],
    }
    back = board.ordered(told.devices, View(order=1, reverse=True))
    assert [d.device for d in back] == ["/dev/sd8", "/dev/sd10", "/dev/sd9"]


def test_the_strip_shows_every_dirty_part() -> None:
    for width in (10, 60, 256, 300):
        for part in (0, 77, 255):
            shares = [0.0] * 256
            shares[part] = 0.0001
            text = text_of(look.strip(shares, width, UNICODE))
            assert len(text) == width
            dark = [at for at, glyph in enumerate(text) if glyph != UNICODE.shades[0]]
            assert dark and all(abs(at - part * width / 256) <= 2 for at in dark)
    assert text_of(look.strip(HEAT, 64, ASCII)) == "." * 25 + "#####" + "+" * 9 + "." * 25


def test_a_trend_stands_still_between_its_columns() -> None:
    trend = Trend()
    for second in range(600):
        trend.add(NOW + second, float(second % 40))
    assert step_of(60) == 5 and step_of(14) == 30
    before = trend.draw(60, UNICODE)
    trend.add(NOW + 599.5, 1.0)
    assert trend.draw(60, UNICODE)[:-1] == before[:-1]
    trend.add(NOW + 600, 0.0)
    assert trend.draw(60, UNICODE)[:-2] == before[1:-1]
    assert trend.draw(60, UNICODE)[-1] == UNICODE.levels[0]
    assert trend.columns(60)[-2] == pytest.approx((35 + 36 + 37 + 38 + 39 + 1) / 6)
    empty = Trend()
    assert empty.draw(10, UNICODE) == " " * 10


def test_words() -> None:
    numbers = [0.0, 0.04, 0.2, 5.0, 9.96, 812.0, 3120.0, 12_345.0, 999_700.0, 3.2e9]
    assert [words.number(value) for value in numbers] == [
        *("0", "<0.1", "0.2", "5", "10", "812", "3.1k", "12k", "1.0M", "3.2G")
    ]
    ages = [0.4, 59.9, 185.0, 7385.0, 90_000.0]
    assert [words.age(value) for value in ages] == ["0 s", "59 s", "3:05", "2:03:05", "1 d 1 h"]
    assert max(len(words.number(10.0**power)) for power in range(-3, 12)) <= 4


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (45, "ssh://root@vault.example.com:22/srv/b/sdb.img"),
        (44, "vault.example.com:/srv/b/sdb.img"),
        (31, "vault:/srv/b/sdb.img"),
        (19, "vault:…rv/b/sdb.img"),
        (11, "vault:….img"),
        (10, "vault"),
        (4, "vau…"),
        (0, "…"),
    ],
)
def test_the_host_of_a_replica_is_named(width: int, shown: str) -> None:
    assert look.name("ssh://root@vault.example.com:22/srv/b/sdb.img", width, "…") == shown


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("ssh://192.0.2.77/srv/b/sdb.img", "192.0.2.77:…sdb.img"),
        ("ssh://[2001:db8::7]/srv/b/sdb.img", "2001:db8::7:…db.img"),
        ("ssh://not an address, but long", "… address, but long"),
    ],
)
def test_a_number_is_told_whole(target: str, shown: str) -> None:
    assert look.name(target, 19, "…") == shown


def test_a_run_that_failed_is_told() -> None:
    failed = Past("cannot connect to vault: Connection refused", NOW - 60)
    told = report(device("/dev/sdb", link("ssh://vault/b", failed=failed)))
    lines = drawn(told, 80)
    at = time.strftime("%H:%M:%S", time.localtime(NOW - 60))
    assert f"{UNICODE.late} ready" in row(lines, "ssh://vault/b")
    assert row(lines, f"failed {at}: cannot connect to vault").startswith("    ")
    (line,) = [line for line in plain.lines(told) if "ssh://vault" in line]
    assert line.endswith(f"\n     failed {at}: cannot connect to vault: Connection refused")


def test_names_from_outside_cannot_steer_the_terminal() -> None:
    nasty = report(device("/dev/\x1b[2J", link("/b/\x1b]0;x\x07\n"), reason="a\x1bb"))
    for line in drawn(nasty, 120):
        assert line.isprintable(), line


def test_keys_in_pieces() -> None:
    keys = Keys()
    assert keys.feed(b"q\x1b[A\x1bOBj") == ["q", "up", "down", "j"]
    assert keys.feed(b"\x1b") == []
    assert keys.feed(b"[") == [] and keys.feed(b"6~s") == ["page down", "s"]
    assert keys.feed(b"\x1b") == []
    assert keys.flush() == ["escape"] and keys.flush() == []
    assert keys.feed(b"\x1b[1;5C\x1b[200~\xff") == ["\ufffd"], "what means nothing is dropped"


@pytest.mark.parametrize(
    ("environment", "shapes"),
    [
        ({}, ASCII),
        ({"LANG": "C"}, ASCII),
        ({"LANG": "de_DE.UTF-8"}, UNICODE),
        ({"LANG": "de_DE.utf8", "LC_ALL": "C"}, ASCII),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, UNICODE),
    ],
)
def test_glyphs_follow_the_locale(environment: dict[str, str], shapes: Glyphs) -> None:
    assert look.glyphs(environment) is shapes


def test_a_refresh_writes_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    ours, theirs = pty.openpty()
    try:
        os.set_blocking(ours, False)
        screen = Screen(theirs, theirs, UNICODE)
        before, after = usual(), usual()
        after.time += 1
        after.devices[0].write_rate = 99e6
        frames = [
            board.draw(told, {}, View(), UNICODE, width=80, height=24) for told in (before, after)
        ]
        monkeypatch.setattr(Screen, "size", (80, 24))
        screen.draw(frames[0])
        os.read(ours, 1 << 16)
        written = screen.written
        screen.draw(list(frames[0]))
        assert screen.written == written, "nothing changed"
        screen.draw(frames[1])
        new = os.read(ours, 1 << 16)
        # A second of the clock, two digits of a rate.
        assert len(new) == screen.written - written < 60, new
        assert b";31H94" in new, "of 12.4 MiB there remains .4 MiB"
    finally:
        os.close(ours)
        os.close(theirs)


real = pytest.mark.needs("tmux")


def program(*words: object) -> str:
    return " ".join([sys.executable, "-m", "tests.boards", *map(str, words)])


def expected(seed: int, width: int, height: int) -> list[str]:
    """The last frame, drawn at once; trends are as they were at the end of the reports."""
    reports = some(seed)
    trends: dict[str, Trend] = {}
    for told in [reports[0], *reports[1:]]:
        for found in told.devices:
            trend = trends.setdefault(found.device, Trend())
            if found.write_rate is not None:
                trend.add(told.time, found.write_rate)
    frame = board.draw(reports[-1], trends, View(interval=0.1), UNICODE, width=width, height=height)
    return [text_of(line).rstrip() for line in frame]


def layout(lines: list[str]) -> list[str]:
    """Without the trends, which go on while the last report is shown again and again."""
    return [re.sub(f"[ {UNICODE.levels}]+$", "", line) for line in lines]


@real
@pytest.mark.parametrize("width", WIDTHS)
def test_the_screen_is_what_was_drawn(seed: int, width: int) -> None:
    """However it came about: by writing changes, or anew after the window had another size."""
    with Terminal(width, 30) as terminal:
        terminal.type(program(seed))
        for columns, rows in ((width, 30), (97, 17), (width, 30)):
            terminal.resize(columns, rows)
            wanted = layout(expected(seed, columns, rows))
            try:
                wait_until(lambda w=wanted: layout(terminal.screen()) == w, "the last frame", 20)  # type: ignore[misc]
            except AssertionError:
                assert layout(terminal.screen()) == wanted
        terminal.keys("q")
        terminal.wait(PROMPT.strip())


@real
def test_keys_in_a_terminal() -> None:
    with Terminal(100, 30) as terminal:
        terminal.type(f"stty -g > {terminal.folder}/before; {program(1)}; echo code $?")
        terminal.wait("s sort: name")
        assert terminal.tell("alternate_on") == "1" and terminal.tell("cursor_flag") == "0"
        terminal.keys("s")
        terminal.wait("s sort: write rate")
        terminal.keys("r")
        terminal.wait("write rate reversed")
        terminal.keys("p")
        terminal.wait("PAUSED")
        terminal.keys("Space")
        terminal.wait("PAUSED", gone=True)
        terminal.keys("+")
        terminal.wait("+/- 0.2 s")
        terminal.keys("?")
        assert "reverse it" in terminal.wait("any key goes back")
        terminal.keys("Escape")
        terminal.wait("any key goes back", gone=True)
        terminal.keys("q")
        terminal.wait("code 0")
        given_back(terminal)


def given_back(terminal: Terminal) -> None:
    """The terminal is as it was, and takes input."""
    terminal.type(f"stty -g | cmp - {terminal.folder}/before && echo as it w''as")
    terminal.wait("as it was")
    assert terminal.tell("alternate_on") == "0" and terminal.tell("cursor_flag") == "1"


@real
@pytest.mark.parametrize("way", ["C-c", "TERM", "HUP", "INT"])
def test_every_signal_gives_the_terminal_back(way: str) -> None:
    with Terminal(80, 24) as terminal:
        # The command line turns Interrupted into its exit code; here it ends with a traceback.
        terminal.type(f"stty -g > {terminal.folder}/before; {program(1)}; clear; echo end''ed")
        terminal.wait("s sort: name")
        if way == "C-c":
            terminal.keys(way)
        else:
            os.kill(terminal.child(), getattr(signal, f"SIG{way}"))
        terminal.wait("ended")
        given_back(terminal)


@real
def test_output_that_is_held_does_not_hold_it() -> None:
    """After Ctrl-S whoever writes waits for Ctrl-Q, but not when it has to end."""
    with Terminal(80, 24) as terminal:
        terminal.type(f"stty -g > {terminal.folder}/before; {program(1)}; clear; echo end''ed")
        terminal.wait("s sort: name")
        pid = terminal.child()
        terminal.keys("C-s")
        terminal.keys("s")
        # n_tty_write waits there for room.
        waits = Path(f"/proc/{pid}/wchan")
        wait_until(lambda: waits.read_text(encoding="ascii") == "wait_woken", "a held write")
        os.kill(pid, signal.SIGTERM)
        terminal.wait("ended")
        given_back(terminal)


@real
def test_an_exception_gives_the_terminal_back() -> None:
    with Terminal(100, 40) as terminal:
        terminal.type(f"stty -g > {terminal.folder}/before; {program('fail')}; echo code $?")
        assert "IndexError" in terminal.wait("code 1")
        given_back(terminal)


@real
def test_it_can_be_stopped_and_go_on() -> None:
    with Terminal(80, 24) as terminal:
        terminal.type(f"stty -g > {terminal.folder}/before; {program(1)}; echo code $?")
        terminal.wait("s sort: name")
        pid = terminal.child()
        terminal.keys("C-z")
        terminal.wait("Stopped")
        given_back(terminal)
        terminal.type("clear; fg")
        terminal.wait("s sort: name")
        assert terminal.tell("alternate_on") == "1"
        os.kill(pid, signal.SIGSTOP)
        terminal.wait("Stopped")
        terminal.type("clear; fg")
        terminal.wait("s sort: name")
        terminal.keys("q")
        terminal.wait(PROMPT.strip())
        given_back(terminal)


@real
def test_no_colour_and_no_unicode_where_they_are_not_wanted() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    with Terminal(80, 24) as terminal:
        terminal.type(program("usual"))
        terminal.wait(UNICODE.arrows)
        assert colour.search("\n".join(terminal.screen("-e")))
        terminal.keys("q")
        terminal.wait(PROMPT.strip())
        terminal.type(f"clear; LC_ALL=C NO_COLOR=1 {program('usual')}")
        terminal.wait("s sort: name")
        assert terminal.text.isascii()
        assert not colour.search("\n".join(terminal.screen("-e")))
