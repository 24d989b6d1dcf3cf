"""What the kernel knows of a caller's connection: asked when an operator looks, so that no stream pays for it
(a look at each one's begin took 19 us).

The figures are those of TCP (linux/tcp.h, struct tcp_info), behind nginx therefore those of nginx. Whatever
is sent ends an idle time, a heartbeat too. A unix socket has none.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import NamedTuple, cast

#: tcpi_last_data_sent (milliseconds), tcpi_notsent_bytes (Linux 4.6).
_LAST_SENT_AT, _UNSENT_AT = 44, 144
_SIZE = 148


class Downlink(NamedTuple):
    """idle_s: since anything was last sent. waiting_bytes: written and not yet sent, in this process and in
    the kernel: the reader is slow."""

    idle_s: float
    waiting_bytes: int


def look(transport: asyncio.BaseTransport | None) -> Downlink | None:
    """None: it is closed, or is no TCP connection of Linux. Costs 2 microseconds."""
    info = _tcp_info(transport)
    if info is None:
        return None
    (sent_ms,) = struct.unpack_from("=I", info, _LAST_SENT_AT)
    (unsent,) = struct.unpack_from("=I", info, _UNSENT_AT)
    held = cast("asyncio.WriteTransport", transport).get_write_buffer_size()
    return Downlink(sent_ms / 1000, held + unsent)


def _tcp_info(transport: asyncio.BaseTransport | None) -> bytes | None:
    sock = None if transport is None or transport.is_closing() else transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    except OSError:
        return None  # closed in this very moment
    return info if len(info) == _SIZE else None
