"""Answers that are changed on their way to the caller. Nearly none are: `forward` passes bytes on as they
came unless a job says otherwise, and the pipe of such an answer is one of its own, so that the data path of
all the others does not even ask.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import msgspec

from proxy.answers import is_event_stream
from proxy.errors import UpstreamInvalid
from proxy.headers import RawHeaders, value_of
from proxy.pipe import Ending, Pipe
from proxy.sse_events import UnreadableError

#: From status and whole body of an answer that is no stream to the body that the caller gets; raises
#: UpstreamFailed.
Rewrite = Callable[[int, bytes], bytes]
#: The bytes of an answer that has to be known whole before it can be rewritten.
WHOLE_LIMIT = 2**22


class Transform(Protocol):
    """Changes one event stream. The scanner still sees what the upstream sent: how a stream ended is not
    for a transform to say."""

    def feed(self, data: bytes) -> bytes:
        """What to send for one read of the upstream, maybe nothing. Raises UnreadableError."""
        ...

    def flush(self) -> bytes:
        """What is still to be sent when the upstream has ended in good order. Never raises."""
        ...

    def at_boundary(self) -> bool:
        """Is what was given so far at an event boundary?"""
        ...


class Reshape(msgspec.Struct, frozen=True):
    """What happens to one request's answer: as an event stream, and as a whole."""

    transform: Transform | None = None
    rewrite: Rewrite | None = None

    def check(self, status: int, fields: RawHeaders) -> None:
        """Raises UpstreamInvalid for an answer that cannot be changed; errors are never changed."""
        if status >= 300:
            return
        streams = is_event_stream(status, fields)
        if value_of(fields, b"content-encoding") not in (None, b"identity") or (streams and self.rewrite):
            raise UpstreamInvalid


class ReshapedPipe(Pipe):
    """A pipe with a transform between its two ends."""

    __slots__ = ("_spoke_at", "_transform")

    def __init__(self, transform: Transform, *pipe: Any) -> None:
        super().__init__(*pipe)
        self._transform = transform
        self._spoke_at = monotonic()

    def feed(self, data: bytes) -> None:
        out = self._shaped(data)
        try:
            if out:
                self._write(b"%x\r\n%b\r\n" % (len(out), out) if self._framing else out)
                if self._unsent() and not self._blocked:
                    self._block()
        except RuntimeError:
            return  # as in Pipe.feed
        self._observe(data)
        self.size += len(out) - len(data)

    async def deliver(self, data: bytes) -> None:
        out = self._shaped(data)
        self._observe(data)
        self.size += len(out) - len(data)
        if out:
            await self._write_patiently(out)

    def rest(self) -> bytes:
        return self._transform.flush()

    def takes_event(self) -> bool:
        return self._scanner is not None and self._transform.at_boundary()

    @property
    def spoke_at(self) -> float:
        """The upstream may talk for minutes (reasoning) while nothing of it is passed on."""
        return max(self._spoke_at, self._resumed_at)

    def _shaped(self, data: bytes) -> bytes:
        if self.finished:
            return b""
        try:
            out = self._transform.feed(data)
        except UnreadableError:
            self._finish(Ending.CUT)
            return b""
        if out:
            self._spoke_at = monotonic()
        return out
