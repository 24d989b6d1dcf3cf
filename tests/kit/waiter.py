"""`python -m tests.kit.waiter FD CONTROL OWNER`: a worker process that holds slots and waits for more.

It takes one place of `up:own` straight from the store, one of `up:shared` through the supervisor's waiting
room, waits for a second of it, and says so with the note `holding`. Then it waits to be killed.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

from proxy.control import Channel
from proxy.permit import Direct, Ticket, Wanted
from proxy.slots_remote import RemoteRoom
from proxy.state import Slot
from proxy.state.memory import attach

OWN = Slot("up:own", 1)
SHARED = Slot("up:shared", 1)
PATIENCE_S = 60.0


async def refuse(verb: str, _: Any) -> Any:
    raise ValueError(verb)


async def main(fd: int, control: int, owner: int) -> None:
    sock = socket.socket(fileno=control)
    sock.setblocking(False)
    rooms: list[RemoteRoom] = []
    channel = await Channel.open(sock, refuse, lambda verb, payload: rooms[0].heard(verb, payload))
    rooms.append(RemoteRoom(channel, Direct(attach(fd, owner)), PATIENCE_S))
    wanted, ticket = Wanted((), (("shared", SHARED),)), Ticket("basic")
    held = [await rooms[0].enter(Wanted((), (("own", OWN),)), ticket), await rooms[0].enter(wanted, ticket)]
    waiting = asyncio.get_running_loop().create_task(rooms[0].enter(wanted, ticket))
    while rooms[0].waiting == 0:
        await asyncio.sleep(0)
    channel.note("holding", [permit.upstream for permit in held])
    await asyncio.shield(channel.closed)
    waiting.cancel()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
