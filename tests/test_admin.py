"""The admin listener, the metrics on it, and the log."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import parser
from prometheus_client.openmetrics import parser as open_parser
from prometheus_client.samples import Sample

from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.fleet import descriptors, fleet, resident
from tests.kit.headrace import Headrace, command, running, settings_for, until
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, event, scripted

pytestmark = pytest.mark.timeout(30)

#: Contract section 7: what exists by now, with its kind and its labels.
METRICS = {
    "headrace_requests": ("counter", {"route", "model", "upstream", "code", "reason"}),
    "headrace_requests_in_flight": ("gauge", {"route"}),
    "headrace_streams_active": ("gauge", {"upstream"}),
    "headrace_request_duration_seconds": ("histogram", {"route", "upstream"}),
    "headrace_time_to_first_byte_seconds": ("histogram", {"upstream"}),
    "headrace_time_to_first_token_seconds": ("histogram", {"model", "upstream"}),
    "headrace_transparency_mismatch": ("counter", set()),
    "headrace_inter_chunk_seconds": ("histogram", {"upstream"}),
    "headrace_overhead_seconds": ("histogram", set()),
    "headrace_response_bytes": ("counter", set()),
    "headrace_upstream_attempts": ("counter", {"upstream", "result"}),
    "headrace_upstream_in_flight": ("gauge", {"upstream"}),
    "headrace_upstream_available": ("gauge", {"upstream"}),
    "headrace_breaker_state": ("gauge", {"upstream"}),
    "headrace_limit_decisions": ("counter", {"scope", "result"}),
    "headrace_queue_depth": ("gauge", {"plan"}),
    "headrace_queue_wait_seconds": ("histogram", {"plan"}),
    "headrace_state_store_up": ("gauge", set()),
    "headrace_heartbeats": ("counter", set()),
    "headrace_client_disconnects": ("counter", {"phase"}),
    "headrace_tokens": ("counter", {"model", "type"}),
    "headrace_cost_usd": ("counter", {"model"}),
    "headrace_ledger_rows": ("counter", set()),
    "headrace_ledger_pending": ("gauge", set()),
    "headrace_ledger_dropped": ("counter", set()),
    "headrace_start_time_seconds": ("gauge", set()),
    "headrace_event_loop_lag_seconds": ("histogram", set()),
    "headrace_gc_pause_seconds": ("histogram", set()),
    "headrace_gc_collections": ("counter", {"generation"}),
    "headrace_process_cpu_seconds": ("counter", set()),
    "headrace_process_resident_memory_bytes": ("gauge", set()),
    "headrace_process_open_fds": ("gauge", set()),
    "headrace_process_open_fds_ratio": ("gauge", set()),
    "headrace_workers": ("gauge", set()),
    "headrace_build_info": ("gauge", {"version"}),
    "headrace_log_lines_dropped": ("counter", set()),
    "headrace_workers_replaced": ("counter", set()),
    "headrace_config_reloads": ("counter", {"result"}),
}
STATE = {
    "in_flight",
    "streams",
    "permits",
    "queued",
    "reservations",
    "buffered_bytes",
    "upstream_connections",
    "upstream_idle",
    "ledger_pending",
    "tasks",
    "fds",
    "workers",
}
#: Contract section 8, and our own error code.
LINE = {
    "ts",
    "level",
    "event",
    "request_id",
    "key_id",
    "plan",
    "method",
    "route",
    "model",
    "upstream",
    "attempts",
    "status",
    "reason",
    "queue_ms",
    "ttfb_ms",
    "ttft_ms",
    "duration_ms",
    "chunks",
    "bytes_in",
    "bytes_out",
    "prompt_tokens",
    "completion_tokens",
    "usage_source",
    "cost_usd",
    "client_ip",
    "error",
    "trace_id",
}


def written(path: Path, **sections: Any) -> Path:
    """A configuration on the mock as a file."""
    path.write_text(yaml.safe_dump(settings_for("mock:", **sections)))
    return path


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", *headers, "", ""]).encode()


async def fetch(port: int, path: str, *headers: str, method: str = "GET") -> Answer:
    """One request to an admin listener."""
    return await ask(port, get(path, *headers, method=method))


async def samples(headrace: Headrace, name: str) -> list[Sample]:
    """The samples of one name."""
    answer = await fetch(headrace.front.admin_port, "/metrics")
    families = parser.text_string_to_metric_families(answer.body.decode())
    return [sample for family in families for sample in family.samples if sample.name == name]


async def total(headrace: Headrace, name: str, **labels: str) -> float:
    found = await samples(headrace, name)
    return sum(each.value for each in found if labels.items() <= each.labels.items())


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────


async def some_traffic(headrace: Headrace) -> None:
    """Three streams, two whole answers, an error of the upstream, one refusal, one 404, one non-HTTP."""
    for _ in range(3):
        assert (await ask(headrace.port, chat("x-mock: words=4"))).status == 200
    for _ in range(2):
        assert (await ask(headrace.port, chat(stream=False))).status == 200
    assert (await ask(headrace.port, chat("x-mock: status=500", stream=False))).status == 500
    assert (await ask(headrace.port, chat(model="nothing"))).status == 404
    assert (await ask(headrace.port, get("/nothing"))).status == 404
    assert (await ask(headrace.port, b"nonsense\r\n\r\n")).status == 400
    await until(lambda: len(headrace.log_lines()) == 9)


async def test_names_kinds_and_labels() -> None:
    """The page is valid, and each family is one of the contract's, with exactly its labels."""
    one_place = {"max_in_flight": 1, "queue": {"max_wait": 0.05}}
    models = {"m": {"upstreams": ["up"], "price": {"input": 2, "output": 32}}}
    async with running(settings_for("mock:", limits=one_place, models=models)) as headrace:
        await some_traffic(headrace)
        caller = await Caller.connect(headrace.port)
        await caller.send(chat("x-mock: hang"))
        await until(lambda: headrace.state["permits"] == 1)
        assert (await ask(headrace.port, chat())).status == 503
        caller.leave()
        await headrace.quiet()
        await until(lambda: bool(headrace.server.metrics.event_loop_lag.values))
        gc.collect()
        answer = await fetch(headrace.front.admin_port, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in parser.text_string_to_metric_families(answer.body.decode())}
    assert set(families) == set(METRICS)
    for name, (kind, labels) in METRICS.items():
        assert families[name].type == kind
        assert families[name].documentation
        assert families[name].samples, name
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == labels


