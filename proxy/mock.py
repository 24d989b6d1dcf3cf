"""The mock upstream: an OpenAI-compatible server that answers by rote and fails on demand.

Rules:

- An island: the standard library, aiohttp and msgspec, nothing of the proxy.
- The same request gets the same bytes, but for the counter in its ids: no clock, no random numbers.
- An event is one `write`, hence one HTTP chunk, unless the behaviour asks for something else.
- A fault is a field of `Behaviour`, set for the whole server or for one request by the header
  `x-mock: words=5, gap=0.01, cut_after=3`.  A bare name means true; an unknown name is a 400 that names it.
- "After N events" counts every `data:` event of a stream, `[DONE]` too, but no comments.  A body that is not
  a stream is one event.  N = 0 is right after the head; -1 (`cut_after`, `rst_after`) is before the head.
- Every request is counted in `hits`, then either in `completed` (answered as its behaviour says, deliberate
  faults included) or in `aborted` (the caller left first, or the server was closed).

Routes, each with and without `/v1` or what a provider's base URL has in its place: POST chat/completions,
completions, embeddings, responses and messages (Anthropic's dialect), GET models.  `provider=deepseek` and
the like imitate a provider's quirks.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import deque
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from proxy.mock_ask import ARGUMENTS, WORDS, Ask, Body
from proxy.mock_behaviour import NORMAL, Behaviour, override
from proxy.mock_chat import VECTOR
from proxy.mock_dialects import ROUTES, UNKNOWN
from proxy.mock_wire import Exchange

if TYPE_CHECKING:
    import ssl

__all__ = [
    "ARGUMENTS",
    "NORMAL",
    "RECORD",
    "ROUTES",
    "VECTOR",
    "WORDS",
    "Ask",
    "Behaviour",
    "Body",
    "Record",
    "RunningMock",
    "Seen",
    "make_app",
    "override",
    "start",
]

KEPT = 1000  # requests remembered
SHUTDOWN = 0.05  # aiohttp waits this long twice: for the handlers to end, then for them to be cancelled
#: What providers' base URLs have in front of their routes: Gemini's, OpenRouter's, Azure's two, all others'.
PREFIX = re.compile(r"^(?:/v1beta/openai|/api/v1|/openai/v1|/openai/deployments/[^/]+|/v1)(?=/)")
LIMIT = 1 << 16  # request line and header field: what the proxy lets through is not ours to refuse


class Seen(msgspec.Struct):
    """A request as it arrived; `body` is filled in once it is complete."""

    method: str
    raw_path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """The first value of a header, by a name in any case."""
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), None)


class Record:
    """What arrived and what became of it."""

    __slots__ = ("aborted", "active", "completed", "hits", "requests")

    def __init__(self) -> None:
        self.requests: deque[Seen] = deque(maxlen=KEPT)
        self.hits = 0
        self.active = 0  # being answered now
        self.aborted = 0
        self.completed = 0

    @property
    def last(self) -> Seen:
        """The request that arrived last."""
        return self.requests[-1]


RECORD: web.AppKey[Record] = web.AppKey("record", Record)


class _Mock:
    """The handler of every request."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.record = Record()
        self._ids = itertools.count(1)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        record = self.record
        seen = Seen(request.method, request.raw_path, list(request.raw_headers))
        record.hits += 1
        record.active += 1
        record.requests.append(seen)
        try:
            seen.body = await request.read()
            response = await self._answer(request, seen.body)
        except asyncio.CancelledError:
            record.aborted += 1
            raise
        except ConnectionError:  # a write to somebody who has just left: nothing that a log needs
            record.aborted += 1
            return web.Response(status=499)
        else:
            record.completed += 1
            return response
        finally:
            record.active -= 1

    async def _answer(self, request: web.Request, body: bytes) -> web.StreamResponse:
        rid = f"mock-{next(self._ids):08x}"
        dialect = ROUTES.get((request.method, PREFIX.sub("", request.path)))
        if dialect is None:
            unknown = Exchange(request, UNKNOWN, NORMAL, rid)
            return await unknown.error(404, f"no route for {request.method} {request.path}")
        header = ",".join(request.headers.getall("x-mock", ()))
        try:
            behaviour = override(self.behaviour, header) if header else self.behaviour
        except msgspec.ValidationError as error:
            return await Exchange(request, dialect, NORMAL, rid).error(400, f"x-mock: {error}")
        return await Exchange(request, dialect, behaviour, rid).answer(body)


class RunningMock:
    """A mock that listens."""

    def __init__(self, mock: _Mock, runner: web.AppRunner, host: str, tls: bool) -> None:
        self._mock = mock
        self._runner = runner
        self.record = mock.record
        self.port: int = runner.addresses[0][1]
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{name}:{self.port}/v1"

    @property
    def behaviour(self) -> Behaviour:
        """What requests without `x-mock` get; may be replaced while the mock runs."""
        return self._mock.behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        self._mock.behaviour = behaviour

    async def close(self) -> None:
        """Stop listening and drop every connection; requests that hang count as aborted."""
        await self._runner.cleanup()


def make_app(behaviour: Behaviour = NORMAL) -> web.Application:
    """The mock as an application, for a runner of your own (with `handler_cancellation=True`)."""
    return _make_app(_Mock(behaviour))


def _make_app(mock: _Mock) -> web.Application:
    app = web.Application(client_max_size=0)  # 0: no limit
    app[RECORD] = mock.record
    app.router.add_route("*", "/{path:.*}", mock.handle)
    return app


async def start(
    host: str = "127.0.0.1",
    port: int = 0,
    behaviour: Behaviour = NORMAL,
    ssl_context: ssl.SSLContext | None = None,
) -> RunningMock:
    """Listen, on a free port unless told which."""
    mock = _Mock(behaviour)
    runner = web.AppRunner(
        _make_app(mock),
        handler_cancellation=True,  # else a caller that leaves is noticed at the next write only
        access_log=None,
        shutdown_timeout=SHUTDOWN,
        max_line_size=LIMIT,
        max_field_size=LIMIT,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=ssl_context, backlog=4096).start()
    except BaseException:
        await runner.cleanup()
        raise
    return RunningMock(mock, runner, host, ssl_context is not None)
