"""Answers that are held before a byte of them is passed on: small ones, and those that are rewritten."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from proxy.errors import UpstreamCut, UpstreamDeadline, UpstreamInvalid, UpstreamTimeout
from proxy.pipe import TIMER_SLACK_S
from proxy.reshape import WHOLE_LIMIT
from proxy.wire import HELD_LIMIT
from proxy.wire_connection import End

if TYPE_CHECKING:
    from proxy.upstream import Exchange


async def hold_small(exchange: Exchange, idle_s: float, total_at: float) -> None:
    """Until HELD_LIMIT bytes are here, or all. Raises UpstreamDeadline, UpstreamTimeout."""
    while not await exchange.hold(HELD_LIMIT, min(exchange.last_at + idle_s, total_at)):
        now = monotonic() + TIMER_SLACK_S
        if now >= total_at:
            raise UpstreamDeadline
        if now >= exchange.last_at + idle_s:
            raise UpstreamTimeout


async def hold_whole(
    exchange: Exchange, first: bytes, idle_s: float, total_at: float
) -> tuple[bytes, End | None]:
    """An answer of whatever size, up to WHOLE_LIMIT; `first` has been taken. Raises UpstreamFailed."""
    body, end = bytearray(first), None
    while end is None:
        if len(body) > WHOLE_LIMIT:
            raise UpstreamInvalid
        exchange.resume()  # what it held was more than it keeps by itself
        try:
            await hold_small(exchange, idle_s, total_at)
        except UpstreamInvalid:
            raise UpstreamCut from None  # it began well
        piece, end = exchange.taken()
        body += piece
    return bytes(body), end
