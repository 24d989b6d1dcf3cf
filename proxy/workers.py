"""Workers as the front sees them: in this process, or at the other end of a control channel."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any, Protocol

import msgspec

from proxy import config, ledger_link
from proxy.control import Channel, ControlError
from proxy.errors import StartError
from proxy.ledger_row import RowSink
from proxy.metrics import Snapshot
from proxy.server import Server
from proxy.slots import WaitingRoom
from proxy.slots_remote import Door

#: How long a new worker or a new generation may take until it serves.
START_S = 30.0


class Worker(Protocol):
    """What the front asks of every worker, wherever it runs."""

    async def state(self) -> dict[str, int]: ...

    async def snapshot(self) -> Snapshot: ...

    async def streams(self) -> list[dict[str, Any]]: ...

    async def kill(self, stream_id: str) -> bool: ...

    async def prepare(self, settings: config.Config) -> None: ...

    async def commit(self) -> None: ...

    async def discard(self) -> None: ...

    async def drain(self, limit_s: float) -> None: ...

    async def hurry(self) -> None: ...

    async def close(self) -> None: ...


class LocalWorker:
    """A Server in this process."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._hurry = asyncio.Event()

    async def state(self) -> dict[str, int]:
        return self.server.state()

    async def snapshot(self) -> Snapshot:
        return self.server.snapshot()

    async def streams(self) -> list[dict[str, Any]]:
        return self.server.streams()

    async def kill(self, stream_id: str) -> bool:
        return self.server.kill(stream_id)

    async def prepare(self, settings: config.Config) -> None:
        await self.server.prepare(settings)

    async def commit(self) -> None:
        self.server.commit()

    async def discard(self) -> None:
        await self.server.discard()

    async def drain(self, limit_s: float) -> None:
        await self.server.drain(limit_s, self._hurry)

    async def hurry(self) -> None:
        self._hurry.set()

    async def close(self) -> None:
        await self.server.close()


class RemoteWorker:
    """A process at the other end of a control channel."""

    def __init__(self, pid: int, number: int = 0) -> None:
        self.pid = pid
        self.number = number
        self.started_at = time.monotonic()
        self.heard_at = self.started_at
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last: Snapshot = {}
        self.settings: config.Config | None = None  # what it was started with
        self.channel: Channel | None = None
        self._door: Door | None = None
        self._ledger: RowSink | None = None

    async def connect(
        self, sock: socket.socket, room: WaitingRoom | None = None, ledger: RowSink | None = None
    ) -> None:
        """room: where its requests wait for slots. ledger: where its rows go."""
        self._ledger = ledger
        self.channel = await Channel.open(sock, self._answer, self._heard)
        self._door = None if room is None else Door(self.channel, room)

    async def _answer(self, verb: str, payload: Any) -> Any:
        if verb == ledger_link.LEDGER and self._ledger is not None:
            return ledger_link.take(self._ledger, payload)
        raise ControlError(f"unknown verb {verb!r}")

    def _heard(self, verb: str, payload: Any) -> None:
        self.heard_at = time.monotonic()
        if verb.startswith("queue."):
            if self._door is not None:
                self._door.heard(verb, payload)
        elif verb == "ready" and not self.ready.done():
            self.ready.set_result(None)
        elif verb == "failed" and not self.ready.done():
            self.ready.set_exception(StartError(str(payload)))
        elif verb == "figures":
            self.last = _decode_snapshot(payload)

    async def _call(self, verb: str, payload: Any = None, timeout_s: float = 5.0) -> Any:
        assert self.channel is not None
        return await self.channel.call(verb, payload, timeout_s)

    async def state(self) -> dict[str, int]:
        return msgspec.convert(await self._call("state"), dict[str, int])

    async def snapshot(self) -> Snapshot:
        """Of one that does not answer, what it said last: a counter must not go backwards meanwhile."""
        try:
            self.last = _decode_snapshot(await self._call("snapshot", timeout_s=1.0))
        except ControlError:
            pass
        return self.last

    async def streams(self) -> list[dict[str, Any]]:
        return msgspec.convert(await self._call("streams"), list[dict[str, Any]])

    async def kill(self, stream_id: str) -> bool:
        return bool(await self._call("kill", stream_id))

    async def prepare(self, settings: config.Config) -> None:
        await self._call("prepare", encode_settings(settings), timeout_s=START_S)

    async def commit(self) -> None:
        await self._call("commit")

    async def discard(self) -> None:
        await self._call("discard")

    async def drain(self, limit_s: float) -> None:
        """Returns when the process has ended."""
        assert self.channel is not None
        self.channel.note("drain", limit_s)
        await asyncio.shield(self.channel.closed)

    async def hurry(self) -> None:
        assert self.channel is not None
        self.channel.note("hurry")

    async def close(self) -> None:
        if self.channel is not None:
            self.channel.close()


def encode_settings(settings: config.Config) -> bytes:
    return msgspec.msgpack.encode(settings, enc_hook=str)  # a Secret is a str that hides in reprs


def _decode_snapshot(payload: Any) -> Snapshot:
    return msgspec.msgpack.decode(payload, type=Snapshot)


async def answer_worker_verb(worker: Worker, verb: str, payload: Any) -> Any:
    """The worker's end of `RemoteWorker._call`."""
    if verb == "state":
        return await worker.state()
    if verb == "snapshot":
        return msgspec.msgpack.encode(await worker.snapshot())
    if verb == "streams":
        return await worker.streams()
    if verb == "kill":
        return await worker.kill(payload)
    if verb == "prepare":
        return await worker.prepare(msgspec.msgpack.decode(payload, type=config.Config))
    if verb == "commit":
        return await worker.commit()
    if verb == "discard":
        return await worker.discard()
    raise ControlError(f"unknown verb {verb!r}")
