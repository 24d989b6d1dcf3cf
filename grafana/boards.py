"""What the dashboards show: first rate, errors and duration (what callers feel), then use, saturation and
errors of what Headrace runs on.

A ratio has no value without traffic. What a healthy system does not have (cuts, drops) is 0, not empty.
"""

from __future__ import annotations

from grafana.build import Board, Row, graph, heat, stat, states

#: Ends that a caller would call a failure and did not bring about. `drained` and `killed` are the operator's.
FAILED = "upstream_error|upstream_cut|upstream_stall|deadline|internal_error"
_EVERY = "$__rate_interval"


def _where(*conditions: str, by: str = "") -> str:
    """A selector: the chosen instance, the chosen values of the labels named in `by`, and the conditions."""
    chosen = [f'{name}=~"${name}"' for name in ("instance", *by.split())]
    return "{" + ",".join([*chosen, *conditions]) + "}"


def _rate(metric: str, *conditions: str, by: str = "") -> str:
    return f"rate(headrace_{metric}{_where(*conditions, by=by)}[{_EVERY}])"


def _total(inner: str, *labels: str) -> str:
    return f"sum by ({', '.join(labels)}) ({inner})" if labels else f"sum({inner})"


def _or_zero(inner: str) -> str:
    return f"({inner} or vector(0))"


def _quantile(share: float, metric: str, *labels: str, by: str = "") -> str:
    buckets = _total(_rate(f"{metric}_bucket", by=by), "le", *labels)
    return f"histogram_quantile({share}, {buckets})"


def _quantiles(metric: str, by: str = "") -> list[tuple[str, str]]:
    return [(f"p{share * 100:g}", _quantile(share, metric, by=by)) for share in (0.5, 0.95, 0.99)]


def _level(metric: str, *labels: str, by: str = "") -> str:
    return _total(f"headrace_{metric}{_where(by=by)}", *labels)


_CALLS = "model upstream"
_REQUESTS = _total(_rate("requests_total", by=_CALLS))
_FAILURES = _total(_rate("requests_total", f'reason=~"{FAILED}"', by=_CALLS))
_TTFT = "time_to_first_token_seconds"

_INSTANCE = ("instance", "headrace_build_info")
_MODEL = ("model", "headrace_requests_total")
_UPSTREAM = ("upstream", "headrace_requests_total")

