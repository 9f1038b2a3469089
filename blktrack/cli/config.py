"""Check the policy file, and show what it comes to with all that is inherited. A file with an
error in it is refused as a whole by every command that reads it. A warning is about this host: a
device that is away, a replica that would be refused.

  blktrack config check
  blktrack config check --file ./blktrack.toml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blktrack.cli.common import add_json, emit, paths
from blktrack.errors import UsageError
from blktrack.policy import LinkPolicy, Policy, Problem, read
from blktrack.policy.check import check
from blktrack.rates import Rates
from blktrack.report import Finding, PolicyReport
from blktrack.ship.address import is_remote
from blktrack.units import format_promise, format_size


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["check"], help="what to do with it")
    parser.add_argument("--file", type=Path, metavar="FILE", help=f"instead of {paths().policy}")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    file = args.file or paths().policy
    policy, problems = read(file)
    if not policy.exists:
        raise UsageError(f"{file} does not exist", hint="docs/policy.md has one to begin with")
    warnings = [] if problems else check(policy)
    if args.json:
        emit(_report(policy, problems, warnings))
    else:
        _tell(policy, problems, warnings)
    return UsageError.exit_code if problems else 0


def _report(policy: Policy, problems: list[Problem], warnings: list[Problem]) -> PolicyReport:
    return PolicyReport(
        file=str(policy.path),
        ok=not problems,
        devices=len(policy.devices),
        replicas=len(list(policy.links)),
        errors=[Finding(found.key, found.message, found.hint) for found in problems],
        warnings=[Finding(found.key, found.message, found.hint) for found in warnings],
    )


def _tell(policy: Policy, problems: list[Problem], warnings: list[Problem]) -> None:
    for kind, found in [("", each) for each in problems] + [("warning: ", w) for w in warnings]:
        print(f"blktrack: {kind}{policy.path}: {found}", file=sys.stderr)
        if found.hint:
            print(f"  -> {found.hint}", file=sys.stderr)
    if problems:
        return
    for device in policy.devices:
        print(f"{device.name}  {device.path}")
        for link in device.links:
            print(f"  -> {link.target}  {_settings(link)}")
    print(f"{policy.path}: no error")


def _settings(link: LinkPolicy) -> str:
    found = [] if link.enabled else ["disabled"]
    found.append(link.consistency)
    if link.rpo_warning is not None and link.rpo_error is not None:
        found.append(
            f"late after {format_promise(link.rpo_warning)}, "
            f"broken after {format_promise(link.rpo_error)}"
        )
    if link.rates.least is not None:
        found.append(_limits(link.rates))
    if link.freeze and link.consistency != "none":
        hooks = len(link.pre_freeze) + len(link.post_freeze)
        found.append(f"freezes of {link.freeze_cap:g} s at most" + f", {hooks} hooks" * bool(hooks))
    elif link.consistency == "crash":
        found.append("no freeze")
    if link.in_place:
        found.append("in place")
    if link.time_limit is not None:
        found.append(f"gives up after {format_promise(link.time_limit)}")
    if is_remote(link.target):
        if link.compress != "adapt":
            level = f"zstd {link.compress}"
            found.append("not compressed" if link.compress == "none" else level)
        found.append(f"tried again for {format_promise(link.retry_for)}")
    return "; ".join(found)


def _limits(rates: Rates) -> str:
    always = "no limit" if rates.limit is None else f"at most {format_size(rates.limit)}/s"
    count = len(rates.windows)
    return always + (f", another in {count} window{'s' * (count > 1)}" if count else "")
