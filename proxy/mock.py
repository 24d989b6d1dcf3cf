"""The mock upstream: an OpenAI-compatible server that answers by rote and fails on demand.

Rules:

- An island: the standard library, aiohttp and msgspec, nothing of the proxy.
- The same request gets the same bytes, but for the counter in its ids: no clock, no random numbers.
- An event is one `write`, hence one HTTP chunk, unless the behaviour asks for something else.
- A fault is a field of `Behaviour`, set for the whole server or for one request by the header
  `x-mock: words=5, gap=0.01, cut_after=3`.  A bare name means true; an unknown name is a 400 that names it.
- "After N events" counts every `data:` event of a stream, `[DONE]` too, but no comments.  A body that is not
  a stream is one event.  N = 0 is right after the head; -1 (`cut_after`, `rst_after`) is before the head.
- Every request is counted in `hits`, then either in `completed` (answered as its behaviour says, deliberate
  faults included) or in `aborted` (the caller left first, or the server was closed).

Routes, each with and without `/v1`: POST chat/completions, completions, embeddings, responses and messages
(Anthropic's dialect), GET models.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import functools
import itertools
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from aiohttp import hdrs, web

if TYPE_CHECKING:
    import ssl

KEPT = 1000  # requests remembered
CREATED = 1_700_000_000  # every answer's date: answers do not depend on the clock
HALF_PAUSE = 0.001  # between the two halves of an event
FLUSH = 1.0  # at most, before a reset
SHUTDOWN = 0.05  # aiohttp waits this long twice: for the handlers to end, then for them to be cancelled
LIMIT = 1 << 16  # request line and header field: what the proxy lets through is not ours to refuse

TEXT = "the quick brown fox jumps over the lazy dog while seven wise owls watch from a tall old oak tree"
WORDS = tuple(TEXT.split())
ARGUMENTS = ('{"ci', 'ty":', '"Par', 'is"}')  # of a tool call, as they are streamed
VECTOR = (0.25, -0.5, 0.75, 1.0)  # every embedding; exact in binary
REDIRECT = "http://127.0.0.1:9/"
GARBAGE = b"SSH-2.0-OpenSSH\r\n"
UPGRADE = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
RST = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds: closing resets

_encode = msgspec.json.Encoder().encode
_FIRST = _encode(WORDS[0])
_LATER = tuple(_encode(" " + word) for word in WORDS)
_VECTOR_BASE64 = base64.b64encode(struct.pack(f"<{len(VECTOR)}f", *VECTOR)).decode()
_FAILURE = "the mock upstream failed as asked"
_ERROR_TYPES = {  # status: the type of the error, in both dialects
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Cut = Annotated[int, msgspec.Meta(ge=-1)]
Fault = Literal["stall", "error", "cut", "rst"]


class Behaviour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a request is answered; the defaults are a fast and healthy upstream."""

    words: Count = 20
    ttfb: Seconds = 0.0  # before the first byte of the answer
    gap: Seconds = 0.0  # between events
    tool: bool = False  # call the first tool of the request, if it has one
    big_event: Count = 0  # bytes of text in the first content event
    big_header: Count = 0  # bytes of an extra header

    # Errors that say so.
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] = 200
    retry_after: Seconds | None = None  # the Retry-After of an answer with a status
    error_body: bool = False  # 200 with an error for a body
    error_after: Count | None = None  # an error event, then a proper end without a terminator
    redirect: bool = False

    # Answers that do not come, or not to their end.
    hang: bool = False  # no answer at all
    stall_after: Count | None = None  # silence, the connection stays open
    cut_after: Cut | None = None  # FIN without the terminating chunk
    rst_after: Cut | None = None  # RST
    cut_mid_event: bool = False  # the two above send half of the next event first
    no_done: bool = False  # a proper end without finish_reason and terminator
    linger: Seconds = 0.0  # the body stays open that long after its last event

    # Answers that are odd.
    bad_json: Count = 0  # the number of the event whose JSON is broken, from 1
    half_events: bool = False  # each event in two writes
    one_byte: bool = False  # each byte its own write
    close_delimited: bool = False  # neither chunks nor a length: the body ends with the connection
    crlf: bool = False  # line ends of the stream
    keepalive_comments: Count = 0  # comments before the first event
    plain_json: bool = False  # a stream was asked for, JSON is sent
    garbage: bool = False  # not HTTP
    upgrade: bool = False  # 101 that nobody asked for

    def first_fault(self, in_band: bool) -> tuple[int, Fault] | None:
        """After how many events the body goes wrong, and how."""
        found: list[tuple[int, Fault]] = []
        if self.stall_after is not None:
            found.append((self.stall_after, "stall"))
        if self.error_after is not None and in_band:
            found.append((self.error_after, "error"))
        if self.cut_after is not None:
            found.append((self.cut_after, "cut"))
        if self.rst_after is not None:
            found.append((self.rst_after, "rst"))
        return min(found, key=lambda fault: fault[0]) if found else None

    def plain_body(self) -> bool:
        """Whether a body of one piece can be handed over whole."""
        after = (self.stall_after, self.cut_after, self.rst_after)
        odd = self.half_events or self.one_byte or self.close_delimited or self.linger
        return not odd and all(number is None for number in after)


