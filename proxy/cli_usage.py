"""`headrace usage`: flags in, a report of the ledger out; the work is `ledger_read` and `usage_report`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import uvloop

from proxy import cli_admin, ledger_read, usage_report, usage_verify
from proxy.cli_source import Source
from proxy.config import Config, with_overrides
from proxy.errors import OperationError, StartError
from proxy.ledger_read import Group
from proxy.sqlitefile import path_of
from proxy.usage_chart import svg

_DEFAULT_BY = "model"
_DAY_S = 86400
_CHART_DAYS = 30
#: Seconds that --verify waits for requests and rows that are on their way.
_SETTLE_S = 5.0
_LOOK_EVERY_S = 0.2


def usage_parser(parser: argparse.ArgumentParser, source: Source) -> None:
    parser.description = "Days are those of UTC. Without FILE: the ledger of the configuration."
    parser.add_argument("files", nargs="*", metavar="FILE", help="ledgers of several machines, merged")
    known = ",".join(ledger_read.GROUPS)
    parser.add_argument("--by", default=_DEFAULT_BY, metavar="FIELDS", help=f"any of {known}; default: model")
    parser.add_argument("--since", metavar="WHEN", help="7d, 24h, 2026-11-01 (its first moment)")
    parser.add_argument("--until", metavar="WHEN", help="the same; this moment is not in it")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument("--baseline", action="store_true", help="compare with list_price: what was saved")
    parser.add_argument("--chart", metavar="FILE.svg", help="draw cost a day by model")
    parser.add_argument(
        "--verify", action="store_true", help="prove the running server's counters against the rows"
    )
    parser.add_argument("--admin", metavar="ADDRESS", help="admin listener of the server to verify")
    parser.set_defaults(run=lambda arguments: _usage(arguments, source.settings(arguments)))


def _usage(arguments: argparse.Namespace, settings: Config) -> int:
    if arguments.verify:
        if arguments.files or arguments.since or arguments.until:
            raise OperationError("--verify compares the server's own ledger since its counters began")
        return uvloop.run(_verify(with_overrides(settings, None, arguments.admin)))
    now = time.time()
    by = usage_report.fields_of(arguments.by)
    since, until = (
        None if text is None else usage_report.moment(what, text, now)
        for what, text in (("since", arguments.since), ("until", arguments.until))
    )
    paths = [Path(file).absolute() for file in arguments.files] or [path_of(settings.ledger.database)]
    asked = tuple(dict.fromkeys([*by, "day", "model"]))
    groups = ledger_read.grouped(paths, asked, since, until)
    if arguments.chart is not None:
        _draw(Path(arguments.chart), usage_report.folded(groups, asked, ("day", "model")), until, now)
    rows = usage_report.lines(usage_report.folded(groups, asked, by), by) if groups else []
    whole = usage_report.total(groups)
    if arguments.format == "json":
        documents = usage_report.documents(rows, by, baseline=arguments.baseline)
        print(msgspec.json.format(msgspec.json.encode(documents), indent=2).decode())
    elif arguments.format == "csv":
        print(usage_report.as_csv(rows, by, baseline=arguments.baseline), end="")
    else:
        print(usage_report.table(rows, by, whole, baseline=arguments.baseline))
        by_day = {int(g.keys[0]): g.sums.cost_picos for g in usage_report.folded(groups, asked, ("day",))}
        ahead = usage_report.projection(by_day, since, until, now)
        for line in [*usage_report.notes(whole), *([] if ahead is None else [ahead.text()])]:
            print(line)
    return 0


def _draw(file: Path, groups: list[Group], until: float | None, now: float) -> None:
    """All days with rows; without --since and many of them, whatever there is."""
    costs = {(int(group.keys[0]), str(group.keys[1])): group.sums.cost_picos for group in groups}
    last = int((now if until is None else min(now, until - 1)) // _DAY_S)
    first = min((day for day, _ in costs), default=last - _CHART_DAYS + 1)
    try:
        file.write_text(svg(first, max(1, last - first + 1), costs), encoding="utf-8")
    except OSError as error:
        raise StartError(f"--chart: {file}: {error.strerror}") from None
    print(f"drawn: {file}", file=sys.stderr)


async def _verify(settings: Config) -> int:
    path = path_of(settings.ledger.database)
    deadline = time.monotonic() + _SETTLE_S
    while True:
        status, body = await cli_admin.ask(settings, "GET", "/metrics")
        if status != 200:
            raise StartError(f"{settings.admin} answers {status}: is admin_token the running server's?")
        page = usage_verify.counted(body.decode())
        groups = await asyncio.to_thread(ledger_read.grouped, [path], ("model",), page.since, None)
        found = usage_verify.checks(page, groups)
        proved = all(check.ok for check in found)
        # Under load a page and a glance at the file are never of one moment; in a pause they are.
        if (proved and not page.pending) or time.monotonic() > deadline:
            break
        await asyncio.sleep(_LOOK_EVERY_S)
    print(usage_verify.text(found, page, _notes(page, settings)))
    return 0 if proved else 1


def _notes(page: usage_verify.Counted, settings: Config) -> Mapping[str, bool]:
    oldest = time.time() - settings.ledger.keep_days * _DAY_S
    return {
        f"{page.pending:,} rows are not yet in the file": page.pending > 0,
        f"{page.dropped:,} rows were dropped: their tokens and cost are counted, and in no row": (
            page.dropped > 0
        ),
        f"{page.replaced:,} workers died: what each counted in its last second is missing": page.replaced > 0,
        "rows older than ledger.keep_days are deleted, counters are not": page.since < oldest,
    }
