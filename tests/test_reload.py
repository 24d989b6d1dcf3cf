"""Reload: all workers change, or none; running streams are not touched."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.callers import Caller, ask, chat
from tests.kit.fleet import Fleet, fleet, write
from tests.kit.headrace import settings_for, until
from tests.kit.invariant import balanced
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
        await until(lambda: len(running.logged("reload_failed")) >= len(BAD))
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
