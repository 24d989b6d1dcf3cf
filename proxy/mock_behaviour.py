"""How the mock upstream answers: one field a fault, for the whole server or for one request."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Cut = Annotated[int, msgspec.Meta(ge=-1)]
Fault = Literal["stall", "error", "cut", "rst"]
ProviderName = Literal[
    "openai", "anthropic", "gemini", "deepseek", "azure", "vllm", "llamacpp", "ollama", "openrouter"
]


class Behaviour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a request is answered; the defaults are a fast and healthy upstream."""

    provider: ProviderName = "openai"  # whose quirks are imitated
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
    error_after: Count | None = None  # an error event, then what the provider does; OpenAI: a proper end
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
    keepalive_comments: Count | None = None  # comments (or blank lines) before an answer; else the provider's
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
