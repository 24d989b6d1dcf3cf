"""Answers that are changed on their way to the caller. Nearly none are: `forward` passes bytes on as they
came unless a job says otherwise, and the pipe of such an answer is one of its own, so that the data path of
all the others does not even ask.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from proxy.answers import is_event_stream
from proxy.chunked import framed, inside
from proxy.errors import Dialect, UpstreamInvalid
from proxy.headers import RawHeaders, is_encoded
from proxy.inject import UsageChunkFilter, with_include_usage
from proxy.pipe import Ending, Pipe
from proxy.sse_events import UnreadableError

if TYPE_CHECKING:
    from proxy.endpoints import Endpoint

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

    def held(self) -> bytes:
        """What is still to be sent, as it came, when the upstream was cut off. Never raises."""
        ...

    def at_boundary(self) -> bool:
        """Is what was given so far at an event boundary?"""
        ...


class Reshape(msgspec.Struct, frozen=True):
    """What happens to one request's answer: as an event stream, and as a whole.

    lenient: an answer that cannot be changed passes as it is.
    """

    transform: Transform | None = None
    rewrite: Rewrite | None = None
    lenient: bool = False

    def check(self, status: int, fields: RawHeaders) -> None:
        """Raises UpstreamInvalid for an answer that cannot be changed; errors are never changed."""
        if status >= 300 or self.lenient:
            return
        streams = is_event_stream(status, fields)
        if is_encoded(fields) or (streams and self.rewrite):
            raise UpstreamInvalid

    def transform_of(self, fields: RawHeaders) -> Transform | None:
        """For an event stream with these fields."""
        return None if is_encoded(fields) else self.transform


def with_usage(endpoint: Endpoint, body: bytes, reshape: Reshape | None) -> tuple[bytes, Reshape | None]:
    """`streams.usage: inject`: the body that asks for usage, and what takes the answer to that out again.
    Both as they were if the route has no such option or the caller has asked for it."""
    if endpoint.dialect is not Dialect.OPENAI or not endpoint.ends_with_terminator:
        return body, reshape
    asking = with_include_usage(body)
    if asking is None:
        return body, reshape
    if reshape is not None and reshape.transform is not None:
        return asking, reshape  # the browser API's own drops what has no content
    return asking, Reshape(transform=UsageChunkFilter(), lenient=True)


class ReshapedPipe(Pipe):
    """A pipe with a transform between its two ends."""

    __slots__ = ("_spoke_at", "_transform")

    def __init__(self, transform: Transform, *pipe: Any) -> None:
        super().__init__(*pipe)
        self._transform = transform
        self._spoke_at = monotonic()

    def feed(self, data: bytes, start: int = 0) -> None:
        data = inside(data, start)
        out = self._shaped(data)
        try:
            if out:
                self._write(framed(out) if self._framing else out)
                if self._unsent() and not self._blocked:
                    self._block()
        except RuntimeError:
            return self._unheard(data)  # as in Pipe.feed
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

    def held(self) -> bytes:
        return self._transform.held()

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
