"""YAML text into Structs, with the path of whatever does not fit.

Generic: the Structs say everything (fields, bounds, checks in `Meta(extra={"check": …})`), this module walks
them. Strings may refer to the environment and to files of secrets; their contents never show in a message.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from pathlib import Path

import msgspec
import yaml
from msgspec import inspect

#: A check of one value: takes the text and how to show it, returns the text to keep, raises ValueError.
Check = Callable[[str, str], str]


class ConfigError(Exception):
    """What is wrong, and where: `str()` is `FILE: path.to.the[0].key: message`; an empty path is left out."""

    def __init__(self, source: str, path: str, message: str) -> None:
        super().__init__(source, path, message)
        self.source = source
        self.path = path
        self.message = message

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.path, self.message) if part)


# ── from YAML to plain data ─────────────────────────────────────────────────────────────────────────────


class _Document:
    """One YAML document as dicts, lists and scalars; unlike yaml.load it names the path of an error."""

    _MERGE = "tag:yaml.org,2002:merge"
    _PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._loader = yaml.SafeLoader(text)
        self._done: dict[yaml.Node, object] = {}
        self._open: set[yaml.Node] = set()

    def read(self) -> object:
        node = self._loader.get_single_node()
        return None if node is None else self._value(node, "")

    def _value(self, node: yaml.Node, path: str) -> object:
        # Every node is read once: aliases of aliases stay one object each instead of growing exponentially.
        if node not in self._done:
            if node in self._open:
                raise ConfigError(self._source, path, "refers to itself")
            self._open.add(node)
            self._done[node] = self._fresh(node, path)
            self._open.discard(node)
        return self._done[node]

    def _fresh(self, node: yaml.Node, path: str) -> object:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in self._PLAIN:
            raise ConfigError(self._source, path, "has a YAML tag that is not supported")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        return [self._value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]

    def _scalar(self, node: yaml.ScalarNode, path: str) -> object:
        try:
            return self._loader.construct_object(node)
        except yaml.YAMLError:
            raise ConfigError(self._source, path, "has a YAML tag that is not supported") from None
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            # PyYAML's constructors raise anything: 2024-13-45 is a ValueError, `!!bool x` a KeyError.
            raise ConfigError(
                self._source, path, "is not a value of its YAML type (put it in quotes)"
            ) from None

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, object]:
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == self._MERGE:
                self._merge(value_node, path, merged)
                continue
            key = self._key(key_node, path)
            if key in own:
                raise ConfigError(self._source, join(path, key), "is written twice")
            own[key] = self._value(value_node, join(path, key))
        return {**merged, **own}

    def _key(self, node: yaml.Node, path: str) -> str:
        key = self._value(node, path)
        if not isinstance(key, str):
            raise ConfigError(
                self._source, path, f"expected text as a key, got {show(key)} (put it in quotes)"
            )
        return key

    def _merge(self, node: yaml.Node, path: str, merged: dict[str, object]) -> None:
        value = self._value(node, join(path, "<<"))
        for mapping in value if isinstance(value, list) else [value]:
            if not isinstance(mapping, dict):
                raise ConfigError(self._source, join(path, "<<"), f"expected a mapping, got {_kind(mapping)}")
            for key, item in mapping.items():
                merged.setdefault(key, item)


def read_yaml(text: str, source: str) -> object:
    try:
        return _Document(text, source).read()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        message = f"line {line}, column {column}: a character that YAML does not allow"
    except yaml.MarkedYAMLError as error:
        message = _syntax_message(error)
    except RecursionError:
        message = "is nested too deeply"
    raise ConfigError(source, "", message)


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's problem with its place, without what it quotes: that may be a secret (`api_key: *s3cret`)."""
    problem = re.sub(r"'[^']*'|\"[^\"]*\"", _unquote, str(error.problem))
    mark = error.problem_mark
    return problem if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _unquote(quoted: re.Match[str]) -> str:
    text = quoted[0][1:-1]
    one_character = len(text) == 1 or (len(text) == 2 and text[0] == "\\")
    return quoted[0] if one_character or text.startswith("<") else "'…'"


# ── from plain data to Structs ──────────────────────────────────────────────────────────────────────────


_MOST_USD = 1_000_000


