"""A Headrace with several upstreams behind one model, each of them scripted, or a place where none is."""

from __future__ import annotations

import asyncio
import json
import socket
import string
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from proxy.breaker import State
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.invariant import invariant
from tests.kit.lab import Way, plays, response, server_context
from tests.kit.upstreams import DONE, END, HEAD, Call, Script, Scripted, chunk, event, scripted


@dataclass
class Nowhere:
    """The address of an upstream that nobody reaches."""

    url: str
    calls: list[Call] = field(default_factory=list)  # stays empty


@dataclass(frozen=True)
class Place:
    """A fault below HTTP: how to make an address that has it, and what its upstream's settings need."""

    make: Callable[[], AbstractAsyncContextManager[Nowhere]]
    settings: dict[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def _closed_port() -> AsyncIterator[Nowhere]:
    """Bound and not listening: nobody else gets the port, and who connects is refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield Nowhere(f"http://127.0.0.1:{sock.getsockname()[1]}/v1")


@asynccontextmanager
async def _silent_port() -> AsyncIterator[Nowhere]:
    """A listener whose queue is full: the kernel drops every further SYN."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with socket.socket() as first:
            first.connect(address)
            yield Nowhere(f"http://127.0.0.1:{address[1]}/v1")


@asynccontextmanager
async def _unknown_name() -> AsyncIterator[Nowhere]:
    yield Nowhere("http://nowhere.invalid/v1")  # RFC 6761: never has an address


@asynccontextmanager
async def _untrusted() -> AsyncIterator[Nowhere]:
    """TLS with a certificate that no public authority vouches for."""

    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hangs_up, "127.0.0.1", 0, ssl=server_context())
    try:
        yield Nowhere(f"https://localhost:{server.sockets[0].getsockname()[1]}/v1")
    finally:
        server.close()


#: No test with a pool takes this long.
_LONGEST_S = 20.0
_SOON = {"timeouts": {"connect": 0.2}}
REFUSES = Place(_closed_port)
BLACKHOLE = Place(_silent_port, _SOON)
UNKNOWN_NAME = Place(_unknown_name, _SOON)
UNTRUSTED = Place(_untrusted)


# ── scripts ─────────────────────────────────────────────────────────────────────────────────────────────


def says(name: str) -> bytes:
    """A whole JSON answer that tells who gave it."""
    return response(200, json.dumps({"from": name}).encode())


def streams(name: str) -> bytes:
    """The same as an event stream."""
    return HEAD + chunk(event(name)) + chunk(DONE) + END


def refuses_with(status: int, *fields: str, body: bytes = b'{"error":{"message":"no"}}') -> Script:
    """Answers every request with a status."""
    return plays(response(status, body, *fields))


def in_turn(*scripts: Script) -> Script:
    """One script a call; the last one from then on."""
    left = list(scripts)

    async def script(call: Call) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(call)

    return script


async def hangs_up(call: Call) -> None:
    """FIN without a byte of an answer."""
    call.close()


async def resets(call: Call) -> None:
    """RST without a byte of an answer."""
    call.reset()


async def silent(call: Call) -> None:
    """Takes the request and says nothing until the proxy goes."""
    await call.watch()


# ── the pool ────────────────────────────────────────────────────────────────────────────────────────────


