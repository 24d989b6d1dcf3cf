"""Every error that a caller can see, and who is to blame for it.

    HeadraceError
    ├── BadRequest            400  the caller's request cannot be understood
    ├── InvalidCredential     401  unknown, malformed, expired or revoked: one body for all
    │   ├── ExpiredToken            401  a JWT that was valid
    │   └── InvalidToken            401  any other JWT
    ├── ModelNotAllowed       403  the model is not in the caller's allow-list
    ├── IpNotAllowed          403  the address is not in the caller's networks
    ├── NotFound              404  no such path or model
    ├── UpgradeRequired       426  a path that is served over WebSocket only
    ├── LimitExceeded         429  the caller's plan is used up: requests, tokens, slots, dollars
    ├── Refused               4xx  any other refusal before an attempt (408, 413, 415, …)
    ├── Overloaded            503  ours: full, waited too long, draining
    ├── NoUpstreamAvailable   503  all upstreams of the model are ejected or unhealthy
    ├── Internal              500  ours: a bug
    └── UpstreamFailed        502/504  an attempt was made and failed
        ├── UpstreamUnreachable     502  connect, TLS, DNS, or closed before its answer
        ├── UpstreamInvalid         502  not HTTP, a redirect, a body that breaks its own framing
        ├── UpstreamRefusedUs       502  its 401/403: our credential is bad, the caller's is not
        ├── UpstreamInBand          502  a 200 whose whole JSON is an error
        └── UpstreamTimeout         504  no first byte in time, or the total deadline

An error knows its status, its code (contract section 5, a closed list), the end reason that it gives the
request, and whether another attempt may help. Messages are constants: nothing of the caller's input, the
upstream's address or an exception's text is ever put into them. Only `middleware/errors.py` and the end
of a pipe turn these into bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec


class Reason(StrEnum):
    """How a request ended (contract section 6.2): a closed list, in the log, the metric and the ledger."""

    COMPLETE = "complete"
    CLIENT_GONE = "client_gone"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_CUT = "upstream_cut"
    UPSTREAM_STALL = "upstream_stall"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    DRAINED = "drained"
    KILLED = "killed"
    INTERNAL_ERROR = "internal_error"


class Dialect(StrEnum):
    """The shape in which a route's callers expect errors."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class HeadraceError(Exception):
    """The root: never raised itself."""

    status: int = 500
    code: str = "internal_error"
    message: str = "Headrace failed to handle this request."
    reason: Reason = Reason.REJECTED
    headers: Mapping[str, str] = {}

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message or self.message)
        if message is not None:
            self.message = message
        self.param = param

    def body(self, dialect: Dialect, request_id: str) -> bytes:
        """The JSON body in the route's dialect."""
        return msgspec.json.encode(self._document(dialect, request_id))

    def event(self, dialect: Dialect, request_id: str) -> bytes:
        """The final event of a stream that cannot be finished.

        SDKs look for it in different places: openai-python and openai-node raise on any event whose data has
        an `error` object; anthropic-python ignores events without `event: error`.
        """
        data = msgspec.json.encode(self._document(dialect, request_id))
        name = b"" if dialect is Dialect.OPENAI else b"event: error\n"
        return b"%bdata: %b\n\n" % (name, data)

    def _document(self, dialect: Dialect, request_id: str) -> dict[str, Any]:
        if dialect is Dialect.ANTHROPIC:
            kind = _ANTHROPIC_TYPES.get(
                self.status, "api_error" if self.status >= 500 else "invalid_request_error"
            )
            return {
                "type": "error",
                "error": {"type": kind, "message": self.message},
                "request_id": request_id,
            }
        kind = _OPENAI_TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


class BadRequest(HeadraceError):
    status = 400
    code = "bad_request"
    message = "The request is malformed."

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class OperationError(Exception):
    """The operator asked for something that cannot be done; the text is one line that names the fix."""


class StartError(OperationError):
    """A server or a worker cannot start."""


class InvalidCredential(HeadraceError):
    status = 401
    code = "invalid_api_key"
    message = "The API key is missing or not valid."
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class ExpiredToken(InvalidCredential):
    code = "expired_token"
    message = "The token has expired."


class InvalidToken(InvalidCredential):
    code = "invalid_token"
    message = "The token is not valid."


class ModelNotAllowed(HeadraceError):
    status = 403
    code = "model_not_allowed"
    message = "This credential may not use the model."

    def __init__(self) -> None:
        super().__init__(param="model")


class IpNotAllowed(HeadraceError):
    status = 403
    code = "ip_not_allowed"
    message = "This credential may not be used from this address."


class NotFound(HeadraceError):
    status = 404
    code = "not_found"
    message = "There is nothing at this path."


class ModelNotFound(NotFound):
    code = "model_not_found"
    message = "The model does not exist or is not served here."

    def __init__(self) -> None:
        super().__init__(param="model")


