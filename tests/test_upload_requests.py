"""Uploads as requests: routed by their form, never queued, never repeated, ended for one reason."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.form import WINDOW_BYTES
from tests.kit.callers import Answer, Caller
from tests.kit.headrace import Headrace, running, settings_for, until
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.lab import response
from tests.kit.uploads import Receipt, Receiver, Script, chunked, form, head, part, receiving

pytestmark = pytest.mark.timeout(30)

both = pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
#: Contract section 6, rule 4.
WITHIN_S = 1.0
DONE = response(200, b'{"id":"file-1"}')
SPEECH = "/v1/audio/transcriptions"


async def takes_all(call: Receipt) -> None:
    await call.all()
    await call.send(DONE)


async def waits(call: Receipt) -> None:
    """Takes everything and says nothing."""
    await call.all()
    await call.watch()


class Desk:
    """A Headrace and the upstream behind it."""

    def __init__(self, headrace: Headrace, upstream: Receiver) -> None:
        self.headrace = headrace
        self.upstream = upstream

    @property
    def port(self) -> int:
        return self.headrace.port

    async def upload(self, body: bytes, path: str = "/v1/files", *headers: str) -> Answer:
        async with await Caller.connect(self.port) as caller:
            return await caller.ask(head(len(body), *headers, path=path) + body)

    async def ended(self, reason: str) -> dict[str, Any]:
        """The one request line, once nothing is left of its request."""
        await until(lambda: len(self.headrace.log_lines()) == 1)
        line = self.headrace.log_lines()[0]
        assert line["reason"] == reason, line
        await self.headrace.quiet()
        return line


@asynccontextmanager
async def desk(script: Script, push: bool, **sections: Any) -> AsyncIterator[Desk]:
    async with (
        receiving(script) as upstream,
        running(settings_for(upstream.url, **sections), push=push) as headrace,
    ):
        yield Desk(headrace, upstream)


# ── whole, and where to ──────────────────────────────────────────────────────────────────────────────────


@both
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [100, 2_000_000])
async def test_a_file(push: bool, framing: str, size: int) -> None:
    """Unchanged, with the operator's credential, and told in one line."""
    body = form(size, model=None)
    async with desk(takes_all, push) as it:
        async with await Caller.connect(it.port) as caller:
            raw = head(len(body)) + body if framing == "length" else head(None) + chunked(body)
            answer = await caller.ask(raw)
        assert (answer.status, answer.json()) == (200, {"id": "file-1"})
        assert answer.headers["x-headrace-upstream"] == "up"
        call = it.upstream.calls[0]
        assert call.head.startswith(b"POST /v1/files HTTP/1.1\r\n")
        assert call.body == body
        assert call.fields["authorization"] == "Bearer upstream-secret"
        line = await it.ended("complete")
        assert (line["bytes_in"], line["attempts"], line["route"]) == (len(body), 1, "/v1/files")


@both
@pytest.mark.parametrize(
    ("path", "model", "upstream"),
    [
        (SPEECH, "m", "up"),
        (SPEECH, "mapped", "up"),
        (SPEECH, None, "other"),
        ("/v1/files", None, "other"),
        ("/v1/uploads/upload_1/parts", None, "other"),
        ("/audio/translations", "mapped", "up"),
        ("/v1/images/edits", "mapped", "up"),
        ("/v1/images/variations", None, "other"),
    ],
)
async def test_routing(push: bool, path: str, model: str | None, upstream: str) -> None:
    """By the form's model, under the upstream's own name for it; without one to `default_upstream`."""
    async with receiving(takes_all) as other:
        sections = {
            "models": {
                "m": {"upstreams": ["up"]},
                "mapped": {"upstreams": [{"name": "up", "model": "whisper-large"}]},
            },
            "default_upstream": "other",
        }
        async with receiving(takes_all) as up:
            document = settings_for(up.url, **sections)
            document["upstreams"]["other"] = {"base_url": other.url}
            async with running(document, push=push) as headrace:
                answer = await Desk(headrace, up).upload(form(300_000, model=model), path)
        assert answer.status == 200
        assert answer.headers["x-headrace-upstream"] == upstream
        call = (up if upstream == "up" else other).calls[0]
        assert call.body == form(300_000, model="whisper-large" if model == "mapped" else model)


@both
async def test_an_unknown_model(push: bool) -> None:
    async with desk(takes_all, push) as it:
        answer = await it.upload(form(10, model="nobody"), SPEECH)
        assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
        await it.ended("rejected")
        assert it.upstream.connections == 0


