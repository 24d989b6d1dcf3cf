"""The scanner: what it says of a stream does not depend on how the bytes were cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import Dialect
from proxy.sse import Scanner

OPENAI, ANTHROPIC, RESPONSES = Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.RESPONSES
Answers = tuple[bool, bool, bool, bool, bool, bool]


def after(dialect: Dialect, pieces: Sequence[bytes], *, expects: bool = True) -> Answers:
    """terminated, first_token, at_boundary, succeeded framed and not, in_band_error."""
    scanner = Scanner(dialect, expects_terminator=expects)
    for piece in pieces:
        scanner.feed(piece)
    return (
        scanner.terminated,
        scanner.first_token,
        scanner.at_boundary(),
        scanner.succeeded(framed=True),
        scanner.succeeded(framed=False),
        scanner.in_band_error(),
    )


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Pieces of these sizes, over and over."""
    pieces, at, number = [], 0, 0
    while at < len(data):
        pieces.append(data[at : at + sizes[number % len(sizes)]])
        at += sizes[number % len(sizes)]
        number += 1
    return pieces


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────

CONTENT = b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":null}]}'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
FINISH = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}'
USAGE = b'data: {"choices":[],"usage":{"total_tokens":3}}'
DONE = b"data: [DONE]"
DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"Hi"}}'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}'
TEXT = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hi"}'
COMPLETED = b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{}}}'


def events(*parts: bytes, end: bytes = b"\n") -> bytes:
    return b"".join(part.replace(b"\n", end) + end + end for part in parts)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(
    ("dialect", "parts", "terminated", "framed", "bare"),
    [
        (OPENAI, (CONTENT, DONE), True, True, True),
        (OPENAI, (CONTENT, FINISH, USAGE, DONE), True, True, True),
        (OPENAI, (CONTENT, FINISH), False, True, False),
        (OPENAI, (CONTENT, FINISH, USAGE), False, True, False),
        (OPENAI, (CONTENT,), False, False, False),
        (OPENAI, (ROLE,), False, False, False),
        (OPENAI, (b"data:[DONE]",), True, True, True),
        (OPENAI, (b": data: [DONE]",), False, False, False),
        (OPENAI, (b'data: {"content":"[DONE]"}',), False, False, False),
        (OPENAI, (b'data: {"content":"\\ndata: [DONE]"}',), False, False, False),
        (OPENAI, (b'data: {"content":"\\"finish_reason\\":\\"stop\\""}',), False, False, False),
        (ANTHROPIC, (DELTA, STOP), True, True, True),
        (ANTHROPIC, (b'data: {"type":"message_stop"}',), True, True, True),
        (ANTHROPIC, (b'data: {"type": "message_stop"}',), True, True, True),
        (ANTHROPIC, (DELTA,), False, False, False),
        (ANTHROPIC, (b'data: {"delta":{"text":"event: message_stop"}}',), False, False, False),
        (ANTHROPIC, (DONE,), False, False, False),
        (RESPONSES, (TEXT, COMPLETED), True, True, True),
        (RESPONSES, (COMPLETED.replace(b"completed", b"failed"),), True, True, True),
        (RESPONSES, (COMPLETED.replace(b"completed", b"incomplete"),), True, True, True),
        (RESPONSES, (TEXT,), False, False, False),
        (RESPONSES, (TEXT.replace(b"Hi", b"response.completed"),), False, False, False),
    ],
)
def test_terminators(
    dialect: Dialect, parts: tuple[bytes, ...], terminated: bool, framed: bool, bare: bool, end: bytes
) -> None:
    """Each dialect's terminator, with every line end; text that talks about one is none."""
    answers = after(dialect, [events(*parts, end=end)])
    assert answers[0] == terminated
    assert answers[2] is True
    assert answers[3:5] == (framed, bare)


@pytest.mark.parametrize(
    ("dialect", "stream", "terminated", "bare"),
    [
        (OPENAI, DONE, True, True),
        (OPENAI, DONE + b"\n", True, True),
        (OPENAI, b"data: [DON", False, False),
        (ANTHROPIC, b"event: message_stop\n", False, False),
        (ANTHROPIC, STOP, False, True),
        (ANTHROPIC, STOP + b"\n", False, True),
        (ANTHROPIC, STOP[:-5], False, False),
        (RESPONSES, COMPLETED, False, True),
        (RESPONSES, COMPLETED[:-1], False, False),
        (RESPONSES, COMPLETED + b"\n\n", True, True),
    ],
)
def test_terminators_that_lack_something(
    dialect: Dialect, stream: bytes, terminated: bool, bare: bool
) -> None:
    """[DONE] needs no blank line; the other two are events with data, which has to be whole."""
    answers = after(dialect, [stream])
    assert (answers[0], answers[4]) == (terminated, bare)


