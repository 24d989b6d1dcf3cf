"""A reader that leaves, in any phase, by FIN or by RST: the upstream request ends within a second."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from tests.kit.callers import Caller, chat, post
from tests.kit.headrace import running, settings_for, until
from tests.kit.lab import Lab, Way, both, everywhere, hold, lab, plays, response
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event

pytestmark = pytest.mark.timeout(30)

#: Contract section 6, rule 4.
WITHIN_S = 1.0
A, B = event("a"), event("b")
ENOUGH = b'{"padding":"' + b"x" * 200_000


def half_close(caller: Caller) -> None:
    """FIN of the sending side only; the reading side stays open."""
    caller.writer.write_eof()


leaves = pytest.mark.parametrize(
    "leave", [Caller.leave, Caller.reset, half_close], ids=["fin", "rst", "half-close"]
)
Leave = Callable[[Caller], None]


async def is_gone(it: Lab, call: Call | None, phase: str) -> None:
    """The upstream saw the close in time, the end is told once everywhere, and nothing is left."""
    if call is not None:
        async with asyncio.timeout(WITHIN_S):
            await call.gone.wait()
    line = await it.ended("client_gone")
    assert line["attempts"] == (0 if call is None else 1)
    samples = await it.headrace.metrics()
    gone = {name: value for name, value in samples.items() if "client_disconnects_total{" in name}
    assert gone == {f'headrace_client_disconnects_total{{phase="{phase}"}}': 1}, gone
    results = {name: value for name, value in samples.items() if "upstream_attempts_total{" in name}
    assert all('result="cancelled"' in name for name in results), results
    assert it.headrace.state["upstream_idle"] == 0
    assert len(it.headrace.log_lines()) == 1


def pumps(piece: bytes) -> Script:
    """Sends one piece after the other until the proxy goes."""

    async def script(call: Call) -> None:
        watcher = asyncio.get_running_loop().create_task(call.watch())
        try:
            await call.send(HEAD)
            while not call.gone.is_set():
                await call.send(chunk(piece))
                await asyncio.sleep(0.001)
        except ConnectionError:
            call.gone.set()
        finally:
            watcher.cancel()

    return script


@both
@leaves
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_while_sending_its_body(way: Way, leave: Leave, framing: str) -> None:
    """Half a body and then nobody: no upstream is reached."""
    whole = chat()
    if framing == "length":
        half = whole[:-20]
    else:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        half = head + b'Transfer-Encoding: chunked\r\n\r\n10\r\n{"model":"m","a"\r\n10\r\n'
    async with lab(plays(hold), way) as it, asyncio.timeout(10), await Caller.connect(it.port) as caller:
        await caller.send(half)
        await until(lambda: it.headrace.state["in_flight"] == 1)
        leave(caller)
        async with asyncio.timeout(WITHIN_S):
            await it.line()
        await is_gone(it, None, "body")
        assert it.upstream.connections == 0


@everywhere
@leaves
@pytest.mark.parametrize("stream", [True, False])
async def test_while_waiting_for_the_first_byte(way: Way, leave: Leave, stream: bool) -> None:
    """The upstream thinks; its request ends with its reader."""
    async with lab(plays(hold), way) as it, asyncio.timeout(10), await Caller.connect(it.port) as caller:
        await caller.send(chat(stream=stream))
        call = await it.called()
        leave(caller)
        await is_gone(it, call, "first_byte")


@both
@leaves
async def test_after_the_head_alone(way: Way, leave: Leave) -> None:
    """The upstream has sent its head and no byte of the body."""
    async with (
        lab(plays(HEAD, hold), way) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        call = await it.called()
        leave(caller)
        await is_gone(it, call, "first_byte")


@both
@leaves
async def test_between_early_comments(way: Way, leave: Leave) -> None:
    """The early 200 has been sent and the upstream still thinks."""
    streams = {"commit_after": 0.05, "heartbeat": 0.05}
    async with (
        lab(plays(hold), way, streams=streams) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        call = await it.called()
        await caller.piece(await caller.head())
        leave(caller)
        await is_gone(it, call, "first_byte")


@everywhere
@leaves
async def test_in_a_silent_stream(way: Way, leave: Leave) -> None:
    """Nothing is being written, so no write can fail: the close itself has to be noticed."""
    async with (
        lab(plays(HEAD, chunk(A), hold), way) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat())
        assert await caller.piece(await caller.head()) == A
        leave(caller)
        await is_gone(it, await it.called(), "stream")


@everywhere
@leaves
async def test_in_a_busy_stream(way: Way, leave: Leave) -> None:
    """Events go on while the reader leaves; none of the writes to it does harm."""
    async with lab(pumps(A), way) as it, asyncio.timeout(10), await Caller.connect(it.port) as caller:
        await caller.send(chat())
        answer = await caller.head()
        for _ in range(5):
            await caller.piece(answer)
        leave(caller)
        await is_gone(it, await it.called(), "stream")


@both
@leaves
async def test_in_a_blocked_stream(way: Way, leave: Leave) -> None:
    """A reader that had stopped reading leaves: the paused upstream is let go."""
    async with (
        lab(pumps(A * 1000), way) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port, receive_buffer=4096) as caller,
    ):
        caller.writer.transport.pause_reading()
        await caller.send(chat())
        call = await it.called()
        await until(lambda: call.writer.transport.get_write_buffer_size() > 2**16)
        leave(caller)
        await is_gone(it, call, "stream")


@everywhere
@leaves
async def test_while_waiting_for_an_answer(way: Way, leave: Leave) -> None:
    """An answer that is no stream has begun and is still small enough to be held."""
    async with (
        lab(plays(response(200, b'{"half": 1}')[:-4], hold), way) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat(stream=False))
        call = await it.called()
        await until(lambda: _phase(it) == "answer")
        leave(caller)
        await is_gone(it, call, "answer")


@both
@leaves
async def test_in_a_large_answer(way: Way, leave: Leave) -> None:
    """An answer that is no stream, large enough to be piped, and stopped halfway."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with (
        lab(plays(head, chunk(ENOUGH), hold), way) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as caller,
    ):
        await caller.send(chat(stream=False))
        await caller.piece(await caller.head())
        leave(caller)
        await is_gone(it, await it.called(), "answer")