NORMAL = Behaviour()


@functools.lru_cache(maxsize=512)
def override(behaviour: Behaviour, header: str) -> Behaviour:
    """`behaviour` with the fields that an `x-mock` header names; msgspec.ValidationError for a bad one."""
    fields: dict[str, Any] = msgspec.structs.asdict(behaviour)
    for item in header.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name:
            fields[name] = value or "true"
    return msgspec.convert(fields, Behaviour, strict=False)


class Seen(msgspec.Struct):
    """A request as it arrived; `body` is filled in once it is complete."""

    method: str
    raw_path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """The first value of a header, by a name in any case."""
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), None)


class Record:
    """What arrived and what became of it."""

    __slots__ = ("aborted", "active", "completed", "hits", "requests")

    def __init__(self) -> None:
        self.requests: deque[Seen] = deque(maxlen=KEPT)
        self.hits = 0
        self.active = 0  # being answered now
        self.aborted = 0
        self.completed = 0

    @property
    def last(self) -> Seen:
        """The request that arrived last."""
        return self.requests[-1]


RECORD: web.AppKey[Record] = web.AppKey("record", Record)


# -- what a request asks for


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct):
    model: str = "mock"
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    messages: Any = None
    prompt: Any = None
    input: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    encoding_format: str | None = None


_decode = msgspec.json.Decoder(_Body).decode
_NO_BODY = _Body()


class Ask(NamedTuple):
    """A request that has been understood: all that the dialects need to answer it."""

    id: str
    body: _Body
    behaviour: Behaviour

    @property
    def usage_asked(self) -> bool:
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def tool(self) -> str | None:
        """The name of the tool to call, if one is to be called."""
        tools, choice = self.body.tools, self.body.tool_choice
        named = isinstance(choice, dict) and "function" in choice
        if not tools or not (self.behaviour.tool or choice == "required" or named):
            return None
        function = tools[0].get("function") if isinstance(tools[0], dict) else None
        return str(function.get("name", "")) if isinstance(function, dict) else None

    @property
    def text(self) -> str:
        return "".join(msgspec.json.decode(piece, type=str) for piece in self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The words of the answer, each a JSON string, the blank before a word included."""
        count, big = self.behaviour.words, self.behaviour.big_event
        if count:
            yield _encode("x" * big) if big else _FIRST
        for number in range(1, count):
            yield _LATER[number % len(WORDS)]

    def prompt_tokens(self) -> int:
        body = self.body
        return sum(_count(value) for value in (body.messages, body.prompt, body.input))

    def completion_tokens(self) -> int:
        return len(ARGUMENTS) if self.tool is not None else self.behaviour.words


def _count(value: object) -> int:
    """The words of a text, wherever in a list of messages, parts or inputs it stands."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, list):
        return sum(_count(item) for item in value)
    if isinstance(value, dict):
        return _count(value.get("content")) + _count(value.get("text"))
    return 1 if isinstance(value, int) else 0  # a prompt may be a list of tokens


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode({"type": name, **data}))


