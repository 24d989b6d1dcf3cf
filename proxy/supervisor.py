"""The front of all processes: binds the sockets, runs the workers, holds the admin listener.

With `workers: 1` the one worker is a `Server` in this process. With more, each is a process of its own that
accepts from the same listening socket (measured: 2 workers share 1,000 connections 51:49 to 55:45, and
nothing is lost when one dies; with SO_REUSEPORT what a closing listener had in its backlog is reset). Workers
are fresh interpreters, not forks: what they run is the code on disk.

A restart starts a second front with the same sockets (`handover`); when it serves, this one stops accepting,
drains, and reports its figures to the new one until it ends, so that no counter goes backwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog
from aiohttp import web

from proxy import __version__, accounting, admin, config, footprint, listen, systemd
from proxy.admin_keys import AdminKeys
from proxy.control import ControlError
from proxy.crew import Crew
from proxy.downstream import Limits, Runner
from proxy.errors import OperationError, StartError
from proxy.handover import Heir, Inheritance, inherited, take_over
from proxy.keeper import Keeper
from proxy.ledger import Ledger
from proxy.ledger_read import LedgerFailed
from proxy.live_page import LivePage
from proxy.log import RequestLog, Sink
from proxy.metrics import Metrics, Snapshot
from proxy.server import Server, show_depths
from proxy.shared import Shared
from proxy.slots import WaitingRoom
from proxy.spend_page import SpendPage
from proxy.sqlitefile import path_of
from proxy.state import memory
from proxy.stores import Stores
from proxy.tasks import spawn
from proxy.workers import LocalWorker, RemoteWorker, Worker, encode_settings
from proxy.yamlstruct import ConfigError

_ADMIN_CONNECTIONS = 100
#: Seconds after the deadline at which a worker ends its drain by itself, should nobody tell it to.
_BACKSTOP_S = 1.0


class Front:
    """See the module's docstring. `load` reads the configuration again, for a reload;
    `environ` is what a new generation is started with."""

    def __init__(
        self,
        settings: config.Config,
        load: Callable[[], config.Config],
        sink: Sink,
        request_log: RequestLog,
        *,
        push: bool,
        environ: MutableMapping[str, str] | None = None,
    ) -> None:
        self.settings = settings
        self._environ = {} if environ is None else environ
        self.port = 0
        self.admin_port = 0
        self.draining = False
        self._load = load
        self._sink = sink
        self._request_log = request_log
        self._push = push
        self._metrics = Metrics(__version__)  # the front's own, and what the dead have counted
        self._metrics.start_time.set((), time.time())
        self._ledger = Ledger(path_of(settings.ledger.database), settings.ledger.keep_days)
        self._crew = Crew()
        self._heir = Heir(_AsWorker(self), self._leave_admin)
        self._shared: Shared | None = None
        self._stores: Stores | None = None
        self._room: WaitingRoom | None = None
        self._listener: socket.socket | None = None
        self._admin_socket: socket.socket | None = None
        self._admin_runner: Runner | None = None
        self._guest = False  # started by a restart and not yet serving: the paths are another's
        self._restarting = False
        self._reloading = asyncio.Lock()  # a worker can prepare one configuration at a time
        self._gone_from_admin = False
        self._live = LivePage(self, lambda: self.settings)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._drain_s = settings.drain
        self._keepers: list[Keeper] = []

    # ── start ────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> bool:
        """Binds or inherits the sockets, starts workers and the admin listener; True: inherited. Raises
        StartError."""
        self._sink.attach(asyncio.get_running_loop())
        inheritance = inherited(self._environ)
        self._take_sockets(inheritance)
        app = self._admin_app()
        await self._ledger.start()
        await self._rebuild_budgets()
        await self._start_workers()
        assert self._admin_socket is not None
        if inheritance is not None:  # first: one page without the elder's figures would be too many
            await take_over(inheritance.channel, self._crew, self._metrics)
            self._guest = False
        self._admin_runner = Runner(  # ours, because aiohttp's parser quotes what it refuses: the token
            app,
            Limits(_ADMIN_CONNECTIONS, self.settings.timeouts.header, self.settings.timeouts.write),
            lambda *_: None,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=1,
        )
        await self._admin_runner.setup()
        await web.SockSite(self._admin_runner, self._admin_socket).start()
        return inheritance is not None

    def _take_sockets(self, inheritance: Inheritance | None) -> None:
        """Binds or inherits them, and the shared counters."""
        settings, workers = self.settings, self.settings.worker_count
        if inheritance is None:
            self._shared = Shared.fresh(workers)
            given = systemd.activated(self._environ)
            self._listener = listen.given_or_bind(given.data, settings.listen_address, "listen")
            self._admin_socket = listen.given_or_bind(given.admin, settings.admin_address, "admin")
        else:
            self._guest = True
            self._shared = Shared.inherited(inheritance.counters, workers)
            self._listener = listen.keep_or_bind(inheritance.listener, settings.listen_address)
            self._admin_socket = listen.keep_or_bind(inheritance.admin, settings.admin_address)
        self.port, self.admin_port = listen.port_of(self._listener), listen.port_of(self._admin_socket)

    async def _rebuild_budgets(self) -> None:
        """Those of this machine; a store of several machines keeps its own. Raises StartError."""
        assert self._shared is not None
        if not self._shared.new:
            return
        owner = self._shared.owner(0)
        counters = memory.attach(owner.fd, owner.number)
        try:
            await accounting.rebuild(counters, path_of(self.settings.ledger.database), time.time())
        except LedgerFailed as error:
            raise StartError(str(error)) from None
        finally:
            await counters.close()

    async def _start_workers(self) -> None:
        assert self._listener is not None
        assert self._shared is not None
        if self.settings.worker_count == 1:
            owner = self._shared.owner(0)
            server = Server(
                self.settings,
                self._sink,
                self._request_log,
                owner,
                push=self._push,
                ledger=self._ledger,
            )
            self._crew.workers.append(LocalWorker(server))
            await server.start(self._listener)
            return
        self._room = self._open_room()
        for number in range(self.settings.worker_count):
            inherits = (self._listener.fileno(), self._shared.fd)
            keeper = Keeper(number, inherits, self._greet, self._joined, self._left, self._connect)
            self._keepers.append(keeper)
            spawn(keeper.run(), f"keep worker {number}")
        await asyncio.gather(*(keeper.serving for keeper in self._keepers))

    def _open_room(self) -> WaitingRoom:
        """One for all workers. Raises StartError."""
        assert self._shared is not None
        limits, metrics = self.settings.limits, self._metrics
        self._stores = stores = Stores(limits, self._shared.owner(0), lambda _: None)
        stores.start()
        return WaitingRoom(
            stores.state,
            limits.queue.max_waiting,
            limits.queue.max_wait,
            waited=lambda plan, seconds: metrics.queue_wait.observe((plan,), seconds),
        )

    async def _connect(self, worker: RemoteWorker, sock: socket.socket) -> None:
        await worker.connect(sock, self._room, self._ledger)

    def _greet(self, worker: RemoteWorker) -> None:
        assert worker.channel is not None
        worker.settings = self.settings
        assert self._shared is not None
        owner = self._shared.owner(1 + worker.number).number
        worker.channel.note("settings", [encode_settings(self.settings), self._push, owner])

    def _joined(self, worker: RemoteWorker) -> None:
        self._crew.workers.append(worker)
        if worker.settings is not self.settings:  # a reload came while it started
            spawn(self._catch_up(worker), "catch up with a reload")

    async def _catch_up(self, worker: RemoteWorker) -> None:
        try:
            async with self._reloading:
                await worker.prepare(self.settings)
                await worker.commit()
        except ControlError:
            self._give_up(worker)

    def _give_up(self, worker: Worker) -> None:
        """A worker that cannot follow the others is replaced by one that starts with the new settings."""
        if isinstance(worker, RemoteWorker):
            structlog.get_logger().error("worker_out_of_step", pid=worker.pid)
            os.kill(worker.pid, signal.SIGKILL)

    def _left(self, worker: RemoteWorker) -> None:
        """A worker's process has ended: what it has counted stays counted."""
        self._crew.workers.remove(worker)
        self._metrics.absorb(worker.last, levels=False)
        if not self.draining:
            self._metrics.workers_replaced.add()

    def _admin_app(self) -> web.Application:
        address, token = self.settings.admin_address, self.settings.admin_token
        if not address.loopback and token is None:
            raise StartError("admin: this address is not loopback, so `admin_token` has to be set")
        keys, spend = AdminKeys(lambda: self.settings), SpendPage(lambda: self.settings)
        parts: list[admin.Part] = [keys, spend, self._live]
        app = admin.make_app(self, parts, token=None if address.loopback else token)
        app.on_response_prepare.append(self._close_behind)
        return app

    # ── what the admin listener asks ─────────────────────────────────────────────────────────────────────

    def ready(self) -> bool:
        return not self.draining and bool(self._crew.workers)

    async def state(self) -> dict[str, Any]:
        state = await self._crew.state()
        if self._room is not None:  # the workers' rows come here; with one worker it is its own ledger
            state["ledger_pending"] = state.get("ledger_pending", 0) + self._ledger.pending
        return {**state, "draining": self.draining}

    async def page(self) -> Metrics:
        """The metrics of all workers, living and dead."""
        total = Metrics(__version__)
        if self._room is not None:
            show_depths(self._metrics, self.settings, self._room.depths())
            total.ledger_pending.add((), self._ledger.pending)
            total.ledger_dropped.add((), self._ledger.dropped)
            footprint.show(total)  # with one worker this process is shown by its server
        total.absorb(self._metrics.snapshot(), levels=True)
        for snapshot in await self._crew.snapshots():
            total.absorb(snapshot, levels=True)
        return total

    async def figures(self) -> Snapshot:
        return (await self.page()).snapshot()

    async def streams(self) -> list[dict[str, Any]]:
        return await self._crew.streams()

    async def kill(self, stream_id: str) -> bool:
        return await self._crew.kill(stream_id)

    # ── reload ───────────────────────────────────────────────────────────────────────────────────────────

    async def reload(self) -> None:
        """All workers change to the configuration on disk, or none does. Raises ConfigError or StartError."""
        try:
            async with self._reloading:
                await self._reload()
        except (ConfigError, StartError) as error:
            self._metrics.config_reloads.add(("error",))
            structlog.get_logger().error("reload_failed", why=str(error))
            raise
        self._metrics.config_reloads.add(("ok",))
        structlog.get_logger().info("reloaded", configuration=self.settings.source)

    async def _reload(self) -> None:
        settings = self._load()
        config.check_fixed(self.settings, settings)
        workers = await self._crew.prepare(settings)
        if self._room is not None:
            queue = settings.limits.queue
            self._room.max_waiting, self._room.max_wait_s = queue.max_waiting, queue.max_wait
        self.settings = settings  # a worker that dies now comes back with the new one
        self._drain_s = settings.drain
        self._ledger.keep_days = settings.ledger.keep_days
        await self._crew.commit(workers, self._give_up)

    # ── restart ──────────────────────────────────────────────────────────────────────────────────────────

    async def restart(self) -> int:
        """Starts a new generation on the same sockets; returns its pid once it serves. Then this one drains
        for up to the longest `timeouts.total`. Raises StartError, and nothing has changed."""
        if self._restarting or self.draining:
            raise StartError("a restart or a drain is already under way")
        self._restarting = True
        try:
            assert self._listener is not None
            assert self._admin_socket is not None
            assert self._shared is not None
            sockets = [self._listener, self._admin_socket]
            pid = await self._heir.start(sockets, self._shared, self._environ)
        finally:
            self._restarting = False
        systemd.notify(self._environ, f"MAINPID={pid}")  # or the end of this process would be the service's
        self._drain_s = max(up.timeouts.total for up in self.settings.upstreams.values())
        self._stop.set()
        return pid

    async def _leave_admin(self) -> None:
        """The new generation answers there now: kept connections end, or their scraper would stay with us."""
        self._gone_from_admin = True
        await self._live.end()
        if self._admin_runner is None:
            return
        for site in list(self._admin_runner.sites):
            await site.stop()
        if self._admin_runner.listener is not None:
            self._admin_runner.listener.close_idle(fresh=False)

    async def _close_behind(self, _: web.Request, response: web.StreamResponse) -> None:
        if self._gone_from_admin:
            response.force_close()

    # ── the life of the process ──────────────────────────────────────────────────────────────────────────

    async def run(self, announce: Callable[[Front], None]) -> None:
        """Until SIGTERM, SIGINT or a restart; a second SIGTERM ends the drain at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_terminate)
        loop.add_signal_handler(signal.SIGHUP, lambda: spawn(self._quietly(self.reload()), "reload"))
        loop.add_signal_handler(signal.SIGUSR2, lambda: spawn(self._quietly(self.restart()), "restart"))
        try:
            heir = await self.start()
            announce(self)
            footprint.settle_collector()
            if not heir:  # the generation before has said who is next
                systemd.notify(self._environ, "READY=1")
            await self._stop.wait()
            if not self._heir.exists:
                systemd.notify(self._environ, "STOPPING=1")
            await self.drain()
        finally:
            await self.close()

    def _on_terminate(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _quietly(self, work: Awaitable[Any]) -> None:
        """A signal has nobody to tell: the log line is the answer."""
        try:
            await work
        except (ConfigError, OperationError) as error:
            structlog.get_logger().error("signal_refused", why=str(error))

    async def drain(self) -> None:
        """Readiness 503, no new connections, running requests to their end or to the deadline."""
        self.draining = True
        for keeper in self._keepers:
            keeper.stop()
        ending = spawn(self._end_drain(), "end the drain")
        await self._crew.drain(self._drain_s + _BACKSTOP_S)
        await self._crew.until_elders_gone(self._drain_s, self._hurry)
        ending.cancel()

    async def _end_drain(self) -> None:
        """At the deadline, or at once when hurried. The room closes first: a slot that one worker gives back
        now would send another's waiter to an upstream for nothing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await self._hurry.wait()
        if self._room is not None:
            await self._room.close()
        await self._crew.hurry()

    async def close(self) -> None:
        """Ends everything; the figures go to the new generation if there is one."""
        self.draining = True
        if self._heir.exists:
            await self._heir.bequeath(await self.figures())
        for worker in list(self._crew.workers):
            await worker.close()
        for keeper in self._keepers:
            keeper.terminate()
        await self._ledger.close()  # the workers have handed over what they had
        await self._live.end()
        if self._admin_runner is not None:
            await self._admin_runner.cleanup()
        if self._room is not None:
            await self._room.close()
        if self._stores is not None:
            await self._stores.close()
        keep_path = self._heir.exists or self._guest or systemd.owns_paths(self._environ)
        for sock, address in (
            (self._listener, self.settings.listen_address),
            (self._admin_socket, self.settings.admin_address),
        ):
            listen.close(sock, address, keep_path=keep_path)
        if self._shared is not None:
            self._shared.close()
        self._sink.attach(None)

    # ── what a person reads ──────────────────────────────────────────────────────────────────────────────

    def address(self) -> str:
        """The data listener as a URL."""
        return listen.url(self.settings.listen_address, self.port, "https" if self.settings.tls else "http")

    def admin_address(self) -> str:
        return listen.url(self.settings.admin_address, self.admin_port, "http")


class _AsWorker(LocalWorker):
    """A whole front, seen as one worker by the generation after it."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def state(self) -> dict[str, int]:
        state = await self._front.state()
        return {name: value for name, value in state.items() if not isinstance(value, bool)}

    async def snapshot(self) -> Snapshot:
        return await self._front.figures()

    async def streams(self) -> list[dict[str, Any]]:
        return await self._front.streams()

    async def kill(self, stream_id: str) -> bool:
        return await self._front.kill(stream_id)