class Reader:
    """Builds a Section from plain data, with the path of whatever does not fit.

    msgspec.convert writes `[...]` for every key of a mapping, so the walk over `msgspec.inspect` is ours.
    """

    def __init__(self, source: str, environ: Mapping[str, str]) -> None:
        self._source = source
        self._environ = environ
        #: What stood in the file for a text that came from elsewhere: a later message shows this instead.
        self.references: dict[str, str] = {}

    def section(self, kind: inspect.StructType, raw: object, path: str) -> msgspec.Struct:
        shorthand: str = getattr(kind.cls, "shorthand", "")
        if shorthand and isinstance(raw, str):
            raw = {shorthand: raw}
        written = self._mapping(raw, path)
        known = {field.encode_name: field for field in kind.fields}
        for key in written:
            if key not in known:
                raise self._error(join(path, key), f"unknown key{suggest(key, known)}")
        for name, field in known.items():
            if field.required and name not in written:
                raise self._error(join(path, name), "is missing")
        values = {
            known[key].name: self.value(known[key].type, item, join(path, key))
            for key, item in written.items()
        }
        return kind.cls(**values)

    def value(self, kind: inspect.Type, raw: object, path: str) -> object:
        match kind:
            case inspect.Metadata():
                return self._annotated(kind, raw, path)
            case inspect.UnionType():
                return self._union(kind, raw, path)
            case inspect.StructType():
                return self.section(kind, raw, path)
            case inspect.DictType():
                return self._dict(kind, raw, path)
            case inspect.VarTupleType():
                return self._tuple(kind, raw, path)
            case inspect.LiteralType():
                return self._choice(kind, raw, path)
            case inspect.IntType() | inspect.FloatType():
                return self._number(kind, raw, path)
            case inspect.DecimalType():
                return self._decimal(raw, path)
            case inspect.BoolType():
                return self._boolean(raw, path)
            case _:
                return self._text(raw, path, show(raw))

    def _union(self, kind: inspect.UnionType, raw: object, path: str) -> object:
        """A value or null; or a number or one of some words."""
        options = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
        if raw is None and len(options) < len(kind.types):
            return None
        text = self._substitute(raw, path) if isinstance(raw, str) else None
        words = [option for option in options if isinstance(option, inspect.LiteralType)]
        if any(text in option.values for option in words):
            return text
        return self.value(next(option for option in options if option not in words), raw, path)

    def _error(self, path: str, message: str) -> ConfigError:
        return ConfigError(self._source, path, message)

    def _mapping(self, raw: object, path: str) -> dict[str, object]:
        # `timeouts:` with every line below it commented out is null, and means what an absent section means.
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            raise self._error(path, f"expected a mapping, got {_kind(raw)}")
        return raw

    def _dict(self, kind: inspect.DictType, raw: object, path: str) -> dict[object, object]:
        return {
            self._check(kind.key_type, name, join(path, name), show(name)): self.value(
                kind.value_type, item, join(path, name)
            )
            for name, item in self._mapping(raw, path).items()
        }

    def _tuple(self, kind: inspect.VarTupleType, raw: object, path: str) -> tuple[object, ...]:
        items = [] if raw is None else raw
        if not isinstance(items, list):
            raise self._error(path, f"expected a list, got {_kind(items)}")
        if len(items) < (kind.min_length or 0):
            raise self._error(path, "at least one is needed")
        return tuple(self.value(kind.item_type, item, f"{path}[{index}]") for index, item in enumerate(items))

    def _annotated(self, kind: inspect.Metadata, raw: object, path: str) -> object:
        extra = kind.extra or {}
        if "check" not in extra:
            return self.value(kind.type, raw, path)
        if not extra.get("secret"):
            return self._check(kind, self._text(raw, path, show(raw)), path, show(raw))
        text = self._text(raw, path, _kind(raw))
        return self._check(kind, text, path, "***") if text else None

    def _check(self, kind: inspect.Type, text: str, path: str, shown: str) -> str:
        extra = kind.extra or {} if isinstance(kind, inspect.Metadata) else {}
        check: Check = extra["check"]
        try:
            return check(text, shown)
        except ValueError as error:
            raise self._error(path, str(error)) from None

    def _text(self, raw: object, path: str, shown: str) -> str:
        if not isinstance(raw, str):
            raise self._error(path, f"expected text, got {shown}")
        text = self._substitute(raw, path)
        if text != raw:
            self.references[text] = raw
        return text

    def _choice(self, kind: inspect.LiteralType, raw: object, path: str) -> str:
        choices = [str(choice) for choice in kind.values]
        text = self._substitute(raw, path) if isinstance(raw, str) else ""
        if text not in choices:
            expected = ", ".join(choices)
            hint = suggest(text, choices)
            raise self._error(path, f"expected one of {expected}, got {show(raw)}{hint}")
        return text

    def _boolean(self, raw: object, path: str) -> bool:
        text = self._substitute(raw, path) if isinstance(raw, str) and "${" in raw else None
        value = {"true": True, "false": False}.get(text.lower()) if text is not None else raw
        if not isinstance(value, bool):
            raise self._error(path, f"expected true or false, got {show(raw)}")
        return value

    def _number(self, kind: inspect.IntType | inspect.FloatType, raw: object, path: str) -> int | float:
        whole = isinstance(kind, inspect.IntType)
        number = self._from_environment(raw, whole, path)
        fraction = whole and isinstance(number, float)
        if isinstance(number, bool) or not isinstance(number, int | float) or fraction:
            raise self._error(path, f"expected a {'whole ' if whole else ''}number, got {show(raw)}")
        problem = _out_of_bounds(kind, number)
        if problem:
            raise self._error(path, f"{problem}, got {show(raw)}")
        return number if whole else float(number)

    def _decimal(self, raw: object, path: str) -> Decimal:
        """US dollars: 0 to 1,000,000, exact to six decimals (`pricing`)."""
        text = self._substitute(raw, path) if isinstance(raw, str) else repr(raw)
        if isinstance(raw, float):  # its repr is the shortest text that means it: 0.1 stays 0.1
            text = f"{Decimal(text):f}"
        if isinstance(raw, bool) or not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text):
            raise self._error(path, f"expected US dollars with at most six decimals, got {show(raw)}")
        if (amount := Decimal(text)) > _MOST_USD:
            raise self._error(path, f"must be at most {_MOST_USD}, got {show(raw)}")
        return amount

    def _from_environment(self, raw: object, whole: bool, path: str) -> object:
        """The number in `${PORT}`; a number in quotes stays text, and an error."""
        if not isinstance(raw, str) or "${" not in raw:
            return raw
        text = self._substitute(raw, path)
        try:
            return int(text) if whole else float(text)
        except ValueError:
            return raw

    def _substitute(self, text: str, path: str) -> str:
        return _REFERENCE.sub(lambda found: self._reference(found, path), text)

    def _reference(self, found: re.Match[str], path: str) -> str:
        if found[0] == "$$":
            return "$"
        if found["file"] is not None:
            return self._secret_file(found["file"], path)
        name, default = found["name"], found["default"]
        if name is None:
            raise self._error(
                path, "expected ${NAME}, ${NAME:-default} or ${file:/path}; a literal ${ is $${"
            )
        value = self._environ.get(name)
        # As in the shell: `:-` also replaces what is set and empty.
        if default is not None and not value:
            return default
        if value is None:
            raise self._error(path, f"the environment variable {name} is not set")
        return value

    def _secret_file(self, name: str, path: str) -> str:
        try:
            text = Path(name).read_bytes().decode()
        except OSError as error:
            raise self._error(path, f"{_step(name)} cannot be read: {error.strerror}") from None
        except ValueError:
            raise self._error(path, f"{_step(name)} is not UTF-8 text") from None
        return text.removesuffix("\n").removesuffix("\r")


