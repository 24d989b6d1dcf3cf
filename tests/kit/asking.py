"""One Upstream by itself, without a Headrace around it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any

import msgspec
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from proxy import schema
from proxy.upstream import Upstream
from proxy.wire_connection import End

#: Both ways of asking: the wire, and aiohttp's public client.
ways = pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])


@asynccontextmanager
async def upstream(
    base_url: str, *, push: bool, resolver: AbstractResolver | None = None, **settings: Any
) -> AsyncIterator[Upstream]:
    """`settings` are keys of the upstream's section; `start` is left to the test."""
    section = msgspec.convert({"base_url": base_url, **settings}, schema.Upstream)
    made = Upstream("up", section, base_url, push=push, resolver=resolver)
    try:
        yield made
    finally:
        await made.close()


async def ask(
    up: Upstream,
    path: str = "/chat/completions",
    *,
    method: str = "POST",
    fields: bytes = b"",
    key: int = 0,
    within_s: float = 10.0,
) -> tuple[int, bytes]:
    """One exchange, whole: its status and body. Raises what the exchange raises."""
    exchange = up.exchange(method, path, fields, b"{}" if method == "POST" else b"", key)
    try:
        await exchange.send()
        assert await exchange.hold(2**30, monotonic() + within_s), "no answer in time"
        body, end = exchange.taken()
        assert end is End.FRAMED, end
        return exchange.status, body
    finally:
        exchange.close()


class Names(AbstractResolver):
    """A resolver under the test's control: `answers` by host name, each an address or address:port, else
    NXDOMAIN. `before` is awaited in every lookup."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = {name.replace("_", "."): addresses for name, addresses in answers.items()}
        self.asked: list[str] = []
        self.before: Callable[[], Any] | None = None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        if self.before is not None:
            await self.before()
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [_result(host, *address.split(":"), port=port) for address in self.answers[host]]

    async def close(self) -> None:
        pass


def _result(name: str, address: str, own_port: str | None = None, *, port: int) -> ResolveResult:
    return ResolveResult(
        hostname=name,
        host=address,
        port=int(own_port) if own_port else port,
        family=socket.AF_INET,
        proto=0,
        flags=0,
    )


@contextmanager
def dead_address() -> Iterator[str]:
    """Bound, so that nobody else listens there, and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


async def never() -> None:
    await asyncio.Event().wait()
