"""The channel between the supervisor and a worker: calls and notes in both directions over a Unix socket.

A frame is a length (4 bytes, big-endian) and msgpack of `Message`. Bounded: what waits to be sent is at most
`_MAX_WAITING`; past it a note is dropped and counted and a call fails. Nothing here ever waits for the other
side on behalf of a request: workers send notes and go on.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec

from proxy.tasks import spawn

_MAX_WAITING = 8 * 2**20
_MAX_FRAME = 64 * 2**20
_LENGTH_BYTES = 4

#: Answers a call of the other side: verb, payload -> payload. What it raises fails the call.
Handler = Callable[[str, Any], Awaitable[Any]]
#: Takes a note of the other side: verb, payload.
Listener = Callable[[str, Any], None]


class ControlError(Exception):
    """The other side refused, failed, or is gone; the text is for the operator."""


class Message(msgspec.Struct, array_like=True):
    """kind: call (number names it), answer and failure (number of the call), note (number 0)."""

    kind: Literal["call", "answer", "failure", "note"]
    number: int
    verb: str
    payload: Any = None


class Channel(asyncio.Protocol):
    """One end. `closed` is done when the other side is gone."""

    def __init__(self, handler: Handler, listener: Listener) -> None:
        self._handler = handler
        self._listener = listener
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Message).decode
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.dropped = 0

    @classmethod
    async def open(cls, sock: socket.socket, handler: Handler, listener: Listener) -> Channel:
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(handler, listener), sock=sock)
        return channel

    async def call(self, verb: str, payload: Any = None, timeout_s: float = 5.0) -> Any:
        """The other side's answer. Raises ControlError, also when it does not come in time."""
        self._last = number = self._last + 1
        answer = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            if not self._send(Message("call", number, verb, payload)):
                raise ControlError("the control channel is full or closed")
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise ControlError(f"no answer to '{verb}' within {timeout_s:g} s") from None
        finally:
            del self._calls[number]

    def note(self, verb: str, payload: Any = None) -> bool:
        """Sends and forgets; False if it had to be dropped."""
        if self._send(Message("note", 0, verb, payload)):
            return True
        self.dropped += 1
        return False

    def close(self) -> None:
        """Sends what is waiting, then ends."""
        if self._transport is not None:
            self._transport.close()

    # ── asyncio.Protocol ─────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        while len(received) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(received[:_LENGTH_BYTES], "big")
            if end > _MAX_FRAME:
                self._abort()
                return
            if len(received) < end:
                return
            frame = bytes(received[_LENGTH_BYTES:end])
            del received[:end]
            if not self._take(frame):
                self._abort()
                return

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        for call in self._calls.values():
            if not call.done():
                call.set_exception(ControlError("the other process is gone"))
        if not self.closed.done():
            self.closed.set_result(None)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, message: Message) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if transport.get_write_buffer_size() > _MAX_WAITING:
            return False
        frame = self._encode(message)
        if _LENGTH_BYTES + len(frame) > _MAX_FRAME:  # the other side would take it for garbage and end
            return False
        transport.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)
        return True

    def _take(self, frame: bytes) -> bool:
        """False: this is no message."""
        try:
            message = self._decode(frame)
        except msgspec.MsgspecError:
            return False
        if message.kind == "call":
            spawn(self._answer(message), f"control {message.verb}")
        elif message.kind == "note":
            self._listener(message.verb, message.payload)
        elif (call := self._calls.get(message.number)) is not None and not call.done():
            if message.kind == "answer":
                call.set_result(message.payload)
            else:
                call.set_exception(ControlError(str(message.payload)))
        return True

    async def _answer(self, message: Message) -> None:
        try:
            payload = await self._handler(message.verb, message.payload)
            if not self._send(Message("answer", message.number, message.verb, payload)):
                raise ControlError("the answer is too large, or the control channel full")
        except Exception as error:  # whatever it is, the other side must not wait for ever
            self._send(Message("failure", message.number, message.verb, str(error) or type(error).__name__))

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
