"""What every request to an upstream carries: credential, the operator's headers and query, and where it goes.

What is the same for each request is made once, per credential. A request costs a concatenation, and a pass
over the caller's fields or query only where the operator's replace some of them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_plus

from yarl import URL

if TYPE_CHECKING:
    from proxy import schema

Fields = tuple[tuple[str, str], ...]

#: Request lines that are kept, by method, path and credential: a path may hold an id or a query.
_KEPT = 64

_AUTH = {
    "bearer": ("Authorization", "Bearer "),
    "x-api-key": ("x-api-key", ""),
    "api-key": ("api-key", ""),
}


class Outgoing:
    """How one upstream is spoken to. Its credentials are known by their index; without one there is index 0.

    base_url: http(s)://host[:port][/path], without user, query and fragment.
    """

    __slots__ = (
        "_base_path",
        "_credentials",
        "_lines",
        "_names",
        "_origin",
        "_own",
        "_prefix",
        "_query",
        "_replaced",
        "opening",
    )

    def __init__(self, settings: schema.Upstream, base_url: URL) -> None:
        self._origin = f"{base_url.scheme}://{_authority(base_url)}"
        self._base_path = base_url.raw_path.rstrip("/")
        tunnel = base_url.scheme == "https"
        # A proxy that opens no tunnel reads the request itself: it needs the whole URL (RFC 9112 3.2.2) and,
        # with every request, its own credential.
        self._prefix = self._base_path if tunnel or not settings.proxy else self._origin + self._base_path
        fixed = [("Host", _authority(base_url)), ("Via", "1.1 headrace"), ("Accept-Encoding", "identity")]
        if settings.proxy and not tunnel:
            fixed += proxy_credential(URL(settings.proxy))
        self._own = tuple(_own_fields(settings, key) for key in _keys(settings))
        self._lines = tuple(_as_lines([*_without(settings.headers, fixed), *own]) for own in self._own)
        self._replaced = _lines_named(settings.headers) if settings.headers else None
        self._names = frozenset(settings.query)
        self._query = "&".join(f"{name}={quote(value, safe='')}" for name, value in settings.query.items())
        #: `_opening`, the newest ones kept: it is a third of what a head costs.
        self.opening: Callable[[str, str, int], bytes] = lru_cache(_KEPT)(self._opening)

    @property
    def credentials(self) -> int:
        """How many there are, at least 1."""
        return len(self._own)

    def own_fields(self, key: int) -> Fields:
        """The credential and the operator's headers."""
        return self._own[key]

    def passed(self, fields: bytes) -> bytes:
        """Of the caller's header lines those that the operator's do not replace."""
        return fields if self._replaced is None else self._replaced.sub(b"", fields)

    def lines(self, fields: bytes, key: int) -> bytes:
        """All header lines but those of the body; `fields` are the caller's that go along."""
        return self._lines[key] + self.passed(fields)

    def _opening(self, method: str, path: str, key: int) -> bytes:
        """The request line, and the header lines that every request with this credential has."""
        line = f"{method} {self.target(path)} HTTP/1.1\r\n"
        return line.encode() + self._lines[key]

    def target(self, path: str) -> str:
        """The request line's target; `path` is the caller's, with the query."""
        return self._prefix + (self._queried(path) if self._names else path)

    def url(self, path: str) -> URL:
        """The same, as a whole URL."""
        return URL(
            self._origin + self._base_path + (self._queried(path) if self._names else path), encoded=True
        )

    def probe_url(self, path: str) -> URL:
        """`path` at the upstream's host, whatever base_url's path is; with the operator's query."""
        return URL(self._origin + (self._queried(path) if self._names else path), encoded=True)

    def _queried(self, path: str) -> str:
        """The operator's parameters replace the caller's of the same name, however those are escaped; all
        others stay as they are, byte by byte."""
        path, _, query = path.partition("?")
        kept = [
            pair
            for pair in query.split("&")
            if pair and unquote_plus(pair.partition("=")[0]) not in self._names
        ]
        return f"{path}?{'&'.join([*kept, self._query])}"


def _keys(settings: schema.Upstream) -> tuple[str, ...]:
    keys = settings.api_keys or ((settings.api_key,) if settings.api_key else ())
    return tuple(key for key in keys if key) or ("",)


def _own_fields(settings: schema.Upstream, key: str) -> Fields:
    fields: list[tuple[str, str]] = []
    if key and settings.auth != "none":
        name, prefix = _AUTH[settings.auth]
        fields.append((name, f"{prefix}{key}"))
    return (
        *_without(settings.headers, fields),
        *((name, str(value)) for name, value in settings.headers.items()),
    )


def _without(names: Iterable[str], fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Whoever writes `headers: {Authorization: …}` means that one."""
    replaced = {name.lower() for name in names}
    return [field for field in fields if field[0].lower() not in replaced]


def _as_lines(fields: Iterable[tuple[str, str]]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in fields).encode()


def _lines_named(names: Iterable[str]) -> re.Pattern[bytes]:
    """Whole lines of these names; no value holds a line break, they come from a parser."""
    alternatives = "|".join(map(re.escape, names))
    return re.compile(rf"^(?:{alternatives}):[^\n]*\n".encode(), re.IGNORECASE | re.MULTILINE)


def _authority(url: URL) -> str:
    host = url.raw_host or ""
    host = f"[{host}]" if ":" in host else host
    return host if url.port == {"http": 80, "https": 443}.get(url.scheme) else f"{host}:{url.port}"


def proxy_credential(proxy: URL) -> list[tuple[str, str]]:
    """The field for an outbound proxy whose URL holds a user (RFC 9110 11.7.2, RFC 7617), else none."""
    if proxy.user is None and proxy.password is None:
        return []
    pair = f"{proxy.user or ''}:{proxy.password or ''}".encode()
    return [("Proxy-Authorization", f"Basic {base64.b64encode(pair).decode()}")]
