"""Reports as `top` draws them, made up; as a program, it shows a row of them in a real display."""

from __future__ import annotations

import random
import sys
from typing import TypeVar

from blktrack.report import Past, TopDevice, TopLink, TopReport
from blktrack.tui import board, look
from blktrack.tui.app import App
from blktrack.tui.screen import Screen
from blktrack.units import GIB, KIB, MIB

NOW = 1_800_000_000.0
T = TypeVar("T")
HEAT = [0.0] * 100 + [1.0] * 20 + [0.1] * 36 + [0.0] * 100


def link(target: str, **values: object) -> TopLink:
    made = TopLink(
        target=target,
        name="a",
        state="ready",
        reason="",
        epoch=7,
        point=NOW - 125,
        consistency="crash",
        lag_s=125.0,
        rpo_s=300.0,
        lateness="ok",
        pending_bytes=312 * MIB,
        sync_rate=381.0 * MIB,
        eta_s=65.0,
    )
    return _changed(made, values)


def device(path: str, *links: TopLink, **values: object) -> TopDevice:
    made = TopDevice(
        device=path,
        size=64 * GIB,
        granularity=4 * KIB,
        state="tracking",
        reason="",
        generation="g",
        epoch=7,
        write_rate=12.4 * MIB,
        writes_rate=3120.0,
        dirty_rate=1210.0,
        dirty_bytes=312 * MIB,
        written_bytes=5 * GIB,
        writes=99,
        losses=0,
        cost_ns=412.0,
        heat=HEAT,
        links=list(links),
    )
    return _changed(made, values)


def _changed(made: T, values: dict[str, object]) -> T:
    for name, value in values.items():
        assert hasattr(made, name), name
        setattr(made, name, value)
    return made


def report(*devices: TopDevice) -> TopReport:
    return TopReport(NOW, 1.0, 0.0021, list(devices))


NOT_MEASURED: dict[str, object] = {
    "write_rate": None,
    "writes_rate": None,
    "dirty_rate": None,
    "dirty_bytes": None,
    "cost_ns": None,
    "heat": [],
}


def usual() -> TopReport:
    """One of everything."""
    return report(
        device(
            "/dev/vg0/data",
            link("/backup/data.img"),
            link(
                "/mnt/offsite/data.img", lag_s=4000.0, lateness="broken", consistency="filesystem"
            ),
        ),
        device("/dev/sdb", link("/backup/sdb.img", lateness="late", lag_s=380.0), losses=3),
        device("/dev/sdc", state="gap", reason="the host was rebooted", **NOT_MEASURED),
    )


def some(seed: int, count: int = 12) -> list[TopReport]:
    """A row of random reports; devices come, go and change their states."""
    chance = random.Random(seed)
    names = [
        "/dev/sda",
        "/dev/vg0/ünïcode",
        "/dev/mapper/" + "long" * 12,
        "/dev/記憶装置",
        "/dev/sdb2",
    ]
    made = []
    for number in range(count):
        devices = []
        for name in chance.sample(names, chance.randrange(len(names) + 1)):
            links = [
                link(
                    chance.choice(["", "ssh://me@vault.example.com:22"]) + f"/backup/{name[5:]}",
                    lag_s=chance.choice([None, 5.0, 4e3, 4e5]),
                    lateness=chance.choice(["", "ok", "late", "broken"]),
                    state=chance.choice(["ready", "initial", "resync", "unfinished"]),
                    reason=chance.choice(["", "the replica was written by others " * 3]),
                    pending_bytes=chance.choice([None, 0, chance.randrange(1 << 42)]),
                    failed=chance.choice([None, None, Past("no route to host " * 8, NOW - 1e5)]),
                )
                for _ in range(chance.randrange(3))
            ]
            gone = chance.random() < 0.2
            devices.append(
                device(
                    name,
                    *links,
                    write_rate=chance.expovariate(1e-7),
                    writes_rate=chance.expovariate(1e-3),
                    losses=chance.choice([0, 0, 5]),
                    heat=[chance.choice([0.0, 0.0, 0.001, 0.1, 0.5, 1.0]) for _ in range(256)],
                )
                if not gone
                else device(name, *links, state="absent", reason="it is away", **NOT_MEASURED)
            )
        made.append(TopReport(NOW + number, 1.0, None, devices))
    return made


def show(queue: list[TopReport]) -> None:
    """The reports in a row, then the last for as long as it is looked at."""
    shapes = look.glyphs()

    def read() -> TopReport:
        return queue.pop(0) if len(queue) > 1 else queue[0]

    screen = Screen(sys.stdin.fileno(), sys.stdout.fileno(), shapes)
    App(screen, shapes, board.View(interval=0.1), read=read, measure=lambda _: "").run(0)


def fail() -> None:
    """A display whose third reading fails."""
    shapes, left = look.glyphs(), [usual(), usual()]
    screen = Screen(sys.stdin.fileno(), sys.stdout.fileno(), shapes)
    App(screen, shapes, board.View(interval=0.1), read=left.pop, measure=lambda _: "").run(0)


if __name__ == "__main__":
    if sys.argv[1] == "fail":
        fail()
    else:
        show([usual()] if sys.argv[1] == "usual" else some(int(sys.argv[1])))
