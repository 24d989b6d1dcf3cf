"""What one request knows about itself.

Born in the first middleware, filled on the way, read once at the end by `middleware/observe.py`. Nothing
else is handed sideways between the stations of a request.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from aiohttp import web

from proxy import downlink
from proxy.errors import Dialect, Reason

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

    from proxy.bucket import Decision
    from proxy.core import Core
    from proxy.endpoints import Endpoint
    from proxy.identity import Principal
    from proxy.pipe import Pipe
    from proxy.usage import Usage


_PROCESS = f"{os.getpid():x}"
_numbers = itertools.count(1)


class Phase(StrEnum):
    """Where a request is: the label of `client_disconnects_total`."""

    BODY = "body"
    QUEUE = "queue"
    FIRST_BYTE = "first_byte"
    STREAM = "stream"
    ANSWER = "answer"


_BODY = Phase.BODY  # a look into an Enum takes Python 3.11 0.1 us


def _dialect_of(path: str) -> Dialect:
    """Of a path that is not served: whose SDK asks there?"""
    return Dialect.ANTHROPIC if path.startswith(("/v1/messages", "/messages")) else Dialect.OPENAI


class Context:
    """One request. Times are seconds of `time.monotonic` (the loop's own clock is the same one,
    but uvloop rounds it to milliseconds); None: not reached."""

    __slots__ = (
        "_stream_id",
        "_transport",
        "allowance",
        "asked_tokens",
        "attempts",
        "bytes_in",
        "bytes_out",
        "chunks",
        "client_ip",
        "committed",
        "core",
        "cost_picos",
        "dialect",
        "ended_at",
        "endpoint",
        "error_code",
        "fields",
        "first_byte_at",
        "first_token_at",
        "given_up",
        "left_at",
        "list_cost_picos",
        "method",
        "model",
        "phase",
        "pipe",
        "principal",
        "queue_s",
        "reached_upstream",
        "reason",
        "request_id",
        "route",
        "sent_at",
        "started_at",
        "status",
        "stopped",
        "streaming",
        "task",
        "upstream",
        "usage",
    )

    def __init__(self, request_id: str, endpoint: Endpoint | None, path: str, started_at: float) -> None:
        # What the first middleware sets; to look it up again takes ten times as long.
        self.core: Core  # of this process
        self.fields: CIMultiDictProxy[str]  # the request's
        self.method = ""
        self.task: asyncio.Task[None] | None = None
        self.request_id = request_id
        self._stream_id = ""
        self.endpoint = endpoint
        self.dialect = endpoint.dialect if endpoint is not None else _dialect_of(path)
        self.route = endpoint.name if endpoint is not None else "other"
        self.started_at = started_at
        self.ended_at = started_at
        self.phase = _BODY
        self.principal: Principal | None = None  # who asks; None in open mode
        self.allowance: dict[str, Decision] = {}  # of the caller's own plan, by unit: requests, tokens
        self.model: str | None = None  # as configured: a label
        self.upstream: str | None = None
        self.attempts = 0
        self.given_up = False  # two attempts or more ended in a 5xx: the caller's SDK need not try again
        self.reached_upstream = False
        self.left_at: float | None = None  # the caller has left; its answer is read on for the usage
        self.committed = False  # a byte of the upstream's answer went to the caller: no more retries
        self.streaming = False
        self.stopped: Reason | None = None
        self.reason: Reason | None = None
        self.error_code: str | None = None
        self.status = 0
        self.queue_s: float | None = None
        self.sent_at: float | None = None
        self.first_byte_at: float | None = None
        self.first_token_at: float | None = None
        self.chunks = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.client_ip = ""
        self.usage: Usage | None = None  # None: the answer said nothing
        self.asked_tokens = 0  # of the prompt, estimated
        self.cost_picos: int | None = None  # 1e-12 USD; None: not known
        self.list_cost_picos: int | None = None
        self._transport: asyncio.BaseTransport | None = None  # the caller's connection
        self.pipe: Pipe | None = None  # of an answer on its way; it counts what it writes

    @property
    def stream_id(self) -> str:
        """Ours, for a caller may repeat its request id; made for whoever looks."""
        if not self._stream_id:
            self._stream_id = f"{_PROCESS}-{next(_numbers)}"
        return self._stream_id

    def goes_out_by(self, transport: asyncio.BaseTransport | None) -> None:
        """The connection that operators see the progress of: of whatever is not sent in one write."""
        self._transport = transport

    def used_tokens(self) -> int | None:
        """Prompt and answer together, for the limits; None: nobody knows. An upstream that failed or refused
        has used nothing of the caller's."""
        if self.usage is not None:
            return self.usage.prompt_tokens + self.usage.completion_tokens
        return None if self.committed and self.status < 400 else 0

    def describe(self, now: float) -> dict[str, Any]:
        """What an operator sees of it. Ages are seconds; what `downlink` does not know is None."""
        return {
            "id": self.stream_id,
            "request_id": self.request_id,
            "key_id": None if self.principal is None else self.principal.key_id,
            "route": self.route,
            "model": self.model,
            "upstream": self.upstream,
            "phase": self.phase.value if self.left_at is None else "drain_for_usage",
            "age_s": round(now - self.started_at, 3),
            "ttft_s": None
            if self.first_token_at is None
            else round(self.first_token_at - self.started_at, 3),
            "client_ip": self.client_ip,
            **self._progress(now),
        }

    def _progress(self, now: float) -> dict[str, Any]:
        if self._transport is None:  # nothing has been sent
            return {"bytes_out": 0, "idle_s": round(now - self.started_at, 3), "buffered_bytes": 0}
        seen = downlink.look(self._transport)
        if seen is None:
            return {"bytes_out": None, "idle_s": None, "buffered_bytes": None}
        written = self.bytes_out if self.pipe is None else self.pipe.size
        idle_s = min(seen.idle_s, now - self.started_at)  # what was sent before was another request's
        return {
            "bytes_out": max(0, written - seen.waiting_bytes),
            "idle_s": round(idle_s, 3),
            "buffered_bytes": seen.waiting_bytes,
        }

    def end(self, now: float) -> None:
        """Nobody may stop it any more: its answer, or nothing, is on the way."""
        self.ended_at = now
        self.task = self.pipe = None  # a pipe knows its context: they would wait for a collection

    def stop(self, reason: Reason) -> None:
        """Ends the request from outside (drain, kill). The task sees a cancellation that carries a reason;
        without one, a cancellation means that the caller has left."""
        if self.stopped is None and self.task is not None:
            self.stopped = reason
            self.task.cancel()


CONTEXT: web.RequestKey[Context] = web.RequestKey("context", Context)
CORE: web.AppKey[Core] = web.AppKey("core")
