"""The connections of an upstream: made ahead, aged, resolved anew; and what is set on their sockets."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from aiohttp import BaseConnector
from aiohttp.client_proto import ResponseHandler

from proxy import pool
from proxy.errors import UpstreamConnectFailed, UpstreamFailed, UpstreamStale, UpstreamUnreachable
from proxy.upstream import Upstream
from tests.kit.asking import Names, ask, dead_address, never, upstream, ways
from tests.kit.headrace import until
from tests.kit.lab import authority, plays, response, server_context
from tests.kit.upstreams import Call, scripted

pytestmark = pytest.mark.timeout(30)

OK = response(200, b"{}")
answers = plays(OK)


class Door:
    """An upstream that shows every connection that came in, asked or not."""

    def __init__(self) -> None:
        self.inside: list[asyncio.StreamWriter] = []
        self.accepted = 0
        self.at_once = 0
        self.slam = False  # closes whoever comes in
        self.drops = False  # closes instead of answering
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked_by: list[int] = []  # the ports of those who sent a request
        self.server: asyncio.Server | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    def entered(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self.serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.inside.append(writer)
        self.at_once = max(self.at_once, len(self.inside))
        try:
            while not self.slam:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"Content-Length: 2" in head:
                    await reader.readexactly(2)
                self.asked_by.append(writer.get_extra_info("peername")[1])
                if self.drops:
                    return
                await self.may_answer.wait()
                writer.write(OK)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.inside.remove(writer)
            writer.close()

    async def listen(self, port: int = 0, tls: ssl.SSLContext | None = None) -> int:
        self.server = await asyncio.start_server(self.entered, "127.0.0.1", port, ssl=tls)
        listening: int = self.server.sockets[0].getsockname()[1]
        return listening

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@asynccontextmanager
async def behind_a_door(
    push: bool, *, tls: bool = False, **settings: Any
) -> AsyncIterator[tuple[Door, Upstream]]:
    door = Door()
    port = await door.listen(tls=server_context() if tls else None)
    try:
        with authority().cert_pem.tempfile() as ca_file:
            url = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
            private = {"ca_file": ca_file} if tls else {}
            async with upstream(url, push=push, **private, **settings) as up:
                yield door, up
    finally:
        await door.close()


def idle_of(up: Upstream) -> list[Any]:
    """The protocols that lie ready."""
    return [protocol for protocol, _ in up._pool._idle()]


def ports_of(up: Upstream) -> set[int]:
    return {protocol.transport.get_extra_info("sockname")[1] for protocol in idle_of(up)}


async def filled(up: Upstream, count: int) -> None:
    await until(lambda: up.connections() == (0, count), 10.0, lambda: str(up.connections()))


# ── sockets ──────────────────────────────────────────────────────────────────────────────────────────────


@ways
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_socket_options(push: bool, tls: bool) -> None:
    """No Nagle, so that a small request leaves at once; keep-alive packets, so that silence keeps a flow."""
    async with behind_a_door(push, tls=tls) as (_, up):
        await ask(up)
        (protocol,) = idle_of(up)
        made = protocol.transport.get_extra_info("socket")
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 240  # Azure forgets a flow then


# ── made ahead ───────────────────────────────────────────────────────────────────────────────────────────


@ways
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_request_finds_a_connection(push: bool, tls: bool) -> None:
    """`min_idle` connections are made before anybody asks, and the first request takes one of them."""
    async with behind_a_door(push, tls=tls, pool={"min_idle": 3}) as (door, up):
        up.start()
        up.start()  # twice is once
        await filled(up, 3)
        await until(lambda: door.accepted == 3)
        ready = ports_of(up)
        assert len(ready) == 3
        assert [await ask(up), await ask(up)] == [(200, b"{}")] * 2
        assert set(door.asked_by) <= ready
        await until(lambda: up.connections()[1] >= 3)


@ways
async def test_nothing_is_made_ahead_unasked(push: bool) -> None:
    """`min_idle: 0`, and an upstream that was not started: no connection without a request."""
    async with behind_a_door(push) as (door, up), behind_a_door(push, pool={"min_idle": 2}) as (other, _):
        up.start()
        await ask(up)
        assert [door.accepted, other.accepted] == [1, 0]


@ways
async def test_keepalive_0_wins(push: bool) -> None:
    """Without keep-alive there is nothing that could lie ready."""
    async with behind_a_door(push, pool={"min_idle": 2, "keepalive": 0}) as (door, up):
        up.start()
        assert await ask(up) == (200, b"{}")
        assert door.accepted == 1


@ways
async def test_closed_ones_are_replaced(push: bool) -> None:
    """The upstream ends its idle connections: as many are made again."""
    async with behind_a_door(push, pool={"min_idle": 2}) as (door, up):
        up.start()
        await filled(up, 2)
        before = ports_of(up)
        for writer in list(door.inside):
            writer.close()
        await until(lambda: not before & ports_of(up))
        await filled(up, 2)
        assert door.accepted == 4


@ways
@pytest.mark.parametrize("knob", ["keepalive", "max_age"])
async def test_aged_ones_are_replaced_in_time(push: bool, knob: str) -> None:
    """Before one ends by keep-alive or by age another is there, and then the old one is closed."""
    async with behind_a_door(push, pool={"min_idle": 2, knob: 1.2}) as (door, up):
        up.start()
        await filled(up, 2)
        first = ports_of(up)
        await until(lambda: not first & ports_of(up))
        await filled(up, 2)
        await until(lambda: len(door.inside) == 2)
        assert door.at_once <= 4
        assert door.accepted >= 4


@ways
async def test_no_more_than_needed(push: bool) -> None:
    """One that stands only when requests have given theirs back is closed again."""
    names = Names(up_test=["127.0.0.1"])
    door = Door()
    port = await door.listen()
    try:
        async with upstream(
            f"http://up.test:{port}", push=push, resolver=names, pool={"min_idle": 1, "dns_ttl": 0.001}
        ) as up:
            door.may_answer.clear()
            asking = [asyncio.ensure_future(ask(up)) for _ in range(2)]
            await until(lambda: len(door.asked_by) == 2)
            address = asyncio.Event()
            names.before = address.wait
            looked_up = len(names.asked)
            up.start()  # both are in use: one is missing
            await until(lambda: len(names.asked) > looked_up)
            door.may_answer.set()
            await asyncio.gather(*asking)
            assert up.connections() == (0, 2)
            address.set()
            await until(lambda: door.accepted == 3 and len(door.inside) == 2)
            assert up.connections() == (0, 2)
    finally:
        await door.close()


@ways
async def test_a_refused_connection_is_tried_later(push: bool) -> None:
    """Failures are followed by pauses of 1, 2, 4 … seconds; a recovered upstream is found again."""
    names = Names()
    door = Door()
    port = await door.listen()
    try:
        async with upstream(f"http://up.test:{port}", push=push, resolver=names, pool={"min_idle": 2}) as up:
            up.start()
            began = monotonic()
            await until(lambda: len(names.asked) == 1)
            await until(lambda: monotonic() > began + 0.9)
            assert len(names.asked) == 1
            await until(lambda: monotonic() > began + 2.8)
            assert len(names.asked) == 2
            names.answers["up.test"] = ["127.0.0.1"]
            await filled(up, 2)
            assert monotonic() - began >= 2.9
    finally:
        await door.close()


@ways
async def test_one_that_hangs_is_given_up(push: bool) -> None:
    """A handshake ahead has timeouts.connect like any other; then it is tried again."""
    door = Door()
    port = await door.listen()
    try:
        async with upstream(
            f"https://127.0.0.1:{port}", push=push, timeouts={"connect": 0.2}, pool={"min_idle": 1}
        ) as up:
            up.start()
            await until(lambda: door.accepted == 2)
            assert door.at_once == 1
    finally:
        await door.close()


@ways
async def test_an_upstream_that_wants_no_idle_connections(push: bool) -> None:
    """It closes at once whoever only stands there: that is a failure too, and no reason to hammer it."""
    async with behind_a_door(push, pool={"min_idle": 3}) as (door, up):
        door.slam = True
        up.start()
        began = monotonic()
        await until(lambda: monotonic() > began + 2.0)
        assert 3 <= door.accepted <= 6  # at 0 s, and about 1.5 s later


@ways
async def test_a_farewell_to_a_ready_connection(push: bool) -> None:
    """Apache and HAProxy say 408 to whoever only stands there: that is no answer to the next request."""
    async with behind_a_door(push, pool={"min_idle": 1}) as (door, up):
        up.start()
        await filled(up, 1)
        before = ports_of(up)
        await until(lambda: len(door.inside) == 1)
        door.inside[0].write(response(408, b"too late"))
        await until(lambda: not before & ports_of(up))
        assert await ask(up) == (200, b"{}")


@ways
@pytest.mark.parametrize("state", ["ready", "in DNS", "in TLS", "pausing"])
async def test_close_leaves_nothing(push: bool, state: str) -> None:
    """Whatever is going on when an upstream is closed: no task, no connection, no socket stays."""
    door = Door()
    port = await door.listen()  # plain: a TLS handshake with it hangs
    names = Names(up_test=["127.0.0.1"])
    names.before = never if state == "in DNS" else None
    if state == "pausing":
        names.answers.clear()
    tasks = asyncio.all_tasks()
    scheme = "https" if state == "in TLS" else "http"
    try:
        async with upstream(
            f"{scheme}://up.test:{port}", push=push, resolver=names, pool={"min_idle": 2}
        ) as up:
            up.start()
            await until(lambda: bool(names.asked))
            if state == "ready":
                await filled(up, 2)
            elif state == "in TLS":
                await until(lambda: len(door.inside) == 2)
        await until(lambda: not door.inside)
        assert asyncio.all_tasks() - tasks - door.tasks == set()
        assert up.connections() == (0, 0)
        gc.collect()  # an unclosed socket is a ResourceWarning, and that an error
    finally:
        await door.close()


async def test_ready_and_closed_by_the_upstream() -> None:
    """One that lay ready and dies with the request on it counts as stale: it may be asked once more. A new
    one that dies is not."""
    async with behind_a_door(True, pool={"min_idle": 1}) as (door, up):
        door.drops = True
        with pytest.raises(UpstreamUnreachable) as caught:
            await ask(up)
        assert not isinstance(caught.value, UpstreamStale)
        up.start()
        await filled(up, 1)
        with pytest.raises(UpstreamStale):
            await ask(up)


async def test_fresh_leaves_the_ready_ones() -> None:
    """A second try after a stale connection has a new one, whatever lies ready."""
    async with behind_a_door(True, pool={"min_idle": 2}) as (door, up):
        up.start()
        await filled(up, 2)
        ready = ports_of(up)
        exchange = up.exchange("GET", "/x", b"", b"")
        exchange.fresh = True
        await exchange.send()
        assert not exchange.reused
        assert await exchange.hold(2**20, monotonic() + 10)
        exchange.taken()
        exchange.close()
        assert ports_of(up) - ready
        assert door.accepted >= 3


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────


@ways
@pytest.mark.parametrize("fault", ["nxdomain", "hangs"])
async def test_no_address(push: bool, fault: str) -> None:
    """A name that is not there, and a resolver that does not answer: failures to connect, in time."""
    names = Names()
    if fault == "hangs":
        names.before = never
    async with upstream("http://up.test:9", push=push, resolver=names, timeouts={"connect": 0.3}) as up:
        began = monotonic()
        with pytest.raises(UpstreamConnectFailed):
            await ask(up)
        assert monotonic() - began < 2.0
        assert up.connections() == (0, 0)
        names.before = None
        with pytest.raises(UpstreamConnectFailed):
            await ask(up)
        # A failure is not remembered; a lookup that hangs is one, however many wait for it.
        assert len(names.asked) == 1 + (fault == "nxdomain")


@ways
async def test_dns_ttl(push: bool) -> None:
    """Within `dns_ttl` nobody is asked; after it the new address is."""
    names = Names(up_test=["127.0.0.1"])
    async with scripted(answers) as there:
        knobs = {"dns_ttl": 0.5, "keepalive": 0}
        async with upstream(f"http://up.test:{there.port}", push=push, resolver=names, pool=knobs) as up:
            began = monotonic()
            await ask(up)
            await ask(up)
            if monotonic() - began < 0.4:
                assert names.asked == ["up.test"]
            await until(lambda: monotonic() > began + 0.6)
            await ask(up)
            assert len(names.asked) >= 2
            assert there.connections == 3


@ways
async def test_a_changed_address(push: bool) -> None:
    """A connection that is never idle, to an address that DNS no longer gives, is left within dns_ttl +
    max_age: no request that begins later goes there."""
    async with scripted(answers) as before, scripted(answers) as after:
        names = Names(up_test=[f"127.0.0.1:{before.port}"])
        knobs = {"dns_ttl": 0.2, "max_age": 0.3}
        async with upstream("http://up.test", push=push, resolver=names, pool=knobs) as up:
            await ask(up)
            names.answers["up.test"] = [f"127.0.0.1:{after.port}"]
            changed = monotonic()
            while monotonic() < changed + 0.5:
                await ask(up)
            asked_before = len(before.calls)
            await ask(up)
            assert [len(before.calls), len(after.calls) > 0] == [asked_before, True]
            assert before.connections < asked_before  # connections were kept meanwhile


@ways
async def test_one_of_two_addresses_is_dead(push: bool) -> None:
    """The other one is used, whichever is first."""
    async with scripted(answers) as there:
        with dead_address() as dead:
            alive = f"127.0.0.1:{there.port}"
            for addresses in ([dead, alive], [alive, dead]):
                names = Names(up_test=addresses)
                async with upstream("http://up.test", push=push, resolver=names, pool={"keepalive": 0}) as up:
                    assert [await ask(up), await ask(up)] == [(200, b"{}")] * 2


async def test_a_dead_address_is_not_remembered() -> None:
    """After a failure to connect DNS is asked again at once, not after `dns_ttl`."""
    async with scripted(answers) as there:
        with dead_address() as dead:
            names = Names(up_test=[dead])
            async with upstream("http://up.test", push=True, resolver=names, pool={"dns_ttl": 3600}) as up:
                with pytest.raises(UpstreamConnectFailed) as caught:
                    await ask(up)
                assert "ClientConnectorError: " in caught.value.__notes__[0]
                names.answers["up.test"] = [f"127.0.0.1:{there.port}"]
                assert await ask(up) == (200, b"{}")


# ── private names ────────────────────────────────────────────────────────────────────────────────────────


@ways
async def test_without_the_private_names(push: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An aiohttp that has renamed them: the public way serves, without connections ahead."""
    monkeypatch.delattr(BaseConnector, "_release")

    async with upstream("http://127.0.0.1:9", push=push, pool={"min_idle": 1}) as up:
        assert up._pool.trouble == "the connector has no _release"
        up.start()
        exchange = up.exchange("POST", "/x", b"", b"{}")
        assert not exchange.pushes
        exchange.close()
        up.in_flight = 2
        assert up.connections() == (2, 0)