async def test_counters_add_up() -> None:
    """What was asked for is what is counted, by route, code and reason."""
    async with running(settings_for("mock:")) as headrace:
        await some_traffic(headrace)
        assert await total(headrace, "headrace_requests_total") == 9
        chats = {"route": "/v1/chat/completions"}
        assert await total(headrace, "headrace_requests_total", **chats) == 7
        assert await total(headrace, "headrace_requests_total", reason="complete", model="m", code="200") == 5
        assert await total(headrace, "headrace_requests_total", reason="upstream_error", code="500") == 1
        assert await total(headrace, "headrace_requests_total", code="404", upstream="none") == 2
        assert await total(headrace, "headrace_requests_total", code="400", reason="rejected") == 1
        assert await total(headrace, "headrace_upstream_attempts_total", upstream="up") == 6
        assert await total(headrace, "headrace_upstream_attempts_total", result="status") == 1
        assert await total(headrace, "headrace_time_to_first_token_seconds_count", model="m") == 3
        assert await total(headrace, "headrace_overhead_seconds_count") == 6
        assert await total(headrace, "headrace_requests_in_flight") == 0
        assert await total(headrace, "headrace_streams_active") == 0
        delivered = sum(line["bytes_out"] for line in headrace.log_lines())
        assert await total(headrace, "headrace_response_bytes_total") == delivered > 0
        durations = await total(headrace, "headrace_request_duration_seconds_count")
        assert durations in (8, 9)  # what the parser refused never was a request with a duration


async def test_an_unknown_model_is_other() -> None:
    """Labels come from closed sets: a model that does not exist is `other`, whatever its name."""
    async with running(settings_for("mock:")) as headrace:
        for name in ("one", "two", "x" * 200):
            assert (await ask(headrace.port, chat(model=name))).status == 404
        await until(lambda: len(headrace.log_lines()) == 3)
        found = await samples(headrace, "headrace_requests_total")
    assert [(each.labels["model"], each.value) for each in found] == [("other", 3.0)]


