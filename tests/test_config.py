"""The configuration: one happy path, every message, and nothing but ConfigError for whatever a file holds."""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import config, schema
from proxy.address import Address, parse_address
from proxy.config import Config, check_fixed, parse
from proxy.schema import Target
from proxy.yamlstruct import ConfigError

ENVIRON = {"OPENAI_API_KEY": "sk-canary-1", "ADMIN": "adm-canary-2", "PORT": "9000", "EMPTY": ""}
UP = "upstreams: {openai: {base_url: 'http://127.0.0.1:1/v1'}}\n"

EVERYTHING = """
listen: 127.0.0.1:8080
admin: unix:/run/headrace/admin.sock
tls: {cert: CERT, key: KEY}
max_connections: 100
trusted_proxies: [127.0.0.1, 10.0.0.0/8, "fd00::/8"]
admin_token: ${ADMIN}
max_body_bytes: 1000
max_buffered_bytes: 2000
timeouts: {header: 1, body: 2, write: 3, keepalive: 4.5}
default_upstream: backup
upstreams:
  openai:
    base_url: https://api.openai.com/v1/
    api_key: ${OPENAI_API_KEY}
    auth: x-api-key
    timeouts: {connect: 6, first_byte: 7, idle: 8, total: 9}
    pool: {keepalive: 0, max_age: 10, dns_ttl: 11}
    ca_file: CERT
  backup: {base_url: "mock:"}
models:
  gpt-4.1: {upstreams: [openai, {name: backup, model: gpt-4.1-eu}]}
  "claude-*": {upstreams: [backup]}
auth: {mode: open}
streams: {heartbeat: 0, commit_after: 0}
log: {format: text, level: debug, file: headrace.log}
drain: 0
"""


def bad(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "FILE", ENVIRON)
    assert "canary" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def everything(tmp_path: Path) -> Config:
    for name in ("CERT", "KEY"):
        (tmp_path / name).touch()
    text = EVERYTHING.replace("CERT", str(tmp_path / "CERT")).replace("KEY}", str(tmp_path / "KEY") + "}", 1)
    return parse(text, "FILE", ENVIRON)


def test_everything_that_is_written_is_kept(everything: Config, tmp_path: Path) -> None:
    assert everything.source == "FILE"
    assert everything.listen_address == Address("127.0.0.1", 8080)
    assert everything.admin_address == Address("", 0, "/run/headrace/admin.sock")
    assert everything.tls == schema.Tls(cert=str(tmp_path / "CERT"), key=str(tmp_path / "KEY"))
    assert (everything.max_connections, everything.written_max_connections) == (100, True)
    assert ipaddress.ip_address("10.1.2.3") in everything.trusted_networks[1]
    assert everything.admin_token == "adm-canary-2"
    assert (everything.max_body_bytes, everything.max_buffered_bytes) == (1000, 2000)
    assert everything.timeouts == schema.CallerTimeouts(header=1.0, body=2.0, write=3.0, keepalive=4.5)
    assert everything.default_upstream == "backup"
    assert everything.upstreams["openai"] == schema.Upstream(
        base_url="https://api.openai.com/v1",
        api_key="sk-canary-1",
        auth="x-api-key",
        timeouts=schema.UpstreamTimeouts(connect=6.0, first_byte=7.0, idle=8.0, total=9.0),
        pool=schema.Pool(keepalive=0.0, max_age=10.0, dns_ttl=11.0),
        ca_file=str(tmp_path / "CERT"),
    )
    assert everything.models["gpt-4.1"].upstreams == (
        Target(name="openai"),
        Target(name="backup", model="gpt-4.1-eu"),
    )
    assert everything.auth.mode == "open"
    assert everything.streams == schema.Streams(heartbeat=0.0, commit_after=0.0)
    assert everything.log == schema.Log(format="text", level="debug", file="headrace.log")
    assert everything.drain == 0