@both
@leaves
async def test_while_connecting(way: Way, leave: Leave) -> None:
    """The upstream's machine takes no connection; the attempt to connect ends with the reader."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]  # fill the backlog: further SYNs get no answer
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            async with (
                lab(plays(hold), way, upstream={"base_url": f"http://127.0.0.1:{port}/v1"}) as it,
                asyncio.timeout(10),
                await Caller.connect(it.port) as caller,
            ):
                await caller.send(chat())
                await until(lambda: it.headrace.state["permits"] == 1)
                leave(caller)
                async with asyncio.timeout(WITHIN_S):
                    await it.line()
                line = await it.ended("client_gone")
                assert (line["attempts"], line["status"]) == (1, 499)
        finally:
            for one in waiting:
                one.close()


@both
async def test_the_next_reader_is_served(way: Way) -> None:
    """Fifty readers leave at once, half of them by RST; then a request works as ever."""
    leaving = asyncio.Event()

    async def script(call: Call) -> None:
        if leaving.is_set():
            await call.send(HEAD + chunk(A + DONE) + END)
        else:
            await plays(HEAD, chunk(A), hold)(call)

    async def one(it: Lab, number: int) -> None:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        await caller.piece(await caller.head())
        await gathered.wait()
        (Caller.reset if number % 2 else Caller.leave)(caller)

    gathered = asyncio.Barrier(50)
    async with lab(script, way) as it, asyncio.timeout(15):
        await asyncio.gather(*(one(it, number) for number in range(50)))
        async with asyncio.timeout(WITHIN_S):
            await asyncio.gather(*(call.gone.wait() for call in it.upstream.calls))
        await it.headrace.quiet()
        assert [line["reason"] for line in it.headrace.log_lines()] == ["client_gone"] * 50
        leaving.set()
        async with await Caller.connect(it.port) as caller:
            answer = await caller.ask(chat())
        assert answer.clean
        assert answer.body == A + DONE


@both
async def test_a_leaver_takes_no_other_with_it(way: Way) -> None:
    """Two streams side by side: one reader leaves, the other gets the rest of its own."""
    other = asyncio.Event()

    async def script(call: Call) -> None:
        await call.send(HEAD + chunk(A))
        if b"stays" in call.body:
            await other.wait()
            await call.send(chunk(B + DONE) + END)
        else:
            await call.watch()

    async with (
        lab(script, way) as it,
        asyncio.timeout(10),
        await Caller.connect(it.port) as stays,
        await Caller.connect(it.port) as goes,
    ):
        await stays.send(chat(user="stays"))
        answer = await stays.head()
        await stays.piece(answer)
        await goes.send(chat(user="goes"))
        await goes.piece(await goes.head())
        goes.reset()
        await until(lambda: any(call.gone.is_set() for call in it.upstream.calls), WITHIN_S)
        other.set()
        await stays.rest(answer)
        assert answer.body == A + B + DONE
        assert answer.clean
        await until(lambda: len(it.headrace.log_lines()) == 2)
        assert [line["reason"] for line in it.headrace.log_lines()] == ["client_gone", "complete"]


@both
async def test_leaving_with_a_request_behind(way: Way) -> None:
    """A pipelined second request does not hide the leave of the first one's reader, and is never run."""
    async with lab(plays(hold), way) as it, asyncio.timeout(10), await Caller.connect(it.port) as caller:
        await caller.send(chat() + post("/v1/embeddings", {"model": "m", "input": "x"}))
        call = await it.called()
        caller.leave()
        await is_gone(it, call, "first_byte")
        assert len(it.upstream.calls) == 1


