"""Shutdown: what runs may finish, what does not finish in time ends visibly. Headrace is a process here."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.callers import Answer, Caller, ask, chat, everything, post
from tests.kit.headrace import Command, command, running, settings_for, until
from tests.kit.lab import Gate, hold, last_event, plays
from tests.kit.ledger import written
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, Scripted, chunk, event, scripted

pytestmark = pytest.mark.timeout(40)

DRAIN_S = 1.5
GET_READY = b"GET /readyz HTTP/1.1\r\nHost: test\r\n\r\n"
GET_STATE = b"GET /debug/state HTTP/1.1\r\nHost: test\r\n\r\n"
GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n"


class Drained:
    """A Headrace process with one scripted upstream."""

    def __init__(self, process: Command, upstream: Scripted, ports: tuple[int, int]) -> None:
        self.process = process
        self.upstream = upstream
        self.port, self.admin_port = ports
        self.told_at = 0.0

    async def terminate(self) -> None:
        """SIGTERM, and the moment from which readiness says so."""
        self.told_at = time.monotonic()
        self.process.signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while (await ask(self.admin_port, GET_READY)).status != 503:
                pass

    async def ended(self) -> float:
        """Checks the exit code; the seconds since SIGTERM."""
        assert await self.process.ended() == 0, self.process.err
        return time.monotonic() - self.told_at


@asynccontextmanager
async def headrace(script: Script, tmp_path: Path, **sections: Any) -> AsyncIterator[Drained]:
    async with scripted(script) as upstream:
        file = tmp_path / "headrace.yaml"
        ledger = {"database": f"sqlite:{tmp_path}/headrace.db"}
        settings = settings_for(upstream.url, **{"drain": DRAIN_S, "ledger": ledger, **sections})
        file.write_text(yaml.safe_dump(settings))
        async with command("-c", str(file), "serve") as process:
            yield Drained(process, upstream, await process.serving())


async def refuses(port: int) -> bool:
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_the_short_finish_and_the_long_are_told(tmp_path: Path) -> None:
    """Of 20 streams the short ones end whole, the long ones with the error event, an abort and `drained`."""
    gate = Gate()
    tail = [event(f"after {n}") for n in range(5)]

    async def script(call: Call) -> None:
        await call.send(HEAD + chunk(event("before")))
        if json.loads(call.body)["messages"][0]["content"] == "long":
            await hold(call)
            return
        await gate(call)
        for piece in [*tail, DONE]:
            await call.send(chunk(piece))
        await call.send(END)

    def asking(kind: str) -> bytes:
        return chat(messages=[{"role": "user", "content": kind}])

    async with headrace(script, tmp_path) as lab:
        short = [asyncio.ensure_future(everything(lab.port, asking("short"))) for _ in range(10)]
        long = [asyncio.ensure_future(everything(lab.port, asking("long"))) for _ in range(10)]
        await until(lambda: len(lab.upstream.calls) == 20)
        await lab.terminate()
        assert not any(task.done() for task in (*short, *long))
        gate.open()
        whole = await asyncio.gather(*short)
        assert await refuses(lab.port)
        cut = await asyncio.gather(*long)
        took_s = await lab.ended()

        assert DRAIN_S <= took_s < DRAIN_S + 2
        for answer in whole:
            assert answer.clean
            assert answer.body == event("before") + b"".join(tail) + DONE
        for answer in cut:
            assert answer.status == 200
            assert not answer.clean
            assert answer.body.startswith(event("before"))
            assert last_event(answer)["error"]["code"] == "draining"
            assert b"[DONE]" not in answer.body
        reasons = sorted(line["reason"] for line in lab.process.requests())
        assert reasons == ["complete"] * 10 + ["drained"] * 10
        assert sorted(row.reason for row in written(tmp_path / "headrace.db")) == reasons
        await asyncio.gather(*(call.gone.wait() for call in lab.upstream.calls if b'"long"' in call.body))


async def test_the_admin_listener_stays_and_the_data_listener_goes(tmp_path: Path) -> None:
    """During drain readiness says 503, health and state still answer, and new connections are refused."""
    gate = Gate()
    script = plays(HEAD, chunk(event("a")), gate, chunk(DONE), END)
    async with headrace(script, tmp_path, drain=20) as lab:
        stream = asyncio.ensure_future(ask(lab.port, chat()))
        await until(lambda: len(lab.upstream.calls) == 1)
        assert (await ask(lab.admin_port, GET_READY)).status == 200
        await lab.terminate()
        ready = await ask(lab.admin_port, GET_READY)
        assert (ready.status, ready.json()["status"]) == (503, "draining")
        assert (await ask(lab.admin_port, GET_READY.replace(b"readyz", b"healthz"))).status == 200
        assert (await ask(lab.admin_port, GET_STATE)).json()["in_flight"] == 1
        assert await refuses(lab.port)
        gate.open()
        assert (await stream).clean
        assert await lab.ended() < 10  # it does not wait for the rest of its 20 s
        assert await refuses(lab.admin_port)


async def test_idle_connections_are_closed(tmp_path: Path) -> None:
    """A kept connection on which nothing is asked does not hold up the end."""
    async with (
        headrace(plays(hold), tmp_path, drain=20) as lab,
        await Caller.connect(lab.port) as caller,
        asyncio.timeout(10),
    ):
        assert (await caller.ask(GET_HEALTH)).status == 200
        lab.told_at = time.monotonic()
        lab.process.signal(signal.SIGTERM)
        assert await caller.reader.read() == b""
        assert await lab.ended() < 10


async def test_answers_during_drain_close_their_connection(tmp_path: Path) -> None:
    """What is answered during drain, on connections from before it, says Connection: close and does so."""
    gate = Gate()

    async def script(call: Call) -> None:
        await gate(call)
        await call.send(HEAD + chunk(event("a")) + chunk(DONE) + END)

    async with headrace(script, tmp_path, drain=20) as lab, AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(await Caller.connect(lab.port)) for _ in range(3)]
        for caller in callers:
            await caller.send(chat())
        await until(lambda: len(lab.upstream.calls) == 3)
        await lab.terminate()
        gate.open()
        async with asyncio.timeout(10):
            for caller in callers:
                answer = await caller.rest(await caller.head())
                assert answer.clean
                assert answer.headers["connection"] == "close"
                assert answer.body == event("a") + DONE
                assert await caller.reader.read() == b""
        await lab.ended()


async def test_no_first_byte_at_the_end_of_drain(tmp_path: Path) -> None:
    """A request whose upstream has said nothing by then gets 503 draining with Retry-After."""
    async with headrace(plays(hold), tmp_path) as lab:
        waiting = [
            asyncio.ensure_future(everything(lab.port, request)) for request in (chat(), chat(stream=False))
        ]
        await until(lambda: len(lab.upstream.calls) == 2)
        await lab.terminate()
        for answer in await asyncio.gather(*waiting):
            assert (answer.status, answer.json()["error"]["code"]) == (503, "draining")
            assert answer.clean
            assert "retry-after" in answer.headers
            assert answer.headers["connection"] == "close"
        assert await lab.ended() < DRAIN_S + 2
        assert [line["reason"] for line in lab.process.requests()] == ["drained"] * 2
        for call in lab.upstream.calls:
            async with asyncio.timeout(5):
                await call.gone.wait()


async def test_a_body_that_is_still_coming(tmp_path: Path) -> None:
    """A caller that has sent half of its body is told 503 draining at the end of drain, not just cut off."""
    request = chat()
    async with headrace(plays(hold), tmp_path) as lab, await Caller.connect(lab.port) as caller:
        await caller.send(request[:-10])
        async with asyncio.timeout(10):
            while (await ask(lab.admin_port, GET_STATE)).json()["in_flight"] == 0:
                pass
            await lab.terminate()
            answer: Answer = await caller.rest(await caller.head())
            assert (answer.status, answer.json()["error"]["code"]) == (503, "draining")
        assert await lab.ended() < DRAIN_S + 2
        assert [line["reason"] for line in lab.process.requests()] == ["drained"]


async def test_who_was_accepted_is_answered() -> None:
    """A connection that has said nothing yet when the listener closes: no other process will see it."""
    async with running(settings_for("mock:")) as here, await Caller.connect(here.port) as caller:
        await until(lambda: here.server._runner.listener.has_fresh())  # type: ignore[union-attr] # it listens
        draining = asyncio.ensure_future(here.server.drain(10, asyncio.Event()))
        await until(lambda: here.server.core.draining)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.shield(draining)  # for a second at most it waits for the request
        answer = await caller.ask(post("/v1/chat/completions", {"model": "m", "messages": []}))
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        await draining


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_nobody_begins_any_more(path: str) -> None:
    """A caller that was kept and asks again when those that were promised an answer have it."""
    async with running(settings_for("mock:", browser_api={"model": "m"})) as here:
        here.server.core.refusing = True
        answer = await ask(
            here.port, post(path, {"model": "m", "messages": [{"role": "user", "content": "x"}]})
        )
        assert (answer.status, answer.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in answer.headers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """Whoever asks twice does not wait for the drain, and streams still end visibly."""
    async with headrace(plays(HEAD, chunk(event("a")), hold), tmp_path, drain=60) as lab:
        stream = asyncio.ensure_future(everything(lab.port, chat()))
        await until(lambda: len(lab.upstream.calls) == 1)
        await lab.terminate()
        assert not stream.done()
        lab.told_at = time.monotonic()
        lab.process.signal(number)
        answer = await stream
        assert not answer.clean
        assert last_event(answer)["error"]["code"] == "draining"
        assert await lab.ended() < 5


async def test_nothing_to_drain(tmp_path: Path) -> None:
    """An idle server ends at once, with exit code 0."""
    async with headrace(plays(hold), tmp_path, drain=60) as lab:
        lab.told_at = time.monotonic()
        lab.process.signal(signal.SIGTERM)
        assert await lab.ended() < 5