def test_defaults() -> None:
    read = parse(UP, "FILE", {})
    assert read == Config(
        upstreams=read.upstreams, plans=read.plans, default_upstream="openai", source="FILE"
    )
    assert read.plans == {
        "basic": schema.Plan(
            requests_per_minute=30, burst=10, tokens_per_minute=100_000, max_in_flight=5, priority=0
        ),
        "pro": schema.Plan(requests_per_minute=100, burst=20, max_in_flight=20, priority=5),
        "enterprise": schema.Plan(requests_per_minute=500, burst=100, max_in_flight=100, priority=10),
        "anonymous": schema.Plan(requests_per_minute=30, burst=20, max_in_flight=2),
    }
    assert (read.listen, read.admin, read.auth.mode) == ("127.0.0.1:8080", "127.0.0.1:9464", "required")
    assert (read.max_connections, read.written_max_connections) == (8000, False)
    assert (read.upstreams["openai"].auth, read.upstreams["openai"].api_key) == ("bearer", None)
    assert isinstance(parse(UP + "drain: 5", "FILE", {}).drain, float)


def test_an_empty_section_is_an_absent_section() -> None:
    assert parse(UP + "timeouts:\nmodels:\ntrusted_proxies:\ntls:\n", "FILE", {}).timeouts.header == 10
    assert parse(UP + "trusted_proxies:", "FILE", {}).trusted_proxies == ()


def test_repr_and_routes_hold_no_secret(everything: Config) -> None:
    assert "canary" not in repr(everything)
    assert config.describe_routes(everything) == [
        "gpt-4.1 -> openai (https://api.openai.com/v1)",
        "gpt-4.1 -> backup (mock:) as gpt-4.1-eu",
        "claude-* -> backup (mock:)",
    ]


MODEL = UP + "models: {gpt-4.1: {upstreams: [%s]}}"
UPSTREAM = "upstreams: {openai: {base_url: 'mock:', %s}}"
PLAN_NAME = "a plan's name is 1 to 64 letters, digits, dots, dashes or underscores"
PROXY = "upstreams.openai.proxy: expected http://[user:password@]host:port"
KEYS = "expected sqlite:PATH, redis://… or rediss://…"
BASE_URL = (
    "upstreams.openai.base_url: "
    "expected http(s)://host[:port][/path] without user, query and fragment, or 'mock:'"
)
FORMS = "expected host:port, [ipv6]:port, :port or unix:/path"

