"""What is different from OpenAI's endpoint with each provider: one row of `PROVIDERS` a personality.

From their documentation and from what their users report; sources stand at the rows. Only what a relay could
stumble over is imitated: members before and after the usual ones, what stands between events, where usage is
reported, and how errors look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from proxy.mock_behaviour import ProviderName

THOUGHTS = ("Let", " me", " think")  # of a model that thinks before it answers
CACHED = 2  # tokens of a prompt that a provider with a cache has in it, at most

_encode = msgspec.json.Encoder().encode
_ERROR_TYPES = {  # status: the type of the error, in both dialects
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_GOOGLE_STATUS = {  # google.rpc.Code
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}

#: prompt, answer, thoughts -> the usage object.
UsageOf = Callable[[int, int, int], dict[str, Any]]
#: status, message -> the body of an error.
ErrorOf = Callable[[int, str], bytes]
#: what every chunk begins with, message -> the bytes of an error inside a stream.
FailureOf = Callable[[dict[str, Any], str], bytes]


def error_type(status: int, fallback: str = "server_error") -> str:
    return _ERROR_TYPES.get(status, fallback if status >= 500 else "invalid_request_error")


def data(value: object) -> bytes:
    return b"data: %b\n\n" % _encode(value)


# -- usage


def _usage(prompt: int, answer: int, thoughts: int) -> dict[str, Any]:
    completion = answer + thoughts
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _detailed_usage(prompt: int, answer: int, thoughts: int) -> dict[str, Any]:
    details = {
        "prompt_tokens_details": {"cached_tokens": min(CACHED, prompt)},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }
    return _usage(prompt, answer, thoughts) | details


def _deepseek_usage(prompt: int, answer: int, thoughts: int) -> dict[str, Any]:
    hit = min(CACHED, prompt)
    own = {"prompt_cache_hit_tokens": hit, "prompt_cache_miss_tokens": prompt - hit}
    return _detailed_usage(prompt, answer, thoughts) | own


def _gemini_usage(prompt: int, answer: int, thoughts: int) -> dict[str, Any]:
    """Thoughts are in the total alone."""
    total = prompt + answer + thoughts
    return {"completion_tokens": answer, "prompt_tokens": prompt, "total_tokens": total}


def _openrouter_usage(prompt: int, answer: int, thoughts: int) -> dict[str, Any]:
    costs = {"cost": 0.00014, "is_byok": False, "cost_details": {"upstream_inference_cost": None}}
    return _detailed_usage(prompt, answer, thoughts) | costs


def _vllm_usage(prompt: int, answer: int, thoughts: int) -> dict[str, Any]:
    return _usage(prompt, answer, thoughts) | {"prompt_tokens_details": None}


# -- errors


def _error(status: int, message: str) -> bytes:
    error = {"message": message, "type": error_type(status), "param": None, "code": None}
    return _encode({"error": error})


def _failure(head: dict[str, Any], message: str) -> bytes:
    return b"data: %b\n\n" % _error(500, message)


def _anthropic_error(status: int, message: str) -> bytes:
    kind = error_type(status, "api_error")
    return _encode({"error": {"code": kind, "message": message, "type": kind, "param": None}})


def _gemini_error(status: int, message: str) -> bytes:
    code = _GOOGLE_STATUS.get(status, "UNKNOWN")
    document = [{"error": {"code": status, "message": message, "status": code}}]
    return msgspec.json.format(_encode(document), indent=2) + b"\n"


def _gemini_failure(head: dict[str, Any], message: str) -> bytes:
    """No event, but bare JSON between them (vercel/ai issue 5217)."""
    document = {"error": {"code": 503, "message": message, "status": "UNAVAILABLE"}}
    return msgspec.json.format(_encode(document), indent=2) + b"\n"


def _azure_error(status: int, message: str) -> bytes:
    return _encode({"error": {"code": str(status), "message": message}})


def _vllm_error(status: int, message: str) -> bytes:
    return _encode(_vllm_document(status, message))


def _vllm_failure(head: dict[str, Any], message: str) -> bytes:
    """Python's own JSON, with blanks; then the terminator, as if nothing had happened."""
    document = _encode({"error": _vllm_document(400, message)}).replace(b":", b": ").replace(b",", b", ")
    return b"data: %b\n\ndata: [DONE]\n\n" % document


def _vllm_document(status: int, message: str) -> dict[str, Any]:
    kind = "InternalServerError" if status >= 500 else "BadRequestError"
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def _llamacpp_error(status: int, message: str) -> bytes:
    return _encode({"error": {"code": status, "message": message, "type": error_type(status)}})


def _llamacpp_failure(head: dict[str, Any], message: str) -> bytes:
    return b"data: %b\n\n" % _llamacpp_error(500, message)


def _ollama_error(status: int, message: str) -> bytes:
    kind = error_type(status, "api_error")
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": None}}) + b"\n"


