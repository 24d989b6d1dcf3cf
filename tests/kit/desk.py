"""An upstream that answers when the test says so, and knows who was with it."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tests.kit.callers import Answer, ask, chat
from tests.kit.lab import response
from tests.kit.upstreams import Call

_WHOLE = response(200, b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}')


class Desk:
    """A script. Requests are told apart by their text: `seen` is who came, in order; each stays until `open`.

    most: how many there were at once; exact while callers stay, for each counts until just before its answer.
    """

    def __init__(self, *, wide_open: bool = False) -> None:
        self.seen: list[str] = []
        self.inside = 0
        self.most = 0
        self._wide_open = wide_open
        self._gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def open(self, *names: str) -> None:
        for name in names:
            self._gates[name].set()

    def open_all(self) -> None:
        """For those who are here and all who come."""
        self._wide_open = True
        for gate in self._gates.values():
            gate.set()

    async def __call__(self, call: Call) -> None:
        name = json.loads(call.body)["messages"][0]["content"]
        self.seen.append(name)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            stays = self._wide_open or await self._opened_before_gone(self._gates[name], call)
        finally:
            self.inside -= 1
        if stays:
            await call.send(_WHOLE)
        else:
            call.close()

    async def _opened_before_gone(self, gate: asyncio.Event, call: Call) -> bool:
        waits = [asyncio.ensure_future(gate.wait()), asyncio.ensure_future(call.watch())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return gate.is_set()


def question(name: str, *headers: str, **fields: Any) -> bytes:
    """A chat request that a `Desk` knows by this name."""
    return chat(*headers, messages=[{"role": "user", "content": name}], stream=False, **fields)


class Crowd:
    """Requests under way; those whose connection breaks have no answer (None)."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._asking: dict[str, asyncio.Task[Answer | None]] = {}

    def ask(self, name: str, *headers: str, port: int | None = None, **fields: Any) -> None:
        request = question(name, *headers, **fields)
        self._asking[name] = asyncio.ensure_future(_ask(port or self.port, request))

    async def answer(self, name: str) -> Answer | None:
        return await self._asking[name]

    async def status(self, name: str) -> int:
        """0 if there was no answer."""
        answer = await self.answer(name)
        return 0 if answer is None else answer.status

    async def statuses(self, names: Iterable[str]) -> list[int]:
        return [await self.status(name) for name in names]

    def waiting(self, name: str) -> bool:
        return not self._asking[name].done()

    def leave(self, name: str) -> None:
        self._asking[name].cancel()


async def _ask(port: int, request: bytes) -> Answer | None:
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        return await ask(port, request)
    return None
