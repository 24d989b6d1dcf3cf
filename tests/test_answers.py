"""What an upstream may answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy import answers
from proxy.errors import (
    HeadraceError,
    UpstreamCut,
    UpstreamFailed,
    UpstreamInBand,
    UpstreamInvalid,
    UpstreamRefusedUs,
    UpstreamTimeout,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def test_which_statuses_pass() -> None:
    """401 and 403 speak of our credential, 1xx and redirects are no answers; everything else passes."""
    refused: dict[int, type[HeadraceError]] = {}
    for status in range(100, 600):
        try:
            answers.refuse_unusable(status)
        except HeadraceError as error:
            refused[status] = type(error)
    no_answers = {status for status in range(100, 400) if status < 200 or (status >= 300 and status != 304)}
    assert refused == {
        **dict.fromkeys(no_answers, UpstreamInvalid),
        401: UpstreamRefusedUs,
        403: UpstreamRefusedUs,
    }


IN_BAND = [
    b'{"error":{"message":"no"}}',
    b' \n{"error": {"message": "no", "type": "x", "code": 1}}\n',
    b'{"error":"no"}',
    b'{"type":"error","error":{"type":"overloaded_error","message":"no"},"request_id":"r"}',
    b'{"object":"error","error":{"message":"no"}}',
    b'{"status":"failed","error":{"message":"' + b"x" * 10_000 + b'"}}',
    b'{"object":"error","message":"no","type":"BadRequestError","param":null,"code":400}',  # vLLM
    b'{"error":{"message":"no","code":502},"user_id":"user_x"}',  # OpenRouter
    b"\n" * 1000 + b'{"error":{"message":"no"}}',  # DeepSeek, after a long wait
]
NO_ERROR = [
    b'{"error":null,"id":"resp_1","output":[]}',  # a good answer of /v1/responses
    b'{"error":null}',
    b'{"error":{}}',
    b'{"object":"error","message":"no","choices":[]}',
    b": no JSON\n" + b'{"error":{"message":"no"}}',
    b'{"id":"x","choices":[{"message":{"content":"{\\"error\\":1}"}}],"error":{"message":"late"}}',
    b'{"content":"error"}',
    b'["error"]',
    b'"error"',
    b'{"error":',
    b'{"error":"\xff"}',
    b'{"error":' + b"[" * 100_000,
    b"error",
    b"",
]


@pytest.mark.parametrize("body", IN_BAND)
def test_an_error_that_calls_itself_a_success(body: bytes) -> None:
    """A 200 whose whole JSON is an error is refused; under an error's status it passes as it is."""
    with pytest.raises(UpstreamInBand):
        answers.checked_body(200, body)
    for status in (400, 429, 500):
        assert answers.checked_body(status, body) == body


@pytest.mark.parametrize("body", NO_ERROR)
@pytest.mark.parametrize("status", [200, 201, 400, 500])
def test_what_only_looks_like_an_error(body: bytes, status: int) -> None:
    """Everything else passes byte for byte."""
    assert answers.checked_body(status, body) == body


def test_gemini_array() -> None:
    """Gemini's array of errors becomes the object that SDKs read; its text and its status stay."""
    body = b'[{"error": {"code": 400, "message": "bad \\u00fc", "status": "INVALID_ARGUMENT"}}]\n'
    assert json.loads(answers.checked_body(400, body)) == {
        "error": {
            "message": "bad ü",
            "type": "invalid_argument",
            "param": None,
            "code": "invalid_argument",
        }
    }
    assert answers.checked_body(400, b"\n" * 1000 + body) == answers.checked_body(400, body)
    for other in (
        b'[{"error": 1}]',
        b'["error", {"error":{}}]',
        b'[{"error":{"message":"x"}',
        b'[[{"error":{}}]]',
    ):
        assert answers.checked_body(400, other) == other
    with pytest.raises(UpstreamInBand):
        answers.checked_body(200, body)
    several = b"[" + body.strip().strip(b"[]") + b',{"id":1}]'
    assert answers.checked_body(200, several) == several


@given(st.integers(200, 599), st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
@example(400, b'[{"error":{"message":"\\ud800","status":"x"}}]')
@example(400, b'[{"error":{"message":[1e400],"status":{}}}]')
def test_any_answer_passes_or_is_an_error_of_ours(status: int, body: bytes) -> None:
    """No body of an upstream raises anything else than UpstreamInBand."""
    try:
        assert isinstance(answers.checked_body(status, body), bytes)
    except UpstreamInBand:
        assert status < 300


@pytest.mark.parametrize(
    ("status", "content_type", "expected"),
    [
        (200, b"text/event-stream", True),
        (200, b"Text/Event-Stream; charset=utf-8", True),
        (206, b"text/event-stream", True),
        (500, b"text/event-stream", False),
        (200, b"application/json", False),
        (200, b"text/event-streams", False),
        (200, b"text/plain; x=text/event-stream", False),
        (200, None, False),
    ],
)
def test_event_streams(status: int, content_type: bytes | None, expected: bool) -> None:
    """A stream is a success whose media type says so."""
    fields = [] if content_type is None else [(b"Content-Type", content_type)]
    assert answers.is_event_stream(status, fields) is expected


def test_late_refusals_are_upstream_errors() -> None:
    """What comes after an early 200 ends as an error of the upstream, whatever its status was."""
    for status in range(200, 600):
        error = answers.late_refusal(status)
        assert isinstance(error, UpstreamFailed)
        assert not isinstance(error, (UpstreamCut, UpstreamTimeout))
        assert isinstance(error, UpstreamInvalid) == (status < 400)