async def test_levels_while_something_runs() -> None:
    """Gauges and /debug/state show what is going on, and go back to zero."""
    release = asyncio.Event()

    async def script(call: Call) -> None:
        await call.send(HEAD + chunk(event("a")))
        await release.wait()
        await call.send(chunk(DONE) + END)

    async with scripted(script) as upstream, running(settings_for(upstream.url)) as headrace:
        async with await Caller.connect(headrace.port) as caller:
            await caller.send(chat())
            answer = await caller.head()
            await caller.piece(answer)
            assert await total(headrace, "headrace_requests_in_flight", route="/v1/chat/completions") == 1
            assert await total(headrace, "headrace_streams_active", upstream="up") == 1
            assert await total(headrace, "headrace_upstream_in_flight", upstream="up") == 1
            state = (await fetch(headrace.front.admin_port, "/debug/state")).json()
            assert (state["in_flight"], state["streams"], state["permits"]) == (1, 1, 1)
            assert state["upstream_connections"] == 1
            release.set()
            assert (await caller.rest(answer)).clean
        await headrace.quiet()
        assert await total(headrace, "headrace_streams_active") == 0
        assert await total(headrace, "headrace_upstream_in_flight") == 0


async def test_gaps_are_counted() -> None:
    """Every gap between two chunks is one observation."""
    async with running(settings_for("mock:")) as headrace:
        assert (await ask(headrace.port, chat("x-mock: words=5, gap=0.01"))).status == 200
        await until(lambda: len(headrace.log_lines()) == 1)
        chunks = headrace.log_lines()[0]["chunks"]
        assert await total(headrace, "headrace_inter_chunk_seconds_count", upstream="up") == chunks - 1
        assert await total(headrace, "headrace_inter_chunk_seconds_sum") >= 0.04


async def test_what_the_processes_cost(tmp_path: Path) -> None:
    """Memory, descriptors, CPU time and collections are those of all processes together."""
    async with fleet(tmp_path, {**settings_for("mock:"), "workers": 2}) as it:
        pids = [it.pid, *await it.settle(2)]
        page = await it.metrics()
        assert page["headrace_workers"] == 2
        memory, files = sum(map(resident, pids)), sum(map(descriptors, pids))
        assert 0.8 * memory < page["headrace_process_resident_memory_bytes"] < 1.2 * memory
        assert files - 10 < page["headrace_process_open_fds"] < files + 10
        assert 0 < page["headrace_process_open_fds_ratio"] < 0.5
        assert page["headrace_process_cpu_seconds_total"] > 0.1
        assert page['headrace_gc_collections_total{generation="0"}'] > 0


async def test_collections_are_timed() -> None:
    """Each one once, and none after the end."""
    async with running(settings_for("mock:")) as headrace:
        before = await total(headrace, "headrace_gc_pause_seconds_count")
        for _ in range(3):
            gc.collect()
        assert await total(headrace, "headrace_gc_pause_seconds_count") >= before + 3
        hooks = len(gc.callbacks)
    assert len(gc.callbacks) == hooks - 1


async def test_openmetrics() -> None:
    """Whoever asks for OpenMetrics gets it, with its end mark."""
    async with running(settings_for("mock:")) as headrace:
        await some_traffic(headrace)
        answer = await fetch(
            headrace.front.admin_port, "/metrics", "Accept: application/openmetrics-text; version=1.0.0"
        )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")
    families = {each.name: each for each in open_parser.text_string_to_metric_families(answer.body.decode())}
    assert sum(sample.value for sample in families["headrace_requests"].samples) == 9


# ── health, state, refusals ──────────────────────────────────────────────────────────────────────────────


