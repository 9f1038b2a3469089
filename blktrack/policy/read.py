"""From the file to the model. Every problem is found at once, and named with its key.

    [defaults]                      # for every replica
    [device.NAME]                   # path, and what differs for all replicas of this device
    [device.NAME.replica.NAME]      # target, and what differs for this one

A level that says `rpo` forgets the thresholds of the levels above it, and one that says `limit`
their windows: they belong together.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blktrack.errors import UsageError
from blktrack.policy import values
from blktrack.policy.model import JOBS, DevicePolicy, LinkPolicy, Policy
from blktrack.ship.address import is_remote, without_secret
from blktrack.units import format_promise

Values = dict[str, Any]

LINK_KEYS: dict[str, Callable[[Any], Any]] = {
    "enabled": values.boolean,
    "consistency": values.consistency,
    "freeze": values.boolean,
    "freeze-cap": values.cap,
    "pre-freeze": values.commands,
    "post-freeze": values.commands,
    "in-place": values.boolean,
    "time-limit": values.duration,
    "retry-for": values.retry_for,
    "compress": values.compress,
    "peer-timeout": values.peer_timeout,
    "limit": values.limit,
    "windows": values.windows,
    "rpo": values.duration,
    "rpo-warning": values.duration,
    "rpo-error": values.duration,
}
DEFAULT_KEYS = LINK_KEYS | {"history": values.duration, "jobs": values.jobs}
DEVICE_KEYS = LINK_KEYS | {"path": values.device_path, "granularity": values.granularity}
REPLICA_KEYS = LINK_KEYS | {"target": values.target}
KEYS = DEFAULT_KEYS | DEVICE_KEYS | REPLICA_KEYS

# Keys whose value a LinkPolicy has under the same name.
_AS_THEY_ARE = (
    *("enabled", "consistency", "freeze", "freeze-cap", "pre-freeze", "post-freeze"),
    *("in-place", "history", "rpo", "target", "time-limit"),
    *("retry-for", "compress", "peer-timeout"),
)
_ELSEWHERE = ("retry-for", "compress", "peer-timeout")  # of replicas on other hosts
_BELONG = {"rpo": ("rpo-warning", "rpo-error"), "limit": ("windows",)}


@dataclass(frozen=True)
class Problem:
    """What is wrong with one key, and what would be right."""

    key: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class PolicyError(UsageError):
    """A policy file that cannot be followed."""

    def __init__(self, path: Path, problems: list[Problem]) -> None:
        first, more = problems[0], len(problems) - 1
        others = f" (and {more} more: see blktrack config check)" if more else ""
        super().__init__(f"{path}: {first}{others}", hint=first.hint)
        self.problems = problems


def load(path: Path) -> Policy:
    """The policy in force; PolicyError if there is anything wrong with it. No file is no policy."""
    policy, problems = read(path)
    if problems:
        raise PolicyError(path, problems)
    return policy


def read(path: Path) -> tuple[Policy, list[Problem]]:
    """The policy as far as it can be read, and all that is wrong."""
    try:
        text = path.read_bytes().decode()
        raw = tomllib.loads(text)
    except FileNotFoundError:
        return Policy(path, exists=False), []
    except OSError as error:
        return Policy(path), [Problem("", f"cannot be read: {error.strerror}", "make it readable")]
    except UnicodeDecodeError as error:
        hint = "save it in that encoding"
        return Policy(path), [Problem("", f"is not UTF-8 at byte {error.start}", hint)]
    except (ValueError, RecursionError) as error:  # also of numbers and nesting without an end
        hint = "see https://toml.io; text needs quotes"
        return Policy(path), [Problem("", f"is not TOML: {error}", hint)]
    return _Reader(path).policy(raw)


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._problems: list[Problem] = []

    def policy(self, raw: Values) -> tuple[Policy, list[Problem]]:
        self._known("", raw, {"defaults", "device"})
        defaults = self._values("defaults", self._table("defaults", raw), DEFAULT_KEYS)
        self._consistent("defaults", defaults, defaults)
        devices = tuple(self._devices(raw, defaults))
        self._distinct(devices)
        return Policy(self._path, devices, defaults.get("jobs", JOBS)), self._problems

    def _devices(self, raw: Values, defaults: Values) -> Iterator[DevicePolicy]:
        for name, table in self._tables("device", raw):
            key = f"device.{name}"
            own = {word: value for word, value in table.items() if word != "replica"}
            found = self._values(key, own, DEVICE_KEYS)
            if "path" not in own:
                self._problem(key, "has no path", 'add path = "/dev/disk/by-id/..."')
            if not table.get("replica"):
                self._problem(key, "has no replica", f"add [{key}.replica.NAME] with a target")
            self._consistent(key, found, merged := _over(defaults, found))
            links = tuple(self._links(key, table, merged))
            path = found.get("path")
            if path is not None:
                yield DevicePolicy(name, path, found.get("granularity"), links)

    def _links(self, device: str, raw: Values, inherited: Values) -> Iterator[LinkPolicy]:
        for name, table in self._tables("replica", raw, device):
            key = f"{device}.replica.{name}"
            own = self._values(key, table, REPLICA_KEYS)
            if "target" not in table:
                self._problem(key, "has no target", "add the path of a device or a file as target")
            elif "target" in own and not is_remote(own["target"]):
                for name_of in _ELSEWHERE:
                    if name_of in own:
                        hint = "leave it out; what is said of all replicas is for those alone"
                        place = f"{key}.{name_of}"
                        self._problem(place, "is for a replica on another host", hint)
            merged = _over(inherited, own)
            self._consistent(key, own, merged)
            if "path" in inherited and "target" in own:
                yield _link(name, merged)

    def _values(self, key: str, table: Values, known: dict[str, Callable[[Any], Any]]) -> Values:
        """Those of a table that are right."""
        self._known(key, table, set(known))
        found: Values = {}
        for name, value in table.items():
            if name not in known:
                continue
            try:
                found[name] = known[name](value)
            except ValueError as error:
                self._problem(f"{key}.{name}", f"{_shown(value)} is not valid", str(error))
        return found

    def _consistent(self, key: str, own: Values, merged: Values) -> None:
        """What a level says against itself and against what it inherits."""
        late, broken = _thresholds(merged)
        if late is not None and broken is not None and late > broken:
            hint = f"write an rpo-error of {format_promise(late)} or more"
            self._problem(f"{key}.rpo-warning", "is above rpo-error", hint)
        consistency, freeze = merged.get("consistency", "crash"), merged.get("freeze", True)
        if consistency == "filesystem" and not freeze and {"consistency", "freeze"} & set(own):
            hint = 'write freeze = true, or consistency = "crash"'
            self._problem(f"{key}.freeze", "forbids what consistency filesystem needs", hint)
        if {"pre-freeze", "post-freeze"} & set(own) and (consistency == "none" or not freeze):
            hint = "remove them, or allow a freeze"
            self._problem(key, "has hooks that would never run: nothing is frozen", hint)

    def _distinct(self, devices: tuple[DevicePolicy, ...]) -> None:
        """A device has one table, and a target belongs to one link."""
        names: dict[str, str] = {}
        paths: dict[str, str] = {}
        targets: dict[str, str] = {}
        for device in devices:
            key = f"device.{device.name}"
            if (first := paths.setdefault(device.path, key)) != key:
                hint = "put all replicas of a device into one table"
                self._problem(f"{key}.path", f"is the device of {first} too", hint)
            for link in device.links:
                place = f"{key}.replica.{link.name}"
                name = f"{device.name}.{link.name}"
                if (first := names.setdefault(name, place)) != place:
                    hint = "call one of them by another name: where names have dots they meet"
                    self._problem(place, f"is {name} for short, and so is {first}", hint)
                if (first := targets.setdefault(link.target, place)) != place:
                    hint = "give each replica a target of its own"
                    self._problem(f"{place}.target", f"is the target of {first} too", hint)

    def _table(self, name: str, raw: Values, above: str = "") -> Values:
        value = raw.get(name, {})
        if isinstance(value, dict):
            return value
        key = f"{above}.{name}" if above else name
        hint = f"write [{key}] on a line of its own"
        if name in KEYS and above:
            hint = f"put it under [{above}.NAME], with a name of yours"
        self._problem(key, "is not a table", hint)
        return {}

    def _tables(self, name: str, raw: Values, above: str = "") -> Iterator[tuple[str, Values]]:
        named = self._table(name, raw, above)
        for key in named:
            table = self._table(key, named, f"{above}.{name}" if above else name)
            if table or named[key] == {}:
                yield key, table

    def _known(self, key: str, table: Values, known: set[str]) -> None:
        for name in table:
            if name not in known:
                near = difflib.get_close_matches(name.replace("_", "-"), known, 1)
                guess = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                self._problem(f"{key}.{name}" if key else name, "is not a known key", guess)

    def _problem(self, key: str, message: str, hint: str) -> None:
        self._problems.append(Problem(key, message, hint))


def _over(above: Values, own: Values) -> Values:
    """What a level says, over what the one above it says."""
    dropped = {name for key, names in _BELONG.items() if key in own for name in names}
    return {name: value for name, value in above.items() if name not in dropped} | own


def _thresholds(merged: Values) -> tuple[float | None, float | None]:
    """From which age a point is late, and from which the promise is broken."""
    rpo, broken = merged.get("rpo"), merged.get("rpo-error")
    late = merged.get("rpo-warning", rpo)
    if late is None:
        return broken, broken
    return late, broken if broken is not None else max(2 * (rpo or late), late)


def _link(name: str, merged: Values) -> LinkPolicy:
    late, broken = _thresholds(merged)
    given: Values = {key.replace("-", "_"): merged[key] for key in _AS_THEY_ARE if key in merged}
    if merged.get("consistency") == "none" or not merged.get("freeze", True):
        # Hooks of a level above are for replicas that are frozen.
        given["pre_freeze"] = given["post_freeze"] = ()
    return LinkPolicy(
        name=name,
        device=merged["path"],
        rates=values.rates(merged),
        rpo_warning=late,
        rpo_error=broken,
        **given,
    )


def _shown(value: Any) -> str:
    if isinstance(value, str) and is_remote(value):
        value = without_secret(value)
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}..."
