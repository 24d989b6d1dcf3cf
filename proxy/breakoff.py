"""The end of a connection whose answer is not complete: visible to the caller, whatever the framing."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from time import monotonic

#: A caller that does not take what is left after this is dropped.
_LAST_FLUSH_S = 5.0


async def break_off(transport: asyncio.Transport, *, framed: bool) -> None:
    """Ends a connection whose answer is not complete, so that nobody can take it for a complete one.

    What was written is still delivered. With framing (chunks, a length) the missing rest tells; without it
    (HTTP/1.0) only a reset does, and it is sent once the peer has acknowledged what came before, because a
    reset discards the rest of our send buffer. That is waited for: aiohttp closes the connection as soon as
    the handler returns.
    """
    if not framed:
        await _until_flushed(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and not transport.is_closing() and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        return
    transport.close()
    asyncio.get_running_loop().call_later(_LAST_FLUSH_S, transport.abort)


async def _until_flushed(transport: asyncio.Transport) -> None:
    """Until the peer's kernel has everything; no event says so."""
    give_up_at = monotonic() + _LAST_FLUSH_S
    while not transport.is_closing() and monotonic() < give_up_at:
        if not transport.get_write_buffer_size() and not _unacknowledged(transport):
            return
        await asyncio.sleep(0.01)


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes in the kernel's send queue."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])
    except OSError:
        return 0
