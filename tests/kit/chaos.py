"""A TCP proxy that misbehaves on demand; what it does can be changed while connections are open."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

_CHUNK = 65536
#: SO_LINGER with 0 seconds: closing sends RST (socket(7)).
_RST = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """What happens to answers; connections and requests pass unless it says otherwise. Nothing: all well.

    refuse: nobody listens any more; open connections are reset. reset: every connection is, at once.
    blackhole: connections are accepted, bytes go nowhere; those held back arrive when it ends, late.
    delay_s: each piece of an answer comes so much later. bytes_per_s: pieces of one byte at this pace.
    cut_after: a connection is closed after so many bytes of answers. garbage: these bytes in their place.
    """

    refuse: bool = False
    reset: bool = False
    blackhole: bool = False
    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    cut_after: int | None = None
    garbage: bytes = b""


class Chaos:
    """Listens on `port`, in front of 127.0.0.1:`target`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._fault = Fault()
        self._changed = asyncio.Condition()
        self._open: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._refusing: socket.socket | None = None
        self.port = 0
        self.accepted = 0

    async def become(self, fault: Fault) -> None:
        """From now on, for open connections too."""
        async with self._changed:
            self._fault = fault
            self._changed.notify_all()
        if fault.refuse or fault.reset:
            self._reset_all()
        if fault.refuse and self._server is not None:
            self._server.close()
            self._server = None
            self._refusing = _bound(self.port)  # nobody else gets the port meanwhile
        if not fault.refuse:
            await self.listen()

    async def listen(self) -> None:
        if self._server is None:
            if self._refusing is not None:
                self._refusing.close()
            bound = _bound(self.port)
            self.port = bound.getsockname()[1]
            self._server = await asyncio.start_server(self._accept, sock=bound)

    async def close(self) -> None:
        if self._refusing is not None:
            self._refusing.close()
        if self._server is not None:
            self._server.close()
        self._reset_all()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._fault.reset:
            return _reset(writer)
        try:
            answers, requests = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            return _reset(writer)
        self._open[writer] = requests
        for pump in (self._requests(reader, requests), self._answers(answers, writer)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK):
                async with self._changed:
                    await self._changed.wait_for(lambda: not self._fault.blackhole)
                _write(writer, data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            sent = 0
            while data := await reader.read(_CHUNK):
                if (sent := await self._answer(data, writer, sent)) < 0:
                    break
        except OSError:
            pass
        finally:
            writer.close()
            if (requests := self._open.pop(writer, None)) is not None:
                requests.close()

    async def _answer(self, data: bytes, writer: asyncio.StreamWriter, sent: int) -> int:
        """How much this connection has been sent; -1 ends it."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._fault.blackhole)
        fault = self._fault
        await asyncio.sleep(fault.delay_s)
        data = fault.garbage or data
        if fault.cut_after is not None and sent + len(data) > fault.cut_after:
            _write(writer, data[: max(fault.cut_after - sent, 0)])
            return -1
        if fault.bytes_per_s < math.inf:
            for byte in data:
                _write(writer, bytes([byte]))
                await asyncio.sleep(1 / fault.bytes_per_s)
        else:
            _write(writer, data)
        await writer.drain()
        return sent + len(data)

    def _reset_all(self) -> None:
        for writer, requests in list(self._open.items()):
            _reset(writer)
            requests.close()
        self._open.clear()


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """uvloop raises RuntimeError for a transport that was closed while we slept, asyncio warns: gone."""
    if writer.is_closing():
        raise ConnectionResetError
    writer.write(data)


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    writer.transport.abort()


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


@asynccontextmanager
async def chaos(target: int) -> AsyncIterator[Chaos]:
    """A proxy to 127.0.0.1:`target` with no fault yet."""
    proxy = Chaos(target)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()
