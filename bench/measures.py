"""What is measured, a function a load; each gives figures by the names in FIGURES.

CPU is the proxy's own, of all its processes, divided by the work done: on a machine that others use, too, it
is steadier than any wall-clock figure. Times are the generator's; what the proxy adds is the difference to
`direct` in the same round.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine
from bench.targets import Target

Figures = dict[str, float]


class Figure(NamedTuple):
    """better: -1 the smaller, 1 the larger; added: beside it stands the difference to `direct`."""

    label: str
    unit: str
    digits: int = 1
    better: int = -1
    added: bool = False


FIGURES: dict[str, Figure] = {
    "chunk_400_us": Figure("CPU per chunk, 400 streams x 42/s", "µs"),
    "chunk_200_us": Figure("CPU per chunk, 200 streams x 50/s", "µs"),
    "request_us": Figure("CPU per short request", "µs"),
    "requests_s": Figure("short requests per second, one core", "/s", 0, 1),
    "ttfb_p50_us": Figure("time to first byte, 1 stream, p50", "µs", 0, added=True),
    "ttfb_p99_us": Figure("time to first byte, 1 stream, p99", "µs", 0, added=True),
    "late_p50_us": Figure("chunk's way through, 400 streams, p50", "µs", 0, added=True),
    "late_p99_us": Figure("chunk's way through, 400 streams, p99", "µs", 0, added=True),
    "gap_p50_us": Figure("change of a gap between chunks, p50", "µs", 0, added=True),
    "gap_p99_us": Figure("change of a gap between chunks, p99", "µs", 0, added=True),
    "ttfb_500_p99_us": Figure("time to first byte, 500 streams, p99", "µs", 0, added=True),
    "stream_kib": Figure("memory per open stream, 1,000 streams", "KiB"),
    "many_ttfb_p99_ms": Figure("first byte, 2,000 streams begin in 1 s, p99", "ms", 0),
    "many_chunk_us": Figure("CPU per chunk, 2,000 streams x 20/s", "µs"),
    "many_failed": Figure("of these 2,000 streams failed", "", 0),
    "held_streams": Figure("streams x 20/s held without a stall", "", 0, 1),
    "idle_mib": Figure("idle memory", "MiB"),
    "cold_start_s": Figure("cold start", "s", 2),
    "tls_chunk_us": Figure("TLS upstream: CPU per chunk, 200 streams", "µs"),
    "tls_request_us": Figure("TLS upstream: CPU per short request", "µs"),
    "workers_request_us": Figure("two workers: CPU per short request", "µs"),
    "growth_10_us": Figure("CPU per chunk, 10 streams x 1,000/s", "µs"),
    "growth_100_us": Figure("CPU per chunk, 100 streams x 100/s", "µs"),
    "growth_1000_us": Figure("CPU per chunk, 1,000 streams x 10/s", "µs"),
    "growth_2000_us": Figure("CPU per chunk, 2,000 streams x 5/s", "µs"),
    "prompt_64k_us": Figure("CPU per request with a prompt of 64 KiB", "µs"),
    "prompt_1m_us": Figure("CPU per request with a prompt of 1 MiB", "µs"),
    "answer_64k_us": Figure("CPU per request with an answer of 64 KiB", "µs"),
    "answer_1m_us": Figure("CPU per request with an answer of 1 MiB", "µs"),
    "retry_5_percent": Figure("succeed: 5 % of connects fail, 5 % get a 503", "%", 2, 1),
    "retry_10_percent": Figure("succeed: 10 % of connects fail, 10 % get a 503", "%", 2, 1),
}
#: A chunk that is this late is a stall: half of what people notice in a text that is being written.
STALL_US = 250_000
HELD = (250, 500, 1000, 1500, 2000, 3000)


class Length(NamedTuple):
    """How long a load runs, in seconds."""

    stream: float
    short: float
    requests: int
    conc: float


#: As long as the rig that the goals are from: 300 chunks at 42 a second.
FULL = Length(stream=7.2, short=2.0, requests=300, conc=7.0)
QUICK = Length(stream=1.2, short=0.5, requests=100, conc=2.0)


class Trouble(Exception):
    """The load failed in part: its figures say nothing."""


def warm_up(target: Target) -> None:
    target.load(streams=8, requests=400, short=True)
    target.load(streams=4, requests=40, events=20, gap_ms=1)


def _whole(figures: dict[str, Any]) -> None:
    if figures["failed"]:
        raise Trouble(
            f"{json.dumps(figures['failed'])} {str(figures['refusal']).partition(chr(13))[0]}".strip()
        )


def _streams(target: Target, streams: int, gap_ms: int, seconds: float, ramp: float) -> dict[str, Any]:
    figures = target.load(
        streams=streams,
        requests=streams,
        gap_ms=gap_ms,
        events=max(10, int(seconds * 1000 / gap_ms)),
        ramp=ramp,
    )
    _whole(figures)
    return figures


def _per(figures: dict[str, Any], what: str) -> float:
    """Microseconds of CPU a unit of work."""
    return float(figures["cpu_s"] * 1e6 / max(1, figures[what]))


# ── every round ──────────────────────────────────────────────────────────────────────────────────────────


def stream_400(target: Target, length: Length) -> Figures:
    """16,700 chunks a second; a peer that this saturates is left out."""
    if target.slow_streams:
        return {}
    figures = _streams(target, 400, 24, length.stream, 0.5)
    late, gap = figures["late"], figures["gap"]
    return {
        "chunk_400_us": _per(figures, "events"),
        "late_p50_us": late["p50"],
        "late_p99_us": late["p99"],
        "gap_p50_us": gap["p50"],
        "gap_p99_us": gap["p99"],
    }


def stream_200(target: Target, length: Length) -> Figures:
    """10,000 chunks a second; for slow peers fewer streams of the same pace."""
    figures = _streams(target, target.slow_streams or 200, 20, length.stream, 0.5)
    return {"chunk_200_us": _per(figures, "events")}


def short(target: Target, length: Length) -> Figures:
    """32 callers at once, 1 KiB answers. The rate is wrk's where there is one."""
    figures = target.load(streams=32, seconds=length.short, short=True)
    _whole(figures)
    rate = _wrk_rate(target, length.short) or figures["requests"] / figures["seconds"]
    return {"request_us": _per(figures, "requests"), "requests_s": rate}


