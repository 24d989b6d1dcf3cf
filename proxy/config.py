"""The configuration: what a file may say, what it means when left out, and what is wrong with it.

A rule module: no event loop, no clock. It is the one place that reads a configuration file, the files named
in `${file:…}` and the environment (handed in as a mapping). The Structs below are the only source of keys,
defaults, units and descriptions; `_Reader` walks them, so a new key is a new field and nothing else.

All durations are seconds. A relative path in the file is relative to the working directory.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import Meta, inspect

BUILT_IN = "built-in"
MOCK_URL = "mock:"
FILE_NAME = "headrace.yaml"
FILE_VARIABLE = "HEADRACE_CONFIG"

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class ConfigError(Exception):
    """What is wrong, and where: `str()` is `FILE: path.to.the[0].key: message`; an empty path is left out."""

    def __init__(self, source: str, path: str, message: str) -> None:
        super().__init__(source, path, message)
        self.source = source
        self.path = path
        self.message = message

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.path, self.message) if part)


class Secret(str):
    """Text that a log line or a traceback cannot show by accident; `str()` gives the plain text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


class Address(msgspec.Struct, frozen=True):
    """Where a listener binds: host and port (an empty host is every interface), or a unix socket's path."""

    host: str
    port: int
    unix_path: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it: 127.0.0.0/8, ::1, localhost, or a unix socket."""
        if self.unix_path is not None or self.host.lower() == "localhost":
            return True
        ip = _ip(self.host)
        return ip is not None and ip.is_loopback

    def overlaps(self, other: Address) -> bool:
        """Whether the two cannot be bound at once. Port 0 is any free port: it never overlaps."""
        if self.unix_path is not None or other.unix_path is not None:
            return self.unix_path == other.unix_path
        if self.port != other.port or self.port == 0:
            return False
        hosts = [address.host.lower().replace("localhost", "127.0.0.1") for address in (self, other)]
        if "" in hosts or hosts[0] == hosts[1]:
            return True
        ips = [ip for ip in map(_ip, hosts) if ip is not None]
        same_family = len(ips) == 2 and ips[0].version == ips[1].version
        return same_family and (ips[0] == ips[1] or any(ip.is_unspecified for ip in ips))

    def __str__(self) -> str:
        if self.unix_path is not None:
            return f"unix:{self.unix_path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


_ADDRESS_FORMS = "expected host:port, [ipv6]:port, :port or unix:/path"
_ADDRESS = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
_HOST_NAME = re.compile(r"(?!.*\.[0-9]+\.?$)(?![0-9]+$)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def parse_address(text: str) -> Address:
    """Read `host:port`, `[::1]:port`, `:port` (every interface) or `unix:/path`.

    Raises:
        ValueError: it is none of these; the message does not repeat the text.
    """
    if text.startswith("unix:"):
        return Address("", 0, _socket_path(text.removeprefix("unix:")))
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise ValueError(_ADDRESS_FORMS)
    host: str = found["six"] or found["host"] or ""
    ip = _ip(host)
    good = ip is not None and ip.version == 6 if found["six"] else not host or _is_host(host)
    if not good:
        raise ValueError(_ADDRESS_FORMS)
    return Address(host, int(found["port"]))


def _socket_path(path: str) -> str:
    # sun_path is 108 bytes with its final zero (unix(7)); a longer path fails only at bind.
    if not path.startswith("/") or not path.isprintable() or len(path.encode()) > 107:
        raise ValueError("expected unix: and an absolute path of at most 107 bytes")
    return path


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_host(host: str) -> bool:
    return _ip(host) is not None or _HOST_NAME.fullmatch(host) is not None


# ── checks of one value ─────────────────────────────────────────────────────────────────────────────────
# Each takes the text and how an error may show it (an environment variable is shown by its name), gives the
# text to keep, and raises ValueError. They hang on the type aliases below; the reader adds the path.


def _check_address(text: str, shown: str) -> str:
    try:
        parse_address(text)
    except ValueError as error:
        raise ValueError(f"{error}, got {shown}") from None
    return text


def _check_network(text: str, shown: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"expected an IP address or a network without host bits, got {shown}") from None
    return text


def _check_base_url(text: str, shown: str) -> str:
    # The value is never shown: a password or a key in the URL is what this refuses.
    if text == MOCK_URL:
        return text
    if not _is_base_url(text):
        raise ValueError("expected http(s)://host[:port][/path] without user, query and fragment, or 'mock:'")
    return text.rstrip("/")


def _is_base_url(text: str) -> bool:
    if not text.isascii() or not text.isprintable() or re.search(r"[\s?#@\\]", text):
        return False
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and _is_host(parts.hostname or "") and parts.port != 0
    except ValueError:
        return False


def _check_secret(text: str, shown: str) -> str:
    # It becomes a header value: a stray \r from a secret file would fail every request, not the start.
    if not all("!" <= character <= "~" for character in text):
        raise ValueError("has a blank, a line break or another character that a header cannot carry")
    return Secret(text)


def _check_file(text: str, shown: str) -> str:
    try:
        with open(text, "rb"):
            return text
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"expected the path of a file, got {shown}") from None


def _check_upstream_name(text: str, shown: str) -> str:
    # The name goes out as the header x-headrace-upstream.
    if not text or not all("!" <= character <= "~" for character in text):
        raise ValueError("an upstream's name is one or more ASCII characters without blanks")
    return text


def _check_model_name(text: str, shown: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("a model's name is not empty and has only printable characters")
    return text


def _check_text(text: str, shown: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


_Check: TypeAlias = Callable[[str, str], str]

# A year: past it a timer is a typing error, and the event loop's own arithmetic is still exact.
_LONGEST_S = 31_536_000
Seconds = Annotated[float, Meta(gt=0, le=_LONGEST_S)]
SecondsOrOff = Annotated[float, Meta(ge=0, le=_LONGEST_S)]
Bytes = Annotated[int, Meta(gt=0, le=2**53)]
AddressText = Annotated[str, Meta(extra={"check": _check_address})]
NetworkText = Annotated[str, Meta(extra={"check": _check_network})]
BaseUrl = Annotated[str, Meta(extra={"check": _check_base_url})]
SecretText = Annotated[str, Meta(extra={"check": _check_secret, "secret": True})]
ReadableFile = Annotated[str, Meta(extra={"check": _check_file})]
UpstreamName = Annotated[str, Meta(extra={"check": _check_upstream_name})]
ModelName = Annotated[str, Meta(extra={"check": _check_model_name})]
Text = Annotated[str, Meta(extra={"check": _check_text})]


# ── what a file may say ─────────────────────────────────────────────────────────────────────────────────


def _doc(description: str) -> Meta:
    """What the reference says about a field, with its unit."""
    return Meta(description=description)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the file. With `shorthand`, plain text stands for a mapping with that one key."""

    shorthand: ClassVar[str] = ""


