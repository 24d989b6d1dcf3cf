"""Under systemd: sockets that it has opened, and what it is told."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy import listen, systemd
from proxy.address import parse_address
from proxy.errors import StartError
from tests.kit.callers import ask, chat
from tests.kit.fleet import Fleet, fleet, unix, write
from tests.kit.headrace import command, settings_for, until

pytestmark = pytest.mark.timeout(60)

#: What systemd does between fork and exec, for sockets at these addresses.
_LAUNCHER = """
import os, socket, sys
addresses, names, words = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
opened = []
for address in addresses:
    path = address.startswith("/")
    sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    sock.bind(address if path else (address, 0))
    sock.listen()
    opened.append(sock)
print("opened", *(each.getsockname() if path else each.getsockname()[1] for each in opened), file=sys.stderr)
copies = [os.dup2(os.dup(each.fileno()), 20 + at) for at, each in enumerate(opened)]
for at, copy in enumerate(copies):
    os.dup2(copy, 3 + at)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(opened)), LISTEN_FDNAMES=names)
os.execv(words[0], words)
"""


def by_systemd(*addresses: str, names: str = "headrace.socket:admin") -> str:
    """Shell words that make a command start as systemd would start it."""
    words = [sys.executable, "-c", _LAUNCHER, ",".join(addresses), names]
    return f'set -- {shlex.join(words)} "$@"'


@contextmanager
def manager(tmp_path: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """The socket where services say how they are, and the variable that names it."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        yield sock, {"NOTIFY_SOCKET": path}


async def heard(sock: socket.socket) -> str:
    async with asyncio.timeout(20):
        return (await asyncio.get_running_loop().sock_recv(sock, 1000)).decode()


@asynccontextmanager
async def activated(
    tmp_path: Path, environ: dict[str, str], **sections: Any
) -> AsyncIterator[tuple[Fleet, list[int]]]:
    """Headrace on two passed sockets, and their ports."""
    before = by_systemd("127.0.0.1", "127.0.0.1")
    async with fleet(tmp_path, settings_for("mock:", **sections), environ=environ, before=before) as it:
        opened = await it.first.line(r"^opened (\d+) (\d+)$")
        yield it, [int(opened[1]), int(opened[2])]


async def test_the_passed_sockets_are_used(tmp_path: Path) -> None:
    """Both listeners, told apart by name; systemd hears when it serves, who goes on, and when it ends."""
    with manager(tmp_path) as (said, environ):
        async with activated(tmp_path, environ) as (it, ports):
            assert [it.port, it.admin_port] == ports
            assert (await ask(it.port, chat())).status == 200
            assert await heard(said) == "READY=1"
            code, out, err = await it.tell("restart")
            assert code == 0, err
            heir = int(out[0].removeprefix("pid: "))
            assert await heard(said) == f"MAINPID={heir}"
            await until(lambda: it.first.process.returncode == 0, 20)
            assert (await ask(it.port, chat())).status == 200
            os.kill(heir, signal.SIGTERM)
            assert await heard(said) == "STOPPING=1"
            await it.all_gone(20)
            with pytest.raises(BlockingIOError):
                said.recv(1000)


async def test_workers_share_the_passed_socket(tmp_path: Path) -> None:
    """With processes of their own as well."""
    async with activated(tmp_path, {}, workers=2) as (it, ports):
        assert it.port == ports[0]
        await it.settle(2)
        assert (await ask(it.port, chat())).status == 200


async def test_a_path_of_systemds_stays(tmp_path: Path) -> None:
    """It goes on listening there while the service is down."""
    data, admin, file = tmp_path / "data", tmp_path / "admin", tmp_path / "h.yaml"
    write(file, {**settings_for("mock:"), "listen": f"unix:{data}", "admin": f"unix:{admin}"})
    async with command("-c", str(file), "serve", before=by_systemd(str(data), names="headrace.socket")) as it:
        await it.line("^  data ")
        async with await unix(str(data)) as caller:
            assert (await caller.ask(chat())).status == 200
        it.signal(signal.SIGTERM)
        assert await it.ended(20) == 0
    assert data.exists()


@pytest.mark.parametrize(
    ("addresses", "names", "why"),
    [
        (["127.0.0.1"], "headrace.socket", "listen: the socket that was passed is 127.0.0.1 port"),
        (["127.0.0.1"], "admin", "admin: the socket that was passed is 127.0.0.1 port"),
        (["127.0.0.1", "127.0.0.1"], "headrace.socket:headrace.socket", "systemd passed two data sockets"),
    ],
)
async def test_refused_sockets(tmp_path: Path, addresses: list[str], names: str, why: str) -> None:
    """One line, and the end: a socket that the configuration does not know has none of its checks."""
    file = tmp_path / "h.yaml"
    write(file, {**settings_for("mock:"), "listen": "127.0.0.1:1", "admin": "127.0.0.1:2"})
    async with command("-c", str(file), "serve", before=by_systemd(*addresses, names=names)) as it:
        assert await it.ended(20) == 1
    assert [line for line in it.err if not line.startswith("opened")] == [it.err[-1]]
    assert why in it.err[-1]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_loopback_stays_loopback(host: str) -> None:
    """What may be left out on loopback (credentials, the admin token) is not left out elsewhere."""
    with socket.create_server((host, 0)) as sock:
        port = sock.getsockname()[1]
        other = "127.0.0.1" if host == "0.0.0.0" else "0.0.0.0"
        assert listen.given_or_bind(sock, parse_address(f"{host}:{port}"), "admin") is sock
        with pytest.raises(StartError, match=r"^admin: the socket that was passed is"):
            listen.given_or_bind(sock, parse_address(f"{other}:{port}"), "admin")


@pytest.mark.filterwarnings("ignore:.*socket:pytest.PytestUnraisableExceptionWarning")  # the process ends
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_does_not_listen(kind: int) -> None:
    """Accept=yes, or ListenDatagram=."""
    with socket.socket(socket.AF_UNIX, kind) as sock, pytest.raises(StartError, match="does not listen"):
        systemd._listening(os.dup(sock.fileno()))


def test_variables_of_another_process() -> None:
    """Those of a parent that did not clear them are not for us, and not for our children."""
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert systemd.activated(environ) == systemd.Activated()
    assert environ == {"HOME": "/"}
    assert not systemd.owns_paths(environ)


def test_a_manager_that_is_gone(tmp_path: Path) -> None:
    """Telling fails without a word."""
    systemd.notify({}, "READY=1")
    systemd.notify({"NOTIFY_SOCKET": str(tmp_path / "nothing")}, "READY=1")
    systemd.notify({"NOTIFY_SOCKET": "@nothing"}, "READY=1")


async def test_an_abstract_socket() -> None:
    """A name that begins with @ is in no file system."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0headrace-{os.getpid()}")
        sock.setblocking(False)
        systemd.notify({"NOTIFY_SOCKET": f"@headrace-{os.getpid()}"}, "READY=1")
        assert await heard(sock) == "READY=1"
