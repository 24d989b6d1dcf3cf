"""Rows 26 and 29: what wants to fill the memory does not."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path

import pytest

from tests.hostile.inputs import CHAT, CHUNKED, HOST, JSON, raw
from tests.kit.callers import Answer, Caller, ask, chat
from tests.kit.fleet import fleet, resident
from tests.kit.headrace import settings_for

pytestmark = [pytest.mark.alone, pytest.mark.timeout(60)]

MB = 2**20
LIMIT = 4 * MB
PIECE = b"%x\r\n%b\r\n" % (65_536, b" " * 65_536)


async def pours(port: int) -> Answer:
    """A body of 64 MB without a length; the answer comes in its midst."""
    async with await Caller.connect(port) as caller:
        await caller.send(raw(CHAT, HOST, JSON, CHUNKED))

        async def sends() -> None:
            try:
                for _ in range(1024):
                    await caller.send(PIECE)
            except ConnectionError:
                pass

        sending = asyncio.ensure_future(sends())
        answer = await caller.rest(await caller.head())
        await sending
        return answer


async def test_endless_body(tmp_path: Path) -> None:
    """Twenty at once take no more than twenty limits, and are told 413 in the midst of it."""
    async with fleet(tmp_path, settings_for("mock:", max_body_bytes=LIMIT)) as here:
        assert (await ask(here.port, chat(stream=False))).status == 200
        before = resident(here.pid)
        answers = await asyncio.gather(*(pours(here.port) for _ in range(20)))
        assert {answer.status for answer in answers} == {413}
        assert resident(here.pid) - before < 20 * LIMIT + 20 * MB
        await here.quiet()
        assert (await here.state())["buffered_bytes"] == 0


async def test_bombs(tmp_path: Path) -> None:
    """200 MB in 1 MB, ten times: 415, and not a byte of it is ever unpacked."""
    packed = zlib.compress(bytes(200 * MB), 1, 31)
    fields = (JSON, "Content-Encoding: gzip", f"Content-Length: {len(packed)}")
    async with fleet(tmp_path, settings_for("mock:")) as here:
        assert (await ask(here.port, chat(stream=False))).status == 200
        before = resident(here.pid)
        for _ in range(10):
            assert (await ask(here.port, raw(CHAT, HOST, *fields, body=packed))).status == 415
        assert resident(here.pid) - before < 10 * MB
        await here.quiet()