@pytest.mark.parametrize(
    ("stream", "boundary"),
    [
        (b"", True),
        (b"data: a", False),
        (b"data: a\n", False),
        (b"data: a\n\n", True),
        (b"data: a\r\n", False),
        (b"data: a\r\n\r", False),  # half of the last CRLF
        (b"data: a\r\n\r\n", True),
        (b"data: a\r", False),
        (b"data: a\r\r", True),
        (b"data: a\n\n: comment\n", False),
        (b"data: a\n\n\n", True),
        (b"data: a\n\nd", False),
    ],
)
def test_boundaries(stream: bytes, boundary: bool) -> None:
    """Between two events, and nowhere else."""
    assert after(OPENAI, [stream])[2] == boundary


@pytest.mark.parametrize(
    ("dialect", "event", "first"),
    [
        (OPENAI, ROLE, False),
        (OPENAI, CONTENT, True),
        (OPENAI, FINISH, False),
        (OPENAI, USAGE, False),
        (OPENAI, b'data: {"choices":[{"delta":{"reasoning_content":"x"}}]}', True),
        (OPENAI, b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}', True),
        (OPENAI, b'data: {"choices":[{"text": "x"}]}', True),
        (ANTHROPIC, DELTA, True),
        (ANTHROPIC, b'event: message_start\ndata: {"type":"message_start","message":{"content":[]}}', False),
        (ANTHROPIC, b'data: {"type":"content_block_start","content_block":{"type":"tool_use"}}', True),
        (RESPONSES, TEXT, True),
        (RESPONSES, b'event: response.created\ndata: {"type":"response.created","response":{}}', False),
        (OPENAI, b': data: {"choices":[{"delta":{"content":"x"}}]}', False),
        (OPENAI, b'data: {"choices":[{"delta":{"content":null,"tool_calls":[]}}]}', False),
        (OPENAI, b'data: {"choices":[{"delta":{"content":"","refusal":"No"}}]}', True),
        (ANTHROPIC, b'data: {"content_block":{"type":"server_tool_use","id":"t"}}', True),
        (ANTHROPIC, b'data: {"content_block":{"type":"text","text":""}}', False),
        (RESPONSES, b'data: {"type":"response.created","response":{"instructions":[{"text":"x"}]}}', False),
        (RESPONSES, b'data: {"type": "response.in_progress","response":{"metadata":{"text":"x"}}}', False),
        (RESPONSES, b'data: {"type":"response.output_item.added","item":{"type":"function_call"}}', True),
        (RESPONSES, b'data: {"type":"response.output_item.added","item":{"type":"message"}}', False),
    ],
)
def test_first_tokens(dialect: Dialect, event: bytes, first: bool) -> None:
    """Something worth showing: text, thoughts, a tool call; not a role or a count."""
    assert after(dialect, [events(event)])[1] == first


@pytest.mark.parametrize("size", [1, 700, 10**6])
@pytest.mark.parametrize(
    "opening",
    [
        b'data: {"type":"response.created","response":{"instructions":[{"text":"' + b"x" * 9000 + b'"},%b]}}',
        b": %b" + b"x" * 9000 + b"%b",
    ],
    ids=["prelude", "comment"],
)
def test_no_first_token_in_what_is_not_the_answer(opening: bytes, size: int) -> None:
    """A request that is repeated, or a comment, however long it is; the answer's own first event is one."""
    said = b'{"text":"said"}'
    stream = events(opening.replace(b"%b", said))
    scanner = Scanner(RESPONSES, expects_terminator=True)
    for piece in cut(stream, [size]):
        scanner.feed(piece)
    assert not scanner.first_token
    assert scanner.feed(events(TEXT))
    assert scanner.first_token


@pytest.mark.parametrize("dialect", [ANTHROPIC, RESPONSES])
def test_a_large_last_event_in_small_reads(dialect: Dialect) -> None:
    """The end of its event is looked for in what is new: 100 KB byte by byte are no square."""
    last = {ANTHROPIC: STOP, RESPONSES: COMPLETED}[dialect][:-1] + b',"x":"' + b"y" * 100_000 + b'"}'
    scanner = Scanner(dialect, expects_terminator=True)
    for piece in cut(last + b"\r\n\r", [1]):
        scanner.feed(piece)
    assert not scanner.terminated
    scanner.feed(b"\n")
    assert scanner.terminated