async def test_health_and_state() -> None:
    """Probes answer, the state has the keys of the contract, each a number."""
    async with running(settings_for("mock:")) as headrace:
        port = headrace.front.admin_port
        health = await fetch(port, "/healthz")
        assert (health.status, health.json()) == (200, {"status": "ok"})
        assert (await fetch(port, "/readyz")).status == 200
        state = (await fetch(port, "/debug/state")).json()
    assert state.keys() >= STATE
    assert all(isinstance(state[name], int) for name in STATE)
    idle = STATE - {"tasks", "fds", "workers", "upstream_idle"}
    assert {name for name in idle if state[name]} == set()
    assert state["workers"] == 1
    assert state["fds"] > 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models", 404),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/metrics/", 404),
        ("GET", "/../metrics", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/debug/state", 405),
    ],
)
async def test_refusals_are_json(method: str, path: str, status: int) -> None:
    """Nothing of the data listener is here, and what is not here is said in JSON."""
    async with running(settings_for("mock:")) as headrace:
        answer = await fetch(headrace.front.admin_port, path, method=method)
    assert answer.status == status
    assert answer.headers["content-type"].startswith("application/json")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_no_token_on_loopback() -> None:
    """A configured token is not asked for where only this machine can come from."""
    async with running(settings_for("mock:", admin_token="canary")) as headrace:
        assert (await fetch(headrace.front.admin_port, "/metrics")).status == 200


@pytest.mark.parametrize("path", ["/metrics", "/debug/state", "/nothing"])
async def test_token_elsewhere(path: str) -> None:
    """Where anybody can come from, all but the probes need the token."""
    settings = settings_for("mock:", admin="0.0.0.0:0", admin_token="token-1")
    async with running(settings) as headrace:
        port = headrace.front.admin_port
        wrong = [
            (),
            ("Authorization: token-1",),
            ("Authorization: Bearer",),
            ("Authorization: Bearer token-2",),
            ("Authorization: Bearer token-1x",),
            ("Authorization: Basic dG9rZW4tMQ==",),
            ("X-Api-Key: token-1",),
        ]
        for fields in wrong:
            answer = await fetch(port, path, *fields)
            assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_admin_token")
            assert answer.headers["www-authenticate"] == "Bearer"
        right = await fetch(port, path, "Authorization: Bearer token-1")
        assert right.status == (404 if path == "/nothing" else 200)
        for probe in ("/healthz", "/readyz"):
            assert (await fetch(port, probe)).status == 200


async def test_odd_tokens_are_only_wrong() -> None:
    """Bytes that are no text in the credential are a 401 like any other."""
    async with running(settings_for("mock:", admin="0.0.0.0:0", admin_token="token-1")) as headrace:
        for raw in (b"\xff\xfe", "t\u00f6ken".encode(), b"x" * 5000):
            request = b"GET /metrics HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer " + raw + b"\r\n\r\n"
            answer = await ask(headrace.front.admin_port, request)
            assert answer.status == 401
            assert answer.headers["content-type"].startswith("application/json")


async def test_the_admin_parser_leaks_nothing() -> None:
    """A token in a line that the parser refuses is neither echoed nor logged."""
    async with running(settings_for("mock:", admin="0.0.0.0:0", admin_token="token-1")) as headrace:
        request = b"GET /metrics HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer SECRET\x01\r\n\r\n"
        async with await Caller.connect(headrace.front.admin_port) as caller, asyncio.timeout(5):
            await caller.send(request)
            raw = await caller.reader.read(-1)
        assert raw.split(b" ")[1] == b"400"
        assert b"SECRET" not in raw
        await headrace.quiet()
        assert b"SECRET" not in b"".join([*headrace.sink.lines, *headrace.sink._pending])


async def test_admin_needs_a_token_to_be_open(tmp_path: Path) -> None:
    """Without a token the admin listener does not start on every interface."""
    path = written(tmp_path / "h.yaml", admin="0.0.0.0:0")
    async with command("serve", "-c", str(path)) as process:
        assert await process.ended() == 1
    assert "admin_token" in process.err[-1]
    assert len(process.err) == 1


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_line_a_request() -> None:
    """Exactly the fields of the contract, with what happened."""
    async with running(settings_for("mock:")) as headrace:
        request = chat("x-request-id: one", "x-mock: words=3, ttfb=0.02, gap=0.001")
        answer = await ask(headrace.port, request)
        await ask(headrace.port, get("/nothing"))
        await until(lambda: len(headrace.log_lines()) == 2)
        first, second = headrace.log_lines()
    assert set(first) == set(second) == LINE
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["ts"])
    expected = {
        "level": "info",
        "event": "request",
        "request_id": "one",
        "key_id": None,
        "plan": None,
        "method": "POST",
        "route": "/v1/chat/completions",
        "model": "m",
        "upstream": "up",
        "attempts": 1,
        "status": 200,
        "reason": "complete",
        "bytes_in": len(request.partition(b"\r\n\r\n")[2]),
        "bytes_out": len(answer.body),
        "client_ip": "127.0.0.1",
        "error": None,
    }
    assert {name: first[name] for name in expected} == expected
    assert 20 <= first["ttfb_ms"] <= first["ttft_ms"] <= first["duration_ms"]
    assert first["chunks"] >= 2
    assert (second["route"], second["status"], second["reason"]) == ("other", 404, "rejected")
    assert (second["error"], second["attempts"], second["ttfb_ms"]) == ("not_found", 0, None)


