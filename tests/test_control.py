"""The channel between processes, over a socket pair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.control import _MAX_FRAME as MAX
from proxy.control import Channel, ControlError
from tests.kit.headrace import until


async def answering(verb: str, payload: Any) -> Any:
    if verb == "fail":
        raise ValueError("no such thing")
    if verb == "never":
        await asyncio.Event().wait()
    return [verb, payload, payload] if verb == "twice" else [verb, payload]


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Channel, Channel, list[tuple[str, Any]]]]:
    """Two ends, and the notes that the second one hears."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    heard: list[tuple[str, Any]] = []
    near = await Channel.open(ours, answering, lambda *_: None)
    far = await Channel.open(theirs, answering, lambda verb, payload: heard.append((verb, payload)))
    yield near, far, heard
    near.close()
    far.close()
    await asyncio.wait([near.closed, far.closed], timeout=5)


async def test_calls_and_notes() -> None:
    """A call gets its own answer, many at a time; a note is heard; a failure is told in words."""
    async with pair() as (near, far, heard):
        answers = await asyncio.gather(*(near.call("echo", number) for number in range(100)))
        assert answers == [["echo", number] for number in range(100)]
        assert await far.call("back", {"x": b"\0"}) == ["back", {"x": b"\0"}]
        with pytest.raises(ControlError, match="no such thing"):
            await near.call("fail")
        assert near.note("hello", [1, "zwei"])
        await until(lambda: heard == [("hello", [1, "zwei"])])
        big = "x" * 3_000_000
        assert await near.call("echo", big) == ["echo", big]


async def test_nobody_waits_for_ever() -> None:
    """A call that is not answered in time fails, and one whose other side goes fails at once."""
    async with pair() as (near, far, _):
        with pytest.raises(ControlError, match="within"):
            await near.call("never", timeout_s=0.05)
        waiting = asyncio.ensure_future(near.call("never", timeout_s=30))
        await asyncio.sleep(0)
        far.close()
        with pytest.raises(ControlError, match="gone"):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(ControlError):
            await near.call("echo")
        assert not near.note("anybody there?")


@pytest.mark.parametrize("rubbish", [b"\xff\xff\xff\xff", b"\0\0\0\3abc", b"\0\0\0\1\xc1"])
async def test_rubbish_ends_it(rubbish: bytes) -> None:
    """A frame that is too long or no message ends the channel, and nothing else."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = await Channel.open(ours, answering, lambda *_: None)
    with theirs:
        theirs.sendall(rubbish)
        await asyncio.wait_for(asyncio.shield(channel.closed), 5)


async def test_frames_in_pieces() -> None:
    """Frames are found again however the bytes are cut."""
    near_end, middle = socket.socketpair()
    other, far_end = socket.socketpair()
    for sock in (near_end, far_end, middle, other):
        sock.setblocking(False)
    heard: list[tuple[str, Any]] = []
    near = await Channel.open(near_end, answering, lambda *_: None)
    far = await Channel.open(far_end, answering, lambda verb, payload: heard.append((verb, payload)))
    loop = asyncio.get_running_loop()
    for number in range(3):
        near.note("piece", number)
    await asyncio.sleep(0)
    raw = await asyncio.wait_for(loop.sock_recv(middle, 65536), 5)
    for at in range(len(raw)):
        await loop.sock_sendall(other, raw[at : at + 1])
    await until(lambda: heard == [("piece", 0), ("piece", 1), ("piece", 2)])
    for channel, sock in ((near, middle), (far, other)):
        sock.close()
        await asyncio.wait_for(asyncio.shield(channel.closed), 5)


async def test_a_reader_that_sleeps() -> None:
    """Notes to a side that does not read are dropped and counted; the sender never waits."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = await Channel.open(ours, answering, lambda *_: None)
    with theirs:
        sent = sum(channel.note("row", "x" * 1_000_000) for _ in range(30))
        assert 8 <= sent < 30
        assert channel.dropped == 30 - sent
        with pytest.raises(ControlError, match="full"):
            await channel.call("echo")
    await asyncio.wait_for(asyncio.shield(channel.closed), 5)


async def test_what_is_too_large_is_not_sent() -> None:
    """Neither a question nor an answer: the other side would take it for garbage and end the channel."""
    async with pair() as (near, far, _):
        assert not near.note("row", "x" * MAX)
        with pytest.raises(ControlError):
            await near.call("echo", "x" * MAX)
        with pytest.raises(ControlError, match="too large"):
            await near.call("twice", "x" * (MAX // 2))
        assert await far.call("echo", 1) == ["echo", 1]
