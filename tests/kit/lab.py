"""A Headrace with one scripted upstream behind it, over each of the data paths."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import trustme
import uvloop

from tests.kit.callers import Answer
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.invariant import invariant
from tests.kit.upstreams import Call, Script, Scripted, scripted

T = TypeVar("T")
Step = bytes | float | Callable[[Call], Any]


@dataclass(frozen=True)
class Way:
    """How bytes get from the upstream to the caller."""

    push: bool
    tls: bool = False

    def __str__(self) -> str:
        return ("push" if self.push else "pull") + ("-tls" if self.tls else "")


PLAIN = (Way(push=True), Way(push=False))
ALL = (*PLAIN, Way(push=True, tls=True), Way(push=False, tls=True))
#: Runs a test over both data paths; `everywhere` over TLS as well (the fallback's in `make test-all`).
#: The test takes `way`.
both = pytest.mark.parametrize("way", PLAIN, ids=str)
everywhere = pytest.mark.parametrize(
    "way", [*ALL[:-1], pytest.param(ALL[-1], marks=pytest.mark.slow)], ids=str
)


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def server_context() -> ssl.SSLContext:
    """The TLS side of an upstream whose certificate only our own authority vouches for."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority().issue_cert("localhost").configure_cert(context)
    return context


class Lab:
    """What a test looks at."""

    def __init__(self, headrace: Headrace, upstream: Scripted) -> None:
        self.headrace = headrace
        self.upstream = upstream

    @property
    def port(self) -> int:
        return self.headrace.port

    async def called(self, count: int = 1) -> Call:
        """The newest call, once the upstream has seen `count`."""
        await until(lambda: len(self.upstream.calls) >= count)
        return self.upstream.calls[-1]

    async def line(self, count: int = 1) -> dict[str, Any]:
        """The newest request line, once there are `count`."""
        await until(lambda: len(self.headrace.log_lines()) >= count)
        lines = self.headrace.log_lines()
        assert len(lines) == count, lines
        return lines[-1]

    async def ended(self, reason: str, count: int = 1) -> dict[str, Any]:
        """Checks that the newest request ended for this reason, in the log and in the metric, and left
        nothing behind."""
        line = await self.line(count)
        assert line["reason"] == reason, line
        samples = await self.headrace.metrics()
        counted = {
            name: value
            for name, value in samples.items()
            if name.startswith("headrace_requests_total{") and f'reason="{reason}"' in name
        }
        assert sum(counted.values()) >= 1, samples
        if count == 1:
            assert sum(counted.values()) == 1, counted
            assert f'code="{line["status"]}"' in next(iter(counted)), (counted, line)
        await self.headrace.quiet()
        return line


@contextmanager
def _upstream_settings(way: Way, extra: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        if way.tls:
            extra = {"ca_file": stack.enter_context(authority().cert_pem.tempfile()), **extra}
        yield extra


@asynccontextmanager
async def lab(script: Script, way: Way, *, unfinished: bool = False, **sections: Any) -> AsyncIterator[Lab]:
    """`upstream` adds to the upstream's section; everything else is a top-level section. What has to hold at
    the end of every case is checked, unless it is left `unfinished`."""
    with _upstream_settings(way, sections.pop("upstream", {})) as extra:
        async with (
            scripted(script, tls=server_context() if way.tls else None) as upstream,
            running(settings_for(upstream.url, upstream=extra, **sections), push=way.push) as headrace,
            nullcontext() if unfinished else invariant(headrace, upstream.calls),
        ):
            yield Lab(headrace, upstream)


def plays(*steps: Step) -> Script:
    """A script: bytes are sent, numbers are seconds to wait, the rest is called with the call."""

    async def script(call: Call) -> None:
        for step in steps:
            if isinstance(step, bytes):
                await call.send(step)
            elif isinstance(step, (int, float)):
                await asyncio.sleep(step)
            else:
                result = step(call)
                if inspect.isawaitable(result):
                    await result

    return script


class Gate:
    """A step that waits until the test says `open`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def open(self) -> None:
        self._event.set()

    async def __call__(self, _call: Call) -> None:
        await self._event.wait()


def hold(call: Call) -> Coroutine[Any, Any, None]:
    """A step that says nothing more until the proxy goes."""
    return call.watch()


def response(status: int, body: bytes, *fields: str, content_type: str = "application/json") -> bytes:
    """A whole answer with a Content-Length."""
    lines = [f"HTTP/1.1 {status} Scripted", f"Content-Type: {content_type}", *fields]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def last_event(answer: Answer) -> dict[str, Any]:
    """The data of the last event, which has to be whole."""
    assert answer.body.endswith(b"\n\n"), answer.body[-200:]
    event = answer.body[:-2].rpartition(b"\n\n")[2]
    data = next(line for line in event.split(b"\n") if line.startswith(b"data: "))
    document = json.loads(data[6:])
    assert isinstance(document, dict)
    return document


class LoopThread:
    """A uvloop in a thread of its own, for tests that are no coroutines (hypothesis)."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 20.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
