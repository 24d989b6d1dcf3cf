"""What an SDK must see through Headrace, and what Headrace must say about it: the rows of the matrix.

The first line of each docstring is the row's title in the README. `seen` is what the driver printed, `lines`
are the request's log lines as (status, reason, attempts), in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from proxy import mock
from tests.sdk import provider

Seen = dict[str, Any]
Line = tuple[int, str, int]
Case = Callable[[Seen, Sequence[Line]], None]

WORDS = 20
FINE: Line = (200, "complete", 1)
OURS: Line = (200, "complete", 0)
REJECTED = "rejected"


def _text(words: int) -> str:
    return " ".join(mock.WORDS[number % len(mock.WORDS)] for number in range(words))


def whole(seen: Seen, lines: Sequence[Line]) -> None:
    """Whole answers"""
    assert seen["text"] == _text(WORDS)
    assert seen["finish"] in ("stop", "end_turn")
    assert seen["usage"] == [3, WORDS]
    assert seen["request_id"] == seen["own_id"]
    assert lines == [FINE]


def stream(seen: Seen, lines: Sequence[Line]) -> None:
    """Streams"""
    assert seen["text"] == _text(WORDS)
    assert seen["finish"] in ("stop", "end_turn")
    assert lines == [FINE]


def lingers(seen: Seen, lines: Sequence[Line]) -> None:
    """Leaving at the terminator counts as complete

    The end of a real provider's stream comes a moment after `[DONE]`; several SDKs do not wait for it.
    """
    stream(seen, lines)


def usage(seen: Seen, lines: Sequence[Line]) -> None:
    """Usage of a stream"""
    assert seen["usage"] == [3, WORDS]
    assert lines == [FINE]


def tools(seen: Seen, lines: Sequence[Line]) -> None:
    """Tool calls, whole and in pieces"""
    called = [provider.TOOL, "".join(provider.PIECES)]
    assert (seen["whole"], seen["streamed"], seen["pieces"]) == (called, called, len(provider.PIECES))
    assert seen["finish"] in ("tool_calls", "tool_use")
    assert set(lines) == {FINE}


def responses(seen: Seen, lines: Sequence[Line]) -> None:
    """Responses, whole and streamed"""
    assert seen["whole"] == seen["streamed"] == _text(WORDS)
    assert (seen["last"], seen["usage"]) == ("response.completed", [1, WORDS])
    assert lines == [FINE, FINE]


def embeddings(seen: Seen, lines: Sequence[Line]) -> None:
    """Embeddings"""
    assert seen["vectors"] == [list(mock.VECTOR)] * 2
    assert lines == [FINE]


def models(seen: Seen, lines: Sequence[Line]) -> None:
    """The list of models"""
    assert seen["ids"] == ["m", "provided"]
    assert seen["one"] == "m"
    assert lines == [OURS, OURS]


def count_tokens(seen: Seen, lines: Sequence[Line]) -> None:
    """Counting tokens"""
    assert seen["tokens"] == provider.TOKENS
    assert lines == [FINE]


def uploads(seen: Seen, lines: Sequence[Line]) -> None:
    """Uploading a file, and its bytes back"""
    assert seen["name"] == "notes.bin"
    assert (seen["bytes"], seen["same"]) == (256 * 1200, True)
    assert lines == [FINE, FINE, FINE]


def transcriptions(seen: Seen, lines: Sequence[Line]) -> None:
    """Audio to text"""
    assert seen["text"] == f"provided heard {256 * 1200} bytes of speech.wav"
    assert lines == [FINE]


def errors(seen: Seen, lines: Sequence[Line]) -> None:
    """Errors as the SDK's own classes"""
    refused = {status: seen[status] for status in ("400", "401", "404", "429", "500")}
    assert {status: answer["class"] for status, answer in refused.items()} == {
        "400": "BadRequestError",
        "401": "AuthenticationError",
        "404": "NotFoundError",
        "429": "RateLimitError",
        "500": "InternalServerError",
    }
    assert [answer["status"] for answer in refused.values()] == [400, 401, 404, 429, 500]
    assert {answer["request_id"] for answer in refused.values()} == {seen["own_id"]}
    assert seen["429"]["retry_after"] == "7"
    assert [line[:2] for line in lines] == [
        (400, "complete"),
        (401, REJECTED),
        (404, REJECTED),
        (429, "complete"),
        (500, "upstream_error"),
    ]


def breaks(seen: Seen, lines: Sequence[Line]) -> None:
    """A broken stream raises"""
    assert "failed as asked" in seen["event"]["message"]
    for broken in (seen["event"], seen["cut"]):
        assert broken["class"] is not None
        assert broken["text"]
        assert _text(9).startswith(broken["text"])
        assert broken["text"] != _text(9)
    assert [line[1] for line in lines] == ["upstream_error", "upstream_cut"]


def retries(seen: Seen, lines: Sequence[Line]) -> None:
    """The SDK's own retries"""
    assert seen["class"] == "InternalServerError"
    assert lines == [(500, "upstream_error", 1)] * 3


def steered(seen: Seen, lines: Sequence[Line]) -> None:
    """No retries after Headrace's own (`x-should-retry`)"""
    assert seen["class"] in ("InternalServerError", "ServiceUnavailableError")
    assert seen["status"] == 503
    assert lines == [(503, "upstream_error", 2)]


def waits(seen: Seen, lines: Sequence[Line]) -> None:
    """Waits for a plan's limit (`Retry-After`)

    The SDK's own pause is half a second at most, and would meet a second refusal.
    """
    assert seen["texts"] == [_text(WORDS)] * 2
    assert lines == [FINE, (429, REJECTED, 0), FINE]


def abort(seen: Seen, lines: Sequence[Line]) -> None:
    """Leaving a stream frees the upstream"""
    assert seen["chunks"] == 3
    assert lines == [(200, "client_gone", 1)]


def timeout(seen: Seen, lines: Sequence[Line]) -> None:
    """The SDK's own timeout frees the upstream"""
    assert seen["class"] in ("APITimeoutError", "APIConnectionTimeoutError")
    assert [line[1:] for line in lines] == [("client_gone", 1)]


#: The rows, in the README's order.
ROWS: tuple[Case, ...] = (
    *(
        whole,
        stream,
        lingers,
        usage,
        tools,
        responses,
        embeddings,
        models,
        count_tokens,
        uploads,
        transcriptions,
    ),
    *(errors, breaks, retries, steered, waits, abort, timeout),
)
_NOT_IN = {"openai": (count_tokens,), "anthropic": (responses, embeddings, transcriptions)}
#: What an SDK of each dialect does.
CASES = {dialect: tuple(case for case in ROWS if case not in without) for dialect, without in _NOT_IN.items()}
#: Cases whose end is the SDK leaving: within a second of it, nothing of them is left.
LEAVING = (abort, timeout)


def title(case: Case) -> str:
    return (case.__doc__ or "").splitlines()[0]
