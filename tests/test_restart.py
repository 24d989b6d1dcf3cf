"""Restart: a new generation takes the sockets over, the old one finishes its streams."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from proxy import listen
from proxy.address import Address
from proxy.shared import Shared
from tests.kit.callers import Answer, Caller, ask, chat, post
from tests.kit.fleet import Fleet, alive, fleet
from tests.kit.headrace import settings_for, until
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, event, scripted

EVENTS = [event(f"word {number}") for number in range(30)]
BODY = b"".join(EVENTS) + DONE
SHORT = post("/v1/chat/completions", {"model": "m", "messages": []}, "Connection: close")
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Paced:
    """Short answers at once; streams go on event by event as long as the test lets them."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, call: Call) -> None:
        if b'"stream": true' not in call.body:
            await call.send(JSON)
            return
        await call.send(HEAD + chunk(EVENTS[0]))
        await self.go.wait()
        for one in EVENTS[1:]:
            await call.send(chunk(one))
            await asyncio.sleep(0.005)
        await call.send(chunk(DONE) + END)


async def streaming(port: int) -> tuple[Caller, Answer]:
    """A stream whose first event has arrived."""
    caller = await Caller.connect(port)
    await caller.send(chat())
    answer = await caller.head()
    await caller.piece(answer)
    return caller, answer


class Knocking:
    """New connections at a steady rate, one request each; what goes wrong is kept."""

    def __init__(self, port: int, per_second: int) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._port = port
        self._gap_s = 1 / per_second
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    async def _one(self) -> None:
        try:
            answer = await ask(self._port, SHORT)
            assert (answer.status, answer.body) == (200, b"{}")
            self.answered += 1
        except Exception as error:
            self.failures.append(repr(error))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stop.is_set():
            self._tasks.add(loop.create_task(self._one()))
            await asyncio.sleep(self._gap_s)
        await asyncio.gather(*self._tasks)

    def stop(self) -> None:
        self._stop.set()


async def gone(running: Fleet) -> int:
    """The exit code of the first process; its pipes stay open, the heir has inherited them."""
    return await asyncio.wait_for(running.first.process.wait(), 20)


async def by_command(running: Fleet) -> int:
    code, out, err = await running.tell("restart")
    assert (code, err) == (0, [])
    (line,) = out
    return int(line.removeprefix("pid: "))


async def by_signal(running: Fleet) -> int:
    os.kill(running.pid, signal.SIGUSR2)
    await until(lambda: bool(running.logged("handed_over")), 20)
    return int(running.logged("handed_over")[0]["to"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("restart", [by_command, by_signal])
async def test_nobody_notices(tmp_path: Path, restart: Any, workers: int) -> None:
    """20 streams across it are whole; of 200 new connections a second none is refused; counters only grow;
    the old process ends with 0 and the new one drains on SIGTERM."""
    script = Paced()
    async with (
        asyncio.timeout(50),
        scripted(script) as upstream,
        fleet(tmp_path, settings_for(upstream.url, workers=workers)) as running,
    ):
        streams = [await streaming(running.port) for _ in range(20)]
        knocking = Knocking(running.port, 200)
        knocks = asyncio.ensure_future(knocking.run())
        await until(lambda: knocking.answered > 50)
        counted = await running.total("headrace_requests_total")
        heir = await restart(running)
        assert heir != running.pid
        assert alive(heir)
        seen = knocking.answered
        await until(lambda: knocking.answered > seen + 200, 10)
        assert (await running.state())["streams"] == 20  # the old generation's are counted
        assert await running.total("headrace_requests_total") >= counted
        script.go.set()
        for caller, answer in streams:
            await caller.rest(answer)
            assert answer.body == BODY
            assert answer.clean
            caller.leave()
        assert await gone(running) == 0
        knocking.stop()
        await knocks
        assert not knocking.failures
        total = knocking.answered + 20
        async with asyncio.timeout(5):
            while await running.total("headrace_requests_total", 'reason="complete"') != total:
                await asyncio.sleep(0.02)
        assert (await running.state())["workers"] == workers
        os.kill(heir, signal.SIGTERM)
        await until(lambda: not alive(heir), 10)


async def test_a_generation_that_cannot_start(tmp_path: Path) -> None:
    """With a broken file on disk nothing changes, and the command says so in one line."""
    async with (
        scripted(Paced()) as upstream,
        fleet(tmp_path, settings_for(upstream.url, workers=1)) as running,
    ):
        good = running.file.read_text()
        running.file.write_text("upstreams: {}")
        # The command reads the same file: it gets a whole one, the server does not.
        whole = tmp_path / "whole.yaml"
        whole.write_text(good)
        refused = await running.admin("POST", "/admin/restart")
        assert refused.status == 409
        assert refused.json()["error"]["code"] == "restart_failed"
        assert (await ask(running.port, SHORT)).status == 200
        assert len(running.processes()) == 1
        running.file.write_text(good)
        heir = await by_command(running)
        assert await gone(running) == 0
        assert (await ask(running.port, SHORT)).status == 200
        assert alive(heir)


async def test_two_at_once(tmp_path: Path) -> None:
    """One hands over; the other is told so, and nothing else becomes of it."""
    async with fleet(tmp_path, settings_for("mock:", workers=1)) as running:
        answers = await asyncio.gather(*(running.admin("POST", "/admin/restart") for _ in range(2)))
        assert sorted(answer.status for answer in answers) == [200, 409]
        (refused,) = (answer for answer in answers if answer.status == 409)
        assert "under way" in refused.json()["error"]["message"]
        assert await gone(running) == 0
        assert (await ask(running.port, SHORT)).status == 200


async def test_two_in_a_row(tmp_path: Path) -> None:
    """The heir can hand over as well; the figures of all generations are still there."""
    async with (
        scripted(Paced()) as upstream,
        fleet(tmp_path, settings_for(upstream.url, workers=1)) as running,
    ):
        for _ in range(3):
            assert (await ask(running.port, SHORT)).status == 200
        first = await by_command(running)
        assert (await ask(running.port, SHORT)).status == 200
        assert await gone(running) == 0
        second = await by_command(running)
        assert second != first
        await until(lambda: not alive(first), 10)
        assert (await ask(running.port, SHORT)).status == 200
        assert await running.total("headrace_requests_total", 'reason="complete"') == 5


async def test_another_address_on_disk(tmp_path: Path) -> None:
    """What was inherited is kept only if it is still what the configuration says."""
    first, path = listen.bind(Address("127.0.0.1", 0)), str(tmp_path / "h.sock")
    assert listen.keep_or_bind(first, Address("127.0.0.1", first.getsockname()[1])) is first
    with listen.keep_or_bind(first, Address("", 0, path)) as second:
        assert first.fileno() == -1
        assert second.getsockname() == path


async def test_every_address() -> None:
    """Without a host both families are served."""
    with listen.bind(Address("", 0)) as sock:
        for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            with socket.create_connection((host, sock.getsockname()[1]), timeout=5):
                pass


def test_counters_are_inherited_while_they_have_room() -> None:
    """For half of the owners at most: the generation before is still there. A larger crew counts anew."""
    first = Shared.fresh(2)
    heir = Shared.inherited(first.bequest(), 2)
    assert (heir.fd, heir.new, heir.owner(0).number) == (first.fd, False, first.owner(2).number + 1)
    larger = Shared.inherited(f"{os.dup(first.fd)}:{heir.owner(0).number}:64", 40)
    assert larger.new
    assert larger.fd != first.fd
    for each in (first, larger):
        each.close()