# -- chat/completions


def _openai_usage(ask: Ask) -> dict[str, int]:
    prompt, completion = ask.prompt_tokens(), ask.completion_tokens()
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _openai_head(ask: Ask, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{ask.id}", "object": kind, "created": CREATED, "model": ask.body.model}


def _openai_tail(ask: Ask, kind: str, finish: bytes) -> Iterator[bytes]:
    """The end of a stream, which a stream that is not to be done lacks."""
    if ask.behaviour.no_done:
        return
    yield finish
    if ask.usage_asked:
        last = _openai_head(ask, kind) | {"choices": [], "usage": _openai_usage(ask)}
        yield b"data: %s\n\n" % _encode(last)
    yield DONE


def _tool_calls(name: str) -> list[dict[str, Any]]:
    function = {"name": name, "arguments": "".join(ARGUMENTS)}
    return [{"id": "call_mock", "type": "function", "function": function}]


def _chat_json(ask: Ask) -> dict[str, Any]:
    tool = ask.tool
    message: dict[str, Any] = {"role": "assistant", "content": ask.text if tool is None else None}
    if tool is not None:
        message["tool_calls"] = _tool_calls(tool)
    finish = "stop" if tool is None else "tool_calls"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return _openai_head(ask, "chat.completion") | {"choices": [choice], "usage": _openai_usage(ask)}


def _tool_deltas(name: str) -> Iterator[bytes]:
    opening = _tool_calls(name)[0] | {"index": 0, "function": {"name": name, "arguments": ""}}
    yield _encode({"tool_calls": [opening]})
    for piece in ARGUMENTS:
        yield _encode({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})


def _chat_events(ask: Ask) -> Iterator[bytes]:
    kind = "chat.completion.chunk"
    tool = ask.tool
    # Only the delta differs from chunk to chunk: what surrounds it is encoded once.
    before = b'data: %s,"choices":[{"index":0,"delta":' % _encode(_openai_head(ask, kind))[:-1]
    close = b'}],"usage":null}\n\n' if ask.usage_asked else b"}]}\n\n"
    after = b',"logprobs":null,"finish_reason":null' + close
    if tool is None:
        yield before + b'{"role":"assistant","content":"","refusal":null}' + after
        start, end = before + b'{"content":', b"}" + after
        for piece in ask.pieces():
            yield start + piece + end
    else:
        yield before + b'{"role":"assistant","content":null}' + after
        for delta in _tool_deltas(tool):
            yield before + delta + after
    reason = b"stop" if tool is None else b"tool_calls"
    yield from _openai_tail(
        ask, kind, before + b'{},"logprobs":null,"finish_reason":"' + reason + b'"' + close
    )


# -- completions


def _text_json(ask: Ask) -> dict[str, Any]:
    choice = {"index": 0, "text": ask.text, "logprobs": None, "finish_reason": "stop"}
    return _openai_head(ask, "text_completion") | {"choices": [choice], "usage": _openai_usage(ask)}


def _text_events(ask: Ask) -> Iterator[bytes]:
    kind = "text_completion"
    start = b'data: %s,"choices":[{"index":0,"text":' % _encode(_openai_head(ask, kind))[:-1]
    close = b'}],"usage":null}\n\n' if ask.usage_asked else b"}]}\n\n"
    end = b',"logprobs":null,"finish_reason":null' + close
    for piece in ask.pieces():
        yield start + piece + end
    yield from _openai_tail(ask, kind, start + b'"","logprobs":null,"finish_reason":"stop"' + close)


# -- responses


def _response_usage(ask: Ask) -> dict[str, Any]:
    prompt, completion = ask.prompt_tokens(), ask.behaviour.words
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


def _response_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _response_item(ask: Ask, text: str | None) -> dict[str, Any]:
    status = "in_progress" if text is None else "completed"
    content = [] if text is None else [_response_part(text)]
    return {
        "id": f"msg_{ask.id}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _response(ask: Ask, text: str | None) -> dict[str, Any]:
    """The response object: of a finished answer, or (no text) of one that only began."""
    return {
        "id": f"resp_{ask.id}",
        "object": "response",
        "created_at": CREATED,
        "status": "in_progress" if text is None else "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": ask.body.model,
        "output": [] if text is None else [_response_item(ask, text)],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None if text is None else _response_usage(ask),
    }


def _response_json(ask: Ask) -> dict[str, Any]:
    return _response(ask, ask.text)


def _response_events(ask: Ask) -> Iterator[bytes]:
    item = {"item_id": f"msg_{ask.id}", "output_index": 0, "content_index": 0}
    yield _event("response.created", {"response": _response(ask, None), "sequence_number": 0})
    opened = {"output_index": 0, "item": _response_item(ask, None), "sequence_number": 1}
    yield _event("response.output_item.added", opened)
    yield _event("response.content_part.added", item | {"part": _response_part(""), "sequence_number": 2})
    delta = item | {"logprobs": []}
    start = _event("response.output_text.delta", delta)[:-3] + b',"sequence_number":'  # without its }\n\n
    number = 2
    for number, piece in enumerate(ask.pieces(), 3):
        yield b'%s%d,"delta":%s}\n\n' % (start, number, piece)
    if ask.behaviour.no_done:
        return
    text = ask.text
    ends: tuple[tuple[str, dict[str, Any]], ...] = (
        ("response.output_text.done", item | {"text": text, "logprobs": []}),
        ("response.content_part.done", item | {"part": _response_part(text)}),
        ("response.output_item.done", {"output_index": 0, "item": _response_item(ask, text)}),
        ("response.completed", {"response": _response(ask, text)}),
    )
    for name, data in ends:
        number += 1
        yield _event(name, data | {"sequence_number": number})


# -- messages


def _message(ask: Ask, text: str | None) -> dict[str, Any]:
    output = 1 if text is None else ask.behaviour.words  # a stream opens with a preliminary count
    return {
        "id": f"msg_{ask.id}",
        "type": "message",
        "role": "assistant",
        "model": ask.body.model,
        "content": [] if text is None else [{"type": "text", "text": text}],
        "stop_reason": None if text is None else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": ask.prompt_tokens(), "output_tokens": output},
    }


def _message_json(ask: Ask) -> dict[str, Any]:
    return _message(ask, ask.text)


def _message_events(ask: Ask) -> Iterator[bytes]:
    yield _event("message_start", {"message": _message(ask, None)})
    yield _event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})
    yield _event("ping", {})
    start = (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":'
    )
    for piece in ask.pieces():
        yield start + piece + b"}}\n\n"
    if ask.behaviour.no_done:
        return
    yield _event("content_block_stop", {"index": 0})
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    yield _event("message_delta", {"delta": delta, "usage": {"output_tokens": ask.behaviour.words}})
    yield _event("message_stop", {})


