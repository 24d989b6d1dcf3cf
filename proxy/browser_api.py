"""The API for web pages: what a page may ask, and the two shapes in which it may want the answer.

The page holds no key, so nothing that it sends goes to the model unread: the chat request is made here, from
the fields that are known, with the configured model and at most the configured number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from proxy import schema
from proxy.errors import BadRequest, ModelNotAllowed, Refused, UpstreamInvalid
from proxy.peek import Peek, peek
from proxy.reshape import Reshape
from proxy.sse_events import EventReader, UnreadableError, data_of

_DONE = b"data: [DONE]\n\n"
_NAMED_ERROR = re.compile(rb"(?:\A|[\r\n])event: ?error[\r\n]")
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def check_origin(sent: Sequence[str], hosts: Sequence[str], listed: Sequence[str]) -> None:
    """sent: the request's Origin fields; hosts: its Host fields. Raises Refused 403.

    A request without an Origin comes from no page of another site: browsers send one with every POST.
    """
    if not sent or (len(sent) == 1 and (sent[0] in listed or _is_same(sent[0], hosts))):
        return
    raise Refused(403, close=False)


def _is_same(origin: str, hosts: Sequence[str]) -> bool:
    """The scheme is not compared: behind a TLS proxy it is not known here."""
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        return False
    return bool(host) and [each.lower() for each in hosts] == [host.lower()]


# ── the question ─────────────────────────────────────────────────────────────────────────────────────────


class _Message(msgspec.Struct, omit_defaults=True):
    """One message; its content's parts are the model's to judge."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: str | list[msgspec.Raw]
    name: str | None = None
    tool_call_id: str | None = None


class _Page(msgspec.Struct):
    """What a page may say; other fields are ignored."""

    messages: Annotated[list[_Message], Meta(min_length=1)]
    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None


class _Chat(msgspec.Struct):
    """What the model is asked."""

    model: str
    messages: list[_Message]
    stream: bool
    temperature: float
    max_tokens: int


class Question(msgspec.Struct, frozen=True):
    """A chat request of our own making, and what is to become of its answer."""

    body: bytes
    asked: Peek
    reshape: Reshape | None


class _Unread(msgspec.Struct):
    """How many messages there are, without reading them."""

    messages: list[msgspec.Raw]


_page = msgspec.json.Decoder(_Page)
_unread = msgspec.json.Decoder(_Unread)
#: Reading a million messages takes half a second, on the event loop, and anybody may send them.
_MOST_MESSAGES = 10_000
#: Fewer bytes cannot hold many more of them.
_LARGE_BYTES = 2**19
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_PATH = re.compile(r" - at `\$\.?([^`]*)`\Z")
#: What is wrong with a value, by the last name of its path.
_WRONG = {
    "messages": "is not a list with at least one message",
    "role": "is not one of system, user, assistant, developer and tool",
    "content": "is neither a string nor a list",
    "temperature": "is not a number from 0 to 2",
    "max_tokens": "is not a whole number above 0",
}


def question(api: schema.BrowserApi, body: bytes, *, stream: bool, content_only: bool = False) -> Question:
    """Reads a page's body. Raises BadRequest, which names the field, and ModelNotAllowed."""
    try:
        if len(body) > _LARGE_BYTES and len(_unread.decode(body).messages) > _MOST_MESSAGES:
            message = f"messages has more than {_MOST_MESSAGES} entries"
            raise BadRequest("invalid_messages", message, param="messages")
        page = _page.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong(str(error)) from None
    except _MALFORMED:
        raise BadRequest("invalid_json", "The request body is not valid JSON.") from None
    if page.model not in (None, api.model):
        raise ModelNotAllowed
    chat = _Chat(
        model=api.model,
        messages=page.messages,
        stream=stream,
        temperature=api.temperature if page.temperature is None else page.temperature,
        max_tokens=min(page.max_tokens or api.max_tokens, api.max_tokens),
    )
    made = msgspec.json.encode(chat)
    return Question(made, peek(made), _reshape(stream=stream, content_only=content_only))