class Tls(Section, frozen=True, kw_only=True):
    """TLS of the data listener."""

    cert: Annotated[ReadableFile, _doc("PEM file: the certificate and its chain.")]
    key: Annotated[ReadableFile, _doc("PEM file: the private key.")]


class CallerTimeouts(Section, frozen=True, kw_only=True):
    """How long a caller may take."""

    header: Annotated[Seconds, _doc("Seconds for the whole request head.")] = 10.0
    body: Annotated[Seconds, _doc("Seconds for the whole request body.")] = 60.0
    write: Annotated[Seconds, _doc("Seconds that a write to the caller may be stuck.")] = 60.0
    keepalive: Annotated[Seconds, _doc("Seconds that an idle connection is kept.")] = 75.0


class UpstreamTimeouts(Section, frozen=True, kw_only=True):
    """How long an upstream may take."""

    connect: Annotated[Seconds, _doc("Seconds for DNS, TCP and TLS together.")] = 5.0
    first_byte: Annotated[
        Seconds, _doc("Seconds to the head of the answer; without a stream that is the whole generation.")
    ] = 300.0
    idle: Annotated[Seconds, _doc("Seconds of silence inside an answer.")] = 120.0
    total: Annotated[Seconds, _doc("Seconds for one request with all its attempts.")] = 900.0


