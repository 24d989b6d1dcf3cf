"""`headrace doctor URL`: what does the chain between callers and Headrace do to streams?

It asks what anybody may ask, above all `/api/health/stream`, whose rhythm is known (`probe_stream`), and with
a key one short chat. What stands in between may be anything; the lines that mend it are nginx's. An island:
nothing of the server is imported.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from urllib.parse import urlsplit

import msgspec

from proxy import doctor_rules as rules
from proxy.doctor_asks import Answer, Chain, Handshake, Unreachable, new_id, opened, shake_hands
from proxy.doctor_findings import Finding, Report, hint, ok, problem

_STREAM = "/api/health/stream"
_EVENTS, _GAP_S = 10, 0.2
#: A busy model: 20 kB/s, for 2 s.
_FAST_EVENTS, _FAST_GAP_S, _FAST_PADDING = 20, 0.1, 2000
#: Bounds of the server.
_LONGEST_S = 300.0
_BODIES = (2**16, 2**20, 2**22, 2**24, rules.BODY_BYTES)
_ADMIN_PATHS = ("/metrics", "/debug/state", "/admin/streams")
_CHAT_TOKENS = 16


class Options(msgspec.Struct, frozen=True):
    """patience_s: how long a stream is kept silent. key: for a short chat with `model` (None: the first)."""

    patience_s: float = 65.0
    key: str | None = None
    model: str | None = None


async def examine(url: str, options: Options) -> Report:
    """All checks. `url`: of the service, with or without /v1."""
    url = url.rstrip("/").removesuffix("/v1")
    try:
        return Report(url, await _examine(url, options))
    except Unreachable as error:
        return Report(url, [problem("reach", f"cannot be reached: {error}")])


async def _examine(url: str, options: Options) -> list[Finding]:
    found, context, trusted = await _tls(url)
    async with opened(url, context, trusted=trusted) as chain:
        health = await _health(chain)
        found.append(health)
        if health != _HEALTHY:
            return found
        for check in (_version, _request_id, _errors, _admin, _body, _cache):
            found += await _safely(check, chain)
        streams = (_pace(chain), _rate(chain), *_silences(chain, options.patience_s))
        for findings in await asyncio.gather(*streams):
            found += findings
        if options.key is not None:
            found += await _safely(lambda chain: _chat(chain, options), chain)
    return found


Check = Callable[[Chain], Awaitable[list[Finding]]]


async def _safely(check: Check, chain: Chain) -> list[Finding]:
    """A check that gets no answer is a finding, not the end."""
    try:
        return await check(chain)
    except (Unreachable, OSError) as error:
        return [problem("reach", f"a request got no answer: {error}")]


# ── before anything else ─────────────────────────────────────────────────────────────────────────────────


async def _tls(url: str) -> tuple[list[Finding], ssl.SSLContext, bool]:
    """The findings, the context for all further connections, and whether it verifies."""
    if urlsplit(url).scheme != "https":
        near = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        text = "plain HTTP: keys can be read on the way"
        lines = ("listen 443 ssl http2;", "ssl_certificate …;", "ssl_certificate_key …;")
        found = ok("tls", "plain HTTP on this machine") if near else problem("tls", text, *lines)
        return [found], ssl.create_default_context(), near
    shaken: Handshake = await shake_hands(url, ssl.create_default_context())
    context = ssl.create_default_context()
    if shaken.refused is None:
        return rules.certificate(shaken.days_left, shaken.protocol, shaken.alpn), context, True
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    text = f"the certificate is not trusted ({shaken.refused}); SSL_CERT_FILE names another authority"
    return [problem("tls", text, "ssl_certificate fullchain.pem;  # with the intermediates")], context, False


_HEALTHY = ok("reach", "Headrace answers at /health")


async def _health(chain: Chain) -> Finding:
    answer = await chain.ask("/health")
    document = answer.json()
    if answer.status == 200 and isinstance(document, dict) and document.get("status") == "ok":
        return _HEALTHY
    return problem("reach", f"/health answers {answer.status} and not as Headrace does: is this its address?")


# ── short questions ──────────────────────────────────────────────────────────────────────────────────────


async def _version(chain: Chain) -> list[Finding]:
    answer = await chain.ask("/health")
    closes = answer.fields.get("Connection", "").lower() == "close"
    found = [rules.http_version(answer.version, kept=not closes)]
    if answer.fields.get("Server") == "headrace":
        found.append(hint("http", "Headrace itself answers, or a proxy that keeps its Server field"))
    return found


async def _request_id(chain: Chain) -> list[Finding]:
    sent = new_id()
    answer = await chain.ask("/health", headers={"x-request-id": sent})
    return [rules.request_id(sent, answer.fields)]


async def _errors(chain: Chain) -> list[Finding]:
    answer = await chain.ask(f"/v1/{new_id()}")
    return [rules.error_page(answer.status, answer.fields.get("Content-Type", ""), answer.error_code)]


async def _admin(chain: Chain) -> list[Finding]:
    answers = [(path, await chain.ask(path)) for path in _ADMIN_PATHS]
    open_to_all = [path for path, answer in answers if _is_admins(path, answer)]
    return [rules.exposed(open_to_all)]


def _is_admins(path: str, answer: Answer) -> bool:
    """Not any 200: a site in front may answer everything with its own page."""
    if answer.status != 200:
        return False
    marks = {"/metrics": b"# TYPE ", "/debug/state": b'"permits"', "/admin/streams": b'"streams"'}
    return marks[path] in answer.body


async def _body(chain: Chain) -> list[Finding]:
    taken = 0
    for size in reversed(_BODIES):
        if await chain.takes_body("/v1/chat/completions", size):
            taken = size
            break
    return [rules.largest_body(taken)]


async def _cache(chain: Chain) -> list[Finding]:
    answers = [await chain.ask(_STREAM) for _ in range(2)]
    return [rules.cached([answer.events[0].get("clock") if answer.events else None for answer in answers])]


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────


def _stream(**rhythm: float) -> str:
    return f"{_STREAM}?" + "&".join(f"{name}={value:g}" for name, value in rhythm.items())


async def _pace(chain: Chain) -> list[Finding]:
    """A busy machine is no buffer: what looks like one is looked at twice."""

    async def once() -> tuple[Answer, Finding]:
        answer = await chain.ask(
            _stream(events=_EVENTS, gap=_GAP_S),
            timeout_s=60,
            headers={"x-request-id": new_id(), "Accept-Encoding": "gzip"},
        )
        return answer, rules.pace(answer.arrivals, _EVENTS)

    try:
        answer, found = await once()
        if answer.status != 200:
            return [
                problem(
                    "pace", f"the test stream was answered with {answer.status} {answer.error_code or ''}"
                )
            ]
        if found.fix:
            answer, found = await once()
    except Unreachable as error:
        return [problem("pace", f"the test stream got no answer: {error}", *rules.UNBUFFERED)]
    return [found, rules.encoding(answer.fields), rules.headers(answer.fields)]


async def _rate(chain: Chain) -> list[Finding]:
    path = _stream(events=_FAST_EVENTS, gap=_FAST_GAP_S, padding=_FAST_PADDING)
    try:
        answer = await chain.ask(path, timeout_s=60)
    except Unreachable as error:
        return [problem("rate", f"the test stream got no answer: {error}")]
    return [rules.rate(answer.arrivals, _FAST_PADDING / _FAST_GAP_S)]


def _silences(chain: Chain, patience_s: float) -> tuple[Awaitable[list[Finding]], ...]:
    """One stream that says nothing for so long, and one that sends comments meanwhile."""
    waited_s = min(patience_s, _LONGEST_S)
    if waited_s <= 0:
        return ()
    every_s = min(15.0, waited_s / 5)

    async def silent() -> list[Finding]:
        return [await _keep_silent(chain, waited_s, 0, partial(rules.silence, waited_s=waited_s))]

    async def beating() -> list[Finding]:
        judge = partial(rules.heartbeat, waited_s=waited_s, every_s=every_s)
        return [await _keep_silent(chain, waited_s, every_s, judge)]

    return silent(), beating()


async def _keep_silent(
    chain: Chain, waited_s: float, heartbeat_s: float, judge: Callable[[float | None], Finding]
) -> Finding:
    """`judge` is told after how many seconds the stream ended before its time; None: it did not."""
    path = _stream(events=2, silence=waited_s, heartbeat=heartbeat_s)
    began_at = monotonic()
    try:
        answer = await chain.ask(path, timeout_s=waited_s + 30)
    except Unreachable:
        return judge(monotonic() - began_at)
    if answer.status == 503:
        return hint("silence", "not tried: too many such streams at the moment")
    return judge(None if len(answer.events) == 2 else answer.lasted_s)


# ── with a key ───────────────────────────────────────────────────────────────────────────────────────────


async def _chat(chain: Chain, options: Options) -> list[Finding]:
    if not chain.trusted:
        return [hint("chat", "not asked: the key is not sent over a connection that is not trusted")]
    fields = {"Authorization": f"Bearer {options.key}", "x-request-id": new_id()}
    model = options.model or await _first_model(chain, fields)
    if model is None:
        return [problem("chat", "the key may use no model that could be tried: name one with --model")]
    document = {
        "model": model,
        "stream": True,
        "max_tokens": _CHAT_TOKENS,
        "messages": [{"role": "user", "content": "Say hello."}],
    }
    answer = await chain.ask("/v1/chat/completions", "POST", 120, headers=fields, json=document)
    if answer.status == 401:
        line = "proxy_set_header Authorization $http_authorization;"
        return [problem("chat", "the key is refused, or the chain drops the Authorization field", line)]
    if answer.status != 200:
        return [
            problem(
                "chat", f"a chat with {model} was answered with {answer.status} {answer.error_code or ''}"
            )
        ]
    return [_judge_chat(model, answer)]


async def _first_model(chain: Chain, fields: dict[str, str]) -> str | None:
    document = (await chain.ask("/v1/models", headers=fields)).json()
    models = document.get("data") if isinstance(document, dict) else None
    return str(models[0]["id"]) if models else None


def _judge_chat(model: str, answer: Answer) -> Finding:
    if answer.broken or b"data: [DONE]" not in answer.body:
        return problem("chat", f"a chat with {model} broke off after {answer.lasted_s:.1f} s", *rules.PATIENT)
    if "x-headrace-upstream" not in answer.fields:
        return problem(
            "chat", "x-headrace-* is dropped on the way", "# no proxy_hide_header for x-headrace-*"
        )
    first_s = answer.arrivals[0].arrived_s if answer.arrivals else answer.lasted_s
    upstream = answer.fields["x-headrace-upstream"]
    return ok(
        "chat", f"{model} at {upstream}: first event after {first_s:.2f} s, {len(answer.arrivals)} events"
    )
