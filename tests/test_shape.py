"""Events that differ in their text alone pass the scanner unseen: nothing that is asked of it may change."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import wire, wire_connection
from proxy.chunked import framed
from proxy.context import Context
from proxy.errors import Dialect
from proxy.metrics import GAPS
from proxy.pipe import Clocks, Pipe
from proxy.sse import Scanner
from proxy.usage import Usage

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Transport(asyncio.Transport):
    """A caller's connection that takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class Heard:
    """What is known of a stream at its end. shaped: how many of its reads the scanner has not seen."""

    def __init__(self, ctx: Context, pipe: Pipe, scanner: Scanner, sent: bytes) -> None:
        self.sent = sent
        self.shaped = pipe.writes - pipe._looks
        self.told = (
            ctx.first_token_at is not None,
            ctx.chunks,
            ctx.bytes_out,
            pipe.verdict(),
            pipe.takes_event(),
            scanner.terminated,
            scanner.in_band_error(),
            scanner.usage(),
        )
        self.estimate: Usage = scanner.estimate(7)


async def heard(reads: list[bytes], dialect: Dialect, *, parsed: bool) -> Heard:
    """parsed: each read goes through the parser, and then the scanner sees all of them."""
    loop = asyncio.get_running_loop()
    connection = wire_connection.WireConnection(loop)
    exchange = wire.WireExchange(None, b"", b"")  # type: ignore[arg-type] # no pool
    exchange._protocol = connection
    connection.begin(exchange)
    connection.data_received(HEAD)
    transport = Transport()
    caller, answer = SimpleNamespace(transport=transport), SimpleNamespace(write=None, chunked=True)
    ctx, scanner = Context("id", None, "/", 0.0), Scanner(dialect, expects_terminator=True)
    clocks = Clocks(60.0, loop.time() + 60.0, 60.0, 60.0, [0.0] * (len(GAPS) + 2))
    pipe = Pipe(ctx, caller, answer, None, scanner, clocks)  # type: ignore[arg-type] # all that it asks of them
    run = asyncio.ensure_future(pipe.run(exchange))
    await asyncio.sleep(0)  # its first step
    receive = connection._parse if parsed else connection.data_received
    for read in [*reads, b"0\r\n\r\n"]:
        receive(read)
    await run
    return Heard(ctx, pipe, scanner, transport.sent)


def both(events: list[bytes], dialect: Dialect) -> Heard:
    """The same events, a chunk each, as they are taken and with all of them seen."""
    reads = list(map(framed, events))
    taken = asyncio.run(heard(reads, dialect, parsed=False))
    seen = asyncio.run(heard(reads, dialect, parsed=True))
    assert seen.shaped == 0
    assert taken.sent == seen.sent == b"".join(reads)
    assert taken.told == seen.told
    return taken


def delta(text: bytes, finish: bytes = b"null", more: bytes = b"") -> bytes:
    return (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":['
        b'{"index":0,"delta":{"content":"' + text + b'"},"finish_reason":' + finish + b"}]" + more + b"}\n\n"
    )


def block(text: bytes) -> bytes:
    return (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"' + text + b'"}}\n\n'
    )


DONE = b"data: [DONE]\n\n"
_texts = st.sampled_from(
    [
        b"a",
        b" word",
        b"",
        b"\\n",
        b'\\"',
        b"[DONE]",
        b"error",
        b"usage",
        b"x" * 900,
        b"{",
        "é".encode(),
        b"a\n\nb",
    ]
)
_openai = st.one_of(
    _texts.map(delta),
    st.sampled_from(
        [
            delta(b"end", b'"stop"'),
            delta(b"", b'"length"'),
            delta(b"e", b'"error"'),
            delta(b"", more=b',"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}'),
            delta(b"t", more=b',"usage":null'),
            b": comment\n\n",
            b'data: {"error":{"message":"no"}}\n\n',
            b'event: error\ndata: {"a":1}\n\n',
            delta(b"half")[:-1],
            delta(b"half")[:-9],
            b"\n",
            DONE,
        ]
    ),
)
_anthropic = st.one_of(
    _texts.map(block),
    st.sampled_from(
        [
            b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":9}}\n\n',
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
            block(b"half")[:-1],
        ]
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_openai, max_size=12))
def test_openai(events: list[bytes]) -> None:
    both([delta(b"first"), *events], Dialect.OPENAI)


@settings(max_examples=100, deadline=None)
@given(st.lists(_anthropic, max_size=12))
def test_anthropic(events: list[bytes]) -> None:
    both([block(b"first"), *events], Dialect.ANTHROPIC)


def test_most_events_pass_unseen() -> None:
    texts = [b"word %d" % number for number in range(100)]
    taken = both([*map(delta, texts), delta(b"", b'"stop"'), DONE], Dialect.OPENAI)
    assert (
        taken.shaped == 98
    )  # the first token, the event that shows the shape; then all but the two at the end


def test_what_is_no_text_is_seen() -> None:
    """A quote ends the text: what follows it may be anything."""
    sly = delta(b'a"},"finish_reason":"error"},{"delta":{"content":"b')
    taken = both([*map(delta, (b"a", b"b", b"c")), sly, DONE], Dialect.OPENAI)
    assert taken.told[6], "the error was seen"
    assert taken.shaped == 1


def test_what_stands_before_the_text_is_seen() -> None:
    plain = b'"object":"chat.completion.chunk"'
    other = b'"finish_reason":"error","a":"b"'.ljust(len(plain))
    sly = delta(b"d").replace(plain, other)
    assert len(sly) == len(delta(b"d"))
    taken = both([*map(delta, (b"a", b"b", b"c")), sly, DONE], Dialect.OPENAI)
    assert taken.told[6], "the error was seen"


def test_what_is_shorter_than_its_frame_is_seen() -> None:
    """The quote that begins a text is not the one that ends it."""
    short = delta(b"").replace(b'"content":""', b'"content":"')
    taken = both([*map(delta, (b"a", b"b", b"c")), short, DONE], Dialect.OPENAI)
    assert taken.shaped == 1
