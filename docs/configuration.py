"""docs/configuration.md: every key of a configuration, from the Structs of `proxy/schema.py`.

A new field of a Struct is a new row and nothing else. A number says its unit with the first word of its
description, a text what is allowed by its check; where one of them is not known here, building fails.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import inspect

from docs.markdown import code, link, plain, table
from proxy import config, schema

#: A number's unit, by how its description begins; the longest that fits counts.
_UNITS = {
    "Seconds": "s",
    "Bytes": "bytes",
    "Days": "days",
    "USD": "USD",
    "Tokens of the prompt": "USD per million tokens",
    "Tokens of the answer, reasoning": "USD per million tokens",
    "Tokens": "tokens",
    "Tokens a minute": "tokens/min",
    "Requests": "requests",
    "Requests a minute": "requests/min",
    "Such requests": "requests",
    "Such requests a minute": "requests/min",
    "Retries as a share": "share of requests",
    "Share": "share",
    "Failures": "failures",
    "Attempts": "attempts",
    "Connections": "connections",
    "Streams": "streams",
    "Processes": "processes",
    "Answers": "HTTP status",
    # Numbers that count nothing.
    "Asked only while": "",
    "Where the page names none": "",
}
#: What a text may be, by the check that it passes.
_TEXTS = {
    "_check_address": "`host:port`, `:port`, `[ipv6]:port`, `unix:/path`",
    "_check_network": "IP address or CIDR network",
    "_check_base_url": "`http(s)://host[:port][/path]`, `mock:`",
    "_check_secret": "visible ASCII",
    "_check_file": "path of a readable file",
    "_check_upstream_name": "ASCII without blanks",
    "_check_model_name": "printable; `*` and `?` make a pattern",
    "_check_plan_name": "1 to 64 letters, digits, `.`, `-`, `_`",
    "_check_http_url": "`http(s)://host/path`",
    "_check_proxy_url": "`http://[user:password@]host:port`",
    "_check_field_name": "header name that Headrace does not set itself",
    "_check_field_value": "printable ASCII",
    "_check_query_name": "letters, digits, `.`, `~`, `-`, `_`",
    "_check_probe_path": "path with its leading slash",
    "_check_key_database": "`sqlite:PATH`, `redis://…`, `rediss://…`",
    "_check_ledger_database": "`sqlite:PATH`",
    "_check_limit_store": "`memory`, `redis://…`, `rediss://…`",
    "_check_origin": "`scheme://host[:port]`, lower case",
    "_check_text": "not empty",
}
_NAMES: dict[type[inspect.Type], str] = {
    inspect.StructType: "mapping",
    inspect.LiteralType: "word",
    inspect.IntType: "whole number",
    inspect.FloatType: "number",
    inspect.DecimalType: "number",
    inspect.BoolType: "boolean",
    inspect.StrType: "text",
}
#: A year of seconds, and everything larger.
_NO_BOUND = 31_536_000
_COLUMNS = ("Key", "Type", "Unit", "Default", "Allowed", "Meaning")

_HEAD = """# Configuration reference

{generated}

The file is YAML. `headrace` takes the one after `-c`, then `$HEADRACE_CONFIG`, then `./headrace.yaml`;
without any of them it runs the built-in configuration: the model `echo` on the embedded mock, open, on
loopback. `headrace check` validates a file without starting anything and prints its routes; an error names
its path and, where a name is misspelt, the nearest one that exists.

- Every key may be left out unless its default says *required*. An unknown key is an error.
- Durations are seconds, sizes bytes, money US dollars (at most six decimals). `NAME` stands for a name of
  yours.
- Any text may hold `${{NAME}}`, `${{NAME:-default}}` (also where the variable is empty) or
  `${{file:/run/secrets/x}}`; `$$` is a dollar sign. A variable that is not set is an error with the path of
  its key. Such a text may stand where a number or a boolean belongs.
- A relative path is relative to the working directory.
"""

_BETWEEN = """## Checks between values

- There is at least one upstream, and every name of an upstream, a fallback model or a plan exists.
- `admin` is not the address of `listen`.
- `auth.mode: open` only while `listen` is loopback or a unix socket.
- `api_key` or `api_keys`, not both.
- HS256 needs `auth.jwt.secret` and stands alone; RS256 and ES256 need `auth.jwt.jwks_url`. No secret has a
  default.
