"""An upstream: its address, its credential, its pool of connections, and one exchange with it.

Two ways of having an exchange, one interface: `wire.WireExchange` pushes bytes from the socket's callback,
`session.SessionExchange` uses nothing but aiohttp's public client.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, ClassVar, Protocol

import aiohttp
from yarl import URL

from proxy import wire
from proxy.headers import RawHeaders
from proxy.session import SessionExchange
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
