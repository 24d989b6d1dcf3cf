"""The connections of one upstream: TCPConnector with its knobs, an age for each connection, some made ahead.

DNS, happy eyeballs, TLS, the outbound proxy's tunnel and the keep-alive are TCPConnector's. Ours is what it
does not have: a connection has an age, because an address that DNS no longer gives is only left when its
connections end; and a number of them lies ready, so that a request after a pause pays no handshake.

All private names of aiohttp's connector are in this file. `Pool.trouble` tells if one is missing: then the
wire cannot be used, and the public client goes without age and without connections ahead.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Container, Iterator
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import AddrInfoType, ClientError, ClientTimeout, TCPConnector
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.connector import Connection as Loan
from yarl import URL

from proxy.errors import UpstreamConnectFailed
from proxy.tasks import spawn
from proxy.wire_connection import WireConnection

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from proxy import schema

#: A connection that ends within this time is replaced; looked at twice in it, so that none ends unnoticed.
_AHEAD_S = 1.0
#: Handshakes at once when connections are made ahead: a restart must not look like an attack.
_AT_ONCE = 16
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
#: An answer may be minutes of silence away; NAT and load balancers forget a flow after 240 s (Azure) or 350 s
#: (AWS) without a packet. The values of the OpenAI SDK's own transport, but a dead peer is known sooner.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


class Route(NamedTuple):
    """The way to an upstream. `tls` is what TCPConnector takes: True verifies with the public authorities."""

    url: URL
    tls: ssl.SSLContext | bool
    proxy: URL | None
    resolver: AbstractResolver | None


def route(settings: schema.Upstream, url: URL, resolver: AbstractResolver | None) -> Route:
    """There is no way not to verify a certificate."""
    tls = _trust(settings.ca_file) if settings.ca_file else True
    return Route(url, tls, URL(settings.proxy) if settings.proxy else None, resolver)


def _trust(ca_file: str) -> ssl.SSLContext:
    """Only this authority: a private CA is named because the public ones are not meant."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


def exact_timeout(connect_s: float, total_s: float | None = None) -> ClientTimeout:
    """DNS, TCP, TLS and the proxy's tunnel together; never rounded up to a whole second, as aiohttp does."""
    return ClientTimeout(total=total_s, connect=connect_s, ceil_threshold=float("inf"))


