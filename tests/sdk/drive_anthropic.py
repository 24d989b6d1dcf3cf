"""The anthropic package for Python does one case; prints one JSON line of what it saw.

    python drive_anthropic.py BASE_URL KEY CASE REQUEST_ID sync|async

It ends when its standard input does: until then its connections stay as the SDK left them.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import sys
import time
from typing import Any

import anthropic

ASK: Any = [{"role": "user", "content": "one two three"}]
TOOLS: Any = [{"name": "weather", "input_schema": {"type": "object"}}]
CONTENT = bytes(range(256)) * 1200


async def value(result: Any) -> Any:
    """What a call gives, by the sync client or by the async one."""
    return await result if inspect.isawaitable(result) else result


async def each(stream: Any) -> Any:
    """The items of a stream or a page of either client."""
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item


def mock(behaviour: str) -> dict[str, str]:
    return {"x-mock": behaviour}


def failure(error: Exception) -> dict[str, Any]:
    """What an application reads from an SDK's exception."""
    seen: dict[str, Any] = {"class": type(error).__name__, "message": str(error)}
    if isinstance(error, anthropic.APIStatusError):
        seen |= {"status": error.status_code, "request_id": error.request_id}
        seen["retry_after"] = error.response.headers.get("retry-after")
    return seen


class Driver:
    """One client; every other method is a case."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def ask(self, client: Any = None, **more: Any) -> Any:
        return (client or self.client).messages.create(
            **{"model": "m", "max_tokens": 99, "messages": ASK, **more}
        )

    async def refused(self, client: Any = None, **more: Any) -> dict[str, Any]:
        """A request that must not succeed."""
        started = time.monotonic()
        try:
            await value(self.ask(client, **more))
        except anthropic.APIError as error:
            return {**failure(error), "elapsed_s": time.monotonic() - started}
        return {"class": None}

    async def whole(self) -> dict[str, Any]:
        answer = await value(self.ask())
        return {
            "text": answer.content[0].text,
            "finish": answer.stop_reason,
            "usage": [answer.usage.input_tokens, answer.usage.output_tokens],
            "request_id": answer._request_id,
        }

    async def lingers(self) -> dict[str, Any]:
        return await self.stream("linger=0.05")

    async def stream(self, behaviour: str = "") -> dict[str, Any]:
        words, finish = [], None
        async for event in each(await value(self.ask(stream=True, extra_headers=mock(behaviour)))):
            if event.type == "content_block_delta":
                words.append(event.delta.text)
            elif event.type == "message_delta":
                finish = event.delta.stop_reason
        return {"text": "".join(words), "finish": finish}

    async def usage(self) -> dict[str, Any]:
        final = await self.final(model="m")
        return {"usage": [final.usage.input_tokens, final.usage.output_tokens]}

    async def final(self, **more: Any) -> Any:
        """The message that the SDK's own stream helper puts together."""
        manager = self.client.messages.stream(**{"max_tokens": 99, "messages": ASK, **more})
        if hasattr(manager, "__aenter__"):
            async with manager as stream:
                return await stream.get_final_message()
        with manager as stream:
            return stream.get_final_message()

    async def tools(self) -> dict[str, Any]:
        whole = (await value(self.ask(model="provided", tools=TOOLS))).content[0]
        final = await self.final(model="provided", tools=TOOLS)
        call, pieces = final.content[0], 0
        async for event in each(await value(self.ask(model="provided", tools=TOOLS, stream=True))):
            pieces += event.type == "content_block_delta" and event.delta.type == "input_json_delta"
        return {
            "whole": [whole.name, json.dumps(whole.input, separators=(",", ":"))],
            "streamed": [call.name, json.dumps(call.input, separators=(",", ":"))],
            "pieces": pieces,
            "finish": final.stop_reason,
        }

    async def count_tokens(self) -> dict[str, Any]:
        answer = await value(self.client.messages.count_tokens(model="provided", messages=ASK))
        return {"tokens": answer.input_tokens}

    async def models(self) -> dict[str, Any]:
        ids = [model.id async for model in each(self.client.models.list())]
        return {"ids": sorted(ids), "one": (await value(self.client.models.retrieve("m"))).id}

    async def errors(self) -> dict[str, Any]:
        client = self.client.with_options(max_retries=0)
        stranger = client.with_options(api_key="hr_nobody_knows")
        return {
            "400": await self.refused(client, extra_headers=mock("status=400")),
            "401": await self.refused(stranger),
            "404": await self.refused(client, model="nothing"),
            "429": await self.refused(client, extra_headers=mock("status=429, retry_after=7")),
            "500": await self.refused(client, extra_headers=mock("status=500")),
        }

    async def breaks(self) -> dict[str, Any]:
        return {
            "event": await self.broken("words=9, error_after=8"),
            "cut": await self.broken("words=9, cut_after=8, cut_mid_event"),
        }

    async def broken(self, behaviour: str) -> dict[str, Any]:
        """A stream that ends early; what came before it counts as delivered."""
        words: list[str] = []
        try:
            async for event in each(await value(self.ask(stream=True, extra_headers=mock(behaviour)))):
                if event.type == "content_block_delta":
                    words.append(event.delta.text)  # noqa: PERF401 - a comprehension would lose them
        except Exception as error:
            return {"text": "".join(words), **failure(error)}
        return {"text": "".join(words), "class": None}

    async def retries(self) -> dict[str, Any]:
        return await self.refused(self.client.with_options(max_retries=2), extra_headers=mock("status=500"))

    async def steered(self) -> dict[str, Any]:
        return await self.refused(self.client.with_options(max_retries=2), extra_headers=mock("status=503"))

    async def waits(self) -> dict[str, Any]:
        client = self.client.with_options(max_retries=2)
        return {"texts": [(await value(self.ask(client))).content[0].text for _ in range(2)]}

    async def abort(self) -> dict[str, Any]:
        stream = await value(self.ask(stream=True, extra_headers=mock("words=100000, gap=0.01")))
        count = 0
        async for _ in each(stream):
            count += 1
            if count == 3:
                break
        await value(stream.close())
        return {"chunks": count}

    async def timeout(self) -> dict[str, Any]:
        client = self.client.with_options(max_retries=0, timeout=0.5)
        return await self.refused(client, extra_headers=mock("hang"))

    async def uploads(self) -> dict[str, Any]:
        files = self.client.files
        made = await value(files.upload(file=("notes.bin", CONTENT, "application/octet-stream")))
        back = await value(files.download(made.id))
        content = await value(back.read())
        await value(files.delete(made.id))
        return {
            "name": made.filename,
            "bytes": made.size_bytes,
            "same": hashlib.sha256(content).digest() == hashlib.sha256(CONTENT).digest(),
        }


async def main(base_url: str, key: str, case: str, request_id: str, mode: str) -> None:
    made = {"sync": anthropic.Anthropic, "async": anthropic.AsyncAnthropic}[mode]
    client = made(base_url=base_url, api_key=key, default_headers={"x-request-id": request_id})
    seen = await getattr(Driver(client), case)()
    print(json.dumps({"version": anthropic.__version__, **seen}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await value(client.close())


asyncio.run(main(*sys.argv[1:]))