# The last alternative is a `${` that is none of the forms: an error, not text.
_REFERENCE = re.compile(
    r"\$\$|\$\{(?:file:(?P<file>[^}]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:(?!\$\{)[^}])*))?)\}|\$\{"
)


def _out_of_bounds(kind: inspect.IntType | inspect.FloatType, number: int | float) -> str:
    # Written so that NaN is out of every bound.
    if kind.gt is not None and not number > kind.gt:
        return f"must be more than {kind.gt}"
    if kind.ge is not None and not number >= kind.ge:
        return f"must be at least {kind.ge}"
    if kind.le is not None and not number <= kind.le:
        return f"must be at most {kind.le}"
    return ""


def join(path: str, name: str) -> str:
    return f"{path}.{_step(name)}" if path else _step(name)


def _step(name: str) -> str:
    # An error is one line of a terminal, whatever the file says.
    return name if name.isprintable() else repr(name)[1:-1]


def show(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, bool):
        return str(value).lower()
    # repr() of an int refuses more than 4300 digits, and hexadecimal YAML can write them.
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 128):
        return repr(value)
    return _kind(value)


def _kind(value: object) -> str:
    """What a value is, without the value: text where a mapping belongs may be a misplaced key."""
    names: dict[type, str] = {str: "text", int: "a number", float: "a number", bool: "a boolean"}
    names |= {list: "a list", dict: "a mapping", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
