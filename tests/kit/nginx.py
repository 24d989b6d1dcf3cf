"""A real nginx: from the shipped files, or from a few lines of a test's own."""

from __future__ import annotations

import asyncio
import functools
import getpass
import json
import os
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.kit.callers import Caller
from tests.kit.headrace import ROOT

#: Seconds in which nginx answers its first connection; 0.05 s measured.
_START_S = 10.0
SHIPPED = ROOT / "nginx" / "headrace.conf"
SHIPPED_MAIN = ROOT / "nginx" / "nginx.conf"


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def trusting() -> ssl.SSLContext:
    """A client's context that believes our own authority only."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    authority().configure_trust(context)
    return context


def binary() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    return found


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """`text` with each of the keys, which stands in it exactly once, exchanged; nothing else is changed: the
    way back leads to the original."""
    changed = text
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the shipped file"
        changed = changed.replace(old, new)
    back = changed
    for old, new in reversed(changes.items()):
        assert back.count(new) == 1, f"{new!r} is ambiguous"
        back = back.replace(new, old)
    assert back == text
    return changed


class Nginx:
    """A running nginx. `port` is the first of `ports`."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path, ports: Sequence[int]) -> None:
        self.process = process
        self.folder = folder
        self.ports = ports

    @property
    def port(self) -> int:
        return self.ports[0]

    async def connect(self, *, source: str = "127.0.0.1") -> Caller:
        """A connection over TLS, from this address of the machine."""
        opened = await asyncio.open_connection(
            *("127.0.0.1", self.port),
            ssl=trusting(),
            server_hostname="localhost",
            local_addr=(source, 0),
            limit=2**16,
        )
        return Caller(*opened)

    def logged(self) -> list[dict[str, Any]]:
        """The shipped configuration's log so far: written a second late."""
        file = self.folder / "access.json"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()


def listeners(count: int) -> list[socket.socket]:
    """Sockets for nginx to inherit: nobody else can take their ports in between."""
    return [socket.create_server(("127.0.0.1", 0), backlog=512) for _ in range(count)]


def _port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


@asynccontextmanager
async def started(folder: Path, main: str, sockets: Sequence[socket.socket]) -> AsyncIterator[Nginx]:
    """nginx on the text of a main file that listens at `sockets`, stopped at the end."""
    file = folder / "nginx.conf"
    file.write_text(main)
    fds = [sock.fileno() for sock in sockets]
    with (folder / "error.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(binary(), "-p", str(folder), "-e", "stderr", "-c", str(file)),
            *("-g", f"daemon off; pid {folder}/nginx.pid;"),
            env={**os.environ, "NGINX": "".join(f"{fd};" for fd in fds)},  # as in its own binary upgrade
            pass_fds=fds,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    nginx = Nginx(process, folder, [_port(sock) for sock in sockets])
    try:
        await _until_up(nginx)
        yield nginx
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def _until_up(nginx: Nginx) -> None:
    """The sockets accept before anybody serves them; the file with the pid is written when nginx is ready."""
    async with asyncio.timeout(_START_S):
        while not (nginx.folder / "nginx.pid").exists():
            assert nginx.process.returncode is None, nginx.errors()
            await asyncio.sleep(0.01)


def _temporary(folder: Path) -> str:
    """Where bodies may be stored by whoever runs the tests."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)


@asynccontextmanager
async def edge(
    tmp_path: Path, nodes: Sequence[int], *, vary: Mapping[str, str] | None = None
) -> AsyncIterator[Nginx]:
    """The shipped configuration with only ports, paths, the user and the nodes' addresses exchanged.

    vary: what a test changes on top of that, to see what it does.
    """
    folder = tmp_path / "nginx"
    folder.mkdir(exist_ok=True)
    certificate = authority().issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for number, pem in enumerate(certificate.cert_chain_pems):
        pem.write_to_path(folder / "cert.pem", append=number > 0)
    async with AsyncExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in listeners(2)]
        secure, plain = map(_port, sockets)
        changes = {
            "listen 443 ": f"listen 127.0.0.1:{secure} ",
            "listen 80 ": f"listen 127.0.0.1:{plain} ",
            "listen [::]:443 ": f"listen unix:{folder}/secure.sock ",
            "listen [::]:80 ": f"listen unix:{folder}/plain.sock ",
            "server 127.0.0.1:8080 ": f"server 127.0.0.1:{nodes[0]} ",
            "server 127.0.0.1:8081 ": f"server 127.0.0.1:{nodes[1]}  ",
            "/etc/nginx/headrace/fullchain.pem": f"{folder}/cert.pem",
            "/etc/nginx/headrace/privkey.pem": f"{folder}/key.pem",
            "/var/log/nginx/headrace.json": f"{folder}/access.json",
        }
        text = replaced(SHIPPED.read_text(), changes)
        for old, new in (vary or {}).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "headrace.conf").write_text(text)
        changes = {
            "user www-data;": f"user {getpass.getuser()};",
            "include /etc/nginx/headrace.conf;": f"{_temporary(folder)} include {folder}/headrace.conf;",
        }
        yield await stack.enter_async_context(
            started(folder, replaced(SHIPPED_MAIN.read_text(), changes), sockets)
        )


@asynccontextmanager
async def plain_edge(
    tmp_path: Path, node: int, lines: str = "", *, http: str = "", top: str = ""
) -> AsyncIterator[Nginx]:
    """A small nginx without TLS before one node.

    lines: of its one location; http: of the http block; top: of the server.
    """
    folder = tmp_path / "nginx"
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as sock:
        main = f"""
            user {getpass.getuser()};
            worker_processes 1;
            events {{ worker_connections 512; }}
            http {{
                {_temporary(folder)}
                access_log off;
                {http}
                server {{
                    listen 127.0.0.1:{_port(sock)};
                    {top}
                    location / {{ proxy_pass http://127.0.0.1:{node}; {lines} }}
                }}
            }}
        """
        async with started(folder, main, [sock]) as nginx:
            yield nginx
