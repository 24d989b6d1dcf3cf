"""Works through a file of prompts: so many at once, so many a minute, none of them twice.

    python docs/examples/batch.py prompts.jsonl answers.jsonl --model gpt-4.1 --at-once 8 --per-minute 300

A line of the first file is a prompt, {"id": "1", "prompt": "…"}, or any chat request with an id: {"id": "2",
"messages": […], "temperature": 0}. A line of the second is an answer; they are in the order in which they
came. What has an answer there is not asked again: to go on after an interruption, or with what failed, start
it with the same words. The key is read from HEADRACE_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxy.client import Category, ChatError, Client, Limits, Retry


class Bar:
    """What is done, on a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.answered, self.failed = total, 0, 0
        self._begun = time.monotonic()

    def show(self) -> None:
        done = self.answered + self.failed
        if not sys.stderr.isatty() or not done:
            return
        filled = 30 * done // self.total
        left_s = (time.monotonic() - self._begun) / done * (self.total - done)
        state = f"{done}/{self.total}, {self.failed} failed, {left_s:.0f} s left"
        sys.stderr.write(
            f"\r[{'#' * filled}{'.' * (30 - filled)}] {state}\x1b[K" + "\n" * (done == self.total)
        )

    def says(self, line: str) -> None:
        """A line above the bar."""
        sys.stderr.write(f"\r\x1b[K{line}\n" if sys.stderr.isatty() else f"{line}\n")
        self.show()


def requests(prompts: Path, answers: Path) -> list[dict[str, Any]]:
    """What has no answer yet."""
    answered = {line["id"] for line in lines(answers)} if answers.exists() else set()
    return [line for line in lines(prompts) if line["id"] not in answered]


def lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as text:
        yield from (json.loads(line) for line in text if line.strip())


async def work(client: Client, todo: Iterator[dict[str, Any]], asked: argparse.Namespace, bar: Bar) -> None:
    """One of those that work side by side."""
    for line in todo:
        body = {"model": asked.model, "priority": asked.priority, **line}
        name, prompt = body.pop("id"), body.pop("prompt", None)
        body.setdefault("messages", [{"role": "user", "content": prompt}])
        try:
            answer = await client.complete(**body)
        except ChatError as error:
            if error.category is Category.AUTH:
                raise  # so would all others
            bar.failed += 1
            bar.says(f"{name}: {error.category}: {error} ({error.request_id})")
            continue
        row = {"id": name, **answer._asdict()}
        del row["document"]
        with asked.answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        bar.answered += 1
        bar.show()


async def run(asked: argparse.Namespace) -> Bar:
    waiting = requests(asked.prompts, asked.answers)
    todo, bar = iter(waiting), Bar(len(waiting))
    limits = Limits(asked.at_once, asked.per_minute)
    key = os.environ.get("HEADRACE_KEY")
    async with (
        Client(asked.url, key, limits=limits, retry=Retry(attempts=5)) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(asked.at_once):
            group.create_task(work(client, todo, asked, bar))
    return bar


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", default="echo")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--per-minute", type=float)
    parser.add_argument("--priority", type=int, default=-1, help="below 0, the default: others go first")
    try:
        bar = asyncio.run(run(parser.parse_args()))
    except* ChatError as errors:
        sys.exit(f"batch: {errors.exceptions[0]}")
    except* KeyboardInterrupt:
        sys.exit(130)
    sys.stderr.write(f"{bar.answered} answered, {bar.failed} failed\n")
    return 1 if bar.failed else 0


if __name__ == "__main__":
    sys.exit(main())
