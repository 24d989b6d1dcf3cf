"""Where a listener binds, as people write it: host:port, [ipv6]:port, :port, unix:/path."""

from __future__ import annotations

import ipaddress
import re

import msgspec


class Address(msgspec.Struct, frozen=True):
    """Where a listener binds: host and port (an empty host is every interface), or a unix socket's path."""

    host: str
    port: int
    unix_path: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it: 127.0.0.0/8, ::1, localhost, or a unix socket."""
        if self.unix_path is not None or self.host.lower() == "localhost":
            return True
        ip = _ip(self.host)
        return ip is not None and ip.is_loopback

    def overlaps(self, other: Address) -> bool:
        """Whether the two cannot be bound at once. Port 0 is any free port: it never overlaps."""
        if self.unix_path is not None or other.unix_path is not None:
            return self.unix_path == other.unix_path
        if self.port != other.port or self.port == 0:
            return False
        hosts = [address.host.lower().replace("localhost", "127.0.0.1") for address in (self, other)]
        if "" in hosts or hosts[0] == hosts[1]:
            return True
        ips = [ip for ip in map(_ip, hosts) if ip is not None]
        same_family = len(ips) == 2 and ips[0].version == ips[1].version
        return same_family and (ips[0] == ips[1] or any(ip.is_unspecified for ip in ips))

    def __str__(self) -> str:
        if self.unix_path is not None:
            return f"unix:{self.unix_path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


_ADDRESS_FORMS = "expected host:port, [ipv6]:port, :port or unix:/path"
_ADDRESS = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
_HOST_NAME = re.compile(r"(?!.*\.[0-9]+\.?$)(?![0-9]+$)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def parse_address(text: str) -> Address:
    """Read `host:port`, `[::1]:port`, `:port` (every interface) or `unix:/path`.

    Raises:
        ValueError: it is none of these; the message does not repeat the text.
    """
    if text.startswith("unix:"):
        return Address("", 0, _socket_path(text.removeprefix("unix:")))
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise ValueError(_ADDRESS_FORMS)
    host: str = found["six"] or found["host"] or ""
    ip = _ip(host)
    good = ip is not None and ip.version == 6 if found["six"] else not host or is_host(host)
    if not good:
        raise ValueError(_ADDRESS_FORMS)
    return Address(host, int(found["port"]))


def _socket_path(path: str) -> str:
    # sun_path is 108 bytes with its final zero (unix(7)); a longer path fails only at bind.
    if not path.startswith("/") or not path.isprintable() or len(path.encode()) > 107:
        raise ValueError("expected unix: and an absolute path of at most 107 bytes")
    return path


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_host(host: str) -> bool:
    return _ip(host) is not None or _HOST_NAME.fullmatch(host) is not None