@pytest.mark.parametrize(
    ("stream", "is_error"),
    [
        (b'data: {"error":{"message":"x"}}', True),
        (b'data: {"error": {"message":"x"}}', True),
        (b'data: {"error":"x"}', True),
        (b'event: error\ndata: {"type":"error","error":{}}', True),
        (b'data: {"object":"error","message":"x"}', True),
        (b'data: {"error": {"object": "error", "message": "x", "code": 400}}\n\ndata: [DONE]', True),  # vLLM
        (
            b'{\n  "error": {\n    "code": 503,\n    "status": "UNAVAILABLE"\n  }\n}\n',
            False,
        ),  # Gemini: no event
        (b'error: {"code":400,"message":"x"}\n\ndata: [DONE]', True),  # llama.cpp until 2025
        (
            b'data: {"id":"gen-1","provider":"x","error":{"code":502,"message":"x"},'
            b'"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}',
            True,
        ),  # OpenRouter
        (b'data: {"choices":[{"delta":{"content":"\\"finish_reason\\":\\"error\\""}}]}', False),
        (b': {"finish_reason":"error"}', False),
        (b': {"finish_reason":"error"}\n\ndata: {"finish_reason": "error"}', True),
        (b'data: {"choices":[{"finish_reason":"stop","native_finish_reason":"error"}]}', False),
        (b'data: {"id":"r","error":null}', False),
        (b'data: {"error":null}', False),
        (b'data: {"content":"data: {\\"error\\":{}}"}', False),
        (CONTENT, False),
    ],
)
def test_errors_inside_the_stream(stream: bytes, is_error: bool) -> None:
    """What the providers' error events look like, and what only resembles them."""
    assert after(OPENAI, [events(CONTENT, stream)])[5] == is_error


def test_routes_without_a_terminator() -> None:
    """There the framing alone decides, and nothing ends the stream early."""
    answers = after(OPENAI, [events(CONTENT, DONE)], expects=False)
    assert answers[0] is False
    assert answers[3:5] == (True, False)
    assert after(OPENAI, [events(CONTENT)], expects=False)[3] is True


def test_the_start_of_the_tail_is_no_line_start() -> None:
    """What is kept of a long event may begin anywhere: text that talks about [DONE] stays text."""
    scanner = Scanner(OPENAI, expects_terminator=True)
    scanner.feed(b'data: {"content":"' + b"y" * 3000)
    scanner.feed(b"data: [DONE]".ljust(2048, b"z"))
    scanner.feed(b' [DONE]"}')
    assert not scanner.terminated
    assert not scanner.succeeded(framed=True)


# ── the cuts ─────────────────────────────────────────────────────────────────────────────────────────────

PARTS = st.one_of(
    st.sampled_from([CONTENT, ROLE, FINISH, USAGE, DONE, DELTA, STOP, TEXT, COMPLETED]),
    st.sampled_from(
        [
            b'data: {"error":{"message":"x"}}',
            b'event: error\ndata: {"type":"error"}',
            b'data: {"content":"[DONE] message_stop response.completed"}',
            b": comment",
            b"id: 1",
            b"data: [DON",
            b"",
        ]
    ),
    st.integers(0, 6000).map(
        lambda size: b'data: {"choices":[{"delta":{"content":"' + b"y" * size + b'"}}]}'
    ),
    st.integers(0, 6000).map(lambda size: b": " + b"z" * size),
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Events of all dialects in any order, perhaps with half a line end at the end."""
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    stream = events(*draw(st.lists(PARTS, max_size=6)), end=end)
    return stream[: len(stream) - draw(st.integers(0, 6))] if stream else stream


SIZES = st.lists(st.one_of(st.just(1), st.integers(1, 30), st.integers(1, 9000)), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(stream=streams(), sizes=SIZES, dialect=st.sampled_from(Dialect), expects=st.booleans())
def test_cuts_change_nothing(stream: bytes, sizes: list[int], dialect: Dialect, expects: bool) -> None:
    """In one piece, cut anyhow, or byte by byte: the same answers."""
    whole = after(dialect, [stream], expects=expects)
    assert after(dialect, cut(stream, sizes), expects=expects) == whole
    assert after(dialect, cut(stream, [1]), expects=expects) == whole
