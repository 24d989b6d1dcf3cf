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
from proxy.breaker import Breaker
from proxy.headers import RawHeaders
from proxy.outgoing import Outgoing
from proxy.routing import Rotation
from proxy.session import SessionExchange
from proxy.wire import End

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

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
    resolver: who is asked for addresses; None is the system.
    """

    def __init__(
        self,
        name: str,
        settings: schema.Upstream,
        base_url: str,
        *,
        push: bool,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.timeouts = settings.timeouts
        self.breaker = Breaker(settings.breaker)
        self.healthy = True
        self.in_flight = 0
        self.users = 0  # requests that may still ask it
        url = URL(base_url, encoded=True)
        self._outgoing = Outgoing(settings, url)
        self._keys = Rotation(self._outgoing.credentials)
        self._one_key = self._outgoing.credentials == 1
        pool = settings.pool
        self._connector = aiohttp.TCPConnector(
            limit=0,  # our own slots decide; connector limits deadlock under cancellation (aiohttp #9670)
            ttl_dns_cache=int(pool.dns_ttl),
            resolver=resolver,
            ssl=_trust(settings.ca_file) if settings.ca_file else True,
            **({"keepalive_timeout": pool.keepalive} if pool.keepalive else {"force_close": True}),
        )
        self._wire: wire.WirePool | None = None
        self._session: aiohttp.ClientSession | None = None
        if push:
            self._wire = wire.WirePool(
                self._connector,
                url,
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

    # ── whether it is asked, and with which credential ───────────────────────────────────────────────────

    def available(self, now: float) -> bool:
        """Healthy, not ejected, not full. A look: it changes nothing."""
        limit = self.settings.max_in_flight
        return self.healthy and self.breaker.available(now) and (limit is None or self.in_flight < limit)

    def take_key(self, now: float) -> int:
        """The index of the credential for the next attempt: 0 if there is one or none."""
        return 0 if self._one_key else self._keys.take(now)

    def rest_key(self, key: int, retry_after_s: float | None, now: float) -> None:
        """It was answered with 401 or 429: it rests, alone."""
        self._keys.rest(key, retry_after_s, now)

    def spare_key(self, now: float) -> bool:
        """Whether another credential is ready; False with a single one."""
        return not self._one_key and self._keys.spare(now)

    # ── asking it ────────────────────────────────────────────────────────────────────────────────────────

    def exchange(self, method: str, path: str, fields: bytes, body: bytes, key: int = 0) -> Exchange:
        """path: the caller's, with its query. fields: the caller's header lines that go along
        (`headers.to_upstream`). key: from `take_key`."""
        lines = self._outgoing.lines(fields, key)
        if body or method not in ("GET", "DELETE", "HEAD"):
            lines += b"Content-Length: %d\r\n" % len(body)
        if self._wire is not None:
            target = self._outgoing.target(path)
            head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode(), target.encode(), lines)
            return wire.WireExchange(self._wire, head, body)
        assert self._session is not None
        return SessionExchange(self._session, method, self._outgoing.url(path), lines, body)

    def url(self, path: str) -> URL:
        """Where `path` is, as a whole, with the operator's query. It may hold a credential."""
        return self._outgoing.url(path)

    def own_fields(self, key: int) -> list[tuple[str, str]]:
        """The credential and the operator's headers, for whoever writes the request himself."""
        return list(self._outgoing.own_fields(key))

    # ── its life ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begins what it does without being asked: connections ahead, probes. Idempotent."""

    def connections(self) -> tuple[int, int]:
        """Connections in use, and idle ones."""
        if self._wire is not None:
            return self._wire.counts()
        return self.in_flight, 0

    async def close(self) -> None:
        """Ends everything at once, what is in use included."""
        if self._session is not None:
            await self._session.close()
        await self._connector.close()


def _trust(ca_file: str) -> ssl.SSLContext:
    """Only this authority: a private CA is named because the public ones are not meant."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context
