"""What the behaviour of a chain means: from observations to findings. No I/O and no clock.

Headrace sends an event and writes into it when that was. The clocks at both ends differ by an unknown but
constant time, so that only differences are compared: an event that arrives later after its predecessor than
it was sent was held back, one that arrives sooner was held back together with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from proxy.doctor_findings import Finding, hint, ok, problem

UNBUFFERED = ("proxy_http_version 1.1;", "proxy_buffering off;")
#: More than Headrace's timeouts.total (900 s): Headrace says how long an answer may take.
PATIENT = ("proxy_read_timeout 960s;",)
#: Headrace's own max_body_bytes.
BODY_BYTES = 32 * 2**20

#: An event that comes in less than this share of the time after which it was sent came with its predecessor.
_TOGETHER = 0.25
#: So many of them are a rule; fewer are a busy machine or a radio network.
_LUMPED_SHARE = 1 / 3
#: A stream that falls behind by so much over its length, in seconds, is slowed down.
_BEHIND_S = 0.5
_EXPIRES_SOON_DAYS = 14


class Arrival(NamedTuple):
    """An event: the sender's and the receiver's seconds."""

    sent_s: float
    arrived_s: float


def pace(events: Sequence[Arrival], expected: int) -> Finding:
    """Do events arrive as they are sent?"""
    if len(events) < expected:
        return problem("pace", f"only {len(events)} of {expected} events arrived", *UNBUFFERED)
    sent_s = events[-1].sent_s - events[0].sent_s
    took_s = events[-1].arrived_s - events[0].arrived_s
    if took_s < sent_s * _TOGETHER:
        text = (
            f"{expected} events, sent over {sent_s:.1f} s, arrived within {took_s:.2f} s: buffered to the end"
        )
        return problem("pace", text, *UNBUFFERED)
    together = sum(
        later.arrived_s - earlier.arrived_s < (later.sent_s - earlier.sent_s) * _TOGETHER
        for earlier, later in pairwise(events)
    )
    if together > (expected - 1) * _LUMPED_SHARE:
        text = f"{together} of {expected} events arrived together with the one before: buffered"
        return problem("pace", text, *UNBUFFERED)
    return ok(
        "pace", f"{expected} events arrived one by one, {_spread_ms(events):.0f} ms between slow and fast"
    )


def _spread_ms(events: Sequence[Arrival]) -> float:
    delays = [event.arrived_s - event.sent_s for event in events]
    return (max(delays) - min(delays)) * 1000


def rate(events: Sequence[Arrival], bytes_per_s: float) -> Finding:
    """Does a stream of so many bytes a second keep up?"""
    if len(events) < 2:
        return problem("rate", "the stream did not arrive", *UNBUFFERED)
    behind_s = (events[-1].arrived_s - events[-1].sent_s) - (events[0].arrived_s - events[0].sent_s)
    if behind_s > _BEHIND_S:
        text = f"a stream of {bytes_per_s / 1000:.0f} kB/s fell {behind_s:.1f} s behind: slowed down"
        return problem("rate", text, "limit_rate 0;")
    return ok("rate", f"a stream of {bytes_per_s / 1000:.0f} kB/s keeps up")


def encoding(fields: Mapping[str, str]) -> Finding:
    """`fields`: of an event stream, asked for with gzip allowed; names as in HTTP, whatever their case."""
    found = fields.get("Content-Encoding", "identity")
    if found != "identity":
        return problem(
            "encoding", f"event streams are compressed ({found}), against no-transform", "gzip off;"
        )
    return ok("encoding", "event streams are not compressed")


def headers(fields: Mapping[str, str]) -> Finding:
    """Are the fields of an event stream there that callers and further proxies rely on?"""
    missing = []
    if not fields.get("Content-Type", "").startswith("text/event-stream"):
        missing.append("Content-Type")
    if "no-transform" not in fields.get("Cache-Control", ""):
        missing.append("Cache-Control")
    if "x-headrace-probe" not in fields:
        missing.append("x-headrace-*")
    missing += [name for name in ("x-request-id", "request-id") if name not in fields]
    if missing:
        fix = [f"# no proxy_hide_header, no add_header for {name}" for name in missing]
        return problem("headers", f"changed or dropped on the way: {', '.join(missing)}", *fix)
    return ok("headers", "all fields of an event stream arrive")


def request_id(sent: str, fields: Mapping[str, str]) -> Finding:
    """Does the caller's id come back?"""
    back = fields.get("x-request-id")
    if back == sent:
        return ok("request_id", "the caller's x-request-id comes back")
    what = "is dropped on the way" if back is None else "is replaced on the way"
    line = "proxy_set_header X-Request-ID $http_x_request_id;  # and no proxy_hide_header for it"
    return problem("request_id", f"the caller's x-request-id {what}", line)