def _ollama_failure(head: dict[str, Any], message: str) -> bytes:
    """Swallowed: an empty chunk, and the stream ends without finish_reason and terminator."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    return data(head | {"choices": [choice]})


def _openrouter_error(status: int, message: str) -> bytes:
    error = {"message": message, "code": status, "metadata": {"provider_name": "mock"}}
    return _encode({"error": error, "user_id": "user_mock"})


def _openrouter_failure(head: dict[str, Any], message: str) -> bytes:
    """A chunk like the others, with an error in its middle."""
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error", "native_finish_reason": "error"}
    error = {"code": "server_error", "message": message}
    return data(head | {"error": error, "choices": [choice]})


# -- the table


class Provider(NamedTuple):
    """The defaults are OpenAI's."""

    prefix: str = ""  # of ids; empty: chatcmpl or cmpl
    headers: Mapping[str, str] = {}
    stream_type: str = "text/event-stream; charset=utf-8"
    json_type: str = "application/json"
    head: Mapping[str, Any] = {}  # further members of every answer and chunk
    choice: Mapping[str, Any] = {"logprobs": None}  # of every choice, beside index and finish_reason
    opening: Mapping[str, Any] | None = {"role": "assistant", "content": "", "refusal": None}
    #   the delta of the chunk before the first word; None: there is none, and every delta names the role
    message: Mapping[str, Any] = {}  # further members of a whole message
    thinks: str | None = (
        None  # the member of deltas and messages that thoughts come in; empty: they are hidden
    )
    preface: Mapping[str, Any] | None = None  # a chunk before all others
    last: Mapping[str, Any] = {}  # further members of a stream's last chunk and of a whole answer
    usage: UsageOf = _usage
    reports: Literal["asked", "always", "each", "finish"] = "asked"
    #   a chunk of its own if asked or always; on each chunk if asked; in the one with the finish_reason
    waits: int = 0  # signs of life before an answer, unless `keepalive_comments` says how many
    comment: bytes = b": keep-alive\n\n"  # the sign of life of a stream
    blank: bytes = b""  # of a body that is no stream; empty: there is none
    error: ErrorOf = _error
    failure: FailureOf = _failure
    refuses: frozenset[str] = frozenset()  # members of a request
    needs_query: str = ""
    needs_header: str = ""

    @property
    def thoughts(self) -> int:
        return 0 if self.thinks is None else len(THOUGHTS)


PROVIDERS: dict[ProviderName, Provider] = {
    "openai": Provider(),
    # platform.claude.com/docs/en/api/openai-sdk: details of usage, logprobs and refusal are always empty.
    "anthropic": Provider(
        prefix="msg",
        choice={},
        opening={"role": "assistant", "content": ""},
        error=_anthropic_error,
        failure=lambda head, message: b"data: %b\n\n" % _anthropic_error(529, message),
    ),
    # ai.google.dev/gemini-api/docs/openai; magentic pull request 382 (the array, refused members);
    # ogx issue 5122 (usage); new-api issue 1014 (thoughts).
    "gemini": Provider(
        json_type="application/json; charset=UTF-8",
        headers={"Vary": "Origin, X-Origin, Referer", "X-XSS-Protection": "0"},
        choice={},
        opening=None,
        thinks="",
        usage=_gemini_usage,
        reports="each",
        error=_gemini_error,
        failure=_gemini_failure,
        refuses=frozenset({"prompt_cache_key", "parallel_tool_calls", "web_search_options"}),
    ),
    # api-docs.deepseek.com/quick_start/rate_limit, …/api/create-chat-completion
    "deepseek": Provider(
        headers={"x-ds-trace-id": "mock"},
        head={"system_fingerprint": "fp_mock"},
        opening={"role": "assistant", "content": None, "reasoning_content": ""},
        thinks="reasoning_content",
        usage=_deepseek_usage,
        reports="finish",
        waits=3,
        blank=b"\n",
    ),
    # learn.microsoft.com/azure/ai-services/openai/concepts/content-streaming; logfire issue 64
    "azure": Provider(
        headers={"apim-request-id": "mock", "x-ms-region": "East US"},
        head={"system_fingerprint": "fp_mock"},
        choice={
            "logprobs": None,
            "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}},
        },
        preface={
            "choices": [],
            "created": 0,
            "id": "",
            "model": "",
            "object": "",
            "prompt_filter_results": [
                {
                    "prompt_index": 0,
                    "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}},
                }
            ],
        },
        usage=_detailed_usage,
        error=_azure_error,
        failure=lambda head, message: b"data: %b\n\n" % _azure_error(500, message),
        needs_query="api-version",
        needs_header="api-key",
    ),
    # vllm/entrypoints/openai: serving_chat.py, protocol.py
    "vllm": Provider(
        choice={"logprobs": None, "stop_reason": None},
        opening={"role": "assistant", "content": ""},
        message={"reasoning_content": None, "tool_calls": []},
        usage=_vllm_usage,
        error=_vllm_error,
        failure=_vllm_failure,
    ),
    # llama.cpp issues 16048 (timings behind the usage) and 14566 (errors)
    "llamacpp": Provider(
        stream_type="text/event-stream",
        json_type="application/json; charset=utf-8",
        head={"system_fingerprint": "b6497-mock"},
        choice={},
        opening={"role": "assistant", "content": None},
        last={"timings": {"cache_n": 0, "prompt_n": 3, "prompt_ms": 180.025, "predicted_ms": 875.429}},
        error=_llamacpp_error,
        failure=_llamacpp_failure,
    ),
    # ollama/middleware/openai.go, openai/openai.go
    "ollama": Provider(
        stream_type="text/event-stream",
        head={"system_fingerprint": "fp_ollama"},
        choice={},
        opening=None,
        error=_ollama_error,
        failure=_ollama_failure,
    ),
    # openrouter.ai/docs/api/reference/streaming, …/errors-and-debugging
    "openrouter": Provider(
        prefix="gen",
        headers={"x-generation-id": "gen-mock"},
        head={"provider": "mock"},
        choice={"logprobs": None, "native_finish_reason": None},
        opening=None,
        thinks="reasoning",
        usage=_openrouter_usage,
        reports="always",
        waits=2,
        comment=b": OPENROUTER PROCESSING\n\n",
        blank=b"\n         \n",
        error=_openrouter_error,
        failure=_openrouter_failure,
    ),
}
