"""A minute of the soak, and that it would notice: `make soak` is ten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.soak import flat
from tests.soak.__main__ import soak
from tests.soak.flat import MIB, Sample

REST = Sample(0.0, 0, 0, 200 * MIB, 92, 16, 0, 31)


def samples(minutes: float, **per_minute: float) -> list[Sample]:
    """A sample a second; what is named grows by so much a minute, and everything wavers."""
    made = []
    for second in range(round(minutes * 60)):
        grown = {name: round(getattr(REST, name) + each * second / 60) for name, each in per_minute.items()}
        wavers = replace(REST, at_s=float(second), requests=40 * second, fds=118 + second % 7)
        made.append(replace(wavers, memory_bytes=REST.memory_bytes + second % 5 * MIB // 4))
        made[-1] = replace(made[-1], **grown)
    return made


@pytest.mark.parametrize(
    ("minutes", "leak", "named"),
    [
        (8, {}, set()),
        (8, {"memory_bytes": 0.3 * MIB}, set()),
        (8, {"memory_bytes": 0.6 * MIB}, {"memory, bytes"}),
        (0.7, {"memory_bytes": 8 * MIB}, {"memory, bytes"}),
        (8, {"fds": 6}, {"file descriptors"}),
        (8, {"tasks": 3, "redis": 5, "fds": 5}, {"tasks", "Redis connections"}),
        (8, {"connections": 2}, {"upstream connections"}),
        (8, {"memory_bytes": -5 * MIB}, set()),
    ],
)
def test_what_grows_is_named(minutes: float, leak: dict[str, float], named: set[str]) -> None:
    found = flat.lines(samples(minutes, **leak))
    assert {line.name for line in found if not line.flat} == named
    assert sum("GROWS" in text for text in flat.verdicts(found, 1000)) == len(named)


def test_what_is_left_behind_is_named() -> None:
    """One descriptor or task is enough; kept connections to Redis are not taken for either."""
    assert flat.left_behind(REST, replace(REST, fds=REST.fds + 5, redis=REST.redis + 5)) == []
    assert flat.left_behind(REST, replace(REST, fds=90, tasks=10)) == []
    found = flat.left_behind(REST, replace(REST, fds=162, tasks=17, connections=1, redis=100))
    assert [each.partition(":")[0] for each in found] == [
        "file descriptors",
        "tasks",
        "upstream connections",
        "Redis connections",
    ]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(240)
async def test_a_minute() -> None:
    told: list[str] = []
    grown = await soak(60, told.append)
    print("\n".join(told))
    assert grown == []
