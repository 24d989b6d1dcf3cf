"""The errors: each in the table of the contract, one shape a dialect, nothing of anybody's input."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.errors import REFUSALS, BadRequest, Dialect, HeadraceError, Reason, Refused, UpstreamFailed

#: status -> codes (contract section 5; HTTP's own refusals have the names of the status).
CODES = {
    400: {
        "invalid_json",
        "duplicate_key",
        "missing_model",
        "invalid_messages",
        "ambiguous_credentials",
        "bad_request",
    },
    401: {"invalid_api_key", "expired_token", "invalid_token"},
    403: {"model_not_allowed", "ip_not_allowed"},
    404: {"model_not_found", "not_found"},
    426: {"upgrade_required"},
    429: {"rate_limit_exceeded", "tokens_limit_exceeded", "too_many_in_flight", "budget_exceeded"},
    500: {"internal_error"},
    502: {"upstream_unreachable", "upstream_invalid_response", "upstream_auth", "upstream_error"},
    503: {"overloaded", "queue_timeout", "draining", "no_upstream_available"},
    504: {"upstream_timeout"},
}


def descendants(root: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [each for child in root.__subclasses__() for each in (child, *descendants(child))]


def _made(kind: type[HeadraceError]) -> HeadraceError:
    if kind is errors.BudgetExceeded:
        return kind(0.0101, "2026-12-01T00:00:00Z")
    if issubclass(kind, (errors.LimitExceeded, errors.NoUpstreamAvailable)):
        return kind(0.0101)
    return kind()


FIXED = [
    each
    for each in descendants(HeadraceError)
    if each not in (BadRequest, Refused) and each.__module__ == "proxy.errors"
]
ALL: list[HeadraceError] = [_made(each) for each in FIXED] + [Refused(status) for status in REFUSALS]


@pytest.mark.parametrize("kind", FIXED)
def test_codes_are_in_the_contract(kind: type[HeadraceError]) -> None:
    """Status and code are a pair that the contract lists."""
    assert kind.code in CODES[kind.status]


@pytest.mark.parametrize("kind", descendants(UpstreamFailed))
def test_attempt_results_are_a_closed_set(kind: type[UpstreamFailed]) -> None:
    """The label of upstream_attempts_total."""
    assert kind.result in {"ok", "connect_error", "timeout", "reset", "status", "cancelled"}


def test_reasons_are_a_closed_set() -> None:
    """The ten reasons of contract 6.2."""
    assert {reason.value for reason in Reason} == {
        "complete",
        "client_gone",
        "upstream_error",
        "upstream_cut",
        "upstream_stall",
        "deadline",
        "rejected",
        "drained",
        "killed",
        "internal_error",
    }


@pytest.mark.parametrize("error", ALL, ids=lambda error: f"{type(error).__name__}-{error.status}")
@pytest.mark.parametrize("dialect", list(Dialect))
def test_bodies(error: HeadraceError, dialect: Dialect) -> None:
    """One shape a dialect, each with a message and a type."""
    document = json.loads(error.body(dialect, "id-1"))
    if dialect is Dialect.ANTHROPIC:
        assert list(document) == ["type", "error", "request_id"]
        assert (document["type"], document["request_id"]) == ("error", "id-1")
        assert set(document["error"]) == {"type", "message"}
    else:
        assert list(document) == ["error"]
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert document["error"]["code"] == error.code
    assert document["error"]["message"]
    assert document["error"]["type"]


@pytest.mark.parametrize("error", ALL, ids=lambda error: f"{type(error).__name__}-{error.status}")
@pytest.mark.parametrize("dialect", list(Dialect))
def test_events(error: HeadraceError, dialect: Dialect) -> None:
    """The final event: the body as one data line, named only where SDKs look for a name, no terminator."""
    event = error.event(dialect, "id-1")
    name, mark, data = event.partition(b"data: ")
    assert mark
    assert name == (b"" if dialect is Dialect.OPENAI else b"event: error\n")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    assert b"[DONE]" not in event
    assert json.loads(data) == json.loads(error.body(dialect, "id-1"))


@pytest.mark.parametrize("error", ALL, ids=lambda error: f"{type(error).__name__}-{error.status}")
def test_retry_after_where_it_helps(error: HeadraceError) -> None:
    """503 says when to come back; 401 says how to authenticate."""
    if error.status == 429:
        assert (error.headers["Retry-After"], error.headers["retry-after-ms"]) == ("1", "11")
    if error.status == 503:
        assert "Retry-After" in error.headers or error.headers.get("x-should-retry") == "false"
    if error.status == 401:
        assert error.headers["WWW-Authenticate"] == "Bearer"


@given(st.text(), st.text())
def test_request_ids_cannot_break_the_body(message: str, request_id: str) -> None:
    """Whatever text is put in, the body is one JSON document and the event one event."""
    error = BadRequest("bad_request", message or "x", param="model")
    assert json.loads(error.body(Dialect.ANTHROPIC, request_id))["request_id"] == request_id
    assert error.event(Dialect.ANTHROPIC, request_id).count(b"\n") == 3


def test_the_tree_in_the_docstring() -> None:
    """The drawing names classes that exist."""
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if line.startswith("    ") and line.lstrip("│ ")[:1] in "├└":
            assert issubclass(getattr(errors, name), HeadraceError)