OVERVIEW = Board(
    "headrace-overview",
    "Headrace: overview",
    "Is it well? Rate, errors and duration of requests; then what the machine has left.",
    (
        Row(
            "Now",
            (
                stat("Requests", "Requests that ended, per second.", "reqps", _REQUESTS),
                stat(
                    "Failures",
                    "Share of requests that an upstream or Headrace failed: errors, cuts, stalls, deadlines.",
                    "percentunit",
                    f"{_or_zero(_FAILURES)} / ({_REQUESTS} > 0)",
                    steps=(0.01, 0.05),
                ),
                stat(
                    "Active streams",
                    "Event streams that are being delivered.",
                    "short",
                    _or_zero(_level("streams_active", by="upstream")),
                ),
                stat(
                    "First token, p95",
                    "From a request's head to its first content, reasoning or tool call.",
                    "s",
                    _quantile(0.95, _TTFT, by=_CALLS),
                    steps=(5, 15),
                ),
                stat(
                    "Tokens",
                    "Tokens written by models per second, reported or estimated.",
                    "suffix: tok/s",
                    _or_zero(_total(_rate("tokens_total", 'type="completion"', by="model"))),
                ),
                stat(
                    "Overhead, p99",
                    "From a request's head to its departure upstream, less waiting for a slot.",
                    "s",
                    _quantile(0.99, "overhead_seconds"),
                    steps=(0.01, 0.05),
                ),
            ),
        ),
        Row(
            "Rate and errors",
            (
                graph(
                    "Requests by end",
                    "Each request ends for one reason of a closed list; README, What a stream does.",
                    "reqps",
                    ("{{reason}}", _total(_rate("requests_total", by=_CALLS), "reason")),
                    stacked=True,
                ),
                graph(
                    "Requests by model",
                    "As configured; `other` is a model that nobody configured, `none` a request without one.",
                    "reqps",
                    ("{{model}}", _total(_rate("requests_total", by=_CALLS), "model")),
                    stacked=True,
                ),
                graph(
                    "Answers by status",
                    "What callers were told. 499: the caller left first.",
                    "reqps",
                    ("{{code}}", _total(_rate("requests_total", by=_CALLS), "code")),
                    stacked=True,
                ),
                graph(
                    "Failures by upstream",
                    "Share of its requests that failed, after all retries.",
                    "percentunit",
                    (
                        "{{upstream}}",
                        _total(_rate("requests_total", f'reason=~"{FAILED}"', by=_CALLS), "upstream")
                        + " / "
                        + _total(_rate("requests_total", by=_CALLS), "upstream"),
                    ),
                    steps=(0.01, 0.05),
                ),
                graph(
                    "Callers that left",
                    "Before the end, by what they waited for. Many in `queue` or `first_byte`: too slow.",
                    "reqps",
                    ("{{phase}}", _total(_rate("client_disconnects_total"), "phase")),
                    stacked=True,
                ),
                graph(
                    "Refused by a limit",
                    "Decisions that refused a request, by whose limit it was.",
                    "reqps",
                    ("{{scope}}", _total(_rate("limit_decisions_total", 'result="refused"'), "scope")),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Duration",
            (
                graph(
                    "First byte",
                    "From a request's head to the upstream's first byte.",
                    "s",
                    *_quantiles("time_to_first_byte_seconds", by="upstream"),
                ),
                graph(
                    "First token",
                    "From a request's head to its first content, reasoning or tool call.",
                    "s",
                    *_quantiles(_TTFT, by=_CALLS),
                ),
                graph(
                    "Whole requests",
                    "From a request's head to the last byte of its answer.",
                    "s",
                    *_quantiles("request_duration_seconds", by="upstream"),
                ),
            ),
        ),
        Row(
            "Use and saturation",
            (
                graph(
                    "CPU",
                    "Cores that all processes use together. A worker cannot use more than one.",
                    "short",
                    ("used", _total(_rate("process_cpu_seconds_total"))),
                    ("processes", _level("workers")),
                ),
                graph(
                    "Event loop lag",
                    "How late a timer fires: above 0.1 s every stream of that process stutters.",
                    "s",
                    *_quantiles("event_loop_lag_seconds"),
                    steps=(0.1, 0.5),
                ),
                graph(
                    "Garbage collection",
                    "How long a collection stops its process.",
                    "s",
                    *_quantiles("gc_pause_seconds"),
                    steps=(0.05, 0.1),
                ),
                graph(
                    "Memory",
                    "Resident, all processes together.",
                    "bytes",
                    ("{{instance}}", _level("process_resident_memory_bytes", "instance")),
                ),
                graph(
                    "File descriptors",
                    "Share of its limit that is used in the process with the least left. A stream takes two.",
                    "percentunit",
                    ("{{instance}}", f"max by (instance) (headrace_process_open_fds_ratio{_where()})"),
                    steps=(0.7, 0.9),
                    most=1,
                ),
                graph(
                    "Requests under way",
                    "Being handled, and of those waiting for a slot.",
                    "short",
                    ("in flight", _level("requests_in_flight")),
                    ("queued", _level("queue_depth")),
                ),
                graph(
                    "Lost figures",
                    "Ledger rows and log lines that were dropped: 0 unless a disk is full or stands still.",
                    "short",
                    ("ledger rows", _total(_rate("ledger_dropped_total"))),
                    ("log lines", _total(_rate("log_lines_dropped_total"))),
                    ("rows that wait", _level("ledger_pending")),
                ),
                graph(
                    "Workers replaced",
                    "That died or hung, in the last hour: each broke its own streams.",
                    "short",
                    ("{{instance}}", f"increase(headrace_workers_replaced_total{_where()}[1h])"),
                    steps=(1, 5),
                ),
                graph(
                    "Reloads",
                    "Of the configuration, in the last hour.",
                    "short",
                    (
                        "{{result}}",
                        f"sum by (result) (increase(headrace_config_reloads_total{_where()}[1h]))",
                    ),
                ),
            ),
        ),
    ),
    (_INSTANCE, _MODEL, _UPSTREAM),
)

STREAMS = Board(
    "headrace-streams",
    "Headrace: streaming quality",
    "What a reader of a stream sees: how long until the first token, how evenly the rest, and how it ended.",
    (
        Row(
            "Now",
            (
                stat(
                    "First token, p50",
                    "Half of all streams begin sooner.",
                    "s",
                    _quantile(0.5, _TTFT, by=_CALLS),
                ),
                stat(
                    "First token, p95",
                    "One stream in twenty begins later.",
                    "s",
                    _quantile(0.95, _TTFT, by=_CALLS),
                    steps=(5, 15),
                ),
                stat(
                    "Gap, p99",
                    "One gap between two chunks in a hundred is longer.",
                    "s",
                    _quantile(0.99, "inter_chunk_seconds", by="upstream"),
                    steps=(1, 5),
                ),
                stat(
                    "Broken streams",
                    "Share of requests that an upstream cut or left silent.",
                    "percentunit",
                    _or_zero(
                        _total(_rate("requests_total", 'reason=~"upstream_cut|upstream_stall"', by=_CALLS))
                    )
                    + f" / ({_REQUESTS} > 0)",
                    steps=(0.005, 0.02),
                ),
                stat(
                    "Delivered",
                    "Bytes of answers per second.",
                    "Bps",
                    _total(_rate("response_bytes_total")),
                ),
                stat(
                    "Heartbeats",
                    "Comments per second, sent while an upstream was silent.",
                    "cps",
                    _total(_rate("heartbeats_total")),
                ),
            ),
        ),
        Row(
            "First token",
            (
                heat(
                    "First token, all streams",
                    "How long streams took to begin. Two bands: two kinds of requests, or a slow upstream.",
                    _total(f"increase(headrace_{_TTFT}_bucket{_where(by=_CALLS)}[{_EVERY}])", "le"),
                    width=12,
                ),
                graph(
                    "First token by model, p95",
                    "From a request's head to its first content, reasoning or tool call.",
                    "s",
                    ("{{model}}", _quantile(0.95, _TTFT, "model", by=_CALLS)),
                    width=12,
                ),
                graph(
                    "First byte by upstream, p95",
                    "Much sooner than the first token: the upstream sends comments while it thinks.",
                    "s",
                    (
                        "{{upstream}}",
                        _quantile(0.95, "time_to_first_byte_seconds", "upstream", by="upstream"),
                    ),
                ),
                graph(
                    "First token by upstream, p50",
                    "What an upstream is like on an ordinary day.",
                    "s",
                    ("{{upstream}}", _quantile(0.5, _TTFT, "upstream", by=_CALLS)),
                ),
                graph(
                    "Headrace's own share",
                    "From a request's head to its departure upstream, less waiting for a slot.",
                    "s",
                    *_quantiles("overhead_seconds"),
                    steps=(0.01, 0.05),
                ),
            ),
        ),
        Row(
            "Evenness",
            (
                heat(
                    "Gaps between chunks",
                    "Every gap between two reads of a stream.",
                    _total(
                        f"increase(headrace_inter_chunk_seconds_bucket{_where(by='upstream')}[{_EVERY}])",
                        "le",
                    ),
                    width=12,
                ),
                graph(
                    "Gaps by upstream, p99",
                    "A reader notices from about 1 s on.",
                    "s",
                    ("{{upstream}}", _quantile(0.99, "inter_chunk_seconds", "upstream", by="upstream")),
                    steps=(1, 5),
                    width=12,
                ),
                graph(
                    "Chunks",
                    "Per second, by upstream.",
                    "cps",
                    ("{{upstream}}", _total(_rate("inter_chunk_seconds_count", by="upstream"), "upstream")),
                    stacked=True,
                ),
                graph(
                    "Active streams",
                    "Event streams that are being delivered.",
                    "short",
                    ("{{upstream}}", _level("streams_active", "upstream", by="upstream")),
                    stacked=True,
                ),
                graph(
                    "Silence",
                    "Heartbeats per second.",
                    "cps",
                    ("heartbeats", _total(_rate("heartbeats_total"))),
                ),
            ),
        ),
        Row(
            "Ends",
            (
                graph(
                    "How requests end",
                    "All but `complete`.",
                    "reqps",
                    (
                        "{{reason}}",
                        _total(_rate("requests_total", 'reason!="complete"', by=_CALLS), "reason"),
                    ),
                    stacked=True,
                ),
                graph(
                    "Cuts and stalls by upstream",
                    "Share of an upstream's requests that ended early or in silence.",
                    "percentunit",
                    (
                        "{{upstream}}",
                        _total(
                            _rate("requests_total", 'reason=~"upstream_cut|upstream_stall"', by=_CALLS),
                            "upstream",
                        )
                        + " / "
                        + _total(_rate("requests_total", by=_CALLS), "upstream"),
                    ),
                    steps=(0.005, 0.02),
                ),
                graph(
                    "Callers that left mid-stream",
                    "Their upstream requests were closed, or read to the end for their usage.",
                    "reqps",
                    (
                        "{{phase}}",
                        _total(_rate("client_disconnects_total", 'phase=~"stream|answer"'), "phase"),
                    ),
                ),
            ),
        ),
    ),
    (_INSTANCE, _MODEL, _UPSTREAM),
)

_ATTEMPTS = _rate("upstream_attempts_total", by="upstream")
_BAD_ATTEMPTS = _rate("upstream_attempts_total", 'result!~"ok|cancelled"', by="upstream")

UPSTREAMS = Board(
    "headrace-upstreams",
    "Headrace: upstreams and limits",
    "Which upstream is asked, how it answers, when it is left alone; who is refused or waits, and why.",
    (
        Row(
            "Upstreams",
            (
                states(
                    "Available",
                    "Healthy and not full, in every process. An upstream that is not is passed by.",
                    [(1, "available", "green"), (0, "not available", "red")],
                    f"min by (upstream) (headrace_upstream_available{_where(by='upstream')})",
                    width=12,
                ),
                states(
                    "Breaker",
                    "Open: too many failures, nobody is asked. Half-open: one trial.",
                    [(0, "closed", "green"), (1, "half-open", "orange"), (2, "open", "red")],
                    f"max by (upstream) (headrace_breaker_state{_where(by='upstream')})",
                    width=12,
                ),
                graph(
                    "Attempts by result",
                    "`status`: an answer that may be tried again. `cancelled`: the caller left.",
                    "reqps",
                    ("{{result}}", _total(_ATTEMPTS, "result")),
                    stacked=True,
                ),
                graph(
                    "Attempts by upstream",
                    "Retries and hedges included.",
                    "reqps",
                    ("{{upstream}}", _total(_ATTEMPTS, "upstream")),
                    stacked=True,
                ),
                graph(
                    "Failed attempts",
                    "Share of an upstream's attempts that failed, whether or not another one helped.",
                    "percentunit",
                    (
                        "{{upstream}}",
                        f"{_total(_BAD_ATTEMPTS, 'upstream')} / {_total(_ATTEMPTS, 'upstream')}",
                    ),
                    steps=(0.02, 0.1),
                ),
                graph(
                    "Attempts per request",
                    "Of requests that reached an upstream. The retry budget keeps this under 1.2 by default.",
                    "short",
                    (
                        "attempts",
                        f"{_total(_ATTEMPTS)} / ("
                        + _total(_rate("requests_total", 'upstream!="none"', by="upstream"))
                        + " > 0)",
                    ),
                    steps=(1.2, 1.5),
                ),
                graph(
                    "Requests at upstreams",
                    "Now. An upstream at its `max_in_flight` is full.",
                    "short",
                    ("{{upstream}}", _level("upstream_in_flight", "upstream", by="upstream")),
                    stacked=True,
                ),
                graph(
                    "429 of upstreams",
                    "Passed on to callers: their quota there is used up.",
                    "reqps",
                    (
                        "{{upstream}}",
                        _total(
                            _rate("requests_total", 'code="429"', 'upstream!="none"', by="upstream"),
                            "upstream",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Limits",
            (
                graph(
                    "Refused",
                    "Decisions per second that refused a request, by whose limit it was.",
                    "reqps",
                    ("{{scope}}", _total(_rate("limit_decisions_total", 'result="refused"'), "scope")),
                    stacked=True,
                ),
                graph(
                    "Share refused",
                    "Of each kind of decision. With `limits: {mode: observe}` what would have been refused.",
                    "percentunit",
                    (
                        "{{scope}}",
                        _total(_rate("limit_decisions_total", 'result=~"refused|observed"'), "scope")
                        + " / "
                        + _total(_rate("limit_decisions_total"), "scope"),
                    ),
                ),
                stat(
                    "Store of limits",
                    "Whether it answers. While it does not, each machine counts by itself or as configured.",
                    "none",
                    f"min(headrace_state_store_up{_where()})",
                    steps=(1,),
                    falling=True,
                    words=((1, "up", "green"), (0, "down", "red")),
                    width=8,
                ),
                graph(
                    "Waiting for a slot",
                    "Requests in the queue, by plan.",
                    "short",
                    ("{{plan}}", _level("queue_depth", "plan")),
                    stacked=True,
                    width=12,
                ),
                graph(
                    "Time in the queue, p95",
                    "Of requests that had to wait, by plan.",
                    "s",
                    ("{{plan}}", _quantile(0.95, "queue_wait_seconds", "plan")),
                    steps=(5, 10),
                    width=12,
                ),
            ),
        ),
    ),
    (_INSTANCE, _UPSTREAM),
)

_COST = "headrace_cost_usd_total" + _where(by="model")


def _tokens(kind: str) -> str:
    where = _where(f'type="{kind}"', by="model")
    return f"sum(increase(headrace_tokens_total{where}[$__range]))"


SPEND = Board(
    "headrace-spend",
    "Headrace: spend",
    "What the tokens cost. The ledger (`headrace usage`) is the account; this is its rate.",
    (
        Row(
            "In the chosen time",
            (
                stat("Spent", "US dollars.", "currencyUSD", f"sum(increase({_COST}[$__range]))", width=6),
                stat(
                    "Per hour, now",
                    "What an hour costs at the present rate.",
                    "currencyUSD",
                    f"sum(rate({_COST}[{_EVERY}])) * 3600",
                    width=6,
                ),
                stat(
                    "Per request",
                    "US dollars a request that reached an upstream.",
                    "currencyUSD",
                    f"sum(increase({_COST}[$__range])) / (sum(increase(headrace_requests_total"
                    + _where('upstream!="none"', by="model")
                    + "[$__range])) > 0)",
                    width=6,
                ),
                stat(
                    "Prompt from cache",
                    "Share of prompt tokens that the provider had cached, which cost less.",
                    "percentunit",
                    f"{_tokens('cached')} / ({_tokens('prompt')} > 0)",
                    width=6,
                ),
            ),
        ),
        Row(
            "Dollars",
            (
                graph(
                    "Dollars an hour by model",
                    "At the rate of the moment.",
                    "currencyUSD",
                    ("{{model}}", f"sum by (model) (rate({_COST}[{_EVERY}])) * 3600"),
                    stacked=True,
                    width=12,
                ),
                graph(
                    "Dollars by model",
                    "Over the chosen time, up to each moment.",
                    "currencyUSD",
                    ("{{model}}", f"sum by (model) (increase({_COST}[$__range]))"),
                    stacked=True,
                    width=12,
                ),
                graph(
                    "Dollars per million tokens written",
                    "Everything that a model cost, prompts too, over the tokens it wrote.",
                    "currencyUSD",
                    (
                        "{{model}}",
                        f"1e6 * sum by (model) (rate({_COST}[{_EVERY}])) / sum by (model) ("
                        + _rate("tokens_total", 'type="completion"', by="model")
                        + ")",
                    ),
                    width=12,
                ),
                graph(
                    "Month at this rate",
                    "Thirty days of the last hour.",
                    "currencyUSD",
                    ("projected", f"sum(rate({_COST}[1h])) * 30 * 86400"),
                    width=12,
                ),
            ),
        ),
        Row(
            "Tokens",
            (
                graph(
                    "Tokens by type",
                    "`cached` is a part of `prompt`, `reasoning` a part of `completion`.",
                    "suffix: tok/s",
                    ("{{type}}", _total(_rate("tokens_total", by="model"), "type")),
                ),
                graph(
                    "Tokens written by model",
                    "Completion tokens per second.",
                    "suffix: tok/s",
                    ("{{model}}", _total(_rate("tokens_total", 'type="completion"', by="model"), "model")),
                    stacked=True,
                ),
                graph(
                    "Ledger",
                    "Rows per second: one for each request that reached an upstream; dropped ones are lost.",
                    "cps",
                    ("rows", _total(_rate("ledger_rows_total"))),
                    ("dropped", _total(_rate("ledger_dropped_total"))),
                ),
            ),
        ),
    ),
    (_INSTANCE, _MODEL),
)

BOARDS = (OVERVIEW, STREAMS, UPSTREAMS, SPEND)