BAD = [
    ("", "upstreams: at least one is needed"),
    ("# nothing\n", "upstreams: at least one is needed"),
    ("upstreams: {}", "upstreams: at least one is needed"),
    ("upstreams:", "upstreams: at least one is needed"),
    ("[1]", "expected a mapping, got a list"),
    ("hello", "expected a mapping, got text"),
    # YAML
    ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
    ("a: 1\nb:\n\t- c", "line 3, column 1: found character '\\t' that cannot start any token"),
    ("listen: [", "line 1, column 10: expected the node content, but found '<stream end>'"),
    ("a: 1\nb: \x00", "line 2, column 4: a character that YAML does not allow"),
    ("admin_token: *sk-canary", "line 1, column 14: found undefined alias '…'"),
    ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
    ("[" * 5000, "is nested too deeply"),
    ("&a {upstreams: *a}", "upstreams: refers to itself"),
    ("upstreams: !!python/name:os.system {}", "upstreams: has a YAML tag that is not supported"),
    ("admin_token: !sk-canary x", "admin_token: has a YAML tag that is not supported"),
    ("drain: !!bool x", "drain: is not a value of its YAML type (put it in quotes)"),
    ("drain: 2024-13-45", "drain: is not a value of its YAML type (put it in quotes)"),
    ("drain: " + "9" * 5000, "drain: is not a value of its YAML type (put it in quotes)"),
    (UP + "models: {x: {upstreams: [openai]}, x: {}}", "models.x: is written twice"),
    (UP + UP, "upstreams: is written twice"),
    (UP + "models: {4: {upstreams: [openai]}}", "models: expected text as a key, got 4 (put it in quotes)"),
    (UP + "models: {[a]: 1}", "models: expected text as a key, got a list (put it in quotes)"),
    ("on: 1", "expected text as a key, got true (put it in quotes)"),
    ("<<: 3", "<<: expected a mapping, got a number"),
    # keys
    ("upstream: {}", "upstream: unknown key (did you mean 'upstreams'?)"),
    (UPSTREAM % "timeout: {}", "upstreams.openai.timeout: unknown key (did you mean 'timeouts'?)"),
    (UPSTREAM % "zzz: 1", "upstreams.openai.zzz: unknown key"),
    (UPSTREAM % "api_kees: [sk-canary]", "upstreams.openai.api_kees: unknown key (did you mean 'api_keys'?)"),
    (
        UPSTREAM % "api_key: a, api_keys: [b]",
        "upstreams.openai.api_keys: write api_key or api_keys, not both",
    ),
    (UPSTREAM % "proxy: 'socks5://h:1'", "upstreams.openai.proxy: expected http://[user:password@]host:port"),
    (UPSTREAM % "headers: {Host: x}", "upstreams.openai.headers.Host: Host is set by Headrace itself"),
    (
        UPSTREAM % "probe: {path: 'http://x/'}",
        "upstreams.openai.probe.path: expected a path like /health or /v1/models, got 'http://x/'",
    ),
    (
        UP + "models: {x: {upstreams: [openai], price: {input: 1}}}",
        "models.x.price.output: is missing",
    ),
    (
        UP + "models: {x: {upstreams: [openai], price: {input: 0.0000001, output: 1}}}",
        "models.x.price.input: expected US dollars with at most six decimals, got 1e-07",
    ),
    (
        UP + "models: {x: {upstreams: [openai], price: {input: -1, output: 1}}}",
        "models.x.price.input: expected US dollars with at most six decimals, got -1",
    ),
    (
        UP + "plans: {pro: {budget_day: 1000001}}",
        "plans.pro.budget_day: must be at most 1000000, got 1000001",
    ),
    (UP + "streams: {on_disconnect: cancle}", "streams.on_disconnect: expected a mapping, got text"),
    (UP + "ledger: {database: 'redis://x'}", "ledger.database: expected sqlite:PATH, got 'redis://x'"),
    (UP + "workers: 0", "workers: must be at least 1, got 0"),
    (UP + "workers: atuo", "workers: expected a whole number, got 'atuo'"),
    (UP + "source: x", "source: unknown key"),
    (
        UP + "written_max_connections: true",
        "written_max_connections: unknown key (did you mean 'max_connections'?)",
    ),
    (UP + '"a\\nb": 1', "a\\nb: unknown key"),
    ("upstreams: {openai: {}}", "upstreams.openai.base_url: is missing"),
    ("upstreams: {openai: }", "upstreams.openai.base_url: is missing"),
    (UP + "models: {x: {}}", "models.x.upstreams: is missing"),
    (
        UP + "models: {gpt: {upstreams: [openai], fallback: [gtp]}}",
        "models.gpt.fallback[0]: unknown model 'gtp' (did you mean 'gpt'?)",
    ),
    (
        UP + "models: {gpt: {upstreams: [openai], fallback: ['g*']}, 'g*': {upstreams: [openai]}}",
        "models.gpt.fallback[0]: expected a model's name, got the pattern 'g*'",
    ),
    (UP + "models: {x: }", "models.x.upstreams: is missing"),
    (UP + "tls: {key: /dev/null}", "tls.cert: is missing"),
    (MODEL % "{model: x}", "models.gpt-4.1.upstreams[0].name: is missing"),
    # types
    (
        UPSTREAM % "timeouts: {connect: abc}",
        "upstreams.openai.timeouts.connect: expected a number, got 'abc'",
    ),
    (UPSTREAM % "timeouts: {connect: '5'}", "upstreams.openai.timeouts.connect: expected a number, got '5'"),
    (
        UPSTREAM % "timeouts: {connect: true}",
        "upstreams.openai.timeouts.connect: expected a number, got true",
    ),
    (UPSTREAM % "timeouts: {connect: }", "upstreams.openai.timeouts.connect: expected a number, got null"),
    (
        UPSTREAM % "timeouts: {connect: [1]}",
        "upstreams.openai.timeouts.connect: expected a number, got a list",
    ),
    (UPSTREAM % "timeouts: {connect: 0}", "upstreams.openai.timeouts.connect: must be more than 0, got 0"),
    (UPSTREAM % "timeouts: {idle: .nan}", "upstreams.openai.timeouts.idle: must be more than 0, got nan"),
    (
        UPSTREAM % "timeouts: {idle: .inf}",
        "upstreams.openai.timeouts.idle: must be at most 31536000, got inf",
    ),
    (UPSTREAM % "timeouts: 5", "upstreams.openai.timeouts: expected a mapping, got a number"),
    (UPSTREAM % "pool: {keepalive: -1}", "upstreams.openai.pool.keepalive: must be at least 0, got -1"),
    (UP + "max_connections: 1.5", "max_connections: expected a whole number, got 1.5"),
    (UP + "max_connections: 0", "max_connections: must be more than 0, got 0"),
    (
        UP + "max_body_bytes: 0x" + "f" * 9999,
        "max_body_bytes: must be at most 9007199254740992, got a number",
    ),
    (UP + "drain: 2024-01-01", "drain: expected a number, got a date"),
    (UP + "streams: {heartbeat: off}", "streams.heartbeat: expected a number, got false"),
    ("upstreams: {openai: sk-canary}", "upstreams.openai: expected a mapping, got text"),
    (UPSTREAM % "api_key: 12345", "upstreams.openai.api_key: expected text, got a number"),
    (UP + "admin_token: [adm-canary]", "admin_token: expected text, got a list"),
    (UP + "trusted_proxies: 127.0.0.1", "trusted_proxies: expected a list, got text"),
    (UP + "models: [x]", "models: expected a mapping, got a list"),
    (UP + "listen: 8080", "listen: expected text, got 8080"),
    (
        UPSTREAM % "auth: barer",
        "upstreams.openai.auth: expected one of api-key, bearer, none, x-api-key, got 'barer' "
        "(did you mean 'bearer'?)",
    ),
    (UP + "log: {format: 1}", "log.format: expected one of json, text, got 1"),
    (UP + "auth: {mode: }", "auth.mode: expected one of open, required, got null"),
    # values
    (UP + "listen: nonsense", f"listen: {FORMS}, got 'nonsense'"),
    (UP + "listen: ${ADMIN}", f"listen: {FORMS}, got '${{ADMIN}}'"),
    (UP + "listen: ::1:80", f"listen: {FORMS}, got '::1:80'"),
    (UP + "admin: unix:x", "admin: expected unix: and an absolute path of at most 107 bytes, got 'unix:x'"),
    (
        UP + "trusted_proxies: ['::1', 10.0.0.1/8]",
        "trusted_proxies[1]: expected an IP address or a network without host bits, got '10.0.0.1/8'",
    ),
    ("upstreams: {openai: {base_url: 'https://u:canary@h/v1'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'https://h/v1?key=canary'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'https://h/#canary'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'https://h:99999'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'https://[::1'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'https:///v1'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'ftp://h'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'h/v1'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'mock:x'}}", BASE_URL),
    ("upstreams: {openai: {base_url: 'http://h/ a'}}", BASE_URL),
    (
        UPSTREAM % '"api_key": "sk-canary\\r"',
        "upstreams.openai.api_key: has a blank, a line break or another character that a header cannot carry",
    ),
    (
        'upstreams: {"a b": {base_url: "mock:"}}',
        "upstreams.a b: an upstream's name is one or more ASCII characters without blanks",
    ),
    (
        UP + "models: {'': {upstreams: [openai]}}",
        "models.: a model's name is not empty and has only printable characters",
    ),
    (UP + "models: {x: {upstreams: []}}", "models.x.upstreams: at least one is needed"),
    (MODEL % "{name: openai, model: ''}", "models.gpt-4.1.upstreams[0].model: must not be empty"),
    (UP + "tls: {cert: /nowhere/c, key: /nowhere/k}", "tls.cert: cannot be read: No such file or directory"),
    (UPSTREAM % "ca_file: /", "upstreams.openai.ca_file: cannot be read: Is a directory"),
    (UP + "playground: [1]", "playground: expected true or false, got a list"),
    (UPSTREAM % 'ca_file: "a\\0b"', r"upstreams.openai.ca_file: expected the path of a file, got 'a\x00b'"),
    (UP + "plans: {'a b': {}}", f"plans.a b: {PLAN_NAME}"),
    (UPSTREAM % "proxy: 'socks5://u:canary@h:1'", PROXY),
    (UPSTREAM % "proxy: 'http://u:canary@h:99999'", PROXY),
    (UPSTREAM % "proxy: 'http://[canary'", PROXY),
    (
        UPSTREAM % "headers: {'a b': c}",
        "upstreams.openai.headers.a b: a header's name is 1 to 100 letters, digits or dashes",
    ),
    (UPSTREAM % "headers: {Host: canary}", "upstreams.openai.headers.Host: Host is set by Headrace itself"),
    (
        UPSTREAM % 'headers: {a: "canary\\n"}',
        "upstreams.openai.headers.a: has a line break or another character that a header cannot carry",
    ),
    (
        UPSTREAM % "query: {'a&b': c}",
        "upstreams.openai.query.a&b: a query parameter's name is 1 to 100 letters, digits, dots, dashes or "
        "underscores",
    ),
    (UP + "auth: {database: 'mysql://u:canary@h'}", f"auth.database: {KEYS}"),
    (UP + "auth: {database: 'redis://[canary'}", f"auth.database: {KEYS}"),
    (UP + "limits: {store: 'mysql://u:canary@h'}", "limits.store: expected memory, redis://… or rediss://…"),
    (
        UP + "cors: {origins: ['https://App.example/']}",
        "cors.origins[0]: expected scheme://host or scheme://host:port in lower case as browsers send it, "
        "got 'https://App.example/'",
    ),
    # tokens
    (UP + "auth: {jwt: {jwks_url: 'ftp://h/keys'}}", "auth.jwt.jwks_url: expected http(s)://host/path"),
    (
        UP + "auth: {jwt: {algorithms: [HS256, RS256], secret: " + 32 * "x" + "}}",
        "auth.jwt.algorithms: HS256 cannot stand beside the others: a public key would become a shared "
        "secret",
    ),
    (UP + "auth: {jwt: {}}", "auth.jwt.secret: is missing: HS256 has no default secret"),
    (
        UP + "auth: {jwt: {algorithms: [RS256]}}",
        "auth.jwt.jwks_url: is missing: RS256 needs it",
    ),
    # between values
    (MODEL % "opnai", "models.gpt-4.1.upstreams[0]: unknown upstream 'opnai' (did you mean 'openai'?)"),
    (MODEL % "openai, {name: zzz}", "models.gpt-4.1.upstreams[1]: unknown upstream 'zzz'"),
    (UP + "default_upstream: opnai", "default_upstream: unknown upstream 'opnai' (did you mean 'openai'?)"),
    (
        UP + "admin: 127.0.0.1:8080",
        "admin: clashes with listen (127.0.0.1:8080): give it a port of its own",
    ),
    (
        UP + "listen: :80\nauth: {mode: open}",
        "auth.mode: open is allowed only while listen is loopback or a unix socket, not :80: "
        "set auth.mode: required, or listen on 127.0.0.1 or unix:/path",
    ),
    # environment
    (UPSTREAM % "api_key: '${NOPE}'", "upstreams.openai.api_key: the environment variable NOPE is not set"),
    (MODEL % "'${NOPE}'", "models.gpt-4.1.upstreams[0].name: the environment variable NOPE is not set"),
    (
        UP + "admin_token: '${1a}'",
        "admin_token: expected ${NAME}, ${NAME:-default} or ${file:/path}; a literal ${ is $${",
    ),
    (
        UP + "admin_token: ${ADMIN",
        "admin_token: expected ${NAME}, ${NAME:-default} or ${file:/path}; a literal ${ is $${",
    ),
    (
        UP + "admin_token: ${file:/nowhere/x}",
        "admin_token: /nowhere/x cannot be read: No such file or directory",
    ),
    (UP + "drain: ${ADMIN}", "drain: expected a number, got '${ADMIN}'"),
    (
        UP + "log: {level: '${ADMIN}'}",
        "log.level: expected one of debug, error, info, warning, got '${ADMIN}'",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_bad(text: str, message: str) -> None:
    assert bad(text) == f"FILE: {message}"


@pytest.mark.parametrize(("name", "value"), [("tls", None), ("admin_token", "another"), ("workers", 3)])
def test_what_only_a_restart_changes(everything: Config, name: str, value: object) -> None:
    """A listener neither begins nor ceases to speak TLS while it runs."""
    check_fixed(everything, msgspec.structs.replace(everything, drain=1.0))
    with pytest.raises(ConfigError, match=f"FILE: {name}: cannot change while running"):
        check_fixed(everything, msgspec.structs.replace(everything, **{name: value}))


def test_a_config_error_knows_its_parts() -> None:
    error = ConfigError("FILE", "models.x", "is missing")
    assert (error.source, error.path, error.message) == ("FILE", "models.x", "is missing")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("${ADMIN}", "adm-canary-2"),
        ("a${ADMIN}b$c", "aadm-canary-2b$c"),
        ("${NOPE:-x-y}", "x-y"),
        ("${EMPTY:-x}", "x"),
        ("${ADMIN:-x}", "adm-canary-2"),
        ("${NOPE:-}", None),
        ("${EMPTY}", None),
        ("$${ADMIN}", "${ADMIN}"),
        ("$$$${ADMIN}", "$${ADMIN}"),
        ("$$${ADMIN}", "$adm-canary-2"),
        ("a$$b$", "a$b$"),
        ("${DOLLARS}", "$${ADMIN}$$"),
    ],
)
def test_substitution(written: str, read: str | None) -> None:
    environ = ENVIRON | {"DOLLARS": "$${ADMIN}$$"}
    assert parse(UP + f"admin_token: '{written}'", "FILE", environ).admin_token == read


