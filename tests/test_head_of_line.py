"""A large prompt gives way to others: it is looked at in steps, and treated as any other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator

import pytest

from proxy.intake import in_turns
from proxy.peek import STEP_BYTES
from tests.kit.callers import ask, post
from tests.kit.lab import PLAIN, lab, plays, response

pytestmark = pytest.mark.timeout(30)

CHAT = "/v1/chat/completions"
TEXT = json.dumps('Grüße, "quoted", 你好\n' * 60_000, ensure_ascii=False).encode()


def body(after: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":' + TEXT + b"}]" + after + b"}"


async def test_large_prompts_are_told_the_same_as_small_ones() -> None:
    """It reaches the upstream as it came, or is refused before anybody is asked."""
    whole = body(b' ,"n": 1')
    assert len(whole) > 10 * STEP_BYTES
    async with lab(plays(response(200, b"{}")), PLAIN[0]) as it:
        assert (await ask(it.port, post(CHAT, whole))).status == 200
        assert it.upstream.calls[0].body == whole
        for wrong, code in (
            (body(b',"\\u006dodel":"other"'), "duplicate_key"),
            (body(b',"n":"many"'), "bad_request"),
            (body(b',"n":'), "invalid_json"),
            (body(b',"x":"\xff"'), "invalid_json"),
        ):
            answer = await ask(it.port, post(CHAT, wrong))
            assert (answer.status, answer.json()["error"]["code"]) == (400, code)
        assert len(it.upstream.calls) == 1


async def test_others_have_their_turn_between_two_steps() -> None:
    """Every step but the first waits for the loop to look at everybody else."""
    seen: list[str] = []

    def work() -> Generator[None, None, str]:
        for number in range(3):
            seen.append(f"step {number}")
            yield
        return "done"

    def other(left: int) -> None:
        seen.append("other")
        if left:
            asyncio.get_running_loop().call_soon(other, left - 1)

    asyncio.get_running_loop().call_soon(other, 1)
    assert await in_turns(work()) == "done"
    assert seen == ["step 0", "other", "step 1", "other", "step 2"]