# -- embeddings, models


def _embeddings_json(ask: Ask) -> dict[str, Any]:
    given = ask.body.input
    many = isinstance(given, list) and not all(isinstance(token, int) for token in given)
    vector: str | list[float] = _VECTOR_BASE64 if ask.body.encoding_format == "base64" else list(VECTOR)
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index in range(len(given) if many else 1)
    ]
    tokens = ask.prompt_tokens()
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": ask.body.model, "usage": usage}


def _models_json(ask: Ask) -> dict[str, Any]:
    model = {"id": ask.body.model, "object": "model", "created": CREATED, "owned_by": "mock"}
    return {"object": "list", "data": [model]}


# -- errors


def _error(anthropic: bool, status: int, message: str) -> dict[str, Any]:
    if anthropic:
        kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _openai_failure(number: int) -> bytes:
    return b"data: %s\n\n" % _encode(_error(False, 500, _FAILURE))


def _response_failure(number: int) -> bytes:
    # Flat, as the real API sends it; the SDK hands it on as an event.
    data = {"code": "server_error", "message": _FAILURE, "param": None, "sequence_number": number}
    return _event("error", data)


def _message_failure(number: int) -> bytes:
    return _event("error", _error(True, 529, _FAILURE))


class Dialect(NamedTuple):
    """How a route answers: whole, as a stream (if it can), and with an error inside the stream."""

    json: Callable[[Ask], dict[str, Any]]
    events: Callable[[Ask], Iterator[bytes]] | None = None
    failure: Callable[[int], bytes] = _openai_failure
    anthropic: bool = False


