"""The table of bad inputs, each as raw bytes on a socket: what is answered, and that nothing else happens.

For all of them: one JSON error of the contract with ids, one log line and one count; the upstream sees
nothing; neither the canary nor the credential is in the answer, the log or the metrics; no slot is held; and
the next caller is served.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.errors import REFUSALS
from tests.hostile.bodies import REFUSED_LATER
from tests.hostile.heads import HEADS
from tests.hostile.inputs import (
    CANARY,
    CREDENTIAL,
    JWT_SECTION,
    NEEDLES,
    Input,
    Served,
    posts,
)
from tests.hostile.served import SERVED
from tests.kit.callers import Answer, Caller, ask
from tests.kit.keys import auth_section
from tests.kit.lab import PLAIN, Lab, lab, plays, response

pytestmark = pytest.mark.timeout(30)

OK = b'{"id":"x","object":"chat.completion","choices":[]}'
PLAIN_BODY = b'{"model":"m"}'
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
INPUTS = (*HEADS, *REFUSED_LATER)


def cases(inputs: Sequence[Input | Served]) -> list[Any]:
    """Each in every mode that it is meant for; more than one are for `make test-hostile` and `test-all`."""
    return [
        pytest.param(
            each, mode, id=f"{each}-{mode}", marks=[pytest.mark.slow] if mode != each.modes[-1] else []
        )
        for each in inputs
        for mode in each.modes
    ]


@asynccontextmanager
async def house(mode: str, tmp_path: Path, **sections: Any) -> AsyncIterator[Lab]:
    """A Headrace in this mode before an upstream that answers everything."""
    auth = {"mode": "open"} if mode == "open" else {**auth_section(tmp_path), "jwt": JWT_SECTION}
    async with lab(plays(response(200, OK)), PLAIN[0], auth=auth, **sections) as it:
        yield it


class Seen(Answer):
    """An answer, and what it looked like."""

    raw_head = b""


async def asked(caller: Caller, sent: bytes) -> Seen:
    """Sends what may be refused before it is read whole; then the first answer."""
    answer = Seen()
    sending = asyncio.ensure_future(caller.send(sent))
    try:
        answer.raw_head = await caller.reader.readuntil(b"\r\n\r\n")
        parser = asyncio.StreamReader()
        parser.feed_data(answer.raw_head)
        await Caller(parser, caller.writer).head(answer)
        await caller.rest(answer)
    finally:
        await asyncio.gather(sending, return_exceptions=True)
    return answer


def hides(text: bytes) -> None:
    for needle in NEEDLES:
        assert needle not in text, text


async def hides_everywhere(it: Lab, answer: Seen) -> None:
    """What was sent is in nothing that anybody reads afterwards."""
    hides(answer.raw_head + answer.body)
    hides(b"".join(it.headrace.sink.lines))
    async with aiohttp.ClientSession() as session:
        for path in ("/metrics", "/debug/state"):
            async with session.get(f"{it.headrace.admin_url}{path}") as response_:
                hides(await response_.read())


async def is_one_error(it: Lab, answer: Seen, each: Input) -> None:
    """The contract's error, told once everywhere under one id."""
    assert answer.status in each.status, answer.body
    assert answer.raw_head.startswith(b"HTTP/1.1 ")
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["server"] == "headrace"
    chosen = answer.headers["x-request-id"]
    assert REQUEST_ID.fullmatch(chosen)
    assert answer.headers["request-id"] == chosen
    assert answer.clean
    assert (answer.status == 401) == (answer.headers.get("www-authenticate") == "Bearer")
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == (each.code or {404: "not_found"}.get(answer.status) or REFUSALS[answer.status][0])
    line = await it.ended("rejected")
    assert (line["request_id"], line["status"], line["error"], line["attempts"]) == (
        chosen,
        answer.status,
        error["code"],
        0,
    )


async def ends(caller: Caller) -> None:
    """The connection ends, and nothing else was answered on it."""
    try:
        async with asyncio.timeout(5):
            assert await caller.reader.read(-1) == b""
    except ConnectionResetError:
        pass


@pytest.mark.parametrize(("each", "mode"), cases(INPUTS))
async def test_refused(each: Input, mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with house(mode, tmp_path, **each.settings) as it, asyncio.timeout(20):
        async with await Caller.connect(it.port) as caller:
            answer = await asked(caller, each.sent)
            await is_one_error(it, answer, each)
            if each.closes:
                assert answer.headers["connection"].lower() == "close"
                await ends(caller)
            elif each.closes is False:
                assert (await caller.ask(posts(PLAIN_BODY))).body == OK
        assert it.upstream.connections == (each.closes is False)
        assert (await ask(it.port, posts(PLAIN_BODY))).body == OK
        await hides_everywhere(it, answer)
    hides("".join(capfd.readouterr()).encode())


@pytest.mark.parametrize(("each", "mode"), cases(SERVED))
async def test_served(each: Served, mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with house(mode, tmp_path) as it, asyncio.timeout(20):
        async with await Caller.connect(it.port) as caller:
            answer = await asked(caller, each.sent)
            if b"Upgrade:" in each.sent:
                await ends(caller)
        assert (answer.status, answer.body, answer.clean) == (200, OK, True)
        assert not any(name.startswith("access-control-") for name in answer.headers)
        call = await it.called()
        assert call.body == each.body
        head = call.head.lower()
        hides(head)
        for ours in (b"host: ", b"content-length: %d" % len(each.body), b"via: ", b"x-request-id: "):
            assert head.count(b"\r\n" + ours) == 1, head
        assert head.count(b"\r\nauthorization: bearer upstream-secret\r\n") == 1
        line = await it.ended("complete")
        assert line["client_ip"] == "127.0.0.1"
        assert (await ask(it.port, posts(PLAIN_BODY))).body == OK
        assert len(it.upstream.calls) == 2
        await hides_everywhere(it, answer)
    hides("".join(capfd.readouterr()).encode())


def test_every_input_has_something_to_hide() -> None:
    """Else the search for it proves nothing. In a few there is no room for it but in the body."""
    for each in (*INPUTS, *SERVED):
        assert any(needle in each.sent for needle in NEEDLES) or CREDENTIAL.encode() in each.sent, each
    assert CANARY
