"""An upstream: its address, its credential, its pool of connections, and one exchange with it.

Two ways of having an exchange, one interface: `wire.WireExchange` pushes bytes from the socket's callback,
`SessionExchange` below uses nothing but aiohttp's public client.
"""

from __future__ import annotations

import asyncio
import io
import ssl
from time import monotonic
from typing import TYPE_CHECKING, ClassVar, Protocol

import aiohttp
from yarl import URL

from proxy import wire
from proxy.errors import UpstreamConnectFailed, UpstreamFailed, UpstreamInvalid, UpstreamUnreachable
from proxy.headers import RawHeaders, value_of
from proxy.tasks import spawn
from proxy.wire import End

if TYPE_CHECKING:
    from proxy import schema
    from proxy.pipe import Pipe


class Exchange(Protocol):
    """One request and its answer. `close` is called exactly once, however it went."""

    pushes: ClassVar[bool]  # `pump` returns at once and the sink is fed from then on; else it is the loop
    reused: bool
    fresh: bool  # set before `send`: no pooled connection
    answered: bool  # the head of the answer is here
    last_at: float  # when the last bytes came, or the exchange began
    status: int
    reason: str
    fields: RawHeaders
    framed: bool

    async def send(self) -> None: ...

    async def hold(self, size: int, until: float) -> bool: ...

    def taken(self) -> tuple[bytes, End | None]: ...

    async def pump(self, sink: Pipe) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Upstream:
    """One configured upstream of this process.

    base_url: where it really is (the embedded mock has an address only once it runs).
    push: use the wire; False is the public way.
    """

    def __init__(self, name: str, settings: schema.Upstream, base_url: str, *, push: bool) -> None:
        self.name = name
        self.settings = settings
        self.timeouts = settings.timeouts
        self.in_flight = 0
        self.users = 0  # requests that may still ask it
        self._url = URL(base_url, encoded=True)
        self._base_path = self._url.raw_path.rstrip("/")
        self._fixed = self._fixed_fields(settings)
        pool = settings.pool
        self._connector = aiohttp.TCPConnector(
            limit=0,  # our own slots decide; connector limits deadlock under cancellation (aiohttp #9670)
            ttl_dns_cache=int(pool.dns_ttl),
            ssl=_trust(settings.ca_file) if settings.ca_file else True,
            **({"keepalive_timeout": pool.keepalive} if pool.keepalive else {"force_close": True}),
        )
        self._wire: wire.WirePool | None = None
        self._session: aiohttp.ClientSession | None = None
        if push:
            self._wire = wire.WirePool(
                self._connector,
                self._url,
                connect_s=self.timeouts.connect,
                max_age_s=pool.max_age,
            )
        else:
            self._session = aiohttp.ClientSession(
                connector=self._connector,
                cookie_jar=aiohttp.DummyCookieJar(),  # the default jar would share cookies between callers
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None, connect=self.timeouts.connect),
                max_line_size=65536,
                max_field_size=65536,
            )
            wire.forbid_silent_retry(self._session)

    def exchange(self, method: str, path: str, fields: bytes, body: bytes) -> Exchange:
        """fields: the caller's header lines that go along (`headers.to_upstream`)."""
        target = self._base_path + path
        lines = self._fixed + fields
        if body or method not in ("GET", "DELETE", "HEAD"):
            lines += b"Content-Length: %d\r\n" % len(body)
        if self._wire is not None:
            head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode(), target.encode(), lines)
            return wire.WireExchange(self._wire, head, body)
        assert self._session is not None
        url = URL(f"{self._url.scheme}://{self._url.raw_authority}{target}", encoded=True)
        return SessionExchange(self._session, method, url, lines, body)

    def connections(self) -> tuple[int, int]:
        """Connections in use, and idle ones."""
        if self._wire is not None:
            return self._wire.counts()
        return self.in_flight, 0

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self._connector.close()

    def _host(self) -> str:
        default = self._url.port == {"http": 80, "https": 443}.get(self._url.scheme)
        host = self._url.raw_host or ""
        host = f"[{host}]" if ":" in host else host
        return host if default else f"{host}:{self._url.port}"

    def _fixed_fields(self, settings: schema.Upstream) -> bytes:
        """The header lines that are the same for every request."""
        lines = [f"Host: {self._host()}", "Via: 1.1 headrace", "Accept-Encoding: identity"]
        if settings.api_key and settings.auth != "none":
            name, prefix = {
                "bearer": ("Authorization", "Bearer "),
                "x-api-key": ("x-api-key", ""),
                "api-key": ("api-key", ""),
            }[settings.auth]
            lines.append(f"{name}: {prefix}{settings.api_key}")
        return "".join(f"{line}\r\n" for line in lines).encode()