class Pool(Section, frozen=True, kw_only=True):
    """The kept connections of one upstream."""

    keepalive: Annotated[SecondsOrOff, _doc("Seconds that an idle connection is kept; 0 keeps none.")] = 15.0
    max_age: Annotated[Seconds, _doc("Seconds after which a connection is not used again.")] = 300.0
    dns_ttl: Annotated[Seconds, _doc("Seconds that a DNS answer is kept.")] = 10.0


class Upstream(Section, frozen=True, kw_only=True):
    """One provider: where it is and how it is spoken to."""

    base_url: Annotated[
        BaseUrl, _doc("http(s)://host[:port][/path], or `mock:` for the embedded mock; no slash at its end.")
    ]
    api_key: Annotated[SecretText | None, _doc("The credential sent upstream; empty is none.")] = None
    auth: Annotated[
        Literal["bearer", "x-api-key", "api-key", "none"], _doc("The header that carries api_key.")
    ] = "bearer"
    timeouts: UpstreamTimeouts = UpstreamTimeouts()
    pool: Pool = Pool()
    ca_file: Annotated[
        ReadableFile | None, _doc("PEM file: the private CA that signed the upstream's certificate.")
    ] = None


class Target(Section, frozen=True, kw_only=True):
    """One upstream of a model. A plain name stands for `{name: …}`."""

    shorthand: ClassVar[str] = "name"

    name: Annotated[Text, _doc("The upstream, as written under `upstreams`.")]
    model: Annotated[Text | None, _doc("The model's name there; left out: as the caller wrote it.")] = None


class Model(Section, frozen=True, kw_only=True):
    """One model name, or a pattern with `*` and `?`."""

    upstreams: Annotated[tuple[Target, ...], Meta(min_length=1), _doc("Where it is served, in order.")]


class Auth(Section, frozen=True, kw_only=True):
    """Who may call."""

    mode: Annotated[
        Literal["required", "open"],
        _doc("`open` ignores every credential; only while `listen` is loopback or a unix socket."),
    ] = "required"


class Streams(Section, frozen=True, kw_only=True):
    """What a silent stream gets."""

    heartbeat: Annotated[
        SecondsOrOff, _doc("Seconds of upstream silence before a comment is sent; 0 is off.")
    ] = 15.0
    commit_after: Annotated[
        SecondsOrOff, _doc("Seconds without a first byte before 200 and comments are sent; 0 is off.")
    ] = 30.0


class Log(Section, frozen=True, kw_only=True):
    """The log."""

    format: Annotated[Literal["json", "text"], _doc("One JSON object a line, or text to read.")] = "json"
    level: Annotated[
        Literal["debug", "info", "warning", "error"], _doc("The least severe line that is written.")
    ] = "info"
    file: Annotated[Text | None, _doc("The file to append to; null is standard output.")] = None


