"""What a user pays for what: each feature by itself, in microseconds of CPU a request, a stream and a chunk.

    python -m bench.features [--quick]

Most of them cost less than what two runs of the whole proxy differ by. So each is run alone, with the objects
of the proxy and real stores, for some thousand requests at a time; the smallest of five rounds counts. CPU is
that of the whole process, its writer threads included. Redis (where redis-server is found) shows its own CPU,
and how long a request waits for it, beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import uvloop
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from bench import machine, marked, report, targets
from bench.micro_tap import CHUNKS, STREAM_KINDS, STREAMS, Nowhere, ask_all, best, pass_all
from proxy import __version__, config, endpoints, identity, key_commands, log
from proxy.admission import Admission, Reservation
from proxy.authenticator import Authenticator
from proxy.context import CONTEXT, CORE, Context
from proxy.core import Core
from proxy.errors import Reason
from proxy.identity import Principal
from proxy.key_order import KeyOrder
from proxy.keys import load_pepper
from proxy.keystore import opened
from proxy.ledger import Ledger
from proxy.metrics import Metrics
from proxy.middleware import guard, observe, request_id
from proxy.pipe import Clocks, Pipe
from proxy.seat import Manner
from proxy.shared import Shared
from proxy.slots import WaitingRoom
from proxy.sse import BlindScanner, Scanner
from proxy.stores import Stores
from proxy.upstream import Upstream
from proxy.usage import Source, Usage
from proxy.verify import VerifiedPipe

# By its full name: the package has the function of the same name.
cors = importlib.import_module("proxy.middleware.cors")

RESULTS = report.RESULTS / "features.json"
PAGE = machine.REPOSITORY / "docs" / "scale.md"
_CONFIG = """
auth: {{mode: required, database: "sqlite:{folder}/keys.db"}}
upstreams: {{u: {{base_url: "http://127.0.0.1:1/v1"}}}}
models: {{m: {{upstreams: [u], price: {{input: 2.0, output: 8.0}}}}}}
plans:
  bench:
    {{requests_per_minute: 100000000, burst: 1000000, tokens_per_minute: 1000000000, max_in_flight: 1000}}