def http_version(version: str, *, kept: bool) -> Finding:
    """Of the connection between the chain and its callers."""
    if version == "1.0":
        return problem("http", "the chain answers in HTTP/1.0: streams end without a frame", *UNBUFFERED)
    if not kept:
        return hint("http", "connections are closed after each request", "keepalive_timeout 75s;")
    return ok("http", f"HTTP/{version}, connections are kept")


def error_page(status: int, content_type: str, code: str | None) -> Finding:
    """What a path that does not exist answers. `code`: of the JSON error, None if it was none."""
    if code is not None and status == 404:
        return ok("errors", "errors arrive as Headrace's JSON")
    text = f"an error of Headrace arrives as {status} {content_type or 'without a type'}, not as its JSON"
    return problem("errors", text, "proxy_intercept_errors off;")


def exposed(paths: Sequence[str]) -> Finding:
    """Which paths of the admin listener the public can ask."""
    if paths:
        line = "location ~* ^/(metrics|admin|debug|healthz|readyz)(/|$) { return 404; }"
        return problem("admin", f"the public can read {', '.join(paths)}", line)
    return ok("admin", "nothing of the admin listener is public")


def largest_body(taken_bytes: int) -> Finding:
    """The largest body that was not refused, of those that were tried."""
    if taken_bytes >= BODY_BYTES:
        return ok("body", f"bodies of {BODY_BYTES >> 20} MiB are taken")
    text = f"bodies of {BODY_BYTES >> 20} MiB are refused (413), of {taken_bytes >> 10} KiB taken"
    return problem("body", text, "client_max_body_size 32m;")


def silence(cut_s: float | None, waited_s: float) -> Finding:
    """After how many seconds a silent stream was cut."""
    if cut_s is None:
        return ok("silence", f"a stream that is silent for {waited_s:g} s is not cut")
    text = f"a silent stream is cut after {cut_s:.1f} s; answers without a stream may be silent for minutes"
    return problem("silence", text, *PATIENT)


def heartbeat(cut_s: float | None, waited_s: float, every_s: float) -> Finding:
    """The same with heartbeats."""
    if cut_s is None:
        return ok("heartbeat", f"with a comment every {every_s:g} s it lasts {waited_s:g} s")
    text = f"with a comment every {every_s:g} s a stream is cut after {cut_s:.1f} s: heartbeats do not help"
    return problem("heartbeat", text, *PATIENT)


def cached(clocks: Sequence[float | None]) -> Finding:
    """The same question twice: the server's clock in the answers."""
    if None in clocks:
        return hint("cache", "the health stream could not be read twice")
    if len(set(clocks)) < len(clocks):
        return problem("cache", "an event stream came out of a cache", "proxy_cache off;")
    return ok("cache", "event streams are not cached")


def certificate(days_left: float, protocol: str, alpn: str | None) -> list[Finding]:
    """Of a certificate that is trusted."""
    found = []
    if protocol in ("TLSv1", "TLSv1.1", "SSLv3"):
        found.append(problem("tls", f"{protocol} is used", "ssl_protocols TLSv1.2 TLSv1.3;"))
    if days_left < _EXPIRES_SOON_DAYS:
        found.append(hint("tls", f"the certificate ends in {days_left:.0f} days"))
    if alpn != "h2":
        found.append(hint("tls", "HTTP/2 is not offered", "listen 443 ssl http2;"))
    return found or [
        ok("tls", f"{protocol}, HTTP/2 is offered, the certificate is good for {days_left:.0f} days")
    ]
