"""The bench measures what it says: its generator against servers that misbehave, its figures, its charts."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import chart, check, goals, machine, measures, report, rounds, targets
from bench.load import Load
from bench.upstream import plain_answer

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUEST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"


def events(number: int) -> bytes:
    """A stream's body as the bench's upstream sends it."""
    data = b'data: {"content":"@T%019d tok"}\n\n'
    sent = b"".join(b"%x\r\n%b\r\n" % (len(data % 0), data % time.monotonic_ns()) for _ in range(number))
    return sent + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Reads one request a connection, then lets `answer` have it; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.recv(65536)
                answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def loaded(port: int, events: int, requests: int = 1) -> Load:
    load = Load(port, REQUEST, events)
    load.run(1, requests, 0, 0)
    return load


# ── the generator ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 7, 60, 61, 62, 1000])
def test_events_are_found_however_they_are_cut(size: int) -> None:
    def answer(connection: socket.socket) -> None:
        whole = HEAD + events(20)
        for start in range(0, len(whole), size):
            connection.sendall(whole[start : start + size])

    with server(answer) as port:
        load = loaded(port, 20)
    assert load.failed == {}
    assert (len(load.late), len(load.ttfb), len(load.whole), len(load.gap)) == (20, 1, 1, 19)


def test_a_plain_answer_is_whole_with_its_last_byte() -> None:
    def answer(connection: socket.socket) -> None:
        whole = plain_answer(3000)
        connection.sendall(whole[:-1])
        time.sleep(0.05)
        connection.sendall(whole[-1:])

    with server(answer) as port:
        load = loaded(port, 0)
    assert load.failed == {}
    assert load.whole[0] >= 50_000_000  # ns


@pytest.mark.parametrize(
    ("sent", "failed"),
    [
        (HEAD + events(20)[:-400], {"cut": 1}),
        (HEAD + events(19), {"wrong number of events": 1}),
        (b"", {"cut": 1}),
        (
            b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n{}",
            {"status 503": 1, "wrong number of events": 1},
        ),
    ],
    ids=["cut", "short", "closed", "refused"],
)
def test_what_fails_is_counted(sent: bytes, failed: dict[str, int]) -> None:
    with server(lambda connection: connection.sendall(sent)) as port:
        load = loaded(port, 20)
    assert load.failed == failed


def test_direct_gets_all_that_was_asked_for() -> None:
    """The upstream and the generator as processes, as in a run."""
    with targets.upstream() as upstream, targets.Target(targets.DIRECT, upstream) as direct:
        figures = direct.load(streams=5, requests=10, events=7, gap_ms=5)
        plain = direct.load(streams=4, requests=50, short=True, size=5000, pad=100_000)
    assert (figures["requests"], figures["events"], figures["failed"]) == (10, 70, {})
    assert figures["late"]["p50"] > 0
    assert (plain["requests"], plain["events"], plain["failed"]) == (50, 0, {})
    assert figures["cpu_s"] == 0  # there is no proxy


@pytest.mark.parametrize("peer", ["headrace-full", "headrace-open"])
def test_headrace_is_started_as_its_peer_says(peer: str) -> None:
    """Over TLS, because that needs all that the scripts are told."""
    with targets.upstream(tls=True) as upstream, targets.Target(peer, upstream) as headrace:
        figures = headrace.load(streams=4, requests=20, events=5, gap_ms=2)
        assert headrace.version.startswith("headrace ")
    assert (figures["requests"], figures["events"], figures["failed"]) == (20, 100, {})
    assert figures["cpu_s"] > 0


def test_a_peer_that_cannot_be_installed_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "PEERS", tmp_path)
    monkeypatch.setattr(targets, "CACHE", tmp_path / "cache")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/start.sh").touch()
    (tmp_path / "broken/install.sh").write_text("echo some words\necho no such package >&2\nexit 1\n")
    with targets.upstream() as upstream, pytest.raises(targets.Skipped, match=r"^no such package$"):
        targets.Target("broken", upstream).__enter__()


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────


def test_cpu_is_counted_for_a_whole_family() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdout.readline()
    pids = machine.family(parent.pid)
    assert len(pids) == 2
    assert 0.28 < machine.cpu_seconds(pids) < 1
    assert machine.resident_kib(pids) > 5000
    parent.communicate("\n")
    assert machine.cpu_seconds(pids) == 0


def document(**peers: dict[str, list[float]]) -> dict[str, Any]:
    """A result with these values."""
    found = rounds.Results()
    for peer, figures in peers.items():
        for name, values in figures.items():
            for value in values:
                found.add(peer.replace("_", "-"), {name: value})
    return found.as_document(rounds.Plan([], 3, measures.FULL, frozenset()))


def test_ratios_are_taken_round_by_round() -> None:
    """A round in which the machine was slow for both says the same as the others."""
    result = document(headrace_full={"request_us": [100, 1000, 110]}, nginx={"request_us": [50, 500, 50]})
    assert rounds.ratios(result, "headrace-full", "nginx", "request_us") == [2, 2, 2.2]
    figure = measures.FIGURES["request_us"]
    assert report.beside(result, "headrace-full", "request_us", figure) == "2.00x nginx"


@pytest.mark.parametrize(("now", "worse"), [(114, False), (116, True), (80, False)])
def test_more_than_fifteen_percent_is_lost(now: float, worse: bool) -> None:
    before = document(headrace_full={"request_us": [100.0]}, nginx={"request_us": [50.0]})
    after = document(headrace_full={"request_us": [now]}, nginx={"request_us": [50.0]})
    ((name, then, today),) = check.compare(before, after)
    assert (name, check.lost(then, today)) == ("request_us", worse)


def test_the_charts_show_every_proxy_and_have_two_themes(tmp_path: Path) -> None:
    one = {"ttfb_p50_us": [60.0], "ttfb_p99_us": [90.0]}
    cpu = {"chunk_200_us": [30.0, 31.0], "request_us": [200.0, 210.0]}
    slow = {name: [value * 40 for value in values] for name, values in (one | cpu).items()}
    result = document(direct=one, nginx=one | cpu, headrace_full=one | cpu, litellm=slow)
    files = chart.write(result, tmp_path)
    assert [file.name for file in files] == ["cpu.svg", "ttfb.svg"]
    for file in files:
        text = file.read_text()
        ElementTree.fromstring(text)
        assert all(name in text for name in ("nginx", "Headrace, everything on", "LiteLLM"))
        assert "prefers-color-scheme: dark" in text


def test_the_table_says_what_was_left_out() -> None:
    result = document(nginx={"request_us": [50.0, 52.0]})
    result["skipped"] = {"portkey": "apt-get install npm"}
    text = "\n".join(report.lines(result))
    assert "51.0 (50.0-52.0)" in text
    assert "skipped portkey: apt-get install npm" in text


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proxy", "bench", *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_the_command_hands_its_flags_over() -> None:
    """Its own help, a tool's help, and a peer that there is not."""
    assert "--realtime" in command("-h", cwd=machine.REPOSITORY).stdout
    assert "--print-only" in command("check", "--help", cwd=machine.REPOSITORY).stdout
    unknown = command("--quick", "ngnix", cwd=machine.REPOSITORY)
    assert unknown.returncode == 2
    assert "no peer ngnix: there are direct, ferrogw" in unknown.stderr


