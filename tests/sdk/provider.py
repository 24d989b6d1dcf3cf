"""What the embedded mock does not play: tool use and token counts of messages, files, transcriptions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import BodyPartReader, web

TOOL = "weather"
PIECES = ('{"ci', 'ty":', '"Par', 'is"}')
TOKENS = 3


def _tool_use(arguments: dict[str, str]) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_1", "name": TOOL, "input": arguments}


def _message(content: list[dict[str, Any]], stop: str | None) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "provided",
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": TOKENS, "output_tokens": len(PIECES)},
    }


def _events() -> Iterator[dict[str, Any]]:
    """A tool call whose arguments come in pieces, as the API's documentation shows it."""
    yield {"type": "message_start", "message": _message([], None)}
    yield {"type": "content_block_start", "index": 0, "content_block": _tool_use({})}
    for piece in PIECES:
        delta = {"type": "input_json_delta", "partial_json": piece}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    delta = {"stop_reason": "tool_use", "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": len(PIECES)}}
    yield {"type": "message_stop"}


async def _messages(request: web.Request) -> web.StreamResponse:
    if not (await request.json()).get("stream"):
        return web.json_response(_message([_tool_use(json.loads("".join(PIECES)))], "tool_use"))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in _events():
        await response.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
    await response.write_eof()
    return response


async def _count_tokens(request: web.Request) -> web.Response:
    return web.json_response({"input_tokens": TOKENS})


async def _form(request: web.Request) -> tuple[dict[str, str], str, bytes]:
    """The fields of a form, and the name and content of its one file."""
    fields: dict[str, str] = {}
    name, content = "", b""
    async for part in await request.multipart():
        assert isinstance(part, BodyPartReader)
        if part.filename is None:
            fields[part.name or ""] = await part.text()
        else:
            name, content = part.filename, bytes(await part.read())
    return fields, name, content


class _Files:
    """The files of one provider."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    async def create(self, request: web.Request) -> web.Response:
        """Answers in the dialect that is asked."""
        fields, name, content = await _form(request)
        file_id = f"file-{len(self._contents)}"
        self._contents[file_id] = content
        about: dict[str, Any] = {"id": file_id, "filename": name}
        if "anthropic-version" in request.headers:
            about |= {"type": "file", "size_bytes": len(content), "mime_type": "application/octet-stream"}
            about |= {"created_at": "2026-01-01T00:00:00Z", "downloadable": True}
        else:
            about |= {"object": "file", "bytes": len(content), "purpose": fields["purpose"]}
            about |= {"created_at": 1_767_225_600, "status": "processed"}
        return web.json_response(about)

    async def content(self, request: web.Request) -> web.Response:
        body = self._contents[request.match_info["id"]]
        return web.Response(body=body, content_type="application/octet-stream")

    async def delete(self, request: web.Request) -> web.Response:
        file_id = request.match_info["id"]
        return web.json_response({"id": file_id, "object": "file", "type": "file_deleted", "deleted": True})


async def _transcribe(request: web.Request) -> web.Response:
    fields, name, content = await _form(request)
    return web.json_response({"text": f"{fields['model']} heard {len(content)} bytes of {name}"})


@asynccontextmanager
async def provider() -> AsyncIterator[str]:
    """Runs it; its base URL."""
    files = _Files()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/messages", _messages)
    app.router.add_post("/v1/messages/count_tokens", _count_tokens)
    app.router.add_post("/v1/files", files.create)
    app.router.add_get("/v1/files/{id}/content", files.content)
    app.router.add_delete("/v1/files/{id}", files.delete)
    app.router.add_post("/v1/audio/transcriptions", _transcribe)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()