- A `fallback` is a model's name, never a pattern.
"""


def page(generated: str) -> str:
    kind = inspect.type_info(schema.Settings)
    assert isinstance(kind, inspect.StructType)
    parts = [_HEAD.format(generated=generated), _fixed()]
    for path, section in _sections("", kind):
        heading = f"## {code(path)}" if path else "## Top level"
        rows = [_row(path, field) for field in section.fields]
        parts.append("\n".join([heading, "", _about(section), "", *table(_COLUMNS, rows), ""]))
        if section.cls is schema.Plan:
            parts.append(_shipped())
    return "\n".join([*parts, _BETWEEN])


def _fixed() -> str:
    names = [f"{section}.{name}".strip(".") for section, names in config._FIXED for name in names]
    listed = ", ".join(code(name) for name in names)
    text = (
        f"`headrace reload` changes everything but {listed}, and whether there is `tls` at all: "
        "those need `headrace restart`."
    )
    return textwrap.fill(text, 118, break_on_hyphens=False) + "\n"


def _about(section: inspect.StructType) -> str:
    text = " ".join((section.cls.__doc__ or "").split())
    shorthand = section.cls.shorthand  # type: ignore[attr-defined] # a schema.Section
    return (
        f"{text} Plain text stands for `{{{shorthand}: …}}`." if shorthand and "plain" not in text else text
    )


def _shipped() -> str:
    columns = list(dict.fromkeys(name for plan in schema.SHIPPED_PLANS.values() for name in plan))
    rows = [
        [code(name), *(_value(plan[column]) if column in plan else "" for column in columns)]
        for name, plan in schema.SHIPPED_PLANS.items()
    ]
    intro = "These exist without being written; what a file says of one replaces single values:"
    return "\n".join([intro, "", *table(("Plan", *map(code, columns)), rows), ""])


# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────


def _sections(path: str, kind: inspect.StructType) -> Iterator[tuple[str, inspect.StructType]]:
    """Each mapping of the file once, in its order; one without fields of its own is not left out."""
    seen = set()
    yield path, kind
    for field in kind.fields:
        for inner_path, inner in _inside(_join(path, field.encode_name), field.type):
            if inner.cls not in seen:  # price and list_price are one
                seen.add(inner.cls)
                yield from _sections(inner_path, inner)


def _inside(path: str, kind: inspect.Type) -> Iterator[tuple[str, inspect.StructType]]:
    match kind:
        case inspect.Metadata():
            yield from _inside(path, kind.type)
        case inspect.StructType():
            yield path, kind
        case inspect.UnionType():
            for option in kind.types:
                yield from _inside(path, option)
        case inspect.DictType():
            yield from _inside(f"{path}.NAME", kind.value_type)
        case inspect.VarTupleType():
            yield from _inside(f"{path}[]", kind.item_type)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ── one key ──────────────────────────────────────────────────────────────────────────────────────────────


def _row(path: str, field: inspect.Field) -> list[str]:
    here = _join(path, field.encode_name)
    meaning = _description(field.type)
    sections = list(_inside(here, field.type))
    if not meaning and sections:
        meaning = " ".join((sections[0][1].cls.__doc__ or "").split())
    if sections and "list_price" not in here:
        meaning += f" See {link(code(sections[0][0]), sections[0][0])}."
    unit = _unit(here, field.type, meaning)
    allowed = "; ".join(dict.fromkeys(_allowed(field.type)))
    return [code(here), _type(field.type), unit, _default(field), allowed, meaning]


def _description(kind: inspect.Type) -> str:
    """The words beside a field; msgspec keeps those of several annotations on one level or in two."""
    if not isinstance(kind, inspect.Metadata):
        return ""
    return str((kind.extra_json_schema or {}).get("description") or _description(kind.type))


def _type(kind: inspect.Type) -> str:
    match kind:
        case inspect.Metadata():
            secret = (kind.extra or {}).get("secret")
            return "secret" if secret and isinstance(kind.type, inspect.StrType) else _type(kind.type)
        case inspect.UnionType():
            options = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
            return " or ".join(dict.fromkeys(_type(option) for option in options))
        case inspect.VarTupleType():
            return f"list of {_type(kind.item_type)}"
        case inspect.DictType():
            return f"mapping of {_type(kind.value_type)}"
    return _NAMES[type(kind)]


def _unit(path: str, kind: inspect.Type, meaning: str) -> str:
    """Raises LookupError for a number whose description does not begin with its unit."""
    if "number" not in _type(kind):
        return ""
    fitting = [start for start in _UNITS if re.match(rf"{re.escape(start)}\b", meaning)]
    if not fitting:
        raise LookupError(f"{path}: the description begins with no known unit: {meaning}")
    return _UNITS[max(fitting, key=len)]


def _allowed(kind: inspect.Type) -> Iterator[str]:
    match kind:
        case inspect.Metadata():
            check = (kind.extra or {}).get("check")
            if check is not None:
                yield _TEXTS[check.__name__]
            yield from _allowed(kind.type)
        case inspect.UnionType():
            for option in kind.types:
                yield from _allowed(option)
        case inspect.VarTupleType():
            if kind.min_length:
                yield "at least one"
            yield from _allowed(kind.item_type)
        case inspect.DictType():
            yield from (f"names: {words}" for words in _allowed(kind.key_type))
            yield from _allowed(kind.value_type)
        case _:
            yield from _allowed_value(kind)


def _allowed_value(kind: inspect.Type) -> Iterator[str]:
    match kind:
        case inspect.LiteralType():
            yield ", ".join(code(str(value)) for value in kind.values)
        case inspect.IntType() | inspect.FloatType():
            yield _bounds(kind)
        case inspect.DecimalType():
            yield "0 to 1000000"
        case inspect.BoolType():
            yield "`true`, `false`"


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    """An upper bound that only stops typing errors is not worth a reader's time."""
    most = f" to {plain(kind.le)}" if kind.le is not None and kind.le < _NO_BOUND else ""
    if kind.ge is not None:
        return f"{plain(kind.ge)}{most or ' or more'}"
    if isinstance(kind, inspect.FloatType):
        return f"above 0,{most}" if most else "above 0"
    return f"1{most or ' or more'}"


def _default(field: inspect.Field) -> str:
    if field.required:
        return "*required*"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if isinstance(value, msgspec.Struct):
        return ""
    return _value(value)


def _value(value: Any) -> str:
    match value:
        case None | "" | ():
            return "none"
        case bool():
            return code(str(value).lower())
        case int() | float():
            return plain(value)
        case str():
            return code(value)
        case dict():
            return "none" if not value else code(str(value))
        case Sequence():
            return code(f"[{', '.join(map(str, value))}]")
    raise TypeError(f"no words for {value!r}")
