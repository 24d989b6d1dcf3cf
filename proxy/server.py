"""Builds everything once, listens, drains. The only module that constructs the others' objects."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import ssl
import time
from typing import Any

import structlog
from aiohttp import web

from proxy import __version__, admin, config, handlers, mock, wire
from proxy.address import Address
from proxy.context import CONTEXT, CORE
from proxy.core import Core
from proxy.downstream import LINGER_S, Limits, Runner
from proxy.errors import HeadraceError, Reason
from proxy.intake import no_expectation
from proxy.log import RequestLine, RequestLog, Sink, timestamp
from proxy.metrics import Counter, Histogram, Metrics
from proxy.middleware import CHAIN
from proxy.tasks import spawn
from proxy.upstream import Upstream

_BACKLOG = 4096
_LAG_EVERY_S = 0.5
#: After the drain's end: for error events to be flushed and lines to be written.
_LAST_WORDS_S = 1.0


class StartError(Exception):
    """The server cannot start; the text is one line that names the fix."""


class Server:
    """One process: data listener, admin listener, upstreams."""

    def __init__(self, settings: config.Config, sink: Sink, request_log: RequestLog, *, push: bool) -> None:
        self._settings = settings
        self._sink = sink
        self._request_log = request_log
        self._push = push
        self._runners: list[web.BaseRunner] = []
        self._data: Runner | None = None
        self._mock: mock.RunningMock | None = None
        self.metrics = Metrics(__version__)
        self.core: Core | None = None
        self.port = 0
        self.admin_port = 0

    # ── start ────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        self._sink.attach(loop)
        if self._push and (why := wire.self_check(loop)) is not None:
            structlog.get_logger().warning("push_path_disabled", why=why)
            self._push = False
        if any(entry.base_url == config.MOCK_URL for entry in settings.upstreams.values()):
            self._mock = await mock.start()
        upstreams = {
            name: Upstream(name, entry, self._real_url(entry.base_url), push=self._push)
            for name, entry in settings.upstreams.items()
        }
        self.core = Core(settings, upstreams, self.metrics, self._request_log, time.time())
        self._data = Runner(
            self._data_app(self.core),
            Limits(_fit_connections(settings), settings.timeouts.header),
            self._refused,
            handler_cancellation=True,  # aiohttp's default only notices a leaving caller at the next write
            keepalive_timeout=settings.timeouts.keepalive,
            access_log=None,
            auto_decompress=False,
            lingering_time=LINGER_S,
            max_line_size=8190,
            max_field_size=16384,
        )
        self.port = await self._listen(self._data, settings.listen_address, _tls(settings))
        admin_runner = web.AppRunner(self._admin_app(), access_log=None, handler_cancellation=True)
        self.admin_port = await self._listen(admin_runner, settings.admin_address, None)
        spawn(self._measure_lag(), "event loop lag")

    def _real_url(self, base_url: str) -> str:
        if base_url != config.MOCK_URL:
            return base_url
        assert self._mock is not None
        return self._mock.url

    def _data_app(self, core: Core) -> web.Application:
        app = web.Application(middlewares=CHAIN)
        app[CORE] = core
        app.router.add_route("*", "/{path:.*}", handlers.dispatch, expect_handler=no_expectation)
        app.on_response_prepare.append(self._on_prepare)
        return app

    async def _on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """The fields that every answer of the data listener carries."""
        fields = response.headers
        fields["Server"] = "headrace"  # aiohttp's own would tell its version
        ctx = request.get(CONTEXT)
        if ctx is not None:
            fields["x-request-id"] = fields["request-id"] = ctx.request_id
        if self.core is not None and self.core.draining:
            response.force_close()
            fields["Connection"] = "close"

    def _admin_app(self) -> web.Application:
        address = self._settings.admin_address
        token = self._settings.admin_token
        if not address.loopback and token is None:
            raise StartError("admin: this address is not loopback, so `admin_token` has to be set")
        return admin.make_app(
            state=self.state,
            metrics=self._scrape,
            ready=lambda: self.core is not None and not self.core.draining,
            token=None if address.loopback else token,
        )

    async def _listen(self, runner: web.AppRunner, address: Address, tls: ssl.SSLContext | None) -> int:
        """Returns the port (0 for a unix socket)."""
        self._runners.append(runner)
        await runner.setup()
        try:
            if address.unix_path is not None:
                _unlink_stale(address.unix_path)
                await web.UnixSite(runner, address.unix_path, backlog=_BACKLOG, ssl_context=tls).start()
                return 0
            site = web.TCPSite(runner, address.host or None, address.port, backlog=_BACKLOG, ssl_context=tls)
            await site.start()
        except OSError as error:
            raise StartError(_why_not(address, error)) from error
        return int(runner.addresses[0][1])

    def banner(self) -> str:
        """What a newcomer needs first."""
        settings = self._settings
        base = self.address()
        names = list(settings.models)
        model = next(
            (name for name in names if "*" not in name and "?" not in name), names[0] if names else ""
        )
        body = f'{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'
        unix = settings.listen_address.unix_path
        flag = f"--unix-socket {unix} " if unix else ""
        return "\n".join(
            [
                f"headrace {__version__}, configuration: {settings.source}",
                f"  data   {base}/v1",
                f"  admin  {self._admin_url()}/metrics",
                f"  models {', '.join(names)}",
                "",
                f"  curl -N {flag}{base}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
                "",
            ]
        )

    def address(self) -> str:
        """The data listener as a URL."""
        return _url(self._settings.listen_address, self.port, "https" if self._settings.tls else "http")

    def _admin_url(self) -> str:
        return _url(self._settings.admin_address, self.admin_port, "http")

    # ── while it runs ────────────────────────────────────────────────────────────────────────────────────

    def _refused(self, error: HeadraceError, request_id: str, peer: str) -> None:
        """What never reached the chain is counted and logged like everything else."""
        self.metrics.requests.add(("other", "none", "none", str(error.status), error.reason.value))
        self._request_log.write(_refusal_line(error, request_id, peer))

    def _scrape(self) -> list[Counter | Histogram]:
        """Levels that nobody has to keep up to date are read now."""
        assert self.core is not None
        metrics = self.metrics
        for name, upstream in self.core.upstreams.items():
            metrics.upstream_in_flight.set((name,), upstream.in_flight)
        metrics.log_dropped.values[()] = self._sink.dropped
        return list(metrics)

    def state(self) -> dict[str, Any]:
        """`/debug/state`: what must be zero when nothing is going on, and what it costs."""
        assert self.core is not None
        used, idle = zip(*(upstream.connections() for upstream in self.core.upstreams.values()), strict=True)
        return {
            "in_flight": len(self.core.running),
            "streams": sum(1 for ctx in self.core.running if ctx.streaming),
            "permits": sum(upstream.in_flight for upstream in self.core.upstreams.values()),
            "queued": 0,
            "reservations": self.core.bodies.held,
            "upstream_connections": sum(used),
            "upstream_idle": sum(idle),
            "ledger_pending": 0,
            "tasks": len(asyncio.all_tasks()),
            "fds": admin.open_files(),
            "workers": 1,
            "draining": self.core.draining,
        }

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self.metrics.event_loop_lag.observe((), max(0.0, time.monotonic() - due))

    # ── stop ─────────────────────────────────────────────────────────────────────────────────────────────

    async def drain(self, hurry: asyncio.Event) -> None:
        """Stops accepting, lets running requests finish for `drain` seconds (or until `hurry`), then ends
        them visibly."""
        assert self.core is not None
        assert self._data is not None
        self.core.draining = True
        structlog.get_logger().info("draining", in_flight=len(self.core.running))
        for site in list(self._data.sites):
            await site.stop()
        if self._data.listener is not None:
            self._data.listener.close_idle()
        await self._until_idle(self._settings.drain, hurry)
        for ctx in list(self.core.running):
            ctx.stop(Reason.DRAINED)
        await self._until_idle(_LAST_WORDS_S, None)

    async def _until_idle(self, limit_s: float, hurry: asyncio.Event | None) -> None:
        assert self.core is not None
        give_up_at = time.monotonic() + limit_s
        # Looking is done once in a process's life; an event would have to be kept by every request.
        while (  # noqa: ASYNC110
            self.core.running and time.monotonic() < give_up_at and not (hurry and hurry.is_set())
        ):
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Closes listeners (the admin listener last), upstreams, the mock."""
        for runner in self._runners:
            await runner.cleanup()
        if self.core is not None:
            for upstream in self.core.upstreams.values():
                await upstream.close()
        if self._mock is not None:
            await self._mock.close()
        self._sink.attach(None)