@pytest.mark.parametrize(("content", "read"), [("s3", "s3"), ("s3\n", "s3"), ("s3\r\n", "s3")])
def test_a_secret_file(tmp_path: Path, content: str, read: str) -> None:
    (tmp_path / "secret").write_bytes(content.encode())
    assert parse(UP + f"admin_token: ${{file:{tmp_path}/secret}}", "FILE", {}).admin_token == read


def test_a_secret_file_loses_one_line_break_only(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary\n\n")
    assert "a line break" in bad(UP + f"admin_token: ${{file:{tmp_path}/secret}}")
    (tmp_path / "secret").write_bytes(b"canary\xff")
    assert bad(UP + f"admin_token: ${{file:{tmp_path}/secret}}").endswith("secret is not UTF-8 text")


def test_substitution_reaches_numbers_names_and_addresses() -> None:
    text = UP + "max_connections: ${PORT}\ndrain: ${PORT}\nlisten: 127.0.0.1:${PORT}\n"
    text += "default_upstream: ${NOPE:-openai}\nmodels: {x: {upstreams: ['${NOPE:-openai}']}}"
    read = parse(text, "FILE", ENVIRON)
    assert (read.max_connections, read.drain, read.listen_address.port) == (9000, 9000.0, 9000)
    assert read.models["x"].upstreams == (Target(name="openai"),)


def test_anchors_and_merge_keys() -> None:
    text = "upstreams: {a: &a {base_url: 'mock:', auth: none}, b: {<<: *a, auth: api-key}, c: {<<: [*a]}}"
    upstreams = parse(text, "FILE", {}).upstreams
    assert [(one.base_url, one.auth) for one in upstreams.values()] == [
        ("mock:", "none"),
        ("mock:", "api-key"),
        ("mock:", "none"),
    ]


def test_aliases_of_aliases_do_not_grow() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    assert bad("\n".join(lines)).endswith("a0: unknown key")


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080), True),
        ("127.9.9.9:0", Address("127.9.9.9", 0), True),
        ("localhost:80", Address("localhost", 80), True),
        ("[::1]:65535", Address("::1", 65535), True),
        ("unix:/run/x.sock", Address("", 0, "/run/x.sock"), True),
        (":8080", Address("", 8080), False),
        ("0.0.0.0:80", Address("0.0.0.0", 80), False),
        ("[::]:80", Address("::", 80), False),
        ("10.0.0.1:80", Address("10.0.0.1", 80), False),
        ("localhost.example:80", Address("localhost.example", 80), False),
    ],
)
def test_addresses(text: str, address: Address, loopback: bool) -> None:
    assert parse_address(text) == address
    assert str(address) == text
    assert address.loopback is loopback


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8080",
        "h",
        "h:",
        "h:65536",
        "h:-1",
        "h:٣",
        "h h:1",
        "::1:80",
        "[h]:1",
        "[127.0.0.1]:1",
        "[]:1",
        "999.1.1.1:1",
        "127.1:1",
        "*:80",
        "http://h:1",
        "h:1\n",
        "unix:",
        "unix:x",
        "unix:/\x00",
        "unix:/" + "x" * 107,
    ],
)
def test_not_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        parse_address(text)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("127.0.0.1:1", "127.0.0.1:1", True),
        ("127.0.0.1:1", "localhost:1", True),
        ("127.0.0.1:1", ":1", True),
        ("127.0.0.1:1", "0.0.0.0:1", True),
        ("[::1]:1", "[0:0::1]:1", True),
        ("[::1]:1", "0.0.0.0:1", False),
        ("127.0.0.1:1", "127.0.0.2:1", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("unix:/a", "unix:/a", True),
        ("unix:/a", "unix:/b", False),
        ("unix:/a", ":0", False),
    ],
)
def test_overlap(one: str, other: str, overlap: bool) -> None:
    assert parse_address(one).overlaps(parse_address(other)) is overlap
    assert parse_address(other).overlaps(parse_address(one)) is overlap