def make_socket(address: AddrInfoType) -> socket.socket:
    """With keep-alive packets; TCP_NODELAY is set by aiohttp on every connection."""
    made = socket.socket(*address[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def single_use(route: Route) -> TCPConnector:
    """A connector that keeps neither connections nor addresses: what probes see is what a new one would."""
    return TCPConnector(force_close=True, use_dns_cache=False, resolver=route.resolver, ssl=route.tls)


class SessionConnection(ResponseHandler):
    """A pooled connection of aiohttp's own client, made safe: it has an age, and bytes that answer no request
    end it (aiohttp would take them for the next request's answer)."""

    __slots__ = ("_acquired", "_max_age_s", "made_at", "served")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, acquired: Container[object], max_age_s: float
    ) -> None:
        super().__init__(loop)
        self._acquired = acquired
        self._max_age_s = max_age_s
        self.served = False
        self.made_at = monotonic()

    @property
    def should_close(self) -> bool:
        """Asked by the connector when an exchange gives its connection back."""
        return super().should_close or self._too_old()

    def is_connected(self) -> bool:
        """Asked by the connector before it takes an idle one."""
        return super().is_connected() and not self._too_old()

    def _too_old(self) -> bool:
        return monotonic() - self.made_at > self._max_age_s

    def data_received(self, data: bytes) -> None:
        in_use = self in self._acquired
        if data and not in_use and (self.served or self._parser is None):
            self.force_close()
            if self.transport is not None:
                self.transport.close()
            return
        self.served |= in_use  # the answer to CONNECT comes before a connection is anybody's
        super().data_received(data)


class Pool:
    """Connections of one upstream, for both ways of asking it."""

    def __init__(self, settings: schema.Upstream, route: Route, *, push: bool) -> None:
        loop = asyncio.get_running_loop()
        knobs = settings.pool
        self.new_future = loop.create_future  # to ask which loop runs is a system call (getpid)
        self.connector = TCPConnector(
            limit=0,  # our own slots decide; connector limits deadlock under cancellation (aiohttp #9670)
            ttl_dns_cache=knobs.dns_ttl,  # type: ignore[arg-type] # it only ever compares it
            resolver=route.resolver,
            ssl=route.tls,
            socket_factory=make_socket,
            **({"keepalive_timeout": knobs.keepalive} if knobs.keepalive else {"force_close": True}),
        )
        self.trouble = _gone(self.connector)
        self._template = ClientRequest("POST", route.url, loop=loop, proxy=route.proxy)
        self._key = self._template.connection_key
        self._timeout = exact_timeout(settings.timeouts.connect)
        self._keepalive_s = knobs.keepalive
        self._max_age_s = knobs.max_age
        self._soon_s = min(_AHEAD_S, knobs.keepalive / 4, knobs.max_age / 4)
        self._min_idle = knobs.min_idle if knobs.keepalive else 0
        self._keeper: asyncio.Task[None] | None = None
        self._ahead: list[WireConnection | SessionConnection] = []  # made ahead, and not yet asked anything
        if self.trouble is None:
            self._set_factory(loop, push)

    def _set_factory(self, loop: asyncio.AbstractEventLoop, push: bool) -> None:
        connector = self.connector
        connector._factory = (
            functools.partial(WireConnection, loop)  # type: ignore[assignment] # a subclass
            if push
            else functools.partial(SessionConnection, loop, connector._acquired, self._max_age_s)
        )

    # ── for the wire ─────────────────────────────────────────────────────────────────────────────────────

    def take_idle(self, now: float) -> WireConnection | None:
        """An idle connection that is young enough, the one that has waited longest; None: there is none.

        What the connector does as well, but in a coroutine and with an object for each loan: 5 us a request
        with the return."""
        idle = self.connector._conns.get(self._key)
        if not idle:
            return None
        while idle:
            protocol, since = idle.popleft()
            assert isinstance(protocol, WireConnection)
            young = now - since <= self._keepalive_s and now - protocol.made_at <= self._max_age_s
            if young and protocol.is_connected():
                self.connector._acquired.add(protocol)
                return protocol
            protocol.close()
        return None

    def give_back(self, protocol: WireConnection, *, again: bool) -> None:
        """again: another request may follow on it, if it is young enough. Never blocks."""
        connector, now = self.connector, monotonic()
        if not again or now - protocol.made_at > self._max_age_s:
            protocol.abort()  # close() would wait for a TLS goodbye or for a full send buffer
            connector._release(self._key, protocol, should_close=True)
        elif (idle := connector._conns.get(self._key)) is not None:
            # Where there is a deque the connector looks after it; and without a limit nobody waits for this.
            connector._acquired.discard(protocol)
            idle.append((protocol, now))
        else:
            connector._release(self._key, protocol)

    async def acquire(self, *, fresh: bool) -> WireConnection:
        """An idle connection that is young enough, or a new one; `fresh`: only a new one, and what lies idle
        is ended, for another one has just turned out to be dead.

        Raises UpstreamConnectFailed: nothing was sent."""
        if not fresh and (idle := self.take_idle(monotonic())) is not None:
            return idle
        while True:
            try:
                connection = await self.connector.connect(self._template, [], self._timeout)
            except KeyError:
                # aiohttp 3.14.5: the address was forgotten (`_failed`) while we waited for another request's
                # question to DNS. Now we ask ourselves.
                continue
            except (ClientError, OSError, RuntimeError, ValueError) as error:
                raise self._failed(error) from None
            protocol = connection.protocol
            assert isinstance(protocol, WireConnection)
            if not protocol.used:
                connection._protocol = None  # it is ours: aiohttp's loan would end it when nobody holds that
                return protocol
            connection.close()

    def _failed(self, error: Exception) -> UpstreamConnectFailed:
        """The address may have gone: the next attempt asks DNS again. The cause is told by its kind alone,
        because aiohttp's errors hold the outbound proxy's password."""
        self.connector.clear_dns_cache()
        failed = UpstreamConnectFailed()
        failed.add_note(f"{type(error).__name__}: {error.strerror if isinstance(error, OSError) else ''}")
        return failed

    def counts(self) -> tuple[int, int]:
        """Connections in use, and idle ones."""
        if self.trouble is not None:
            return 0, 0
        return len(self.connector._acquired), sum(1 for _ in self._idle())

    # ── made ahead ───────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begins to keep `min_idle` connections ready. Idempotent."""
        if self._min_idle and self.trouble is None and self._keeper is None:
            self._keeper = spawn(self._keep(), f"connections ahead to {self._template.host}")

    async def close(self) -> None:
        """Ends all connections, those in use included."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self.connector.close()

    async def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            refused = self._lost_unused()
            missing = self._missing()
            if not missing:
                pause_s = _FIRST_PAUSE_S
            if refused or (missing and not await self._fill(missing)):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._retire()
                await asyncio.sleep(self._soon_s / 2)

    def _lost_unused(self) -> bool:
        """Whether the upstream closed one before its time: it may not want idle connections at all."""
        young = monotonic() - self._keepalive_s + self._soon_s
        lost = any(
            not made.is_connected() and not made.served and made.made_at > young for made in self._ahead
        )
        self._ahead = [made for made in self._ahead if made.is_connected() and not made.served]
        return lost

    async def _fill(self, missing: int) -> bool:
        """False: some could not be made."""
        while missing > 0:
            batch = [self._connect_ahead() for _ in range(min(missing, _AT_ONCE))]
            for result in await asyncio.gather(*batch, return_exceptions=True):
                if isinstance(result, UpstreamConnectFailed):
                    return False
                if isinstance(result, BaseException):
                    raise result
            missing = min(missing - len(batch), self._missing())
        return True

    async def _connect_ahead(self) -> None:
        try:
            async with asyncio.timeout(self._timeout.connect):
                made = await self.connector._create_connection(self._template, [], self._timeout)
        except (ClientError, OSError, RuntimeError, ValueError) as error:
            raise self._failed(error) from None
        if self.connector.closed or not self._missing():
            made.close()  # requests have given back enough meanwhile
            return
        assert isinstance(made, WireConnection | SessionConnection)
        if isinstance(made, WireConnection):
            made.used = True  # it may be closed while it lies idle, as one that has served
        self._ahead.append(made)
        self.connector._release(self._key, made)

    def _idle(self) -> Iterator[tuple[ResponseHandler, float]]:
        """The idle connections of this upstream, each with the moment since when."""
        idle = self.connector._conns.get(self._key, ())
        return (entry for entry in idle if entry[0].is_connected())

    def _missing(self) -> int:
        """How many there are too few, without those that end soon."""
        soon = monotonic() + self._soon_s
        return max(0, self._min_idle - sum(self._ends_at(*entry) > soon for entry in self._idle()))

    def _ends_at(self, protocol: ResponseHandler, idle_since: float) -> float:
        assert isinstance(protocol, WireConnection | SessionConnection)
        return min(idle_since + self._keepalive_s, protocol.made_at + self._max_age_s)

    def _retire(self) -> None:
        """The connector itself closes an idle connection up to one keep-alive late."""
        soon = monotonic() + self._soon_s
        for entry in [entry for entry in self._idle() if self._ends_at(*entry) <= soon]:
            self.connector._conns[self._key].remove(entry)
            entry[0].close()


def _gone(connector: TCPConnector) -> str | None:
    names = ("_factory", "_acquired", "_conns", "_create_connection", "_release")
    gone = [name for name in names if not hasattr(connector, name)]
    if gone:
        return f"the connector has no {', '.join(gone)}"
    return None if _lends_as_ever(connector) else "the connector lends differently"


def _lends_as_ever(connector: TCPConnector) -> bool:
    """Whether what `Pool` does past the connector is still what that would do: tried with a connection that
    is none, to an upstream that is none."""
    loop = asyncio.get_running_loop()
    tried = WireConnection(loop)
    key = ClientRequest("POST", URL("http://tried.invalid"), loop=loop).connection_key
    try:
        loan = Loan(connector, key, tried, loop)
        loan._protocol = None
        connector._acquired.add(tried)
        connector._release(key, tried)
        kept = [protocol for protocol, _ in connector._conns.pop(key, ())]
    except (AttributeError, TypeError, ValueError):
        return False
    free = loan.protocol is None and tried not in connector._acquired
    return free and kept == ([] if connector.force_close else [tried])