#: HTTP's own refusals: status -> code, message. One table, so that the parser's refusals (which never reach
#: the middleware chain) and the guard's speak with one voice.
REFUSALS: dict[int, tuple[str, str]] = {
    400: ("bad_request", "The request is not well-formed HTTP."),
    403: ("origin_not_allowed", "Pages of this origin may not ask here."),
    405: ("method_not_allowed", "This method is not supported."),
    408: ("request_timeout", "The request did not arrive in time."),
    411: ("length_required", "The request needs a body with a length."),
    413: ("request_too_large", "The request body is too large."),
    414: ("uri_too_long", "The request line is too long."),
    415: ("unsupported_media_type", "The body has to be plain application/json in UTF-8."),
    417: ("expectation_failed", "This expectation cannot be met."),
    421: ("misdirected_request", "This server does not answer for that authority."),
    431: ("headers_too_large", "The header fields are too large."),
    501: ("not_implemented", "This transfer coding is not supported."),
    505: ("http_version_not_supported", "Only HTTP/1.0 and HTTP/1.1 are supported."),
}


class Refused(HeadraceError):
    """A refusal of HTTP's own kind; `close` says that the connection cannot be used any further."""

    def __init__(self, status: int, *, close: bool = True) -> None:
        self.status = status
        self.code, message = REFUSALS[status]
        self.close = close
        super().__init__(message)


class UpgradeRequired(HeadraceError):
    """RFC 9110 section 15.5.22."""

    status = 426
    code = "upgrade_required"
    message = "This path is served over WebSocket only."
    headers: Mapping[str, str] = {"Upgrade": "websocket"}


class LimitExceeded(HeadraceError):
    """The caller has used what its plan gives; `retry_after_s` seconds from now the same would pass."""

    status = 429
    code = "rate_limit_exceeded"
    message = "Too many requests: the rate limit is reached."

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.headers = retry_after(retry_after_s)


class TokensLimited(LimitExceeded):
    code = "tokens_limit_exceeded"
    message = "Too many tokens: the limit of tokens a minute is reached."


class TooManyInFlight(LimitExceeded):
    code = "too_many_in_flight"
    message = "Too many requests at once: wait for one of them to end."


class BudgetExceeded(LimitExceeded):
    """No SDK need ask again before the budget begins anew, in `retry_after_s` seconds."""

    code = "budget_exceeded"

    def __init__(self, retry_after_s: float, resets_at: str) -> None:
        super().__init__(retry_after_s)
        self.message = f"The budget is used up; it begins anew at {resets_at}."
        self.headers = {**self.headers, "x-should-retry": "false", "x-headrace-budget-reset": resets_at}


def retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds, rounded up, for everybody; milliseconds for the SDKs that read them first. Never 0:
    openai-python takes 0 for no answer."""
    milliseconds = max(1, math.ceil(seconds * 1000))
    return {"Retry-After": str(-(-milliseconds // 1000)), "retry-after-ms": str(milliseconds)}


class Overloaded(HeadraceError):
    status = 503
    code = "overloaded"
    message = "The server is at its limit, retry shortly."
    headers: Mapping[str, str] = {"Retry-After": "1"}


class QueueFull(Overloaded):
    """As many wait as may. `retry_after_s`: whole seconds, from how fast the queue drains."""

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s
        self.headers = {"Retry-After": str(retry_after_s)}


class QueueTimeout(QueueFull):
    """Waited for as long as one may."""

    code = "queue_timeout"
    message = "No place became free in time, retry shortly."


class Draining(Overloaded):
    code = "draining"
    message = "The server is shutting down, retry shortly."
    reason = Reason.DRAINED


class Killed(Overloaded):
    message = "The request was stopped by the operator."
    reason = Reason.KILLED
    headers: Mapping[str, str] = {"x-should-retry": "false"}


class NoUpstreamAvailable(HeadraceError):
    """Nobody may be asked; in `retry_after_s` seconds the first may be again."""

    status = 503
    code = "no_upstream_available"
    message = "No provider of this model is available, retry shortly."

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}


class Internal(HeadraceError):
    reason = Reason.INTERNAL_ERROR


class UpstreamFailed(HeadraceError):
    """An attempt failed. `result` is its label in `upstream_attempts_total`."""

    status = 502
    code = "upstream_error"
    message = "The model provider failed to answer."
    reason = Reason.UPSTREAM_ERROR
    result = "reset"


class UpstreamUnreachable(UpstreamFailed):
    code = "upstream_unreachable"
    message = "The model provider could not be reached."


class UpstreamStale(UpstreamUnreachable):
    """A reused connection died before a byte of the answer: most likely it was closed while it lay idle, and
    the upstream never saw the request. Asked once more on another connection (pingora's ReusedOnly)."""


class UpstreamConnectFailed(UpstreamUnreachable):
    """Nothing was sent, so another upstream may always be asked (pingora's failover law)."""

    result = "connect_error"


class UpstreamInvalid(UpstreamFailed):
    code = "upstream_invalid_response"
    message = "The model provider's answer was not valid."


class UpstreamRefusedUs(UpstreamFailed):
    code = "upstream_auth"
    message = "The model provider refused the proxy's own credential."
    result = "status"


class UpstreamInBand(UpstreamFailed):
    message = "The model provider answered with an error."
    result = "status"


class UpstreamCut(UpstreamFailed):
    message = "The model provider ended the answer before it was complete."
    reason = Reason.UPSTREAM_CUT


class UpstreamTimeout(UpstreamFailed):
    status = 504
    code = "upstream_timeout"
    message = "The model provider did not answer in time."
    reason = Reason.UPSTREAM_STALL
    result = "timeout"


class UpstreamDeadline(UpstreamTimeout):
    message = "The answer took longer than is allowed in total."
    reason = Reason.DEADLINE
