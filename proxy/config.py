"""The configuration: what a file may say, what it means when left out, and what is wrong with it.

A rule module: no event loop, no clock. It is the one place that reads a configuration file, the files named
in `${file:…}` and the environment (handed in as a mapping). The Structs below are the only source of keys,
defaults, units and descriptions; `yamlstruct` walks them, so a new key is a new field and nothing else.

All durations are seconds. A relative path in the file is relative to the working directory.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, inspect

from proxy.address import Address, is_host, parse_address
from proxy.yamlstruct import ConfigError, Reader, join, read_yaml, show, suggest

BUILT_IN = "built-in"
MOCK_URL = "mock:"
FILE_NAME = "headrace.yaml"
FILE_VARIABLE = "HEADRACE_CONFIG"

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Secret(str):
    """Text that a log line or a traceback cannot show by accident; `str()` gives the plain text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


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
        return parts.scheme in ("http", "https") and is_host(parts.hostname or "") and parts.port != 0
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
    workers: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | Literal["auto"], _doc("Processes; auto is one per core.")
    ] = 1
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

    @property
    def worker_count(self) -> int:
        """`workers` as a number."""
        return len(os.sched_getaffinity(0)) if self.workers == "auto" else self.workers

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


# ── checks between values ───────────────────────────────────────────────────────────────────────────────


def _check_config(config: Config) -> Config:
    if not config.upstreams:
        raise ConfigError(config.source, "upstreams", "at least one is needed")
    _check_upstream(config, config.default_upstream, "default_upstream")
    for name, model in config.models.items():
        for index, target in enumerate(model.upstreams):
            _check_upstream(config, target.name, f"{join('models', name)}.upstreams[{index}]")
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
        raise ConfigError(config.source, path, f"unknown upstream {name!r}{suggest(name, config.upstreams)}")


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
    return _build(read_yaml(text, source), source, environ)


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
    values = msgspec.structs.asdict(Reader(source, environ).section(kind, raw, ""))
    values["default_upstream"] = values["default_upstream"] or next(iter(values["upstreams"]), "")
    written = isinstance(raw, dict) and "max_connections" in raw
    return _check_config(Config(**values, source=source, written_max_connections=written))


def with_overrides(
    config: Config, listen: str | None, admin: str | None, workers: int | Literal["auto"] | None = None
) -> Config:
    """The configuration with the listeners and workers of the command line, checked again.

    Raises:
        ConfigError: an address is not one, or does not go with the rest.
    """
    for name, text in (("listen", listen), ("admin", admin)):
        try:
            parse_address(text or ":0")
        except ValueError as error:
            raise ConfigError("command line", name, f"{error}, got {show(text)}") from None
    changed = msgspec.structs.replace(
        config,
        listen=listen or config.listen,
        admin=admin or config.admin,
        workers=workers or config.workers,
    )
    return _check_config(changed)


def describe_routes(config: Config) -> list[str]:
    """One line for each upstream of each model, never a secret: `gpt-4.1 -> openai (https://…) as name`."""
    return [
        f"{name} -> {target.name} ({config.upstreams[target.name].base_url})"
        + (f" as {target.model}" if target.model else "")
        for name, model in config.models.items()
        for target in model.upstreams
    ]
