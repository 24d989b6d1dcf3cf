"""Active probes: the rule, and an upstream that is asked how it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog.testing

from proxy.health import Health, next_wait_s
from tests.kit.asking import Names, ask, dead_address, never, upstream, ways
from tests.kit.headrace import until
from tests.kit.lab import authority, plays, response, server_context
from tests.kit.upstreams import Call, scripted

pytestmark = pytest.mark.timeout(30)

PROBE = {"path": "/health", "interval": 0.02}


@pytest.mark.parametrize(
    ("outcomes", "verdicts"),
    [
        ("+", "+"),
        ("-", "+"),
        ("--", "+-"),
        ("-+-", "+++"),
        ("-+--", "+++-"),
        ("---", "+--"),
        ("--+", "+-+"),
        ("--+-", "+-++"),
        ("--+--", "+-++-"),
    ],
)
def test_rule(outcomes: str, verdicts: str) -> None:
    """Two failures in a row take it away, one answer brings it back; each change is told once."""
    health = Health()
    said = []
    before = True
    for outcome in outcomes:
        changed = health.record(outcome == "+")
        assert changed is (health.healthy is not before)
        before = health.healthy
        said.append("+" if health.healthy else "-")
    assert "".join(said) == verdicts


def test_jitter() -> None:
    """An interval, a tenth more or less."""
    waits = [next_wait_s(10.0, lambda share=share: share) for share in (0.0, 0.5, 1.0)]  # type: ignore[misc]  # a default binds the value of now
    assert waits == pytest.approx([9.0, 10.0, 11.0])


class Statuses:
    """A script that answers with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.status = status

    async def __call__(self, call: Call) -> None:
        body = b"" if self.status == 204 else b"{}"
        await call.send(response(self.status, body, "Location: /elsewhere"))


@ways
async def test_down_and_up_again(push: bool) -> None:
    """Away while it answers 500, back with the first other answer; one line a change, with the reason."""
    script = Statuses(200)
    with structlog.testing.capture_logs() as lines:
        async with scripted(script) as there, upstream(there.url, push=push, probe=PROBE) as up:
            assert up.healthy
            up.start()
            await until(lambda: len(there.calls) >= 3)
            assert up.healthy
            script.status = 503
            await until(lambda: not up.healthy)
            assert not up.available(0.0)
            asked = len(there.calls)
            await until(lambda: len(there.calls) >= asked + 3)
            assert not up.healthy
            script.status = 404
            await until(lambda: up.healthy)
            assert up.available(0.0)
    told = [(line["event"], line["upstream"], line.get("why")) for line in lines]
    assert told == [("upstream_unhealthy", "up", "status 503"), ("upstream_healthy", "up", None)]


@ways
async def test_what_a_probe_asks(push: bool) -> None:
    """GET of the path at the host, not below base_url; with the credential, the operator's fields and query;
    on a connection of its own that is closed after it."""
    async with (
        scripted(Statuses(401)) as there,
        upstream(
            f"{there.url}/deep",
            push=push,
            probe={"path": "/status?full=1", "interval": 0.02},
            api_keys=["k-1", "k-2"],
            headers={"X-Own": "1"},
            query={"api-version": "2"},
        ) as up,
    ):
        up.start()
        await until(lambda: len(there.calls) >= 3)
        head = there.calls[0].head
        assert head.startswith(b"GET /status?full=1&api-version=2 HTTP/1.1\r\n")
        assert b"\r\nAuthorization: Bearer k-1\r\n" in head
        assert b"\r\nX-Own: 1\r\n" in head
        assert there.connections >= len(there.calls)
        assert up.take_key(0.0) == 0  # no turn was taken
        assert (up.healthy, up.in_flight, up.connections()) == (True, 0, (0, 0))


@ways
@pytest.mark.parametrize("status", [200, 204, 307, 401, 404, 429, 499])
async def test_somebody_is_there(push: bool, status: int) -> None:
    """Any answer below 500; a redirect is not followed."""
    async with (
        scripted(Statuses(status)) as there,
        upstream(there.url, push=push, probe=PROBE) as up,
    ):
        up.start()
        await until(lambda: len(there.calls) >= 3)
        assert up.healthy
        assert {call.head.split(b" ")[1] for call in there.calls} == {b"/health"}


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("silence", "TimeoutError"),
        ("reset", "ClientOSError"),
        ("refused", "ClientConnectorError"),
        ("no name", "ClientConnectorDNSError"),
        ("slow name", "ConnectionTimeoutError"),
        ("certificate", "ClientConnectorCertificateError"),
    ],
)
async def test_nobody_is_there(fault: str, why: str) -> None:
    """Every way of not answering, told by its kind; nothing of it reaches the breaker."""
    connect_s = 0.15 if fault in ("silence", "slow name") else 5.0
    settings: dict[str, Any] = {
        "probe": PROBE,
        "timeouts": {"connect": connect_s},
        "breaker": {"failures": 1},
    }
    names = Names()

    async def script(call: Call) -> None:
        call.reset() if fault == "reset" else await call.watch()

    with dead_address() as dead, structlog.testing.capture_logs() as lines:
        names.answers = {"localhost": [dead]} if fault == "refused" else {}
        names.before = never if fault == "slow name" else None
        tls = server_context() if fault == "certificate" else None
        async with scripted(script, tls=tls) as there:
            named = fault in ("refused", "no name", "slow name")
            url = there.url.replace("127.0.0.1", "localhost") if named else there.url
            async with upstream(url, push=True, resolver=names if named else None, **settings) as up:
                up.start()
                await until(lambda: not up.healthy)
                assert up.breaker.available(0.0)
    assert [(line["event"], line["why"]) for line in lines] == [("upstream_unhealthy", why)]


async def test_a_private_authority() -> None:
    """Probes believe the same certificates as requests."""
    with authority().cert_pem.tempfile() as ca_file:
        async with (
            scripted(Statuses(), tls=server_context()) as there,
            upstream(there.url, push=True, ca_file=ca_file, probe=PROBE) as up,
        ):
            up.start()
            await until(lambda: len(there.calls) >= 3)
            assert up.healthy


@pytest.mark.parametrize("state", ["asking", "waiting", "never started"])
async def test_close_ends_it(state: str) -> None:
    """In the middle of a probe, between two, and before the first: no task and no connection stays."""
    tasks = asyncio.all_tasks()
    script = plays(Call.watch) if state == "asking" else Statuses()
    async with scripted(script) as there:
        probe = {"path": "/health", "interval": 3600.0}
        serving = asyncio.all_tasks() - tasks
        async with upstream(there.url, push=True, probe=probe) as up:
            if state != "never started":
                up.start()
                up.start()
                await until(lambda: len(there.calls) == 1)
        await until(lambda: asyncio.all_tasks() - tasks - serving == set())
        assert len(there.calls) == (state != "never started")


async def test_requests_do_not_heal() -> None:
    """The verdict is the probes': an answer to a request does not change it."""

    async def script(call: Call) -> None:
        await call.send(response(500 if b"/health" in call.head else 200, b"{}"))

    async with scripted(script) as there, upstream(there.url, push=True, probe=PROBE) as up:
        up.start()
        await until(lambda: not up.healthy)
        assert await ask(up) == (200, b"{}")
        assert not up.healthy
