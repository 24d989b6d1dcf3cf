"""The layers of the map in `proxy/__init__.py`, held by the source itself."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import proxy
from proxy import cli

PACKAGE = Path(proxy.__file__).parent
#: The map itself and `python -m` have no place in it.
UNMAPPED = {"__init__", "__main__"}
#: Clocks, I/O and loops: nothing that a rule may know of.
NOT_FOR_RULES = {"asyncio", "aiohttp", "time", "datetime", "socket", "ssl", "random", "threading", "uvloop"}
#: Each a module with its parts (`mock_wire`), and who may name it.
ISLANDS: dict[str, set[str]] = {"mock": {"server", "cli_mock"}, "client": set()}
#: Imports modules by name, those of its table: see `ours`.
IMPORTS_BY_NAME = "cli"


def name_of(file: Path) -> str:
    """`pipe`, `middleware.guard`; a package is its name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(), str(file)) for name, file in SOURCES.items()}


def read_map() -> dict[str, list[str]]:
    """Layer -> modules, in order. `middleware/ a, b` stands for the package and its modules."""
    layers: dict[str, list[str]] = {}
    here: list[str] = []
    for line in (proxy.__doc__ or "").splitlines()[3:]:
        if heading := re.fullmatch(r"(\w[\w ]*?)(?: \(.*\))?", line):
            here = layers.setdefault(heading[1], [])
        elif row := re.fullmatch(r"    (\w+)(/?) +(.+)", line):
            name, package, rest = row.groups()
            if package:
                here += [f"{name}.{part.strip()}" for part in rest.split(",")]
            here.append(name)
    return layers


LAYERS = read_map()
ORDER = [name for names in LAYERS.values() for name in names]


def is_type_checking(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that exist while the program runs."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined] # an If
                yield other
                yield from running(other)
            continue
        yield child
        yield from running(child)


def imported(name: str) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a module imports at run time, `from proxy import x` as `proxy.x`."""
    for node in running(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                is_module = inside.removeprefix("proxy.") in SOURCES
                yield (inside if is_module else str(node.module)), node.lineno


def ours(name: str) -> Iterator[tuple[str, int]]:
    """Our own modules that a module imports at run time, now or later, but the package for its version."""
    for dotted, line in imported(name):
        if dotted.startswith("proxy."):
            yield dotted.removeprefix("proxy."), line
    if name == IMPORTS_BY_NAME:
        yield from ((command.module.removeprefix("proxy."), 0) for command in cli.COMMANDS.values())


def mentions(pattern: str, allowed: set[str]) -> list[str]:
    """Places where code (no docstring, no comment) holds this text, outside the allowed modules."""
    return [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if name not in allowed
        for node in ast.walk(tree)
        if isinstance(node, (ast.Attribute, ast.Name)) and re.fullmatch(pattern, ast.unparse(node))
    ]


def test_the_map_can_be_read() -> None:
    """The layers that the other tests speak of are there, each with modules, none of them twice."""
    assert list(LAYERS)[:5] == ["rules", "resources", "data path", "web", "composition"]
    assert all(LAYERS.values())
    assert len(ORDER) == len(set(ORDER))


def test_the_map_is_complete() -> None:
    """Every module is in the map, and the map names only modules that exist."""
    assert set(ORDER) == SOURCES.keys() - UNMAPPED


@pytest.mark.parametrize("name", [name for name in ORDER if name in SOURCES])
def test_imports_go_upwards(name: str) -> None:
    """A module imports at run time only what stands above it; `beside` stands outside the order."""
    above = set(ORDER[: ORDER.index(name)])
    above |= {island for island, known_to in ISLANDS.items() if name in known_to}
    if name in LAYERS["beside"]:
        above &= island_of(name)
    wrong = [f"{name}:{line} imports {other}" for other, line in ours(name) if other not in above]
    assert wrong == []


def test_only_the_commands_are_imported_by_name() -> None:
    """An import that is a string would hide from this file."""
    assert mentions(r"importlib(\..*)?|__import__|exec", {IMPORTS_BY_NAME}) == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_are_where_the_table_says(name: str) -> None:
    """Each module of the table has the function that the command line calls."""
    assert callable(getattr(importlib.import_module(cli.COMMANDS[name].module), f"{name}_parser"))


def test_middlewares_do_not_know_each_other() -> None:
    """Only the package puts them in order."""
    found = [
        f"{name} imports {other}"
        for name in SOURCES
        if name.startswith("middleware.")
        for other, _ in ours(name)
        if other.startswith("middleware")
    ]
    assert found == []


@pytest.mark.parametrize("name", LAYERS["rules"])
def test_rules_know_no_loop_and_no_clock(name: str) -> None:
    """Rule modules import neither loop, nor web server, nor clock: they are functions of arguments."""
    tops = {dotted.partition(".")[0] for dotted, _ in imported(name)}
    assert tops & NOT_FOR_RULES == set()


def test_the_environment_is_read_in_one_place() -> None:
    """Only the command line reads os.environ; everybody else is handed what they need."""
    assert mentions(r"os\.(environb?|getenvb?|putenv)", {"cli"}) == []
    assert not any(
        isinstance(node, ast.ImportFrom) and node.module == "os"
        for tree in TREES.values()
        for node in ast.walk(tree)
    )


def test_metric_names_are_in_one_place() -> None:
    """`headrace_…` is written in metrics.py and nowhere else."""
    found = [
        f"{name}:{node.lineno}: {node.value[:60]!r}"
        for name, tree in TREES.items()
        if name != "metrics"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, (str, bytes))
        and re.search(r"headrace_[a-z]", str(node.value))
    ]
    assert found == []


def test_tasks_are_started_in_one_place() -> None:
    """Only tasks.py calls create_task or ensure_future: nobody loses a task or its failure."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if name != "tasks"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.search(r"\b(create_task|ensure_future)$", ast.unparse(node.func))
    ]
    assert found == []


def island_of(name: str) -> set[str]:
    """All modules of the island that this one is part of."""
    island = name.partition("_")[0]
    return {other for other in SOURCES if other == island or other.startswith(f"{island}_")}


@pytest.mark.parametrize("island", ISLANDS)
def test_islands(island: str) -> None:
    """Few import them (the mock whoever starts it, the client nobody), none but themselves their parts, and
    they import nothing else of ours."""
    parts = island_of(island)
    assert parts <= set(LAYERS["beside"])
    across = {
        (name, other) for name in SOURCES for other, _ in ours(name) if (name in parts) != (other in parts)
    }
    assert across <= {(name, island) for name in ISLANDS[island]}


def test_nothing_happens_on_import() -> None:
    """The top level of a module defines; it calls no function for its effect alone."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if name != "__main__"
        for node in tree.body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and not ast.unparse(node.value.func).endswith(".update")  # a table that is made in two steps
    ]
    assert found == []


def test_errors_are_raised_not_printed() -> None:
    """Only the command line prints."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if not name.startswith("cli")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []
