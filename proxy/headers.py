"""Which header fields cross the proxy, in which direction, under which name.

Both directions start from the raw fields (bytes, in order, duplicates kept) and drop by name; our own
fields are added after the strip, so that no `Connection: authorization` can remove them (RFC 9110 7.6.1).
"""

from __future__ import annotations

import ipaddress
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.bucket import Decision

RawHeaders = Sequence[tuple[bytes, bytes]]
Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]

#: RFC 9110 7.6.1, and the two that only make sense on one hop.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"proxy-authenticate",
        b"proxy-authorization",
    }
)

#: Fields in which callers of some API carry a credential: none of them ever goes upstream.
CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"cookie"})

#: What the upstream must not learn from the caller, or what we write ourselves.
_REQUEST_DROP = (
    HOP_BY_HOP
    | CREDENTIALS
    | {
        b"host",
        b"content-length",
        b"expect",
        b"accept-encoding",  # we ask for identity: a compressed stream hides its terminator and its usage
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-forwarded-port",
        b"x-real-ip",
        b"via",
        b"x-request-id",
        b"origin",  # which pages may ask is decided here; some upstreams refuse whatever comes from a page
        b"openai-organization",  # whose account is billed is the operator's choice
        b"openai-project",
    }
)

_RESPONSE_DROP = HOP_BY_HOP | {
    b"content-length",  # set again by whoever frames the answer
    b"set-cookie",
    b"server",
    b"x-powered-by",
    b"alt-svc",
    b"strict-transport-security",
    b"openai-organization",
    b"openai-project",
    b"x-request-id",  # passed on as x-upstream-request-id
    b"request-id",
    b"x-headrace-upstream",
    b"x-headrace-attempts",
    b"server-timing",
    b"access-control-allow-origin",  # which pages may read it is decided here
    b"access-control-allow-credentials",
    b"access-control-allow-headers",
    b"access-control-allow-methods",
    b"access-control-expose-headers",
    b"access-control-max-age",
    b"date",
}

_UPSTREAM_ID = "x-upstream-request-id"
_UPSTREAM_ID_LINE = f"\r\n{_UPSTREAM_ID}: ".encode()
_NONE_NAMED: frozenset[bytes] = frozenset()
#: Ids are unique, not secret: random once a process, then counted (os.urandom costs 7 us a request).
_MINTED = f"req_{os.urandom(10).hex()}"
_numbers = itertools.count(1)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: No id is zero; a version after 00 may have fields behind the flags (W3C Trace Context, section 3.2).
_TRACEPARENT = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)
_FORBIDDEN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_PLAIN = b"\t" + bytes(range(0x20, 0x7F))


def request_id(offered: str | None) -> str:
    """The caller's id if it is harmless in a header and in a log, else one of our own."""
    if offered is not None and _REQUEST_ID.fullmatch(offered):
        return offered
    return f"{_MINTED}{next(_numbers)}"