ROUTES: dict[tuple[str, str], Dialect] = {
    ("POST", "/chat/completions"): Dialect(_chat_json, _chat_events),
    ("POST", "/completions"): Dialect(_text_json, _text_events),
    ("POST", "/embeddings"): Dialect(_embeddings_json),
    ("POST", "/responses"): Dialect(_response_json, _response_events, _response_failure),
    ("POST", "/messages"): Dialect(_message_json, _message_events, _message_failure, anthropic=True),
    ("GET", "/models"): Dialect(_models_json),
}


# -- the wire


class _CloseDelimited(web.StreamResponse):
    """A body that ends with its connection: what aiohttp itself does before a WebSocket's frames."""

    _length_check = False


def _broken(event: bytes) -> bytes:
    """The event, or the whole body, with half of its JSON."""
    head, mark, data = event.rpartition(b"data: ")
    half = head + mark + data[: len(data) // 2].rstrip(b"\n")
    return half + b"\n\n" if mark else half


def _dressed(events: Iterable[bytes], behaviour: Behaviour) -> Iterator[bytes]:
    for number, event in enumerate(events, 1):
        dressed = _broken(event) if number == behaviour.bad_json else event
        yield dressed.replace(b"\n", b"\r\n") if behaviour.crlf else dressed


class _Exchange:
    """One request and the wire that its answer goes out on."""

    __slots__ = ("behaviour", "dialect", "headers", "id", "request")

    def __init__(self, request: web.Request, dialect: Dialect, behaviour: Behaviour, rid: str) -> None:
        self.request = request
        self.dialect = dialect
        self.behaviour = behaviour
        self.id = rid
        self.headers = {"x-request-id": rid, hdrs.SERVER: "mock"}
        if dialect.anthropic:
            self.headers["request-id"] = rid
        if behaviour.big_header:
            self.headers["x-mock-big"] = "x" * behaviour.big_header

    async def answer(self, body: bytes) -> web.StreamResponse:
        """What the behaviour says, in the order in which a real server would go wrong."""
        behaviour = self.behaviour
        if behaviour.hang:
            await self._silence()
        if behaviour.ttfb:
            await asyncio.sleep(behaviour.ttfb)
        if behaviour.garbage or behaviour.upgrade or -1 in (behaviour.cut_after, behaviour.rst_after):
            return await self._no_http()
        if behaviour.redirect:
            self.headers[hdrs.LOCATION] = REDIRECT
            return await self.json(302, {})
        if behaviour.status != 200:
            if behaviour.retry_after is not None:
                self.headers[hdrs.RETRY_AFTER] = f"{behaviour.retry_after:.15g}"
            return await self.error(behaviour.status, f"status {behaviour.status} was asked for")
        if behaviour.error_body:
            return await self.json(200, _error(self.dialect.anthropic, 500, _FAILURE))
        try:
            asked = _decode(body) if self.request.method == "POST" else _NO_BODY
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return await self.error(400, f"the body is not a request: {error}")
        ask = Ask(self.id, asked, behaviour)
        if asked.stream and self.dialect.events is not None and not behaviour.plain_json:
            return await self._stream(self.dialect.events(ask))
        return await self.json(200, self.dialect.json(ask))

    async def error(self, status: int, message: str) -> web.StreamResponse:
        return await self.json(status, _error(self.dialect.anthropic, status, message))

    async def json(self, status: int, value: dict[str, Any]) -> web.StreamResponse:
        """An answer of one piece."""
        body = _encode(value)
        if self.behaviour.bad_json == 1:
            body = _broken(body)
        self.headers[hdrs.CONTENT_TYPE] = "application/json"
        if self.behaviour.plain_body():
            whole = web.Response(status=status, headers=self.headers, body=body)
            await whole.prepare(self.request)
            await whole.write_eof()
            return whole
        response = self._open(status)
        if not self.behaviour.close_delimited:
            response.content_length = len(body)
        await response.prepare(self.request)
        return await self._send(response, (body,), None)

    async def _stream(self, events: Iterator[bytes]) -> web.StreamResponse:
        behaviour = self.behaviour
        self.headers[hdrs.CONTENT_TYPE] = "text/event-stream; charset=utf-8"
        self.headers[hdrs.CACHE_CONTROL] = "no-cache"
        response = self._open(200)
        await response.prepare(self.request)
        for _ in range(behaviour.keepalive_comments):
            await self._write(response, COMMENT.replace(b"\n", b"\r\n") if behaviour.crlf else COMMENT)
            await asyncio.sleep(behaviour.gap)
        if behaviour.crlf or behaviour.bad_json:
            events = _dressed(events, behaviour)
        return await self._send(response, events, self.dialect.failure)

    def _open(self, status: int) -> web.StreamResponse:
        if not self.behaviour.close_delimited:
            return web.StreamResponse(status=status, headers=self.headers)
        response = _CloseDelimited(status=status, headers=self.headers)
        response.force_close()
        return response

    async def _send(
        self,
        response: web.StreamResponse,
        events: Iterable[bytes],
        failure: Callable[[int], bytes] | None,
    ) -> web.StreamResponse:
        """The events, up to the point where the body is to go wrong."""
        gap = self.behaviour.gap
        stop, fault = self.behaviour.first_fault(failure is not None) or (-1, None)
        number = 0
        event = b""
        for event in events:
            if number == stop:
                break
            if number:
                await asyncio.sleep(gap)  # 0 too: it lets the loop flush, so that events are not merged
            await self._write(response, event)
            number += 1
        else:
            event = b""
        if fault is None or number != stop:
            await asyncio.sleep(self.behaviour.linger)
        elif not await self._go_wrong(response, fault, event):
            return response
        elif failure is not None:
            await self._write(response, self._line_ends(failure(number)))
        await response.write_eof()
        return response

    def _line_ends(self, event: bytes) -> bytes:
        return event.replace(b"\n", b"\r\n") if self.behaviour.crlf else event

    async def _go_wrong(self, response: web.StreamResponse, fault: Fault, event: bytes) -> bool:
        """Fail; true if the body is to end properly all the same."""
        if fault == "error":
            return True
        if fault == "stall":
            await self._silence()
        if self.behaviour.cut_mid_event and event:
            await response.write(event[: len(event) // 2])
        await self._drop(reset=fault == "rst")
        return False

    async def _write(self, response: web.StreamResponse, event: bytes) -> None:
        behaviour = self.behaviour
        if behaviour.one_byte:
            for at in range(len(event)):
                await response.write(event[at : at + 1])
                await asyncio.sleep(0)
        elif behaviour.half_events:
            half = len(event) // 2
            await response.write(event[:half])
            await asyncio.sleep(HALF_PAUSE)
            await response.write(event[half:])
        else:
            await response.write(event)

    async def _no_http(self) -> web.StreamResponse:
        """Bytes that are not an answer, or none at all."""
        transport = self._transport()
        if self.behaviour.upgrade:
            transport.write(UPGRADE)
            await self._silence()
        if self.behaviour.garbage:
            transport.write(GARBAGE)
        await self._drop(reset=self.behaviour.rst_after == -1)
        return web.Response()  # aiohttp wants one; the connection that would carry it is closed

    async def _silence(self) -> None:
        """Until the caller leaves: the runner cancels the handler then."""
        await asyncio.get_running_loop().create_future()

    async def _drop(self, reset: bool) -> None:
        """End the connection; nothing may be awaited after it, the handler would be taken for aborted."""
        transport = self._transport()
        if not reset:
            transport.close()
            return
        sock = transport.get_extra_info("socket")
        try:
            async with asyncio.timeout(FLUSH):
                await self._flush(transport, sock.fileno())
        except TimeoutError:
            pass  # a caller that does not read gets its reset all the same
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        transport.abort()

    async def _flush(self, transport: asyncio.WriteTransport, fd: int) -> None:
        """Until the other side's kernel has it all: a reset throws away what is still queued on this one."""
        transport.set_write_buffer_limits(high=0)
        await self.request.writer.drain()
        while struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def _transport(self) -> asyncio.WriteTransport:
        transport = self.request.transport
        if transport is None:
            raise ConnectionResetError("the caller left")
        return transport


# -- the server


class _Mock:
    """The handler of every request."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.record = Record()
        self._ids = itertools.count(1)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        record = self.record
        seen = Seen(request.method, request.raw_path, list(request.raw_headers))
        record.hits += 1
        record.active += 1
        record.requests.append(seen)
        try:
            seen.body = await request.read()
            response = await self._answer(request, seen.body)
        except asyncio.CancelledError:
            record.aborted += 1
            raise
        except ConnectionError:  # a write to somebody who has just left: nothing that a log needs
            record.aborted += 1
            return web.Response(status=499)
        else:
            record.completed += 1
            return response
        finally:
            record.active -= 1

    async def _answer(self, request: web.Request, body: bytes) -> web.StreamResponse:
        rid = f"mock-{next(self._ids):08x}"
        dialect = ROUTES.get((request.method, request.path.removeprefix("/v1")))
        if dialect is None:
            unknown = _Exchange(request, Dialect(_models_json), NORMAL, rid)
            return await unknown.error(404, f"no route for {request.method} {request.path}")
        header = ",".join(request.headers.getall("x-mock", ()))
        try:
            behaviour = override(self.behaviour, header) if header else self.behaviour
        except msgspec.ValidationError as error:
            return await _Exchange(request, dialect, NORMAL, rid).error(400, f"x-mock: {error}")
        return await _Exchange(request, dialect, behaviour, rid).answer(body)


class RunningMock:
    """A mock that listens."""

    def __init__(self, mock: _Mock, runner: web.AppRunner, host: str, tls: bool) -> None:
        self._mock = mock
        self._runner = runner
        self.record = mock.record
        self.port: int = runner.addresses[0][1]
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{name}:{self.port}/v1"

    @property
    def behaviour(self) -> Behaviour:
        """What requests without `x-mock` get; may be replaced while the mock runs."""
        return self._mock.behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        self._mock.behaviour = behaviour

    async def close(self) -> None:
        """Stop listening and drop every connection; requests that hang count as aborted."""
        await self._runner.cleanup()


def make_app(behaviour: Behaviour = NORMAL) -> web.Application:
    """The mock as an application, for a runner of your own (with `handler_cancellation=True`)."""
    return _make_app(_Mock(behaviour))


def _make_app(mock: _Mock) -> web.Application:
    app = web.Application(client_max_size=0)  # 0: no limit
    app[RECORD] = mock.record
    app.router.add_route("*", "/{path:.*}", mock.handle)
    return app


async def start(
    host: str = "127.0.0.1",
    port: int = 0,
    behaviour: Behaviour = NORMAL,
    ssl_context: ssl.SSLContext | None = None,
) -> RunningMock:
    """Listen, on a free port unless told which."""
    mock = _Mock(behaviour)
    runner = web.AppRunner(
        _make_app(mock),
        handler_cancellation=True,  # else a caller that leaves is noticed at the next write only
        access_log=None,
        shutdown_timeout=SHUTDOWN,
        max_line_size=LIMIT,
        max_field_size=LIMIT,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=ssl_context, backlog=4096).start()
    except BaseException:
        await runner.cleanup()
        raise
    return RunningMock(mock, runner, host, ssl_context is not None)
