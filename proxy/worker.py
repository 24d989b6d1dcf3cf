"""A worker process: a `Server` at the other end of the supervisor's control channel."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import msgspec

from proxy import config, log
from proxy.control import Channel
from proxy.errors import StartError
from proxy.footprint import settle_collector
from proxy.ledger_link import LedgerLink
from proxy.permit import Direct
from proxy.server import Server
from proxy.shared import Owner
from proxy.slots_remote import RemoteRoom
from proxy.sqlitefile import path_of
from proxy.stores import Stores
from proxy.tasks import spawn
from proxy.workers import LocalWorker, answer_worker_verb

#: How often it says that its loop is alive, with its figures: what it had counted when it was killed is then
#: at most this old.
_SPEAK_EVERY_S = 1.0
#: For the supervisor, which says what to do about them: Ctrl-C and a closed terminal reach the whole process
#: group, `systemctl kill` every process of the unit, and whoever does not handle them ends.
_SUPERVISORS_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class WorkerProcess:
    """The settings come first over the channel; when the channel ends (the supervisor died), so does this."""

    def __init__(self) -> None:
        self._settings: asyncio.Future[tuple[config.Config, bool, int]] = (
            asyncio.get_running_loop().create_future()
        )
        self._stop: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._local: LocalWorker | None = None
        self._room: RemoteRoom | None = None

    async def run(self, control: socket.socket, listener: socket.socket, counters: int) -> None:
        channel = await Channel.open(control, self._answer, self._heard)
        channel.closed.add_done_callback(lambda _: self._end(0.0))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: self._end(None))
        for number in _SUPERVISORS_SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        first: list[asyncio.Future[Any]] = [self._settings, self._stop]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not self._settings.done():
            channel.close()  # the supervisor died, or changed its mind, before its first word
            return
        settings, push, owner = self._settings.result()
        sink, request_log = log.configure(
            path=settings.log.file, level=settings.log.level, text=settings.log.format == "text"
        )
        ledger = LedgerLink(channel, path_of(settings.ledger.database))
        server = Server(settings, sink, request_log, Owner(counters, owner), push=push, ledger=ledger)
        self._local = local = LocalWorker(server)
        try:
            await server.start(listener, lambda stores: self._make_room(channel, stores, settings))
        except (StartError, OSError) as error:
            channel.note("failed", str(error))
            channel.close()
            return
        channel.note("ready")
        settle_collector()
        speaking = spawn(self._speak(channel, server), "speak")
        limit_s = await self._stop
        await local.drain(settings.drain if limit_s is None else limit_s)
        speaking.cancel()
        channel.note("figures", msgspec.msgpack.encode(server.snapshot()))
        await server.close()
        await ledger.close()
        sink.attach(None)
        sink.close()
        channel.close()

    def _make_room(self, channel: Channel, stores: Stores, settings: config.Config) -> RemoteRoom:
        self._room = RemoteRoom(channel, Direct(stores.state), settings.limits.queue.max_wait)
        return self._room

    async def _speak(self, channel: Channel, server: Server) -> None:
        while True:
            channel.note("figures", msgspec.msgpack.encode(server.snapshot()))
            await asyncio.sleep(_SPEAK_EVERY_S)

    def _end(self, limit_s: float | None) -> None:
        if not self._stop.done():
            self._stop.set_result(limit_s)  # type: ignore[arg-type] # None: the configured drain

    async def _answer(self, verb: str, payload: Any) -> Any:
        assert self._local is not None
        answer = await answer_worker_verb(self._local, verb, payload)
        if verb == "commit" and self._room is not None:  # it gives up on a room that is silent for longer
            self._room.max_wait_s = self._local.server.core.config.limits.queue.max_wait
        return answer

    def _heard(self, verb: str, payload: Any) -> None:
        if verb.startswith("queue.") and self._room is not None:
            self._room.heard(verb, payload)
        elif verb == "settings":
            raw, push, owner = payload
            self._settings.set_result((msgspec.msgpack.decode(raw, type=config.Config), push, owner))
        elif verb == "drain":
            self._end(payload)
        elif verb == "hurry" and self._local is not None:
            spawn(self._local.hurry(), "hurry")