def trace_id(traceparent: str | None) -> str | None:
    """The trace that a caller's `traceparent` names; None unless that is valid."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent is not None else None
    return None if found is None else found["trace"]


def _named_by_connection(fields: RawHeaders) -> frozenset[bytes]:
    """Fields that `Connection` names are hop-by-hop too."""
    named = [value for name, value in fields if len(name) == 10 and name.lower() == b"connection"]
    if not named:
        return _NONE_NAMED
    return frozenset().union(*map(_options, named))


class _LineStarts(dict[bytes, bytes | None]):
    """How a caller's field begins on its line upstream, empty where it stays here; None: it is `Connection`.
    By its name alone: the same few names come with every request. (A look-up takes 20 ns, by `lru_cache` it
    takes 110, which makes a tuple of what is no text.)"""

    def __missing__(self, name: bytes) -> bytes | None:
        if len(self) >= 1024:
            self.clear()
        self[name] = start = _line_start(name)
        return start


def _line_start(name: bytes) -> bytes | None:
    lower = name.lower()
    if lower == b"connection":
        return None
    stays = lower in _REQUEST_DROP or b"_" in name or lower.startswith(b"x-headrace-")
    return b"" if stays else name + b": "


_LINE_STARTS = _LineStarts()


@lru_cache(maxsize=64)
def _also_here(connection: bytes) -> frozenset[bytes]:
    """What this value of `Connection` names beyond what stays here anyway: nearly always nothing."""
    return _options(connection) - _REQUEST_DROP


def _options(connection: bytes) -> frozenset[bytes]:
    return frozenset([option.strip().lower() for option in connection.split(b",")])


@lru_cache(maxsize=1024)
def _name_down(name: bytes) -> str | None:
    """Under which name a field of an answer crosses; None: it does not."""
    lower = name.lower()
    if lower in (b"x-request-id", b"request-id"):
        return _UPSTREAM_ID
    return None if lower in _RESPONSE_DROP else _text(name)


def to_upstream(fields: RawHeaders, request_id: str) -> bytes:
    """The caller's end-to-end fields as header lines, without credentials and without names that hold `_`;
    then the id of the request.

    Names with an underscore are dropped as nginx does: CGI-like servers read `X_Api_Key` as `X-Api-Key`.
    """
    parts: list[bytes] = []
    named = _NONE_NAMED
    for name, value in fields:
        start = _LINE_STARTS[name]
        if start:
            parts += (start, value, b"\r\n")
        elif start is None:
            named |= _also_here(value)
    if named:
        kept = [field for field in fields if field[0].lower() not in named | {b"connection"}]
        return to_upstream(kept, request_id)
    parts += (b"x-request-id: ", request_id.encode(), b"\r\n")
    return b"".join(parts)


def to_caller(fields: RawHeaders, *, keep_ratelimit: bool) -> list[tuple[str, str]]:
    """The upstream's end-to-end fields; its request id comes back as x-upstream-request-id.

    keep_ratelimit: its quota is shown only where the caller has no plan of its own.
    """
    extra = _named_by_connection(fields)
    kept: list[tuple[str, str]] = []
    identified = False  # Anthropic sends both spellings of its id with one value: pass it once
    for raw, value in fields:
        name = _name_down(raw)
        if name is None or _FORBIDDEN_VALUE.search(value):
            continue
        if name is _UPSTREAM_ID:
            if identified:
                continue
            identified = True
        elif (extra and raw.lower() in extra) or not (keep_ratelimit or _tells_no_quota(name)):
            continue
        kept.append((name, _text(value)))
    return kept


def _tells_no_quota(name: str) -> bool:
    return not name.lower().startswith(("x-ratelimit-", "anthropic-ratelimit-"))


class _LinesDown(dict[bytes, bytes | None]):
    """What comes before the value of a field, by its name: a line break and a name; nothing: it does not
    cross; None: that is up to its value. The same few names come with every answer, and a dict tells in 20 ns
    (`lru_cache` in 110: it makes a tuple of its arguments)."""

    def __init__(self, replaced: frozenset[bytes], *, keep_ratelimit: bool) -> None:
        super().__init__()
        self._replaced = replaced
        self._keep_ratelimit = keep_ratelimit

    def __missing__(self, name: bytes) -> bytes | None:
        if len(self) >= 1024:
            self.clear()
        line = self._line(name)
        if len(name) <= 64:  # an upstream that sends long ones is none to remember
            self[name] = line
        return line

    def _line(self, name: bytes) -> bytes | None:
        down, lower = _name_down(name), name.lower()
        if down is None:
            return None if lower == b"connection" else b""
        if down is _UPSTREAM_ID:
            return _UPSTREAM_ID_LINE
        crosses = lower not in self._replaced and (self._keep_ratelimit or _tells_no_quota(down))
        return f"\r\n{down}: ".encode() if crosses else b""


@lru_cache(maxsize=16)
def _lines_down(replaced: frozenset[bytes], keep_ratelimit: bool) -> _LinesDown:
    return _LinesDown(replaced, keep_ratelimit=keep_ratelimit)


def lines_to_caller(
    fields: RawHeaders, *, keep_ratelimit: bool, replaced: frozenset[bytes] = _NONE_NAMED
) -> bytes | None:
    """What `to_caller` lets pass, as lines, each with its line break before it. None: only `to_caller` can
    tell, because a name or a value is not plain ASCII, `Connection` names a field, or there are two ids.

    replaced: names (in lower case) of which we write our own.
    """
    parts: list[bytes] = []
    lines_down = _lines_down(replaced, keep_ratelimit)
    for name, value in fields:
        line = lines_down[name]
        if line:
            parts += line, value
        elif line is None and value.lower() != b"keep-alive":
            return None
    lines = b"".join(parts)
    # One look at all values: line breaks of ours are all that is left without plain text (RFC 9110 5.5), so
    # that no value can begin a line of its own. aiohttp's parser lets none pass either.
    if lines.translate(None, _PLAIN) != b"\r\n" * (len(parts) // 2) or parts.count(_UPSTREAM_ID_LINE) > 1:
        return None
    return lines


def pairs(lines: str) -> list[tuple[str, str]]:
    """Lines of ours (each with its line break before it) for whoever takes names and values."""
    split = [line.partition(": ") for line in lines.split("\r\n")[1:]]
    return [(name, value) for name, _, value in split]


def rate_limit(allowance: Mapping[str, Decision]) -> str:
    """OpenAI's fields for what is left of a caller's plan, as lines; `reset` is until it is full again."""
    lines = ""
    for unit, left in allowance.items():
        lines += (
            f"\r\nx-ratelimit-limit-{unit}: {left.limit}\r\nx-ratelimit-remaining-{unit}: {left.remaining}"
            f"\r\nx-ratelimit-reset-{unit}: {duration(left.reset_after_s)}"
        )
    return lines


def duration(seconds: float) -> str:
    """As OpenAI and Go write it: `12ms`, `1s`, `6m0s`, `1h0m5s`. Rounded up: never too early."""
    if seconds < 1:
        milliseconds = math.ceil(seconds * 1000)
        return f"{milliseconds}ms" if milliseconds < 1000 else "1s"
    whole = math.ceil(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60}m{rest}s"


def value_of(fields: RawHeaders, name: bytes) -> bytes | None:
    """The first field of this (lower-case) name."""
    size = len(name)
    for field, value in fields:
        if len(field) == size and field.lower() == name:
            return value
    return None


def is_encoded(fields: RawHeaders) -> bool:
    """Can a body with these fields not be read as it is?"""
    return value_of(fields, b"content-encoding") not in (None, b"", b"identity")


def _text(raw: bytes) -> str:
    """What is UTF-8 crosses byte by byte. What is not is read as ISO-8859-1, which it once was by definition
    (RFC 9110 5.5), and goes out as the UTF-8 of that: aiohttp's writer (_http_writer.pyx, _write_utf8) takes
    text only, writes UTF-8 only, and leaves a surrogate out without a word."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def client_ip(peer: str | None, forwarded_for: Sequence[str], trusted: Networks) -> str:
    """Whom we are talking to: the right-most hop that is not one of our own proxies.

    X-Forwarded-For is only believed if the socket's peer is trusted; a value that is no address ends the
    walk, because everything left of it was written by somebody unknown.
    """
    if peer and not forwarded_for:
        return peer
    if not peer:  # a unix socket: whoever may open it is trusted
        return _walk("unix", forwarded_for, trusted)
    return _walk(peer, forwarded_for, trusted) if _trusted(peer, trusted) else peer


def _walk(start: str, forwarded_for: Iterable[str], trusted: Networks) -> str:
    address = start
    hops = [hop.strip() for line in forwarded_for for hop in line.split(",")]
    for hop in reversed(hops):
        try:
            ipaddress.ip_address(hop)
        except ValueError:
            return address
        address = hop
        if not _trusted(hop, trusted):
            return address
    return address


def _trusted(address: str, trusted: Networks) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in trusted if network.version == parsed.version)
