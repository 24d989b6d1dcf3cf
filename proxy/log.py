"""Where log lines go and what a request's line holds.

Lines are collected in memory and written by one thread in batches: a full disk, a slow pipe or a stopped
terminal costs lines (counted in `dropped`), never a stream. Rare lines pass structlog's processors; the one
line a request is a Struct that msgspec renders (1 us where a processor chain takes 10).

Never in a line: a header value other than the two ids (request, trace), a query string, anything of a body.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

if TYPE_CHECKING:
    import asyncio

#: Lines that may wait for the writer; at 500 bytes a line this is about 5 MB.
_MAX_PENDING = 10_000
#: Seconds that a line may wait for company: a write per line would cost a thread switch per request.
_FLUSH_AFTER_S = 0.05

Fields = MutableMapping[str, Any]

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class RequestLine(msgspec.Struct, gc=False):
    """One request (contract section 8). Times are milliseconds; null means that the phase was not reached."""

    ts: str
    level: str = "info"
    event: str = "request"
    request_id: str = ""
    key_id: str | None = None
    plan: str | None = None
    method: str = ""
    route: str = ""
    model: str | None = None
    upstream: str | None = None
    attempts: int = 0
    status: int = 0
    reason: str = ""
    queue_ms: float | None = None
    ttfb_ms: float | None = None
    ttft_ms: float | None = None
    duration_ms: float = 0.0
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage_source: str | None = None
    cost_usd: str | None = None
    client_ip: str = ""
    error: str | None = None  # our error code, if we made the answer
    trace_id: str | None = None  # of the caller's traceparent


def refusal_line(status: int, code: str, reason: str, request_id: str, peer: str) -> RequestLine:
    """The line of a request that never became one."""
    return RequestLine(
        ts=timestamp(),
        request_id=request_id,
        method="UNKNOWN",
        route="other",
        status=status,
        reason=reason,
        client_ip=peer,
        error=code,
    )


class Sink:
    """Bytes to standard output or to a file, written by one thread.

    A thread of its own and not an executor: the interpreter waits at its end for an executor's threads, and
    one that hangs in a pipe that nobody reads would never let the process end.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._fd = _open(path) if path else 1
        self._pending: list[bytes] = []
        # Each counter has one writer: `x += 1` of two threads loses counts.
        self._refused = 0
        self._handed = 0
        self._written = 0
        self._lost = 0
        self._batches: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_batches, name="log", daemon=True)
        self._writer.start()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False

    @property
    def dropped(self) -> int:
        """Lines that no sink took."""
        return self._refused + self._lost

    def attach(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """From now on lines are written in batches by the loop's timer; None: at once (start, stop)."""
        self._loop = loop
        self._scheduled = False
        self.flush()

    def write(self, line: bytes) -> None:
        if len(self._pending) + self._handed - self._written >= _MAX_PENDING:
            self._refused += 1
            return
        self._pending.append(line)
        if self._loop is None:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_later(_FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        self._scheduled = False
        if self._pending:
            lines, self._pending = self._pending, []
            self._handed += len(lines)
            self._batches.put(lines)

    def close(self, wait_s: float = 2.0) -> None:
        """Writes what is left, but waits no longer than that for a sink that does not take it."""
        self._loop = None
        self.flush()
        self._batches.put(None)
        self._writer.join(wait_s)

    def _write_batches(self) -> None:
        while (lines := self._batches.get()) is not None:
            self._write_batch(lines)
            self._written += len(lines)
        if self._path is not None:
            os.close(self._fd)

    def _write_batch(self, lines: list[bytes]) -> None:
        try:
            self._reopen_if_moved()
            for part in _packed(lines):
                rest = memoryview(part)
                while rest:  # a nearly full disk may take a part
                    rest = rest[os.write(self._fd, rest) :]
        except OSError:
            self._lost += len(lines)

    def _reopen_if_moved(self) -> None:
        """logrotate renames the file and expects a new one under the old name."""
        if self._path is None:
            return
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            same = False
        if not same:
            opened = _open(self._path)
            os.close(self._fd)
            self._fd = opened


def _packed(lines: list[bytes]) -> Iterator[bytes]:
    """Whole lines, at most PIPE_BUF bytes together: workers share one pipe, and only up to there is a write
    not torn by another process's (pipe(7))."""
    packed: list[bytes] = []
    size = 0
    for line in lines:
        if packed and size + len(line) > select.PIPE_BUF:
            yield b"".join(packed)
            packed, size = [], 0
        packed.append(line)
        size += len(line)
    yield b"".join(packed)


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


class _SinkLogger:
    """structlog's last stop: takes the rendered line."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def msg(self, line: bytes) -> None:
        self._sink.write(line)

    debug = info = warning = error = critical = exception = log = msg


class RequestLog:
    """Renders the one line a request."""

    def __init__(self, sink: Sink, *, text: bool, enabled: bool) -> None:
        self._sink = sink
        self._text = text
        self.enabled = enabled
        self._encode = msgspec.json.Encoder().encode

    def write(self, line: RequestLine) -> None:
        if not self.enabled:
            return
        if self._text:
            self._sink.write(_as_text(msgspec.structs.asdict(line)))
        else:
            self._sink.write(self._encode(line) + b"\n")


_MILLISECONDS = tuple(
    [f".{number:03d}Z" for number in range(1000)]
)  # formatting one took as long as all else
_stamped: tuple[int, str] = (0, "")  # the last second that was formatted: strftime costs 1 us


def timestamp(now: float | None = None) -> str:
    """RFC 3339 in UTC with milliseconds."""
    global _stamped
    moment = time.time() if now is None else now
    second = int(moment)
    if second != _stamped[0]:
        _stamped = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
    return _stamped[1] + _MILLISECONDS[int((moment - second) * 1000)]


def _add_timestamp(_logger: Any, _name: str, fields: Fields) -> Mapping[str, Any]:
    return {"ts": timestamp(), **fields}


def _render_json(_logger: Any, _name: str, fields: Fields) -> bytes:
    return msgspec.json.encode(fields, enc_hook=str) + b"\n"


def _render_text(_logger: Any, _name: str, fields: Fields) -> bytes:
    return _as_text(fields)


def _as_text(fields: Mapping[str, Any]) -> bytes:
    """For eyes: the same fields; values go through JSON, so that control characters stay escaped."""
    shown = " ".join(f"{k}={msgspec.json.encode(v, enc_hook=str).decode()}" for k, v in fields.items() if v)
    return shown.encode() + b"\n"


class _ToStructlog(logging.Handler):
    """Lines of libraries. aiohttp's server logger quotes the offending header line and its traceback:
    only the constant part of such a record is kept."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        structlog.get_logger().log(
            record.levelno, "library", logger=record.name, message=str(record.msg)[:200], error=error
        )


def configure(*, path: str | None, level: str, text: bool) -> tuple[Sink, RequestLog]:
    """Points structlog and logging at one sink; raises OSError if the file cannot be opened."""
    sink = Sink(path)
    threshold = _LEVELS[level]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _add_timestamp,
            _render_text if text else _render_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: _SinkLogger(sink),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_ToStructlog()]
    root.setLevel(max(threshold, logging.WARNING))
    return sink, RequestLog(sink, text=text, enabled=threshold <= _LEVELS["info"])