class Pool:
    """What a test looks at. Upstreams are called a, b, c, … in the order of their scripts."""

    def __init__(self, headrace: Headrace, upstreams: dict[str, Scripted | Nowhere]) -> None:
        self.headrace = headrace
        self.upstreams = upstreams

    @property
    def port(self) -> int:
        return self.headrace.port

    @property
    def core(self) -> Any:
        return self.headrace.server.core

    def calls(self, name: str) -> list[Call]:
        return self.upstreams[name].calls

    @property
    def hits(self) -> dict[str, int]:
        """Requests that arrived, by upstream; those without any are missing."""
        return {name: len(each.calls) for name, each in self.upstreams.items() if each.calls}

    async def called(self, name: str, count: int = 1) -> Call:
        """The newest call of an upstream, once it has seen `count`."""
        await until(lambda: len(self.calls(name)) >= count, describe=lambda: str(self.hits))
        return self.calls(name)[-1]

    async def samples(self, metric: str) -> dict[str, float]:
        """The samples of one metric, by its labels as Prometheus writes them."""
        name = f"headrace_{metric}"
        found = await self.headrace.metrics()
        return {
            key.removeprefix(name).strip("{}"): value
            for key, value in found.items()
            if key.partition("{")[0] == name
        }

    async def level(self, metric: str, name: str) -> float:
        """A gauge of one upstream."""
        return (await self.samples(metric))[f'upstream="{name}"']

    async def attempts(self) -> dict[str, dict[str, int]]:
        """`upstream_attempts_total` as upstream -> result -> count."""
        found: dict[str, dict[str, int]] = {}
        for labels, value in (await self.samples("upstream_attempts_total")).items():
            named = dict(label.split("=") for label in labels.replace('"', "").split(","))
            found.setdefault(named["upstream"], {})[named["result"]] = int(value)
        return found

    async def settled(self, count: int = 1) -> dict[str, Any]:
        """The newest request line once `count` requests have ended, each counted once, and nothing is held
        any more: no slot, no permit, no budget, no trial of a breaker."""
        await until(lambda: len(self.headrace.log_lines()) >= count)
        await self.headrace.quiet()
        lines = self.headrace.log_lines()
        assert len(lines) == count, lines
        assert sum((await self.samples("requests_total")).values()) == count
        made = sum(sum(results.values()) for results in (await self.attempts()).values())
        assert made == sum(line["attempts"] for line in lines), (made, lines)
        await self._check_nothing_is_held()
        return lines[-1]

    async def _check_nothing_is_held(self) -> None:
        core, now = self.core, time.monotonic()
        assert (core.retry_budget.in_flight, core.retry_budget.retries_in_flight) == (0, 0)
        for name, upstream in core.upstreams.items():
            assert (upstream.in_flight, upstream.users) == (0, 0), name
            trial = upstream.breaker.state is State.HALF_OPEN and not upstream.breaker.available(now)
            assert not trial, f"{name}: a trial that nobody makes"
        slots = ["machine", *(f"upstream:{name}" for name in core.upstreams)]
        taken = await core.admission.state.peek_slots(slots, now)
        assert not any(taken), dict(zip(slots, taken, strict=True))

    async def ended(self, reason: str, attempts: int, count: int = 1) -> dict[str, Any]:
        """The same, and the newest one ended for this reason after so many attempts."""
        line = await self.settled(count)
        assert (line["reason"], line["attempts"]) == (reason, attempts), line
        return line


def in_order(names: Sequence[str]) -> list[dict[str, Any]]:
    """Targets that are asked in this order."""
    return [{"name": name, "tier": tier} for tier, name in enumerate(names, 1)]


@asynccontextmanager
async def pool(
    *places: Script | Place,
    way: Way,
    each: dict[str, dict[str, Any]] | None = None,
    upstream: dict[str, Any] | None = None,
    **sections: Any,
) -> AsyncIterator[Pool]:
    """Model `m` asks the upstreams in their order (tiers), unless `models` says otherwise.

    upstream: settings of all of them; each: of single ones, by name. Everything else is a top-level section;
    a back-off is short unless `retry` says otherwise.
    """
    names = string.ascii_lowercase[: len(places)]
    sections["retry"] = {"base": 0.01, **sections.get("retry", {})}
    sections.setdefault("models", {"m": {"upstreams": in_order(names)}})
    async with AsyncExitStack() as stack:
        made: dict[str, Scripted | Nowhere] = {}
        settings: dict[str, Any] = {}
        for name, place in zip(names, places, strict=True):
            own = place.settings if isinstance(place, Place) else {}
            thing = place.make() if isinstance(place, Place) else scripted(place)
            made[name] = await stack.enter_async_context(thing)
            settings[name] = {
                "base_url": made[name].url,
                "api_key": f"secret-of-{name}",
                **own,
                **(upstream or {}),
                **(each or {}).get(name, {}),
            }
        whole = settings_for("http://unused.invalid", **sections) | {"upstreams": settings}
        headrace = await stack.enter_async_context(running(whole, push=way.push))
        await stack.enter_async_context(invariant(headrace, *(place.calls for place in made.values())))
        await stack.enter_async_context(asyncio.timeout(_LONGEST_S))  # whoever hangs fails here
        yield Pool(headrace, made)


def shares(names: Sequence[str]) -> dict[str, int]:
    """How often each is among them."""
    return dict(Counter(names))
