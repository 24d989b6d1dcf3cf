"""A small client for chat completions: streams as they come, errors by kind, limits for batch work.

    async with Client("http://127.0.0.1:8080/v1", api_key=key) as client:
        async with client.stream(model="gpt-4.1", messages=messages) as stream:
            async for delta in stream:
                print(delta.content, end="", flush=True)
        print(stream.finish_reason, stream.usage)

        answer = await client.complete(model="gpt-4.1", messages=messages)

It tells every failure's kind apart (client_errors), asks again only while nothing has been delivered, waits
as long as the server says, and takes a stream that ends without its terminator for what it is: truncated. It
is the browser client's twin (static/stream-client.js) and works with every server of chat/completions; of
Headrace it needs nothing but the modules `client*` and aiohttp.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self
from weakref import WeakSet

import aiohttp

from proxy import __version__
from proxy.client_errors import Category, ChatError, aborted
from proxy.client_events import Delta
from proxy.client_exchange import Ask, Exchange, Link, Retry, Timeouts
from proxy.client_limits import Limits
from proxy.client_stream import Stream

__all__ = ["Answer", "Category", "ChatError", "Client", "Delta", "Limits", "Retry", "Stream", "Timeouts"]

#: Headrace and nginx close an idle connection after 75 s: whoever keeps it longer sends into a closed one.
_KEEPALIVE_S = 60.0
#: An answer may be minutes of silence away; NAT and load balancers forget a flow after 240 s (Azure) or 350 s
#: (AWS) without a packet. Not every system has every option.
_TCP_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


class Answer(NamedTuple):
    """A whole answer. `document`: as it came."""

    content: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    request_id: str | None
    document: dict[str, Any]


class Client:
    """Asks the server at `base_url` (with its `/v1`). Close it, or use it as `async with`.

    `limits` may be shared with other clients; left out, 100 requests at once and any number a minute.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080/v1",
        api_key: str | None = None,
        *,
        limits: Limits | None = None,
        retry: Retry | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._retry = retry or Retry()
        self._timeouts = timeouts or Timeouts()
        self._link: Link | None = None
        self._streams: WeakSet[Stream] = WeakSet()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends all requests (their readers get `aborted`) and closes the connections."""
        self._closed = True
        for stream in tuple(self._streams):
            await stream.aclose()
        if self._link is not None:
            await self._link.session.close()

    def stream(
        self,
        *,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        priority: int = 0,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Stream:
        """A streamed chat completion. `fields` are further fields of the request, as OpenAI defines them; its
        usage is asked for unless they have `stream_options`.

        `priority`: of those that wait for the client's limits the highest goes first; one below 0 also tells
        Headrace that it is in no hurry (`x-headrace-priority: low`)."""
        body = {"stream": True, "stream_options": {"include_usage": True}, **fields}
        return self._ask({"model": model, "messages": messages, **body}, priority, headers)

    async def complete(
        self,
        *,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        priority: int = 0,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Answer:
        """A chat completion in one piece; the same arguments. Raises ChatError."""
        body = {"model": model, "messages": messages, "stream": False, **fields}
        async with self._ask(body, priority, headers) as stream:
            deltas = [delta async for delta in stream]
        content = "".join(delta.content for delta in deltas)
        document = deltas[-1].chunk if deltas else {}
        return Answer(content, stream.finish_reason, stream.usage, stream.request_id, document)

    def _ask(self, body: Mapping[str, Any], priority: int, headers: Mapping[str, str] | None) -> Stream:
        # Not escaped: Headrace estimates a request's tokens by its bytes.
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        low = {"x-headrace-priority": "low"} if priority < 0 else {}
        fields = {"Content-Type": "application/json", **self._authorization, **low, **(headers or {})}
        stream = Stream(Exchange(self._connected, Ask(self._url, data, fields, priority)))
        self._streams.add(stream)
        return stream

    def _connected(self) -> Link:
        """Made with the first request, because aiohttp's session belongs to the loop that runs."""
        if self._closed:
            raise aborted()
        if self._link is None:
            session = _session(self.limits.max_in_flight, self._timeouts.connect_s)
            self._link = Link(session, self.limits, self._retry, self._timeouts)
        return self._link


def _session(connections: int, connect_s: float | None) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(
        limit=connections, keepalive_timeout=_KEEPALIVE_S, ttl_dns_cache=60, socket_factory=_socket
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
        # A stream that somebody compresses comes in lumps.
        headers={"Accept-Encoding": "identity", "User-Agent": f"headrace-client/{__version__}"},
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_KEEPALIVE:
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
