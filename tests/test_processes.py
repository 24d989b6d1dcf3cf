"""More than one process: sums over workers, their deaths, their drain."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.state import memory
from tests.kit.callers import Answer, Caller, ask, chat, everything
from tests.kit.fleet import LOOK_EVERY_S, Fleet, Scraper, alive, fleet, samples, scraped, summed
from tests.kit.headrace import ROOT, command, settings_for, until
from tests.kit.invariant import balanced
from tests.kit.lab import Gate, hold, last_event, plays
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, chunk, event, scripted

pytestmark = pytest.mark.timeout(60)

SHORT = plays(HEAD + chunk(event("a")) + chunk(event("b")), chunk(DONE) + END)
BODY = event("a") + event("b") + DONE
HELD = plays(HEAD, chunk(event("a")), hold)


def two(url: str, **sections: Any) -> dict[str, Any]:
    return settings_for(url, **{"workers": 2, "drain": 20, **sections})


def asking(kind: str) -> bytes:
    """A chat whose upstream's script goes by this word."""
    return chat(messages=[{"role": "user", "content": kind}])


def by_kind(**scripts: Script) -> Script:
    async def script(call: Call) -> None:
        await scripts[json.loads(call.body)["messages"][0]["content"]](call)

    return script


def worker_of(stream: dict[str, Any]) -> int:
    """The process that a stream's id names."""
    return int(stream["id"].partition("-")[0], 16)


async def opened(port: int, count: int, request: bytes) -> list[Caller]:
    """So many streams that have begun."""
    callers = []
    for _ in range(count):
        caller = await Caller.connect(port)
        await caller.send(request)
        callers.append(caller)
    for caller in callers:
        answer = await caller.head()
        assert answer.status == 200
        await caller.piece(answer)
    return callers


async def begun(running: Fleet, count: int) -> list[dict[str, Any]]:
    """The running streams, once there are so many that have got their first token."""
    streams: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while len(streams) != count or any(stream["ttft_s"] is None for stream in streams):
            streams = await running.streams()
            await asyncio.sleep(LOOK_EVERY_S / 2)
    return streams


# ── one truth ────────────────────────────────────────────────────────────────────────────────────────────


async def test_figures_are_sums(tmp_path: Path) -> None:
    """State and metrics say what both workers together do, and have done."""
    async with (
        scripted(by_kind(held=HELD, short=SHORT)) as upstream,
        fleet(tmp_path, two(upstream.url)) as running,
        scraped(running),
    ):
        for _ in range(40):
            assert (await ask(running.port, asking("short"))).body == BODY
        callers = await opened(running.port, 40, asking("held"))
        streams = await begun(running, 40)
        assert {worker_of(stream) for stream in streams} == set(running.workers())
        assert len({stream["id"] for stream in streams}) == 40

        state = await running.state()
        assert {name: state[name] for name in ("in_flight", "streams", "permits", "workers")} == {
            **dict.fromkeys(("in_flight", "streams", "permits"), 40),
            "workers": 2,
        }
        assert state["upstream_connections"] == 40
        assert state["fds"] > 80
        page = await running.metrics()
        assert summed(page, "headrace_requests_in_flight") == 40
        assert summed(page, "headrace_streams_active", 'upstream="up"') == 40
        assert summed(page, "headrace_upstream_in_flight", 'upstream="up"') == 40
        assert summed(page, "headrace_requests_total", 'reason="complete"') == 40
        assert summed(page, "headrace_request_duration_seconds_count") == 40
        assert summed(page, "headrace_response_bytes_total") >= 40 * len(BODY)
        assert summed(page, "headrace_build_info") == 1

        for caller in callers:
            caller.leave()
        await running.quiet()
        page = await running.metrics()
        assert summed(page, "headrace_requests_total", 'reason="client_gone"') == 40
        assert summed(page, "headrace_upstream_attempts_total") == 80
        assert summed(page, "headrace_streams_active") == 0
        assert summed(page, "headrace_workers_replaced_total") == 0


