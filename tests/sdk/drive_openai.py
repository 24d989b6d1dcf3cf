"""The openai package for Python does one case; prints one JSON line of what it saw.

    python drive_openai.py BASE_URL KEY CASE REQUEST_ID sync|async

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

import openai

ASK: Any = [{"role": "user", "content": "one two three"}]
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
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
    if isinstance(error, openai.APIStatusError):
        seen |= {"status": error.status_code, "code": error.code, "request_id": error.request_id}
        seen["retry_after"] = error.response.headers.get("retry-after")
    return seen


class Driver:
    """One client; every other method is a case."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def chat(self, client: Any = None, **more: Any) -> Any:
        return (client or self.client).chat.completions.create(**{"model": "m", "messages": ASK, **more})

    async def refused(self, client: Any = None, **more: Any) -> dict[str, Any]:
        """A request that must not succeed."""
        started = time.monotonic()
        try:
            await value(self.chat(client, **more))
        except openai.APIError as error:
            return {**failure(error), "elapsed_s": time.monotonic() - started}
        return {"class": None}

    async def whole(self) -> dict[str, Any]:
        answer = await value(self.chat())
        return {
            "text": answer.choices[0].message.content,
            "finish": answer.choices[0].finish_reason,
            "usage": [answer.usage.prompt_tokens, answer.usage.completion_tokens],
            "request_id": answer._request_id,
        }

    async def lingers(self) -> dict[str, Any]:
        return await self.stream("linger=0.05")

    async def stream(self, behaviour: str = "") -> dict[str, Any]:
        stream = await value(self.chat(stream=True, extra_headers=mock(behaviour)))
        chunks = [chunk async for chunk in each(stream)]
        return {
            "text": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
            "finish": chunks[-1].choices[0].finish_reason,
        }

    async def usage(self) -> dict[str, Any]:
        stream = await value(self.chat(stream=True, stream_options={"include_usage": True}))
        chunks = [chunk async for chunk in each(stream)]
        assert chunks[-1].choices == []
        return {"usage": [chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens]}

    async def tools(self) -> dict[str, Any]:
        asked: Any = {"tools": TOOLS, "tool_choice": "required"}
        whole = (await value(self.chat(**asked))).choices[0].message.tool_calls[0].function
        name, arguments, finish = "", [], None
        async for chunk in each(await value(self.chat(stream=True, **asked))):
            for call in chunk.choices[0].delta.tool_calls or []:
                name = call.function.name or name
                arguments.append(call.function.arguments or "")
            finish = chunk.choices[0].finish_reason
        return {
            "whole": [whole.name, whole.arguments],
            "streamed": [name, "".join(arguments)],
            "pieces": sum(map(bool, arguments)),
            "finish": finish,
        }

    async def responses(self) -> dict[str, Any]:
        create = self.client.responses.create
        whole = await value(create(model="m", input="one two"))
        events = [event async for event in each(await value(create(model="m", input="one", stream=True)))]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        usage = events[-1].response.usage
        return {
            "whole": whole.output_text,
            "streamed": "".join(deltas),
            "last": events[-1].type,
            "usage": [usage.input_tokens, usage.output_tokens],
        }

    async def embeddings(self) -> dict[str, Any]:
        answer = await value(self.client.embeddings.create(model="m", input=["one two", "three"]))
        return {"vectors": [list(item.embedding) for item in answer.data]}

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
            "event": await self.broken("words=9, error_after=5"),
            "cut": await self.broken("words=9, cut_after=5, cut_mid_event"),
        }

    async def broken(self, behaviour: str) -> dict[str, Any]:
        """A stream that ends early; what came before it counts as delivered."""
        words: list[str] = []
        try:
            async for chunk in each(await value(self.chat(stream=True, extra_headers=mock(behaviour)))):
                words.append(chunk.choices[0].delta.content or "")  # noqa: PERF401 - a comprehension would lose them
        except Exception as error:
            return {"text": "".join(words), **failure(error)}
        return {"text": "".join(words), "class": None}

    async def retries(self) -> dict[str, Any]:
        return await self.refused(self.client.with_options(max_retries=2), extra_headers=mock("status=500"))

    async def steered(self) -> dict[str, Any]:
        return await self.refused(self.client.with_options(max_retries=2), extra_headers=mock("status=503"))

    async def waits(self) -> dict[str, Any]:
        client = self.client.with_options(max_retries=2)
        return {"texts": [(await value(self.chat(client))).choices[0].message.content for _ in range(2)]}

    async def abort(self) -> dict[str, Any]:
        stream = await value(self.chat(stream=True, extra_headers=mock("words=100000, gap=0.01")))
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
        made = await value(files.create(file=("notes.bin", CONTENT), purpose="user_data"))
        back = await value(files.content(made.id))
        await value(files.delete(made.id))
        return {
            "name": made.filename,
            "bytes": made.bytes,
            "same": hashlib.sha256(back.content).digest() == hashlib.sha256(CONTENT).digest(),
        }

    async def transcriptions(self) -> dict[str, Any]:
        audio = ("speech.wav", CONTENT, "audio/wav")
        answer = await value(self.client.audio.transcriptions.create(model="provided", file=audio))
        return {"text": answer.text}


async def main(base_url: str, key: str, case: str, request_id: str, mode: str) -> None:
    made = {"sync": openai.OpenAI, "async": openai.AsyncOpenAI}[mode]
    client = made(base_url=base_url, api_key=key, default_headers={"x-request-id": request_id})
    seen = await getattr(Driver(client), case)()
    print(json.dumps({"version": openai.__version__, **seen}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await value(client.close())


asyncio.run(main(*sys.argv[1:]))
