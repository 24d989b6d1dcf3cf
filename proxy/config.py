"""The configuration: loads it, and says what is wrong with it.

A rule module: no event loop, no clock. It is the one place that reads a configuration file, the files named
in `${file:…}` and the environment (handed in as a mapping). What a file may say, with every default, is
`schema`; how text becomes those Structs is `yamlstruct`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from msgspec import inspect

from proxy.address import Address, parse_address
from proxy.patterns import compile_pattern, is_pattern
from proxy.schema import MOCK_URL, SHIPPED_PLANS, Model, Settings
from proxy.yamlstruct import ConfigError, Reader, join, read_yaml, show, suggest

BUILT_IN = "built-in"
FILE_NAME = "headrace.yaml"
FILE_VARIABLE = "HEADRACE_CONFIG"

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


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
        return tuple((compile_pattern(name), name) for name in self.models if is_pattern(name))

    def match_model(self, name: str) -> tuple[str, Model] | None:
        """The configured name (the label of metrics) and the model for what a caller asked for."""
        model = self.models.get(name)
        if model is not None:
            return name, model
        for pattern, configured in self._patterns:
            if pattern.fullmatch(name):
                return configured, self.models[configured]
        return None


# ── checks between values ───────────────────────────────────────────────────────────────────────────────


def _check_config(config: Config) -> Config:
    if not config.upstreams:
        raise ConfigError(config.source, "upstreams", "at least one is needed")
    _check_upstream(config, config.default_upstream, "default_upstream")
    for name, model in config.models.items():
        _check_model(config, join("models", name), model)
    for name, upstream in config.upstreams.items():
        if upstream.api_key and upstream.api_keys:
            path = f"{join('upstreams', name)}.api_keys"
            raise ConfigError(config.source, path, "write api_key or api_keys, not both")
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
    _check_jwt(config)
    _check_browser_api(config)
    return config


def _check_model(config: Config, path: str, model: Model) -> None:
    for index, target in enumerate(model.upstreams):
        _check_upstream(config, target.name, f"{path}.upstreams[{index}]")
    for index, other in enumerate(model.fallback):
        place = f"{path}.fallback[{index}]"
        if is_pattern(other):
            raise ConfigError(config.source, place, f"expected a model's name, got the pattern {other!r}")
        if config.match_model(other) is None:
            message = f"unknown model {other!r}{suggest(other, config.models)}"
            raise ConfigError(config.source, place, message)


def _check_jwt(config: Config) -> None:
    jwt = config.auth.jwt
    if jwt is None:
        return
    symmetric = "HS256" in jwt.algorithms
    if symmetric and len(set(jwt.algorithms)) > 1:
        message = "HS256 cannot stand beside the others: a public key would become a shared secret"
        raise ConfigError(config.source, "auth.jwt.algorithms", message)
    if symmetric and jwt.secret is None:
        raise ConfigError(config.source, "auth.jwt.secret", "is missing: HS256 has no default secret")
    if not symmetric and jwt.jwks_url is None:
        raise ConfigError(config.source, "auth.jwt.jwks_url", f"is missing: {jwt.algorithms[0]} needs it")


def _check_browser_api(config: Config) -> None:
    api = config.browser_api
    if api is None:
        return
    if config.match_model(api.model) is None:
        message = f"unknown model {api.model!r}{suggest(api.model, config.models)}"
        raise ConfigError(config.source, "browser_api.model", message)
    if api.plan not in config.plans:
        message = f"unknown plan {api.plan!r}{suggest(api.plan, config.plans)}"
        raise ConfigError(config.source, "browser_api.plan", message)


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
    raw = {
        "upstreams": upstreams,
        "models": models,
        "auth": {"mode": "open"},
        "browser_api": {"model": "echo"},
    }
    return _build(raw, BUILT_IN, environ)


_PROVIDERS = (
    ("openai", "gpt-*", "OPENAI_API_KEY", "https://api.openai.com/v1"),
    ("claude", "claude-*", "ANTHROPIC_API_KEY", "https://api.anthropic.com/v1"),
    ("gemini", "gemini-*", "GEMINI_API_KEY", "https://generativelanguage.googleapis.com/v1beta/openai"),
    ("deepseek", "deepseek-*", "DEEPSEEK_API_KEY", "https://api.deepseek.com/v1"),
)


@cache
def _settings_type() -> inspect.StructType:
    """Nine milliseconds, once."""
    kind = inspect.type_info(Settings)
    assert isinstance(kind, inspect.StructType)
    return kind


def _build(raw: object, source: str, environ: Mapping[str, str]) -> Config:
    raw = _with_shipped_plans(raw)
    reader = Reader(source, environ)
    values = msgspec.structs.asdict(reader.section(_settings_type(), raw, ""))
    values["default_upstream"] = values["default_upstream"] or next(iter(values["upstreams"]), "")
    written = isinstance(raw, dict) and "max_connections" in raw
    try:
        return _check_config(Config(**values, source=source, written_max_connections=written))
    except ConfigError as error:
        raise _without_contents(error, reader.references) from None


def _without_contents(error: ConfigError, references: Mapping[str, str]) -> ConfigError:
    """A name that nothing has may be a secret in the wrong place: `default_upstream: ${OPENAI_API_KEY}`."""
    message = error.message
    for text, reference in references.items():
        message = message.replace(repr(text), repr(reference))
    return ConfigError(error.source, error.path, message)


def _with_shipped_plans(raw: object) -> object:
    """What a written plan says goes over the shipped one of its name; mistakes are the reader's to name."""
    if not isinstance(raw, dict | None) or not isinstance((raw or {}).get("plans", {}), dict | None):
        return raw
    plans: dict[str, object] = dict(SHIPPED_PLANS)
    for name, plan in ((raw or {}).get("plans") or {}).items():
        shipped = SHIPPED_PLANS.get(name, {})
        plans[name] = {**shipped, **plan} if isinstance(plan, dict) else plan or shipped
    return {**(raw or {}), "plans": plans}


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


# ── what a running server cannot follow ─────────────────────────────────────────────────────────────────

#: What a reload cannot change, because it is bound or built once.
_FIXED = (
    ("", ("listen", "admin", "workers", "log", "admin_token")),
    ("limits", ("store", "on_store_failure")),
    ("ledger", ("database",)),
)
_NOT_NOW = "cannot change while running: use `headrace restart`"


def check_fixed(old: Config, new: Config) -> None:
    """Raises ConfigError for a change that only a restart can make."""
    for section, names in _FIXED:
        before, after = (getattr(each, section) if section else each for each in (old, new))
        for name in names:
            if getattr(before, name) != getattr(after, name):
                raise ConfigError(new.source, f"{section}.{name}".strip("."), _NOT_NOW)
    if (old.tls is None) != (new.tls is None):
        raise ConfigError(new.source, "tls", _NOT_NOW)