async def test_log_to_standard_output(tmp_path: Path) -> None:
    """As a process: every line on standard output is one JSON object; the banner is not among them."""
    path = written(tmp_path / "h.yaml")
    async with command("serve", "-c", str(path)) as process:
        port, _ = await process.serving()
        assert (await ask(port, chat())).status == 200
        await until(lambda: len(process.requests()) == 1)
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
    documents = [json.loads(line) for line in process.out]
    assert [document["event"] for document in documents] == ["request", "draining"]
    assert set(documents[0]) == LINE
    assert {"ts", "level", "event"} <= set(documents[1])


async def test_the_callers_trace_is_in_the_line() -> None:
    """A valid traceparent joins the line to the caller's trace; anything else is not repeated."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with running(settings_for("mock:")) as headrace:
        for value in (f"00-{trace}-b7ad6b7169203331-01", "canary"):
            assert (await ask(headrace.port, chat(f"traceparent: {value}"))).status == 200
        await until(lambda: len(headrace.log_lines()) == 2)
        assert [line["trace_id"] for line in headrace.log_lines()] == [trace, None]


@pytest.mark.parametrize(("level", "count"), [("info", 1), ("warning", 0)])
async def test_log_level(tmp_path: Path, level: str, count: int) -> None:
    """Above info there is no line a request."""
    path = written(tmp_path / "h.yaml", log={"level": level})
    async with command("serve", "-c", str(path)) as process:
        port, _ = await process.serving()
        assert (await ask(port, chat())).status == 200
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
    assert len(process.requests()) == count


async def test_log_as_text(tmp_path: Path) -> None:
    """For eyes: one line, name=value."""
    path = written(tmp_path / "h.yaml", log={"format": "text"})
    async with command("serve", "-c", str(path)) as process:
        port, _ = await process.serving()
        assert (await ask(port, chat("x-request-id: seen"))).status == 200
        found = await process.line(r'request_id="seen"')
    assert 'reason="complete"' in found.string
    assert not found.string.startswith("{")


async def test_log_file_is_reopened(tmp_path: Path) -> None:
    """A file that was moved away gets what came before; a new one under the name gets the rest."""
    file, moved = tmp_path / "h.log", tmp_path / "h.log.1"
    path = written(tmp_path / "h.yaml", log={"file": str(file)})

    def ids(of: Path) -> list[str]:
        if not of.exists():
            return []
        documents = [json.loads(line) for line in of.read_text().splitlines()]
        return [document["request_id"] for document in documents if document["event"] == "request"]

    async with command("serve", "-c", str(path)) as process:
        port, _ = await process.serving()
        await ask(port, chat("x-request-id: a"))
        await until(lambda: ids(file) == ["a"])
        file.rename(moved)
        await ask(port, chat("x-request-id: b"))
        await until(lambda: ids(file) == ["b"])
        file.unlink()
        await ask(port, chat("x-request-id: c"))
        await until(lambda: ids(file) == ["c"])
        assert ids(moved) == ["a"]
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
    assert process.out == []


async def test_log_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """Said in one line at the start."""
    path = written(tmp_path / "h.yaml", log={"file": str(tmp_path / "no" / "h.log")})
    async with command("serve", "-c", str(path)) as process:
        assert await process.ended() == 1
    assert len(process.err) == 1
    assert "log.file" in process.err[0]


async def test_a_log_directory_that_goes_away(tmp_path: Path) -> None:
    """Lines are lost and counted; requests are served; the log goes on when the directory is back."""
    folder = tmp_path / "logs"
    folder.mkdir()
    path = written(tmp_path / "h.yaml", log={"file": str(folder / "h.log")})
    async with command("serve", "-c", str(path)) as process:
        port, admin = await process.serving()
        await ask(port, chat("x-request-id: a"))
        await until((folder / "h.log").read_bytes)
        folder.rename(tmp_path / "gone")
        for _ in range(3):
            assert (await ask(port, chat())).status == 200
        await until_dropped(admin, 3)
        folder.mkdir()
        assert (await ask(port, chat("x-request-id: back"))).status == 200
        await until(lambda: (folder / "h.log").exists() and b'"back"' in (folder / "h.log").read_bytes())


async def until_dropped(admin: int, count: int) -> None:
    """Waits until that many lines are counted as lost."""
    async with asyncio.timeout(5):
        while await dropped(admin) < count:
            await asyncio.sleep(0.02)


async def dropped(admin: int) -> float:
    """Lines that no sink took."""
    page = (await fetch(admin, "/metrics")).body.decode()
    found = re.search(r"^headrace_log_lines_dropped_total ([0-9.e+]+)$", page, re.MULTILINE)
    assert found is not None
    return float(found[1])


@contextmanager
def unread(path: Path) -> Iterator[tuple[subprocess.Popen[bytes], tuple[int, int]]]:
    """Headrace whose standard output is a pipe that nobody reads; its ports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy", "serve", "-c", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        ports = []
        while len(ports) < 2:
            text = process.stderr.readline().decode()
            assert text, "ended before it listened"
            if found := re.match(r"  (?:data |admin)  ?.*:([0-9]+)/", text):
                ports.append(int(found[1]))
        yield process, (ports[0], ports[1])
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


