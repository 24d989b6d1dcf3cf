"""An upstream: its address, its credential, its pool of connections, and one exchange with it.

Two ways of having an exchange, one interface: `wire.WireExchange` pushes bytes from the socket's callback,
`session.SessionExchange` uses nothing but aiohttp's public client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import aiohttp
import structlog
from yarl import URL

from proxy import health, pool, wire
from proxy.breaker import Breaker
from proxy.headers import RawHeaders
from proxy.outgoing import Outgoing
from proxy.routing import Rotation
from proxy.sender import Source, framing
from proxy.session import SessionExchange
from proxy.wire_connection import End, forbid_silent_retry

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aiohttp.abc import AbstractResolver

    from proxy import schema
    from proxy.pipe import Taker


#: Above this, copying the body behind the head costs more than a second write.
_JOIN_LIMIT = 65536
_WITHOUT_BODY = ("GET", "DELETE", "HEAD")


class Exchange(Protocol):
    """One request and its answer. `close` is called exactly once, however it went."""

    pushes: ClassVar[bool]  # `pump` returns at once and the sink is fed from then on; else it is the loop
    reused: bool
    fresh: bool  # set before `send`: no pooled connection
    answered: bool  # the head of the answer is here
    last_at: float  # when the last bytes came, or the request went out
    status: int
    reason: str
    fields: RawHeaders

    @property
    def asked_at(self) -> float:
        """Since when the upstream owes something: an answer, or to take more of an upload."""

    def send_now(self) -> bool:
        """`send` without waiting, where that is possible; False: nothing has been done."""

    async def send(self) -> None: ...

    async def hold(self, size: int, until: float) -> bool:
        """Waits until `size` bytes of the body are here, or its end; False if `until` (a moment of
        `time.monotonic`) came first. May be cancelled and called again. Raises what became of an answer that
        does not come."""

    def here(self, size: int) -> bool:
        """`hold` without waiting; False: it may have to."""

    def arrival(self, size: int, until: float) -> Awaitable[object]:
        """Ends when `here`, which was false, may have become true, or at `until`: `hold` without its
        coroutine, for the one wait that nearly every request has."""

    def look(self) -> tuple[bytes, End | None]: ...

    def taken(self) -> tuple[bytes, End | None]: ...

    async def pump(self, sink: Taker) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Upstream:
    """One configured upstream of this process.

    healthy: False while its probes fail. tls: how its certificate is verified, as aiohttp takes it.
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
        way = pool.route(settings, url, resolver)
        self.tls = way.tls
        self._pool = pool.Pool(settings, way, push=push)
        if push and self._pool.trouble is not None:
            structlog.get_logger().warning("push_path_disabled", why=self._pool.trouble)
            push = False
        self._session = None if push else self._public_client(way)
        self._prober = self._make_prober(settings.probe, way) if settings.probe is not None else None

    def _public_client(self, way: pool.Route) -> aiohttp.ClientSession:
        session = _session(self._pool.connector, way, pool.exact_timeout(self.timeouts.connect))
        forbid_silent_retry(session)
        return session

    def _make_prober(self, probe: schema.Probe, way: pool.Route) -> health.Prober:
        """With the first credential: any answer will do, so the others need not be troubled. As long to
        answer as to connect."""
        connect_s = self.timeouts.connect
        session = _session(pool.single_use(way), way, pool.exact_timeout(connect_s, 2 * connect_s))
        request = health.Request(self._outgoing.probe_url(probe.path), self.own_fields(0))
        return health.Prober(self.name, request, probe.interval, session)

    # ── whether it is asked, and with which credential ───────────────────────────────────────────────────

    def available(self, now: float) -> bool:
        """Ready and not full. A look: it changes nothing."""
        limit = self.settings.max_in_flight
        return (limit is None or self.in_flight < limit) and self.ready(now)

    def ready(self, now: float) -> bool:
        """Healthy and not ejected; if it is full, a request may wait for it."""
        return self.healthy and self.breaker.available(now)

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

    def exchange(self, method: str, path: str, fields: bytes, body: bytes | Source, key: int = 0) -> Exchange:
        """path: the caller's, with its query. fields: the caller's header lines that go along
        (`headers.to_upstream`). key: from `take_key`."""
        outgoing, length = self._outgoing, b""
        if not isinstance(body, bytes):
            length = framing(body.length)
        elif body or method not in _WITHOUT_BODY:
            length = b"Content-Length: %d\r\n" % len(body)
        if self._session is None:
            opening = outgoing.opening
            head = opening(method, path, key) + outgoing.passed(fields) + length + b"\r\n"
            if isinstance(body, bytes) and len(body) <= _JOIN_LIMIT:
                return wire.WireExchange(self._pool, head + body, b"")
            return wire.WireExchange(self._pool, head, body)
        lines = outgoing.lines(fields, key) + length
        return SessionExchange(self._session, method, outgoing.url(path), lines, body)

    def url(self, path: str) -> URL:
        """Where `path` is, as a whole, with the operator's query. It may hold a credential."""
        return self._outgoing.url(path)

    def own_fields(self, key: int) -> list[tuple[str, str]]:
        """The credential and the operator's headers, for whoever writes the request himself."""
        return list(self._outgoing.own_fields(key))

    # ── its life ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begins what it does without being asked: connections ahead, probes. Idempotent."""
        self._pool.start()
        if self._prober is not None:
            self._prober.start(self._verdict)

    def _verdict(self, healthy: bool) -> None:
        self.healthy = healthy

    def connections(self) -> tuple[int, int]:
        """Connections in use, and idle ones."""
        return (self.in_flight, 0) if self._pool.trouble is not None else self._pool.counts()

    async def close(self) -> None:
        """Ends everything at once, what is in use included."""
        if self._prober is not None:
            await self._prober.close()
        await self._pool.close()
        if self._session is not None:
            await self._session.close()


def _session(
    connector: aiohttp.TCPConnector, way: pool.Route, timeout: aiohttp.ClientTimeout
) -> aiohttp.ClientSession:
    """Shares nothing between callers, takes nothing from the environment, changes nothing on the way."""
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),  # the default jar would share cookies between callers
        auto_decompress=False,
        trust_env=False,
        proxy=way.proxy,
        timeout=timeout,
        max_line_size=65536,
        max_field_size=65536,
    )