def models(*names: str) -> Config:
    return parse(
        UP + yaml.safe_dump({"models": {n: {"upstreams": ["openai"]} for n in names}}, sort_keys=False),
        "F",
        {},
    )


@pytest.mark.parametrize(
    ("asked", "configured"),
    [
        ("gpt-4.1", "gpt-4.1"),
        ("gpt-4.1-mini", "gpt-*-mini"),
        ("gpt-5", "gpt-*"),
        ("gpt-", "gpt-*"),
        ("GPT-5", None),
        ("o3", "o?"),
        ("o30", None),
        ("o\n", "o?"),
        ("x[ab]", "x[ab]"),
        ("xa", None),
        ("y[a]z", "y[a]*"),
        ("ya", None),
        ("aXbYc", "a*b*c"),
        ("aXbYcZ", None),
        ("abcbc", "a*b*c"),
        ("q\\r", "q\\?"),
        ("", None),
    ],
)
def test_match_model(asked: str, configured: str | None) -> None:
    read = models("gpt-*-mini", "gpt-*", "gpt-4.1", "o?", "x[ab]", "y[a]*", "a*b*c", "q\\?")
    found = read.match_model(asked)
    assert found == (None if configured is None else (configured, read.models[configured]))


def test_a_hostile_model_name_costs_linear_time() -> None:
    read = models("a*a*a*a*a*a*a*b")
    started = time.perf_counter()
    assert read.match_model("a" * 1_000_000) is None
    assert time.perf_counter() - started < 2