async def test_with_other_meanings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An aiohttp whose connector keeps idle connections elsewhere: the public way serves."""

    def forgets(connector: BaseConnector, key: object, protocol: ResponseHandler, **_: object) -> None:
        connector._acquired.discard(protocol)

    monkeypatch.setattr(BaseConnector, "_release", forgets)
    async with upstream("http://127.0.0.1:9", push=True) as up:
        assert up._pool.trouble == "the connector lends differently"
        assert not up.exchange("POST", "/x", b"", b"{}").pushes


@pytest.mark.parametrize("keepalive", [0, 15])
async def test_the_check_leaves_nothing(keepalive: int) -> None:
    async with upstream("http://127.0.0.1:9", push=True, pool={"keepalive": keepalive}) as up:
        assert up._pool.trouble is None
        assert (up.connections(), dict(up._pool.connector._conns)) == ((0, 0), {})


async def test_this_aiohttp_has_them() -> None:
    """Else everything above tests the public way."""
    async with upstream("http://127.0.0.1:9", push=True) as up:
        assert up._pool.trouble is None
        assert up.exchange("GET", "/", b"", b"").pushes


async def test_timeouts_are_exact() -> None:
    """aiohttp rounds long timeouts up to a whole second unless told not to."""
    assert pool.exact_timeout(7.25).ceil_threshold == float("inf")
    assert (pool.exact_timeout(7.25, 9.5).connect, pool.exact_timeout(7.25, 9.5).total) == (7.25, 9.5)


@ways
async def test_a_connection_that_dies_with_its_request(push: bool) -> None:
    """Nothing of it stays counted."""
    async with scripted(plays(Call.reset)) as there, upstream(there.url, push=push) as up:
        with pytest.raises(UpstreamFailed):
            await ask(up)
        await until(lambda: up.connections() == (0, 0))