def wants_content(formats: Sequence[str]) -> bool:
    """`?format=content`, or nothing. Raises BadRequest."""
    if formats in ([], ["content"]):
        return bool(formats)
    raise BadRequest("bad_request", "The only format that can be asked for is 'content'.", param="format")


def _reshape(*, stream: bool, content_only: bool) -> Reshape | None:
    if not stream:
        return Reshape(rewrite=content_and_usage)
    return Reshape(transform=ContentOnly()) if content_only else None


def _wrong(text: str) -> BadRequest:
    """msgspec ends its texts with the path: `$.messages[1].content`, or `$.messages[1]` and the member that
    is missing there. Nothing else of a text is used, because it may quote the body."""
    found, missing = _PATH.search(text), _MISSING.match(text)
    path = found[1] if found else ""
    if missing:
        path = f"{path}.{missing[1]}".lstrip(".")
        return BadRequest(_code(path), f"{path} is missing", param=path)
    if not path:
        return BadRequest("invalid_json", "The request body has to be a JSON object.")
    wrong = _WRONG.get(
        path.rpartition(".")[2], "is not an object" if path.endswith("]") else "is not a string"
    )
    return BadRequest(_code(path), f"{path} {wrong}", param=path)


def _code(path: str) -> str:
    return "invalid_messages" if path.startswith("messages") else "bad_request"


# ── the answer ───────────────────────────────────────────────────────────────────────────────────────────


class _Said(msgspec.Struct):
    content: Any = None


class _Choice(msgspec.Struct):
    delta: _Said | None = None
    message: _Said | None = None


class _Answer(msgspec.Struct):
    """A whole answer or a chunk of a stream."""

    choices: list[_Choice] | None = None
    usage: msgspec.Raw = msgspec.Raw(b"null")
    error: Any = None
    type: Any = None
    object: Any = None


_answer = msgspec.json.Decoder(_Answer)


def content_and_usage(status: int, body: bytes) -> bytes:
    """`{"content": …, "usage": …}` of a whole chat completion; errors stay as they are. Raises
    UpstreamInvalid."""
    if status >= 300:
        return body
    try:
        answer = _answer.decode(body)
    except _MALFORMED:
        raise UpstreamInvalid from None
    if not answer.choices or answer.choices[0].message is None:
        raise UpstreamInvalid
    return msgspec.json.encode(
        {"content": _text_of(answer.choices[0].message), "usage": answer.usage},
    )


def _text_of(said: _Said | None) -> str:
    """Some models (Mistral's that reason) give a list of parts; only its text is content."""
    content = None if said is None else said.content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _chunk_of(data: bytes) -> _Answer:
    try:
        return _answer.decode(data)
    except _MALFORMED:
        raise UnreadableError from None


class ContentOnly:
    """Chunks of a chat completion become `data: {"content": "…"}`; `[DONE]` and errors stay (a Transform)."""

    __slots__ = ("_events", "_over")

    def __init__(self) -> None:
        self._events = EventReader()
        self._over = False  # [DONE] or an error has passed

    def feed(self, data: bytes) -> bytes:
        return b"".join([self._shaped(event) for event in self._events.feed(data)])

    def flush(self) -> bytes:
        """The last event may lack its blank line, and not every provider sends [DONE]."""
        try:
            last = self._shaped(self._events.rest())
        except UnreadableError:
            last = b""
        return last if self._over else last + _DONE

    def held(self) -> bytes:
        return b""  # half an event says nothing

    def at_boundary(self) -> bool:
        return True  # only whole events are given

    def _shaped(self, event: bytes) -> bytes:
        data = data_of(event)
        if self._over or not data:
            return b""
        if data.strip() == b"[DONE]":
            self._over = True
            return _DONE
        chunk = None if _NAMED_ERROR.search(event) else _chunk_of(data)
        if chunk is None or chunk.error or "error" in (chunk.type, chunk.object):
            self._over = True
            return event + b"\n\n"
        text = _text_of(chunk.choices[0].delta) if chunk.choices else ""
        return b'data: {"content": %b}\n\n' % msgspec.json.encode(text) if text else b""