async def flood(port: int, count: int) -> None:
    """Many requests that each make a line, 20 in a write."""

    async def some(number: int) -> None:
        async with await Caller.connect(port) as caller:
            for _ in range(number // 20):
                await caller.send(get("/health") * 20)
                for _ in range(20):
                    assert (await caller.rest(await caller.head())).status == 200

    await asyncio.gather(*(some(count // 4) for _ in range(4)))


async def test_a_blocked_sink_blocks_nobody(tmp_path: Path) -> None:
    """A pipe that nobody reads: requests go on, lines are dropped and counted, the end comes all the same."""
    path = written(tmp_path / "h.yaml", drain=1)
    with unread(path) as (process, (port, admin)):
        async with asyncio.timeout(25):
            await flood(port, 11_000)
            assert await dropped(admin) > 0
            answer = await ask(port, chat())
            assert answer.clean
            assert (await fetch(admin, "/readyz")).status == 200
        process.send_signal(signal.SIGTERM)
        # Two seconds are for the lines that nobody takes.
        await until(lambda: process.poll() is not None, 1 + 2 + 2)
        assert process.returncode == 0


async def test_a_closed_sink_blocks_nobody(tmp_path: Path) -> None:
    """A reader of the log that has ended costs lines, not requests."""
    path = written(tmp_path / "h.yaml", drain=1)
    with unread(path) as (process, (port, admin)):
        assert process.stdout is not None
        process.stdout.close()
        for _ in range(3):
            assert (await ask(port, chat())).status == 200
        await until_dropped(admin, 3)
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.poll() is not None, 5)
        assert process.returncode == 0


async def test_library_lines_quote_nothing(tmp_path: Path) -> None:
    """What libraries log passes the same sink without what they quote."""
    path = written(tmp_path / "h.yaml")
    async with command("serve", "-c", str(path)) as process:
        port, admin = await process.serving()
        for each in (port, admin):
            request = b"GET / HTTP/1.1\r\nHost: t\r\nAuthorization: SECRET\x01\r\n\r\n"
            async with await Caller.connect(each) as caller, asyncio.timeout(5):
                await caller.send(request)
                await caller.reader.read(-1)
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
    assert "SECRET" not in "\n".join([*process.out, *process.err])
    assert all(line.startswith("{") for line in process.out)