def _trust(ca_file: str) -> ssl.SSLContext:
    """Only this authority: a private CA is named because the public ones are not meant."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


class SessionExchange:
    """The same exchange through aiohttp's public client: slower, and independent of its inside."""

    pushes: ClassVar[bool] = False

    def __init__(
        self, session: aiohttp.ClientSession, method: str, url: URL, lines: bytes, body: bytes
    ) -> None:
        self._session = session
        self._method = method
        self._url = url
        self._lines = lines
        self._body = body
        self._opening: asyncio.Task[None] | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._held = b""
        self._end: End | None = None
        self._fault: Exception | None = None
        self._reset = False
        self.reused = False
        self.fresh = False
        self.answered = False
        self.last_at = monotonic()
        self.status = 0
        self.reason = ""
        self.fields: RawHeaders = ()
        self.framed = False

    async def send(self) -> None:
        """Starts the request; aiohttp gives no sign between "sent" and "answered"."""
        self._opening = spawn(self._try_open(), "upstream request")

    async def _try_open(self) -> None:
        try:
            await self._open()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._fault = error

    async def _open(self) -> None:
        headers = [
            (name.decode(), value.decode("utf-8", "surrogateescape"))
            for name, _, value in (line.partition(b": ") for line in self._lines.split(b"\r\n") if line)
        ]
        self._response = response = await self._session.request(
            self._method,
            self._url,
            headers=headers,
            data=_payload(self._body),
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        self.answered = True
        self.status = response.status
        self.reason = response.reason or ""
        self.fields = response.raw_headers
        if response.connection is not None and response.connection.protocol is not None:
            closed = response.connection.protocol.closed
            if closed is not None:
                closed.add_done_callback(self._lost)
        chunked = (value_of(self.fields, b"transfer-encoding") or b"").lower() == b"chunked"
        self.framed = chunked or value_of(self.fields, b"content-length") is not None

    def _lost(self, closed: asyncio.Future[None]) -> None:
        """aiohttp takes a reset for the end of a body without framing, and leaves a reader waiting for ever
        when a chunk's framing is broken: what the connection itself reports is the truth."""
        self._reset = not closed.cancelled() and closed.exception() is not None
        assert self._response is not None
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("connection lost"))

    async def hold(self, size: int, until: float) -> bool:
        assert self._opening is not None
        try:
            async with asyncio.timeout_at(until):
                await asyncio.shield(self._opening)
                while self._fault is None and self._end is None and len(self._held) < size:
                    self._held += await self._read()
        except TimeoutError:
            return False
        if self._fault is not None:
            raise translate(self._fault) from self._fault
        if self._end is End.CUT and not self._held:
            raise UpstreamInvalid
        return True

    async def _read(self) -> bytes:
        """The next bytes, or b"" with `_end` set; a cancelled call loses nothing (readany keeps its data)."""
        assert self._response is not None
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, OSError):
            self._end = End.CUT
            return b""
        self.last_at = monotonic()
        if not data:
            unframed = End.CUT if self._reset else End.CLOSED
            self._end = End.FRAMED if self.framed else unframed
        return data

    def taken(self) -> tuple[bytes, End | None]:
        held, self._held = self._held, b""
        return held, self._end

    async def pump(self, sink: Pipe) -> None:
        data, end = self.taken()
        while True:
            if data:
                await sink.deliver(data)
            if end is not None:
                sink.end(end)
            if sink.finished:
                return
            try:
                async with asyncio.timeout_at(sink.next_at()):
                    data = await self._read()
            except TimeoutError:
                data = b""
                await sink.tick_deliver()
            end = self._end

    def pause(self) -> None:
        pass  # awaiting `deliver` is the pause: nobody reads meanwhile

    def resume(self) -> None:
        pass

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        if self._response is not None:
            if self._end is End.FRAMED:
                self._response.release()
            else:
                self._response.close()


def _payload(body: bytes) -> bytes | io.BytesIO | None:
    """aiohttp warns of large bytes: it writes them in one go. A file is written in pieces."""
    return io.BytesIO(body) if len(body) > 2**20 else body or None


def translate(error: BaseException) -> UpstreamFailed:
    """aiohttp's client errors in our terms: was anything sent, and was the answer HTTP at all?"""
    if isinstance(error, UpstreamFailed):
        return error
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, TimeoutError)):
        return UpstreamConnectFailed()
    if isinstance(error, aiohttp.ClientResponseError):
        return UpstreamInvalid()
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return UpstreamUnreachable()
    return UpstreamInvalid()