async def serve(server: Server, announce: Any) -> None:
    """Runs until SIGTERM or SIGINT; a second one ends the drain at once."""
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await server.start()
        announce(server)
        await stop.wait()
        await server.drain(hurry)
    finally:
        await server.close()


def _url(address: Address, port: int, scheme: str) -> str:
    if address.unix_path is not None:
        return f"{scheme}://localhost"
    host = f"[{address.host}]" if ":" in address.host else address.host or "127.0.0.1"
    return f"{scheme}://{host}:{port}"


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


def _fit_connections(settings: config.Config) -> int:
    """Two descriptors a stream, and some for files: raises the soft limit, or lowers the cap."""
    wanted = settings.max_connections
    spare = 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * wanted + spare
    if soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fits = max(1, (soft - spare) // 2)
    if fits >= wanted:
        return wanted
    if settings.written_max_connections:
        raise StartError(
            f"max_connections: {wanted} need {need} file descriptors, the limit is {soft}: raise it "
            f"(ulimit -n, LimitNOFILE=) or write {fits}"
        )
    structlog.get_logger().warning("max_connections_lowered", to=fits, file_descriptors=soft)
    return fits


def _unlink_stale(path: str) -> None:
    """A socket file that nobody listens on is left from a crash."""
    if not os.path.exists(path):
        return
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.connect(path)
    except OSError:
        os.unlink(path)
    finally:
        probe.close()


def _why_not(address: Address, error: OSError) -> str:
    what = "is in use" if error.errno in (98, 48) else (os.strerror(error.errno or 0) or "cannot be used")
    return f"{address} {what}: choose another with --listen / --admin (or PORT=, ADMIN_PORT= for make run)"


def _refusal_line(error: HeadraceError, request_id: str, peer: str) -> RequestLine:
    return RequestLine(
        ts=timestamp(),
        level="info",
        event="request",
        request_id=request_id,
        key_id=None,
        plan=None,
        method="UNKNOWN",
        route="other",
        model=None,
        upstream=None,
        attempts=0,
        status=error.status,
        reason=error.reason.value,
        queue_ms=None,
        ttfb_ms=None,
        ttft_ms=None,
        duration_ms=0.0,
        chunks=0,
        bytes_in=0,
        bytes_out=0,
        prompt_tokens=None,
        completion_tokens=None,
        usage_source=None,
        cost_usd=None,
        client_ip=peer,
        error=error.code,
    )
