"""What systemd hands to a service, and what it is told: sd_listen_fds(3), sd_notify(3)."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from typing import NamedTuple

from proxy.errors import StartError

_FIRST = 3
#: FileDescriptorName= of the admin listener's socket; one with any other name is the data listener.
_ADMIN = "admin"
#: Tells the next generations that a unix socket's path is systemd's to remove.
_PATHS_ARE_SYSTEMDS = "HEADRACE_SOCKETS_OF_SYSTEMD"


class Activated(NamedTuple):
    """The listening sockets that systemd has opened."""

    data: socket.socket | None = None
    admin: socket.socket | None = None


def activated(environ: MutableMapping[str, str]) -> Activated:
    """What was passed to this process; the variables end here. Raises StartError."""
    passed = {name: environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if passed["PID"] != str(os.getpid()):  # meant for a parent that did not clear its environment
        return Activated()
    names = passed["FDNAMES"].split(":")
    found: dict[str, socket.socket] = {}
    for offset in range(int(passed["FDS"] or 0)):
        use = "admin" if names[offset : offset + 1] == [_ADMIN] else "data"
        if use in found:
            raise StartError(f"systemd passed two {use} sockets: name the other FileDescriptorName=admin")
        found[use] = _listening(_FIRST + offset)
    if found:
        environ[_PATHS_ARE_SYSTEMDS] = "1"
    return Activated(**found)


def owns_paths(environ: MutableMapping[str, str]) -> bool:
    """Whether systemd opened the sockets of this generation or of one before."""
    return _PATHS_ARE_SYSTEMDS in environ


def _listening(number: int) -> socket.socket:
    sock = socket.socket(fileno=number)
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise StartError(
            "systemd passed a socket that does not listen: ListenStream= and Accept=no are needed"
        )
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def notify(environ: MutableMapping[str, str], message: str) -> None:
    """READY=1, STOPPING=1 or MAINPID=…; nothing where nobody listens."""
    path = environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message.encode(), address)