limits: {{store: "{store}"}}
cors: {{origins: ["https://app.example"]}}
"""
_ROUNDS = 5
#: Requests between two of the pauses in which the writers work: as at 1,000 a second.
_BATCH = 50
_PATH = "/v1/chat/completions"


class Price(NamedTuple):
    """request, stream, chunk: microseconds of CPU; waits: until it is done, where that is not the same."""

    feature: str
    request: float | None = None
    stream: float | None = None
    chunk: float | None = None
    waits: float | None = None
    remark: str = ""


async def each(
    work: Callable[[], Awaitable[object]], times: int, settled: Callable[[], bool] | None = None
) -> float:
    """Microseconds of CPU a call. settled: whether the threads behind it have done their part, too."""
    found = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        for number in range(times):
            await work()
            if settled is not None and number % _BATCH == 0:
                await asyncio.sleep(0.05)
        while settled is not None and not settled():  # noqa: ASYNC110 - by a thread, not by the loop
            await asyncio.sleep(0.01)
        found.append((time.process_time() - began) / times * 1e6)
    return min(found)


# ── a request without a proxy around it ──────────────────────────────────────────────────────────────────


class _NoRows:
    """A ledger that is off."""

    added = pending = dropped = 0

    def add(self, row: object) -> None: ...


def make_core(settings: config.Config, request_log: log.RequestLog, ledger: Any) -> Core:
    core = Core(settings, {}, Metrics(__version__), request_log, time.time())
    core.ledger = ledger
    return core


def make_request(core: Core, *fields: tuple[str, str]) -> web.Request:
    """Answered, as `observe` finds it at the end."""
    app = web.Application()
    app[CORE] = core
    request = make_mocked_request("POST", _PATH, headers=dict([("Host", "bench"), *fields]), app=app)
    now = time.monotonic()
    ctx = Context("request-0001", endpoints.match("POST", _PATH), _PATH, now)
    ctx.principal = Principal(name="key:abc", key_id="abc", plan="bench")
    ctx.model, ctx.upstream, ctx.attempts, ctx.reached_upstream = "m", "u", 1, True
    ctx.status, ctx.reason, ctx.client_ip = 200, Reason.COMPLETE, "127.0.0.1"
    ctx.queue_s, ctx.sent_at, ctx.first_byte_at, ctx.first_token_at = 0.0, now, now, now
    ctx.usage, ctx.cost_picos = Usage(12, 0, 150, 0, Source.REPORTED), 1_224_000_000
    ctx.core, ctx.method, ctx.fields = core, request.method, request.headers
    request[CONTEXT] = ctx
    return request


async def answered(request: web.Request) -> web.StreamResponse:
    return _ANSWER


_ANSWER = web.Response(status=200)


# ── the features ─────────────────────────────────────────────────────────────────────────────────────────


async def price_of_auth(settings: config.Config, times: int) -> Price:
    """A key that has been shown before."""
    database = settings.auth.database
    pepper = load_pepper(None, database)
    async with opened(database) as store:
        order = KeyOrder(name="bench", plan="bench")
        _, secret = await key_commands.create(store, pepper, settings.plans, order, time.time())
    authenticator = Authenticator(settings.auth, settings.plans)
    await authenticator.start(time.time())

    async def one() -> None:
        credential, now = identity.credential_of([f"Bearer {secret}"], []), time.time()
        principal = authenticator.known(credential, now) or await authenticator.identify(credential, now)
        identity.check_address(principal, "127.0.0.1")

    try:
        return Price("key, plan and address checked", await each(one, times))
    finally:
        await authenticator.close()


async def _if_far(waiting: Awaitable[None] | None) -> None:
    """Limits in memory have nothing to wait for."""
    if waiting is not None:
        await waiting


async def price_of_limits(settings: config.Config, times: int, redis: RedisServer | None = None) -> Price:
    """One request: its rate, its tokens and their settlement, and three slots taken and given back."""
    shared = Shared.fresh(1)
    stores = Stores(settings.limits, shared.owner(0), lambda _: None)
    stores.start()
    room = WaitingRoom(stores.state, 10, 1.0)
    admission = Admission(settings.limits, stores, room, Metrics(__version__))
    ctx = Context("request-0001", endpoints.match("POST", _PATH), _PATH, time.monotonic())
    principal = ctx.principal = Principal(name="key:abc", key_id="abc", plan="bench")
    ctx.model, plan, entry = "m", settings.plans["bench"], settings.models["m"]
    upstreams = [Upstream("u", settings.upstreams["u"], "http://127.0.0.1:1/v1", push=True)]

    async def one() -> None:
        await _if_far(admission.arrive(ctx, principal, plan))
        held = Reservation(1000)
        allotment = admission.allotment(principal, plan)
        await _if_far(admission.reserve_tokens(ctx, allotment, entry, held))
        seat = admission.seat_at_once(ctx, allotment, upstreams)
        with seat or await admission.seat_in_turn(ctx, allotment, upstreams, Manner.WAIT):
            pass
        await _if_far(admission.settle(held, 162))

    try:
        await one()
        if redis is None:
            return Price("limits in memory: rate, tokens, three slots", await each(one, times))
        theirs, began = machine.cpu_seconds([redis.pid]), time.monotonic()
        cost = await each(one, times)
        calls = _ROUNDS * times
        waits = (time.monotonic() - began) / calls * 1e6
        server = (machine.cpu_seconds([redis.pid]) - theirs) / calls * 1e6
        remark = f"Redis's own CPU: {server:.0f} us"
        return Price("limits in Redis: rate, tokens, three slots", cost, waits=waits, remark=remark)
    finally:
        await stores.close()
        shared.close()


async def prices_of_records(settings: config.Config, folder: Path, times: int) -> list[Price]:
    """The end of a request, with one of its three records more each time."""
    sink, lines = log.configure(path=str(folder / "requests.log"), level="info", text=False)
    sink.attach(asyncio.get_running_loop())
    silent = log.RequestLog(sink, text=False, enabled=False)
    ledger = Ledger(folder / "ledger.db", 400)
    await ledger.start()

    def written() -> bool:
        return not ledger.pending

    async def cost(core: Core, settled: Callable[[], bool] | None) -> float:
        request = make_request(core)
        ctx = request[CONTEXT]

        async def one() -> None:
            core.running.add(ctx)
            observe.answered(ctx, _ANSWER)
            ctx.task = asyncio.current_task()
            observe.end(ctx)
            await asyncio.sleep(0)  # it is settled in the next turn

        return await each(one, times, settled)

    try:
        metrics = await cost(make_core(settings, silent, _NoRows()), None)
        # Paced, because their threads write in batches: without a pause there is one huge batch.
        paced = await cost(make_core(settings, silent, _NoRows()), written)
        logged = await cost(make_core(settings, lines, _NoRows()), written)
        kept = await cost(make_core(settings, silent, ledger), written)
    finally:
        await ledger.close()
        sink.attach(None)
        sink.close()
    return [
        Price("metrics, and what the other two are told", metrics),
        Price("log: one JSON line, written by a thread", max(0.0, logged - paced)),
        Price("ledger: one SQLite row, written by a thread", max(0.0, kept - paced)),
    ]


async def price_of_request_id(settings: config.Config, times: int) -> Price:
    core = make_core(settings, SimpleNamespace(), _NoRows())  # type: ignore[arg-type]  # a part of it is enough
    request = make_request(core)

    async def one() -> None:
        request_id.begin(request, core)

    return Price("request id, route and caller's address", await each(one, times))


async def price_of_guard(settings: config.Config, times: int) -> Price:
    """Of a good request: nothing of it is refused."""
    core = make_core(settings, SimpleNamespace(), _NoRows())  # type: ignore[arg-type]  # a part of it is enough
    request = make_request(core)
    ctx = request[CONTEXT]

    async def one() -> None:
        guard.check(request, ctx)

    async def nothing() -> None: ...

    price = await each(one, times) - await each(nothing, times)
    return Price("guard: what nobody should send is refused", price)


async def price_of_cors(settings: config.Config, times: int) -> Price:
    """A page's request: the fields of its answer."""
    core = make_core(settings, SimpleNamespace(), _NoRows())  # type: ignore[arg-type]  # a part of it is enough
    app = web.Application()
    app[CORE] = core
    cors.attach(app, app.router.add_route("*", "/{path:.*}", answered))
    app.freeze()
    fields = {"Host": "bench", "Origin": "https://app.example"}
    request = make_mocked_request("POST", _PATH, headers=fields, app=app)
    ctx = Context("request-0001", endpoints.match("POST", _PATH), _PATH, time.monotonic())
    ctx.method = "POST"

    async def one() -> None:
        cors.is_preflight(request, ctx)
        response = web.Response(status=200)
        await app.on_response_prepare.send(request, response)

    async def without() -> None:
        web.Response(status=200)

    return Price("CORS: a page's origin", await each(one, times) - await each(without, times))


