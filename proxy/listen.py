"""Listening sockets: bound here, handed to workers and to new generations."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat

from proxy.address import Address
from proxy.errors import StartError

BACKLOG = 4096


def bind(address: Address) -> socket.socket:
    """A listening socket. Raises StartError with the fix."""
    try:
        if address.unix_path is not None:
            _unlink_stale(address.unix_path)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(address.unix_path)
        else:
            sock = _bind_tcp(address)
        sock.listen(BACKLOG)
    except OSError as error:
        raise StartError(_why_not(address, error)) from error
    sock.setblocking(False)
    return sock


def _bind_tcp(address: Address) -> socket.socket:
    if not address.host and socket.has_dualstack_ipv6():
        return socket.create_server(("", address.port), family=socket.AF_INET6, dualstack_ipv6=True)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server((address.host, address.port), family=family)


def _unlink_stale(path: str) -> None:
    """A socket file that nobody listens on is left from a crash; anything else is not ours to replace."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise StartError(f"unix:{path} exists and is no socket: choose another path or remove it")
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.connect(path)
    except OSError:
        os.unlink(path)
    else:
        raise StartError(f"unix:{path} is in use: choose another with --listen / --admin")
    finally:
        probe.close()


def keep_or_bind(inherited: socket.socket, address: Address) -> socket.socket:
    """The inherited socket, unless the configuration on disk names another address by now."""
    if _is_at(inherited, address):
        return inherited
    inherited.close()
    return bind(address)


def given_or_bind(given: socket.socket | None, address: Address, key: str) -> socket.socket:
    """The socket that the service manager opened for the configuration's `key`, or one of our own. Raises
    StartError: an address that the configuration does not know would be without its checks."""
    if given is None:
        return bind(address)
    here = given.getsockname()
    inside = given.family == socket.AF_UNIX or ipaddress.ip_address(here[0]).is_loopback
    if not _is_at(given, address) or inside is not address.loopback:
        where = f"unix:{here}" if isinstance(here, str) else f"{here[0]} port {here[1]}"
        raise StartError(f"{key}: the socket that was passed is {where}, the configuration says {address}")
    return given


def _is_at(sock: socket.socket, address: Address) -> bool:
    here = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return bool(here == address.unix_path)
    # An empty host is every address; a name was looked up when it was bound: only the port tells then.
    return address.unix_path is None and address.port in (0, here[1])


def close(sock: socket.socket | None, address: Address, *, keep_path: bool) -> None:
    if sock is None:
        return
    sock.close()
    if address.unix_path is not None and not keep_path:
        with contextlib.suppress(OSError):
            os.unlink(address.unix_path)


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1]) if sock.family in (socket.AF_INET, socket.AF_INET6) else 0


def _why_not(address: Address, error: OSError) -> str:
    what = "is in use" if error.errno == errno.EADDRINUSE else (error.strerror or "cannot be used")
    return f"{address} {what}: choose another with --listen / --admin (or PORT=, ADMIN_PORT= for make run)"


def url(address: Address, port: int, scheme: str) -> str:
    if address.unix_path is not None:
        return f"{scheme}://localhost"
    host = f"[{address.host}]" if ":" in address.host else address.host or "127.0.0.1"
    return f"{scheme}://{host}:{port}"