def _phase(it: Lab) -> str:
    core = it.headrace.server.core
    assert core is not None
    return next((ctx.phase.value for ctx in core.running), "")


@pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])
async def test_leaving_is_no_error(leave: Leave, capfd: pytest.CaptureFixture[str]) -> None:
    """Readers that leave while bytes are on their way to them leave no line in the log but their own."""
    async with running(settings_for("mock:")) as headrace:

        async def one(number: int) -> None:
            caller = await Caller.connect(headrace.port)
            await caller.send(chat("x-mock: words=400, gap=0.0005"))
            answer = await caller.head()
            for _ in range(1 + number % 20):
                await caller.piece(answer)
            leave(caller)

        for _ in range(8):
            await asyncio.gather(*map(one, range(50)))
        await headrace.quiet()
        await until(lambda: len(headrace.log_lines()) == 400)
        assert [line["reason"] for line in headrace.log_lines()] == ["client_gone"] * 400
    assert '"level":"error"' not in capfd.readouterr().out


@both
@pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])
async def test_after_the_terminator(way: Way, leave: Leave) -> None:
    """SDKs leave at [DONE] without waiting for the end of the body: they have it all."""
    async with lab(plays(HEAD, chunk(A), chunk(DONE), hold), way) as it:
        caller = await Caller.connect(it.port)
        await caller.send(chat())
        answer = await caller.head()
        while not answer.body.endswith(DONE):
            await caller.piece(answer)
        leave(caller)
        line = await it.ended("complete")
        assert line["status"] == 200
        samples = await it.headrace.metrics()
        assert samples['headrace_upstream_attempts_total{result="ok",upstream="up"}'] == 1
        assert not any("client_disconnects_total{" in name for name in samples)