async def prices_of_tap() -> list[Price]:
    chunk = STREAM_KINDS["no usage in the chunks"]
    reads = 200 * 322
    blind, watching, tapped = [
        await pass_all(kind, chunk) / reads * 1e6 for kind in (None, BlindScanner, Scanner)
    ]
    return [
        Price("where a stream stands: event boundary, end", chunk=watching - blind),
        Price("tap: the usage of a stream", stream=ask_all(chunk), chunk=max(0.0, tapped - watching)),
    ]


async def price_of_verification(settings: config.Config) -> Price:
    """Each stream of the sample: what its pipe costs more than a usual one."""
    chunk = STREAM_KINDS["no usage in the chunks"]
    core = make_core(settings, SimpleNamespace(), _NoRows())  # type: ignore[arg-type]  # a part of it is enough
    ctx = make_request(core)[CONTEXT]
    way = Nowhere()
    parts: Any = (ctx, SimpleNamespace(transport=way), way, way, None, Clocks(1.0, 1.0, 1.0, 1.0, [0.0] * 22))
    plain, verified = Pipe(*parts), VerifiedPipe(core.metrics, *parts)

    def run(make: Callable[[], Pipe], reads: int) -> float:
        """Microseconds a stream."""

        def streams() -> None:
            for _ in range(STREAMS):
                pipe = make()
                for _ in range(reads):
                    pipe.feed(chunk)

        return best(streams) / STREAMS * 1e6

    made = run(lambda: VerifiedPipe(core.metrics, *parts), 0) - run(lambda: Pipe(*parts), 0)
    fed = run(lambda: verified, CHUNKS) - run(lambda: plain, CHUNKS)
    return Price("verify_sample: both sums of a stream", stream=max(0.0, made), chunk=max(0.0, fed / CHUNKS))


