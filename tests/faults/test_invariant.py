"""The invariant that ends every case does notice: what is still held, and books that do not agree."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.kit.callers import Caller, ask, chat
from tests.kit.headrace import running, settings_for
from tests.kit.invariant import invariant
from tests.kit.lab import Lab, hold, plays, response
from tests.kit.ledger import row
from tests.kit.upstreams import Script, scripted

SHORT_S = 0.3
OK = response(200, b'{"choices":[]}')


@asynccontextmanager
async def unchecked(script: Script) -> AsyncIterator[Lab]:
    async with scripted(script) as upstream, running(settings_for(upstream.url)) as headrace:
        yield Lab(headrace, upstream)


async def test_a_request_that_still_runs() -> None:
    async with unchecked(plays(hold)) as it, await Caller.connect(it.port) as caller:
        case = invariant(it.headrace, it.upstream.calls, timeout_s=SHORT_S)
        await case.__aenter__()
        await caller.send(chat())
        await it.called()
        with pytest.raises(AssertionError, match="'in_flight': 1"):
            await case.__aexit__(None, None, None)


async def test_a_socket_that_is_still_open() -> None:
    async with unchecked(plays(OK)) as it:
        case = invariant(it.headrace, it.upstream.calls, timeout_s=SHORT_S)
        await case.__aenter__()
        async with await Caller.connect(it.port):
            with pytest.raises(AssertionError, match="sockets"):
                await case.__aexit__(None, None, None)


async def test_a_request_that_nobody_began() -> None:
    async with unchecked(plays(OK)) as it:
        case = invariant(it.headrace, it.upstream.calls, started=2)
        await case.__aenter__()
        await ask(it.port, chat(stream=False))
        with pytest.raises(AssertionError):
            await case.__aexit__(None, None, None)


@pytest.mark.parametrize("fault", ["a row too many", "a request without a row", "other tokens"])
async def test_books_that_do_not_agree(fault: str) -> None:
    async with unchecked(plays(OK)) as it:
        case = invariant(it.headrace, it.upstream.calls)
        await case.__aenter__()
        await ask(it.port, chat(stream=False))
        if fault == "a row too many":
            it.headrace.server.core.ledger.add(row())
        elif fault == "a request without a row":
            it.upstream.calls[0].head = it.upstream.calls[0].head.replace(b"req_", b"another_")
        else:
            it.headrace.server.core.metrics.tokens.add(("m", "prompt"), 1)
        with pytest.raises(AssertionError):
            await case.__aexit__(None, None, None)