def test_the_built_in_configuration() -> None:
    read = config.built_in({"OPENAI_API_KEY": "", "PATH": "/bin"})
    assert (read.source, read.auth.mode, read.default_upstream) == ("built-in", "open", "mock")
    assert config.describe_routes(read) == ["echo -> mock (mock:)"]


def test_the_built_in_configuration_with_keys() -> None:
    names = ["OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "DEEPSEEK_API_KEY"]
    read = config.built_in({name: f"$${{{name}}}$x" for name in names})
    assert read.default_upstream == "mock"
    assert [one.api_key for one in read.upstreams.values()] == [None, *(f"$${{{name}}}$x" for name in names)]
    assert config.describe_routes(read)[1:] == [
        "gpt-* -> openai (https://api.openai.com/v1)",
        "claude-* -> claude (https://api.anthropic.com/v1)",
        "gemini-* -> gemini (https://generativelanguage.googleapis.com/v1beta/openai)",
        "deepseek-* -> deepseek (https://api.deepseek.com/v1)",
    ]


def test_find(tmp_path: Path) -> None:
    environ = {"HEADRACE_CONFIG": "from-env.yaml"}
    assert config.find(None, {}, tmp_path) is None
    (tmp_path / "headrace.yaml").touch()
    assert config.find(None, {"HEADRACE_CONFIG": ""}, tmp_path) == tmp_path / "headrace.yaml"
    assert config.find(None, environ, tmp_path) == Path("from-env.yaml")
    assert config.find("x.yaml", environ, tmp_path) == Path("x.yaml")


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "headrace.yaml"
    with pytest.raises(ConfigError) as caught:
        config.load(path, {})
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError) as caught:
        config.load(path, {})
    assert str(caught.value) == f"{path}: cannot be read: it is not UTF-8 text"
    path.write_text(UP, encoding="utf-8-sig")
    assert config.load(path, {}).source == str(path)


