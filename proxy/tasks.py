"""The one place that starts background tasks: a task that nobody holds can be collected while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_running: set[asyncio.Task[Any]] = set()  # the references themselves; emptied by each task's own end


def spawn(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """Starts `work`; a failure is logged under `name`, never lost."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    _running.add(task)
    task.add_done_callback(_finished)
    return task


def _finished(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        structlog.get_logger().error("task_failed", task=task.get_name(), error=type(error).__name__)