@both
async def test_a_callers_models(push: bool, tmp_path: Path) -> None:
    """A caller with a list of models needs one of them in the form's first 64 KiB, and only one."""
    async with desk(takes_all, push, auth=auth_section(tmp_path)) as it:
        key = bearer(await make_key(tmp_path, models=("m",)))
        await until(lambda: it.headrace.server.core is not None)

        async def code(body: bytes, path: str = SPEECH) -> tuple[int, str]:
            answer = await it.upload(body, path, key)
            return answer.status, answer.json().get("error", {}).get("code", "")

        async with asyncio.timeout(5):
            while (await code(form(10)))[0] == 401:  # the server learns of a new key within half a second
                await asyncio.sleep(0.05)
        assert await code(form(10)) == (200, "")
        assert await code(form(10, model="other")) in {(404, "model_not_found"), (403, "model_not_allowed")}
        assert await code(form(10, model=None)) == (403, "model_not_allowed")
        assert await code(form(10, model=None), "/v1/files") == (403, "model_not_allowed")
        assert await code(form(WINDOW_BYTES, last=True)) == (403, "model_not_allowed")
        late = part("model", b"m") + part("f", b"x" * 200_000) + part("model", b"other")
        assert await code(late) == (400, "duplicate_key")
        assert not any(b"other" in call.body for call in it.upstream.calls)


@both
async def test_json_where_a_form_may_be(push: bool) -> None:
    """Images may be edited by JSON as well: a body like any other."""
    body = json.dumps({"model": "m", "prompt": "x"}).encode()
    async with desk(takes_all, push) as it, await Caller.connect(it.port) as caller:
        raw = head(len(body), path="/v1/images/edits", content_type="application/json") + body
        assert (await caller.ask(raw)).status == 200
        assert it.upstream.calls[0].body == body


@both
@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://evil.example", 403), ("http://test", 200)],
)
async def test_a_page_of_another_site(push: bool, origin: str, status: int) -> None:
    """Browsers send forms across origins without asking: without a credential none is taken from there."""
    async with desk(takes_all, push) as it:
        assert (await it.upload(form(10), "/v1/files", f"Origin: {origin}")).status == status


# ── never queued, never repeated ─────────────────────────────────────────────────────────────────────────


@both
async def test_never_queued(push: bool) -> None:
    """No slot: 503 at once, though others would wait."""
    limits = {"max_in_flight": 1, "queue": {"max_waiting": 10, "max_wait": 20}}
    async with desk(waits, push, limits=limits) as it, await Caller.connect(it.port) as first:
        body = form(10)
        await first.send(head(len(body)) + body)
        await until(lambda: bool(it.upstream.calls))
        async with asyncio.timeout(5):
            answer = await it.upload(body)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
        assert len(it.upstream.calls) == 1


@both
@pytest.mark.parametrize("size", [100, 300_000])
async def test_no_second_try(push: bool, size: int) -> None:
    """A 503 is passed on: the form has been read by somebody."""

    async def busy(call: Receipt) -> None:
        await call.all()
        await call.send(response(503, b'{"error":{"message":"busy"}}'))

    async with desk(busy, push, retry={"attempts": 3, "base": 0.01}) as it:
        answer = await it.upload(form(size))
        assert (answer.status, answer.headers["x-headrace-attempts"]) == (503, "1")
        assert len(it.upstream.calls) == 1
        await it.ended("upstream_error")


@both
async def test_the_next_upstream(push: bool) -> None:
    """One that cannot be reached has got nothing."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else gets the port
        async with receiving(takes_all) as upstream:
            dead = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
            document = settings_for(dead, retry={"attempts": 3})
            document["upstreams"]["spare"] = {"base_url": upstream.url}
            document["models"]["m"] = {"upstreams": ["up", {"name": "spare", "model": "x", "tier": 2}]}
            async with running(document, push=push) as headrace:
                answer = await Desk(headrace, upstream).upload(form(500_000), SPEECH)
        assert answer.status == 200
        assert answer.headers["x-headrace-upstream"] == "spare"
        assert answer.headers["x-headrace-attempts"] == "2"
        assert upstream.calls[0].body == form(500_000, model="x")


@both
async def test_no_hedge(push: bool) -> None:
    """A model's `hedge_after` is not for uploads: their bytes are there once."""

    async def slow(call: Receipt) -> None:
        await call.all()
        await asyncio.sleep(0.3)
        await call.send(DONE)

    async with receiving(slow) as first, receiving(slow) as second:
        document = settings_for(first.url, retry={"attempts": 3})
        document["upstreams"]["other"] = {"base_url": second.url}
        document["models"]["m"] = {"upstreams": ["up", "other"], "hedge_after": 0.05}
        async with running(document, push=push) as headrace:
            answer = await Desk(headrace, first).upload(form(100), SPEECH)
            assert (answer.status, answer.headers["x-headrace-attempts"]) == (200, "1")
            await headrace.quiet()
        assert first.connections + second.connections == 1