def test_overrides_are_checked_again() -> None:
    read = config.built_in({})
    assert read.listen_address.port == 8080
    changed = config.with_overrides(read, "localhost:1", "unix:/a")
    assert (str(changed.listen_address), str(changed.admin_address)) == ("localhost:1", "unix:/a")
    assert config.with_overrides(read, None, None) == read
    with pytest.raises(ConfigError, match=r"^built-in: auth\.mode: open is allowed only"):
        config.with_overrides(read, ":80", None)
    with pytest.raises(ConfigError, match=r"^built-in: admin: clashes with listen"):
        config.with_overrides(read, None, "127.0.0.1:8080")
    with pytest.raises(ConfigError) as caught:
        config.with_overrides(read, None, "x")
    assert str(caught.value) == f"command line: admin: {FORMS}, got 'x'"


def try_parse(text: str) -> None:
    try:
        read = parse(text, "FILE", ENVIRON)
    except ConfigError as error:
        message = str(error)
    else:
        message = repr(read)
    assert "\n" not in message
    assert message.encode()


KEYS = st.sampled_from(
    ["listen", "admin", "tls", "cert", "max_connections", "trusted_proxies", "admin_token", "drain"]
)
MORE_KEYS = st.sampled_from(
    ["upstreams", "models", "timeouts", "openai", "base_url", "name", "auth", "mode", "log"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.text(),
    st.binary(),
    st.sampled_from(
        ["mock:", "openai", "open", "${PORT}", "${NOPE}", "${file:/nowhere}", ":80", "unix:/a", "http://h"]
    ),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS | MORE_KEYS | SCALARS, inner), max_leaves=25
)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    try_parse(text)
    try_parse(UP + text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="&*!|>%@`'\"[]{}:,-?#<=~.\n\t 0x1ab_$", max_size=60))
def test_any_yaml_syntax_is_a_config_or_a_config_error(text: str) -> None:
    try_parse(text)
    try_parse(f"{UP}models: {text}")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS | MORE_KEYS | SCALARS, TREES))
def test_any_structure_is_a_config_or_a_config_error(tree: dict[object, object]) -> None:
    try_parse(yaml.safe_dump(tree))
    try_parse(
        yaml.safe_dump(
            {"upstreams": {"openai": {"base_url": "mock:"}}, **{str(k): v for k, v in tree.items()}}
        )
    )


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_address_is_an_address_or_a_value_error(text: str) -> None:
    for candidate in (text, f"{text}:80", f"[{text}]:80", f"unix:/{text}"):
        try:
            assert parse_address(str(parse_address(candidate))) == parse_address(candidate)
        except ValueError:
            continue
