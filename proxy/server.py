"""The data plane of one process: upstreams, the data listener, running requests.

`Server` is what a worker is; `supervisor.py` runs one in its own process or several as processes of theirs.
This module and `supervisor.py` are the only ones that construct the others' objects.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from aiohttp import web

from proxy import __version__, config, handlers, headers, schema, wire
from proxy.admission import OPEN_PLAN, Admission
from proxy.authenticator import Authenticator
from proxy.context import CONTEXT, CORE, Context, Phase
from proxy.core import Core
from proxy.downstream import LINGER_S, Limits, Runner
from proxy.errors import HeadraceError, Reason, StartError
from proxy.footprint import Footprint, open_files
from proxy.intake import no_expectation
from proxy.ledger_row import RowSink
from proxy.listen import BACKLOG
from proxy.log import RequestLog, Sink, refusal_line
from proxy.metrics import Metrics, Snapshot
from proxy.middleware import entrance
from proxy.middleware.cors import attach
from proxy.permit import Slots
from proxy.ready import fields_of_all
from proxy.retry import RetryBudget
from proxy.shared import Owner
from proxy.slots import WaitingRoom
from proxy.stores import Stores
from proxy.targets import Targets
from proxy.tasks import spawn
from proxy.upstream import Upstream

if TYPE_CHECKING:
    from proxy.mock import RunningMock

_LAG_EVERY_S = 0.5
#: After the drain's end: for error events to be flushed and lines to be written.
_LAST_WORDS_S = 1.0
#: During drain: for the first request of a connection that has just been accepted.
_FRESH_S = 1.0
#: Descriptors that are neither a caller's nor an upstream's connection: log, listeners, loop, databases.
_SPARE_DESCRIPTORS = 32


class Server:
    """One process that serves. `settings` may be replaced while it runs (`prepare`, `commit`)."""

    def __init__(
        self,
        settings: config.Config,
        sink: Sink,
        request_log: RequestLog,
        owner: Owner,
        *,
        push: bool,
        ledger: RowSink,
    ) -> None:
        self._sink = sink
        self._owner = owner
        self._push = push
        self._stores: Stores | None = None
        self._room: WaitingRoom | None = None
        self._runner: Runner | None = None
        self._tls: ssl.SSLContext | None = None
        self._mock: RunningMock | None = None
        self._lag: asyncio.Task[None] | None = None
        self._prepared: Prepared | None = None
        self._accepting: asyncio.Server | None = None
        self.metrics = Metrics(__version__)
        self._footprint = Footprint(self.metrics)
        self.core = Core(settings, {}, self.metrics, request_log, time.time())
        self.core.ledger = ledger

    # ── start ────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, listener: socket.socket, make_slots: MakeSlots | None = None) -> None:
        """Serves what arrives at `listener` (bound and listening). Raises StartError.

        make_slots: the way to the waiting room, if that is in another process.
        """
        settings = self.core.config
        loop = asyncio.get_running_loop()
        self._sink.attach(loop)
        if self._push and (why := wire.self_check(loop)) is not None:
            structlog.get_logger().warning("push_path_disabled", why=why)
            self._push = False
        await self._start_admission(settings, make_slots)
        self._use(settings, await self._make_upstreams(settings))
        self._tls = _tls(settings)
        self._runner = Runner(
            self._app(),
            Limits(connections_that_fit(settings), settings.timeouts.header, settings.timeouts.write),
            self._refused,
            handler_cancellation=True,  # aiohttp's default only notices a leaving caller at the next write
            keepalive_timeout=settings.timeouts.keepalive,
            access_log=None,
            auto_decompress=False,
            lingering_time=LINGER_S,
            max_line_size=8190,
            max_field_size=16384,
        )
        await self._runner.setup()
        # Not a SockSite: a caller that never finishes its TLS handshake has to be timed as well.
        assert self._runner.server is not None
        self._accepting = await loop.create_server(
            self._runner.server,
            sock=listener,
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=settings.timeouts.header if self._tls else None,
        )
        self._lag = spawn(self._measure_lag(), "event loop lag")
        self._footprint.start()

    async def _start_admission(self, settings: config.Config, make_slots: MakeSlots | None) -> None:
        limits = settings.limits
        self._stores = stores = Stores(limits, self._owner, self._store_changed)
        stores.start()
        if make_slots is not None:
            slots = make_slots(stores)
        else:
            queue = limits.queue
            slots = self._room = WaitingRoom(
                stores.state,
                queue.max_waiting,
                queue.max_wait,
                waited=self.waited,
            )
        self.core.admission = Admission(limits, stores, slots, self.metrics)
        self.core.authenticator = await _make_authenticator(settings)

    def _store_changed(self, up: bool) -> None:
        self.metrics.state_store_up.set((), 1 if up else 0)

    def waited(self, plan: str, seconds: float) -> None:
        """A request has waited for its slots."""
        self.metrics.queue_wait.observe((plan,), seconds)

    async def _make_upstreams(self, settings: config.Config) -> dict[str, Upstream]:
        """Those whose settings have not changed are kept, with their connections."""
        if self._mock is None and any(up.base_url == schema.MOCK_URL for up in settings.upstreams.values()):
            from proxy import mock  # nothing that serves real upstreams needs it

            self._mock = await mock.start()
        made: dict[str, Upstream] = {}
        for name, entry in settings.upstreams.items():
            kept = self.core.upstreams.get(name)
            if kept is not None and kept.settings == entry:
                made[name] = kept
                continue
            url = self._mock.url if self._mock and entry.base_url == schema.MOCK_URL else entry.base_url
            made[name] = Upstream(name, entry, url, push=self._push)
        return made

    def _use(self, settings: config.Config, upstreams: dict[str, Upstream]) -> None:
        core = self.core
        if settings.retry != core.config.retry:
            core.retry_budget = RetryBudget(settings.retry.budget)
        core.config, core.upstreams = settings, upstreams
        core.targets = Targets(settings, upstreams)
        for upstream in upstreams.values():
            upstream.start()

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[entrance(self.core)])
        app[CORE] = self.core
        route = app.router.add_route("*", "/{path:.*}", handlers.dispatch, expect_handler=no_expectation)
        # What these receivers add to usual answers, `ready` has to know as well.
        app.on_response_prepare.append(self._on_prepare)
        attach(app, route)
        return app

    async def _on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """The fields that every answer of the data listener carries."""
        fields = response.headers
        fields["Server"] = "headrace"  # aiohttp's own would tell its version
        ctx = request.get(CONTEXT)
        if ctx is not None:
            fields.update(headers.pairs(fields_of_all(ctx)))
        if response.status != 101 and (self.core.draining or "Upgrade" in request.headers):
            # aiohttp answers nothing behind a declined upgrade (measured): such a connection ends as well.
            response.force_close()
            fields["Connection"] = "close"

    # ── while it runs ────────────────────────────────────────────────────────────────────────────────────

    def _refused(self, error: HeadraceError, request_id: str, peer: str) -> None:
        """What never reached the chain is counted and logged like everything else."""
        self.metrics.requests.add(("other", "none", "none", str(error.status), error.reason.value))
        self.core.request_log.write(refusal_line(error.status, error.code, error.reason, request_id, peer))

    def snapshot(self) -> Snapshot:
        """All metrics as plain data; levels that nobody has to keep up to date are read now."""
        metrics = self.metrics
        self._show_upstreams()
        metrics.show_in_flight(ctx.route for ctx in self.core.running)
        metrics.log_dropped.values[()] = self._sink.dropped
        metrics.show_ledger(self.core.ledger)
        metrics.workers.set((), 1)
        self._footprint.show()
        if self._room is not None:
            show_depths(metrics, self.core.config, self._room.depths())
        return metrics.snapshot()

    def _show_upstreams(self) -> None:
        metrics, now = self.metrics, time.monotonic()
        for gauge in (metrics.upstream_in_flight, metrics.upstream_available, metrics.breaker_state):
            gauge.values.clear()
        for name, upstream in self.core.upstreams.items():
            metrics.upstream_in_flight.set((name,), upstream.in_flight)
            metrics.upstream_available.set((name,), 1 if upstream.available(now) else 0)
            metrics.breaker_state.set((name,), upstream.breaker.state)

    def state(self) -> dict[str, int]:
        """What must be zero when nothing is going on, and what it costs."""
        running = self.core.running
        counts = [upstream.connections() for upstream in self.core.upstreams.values()]
        return {
            "in_flight": len(running),
            "streams": sum(1 for ctx in running if ctx.streaming),
            "permits": sum(upstream.in_flight for upstream in self.core.upstreams.values()),
            "queued": sum(ctx.phase is Phase.QUEUE for ctx in running),
            "reservations": self.core.admission.reserved,
            "buffered_bytes": self.core.bodies.held,
            "upstream_connections": sum(used for used, _ in counts),
            "upstream_idle": sum(idle for _, idle in counts),
            "ledger_pending": self.core.ledger.pending,
            "tasks": len(asyncio.all_tasks()),
            "fds": open_files(),
            "workers": 1,
        }

    def streams(self) -> list[dict[str, Any]]:
        """The requests that run now, oldest first."""
        now = time.monotonic()
        return [ctx.describe(now) for ctx in sorted(self.core.running, key=_age)]

    def kill(self, stream_id: str) -> bool:
        for ctx in self.core.running:
            if ctx.stream_id == stream_id:
                ctx.stop(Reason.KILLED)
                return True
        return False

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self.metrics.event_loop_lag.observe((), max(0.0, time.monotonic() - due))

    # ── reload ───────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self, settings: config.Config) -> None:
        """Builds everything that the new settings need; nothing changes before `commit`."""
        await self.discard()
        _tls(settings)  # what can fail must fail here: `commit` cannot
        limits = Limits(connections_that_fit(settings), settings.timeouts.header, settings.timeouts.write)
        authenticator = self.core.authenticator
        if settings.auth != self.core.config.auth:
            authenticator = await _make_authenticator(settings)
        self._prepared = Prepared(settings, await self._make_upstreams(settings), limits, authenticator)

    async def discard(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        await _close_all(up for up in prepared.upstreams.values() if up not in self._current())
        if prepared.authenticator not in (None, self.core.authenticator):
            await prepared.authenticator.close()

    def commit(self) -> None:
        """From now on new requests use the new settings; running ones keep the upstream that they have."""
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        settings, upstreams, limits = prepared.settings, prepared.upstreams, prepared.limits
        replaced = [old for old in self._current() if old not in upstreams.values()]
        self._use(settings, upstreams)
        self._change_admission(prepared)
        self.core.bodies.limit = settings.max_buffered_bytes
        if self._runner is not None and self._runner.listener is not None:
            self._runner.listener.limits = limits
        if self._tls is not None and settings.tls is not None:
            self._tls.load_cert_chain(settings.tls.cert, settings.tls.key)  # for new handshakes
        for upstream in replaced:
            spawn(_close_when_idle(upstream), f"close upstream {upstream.name}")

    def _change_admission(self, prepared: Prepared) -> None:
        core, limits = self.core, prepared.settings.limits
        core.admission.limits = limits
        if self._room is not None:
            self._room.max_waiting, self._room.max_wait_s = limits.queue.max_waiting, limits.queue.max_wait
        before, core.authenticator = core.authenticator, prepared.authenticator
        if core.authenticator is not None:
            core.authenticator.plans = prepared.settings.plans
        if before is not None and before is not core.authenticator:
            spawn(before.close(), "close the old key store")

    def _current(self) -> list[Upstream]:
        return list(self.core.upstreams.values())

    # ── stop ─────────────────────────────────────────────────────────────────────────────────────────────

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> None:
        """Stops accepting, lets running requests finish for `limit_s` seconds (or until `hurry`), then ends
        them visibly."""
        self.core.draining = True
        structlog.get_logger().info("draining", in_flight=len(self.core.running))
        self._end_without_caller()
        if self._accepting is not None:
            self._accepting.close()
        if self._runner is not None and self._runner.listener is not None:
            self._runner.listener.close_idle(fresh=False)
        await self._until_none_fresh(min(limit_s, _FRESH_S), hurry)
        self.core.refusing = True
        await self._until_idle(limit_s, hurry)
        for ctx in list(self.core.running):
            ctx.stop(Reason.DRAINED)
        await self._until_idle(_LAST_WORDS_S, None)

    def _end_without_caller(self) -> None:
        """A shutdown waits for callers, not for the usage of those who have left."""
        for ctx in self.core.running:
            if ctx.left_at is not None:
                ctx.stop(Reason.DRAINED)

    async def _until_none_fresh(self, limit_s: float, hurry: asyncio.Event) -> None:
        """Whoever was accepted before the listener closed has been promised an answer: no other process will
        see this connection."""
        listener = self._runner.listener if self._runner is not None else None
        give_up_at = time.monotonic() + limit_s
        await asyncio.sleep(0.01)  # uvloop makes the last connections after their accept
        while (  # noqa: ASYNC110 - once in a process's life
            listener is not None
            and listener.has_fresh()
            and time.monotonic() < give_up_at
            and not hurry.is_set()
        ):
            await asyncio.sleep(0.01)
        if listener is not None:
            listener.close_idle(fresh=True)

    async def _until_idle(self, limit_s: float, hurry: asyncio.Event | None) -> None:
        give_up_at = time.monotonic() + limit_s
        # Looking is done once in a process's life; an event would have to be kept by every request.
        while (  # noqa: ASYNC110 - once in a process's life
            self.core.running and time.monotonic() < give_up_at and not (hurry and hurry.is_set())
        ):
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Closes the listener, the upstreams, the mock."""
        self._footprint.stop()
        if self._lag is not None:
            self._lag.cancel()
        if self._accepting is not None:
            self._accepting.close()
        self._end_without_caller()
        if self._runner is not None:
            await self._runner.cleanup()
        await self.discard()
        await _close_all(self._current())
        if self._room is not None:
            await self._room.close()
        if self.core.authenticator is not None:
            await self.core.authenticator.close()
        if self._stores is not None:
            await self._stores.close()
        if self._mock is not None:
            await self._mock.close()