async def test_a_thousand_streams_are_shared(tmp_path: Path) -> None:
    """Of 1,000 streams that come one after the other no worker holds more than 1.5 times its share."""
    count = 400
    async with (
        scripted(HELD) as upstream,
        fleet(tmp_path, two(upstream.url)) as running,
        asyncio.timeout(40),
    ):
        callers: list[Caller] = []
        while len(callers) < count:
            callers += await opened(running.port, 20, chat())
        shares = collections.Counter(worker_of(stream) for stream in await begun(running, count))
        assert set(shares) == set(running.workers())
        assert max(shares.values()) <= 1.5 * count / 2, shares
        for caller in callers:
            caller.leave()
        await running.quiet()


async def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    """Both workers write to one pipe whose reader is slow: no line is torn."""
    reading, writing = os.pipe()
    count = 300  # more bytes of lines than a pipe holds
    async with scripted(SHORT) as upstream:
        file = tmp_path / "headrace.yaml"
        file.write_text(json.dumps(two(upstream.url)))
        with os.fdopen(reading, "rb") as lines:
            async with command("-c", str(file), "serve", stdout=writing) as process:
                os.close(writing)
                port, _ = await process.serving()
                async with asyncio.timeout(20):
                    for _ in range(count // 20):
                        await asyncio.gather(*(ask(port, chat()) for _ in range(20)))
                written = asyncio.get_running_loop().run_in_executor(None, lines.read)
                process.signal(signal.SIGTERM)
                assert await process.ended() == 0
            async with asyncio.timeout(10):
                documents = [json.loads(line) for line in (await written).splitlines()]
    assert sum(document["event"] == "request" for document in documents) == count


# ── streams, one by one ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_is_listed_and_killed(tmp_path: Path, workers: int) -> None:
    """The list tells what runs; DELETE ends one with the error event and an abort, and touches no other."""
    async with (
        scripted(HELD) as upstream,
        fleet(tmp_path, two(upstream.url, workers=workers)) as running,
    ):
        tasks = {
            name: asyncio.ensure_future(everything(running.port, chat(f"x-request-id: {name}")))
            for name in ("first", "second", "third", "fourth")
        }
        streams = await begun(running, 4)
        stream = next(stream for stream in streams if stream["request_id"] == "second")
        assert {name: stream[name] for name in ("route", "model", "upstream", "phase", "client_ip")} == {
            "route": "/v1/chat/completions",
            "model": "m",
            "upstream": "up",
            "phase": "stream",
            "client_ip": "127.0.0.1",
        }
        assert 0 <= stream["ttft_s"] <= stream["age_s"] < 30
        assert worker_of(stream) in (running.workers() if workers > 1 else [running.pid])

        for unknown in ("nothing", f"{os.getpid():x}-1", stream["id"] + "0"):
            assert (await running.admin("DELETE", f"/admin/streams/{unknown}")).status == 404
        killed = await running.admin("DELETE", f"/admin/streams/{stream['id']}")
        assert (killed.status, killed.json()) == (200, {"killed": stream["id"]})
        answer = await tasks["second"]
        assert not answer.clean
        assert answer.body.startswith(event("a"))
        assert "error" in last_event(answer)
        assert b"[DONE]" not in answer.body
        left = await begun(running, 3)
        assert {stream["request_id"] for stream in left} == {"first", "third", "fourth"}
        assert await running.total("headrace_requests_total", 'reason="killed"') == 1
        await until(lambda: [line["reason"] for line in running.logged("request")] == ["killed"])
        assert (await running.admin("DELETE", f"/admin/streams/{stream['id']}")).status == 404
        gone = [call for call in upstream.calls if b"second" in call.head]
        async with asyncio.timeout(5):
            await asyncio.gather(*(call.gone.wait() for call in gone))
        for task in tasks.values():
            task.cancel()
        await asyncio.wait(tasks.values())
        await running.quiet()


# ── workers that die ─────────────────────────────────────────────────────────────────────────────────────


class Load:
    """Short streams, one soon after the other on connections of their own, until it is told to stop."""

    def __init__(self, port: int) -> None:
        self.whole = self.broken = 0
        self.wrong: list[bytes] = []
        self._port = port
        self._stop = False

    async def run(self) -> None:
        while not self._stop:
            await asyncio.sleep(LOOK_EVERY_S / 2)
            try:
                answer = await ask(self._port, asking("short"))
            except (ConnectionError, asyncio.IncompleteReadError):
                self.broken += 1
                continue
            if answer.clean and answer.body == BODY:
                self.whole += 1
            elif answer.clean:
                self.wrong.append(answer.body)
            else:
                self.broken += 1

    def stop(self) -> None:
        self._stop = True


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
async def test_a_killed_worker_takes_only_its_own_streams(tmp_path: Path, times: int) -> None:
    """SIGKILL again and again under load: the other worker's streams go on, counters only grow, a new worker
    serves, and nothing stays taken."""
    async with (
        scripted(by_kind(held=HELD, short=SHORT)) as upstream,
        fleet(tmp_path, two(upstream.url)) as running,
        scraped(running) as scraper,
    ):
        load = Load(running.port)
        loading = [asyncio.ensure_future(load.run()) for _ in range(4)]
        killed: set[int] = set()
        for kills in range(1, times + 1):
            await running.settle()
            callers = await opened(running.port, 6, asking("held"))
            ports = [caller.writer.get_extra_info("sockname")[1] for caller in callers]
            victim, *others = sorted(running.workers(), key=lambda pid: pid in killed)
            assert len(others) == 1
            held_by = _holders(ports, [victim, *others])
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
            for caller, port in zip(callers, ports, strict=True):
                answer = Answer()
                answer.headers["transfer-encoding"] = "chunked"
                if held_by[port] == victim:
                    async with asyncio.timeout(5):
                        assert not (await caller.rest(answer)).clean
                    caller.leave()
            survivors = [
                caller for caller, port in zip(callers, ports, strict=True) if held_by[port] != victim
            ]
            assert all(not caller.reader.at_eof() for caller in survivors)
            for caller in survivors:
                caller.leave()
            whole = load.whole
            await until(lambda at=whole: load.whole > at + 5, 10)  # type: ignore[misc]  # a default binds the value of now
            async with asyncio.timeout(15):
                while await running.total("headrace_workers_replaced_total") < kills:
                    await asyncio.sleep(LOOK_EVERY_S)
        await running.settle()
        assert not killed & set(running.workers())
        load.stop()
        await asyncio.wait_for(asyncio.gather(*loading), 20)
        await running.quiet()
        assert not load.wrong
        assert load.broken <= 4 * times  # at most what ran in the killed worker at that moment
        page = await running.metrics()
        for level in ("requests_in_flight", "streams_active", "upstream_in_flight"):
            assert summed(page, f"headrace_{level}") == 0
        assert summed(page, "headrace_workers_replaced_total") == times
        assert summed(page, "headrace_requests_total", 'reason="complete"') <= load.whole
        assert scraper.pages > 20


def _holders(ports: list[int], workers: list[int]) -> dict[int, int]:
    """Which worker holds the connection that came from each of these ports."""
    inodes: dict[str, int] = {}
    for pid in workers:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            try:
                link = os.readlink(f"/proc/{pid}/fd/{entry}")
            except FileNotFoundError:
                continue
            if link.startswith("socket:["):
                inodes[link[8:-1]] = pid
    held: dict[int, int] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        port, inode = int(fields[2].partition(":")[2], 16), fields[9]
        if port in ports and inode in inodes:
            held[port] = inodes[inode]
    return held


async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    """A stopped worker is killed and replaced; meanwhile the other one serves every new request."""
    async with (
        scripted(by_kind(held=HELD, short=SHORT)) as upstream,
        fleet(tmp_path, two(upstream.url)) as running,
        scraped(running),
    ):
        callers = await opened(running.port, 6, asking("held"))
        before = running.workers()
        os.kill(before[0], signal.SIGSTOP)
        stopped_at = time.monotonic()
        served = 0
        async with asyncio.timeout(40):
            while alive(before[0]):
                assert (await ask(running.port, asking("short"))).body == BODY
                served += 1
                await asyncio.sleep(LOOK_EVERY_S)
        assert served > 10
        assert time.monotonic() - stopped_at < 5 * 6  # seconds of silence and a look a second
        await running.settle()
        assert before[0] not in running.workers()
        assert before[1] in running.workers()
        assert [line["pid"] for line in running.logged("worker_hangs")] == [before[0]]
        assert await running.total("headrace_workers_replaced_total") == 1
        for caller in callers:
            caller.leave()


async def test_signals_to_every_process_are_the_supervisors(tmp_path: Path) -> None:
    """SIGHUP and SIGUSR2 to all, as `systemctl kill` sends them: a reload and a restart, and the streams of
    both workers go on to their end."""
    gate = Gate()
    script = by_kind(
        held=plays(HEAD + chunk(event("a")), gate, chunk(event("b")), chunk(DONE) + END), short=SHORT
    )
    async with (
        scripted(script) as upstream,
        fleet(tmp_path, two(upstream.url)) as running,
    ):
        tasks: list[asyncio.Task[Answer]] = []
        held: list[dict[str, Any]] = []
        while {worker_of(stream) for stream in held} != set(running.workers()):
            assert len(tasks) < 100
            tasks += [asyncio.ensure_future(everything(running.port, asking("held"))) for _ in range(5)]
            held = await begun(running, len(tasks))
        family = running.processes()
        for pid in family:
            os.kill(pid, signal.SIGHUP)
        async with asyncio.timeout(10):
            while not await running.total("headrace_config_reloads_total", 'result="ok"'):
                await asyncio.sleep(LOOK_EVERY_S)
        assert (await ask(running.port, asking("short"))).body == BODY
        assert running.processes() == family
        for pid in family:
            os.kill(pid, signal.SIGUSR2)
        await until(lambda: bool(running.logged("handed_over")), 20)
        assert (await ask(running.port, asking("short"))).body == BODY
        gate.open()
        for answer in await asyncio.gather(*tasks):
            assert (answer.clean, answer.body) == (True, BODY)
        assert (
            await asyncio.wait_for(running.first.process.wait(), 20) == 0
        )  # its pipes are its heir's as well


async def test_workers_end_with_their_supervisor(tmp_path: Path) -> None:
    """Nobody is left behind when the supervisor is killed, not even with a stream running."""
    async with (
        scripted(HELD) as upstream,
        fleet(tmp_path, two(upstream.url)) as running,
    ):
        stream = asyncio.ensure_future(everything(running.port, chat()))
        await begun(running, 1)
        assert len(running.processes()) == 3
        running.first.signal(signal.SIGKILL)
        assert not (await stream).clean
        await running.all_gone(10)


def dying(tmp_path: Path, when: str) -> dict[str, str]:
    """An environment in which worker processes write down that they started and die if the test says so."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'worker' in sys.orig_argv:\n"
        f"    with open({str(tmp_path / 'starts')!r}, 'a') as file:\n"
        "        file.write(f'{os.getpid()}\\n')\n"
        f"    if os.path.exists({str(tmp_path / when)!r}):\n"
        "        os._exit(3)\n"
    )
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


async def test_a_worker_that_always_dies_does_not_spin(tmp_path: Path) -> None:
    """Its restarts back off, the other worker serves, and it is back soon after the cause is gone."""

    def starts() -> int:
        return len((tmp_path / "starts").read_text().splitlines())

    async with (
        scripted(SHORT) as upstream,
        fleet(tmp_path, two(upstream.url), environ=dying(tmp_path, "die")) as running,
    ):
        (tmp_path / "die").touch()
        assert starts() == 2
        os.kill(running.workers()[0], signal.SIGKILL)
        until_then = time.monotonic() + 4
        while time.monotonic() < until_then:
            assert (await ask(running.port, chat())).body == BODY
            await asyncio.sleep(LOOK_EVERY_S)
        assert 3 <= starts() <= 2 + 7  # 0.1, 0.2, 0.4 … seconds apart
        assert len(running.logged("worker_replaced")) <= 7
        (tmp_path / "die").unlink()
        await running.settle()


async def test_a_first_start_that_dies_ends_in_one_line(tmp_path: Path) -> None:
    """Workers that cannot even start end the command at once."""
    (tmp_path / "die").touch()
    file = tmp_path / "headrace.yaml"
    file.write_text(json.dumps(two("http://127.0.0.1:9/v1")))
    async with command("-c", str(file), "serve", environ=dying(tmp_path, "die")) as process:
        assert await process.ended() == 1
        assert len(process.err) == 1, process.err
        assert process.err[0].startswith("headrace: ")


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────


async def ending(running: Fleet, timeout_s: float = 10.0) -> None:
    """Exit code 0, and no process left."""
    assert await running.first.ended(timeout_s) == 0, running.first.err
    assert not running.processes()


async def test_drain_over_all_workers(tmp_path: Path) -> None:
    """Of the streams of two workers the short ones end whole and the long ones with the event."""
    gate = Gate()
    tail = [chunk(event(f"after {number}")) for number in range(5)]
    script = by_kind(short=plays(HEAD + chunk(event("a")), gate, *tail, chunk(DONE), END), long=HELD)
    whole = event("a") + b"".join(event(f"after {number}") for number in range(5)) + DONE
    async with (
        scripted(script) as upstream,
        fleet(tmp_path, two(upstream.url, drain=1.5)) as running,
    ):
        short: list[asyncio.Task[Answer]] = []
        long: list[asyncio.Task[Answer]] = []
        streams: list[dict[str, Any]] = []
        while {worker_of(stream) for stream in streams} != set(running.workers()):
            assert len(streams) < 100
            for kind, tasks in (("short", short), ("long", long)):
                asked = (everything(running.port, asking(kind)) for _ in range(5))
                tasks += map(asyncio.ensure_future, asked)
            streams = await begun(running, len(short) + len(long))
        told_at = time.monotonic()
        running.first.signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while (await running.admin("GET", "/readyz")).status != 503:
                await asyncio.sleep(LOOK_EVERY_S)
        assert (await running.admin("GET", "/healthz")).status == 200
        assert (await running.state())["streams"] == len(streams)
        gate.open()
        for answer in await asyncio.gather(*short):
            assert answer.clean
            assert answer.body == whole
        cut = await asyncio.gather(*long)
        for answer in cut:
            assert not answer.clean
            assert answer.body.startswith(event("a"))
            assert last_event(answer)["error"]["code"] == "draining"
        await ending(running)
        assert 1.5 <= time.monotonic() - told_at < 5 * 2.5
        reasons = sorted(line["reason"] for line in running.logged("request"))
        assert reasons == ["complete"] * len(short) + ["drained"] * len(long)


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    """SIGTERM twice: all workers end their streams visibly and at once."""
    async with (
        scripted(HELD) as upstream,
        fleet(tmp_path, two(upstream.url, drain=60)) as running,
    ):
        tasks = [asyncio.ensure_future(everything(running.port, chat())) for _ in range(8)]
        await begun(running, 8)
        running.first.signal(signal.SIGTERM)
        await until(lambda: len(running.logged("draining")) == 2)
        assert not any(task.done() for task in tasks)
        running.first.signal(signal.SIGTERM)
        for answer in await asyncio.gather(*tasks):
            assert not answer.clean
            assert last_event(answer)["error"]["code"] == "draining"
        await ending(running, 5)


async def test_interrupting_the_whole_group_is_one_signal(tmp_path: Path) -> None:
    """Ctrl-C reaches every process; it drains like one SIGTERM, and streams end whole."""
    gate = Gate()
    async with (
        scripted(plays(HEAD, chunk(event("a")), gate, chunk(event("b")), chunk(DONE), END)) as upstream,
        fleet(tmp_path, two(upstream.url, drain=60)) as running,
    ):
        tasks = [asyncio.ensure_future(everything(running.port, chat())) for _ in range(8)]
        await begun(running, 8)
        for pid in running.processes():
            os.kill(pid, signal.SIGINT)
        await until(lambda: len(running.logged("draining")) == 2)
        assert not any(task.done() for task in tasks)
        gate.open()
        for answer in await asyncio.gather(*tasks):
            assert answer.clean
            assert answer.body == BODY
        await ending(running, 5)
        assert not any("Traceback" in line for line in running.first.err)


async def test_terminating_the_whole_group_drains(tmp_path: Path) -> None:
    """systemd sends SIGTERM to every process: still one drain, and no worker is replaced."""
    gate = Gate()
    async with (
        scripted(plays(HEAD, chunk(event("a")), gate, chunk(event("b")), chunk(DONE), END)) as upstream,
        fleet(tmp_path, two(upstream.url, drain=60)) as running,
    ):
        tasks = [asyncio.ensure_future(everything(running.port, chat())) for _ in range(8)]
        await begun(running, 8)
        for pid in running.processes():
            os.kill(pid, signal.SIGTERM)
        await until(lambda: len(running.logged("draining")) == 2)
        gate.open()
        for answer in await asyncio.gather(*tasks):
            assert answer.clean
            assert answer.body == BODY
        await ending(running, 5)
        assert not running.logged("worker_replaced")


async def test_a_worker_that_dies_while_all_drain(tmp_path: Path) -> None:
    """It is not replaced, and the end does not wait for it."""
    async with (
        scripted(HELD) as upstream,
        fleet(tmp_path, two(upstream.url, drain=60)) as running,
    ):
        tasks: list[asyncio.Task[Answer]] = []
        streams: list[dict[str, Any]] = []
        while len({worker_of(stream) for stream in streams}) < 2:  # each of the two holds one
            tasks += [asyncio.ensure_future(everything(running.port, chat())) for _ in range(4)]
            streams = await begun(running, len(tasks))
            assert len(tasks) < 100
        pids = running.workers()
        running.first.signal(signal.SIGTERM)
        await until(lambda: len(running.logged("draining")) == 2)
        os.kill(pids[0], signal.SIGKILL)
        lost = sum(worker_of(stream) == pids[0] for stream in streams)
        await until(lambda: sum(task.done() for task in tasks) == lost)
        assert running.workers() == pids[1:]
        running.first.signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
        await ending(running, 5)


# ── starts that fail ─────────────────────────────────────────────────────────────────────────────────────


async def refused(settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """Starting this fails with exit code 1; the lines on standard error. No process is left."""
    file = tmp_path / "headrace.yaml"
    file.write_text(json.dumps(settings))
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    async with command("-c", str(file), "serve", environ={"HEADRACE_TEST_FLEET": mark}) as process:
        assert await process.ended() == 1
        family = Fleet(process, file, mark)
        await family.all_gone()
        return process.err


async def test_a_port_in_use(tmp_path: Path) -> None:
    """One line that names the port and the way out."""
    async with scripted(SHORT) as other:
        lines = await refused(two(other.url, listen=f"127.0.0.1:{other.port}"), tmp_path)
    assert len(lines) == 1, lines
    assert f"127.0.0.1:{other.port} is in use" in lines[0]


async def test_a_worker_that_cannot_start(tmp_path: Path) -> None:
    """What only the workers notice is still one line: here a certificate that does not load."""
    (tmp_path / "cert.pem").write_text("no certificate")
    (tmp_path / "key.pem").write_text("no key")
    files = {name: str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    lines = await refused(two("http://127.0.0.1:9/v1", tls=files), tmp_path)
    assert len(lines) == 1, lines
    assert "tls: the certificate cannot be loaded" in lines[0]


async def test_a_certificate_that_went_away(tmp_path: Path) -> None:
    """A replacement that cannot start is tried again, the other worker serves, and it comes back."""
    issued = trustme.CA().issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    settings = two("http://127.0.0.1:9/v1", tls={"cert": str(cert), "key": str(key)})
    async with fleet(tmp_path, settings) as running:
        cert.rename(tmp_path / "away.pem")
        victim, survivor = running.workers()
        os.kill(victim, signal.SIGKILL)
        await until(lambda: bool(running.logged("worker_start_failed")), 10)
        assert "tls" in running.logged("worker_start_failed")[0]["why"]
        assert (await running.state())["workers"] == 1
        assert (await running.admin("GET", "/readyz")).status == 200
        (tmp_path / "away.pem").rename(cert)
        assert survivor in await running.settle()


async def test_interrupted_while_starting(tmp_path: Path) -> None:
    """Ctrl-C before anything serves ends all processes soon."""
    file, mark = tmp_path / "headrace.yaml", f"{os.getpid()}-{time.monotonic_ns()}"
    file.write_text(json.dumps(two("http://127.0.0.1:9/v1")))
    async with command("-c", str(file), "serve", environ={"HEADRACE_TEST_FLEET": mark}) as process:
        family = Fleet(process, file, mark)
        await until(lambda: len(family.workers()) == 2, 20)
        for pid in family.processes():
            os.kill(pid, signal.SIGINT)
        assert await process.ended() in (0, 1)
        await family.all_gone()


# ── few file descriptors ─────────────────────────────────────────────────────────────────────────────────


async def test_few_file_descriptors(tmp_path: Path) -> None:
    """With 64 descriptors the cap holds, health answers, the log stays small, and it recovers."""
    async with (
        scripted(by_kind(held=HELD, short=SHORT)) as upstream,
        fleet(tmp_path, settings_for(upstream.url, drain=1), before="ulimit -n 64") as running,
    ):
        await until(lambda: bool(running.logged("max_connections_lowered")))
        cap = running.logged("max_connections_lowered")[0]["to"]
        assert 4 <= cap < 32
        callers = await opened(running.port, cap, asking("held"))
        turned_away = collections.Counter[str]()
        for _ in range(100):
            answer = await everything(running.port, asking("short"))
            turned_away[f"{answer.status} {answer.json()['error']['code']}"] += 1
            assert "retry-after" in answer.headers
        assert turned_away == {"503 overloaded": 100}
        waiting = [await Caller.connect(running.port) for _ in range(150)]  # more than descriptors at all
        for _ in range(10):
            assert (await running.admin("GET", "/healthz")).status == 200
        assert (await running.state())["streams"] == cap
        page = await running.metrics()
        assert summed(page, "headrace_requests_total", 'code="503"') >= 100
        for caller in [*callers, *waiting]:
            caller.leave()
        await running.quiet()
        for _ in range(2 * cap):
            assert (await ask(running.port, asking("short"))).body == BODY
        await balanced(running, upstream.calls)
        running.first.signal(signal.SIGTERM)
        await ending(running)
        others = [line for line in running.first.out if '"event":"request"' not in line]
        assert len(others) <= 20, others
        refusals = [line for line in running.logged("request") if line["status"] == 503]
        assert len(refusals) <= 250


async def test_scrapes_see_each_other(tmp_path: Path) -> None:
    """Many scrapes at once while a worker dies agree with what came before them."""
    async with (
        scripted(SHORT) as upstream,
        fleet(tmp_path, two(upstream.url)) as running,
    ):
        scraper = Scraper(running)
        for _ in range(2):
            for _ in range(20):
                await ask(running.port, chat())
            os.kill(running.workers()[-1], signal.SIGKILL)
            for _ in range(6):
                pages = await asyncio.gather(*(running.admin("GET", "/metrics") for _ in range(8)))
                totals = [summed(samples(page), "headrace_requests_total") for page in pages]
                scraper.look(samples(pages[totals.index(min(totals))]))
            await running.settle()
        assert not scraper.backwards, scraper.backwards


async def test_a_worker_that_is_told_nothing() -> None:
    """Its supervisor died, or changed its mind, before its first word: it ends, without one of its own."""
    ours, control = socket.socketpair()
    with ours, control, socket.create_server(("127.0.0.1", 0)) as listener:
        fds = [control.fileno(), listener.fileno(), memory.create()]
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "worker", *map(str, fds)),
            cwd=ROOT,
            pass_fds=fds,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        os.close(fds[-1])
        control.close()
        ours.close()
        try:
            async with asyncio.timeout(20):
                assert await worker.communicate() == (b"", None)
        finally:
            if worker.returncode is None:
                worker.kill()
        assert worker.returncode == 0