def _wrk_rate(target: Target, seconds: float) -> float | None:
    """Requests a second; None without wrk. It is C: the rate is the proxy's, not the generator's."""
    if not shutil.which("wrk"):
        return None
    body = '{"model":"mock-model","messages":[{"role":"user","content":"Hello"}]}'
    lines = ['wrk.method = "POST"', f"wrk.body = [[{body.replace('mock-model', target.model)}]]"]
    headers = ["Content-Type: application/json", *target.headers]
    lines += [
        f'wrk.headers["{name}"] = "{value.strip()}"' for name, _, value in (h.partition(":") for h in headers)
    ]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "request.lua"
        script.write_text("\n".join(lines))
        url = f"http://127.0.0.1:{target.port}/v1/chat/completions"
        command = ["wrk", "-t1", "-c32", f"-d{max(1, round(seconds))}s", "-s", str(script), url]
        said = subprocess.run(
            machine.on_core(machine.cores()[1], command), capture_output=True, text=True
        ).stdout
    found = re.search(r"Requests/sec: *([\d.]+)", said)
    return float(found[1]) if found and "Non-2xx" not in said else None


def first_byte(target: Target, length: Length) -> Figures:
    """One stream at a time on one connection."""
    figures = target.load(streams=1, requests=length.requests, events=1, gap_ms=1)
    _whole(figures)
    return {"ttfb_p50_us": figures["ttfb"]["p50"], "ttfb_p99_us": figures["ttfb"]["p99"]}


# ── some rounds ──────────────────────────────────────────────────────────────────────────────────────────


def first_byte_500(target: Target, length: Length) -> Figures:
    """500 streams of 20 chunks a second; new ones take the place of those that have ended."""
    if target.slow_streams:
        return {}
    figures = target.load(
        streams=500, seconds=length.conc, events=int(length.conc * 14), gap_ms=50, ramp=length.conc * 0.7
    )
    _whole(figures)
    return {"ttfb_500_p99_us": figures["ttfb"]["p99"]}


