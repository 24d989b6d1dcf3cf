"""What `headrace doctor` has found, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec


class Level(StrEnum):
    """A hint is no fault: something that could be better, or could not be looked at."""

    OK = "ok"
    HINT = "hint"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True):
    """One line of the report. `fix`: lines of an nginx configuration that mend it."""

    check: str
    level: Level
    text: str
    fix: tuple[str, ...] = ()


def ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def hint(check: str, text: str, *fix: str) -> Finding:
    return Finding(check, Level.HINT, text, fix)


def problem(check: str, text: str, *fix: str) -> Finding:
    return Finding(check, Level.PROBLEM, text, fix)


class Report(msgspec.Struct, frozen=True):
    """All of them, in the order in which they were found."""

    url: str
    checks: Sequence[Finding]

    @property
    def healthy(self) -> bool:
        return not self._count(Level.PROBLEM)

    def nginx(self) -> list[str]:
        """The lines of all fixes, each once."""
        return list(dict.fromkeys(line for found in self.checks for line in found.fix))

    def text(self) -> str:
        """For people: a line a check, then the lines for nginx."""
        lines = [f"{found.level:<8} {found.check:<10} {found.text}" for found in self.checks]
        if self.nginx():
            lines += [
                "",
                "nginx, where it leads to Headrace (nginx/headrace.conf has all of it):",
            ]
            lines += [f"    {line}" for line in self.nginx()]
        problems, hints = self._count(Level.PROBLEM), self._count(Level.HINT)
        return "\n".join([*lines, "", f"{self.url}: {_some(problems, 'problem')}, {_some(hints, 'hint')}"])

    def json(self) -> str:
        document = {
            "url": self.url,
            "healthy": self.healthy,
            "problems": self._count(Level.PROBLEM),
            "hints": self._count(Level.HINT),
            "checks": self.checks,
            "nginx": self.nginx(),
        }
        return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()

    def _count(self, level: Level) -> int:
        return sum(found.level is level for found in self.checks)


def _some(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