class Prepared(NamedTuple):
    """What a reload has built and not yet put to use."""

    settings: config.Config
    upstreams: dict[str, Upstream]
    limits: Limits
    authenticator: Authenticator | None


#: From this process's stores to the waiting room of another.
MakeSlots = Callable[[Stores], Slots]


def show_depths(metrics: Metrics, settings: config.Config, depths: Mapping[str, int]) -> None:
    """Plans without anybody waiting are 0, not missing; one that a reload has removed may still have some."""
    metrics.queue_depth.values.clear()
    for plan in (OPEN_PLAN, *settings.plans, *depths):
        metrics.queue_depth.set((plan,), depths.get(plan, 0))


async def _make_authenticator(settings: config.Config) -> Authenticator | None:
    """None: open mode, everybody may call. Raises StartError."""
    if settings.auth.mode == "open":
        return None
    made = Authenticator(settings.auth, settings.plans)
    try:
        await made.start(time.time())
    except BaseException:
        await made.close()
        raise
    return made


def _age(ctx: Context) -> float:
    return ctx.started_at


async def _close_all(upstreams: Any) -> None:
    for upstream in upstreams:
        await upstream.close()


async def _close_when_idle(upstream: Upstream) -> None:
    """A replaced upstream lives as long as its last request."""
    while upstream.users:  # noqa: ASYNC110 - once a reload; an event would have to be kept per request
        await asyncio.sleep(0.1)
    await upstream.close()


def _tls(settings: config.Config) -> ssl.SSLContext | None:
    if settings.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls.cert, settings.tls.key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"tls: the certificate cannot be loaded: {error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def connections_that_fit(settings: config.Config) -> int:
    """This process's share of `max_connections`; the soft limit of descriptors is raised to fit it, or the
    cap is lowered to fit the hard limit. A stream takes two descriptors; the embedded mock's end takes one
    more, which counts only where they are short."""
    wanted = -(-settings.max_connections // settings.worker_count)
    embedded = any(entry.base_url == schema.MOCK_URL for entry in settings.upstreams.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * wanted + _SPARE_DESCRIPTORS
    if soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= need:
        return wanted
    fits = max(1, (soft - _SPARE_DESCRIPTORS) // (3 if embedded else 2))
    if settings.written_max_connections:
        raise StartError(
            f"max_connections: {settings.max_connections} need {need} file descriptors, the limit is {soft}: "
            f"raise it (ulimit -n, LimitNOFILE=) or write {fits * settings.worker_count}"
        )
    structlog.get_logger().warning("max_connections_lowered", to=fits, file_descriptors=soft)
    return fits
