"""Reload: all workers change, or none; running streams are not touched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from proxy import config
from tests.kit.callers import Caller, ask, chat
from tests.kit.fleet import Fleet, fleet, write
from tests.kit.headrace import running, settings_for, until
from tests.kit.invariant import balanced
from tests.kit.keys import auth_section, bearer, make_key
from tests.kit.upstreams import DONE, END, HEAD, Call, chunk, event, scripted

A = event("a")


def settings(upstream_url: str, **sections: Any) -> dict[str, Any]:
    return settings_for(upstream_url, **{"workers": 2, **sections})


async def short(call: Call) -> None:
    await call.send(HEAD + chunk(A + DONE) + END)


async def reloads(running: Fleet, result: str) -> float:
    return await running.total("headrace_config_reloads_total", f'result="{result}"')


async def by_command(running: Fleet) -> None:
    code, out, err = await running.tell("reload")
    assert (code, err) == (0, [])
    assert out == ["reloaded: True"]


async def by_signal(running: Fleet) -> None:
    before = await reloads(running, "ok")
    os.kill(running.pid, signal.SIGHUP)
    async with asyncio.timeout(5):
        while await reloads(running, "ok") == before:
            await asyncio.sleep(0.01)


async def by_request(running: Fleet) -> None:
    assert (await running.admin("POST", "/admin/reload")).status == 200


# All ways end in the same call: one process is told in one of them, two in each.
@pytest.mark.parametrize(
    ("reload", "workers"),
    [
        (by_command, 2),
        (by_signal, 2),
        (by_request, 2),
        (by_signal, 1),
        pytest.param(by_command, 1, marks=pytest.mark.slow),
        pytest.param(by_request, 1, marks=pytest.mark.slow),
    ],
)
async def test_new_requests_change_and_running_streams_do_not(
    tmp_path: Path, reload: Any, workers: int
) -> None:
    """A stream goes on through the upstream that is no longer configured; new requests change."""
    gate = asyncio.Event()

    async def held(call: Call) -> None:
        await call.send(HEAD + chunk(A))
        await gate.wait()
        await call.send(chunk(A + DONE) + END)

    async with (
        scripted(held) as old,
        scripted(short) as new,
        fleet(tmp_path, settings(old.url, workers=workers)) as running,
        asyncio.timeout(30),
    ):
        caller = await Caller.connect(running.port)
        await caller.send(chat())
        answer = await caller.head()
        await caller.piece(answer)
        changed = settings(new.url, workers=workers)
        changed["models"] = {"fresh": {"upstreams": ["up"]}}
        write(running.file, changed)
        await reload(running)
        for _ in range(30):  # on connections of their own: both workers get some
            assert (await ask(running.port, chat(model="fresh"))).status == 200
            assert (await ask(running.port, chat())).status == 404
        gate.set()
        await caller.rest(answer)
        assert answer.body == A + A + DONE
        assert answer.clean
        caller.leave()
        await running.quiet()


BAD = {
    "syntax": "models: [",
    "unknown upstream": "models: {m: {upstreams: [upp]}}",
    "another port": "listen: 127.0.0.1:1",
    "no limit fits": "max_connections: 9000000",
}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_bad_file_changes_nothing(tmp_path: Path, workers: int) -> None:
    """It is refused with its mistake, logged and counted; every request goes on as before."""
    async with (
        scripted(short) as upstream,
        fleet(tmp_path, settings(upstream.url, workers=workers)) as running,
    ):
        good = settings(upstream.url, workers=workers)
        for count, (name, text) in enumerate(BAD.items(), 1):
            write(running.file, {**good, "models": {"other": {"upstreams": ["up"]}}})
            kept = running.file.read_text()
            if name == "syntax":
                running.file.write_text(text)
            else:
                key, _, value = text.partition(": ")
                write(running.file, {**yaml.safe_load(kept), key: yaml.safe_load(value)})
            if workers == 2:  # the command is the same for one
                code, out, err = await running.tell("reload")
                assert (code, out) == (1, []), name
                assert len(err) == 1
            refused = await running.admin("POST", "/admin/reload")
            assert refused.status == 400
            assert refused.json()["error"]["code"] == "reload_failed"
            for _ in range(10):
                assert (await ask(running.port, chat())).status == 200, name
            assert await reloads(running, "error") >= count
        assert await reloads(running, "ok") == 0
        os.kill(running.pid, signal.SIGHUP)
        await until(lambda: len(running.logged("signal_refused")) == 1)
        await until(lambda: len(running.logged("reload_failed")) > len(BAD))
        await balanced(running, upstream.calls)


async def test_fifty_reloads_leak_nothing(tmp_path: Path) -> None:
    """Descriptors and tasks are what they were, though every reload replaced the upstream."""
    async with scripted(short) as upstream, fleet(tmp_path, settings(upstream.url)) as running:

        async def again(number: int) -> dict[str, Any]:
            changed = settings(upstream.url)
            changed["upstreams"]["up"]["api_key"] = f"key-{number}"
            write(running.file, changed)
            await by_request(running)
            assert (await ask(running.port, chat())).status == 200
            await running.quiet()
            return await running.state()

        before = await again(0)
        for number in range(1, 51):
            await again(number)
        async with asyncio.timeout(10):
            while True:  # what was replaced is closed a moment later
                after = await again(0)
                if after["fds"] <= before["fds"] + 4 and after["tasks"] <= before["tasks"] + 4:
                    break
        assert await reloads(running, "ok") >= 51


async def test_a_worker_that_dies_after_a_reload_comes_back_with_it(tmp_path: Path) -> None:
    """The replacement is started with the new settings."""
    async with scripted(short) as upstream, fleet(tmp_path, settings(upstream.url)) as running:
        changed = settings(upstream.url)
        changed["models"]["fresh"] = {"upstreams": ["up"]}
        write(running.file, changed)
        await by_request(running)
        for pid in running.workers():
            os.kill(pid, signal.SIGKILL)
        await running.settle()
        for _ in range(20):
            assert (await ask(running.port, chat(model="fresh"))).status == 200


async def test_a_worker_that_starts_during_a_reload_follows(tmp_path: Path) -> None:
    """It was given the old settings, and serves the new ones."""
    async with scripted(short) as upstream, fleet(tmp_path, settings(upstream.url)) as running:
        (victim, survivor), newcomer = await running.settle(), 0

        def started() -> bool:
            nonlocal newcomer
            newcomer = sum({*running.workers()} - {victim, survivor})
            return newcomer > 0

        os.kill(victim, signal.SIGKILL)
        await until(started, 10)
        os.kill(newcomer, signal.SIGSTOP)  # it takes its time
        write(running.file, {**settings(upstream.url), "models": {"fresh": {"upstreams": ["up"]}}})
        await by_request(running)
        os.kill(newcomer, signal.SIGCONT)
        assert await running.settle() == sorted([survivor, newcomer])
        statuses = []
        async with asyncio.timeout(10):
            while statuses[-20:] != [200] * 20:
                statuses.append((await ask(running.port, chat(model="fresh"))).status)
        assert {*statuses} <= {200, 404}


# ── what is built anew ───────────────────────────────────────────────────────────────────────────────────


def certify(tmp_path: Path, authority: trustme.CA) -> None:
    issued = authority.issue_cert("localhost")
    (tmp_path / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))


async def test_certificate_keys_and_retries(tmp_path: Path) -> None:
    """A renewed certificate is shown to new callers, another key store is asked. Of what cannot be used
    nothing is: neither the certificate nor the key store, and nothing that was opened for it stays open."""
    old, new = trustme.CA(), trustme.CA()
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "keys.db").write_bytes(b"no database" * 500)
    keys = {name: await make_key(tmp_path / name) for name in ("old", "new")}
    certify(tmp_path, old)
    tls = {"cert": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    ledger = {"database": f"sqlite:{tmp_path}/headrace.db"}
    first = settings_for("mock:", tls=tls, auth=auth_section(tmp_path / "old"), ledger=ledger)
    async with running(first) as here:

        async def asked(authority: trustme.CA, name: str) -> int:
            context = ssl.create_default_context()
            authority.configure_trust(context)
            lines = ("GET /v1/models HTTP/1.1", "Host: h", "Connection: close", bearer(keys[name]), "", "")
            reader, writer = await asyncio.open_connection("localhost", here.port, ssl=context)
            writer.write("\r\n".join(lines).encode())
            try:
                return int((await reader.read()).split()[1])
            finally:
                writer.close()

        async def reloaded(**changed: Any) -> str:
            """Why it was refused, "" if it was not."""
            text = json.dumps({**first, **changed})
            here.front._load = lambda: config.parse(text, "test.yaml", {})
            request = b"POST /admin/reload HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
            document = (await ask(here.front.admin_port, request)).json()
            return str(document["error"]["message"]) if "error" in document else ""

        before = here.state["fds"]
        assert (await asked(old, "old"), await asked(old, "new")) == (200, 401)
        assert "auth.database" in await reloaded(auth=auth_section(tmp_path / "nowhere"))
        assert "auth.database" in await reloaded(auth=auth_section(tmp_path / "garbage"))
        (tmp_path / "cert.pem").write_text("no certificate")
        assert "tls: the certificate cannot be loaded" in await reloaded()
        certify(tmp_path, new)
        assert (await asked(old, "old"), await asked(old, "new")) == (200, 401)
        for auth in ("old", "new"):  # prepared here, refused by another worker
            other = {**first, "auth": auth_section(tmp_path / auth)}
            await here.server.prepare(config.parse(json.dumps(other), "test.yaml", {}))
            await here.server.discard()
        assert (await asked(old, "old"), await asked(old, "new")) == (200, 401)
        again = {"auth": auth_section(tmp_path / "new"), "retry": {"attempts": 2}}
        assert await reloaded(**again) == ""
        assert (await asked(new, "new"), await asked(new, "old")) == (200, 401)
        with pytest.raises(ssl.SSLCertVerificationError):
            await asked(old, "new")
        assert await reloaded() == ""
        await until(lambda: here.state["fds"] <= before, describe=lambda: str(here.state))
