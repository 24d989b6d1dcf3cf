"""GET /admin/spend on the admin listener: what was spent in the last 30 days, as a page.

One document: no script, no font, no request to anybody (its policy forbids them); it follows the reader's
light or dark.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from html import escape

from aiohttp import web

from proxy import ledger_read
from proxy.config import Config
from proxy.ledger_read import Group, Sums
from proxy.sqlitefile import path_of
from proxy.usage_chart import svg
from proxy.usage_report import Line, folded, lines, projection, total

_DAYS = 30
_DAY_S = 86400
_BY = ("day", "key", "model")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ground:#f3f4f6;--text:#15181d;--soft:#666d78;--line:#e8eaee}
@media (prefers-color-scheme:dark){
:root{--paper:#16191f;--ground:#0d0f13;--text:#f0f2f5;--soft:#99a1ad;--line:#2a2f38}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:960px;margin:0 auto;padding:32px 16px 48px}
h1{font-size:18px;font-weight:650;margin:0 0 16px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin-bottom:12px}
.card,section{background:var(--paper);border-radius:12px;padding:16px 20px}
.card b{display:block;font-size:22px;font-weight:650;letter-spacing:-.01em}
.card b,td{font-variant-numeric:tabular-nums}
.card span,h2,th,footer{color:var(--soft);font-weight:400;font-size:13px}
.chart{margin-bottom:12px;border-radius:12px;overflow:hidden;background:var(--paper)}
.tables{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:12px}
section{overflow-x:auto}h2{margin:0 0 8px}
table{border-collapse:collapse;width:100%}
th,td{padding:6px 0 6px 16px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
footer{margin-top:16px}
"""


class SpendPage:
    """settings: the configuration in use."""

    def __init__(self, settings: Callable[[], Config]) -> None:
        self._settings = settings

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/admin/spend", self._show)

    async def _show(self, _: web.Request) -> web.Response:
        path = path_of(self._settings().ledger.database)
        now = time.time()
        since = _first_day(now) * _DAY_S
        groups = await asyncio.to_thread(ledger_read.grouped, [path], _BY, since, None)
        return web.Response(text=page(groups, now), content_type="text/html", headers=_HEADERS)


def _first_day(now: float) -> int:
    """30 days with today, and in any case the whole running month."""
    return int(now // _DAY_S) - _DAYS


def page(groups: Iterable[Group], now: float) -> str:
    """groups: by day, key and model."""
    groups, today = list(groups), int(now // _DAY_S)
    shown = [group for group in groups if int(group.keys[0]) > today - _DAYS]
    costs = {
        (int(day), str(model)): group.sums.cost_picos
        for group in folded(shown, _BY, ("day", "model"))
        for day, model in [group.keys]
    }
    whole = total(shown)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Spend</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><main><h1>Spend</h1>",
        *_cards(groups, now),
        f'<div class="chart">{svg(today - _DAYS + 1, _DAYS, costs)}</div><div class="tables">',
        *_table("By model", lines(folded(shown, _BY, ("model",)), ("model",))),
        *_table("By key", lines(folded(shown, _BY, ("key",)), ("key",))),
        f"</div><footer>{escape(_left_out(whole))}</footer></main></body></html>",
    ]
    return "\n".join(parts)


def _cards(groups: list[Group], now: float) -> Iterable[str]:
    today = int(now // _DAY_S)
    month = today - time.gmtime(now).tm_mday + 1
    by_day = {int(group.keys[0]): group.sums.cost_picos for group in folded(groups, _BY, ("day",))}
    ahead = projection({day: picos for day, picos in by_day.items() if day > today - _DAYS}, None, None, now)
    cards = {
        "today": by_day.get(today, 0),
        "this month": sum(picos for day, picos in by_day.items() if day >= month),
        "30 days like these": 0 if ahead is None else ahead.picos,
    }
    yield '<div class="cards">'
    for name, picos in cards.items():
        yield f'<div class="card"><b>{_dollars(picos)}</b><span>{name}</span></div>'
    yield "</div>"


def _dollars(picos: int) -> str:
    """To the cent, up: nothing that was spent looks like nothing."""
    cents = -(-picos // 10**10)
    return f"${cents // 100:,}.{cents % 100:02}"


def _table(title: str, rows: list[Line]) -> Iterable[str]:
    yield f"<section><h2>{title}</h2><table><thead><tr><th></th><th>requests</th><th>tokens</th>"
    yield "<th>cost</th></tr></thead><tbody>"
    for row in rows:
        sums = row.sums
        tokens = sums.prompt_tokens + sums.completion_tokens
        yield f"<tr><td>{escape(row.keys[0] or 'without a key')}</td><td>{sums.requests:,}</td>"
        yield f"<td>{tokens:,}</td><td>{_dollars(sums.cost_picos)}</td></tr>"
    if not rows:
        yield '<tr><td colspan="4">Nothing yet.</td></tr>'
    yield "</tbody></table></section>"


def _left_out(whole: Sums) -> str:
    words = "The last 30 days, in UTC; `headrace usage` has more."
    missing = whole.unknown + whole.unpriced
    if missing:
        words += f" {missing:,} requests of unknown usage or without a price are not in the sums."
    return words