async def price_of_timer(times: int) -> Price:
    """A stream's one timer: armed once, and cancelled at the end; in between it looks at a number."""
    loop = asyncio.get_running_loop()

    async def one() -> None:
        loop.call_later(15.0, print).cancel()

    return Price("heartbeat, idle and total time-out", stream=await each(one, times))


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────────────


class RedisServer(NamedTuple):
    pid: int
    url: str


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer | None]:
    """One of our own, without persistence; None where there is none."""
    if not shutil.which("redis-server"):
        yield None
        return
    port = targets.free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.02)
        yield RedisServer(process.pid, f"redis://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait()


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────


async def prices(times: int) -> AsyncIterator[Price]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def settings(store: str) -> config.Config:
            return config.parse(_CONFIG.format(folder=folder, store=store), "bench", {})

        usual = settings("memory")
        yield await price_of_request_id(usual, times)
        yield await price_of_guard(usual, times)
        yield await price_of_cors(usual, times)
        yield await price_of_auth(usual, times)
        yield await price_of_limits(usual, times)
        with redis_server(folder) as redis:
            if redis is not None:
                yield await price_of_limits(settings(redis.url), max(100, times // 5), redis)
        for price in await prices_of_records(usual, folder, times):
            yield price
        for price in await prices_of_tap():
            yield price
        yield await price_of_verification(usual)
        yield await price_of_timer(times)


async def measure(times: int) -> list[Price]:
    return [price async for price in prices(times)]


def table(found: list[Price]) -> Iterator[str]:
    yield f"{'microseconds of CPU':<48}{'request':>9}{'stream':>9}{'chunk':>9}{'waits':>9}"
    for price in found:
        cells = (price.request, price.stream, price.chunk, price.waits)
        texts = "".join(f"{_cell(cell):>9}" for cell in cells)
        yield f"{price.feature:<48}{texts}  {price.remark}".rstrip()


def section(document: dict[str, Any] | None) -> str:
    """What docs/scale.md says of the committed run."""
    if document is None:
        return "No figures yet: `python -m bench.features` measures them and puts them here.\n"
    rows = ["| microseconds of CPU | a request | a stream | a chunk | waits | |", "|---|--:|--:|--:|--:|---|"]
    for price in (Price(**fields) for fields in document["prices"]):
        cells = " | ".join(map(_cell, (price.request, price.stream, price.chunk, price.waits)))
        rows.append(f"| {price.feature} | {cells} | {price.remark} |")
    return "\n".join([*rows, "", report.headline(document), ""])


def page(text: str, results: Path = RESULTS) -> str:
    """docs/scale.md with that part written anew."""
    return marked.put(
        text, "features", section(json.loads(results.read_text()) if results.exists() else None)
    )


def _cell(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.2f}" if cost < 10 else f"{cost:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description="what each feature costs")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    arguments = parser.parse_args()
    found = uvloop.run(measure(500 if arguments.quick else 5000))
    print("\n".join(table(found)))
    report.RESULTS.mkdir(exist_ok=True)
    document = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "rounds": _ROUNDS,
        "quick": arguments.quick,
        "prices": [price._asdict() for price in found],
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
