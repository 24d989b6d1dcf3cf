"""docs/metrics.md: every metric and every field of the log line, from `metrics.py` and `log.py`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from docs.markdown import code, plain, table
from proxy.breaker import State
from proxy.context import Phase
from proxy.endpoints import TABLE
from proxy.errors import Reason, UpstreamFailed
from proxy.log import RequestLine
from proxy.metrics import Counter, Histogram, Metrics

_HEAD = """# Metrics and the log line

{generated}

`GET /metrics` of the admin listener, for Prometheus, in its text or OpenMetrics format. The figures are of
all workers together, and no counter goes backwards when a worker is replaced or a new generation takes over.
[grafana/](../grafana/) has dashboards and alerts on them.
"""
_LABELS = """## Labels

Each label has a closed set of values, so that no caller can make series.
"""
_LOG = """## The log line

One JSON object a request, on standard output or in `log.file`; `log.format: text` has the same fields as
`name=value`. It holds no header value but the two ids, no query and nothing of a body. Other lines have an
`event` of their own.
"""

#: What is not an enumeration of the code's.
_VALUES = {
    "model": "as configured; a pattern is one model; `other`: not configured; `none`: the route has no model",
    "upstream": "as configured; `none`: nobody was asked",
    "code": "the HTTP status; 499: the caller left before there was one",
    "type": "`prompt`, `cached` (part of prompt), `completion`, `reasoning` (part of completion)",
    "scope": "`ip`, `key`, `plan`, `model`, `tokens`, `in_flight`, `budget`, `global`",
    "plan": "as configured; `open` for callers without one",
    "generation": "`0`, `1`, `2`",
    "version": "of Headrace",
}

#: What a field of the line says; units are in the names.
_FIELDS = {
    "ts": "When the request ended, RFC 3339 in UTC.",
    "level": "`info`.",
    "event": "`request`.",
    "request_id": "The caller's `x-request-id` if it is harmless, else one of ours; also sent upstream.",
    "key_id": "The key's id, never its secret; of a token `iss` and `sub`; null: nobody was asked for one.",
    "plan": "The caller's plan; null in open mode.",
    "method": "The HTTP method.",
    "route": "The row of the allow-list; `other` for what is not served.",
    "model": "The configured name.",
    "upstream": "Who answered, or was asked last.",
    "attempts": "Attempts that were made; 0: none.",
    "status": "The HTTP status that the caller saw; 499: it left before there was one.",
    "reason": "How the request ended: one of a closed list.",
    "queue_ms": "Waiting for slots.",
    "ttfb_ms": "From the head of the request to the upstream's first byte.",
    "ttft_ms": "From the head of the request to the first content, reasoning or tool call.",
    "duration_ms": "From the head of the request to the last byte.",
    "chunks": "Reads that were passed on; of a stream about one an event.",
    "bytes_in": "Bytes of the request's body.",
    "bytes_out": "Bytes of the answer's body, without comments and chunk framing.",
    "prompt_tokens": "Null where the usage is unknown.",
    "completion_tokens": "Reasoning included; null where the usage is unknown.",
    "usage_source": "`reported`, `estimated` or `unknown`; null: refused before its cost was looked at.",
    "cost_usd": "Exact, as text; null: the usage or the price is unknown.",
    "client_ip": "Of the caller; through `trusted_proxies`.",
    "error": "The error code of an answer that Headrace made, else null.",
    "trace_id": "Of the caller's valid `traceparent`, else null.",
}


def page(generated: str) -> str:
    """Raises LookupError if a field of the log line has no words, or words have no field."""
    fields = [field.name for field in msgspec.structs.fields(RequestLine)]
    if set(fields) != _FIELDS.keys():
        raise LookupError(f"explained and logged differ: {sorted(set(fields) ^ _FIELDS.keys())}")
    metrics = list(Metrics(""))
    titles = ("Metric", "Type", "Labels", "Meaning")
    return "\n".join(
        [
            _HEAD.format(generated=generated),
            *table(titles, sorted(_metric_row(metric) for metric in metrics)),
            "",
            _LABELS,
            *table(("Label", "Values"), _label_rows(metrics)),
            "",
            _LOG,
            *table(("Field", "Meaning"), [(code(name), _FIELDS[name]) for name in fields]),
            "",
        ]
    )


def _metric_row(metric: Counter | Histogram) -> list[str]:
    meaning = metric.help
    if isinstance(metric, Histogram):
        first, last = metric.buckets[0], metric.buckets[-1]
        meaning += f" {len(metric.buckets)} buckets, {plain(first)} to {plain(last)} s."
    return [code(metric.name), metric.kind, ", ".join(map(code, metric.labels)), meaning]


def _label_rows(metrics: list[Counter | Histogram]) -> Iterator[tuple[str, str]]:
    """Raises KeyError for a label without an explanation."""
    attempts = sorted({"ok", "cancelled", *_results(UpstreamFailed)})
    enumerations = {
        "route": f"the {len({row.name for row in TABLE})} rows of `proxy/endpoints.py`, without what callers "
        "write into them; `other`: not served",
        "reason": ", ".join(code(reason) for reason in Reason),
        "phase": ", ".join(code(phase) for phase in Phase),
        "result": f"of attempts {', '.join(map(code, attempts))}; "
        "of limits `allowed`, `refused`, `observed`; of reloads `ok`, `error`",
        **_VALUES,
    }
    for label in dict.fromkeys(label for metric in metrics for label in metric.labels):
        yield code(label), enumerations[label]
    states = ", ".join(f"{state.value} {state.name.lower().replace('_', '-')}" for state in State)
    yield "`headrace_breaker_state`, its value", states


def _results(kind: type[UpstreamFailed]) -> Iterator[str]:
    yield kind.result
    for each in kind.__subclasses__():
        yield from _results(each)