class Settings(Section, frozen=True, kw_only=True):
    """Everything that a configuration file may say."""

    listen: Annotated[
        AddressText, _doc("Data listener: host:port, [ipv6]:port, :port (every interface), unix:/path.")
    ] = "127.0.0.1:8080"
    admin: Annotated[
        AddressText, _doc("Listener of metrics, health and the admin API; never the data listener.")
    ] = "127.0.0.1:9464"
    tls: Annotated[Tls | None, _doc("TLS of the data listener; left out: none.")] = None
    max_connections: Annotated[
        int, Meta(gt=0, le=10_000_000), _doc("Connections of callers held at once.")
    ] = 8000
    trusted_proxies: Annotated[
        tuple[NetworkText, ...], _doc("IP addresses and networks whose X-Forwarded-For is believed.")
    ] = ("127.0.0.1",)
    admin_token: Annotated[SecretText | None, _doc("Bearer token of the admin listener; empty is none.")] = (
        None
    )
    max_body_bytes: Annotated[Bytes, _doc("Bytes of one JSON request body.")] = 33_554_432
    max_buffered_bytes: Annotated[Bytes, _doc("Bytes of all request bodies held at once.")] = 1_073_741_824
    timeouts: CallerTimeouts = CallerTimeouts()
    default_upstream: Annotated[
        str, _doc("The upstream of routes without a model; left out: the first upstream.")
    ] = ""
    upstreams: Annotated[dict[UpstreamName, Upstream], _doc("Providers by name, at least one.")] = (
        msgspec.field(default_factory=dict)
    )
    models: Annotated[
        dict[ModelName, Model],
        _doc("Models by name or pattern; exact names win, then the first pattern in file order."),
    ] = msgspec.field(default_factory=dict)
    auth: Auth = Auth()
    streams: Streams = Streams()
    log: Log = Log()
    drain: Annotated[
        SecondsOrOff, _doc("Seconds that open requests get at shutdown; 0 ends them at once.")
    ] = 120.0


class Config(Settings, frozen=True, kw_only=True, dict=True):
    """A checked configuration: `default_upstream` and every name in it refer to an upstream that exists."""

    source: str
    written_max_connections: bool = False

    @cached_property
    def listen_address(self) -> Address:
        """The data listener."""
        return parse_address(self.listen)

    @cached_property
    def admin_address(self) -> Address:
        """The admin listener."""
        return parse_address(self.admin)

    @cached_property
    def trusted_networks(self) -> tuple[Network, ...]:
        """`trusted_proxies`, ready for `ip in network`."""
        return tuple(ipaddress.ip_network(text) for text in self.trusted_proxies)

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        return tuple((_pattern(name), name) for name in self.models if "*" in name or "?" in name)

    def match_model(self, name: str) -> tuple[str, Model] | None:
        """The configured name (the label of metrics) and the model for what a caller asked for."""
        model = self.models.get(name)
        if model is not None:
            return name, model
        for pattern, configured in self._patterns:
            if pattern.fullmatch(name):
                return configured, self.models[configured]
        return None


def _pattern(glob: str) -> re.Pattern[str]:
    """`*` and `?` only. Atomic groups keep it linear: the name is the caller's, and may be megabytes long."""
    first, *rest = (re.escape(part).replace(r"\?", ".") for part in glob.split("*"))
    if not rest:
        return re.compile(first, re.DOTALL)
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1] if part)
    return re.compile(f"{first}{middle}.*{rest[-1]}", re.DOTALL)


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
                raise ConfigError(self._source, _join(path, key), "is written twice")
            own[key] = self._value(value_node, _join(path, key))
        return {**merged, **own}

    def _key(self, node: yaml.Node, path: str) -> str:
        key = self._value(node, path)
        if not isinstance(key, str):
            raise ConfigError(
                self._source, path, f"expected text as a key, got {_show(key)} (put it in quotes)"
            )
        return key

    def _merge(self, node: yaml.Node, path: str, merged: dict[str, object]) -> None:
        value = self._value(node, _join(path, "<<"))
        for mapping in value if isinstance(value, list) else [value]:
            if not isinstance(mapping, dict):
                raise ConfigError(
                    self._source, _join(path, "<<"), f"expected a mapping, got {_kind(mapping)}"
                )
            for key, item in mapping.items():
                merged.setdefault(key, item)


def _read_yaml(text: str, source: str) -> object:
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