def test_without_the_repository_the_command_says_so(tmp_path: Path) -> None:
    shutil.copytree(machine.REPOSITORY / "proxy", tmp_path / "proxy")
    alone = command("--quick", cwd=tmp_path)
    assert alone.returncode == 1
    assert alone.stderr == "headrace: bench needs the repository: clone it, and run `make bench` there\n"


def test_the_readme_has_the_figures_of_the_committed_run() -> None:
    """`python -m bench.goals` writes them."""
    readme = (machine.REPOSITORY / "README.md").read_text()
    assert goals.page(readme, goals.read(), goals.read(goals.PEERS)) == readme


def test_the_page_on_scale_has_the_prices_of_the_committed_run() -> None:
    """`python -m bench.features` writes them. Asked in a process of its own: it brings the whole proxy."""
    asks = "from bench.features import PAGE, page as made; text = PAGE.read_text(); assert made(text) == text"
    assert subprocess.run([sys.executable, "-c", asks], cwd=machine.REPOSITORY).returncode == 0


def a_run(ours: float, nginx: float) -> dict[str, Any]:
    def figures(value: float) -> dict[str, Any]:
        return {"figures": {"chunk_400_us": {"median": value, "min": value, "max": value, "values": [value]}}}

    names = ("cores", "cpu", "kernel", "python", "commit", "changed")
    return {
        "when": "2026-11-21",
        "machine": {"packages": {}, **dict.fromkeys(names, "")},
        "rounds": 1,
        "quick": False,
        "peers": {"headrace-full": figures(ours), "nginx": figures(nginx)},
    }


@pytest.mark.parametrize(
    ("ours", "shown"), [(14.0, "**1.4x nginx** | moonshot"), (18.0, "**1.8x nginx** | met"), (18.1, "missed")]
)
def test_a_goal_says_whether_it_is_met(ours: float, shown: str) -> None:
    rows = [row for row in goals.section(a_run(ours, 10.0)).splitlines() if "400 streams" in row]
    assert shown in rows[0]
    assert "<= 1.8x nginx" in rows[0]
    assert len([row for row in rows if "nginx |" in row]) == 1