def memory(target: Target, length: Length) -> Figures:
    """The most that the process has grown by while 1,000 streams are open, a thousandth of it."""
    if target.name == "direct":
        return {}
    slow = bool(target.slow_streams)
    figures = target.load(
        watch_memory=True,
        streams=1000,
        requests=1000,
        events=20 if slow else 15,
        gap_ms=1000 if slow else 500,
        ramp=8 if slow else 2.5,
    )
    _whole(figures)
    return {"stream_kib": (figures["peak_kib"] - figures["resident_kib"]) / 1000}


def many(target: Target, length: Length) -> Figures:
    """2,000 streams begin within a second and run at 20 chunks a second."""
    if target.slow_streams:
        return {}
    figures = target.load(streams=2000, requests=2000, events=int(length.stream * 20), gap_ms=50, ramp=1)
    return {
        "many_ttfb_p99_ms": figures["ttfb"]["p99"] / 1000,
        "many_chunk_us": _per(figures, "events"),
        "many_failed": float(sum(figures["failed"].values())),
    }


# ── once ─────────────────────────────────────────────────────────────────────────────────────────────────


def held(target: Target, length: Length) -> Figures:
    """The largest step of HELD at which a thousandth of the chunks at most were late by STALL_US."""
    best = 0
    for streams in HELD:
        # The beginning is not what is asked about: it is given two seconds for a thousand streams.
        figures = target.load(
            streams=streams, requests=streams, events=int(length.stream * 20), gap_ms=50, ramp=streams / 500
        )
        if figures["failed"] or figures["late"].get("p999", STALL_US) >= STALL_US:
            break
        best = streams
    return {"held_streams": float(best)}


def growth(target: Target, length: Length) -> Figures:
    """10,000 chunks a second from few streams and from many; requests of any size."""
    if target.slow_streams or target.name == "direct":
        return {}
    found = {}
    for streams in (10, 100, 1000, 2000):
        found[f"growth_{streams}_us"] = _running_chunk(target, streams, streams // 10, length)
    for name, pad, size in (
        ("prompt_64k_us", 65_536, 1024),
        ("prompt_1m_us", 1_048_576, 1024),
        ("answer_64k_us", 0, 65_536),
        ("answer_1m_us", 0, 1_048_576),
    ):
        figures = target.load(streams=4, seconds=length.short, short=True, pad=pad, size=size)
        if not figures["failed"]:  # one of our peers refuses large prompts
            found[name] = _per(figures, "requests")
    return found


def _running_chunk(target: Target, streams: int, gap_ms: int, length: Length) -> float:
    """While all of them run: their beginnings and ends, which weigh the more the shorter a stream is, are
    left out."""
    ramp, slack = min(2.0, streams / 1000), 1.5
    lasts_s = ramp + slack + length.stream + slack
    figures = target.watch(
        ramp + slack,
        length.stream,
        streams=streams,
        requests=streams,
        gap_ms=gap_ms,
        events=int(lasts_s * 1000 / gap_ms),
        ramp=ramp,
    )
    _whole(figures)
    return float(figures["cpu_s"] * 1e6 / (figures["window_s"] * streams * 1000 / gap_ms))


Measure = Callable[[Target, Length], Figures]
EVERY_ROUND: dict[str, Measure] = {
    "stream_400": stream_400,
    "stream_200": stream_200,
    "short": short,
    "first_byte": first_byte,
}
SOME_ROUNDS: dict[str, Measure] = {"first_byte_500": first_byte_500, "memory": memory, "many": many}
ONCE: dict[str, Measure] = {"held": held, "growth": growth}


# ── with another upstream, with other workers ────────────────────────────────────────────────────────────


def over_tls(target: Target, length: Length) -> Figures:
    figures = _streams(target, 200, 20, length.stream, 0.5)
    requests = target.load(streams=32, seconds=length.short, short=True)
    _whole(requests)
    return {"tls_chunk_us": _per(figures, "events"), "tls_request_us": _per(requests, "requests")}


def with_workers(target: Target, length: Length) -> Figures:
    figures = target.load(streams=32, seconds=length.short, short=True)
    _whole(figures)
    return {"workers_request_us": _per(figures, "requests")}