class _Reader:
    """Builds a Section from plain data, with the path of whatever does not fit.

    msgspec.convert writes `[...]` for every key of a mapping, so the walk over `msgspec.inspect` is ours.
    """

    def __init__(self, source: str, environ: Mapping[str, str]) -> None:
        self._source = source
        self._environ = environ

    def section(self, kind: inspect.StructType, raw: object, path: str) -> msgspec.Struct:
        shorthand: str = getattr(kind.cls, "shorthand", "")
        if shorthand and isinstance(raw, str):
            raw = {shorthand: raw}
        written = self._mapping(raw, path)
        known = {field.encode_name: field for field in kind.fields}
        for key in written:
            if key not in known:
                raise self._error(_join(path, key), f"unknown key{_suggest(key, known)}")
        for name, field in known.items():
            if field.required and name not in written:
                raise self._error(_join(path, name), "is missing")
        values = {
            known[key].name: self.value(known[key].type, item, _join(path, key))
            for key, item in written.items()
        }
        return kind.cls(**values)

    def value(self, kind: inspect.Type, raw: object, path: str) -> object:
        match kind:
            case inspect.Metadata():
                return self._annotated(kind, raw, path)
            case inspect.UnionType():
                present = next(option for option in kind.types if not isinstance(option, inspect.NoneType))
                return None if raw is None else self.value(present, raw, path)
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
            case _:
                return self._text(raw, path, _show(raw))

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
            self._check(kind.key_type, name, _join(path, name), _show(name)): self.value(
                kind.value_type, item, _join(path, name)
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
            return self._check(kind, self._text(raw, path, _show(raw)), path, _show(raw))
        text = self._text(raw, path, _kind(raw))
        return self._check(kind, text, path, "***") if text else None

    def _check(self, kind: inspect.Type, text: str, path: str, shown: str) -> str:
        extra = kind.extra or {} if isinstance(kind, inspect.Metadata) else {}
        check: _Check = extra["check"]
        try:
            return check(text, shown)
        except ValueError as error:
            raise self._error(path, str(error)) from None

    def _text(self, raw: object, path: str, shown: str) -> str:
        if not isinstance(raw, str):
            raise self._error(path, f"expected text, got {shown}")
        return self._substitute(raw, path)

    def _choice(self, kind: inspect.LiteralType, raw: object, path: str) -> str:
        choices = [str(choice) for choice in kind.values]
        text = self._substitute(raw, path) if isinstance(raw, str) else ""
        if text not in choices:
            expected = ", ".join(choices)
            hint = _suggest(text, choices)
            raise self._error(path, f"expected one of {expected}, got {_show(raw)}{hint}")
        return text

    def _number(self, kind: inspect.IntType | inspect.FloatType, raw: object, path: str) -> int | float:
        whole = isinstance(kind, inspect.IntType)
        number = self._from_environment(raw, whole, path)
        fraction = whole and isinstance(number, float)
        if isinstance(number, bool) or not isinstance(number, int | float) or fraction:
            raise self._error(path, f"expected a {'whole ' if whole else ''}number, got {_show(raw)}")
        problem = _out_of_bounds(kind, number)
        if problem:
            raise self._error(path, f"{problem}, got {_show(raw)}")
        return number if whole else float(number)

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


def _join(path: str, name: str) -> str:
    return f"{path}.{_step(name)}" if path else _step(name)


def _step(name: str) -> str:
    # An error is one line of a terminal, whatever the file says.
    return name if name.isprintable() else repr(name)[1:-1]


def _show(value: object) -> str:
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


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


# ── checks between values ───────────────────────────────────────────────────────────────────────────────


def _check_config(config: Config) -> Config:
    if not config.upstreams:
        raise ConfigError(config.source, "upstreams", "at least one is needed")
    _check_upstream(config, config.default_upstream, "default_upstream")
    for name, model in config.models.items():
        for index, target in enumerate(model.upstreams):
            _check_upstream(config, target.name, f"{_join('models', name)}.upstreams[{index}]")
    if config.admin_address.overlaps(config.listen_address):
        raise ConfigError(
            config.source, "admin", f"clashes with listen ({config.listen}): give it a port of its own"
        )
    if config.auth.mode == "open" and not config.listen_address.loopback:
        advice = "set auth.mode: required, or listen on 127.0.0.1 or unix:/path"
        message = (
            f"open is allowed only while listen is loopback or a unix socket, not {config.listen}: {advice}"
        )
        raise ConfigError(config.source, "auth.mode", message)
    return config


def _check_upstream(config: Config, name: str, path: str) -> None:
    if name not in config.upstreams:
        raise ConfigError(config.source, path, f"unknown upstream {name!r}{_suggest(name, config.upstreams)}")


# ── the public verbs ────────────────────────────────────────────────────────────────────────────────────


def find(explicit: str | None, environ: Mapping[str, str], cwd: Path) -> Path | None:
    """The file to load: `-c`, then $HEADRACE_CONFIG, then ./headrace.yaml. None: the built-in one."""
    if explicit is not None:
        return Path(explicit)
    if environ.get(FILE_VARIABLE):
        return Path(environ[FILE_VARIABLE])
    beside = cwd / FILE_NAME
    # lexists: a broken link is a mistake to report, not a reason to run open.
    return beside if os.path.lexists(beside) else None


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check a file.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(str(path), "", "cannot be read: it is not UTF-8 text") from None
    return parse(text, str(path), environ)


def parse(text: str, source: str, environ: Mapping[str, str]) -> Config:
    """Read and check the text of a file; `source` is what errors call it.

    Raises:
        ConfigError: something in it is wrong.
    """
    return _build(_read_yaml(text, source), source, environ)


def built_in(environ: Mapping[str, str]) -> Config:
    """The configuration without a file: `echo` on the mock, and the providers with a key in the environment.

    Raises:
        ConfigError: such a key has characters that a header cannot carry.
    """
    upstreams: dict[str, object] = {"mock": {"base_url": MOCK_URL}}
    models: dict[str, object] = {"echo": {"upstreams": ["mock"]}}
    for name, pattern, variable, base_url in _PROVIDERS:
        if environ.get(variable):
            upstreams[name] = {"base_url": base_url, "api_key": f"${{{variable}}}"}
            models[pattern] = {"upstreams": [name]}
    return _build({"upstreams": upstreams, "models": models, "auth": {"mode": "open"}}, BUILT_IN, environ)


_PROVIDERS = (
    ("openai", "gpt-*", "OPENAI_API_KEY", "https://api.openai.com/v1"),
    ("claude", "claude-*", "ANTHROPIC_API_KEY", "https://api.anthropic.com/v1"),
    ("gemini", "gemini-*", "GEMINI_API_KEY", "https://generativelanguage.googleapis.com/v1beta/openai"),
    ("deepseek", "deepseek-*", "DEEPSEEK_API_KEY", "https://api.deepseek.com/v1"),
)


def _build(raw: object, source: str, environ: Mapping[str, str]) -> Config:
    kind = inspect.type_info(Settings)
    assert isinstance(kind, inspect.StructType)
    values = msgspec.structs.asdict(_Reader(source, environ).section(kind, raw, ""))
    values["default_upstream"] = values["default_upstream"] or next(iter(values["upstreams"]), "")
    written = isinstance(raw, dict) and "max_connections" in raw
    return _check_config(Config(**values, source=source, written_max_connections=written))


def with_overrides(config: Config, listen: str | None, admin: str | None) -> Config:
    """The configuration with the listeners of the command line, checked again.

    Raises:
        ConfigError: an address is not one, or does not go with the rest.
    """
    for name, text in (("listen", listen), ("admin", admin)):
        try:
            parse_address(text or ":0")
        except ValueError as error:
            raise ConfigError("command line", name, f"{error}, got {_show(text)}") from None
    changed = msgspec.structs.replace(config, listen=listen or config.listen, admin=admin or config.admin)
    return _check_config(changed)


def describe_routes(config: Config) -> list[str]:
    """One line for each upstream of each model, never a secret: `gpt-4.1 -> openai (https://…) as name`."""
    return [
        f"{name} -> {target.name} ({config.upstreams[target.name].base_url})"
        + (f" as {target.model}" if target.model else "")
        for name, model in config.models.items()
        for target in model.upstreams
    ]