# ── ended ────────────────────────────────────────────────────────────────────────────────────────────────


@both
async def test_too_large(push: bool) -> None:
    async with desk(takes_all, push, max_upload_bytes=1000) as it:
        answer = await it.upload(form(1000))
        assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")
        await it.ended("rejected")
        assert it.upstream.connections == 0


@both
@pytest.mark.parametrize("end", ["large", "slow", "twice"])
async def test_refused_on_the_way(push: bool, end: str) -> None:
    """What shows only behind the window: the caller is told, the upstream gets no end. `rejected` would mean
    that nobody was asked."""
    settings = {"max_upload_bytes": 200_000, "timeouts": {"body": 0.3}}
    status, code = {
        "large": (413, "request_too_large"),
        "slow": (408, "request_timeout"),
        "twice": (400, "duplicate_key"),
    }[end]
    body = chunked(form(190_000)[:-60])[:-5]
    if end == "large":
        body += chunked(b"x" * 20_000)
    if end == "twice":
        body += chunked(b"\r\n" + part("model", b"m"))
    async with desk(takes_all, push, **settings) as it, await Caller.connect(it.port) as caller:
        answer = await caller.ask(head(None) + body)
        assert (answer.status, answer.json()["error"]["code"]) == (status, code)
        await it.ended("complete")
        async with asyncio.timeout(5):
            for call in it.upstream.calls:
                await call.gone.wait()
        assert not any(call.whole for call in it.upstream.calls)


@both
@pytest.mark.parametrize("leave", [Caller.leave, Caller.reset], ids=["fin", "rst"])
@pytest.mark.parametrize("sent", [300, 200_000])
async def test_leaving(push: bool, leave: Callable[[Caller], None], sent: int) -> None:
    """In the middle of its body: within a second the upstream knows."""
    body = form(400_000)
    async with desk(takes_all, push) as it, await Caller.connect(it.port) as caller:
        await caller.send(head(len(body)) + body[:sent])
        if sent > WINDOW_BYTES:
            await until(lambda: bool(it.upstream.calls) and it.upstream.calls[0].received > 0)
        else:
            await until(lambda: it.headrace.state["in_flight"] == 1)
        leave(caller)
        async with asyncio.timeout(WITHIN_S):
            for call in it.upstream.calls:
                await call.gone.wait()
        await it.ended("client_gone")
        assert not any(call.whole for call in it.upstream.calls)


@both
async def test_an_early_refusal(push: bool) -> None:
    """The upstream's own 413 passes while the body is on its way."""
    seen = asyncio.Event()

    async def refuses(call: Receipt) -> None:
        await call.send(response(413, b'{"error":{"message":"too large for us"}}'))
        seen.set()
        await call.watch()

    async with desk(refuses, push) as it, await Caller.connect(it.port) as caller:
        await caller.send(head(10_000_000) + form(200_000)[:-50])
        await seen.wait()
        answer = await caller.rest(await caller.head())
        assert (answer.status, answer.json()["error"]["message"]) == (413, "too large for us")
        await it.ended("complete")
        async with asyncio.timeout(WITHIN_S):
            await it.upstream.calls[0].gone.wait()
        assert it.headrace.state["upstream_idle"] == 0


@both
@pytest.mark.alone
async def test_slow_but_steady(push: bool) -> None:
    """Longer than `timeouts.body` and `first_byte` together, never silent for as long as either."""
    body = form(300_000)
    step = len(body) // 15
    settings = {"timeouts": {"body": 0.5}, "upstream": {"timeouts": {"first_byte": 0.5}}}
    async with desk(takes_all, push, **settings) as it, await Caller.connect(it.port) as caller:
        await caller.send(head(len(body)))
        for at in range(0, len(body), step):
            await caller.send(body[at : at + step])
            await asyncio.sleep(0.1)
        assert (await caller.rest(await caller.head())).status == 200
        await it.ended("complete")


@both
async def test_the_deadline_holds_for_uploads(push: bool) -> None:
    """`timeouts.total` is from the beginning, whatever flows."""
    body = form(400_000)
    settings = {"upstream": {"timeouts": {"total": 0.5}}}
    async with desk(takes_all, push, **settings) as it, await Caller.connect(it.port) as caller:
        await caller.send(head(len(body)) + body[:100_000])
        answer = await caller.rest(await caller.head())
        assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
        await it.ended("deadline")
