"""What an answer used, heard on its way to the caller: its last reads are kept, and asked at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.headers import is_encoded, value_of
from proxy.sse import BlindScanner, Scanner
from proxy.usage import JsonTail

if TYPE_CHECKING:
    from proxy.context import Context
    from proxy.headers import RawHeaders
    from proxy.usage import Usage


class Tap:
    """Listens to one answer.

    scanner: of an event stream. feed: takes each read; None where there is nothing to listen for.
    """

    __slots__ = ("_asked_tokens", "_dialect", "_guesses", "_observes", "_tail", "feed", "scanner")

    def __init__(self, ctx: Context, fields: RawHeaders, *, streamed: bool, observes: bool) -> None:
        self._dialect = ctx.dialect
        self._asked_tokens = ctx.asked_tokens
        self._observes = observes
        self._tail: JsonTail | None = None
        self.scanner: Scanner | None = None
        self.feed: Callable[[bytes], object] | None = None
        readable = not is_encoded(fields)
        # Texts are counted only where each event is a piece of one, and can be read.
        self._guesses = readable and ctx.endpoint is not None and ctx.endpoint.ends_with_terminator
        if streamed:
            kind = Scanner if observes else BlindScanner
            self.scanner = kind(ctx.dialect, expects_terminator=self._guesses)
            self.feed = self.scanner.feed
        elif observes and readable and b"json" in (value_of(fields, b"content-type") or b"").lower():
            self._tail = JsonTail()
            self.feed = self._tail.feed

    @property
    def over(self) -> bool:
        """Has the answer said that this was all?"""
        return self.scanner is not None and self.scanner.terminated

    def usage(self) -> Usage | None:
        """Reported, estimated, or None: unknown."""
        if not self._observes:
            return None
        if self._tail is not None:
            return self._tail.usage(self._dialect)
        if self.scanner is None:
            return None
        found = self.scanner.usage()
        return self.scanner.estimate(self._asked_tokens) if found is None and self._guesses else found
