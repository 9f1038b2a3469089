"""`sync --all`, and what is told of it: a summary, or in a schedule one mail's worth of trouble."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

from blktrack.cli.common import emit, instant, paths, renew_unit, stoppable, store
from blktrack.cli.remote import remote_options
from blktrack.cli.rows import Rows
from blktrack.errors import UsageError
from blktrack.fleet import Settings, sync_all, trouble
from blktrack.options import Options
from blktrack.policy import Policy, load
from blktrack.report import FleetReport, LinkOutcome
from blktrack.told import Told
from blktrack.units import format_duration, format_promise, format_size

_TOLD_MOST = 25  # replicas of which a mail tells all
_NAMED_MOST = 12  # of those that are well


def run(args: argparse.Namespace) -> int:
    def adjust(options: Options) -> None:
        options.no_resync = args.no_resync
        if args.limit is not None:
            options.limit = args.limit
        remote_options(args, options)

    policy = policy_to_follow()
    with Rows(quiet=args.quiet) as rows:
        settings = Settings(store(), policy, stoppable, adjust, args.jobs, args.time_limit)
        report, tracked = sync_all(settings, rows)
    if args.json:
        emit(report)
    elif args.quiet:
        _tell_news(report, Told(paths(), args.remind))
    else:
        _summarize(report)
    if tracked:
        renew_unit()
    return report.exit


def policy_to_follow() -> Policy:
    """That of this host. UsageError if there is none, or nothing in it."""
    file = paths().policy
    policy = load(file)
    if not policy.exists:
        raise UsageError(
            f"{file} does not exist, and says what to sync",
            hint="docs/policy.md has one to begin with; blktrack config check reads it",
        )
    if not policy.devices:
        raise UsageError(f"{file} names no device", hint="add [device.NAME] to it")
    return policy


def _summarize(report: FleetReport) -> None:
    """A line for each; what failed goes to standard error."""
    for found in report.links:
        failed = bool(found.exit)
        text = _failed(found) if failed else _synced(found)
        print(text, file=sys.stderr if failed else sys.stdout, flush=True)
    print(f"{_counts(report.links)}, {format_duration(report.duration_s)}")


def _synced(found: LinkOutcome) -> str:
    done = found.report
    assert done is not None
    late = f"; {_promise(found)}" if found.lateness in ("late", "broken") else ""
    reason = f" ({done.reason})" if done.reason else ""
    return (
        f"{found.name} -> {found.target}: {done.mode}{reason}, "
        f"{format_size(done.bytes_shipped)} shipped, {format_duration(done.duration_s)}, "
        f"at {instant(done.point)} ({done.consistency}){late}"
    )


def _failed(found: LinkOutcome) -> str:
    late = f"\n  {_point(found)}" if found.lateness in ("late", "broken") else ""
    hint = f"\n  -> {found.hint}" if found.hint else ""
    return f"{found.name} -> {found.target}: {found.error}{hint}{late}"


def _counts(links: list[LinkOutcome]) -> str:
    stopped = sum(found.exit > 128 for found in links)
    busy = sum(found.exit == 6 for found in links)
    synced = sum(not found.exit for found in links)
    counts = {
        "synced": synced,
        "failed": len(links) - synced - busy - stopped,
        "busy": busy,
        "stopped": stopped,
    }
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{_replicas(len(links))}: {named}" if named else "every replica is disabled"


def _tell_news(report: FleetReport, told: Told) -> None:
    """Nothing while all is well, or as was told; else all there is to know."""
    troubles = {found.target: what for found in report.links if (what := trouble(found))}
    news = told.is_news(troubles)
    if news:
        print("\n".join(_mail(report, set(troubles))), file=sys.stderr, flush=True)
    told.record(troubles, [found.target for found in report.links], told=news)


def _mail(report: FleetReport, troubled: set[str]) -> Iterable[str]:
    bad = [found for found in report.links if found.target in troubled]
    good = [found.name for found in report.links if found.target not in troubled]
    host = os.uname().nodename
    need = "needs" if len(bad) == 1 else "need"
    yield f"blktrack: {len(bad)} of {_replicas(len(report.links))} on {host} {need} attention"
    for found in bad[:_TOLD_MOST]:
        if found.exit or not found.warnings:
            yield f"{found.name}: {found.error or 'its newest point is older than was promised'}"
            hint = found.hint or "sync more often, allow more than its limit, or promise less"
            yield f"  -> {hint}"
        for warning in found.warnings:
            yield f"{found.name}: warning: {warning}"
        yield f"  {found.device} -> {found.target}: {_point(found)}"
    if more := bad[_TOLD_MOST:]:
        yield f"and {len(more)} more: see blktrack status"
    if good:
        named = ", ".join(good[:_NAMED_MOST])
        rest = len(good) - _NAMED_MOST
        yield f"Well: {named}{f' and {rest} more' if rest > 0 else ''}"


def _point(found: LinkOutcome) -> str:
    """Since when it does not follow."""
    last = "no point yet"
    if found.point is not None and found.lag_s is not None:
        last = f"last point {instant(found.point)}, {format_duration(found.lag_s)} ago"
    return f"{last}; {_promise(found)}" if found.lateness else last


def _promise(found: LinkOutcome) -> str:
    promised = "" if found.rpo_s is None else f" of {format_promise(found.rpo_s)}"
    words = {"ok": "holds so far", "late": "is in danger", "broken": "is broken"}
    return f"the promise{promised} {words[found.lateness]}"


def _replicas(count: int) -> str:
    return f"{count} replica{'s' * (count != 1)}"
