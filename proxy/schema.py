"""What a configuration file may say: every key, its default, its unit, its check.

Nothing but Structs: `yamlstruct` walks them, `config` loads and cross-checks them, and the reference in docs/
is generated from them, so a new key is a new field and nothing else. All durations are seconds; a relative
path is relative to the working directory.
"""

from __future__ import annotations

import ipaddress
import re
from decimal import Decimal
from functools import cached_property
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from proxy.address import is_host, parse_address

MOCK_URL = "mock:"


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


def _check_plan_name(text: str, shown: str) -> str:
    # It is a metric's label and a claim of tokens.
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise ValueError("a plan's name is 1 to 64 letters, digits, dots, dashes or underscores")
    return text


def _check_http_url(text: str, shown: str) -> str:
    if not text.isascii() or not text.isprintable() or urlsplit(text).scheme not in ("http", "https"):
        raise ValueError("expected http(s)://host/path")
    return text


def _check_proxy_url(text: str, shown: str) -> str:
    # Not shown: it may hold a password. http only: that is what aiohttp speaks to a proxy.
    try:
        parts = urlsplit(text)
        if (
            text.isascii()
            and text.isprintable()
            and parts.scheme == "http"
            and parts.hostname
            and parts.port != 0
        ):
            return Secret(text)
    except ValueError:
        pass
    raise ValueError("expected http://[user:password@]host:port")


def _check_field_name(text: str, shown: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}", text):
        raise ValueError("a header's name is 1 to 100 letters, digits or dashes")
    if text.lower() in _NOT_TO_SET:
        raise ValueError(f"{text} is set by Headrace itself")
    return text


#: Framing and hop-by-hop fields: a second one beside ours can be read in two ways.
_NOT_TO_SET = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade", "expect"}
    | {"keep-alive", "proxy-connection", "accept-encoding", "x-request-id"}
)


def _check_field_value(text: str, shown: str) -> str:
    # May hold a credential: not shown, and kept out of tracebacks.
    if not text.isascii() or not all(" " <= character <= "~" for character in text):
        raise ValueError("has a line break or another character that a header cannot carry")
    return Secret(text.strip())


def _check_query_name(text: str, shown: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._~-]{1,100}", text):
        raise ValueError("a query parameter's name is 1 to 100 letters, digits, dots, dashes or underscores")
    return text


def _check_probe_path(text: str, shown: str) -> str:
    if not re.fullmatch(r"/(?!/)[A-Za-z0-9._~:@!$&'()*+,;=/?%-]*", text):
        raise ValueError(f"expected a path like /health or /v1/models, got {shown}")
    return text


def _check_key_database(text: str, shown: str) -> str:
    # Not shown: a redis URL may hold a password.
    if text.removeprefix("sqlite:") not in ("", text) or _is_redis_url(text):
        return Secret(text) if "@" in text else text
    raise ValueError("expected sqlite:PATH, redis://… or rediss://…")


def _check_ledger_database(text: str, shown: str) -> str:
    if text.removeprefix("sqlite:") in ("", text):
        raise ValueError(f"expected sqlite:PATH, got {shown}")
    return text


def _check_limit_store(text: str, shown: str) -> str:
    if text == "memory" or _is_redis_url(text):
        return Secret(text) if "@" in text else text
    raise ValueError("expected memory, redis://… or rediss://…")


def _is_redis_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


def _check_origin(text: str, shown: str) -> str:
    if not _ORIGIN.fullmatch(text):
        raise ValueError(
            f"expected scheme://host or scheme://host:port in lower case as browsers send it, got {shown}"
        )
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
Count = Annotated[int, Meta(gt=0, le=1_000_000_000)]
AddressText = Annotated[str, Meta(extra={"check": _check_address})]
NetworkText = Annotated[str, Meta(extra={"check": _check_network})]
BaseUrl = Annotated[str, Meta(extra={"check": _check_base_url})]
SecretText = Annotated[str, Meta(extra={"check": _check_secret, "secret": True})]
ReadableFile = Annotated[str, Meta(extra={"check": _check_file})]
UpstreamName = Annotated[str, Meta(extra={"check": _check_upstream_name})]
ModelName = Annotated[str, Meta(extra={"check": _check_model_name})]
PlanName = Annotated[str, Meta(extra={"check": _check_plan_name})]
HttpUrl = Annotated[str, Meta(extra={"check": _check_http_url})]
ProxyUrl = Annotated[str, Meta(extra={"check": _check_proxy_url, "secret": True})]
FieldName = Annotated[str, Meta(extra={"check": _check_field_name})]
FieldValue = Annotated[str, Meta(extra={"check": _check_field_value, "secret": True})]
QueryName = Annotated[str, Meta(extra={"check": _check_query_name})]
ProbePath = Annotated[str, Meta(extra={"check": _check_probe_path})]
Status = Annotated[int, Meta(ge=400, le=599)]
KeyDatabase = Annotated[str, Meta(extra={"check": _check_key_database})]
LedgerDatabase = Annotated[str, Meta(extra={"check": _check_ledger_database})]
Usd = Decimal
LimitStore = Annotated[str, Meta(extra={"check": _check_limit_store})]
Origin = Annotated[str, Meta(extra={"check": _check_origin})]
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
    min_idle: Annotated[
        int,
        Meta(ge=0, le=1000),
        _doc("Connections kept open beforehand, so that a request after a pause pays no handshake."),
    ] = 0


class Breaker(Section, frozen=True, kw_only=True):
    """When an upstream is not asked for a while."""

    failures: Annotated[
        int,
        Meta(ge=1, le=1000),
        _doc("Failures within `window` that open it; connect failures and timeouts count."),
    ] = 5
    window: Annotated[Seconds, _doc("Seconds in which failures add up.")] = 30.0
    cool_down: Annotated[Seconds, _doc("Seconds of the first ejection; doubled with each one after it.")] = (
        5.0
    )
    max_cool_down: Annotated[Seconds, _doc("Seconds of the longest ejection.")] = 60.0
    statuses: Annotated[tuple[Status, ...], _doc("Answers that count as failures.")] = (
        500,
        502,
        503,
        504,
        529,
    )


class Probe(Section, frozen=True, kw_only=True):
    """Asks an upstream without traffic how it is, by a path that costs no model call."""

    shorthand: ClassVar[str] = "path"

    path: Annotated[ProbePath, _doc("The path at the upstream's host: any answer below 500 is healthy.")]
    interval: Annotated[Seconds, _doc("Seconds between two probes.")] = 10.0


class Upstream(Section, frozen=True, kw_only=True):
    """One provider: where it is and how it is spoken to."""

    base_url: Annotated[
        BaseUrl, _doc("http(s)://host[:port][/path], or `mock:` for the embedded mock; no slash at its end.")
    ]
    api_key: Annotated[SecretText | None, _doc("The credential sent upstream; empty is none.")] = None
    api_keys: Annotated[
        tuple[SecretText, ...],
        _doc("Several credentials, used in turn; one that is answered with 401 or 429 rests alone."),
    ] = ()
    auth: Annotated[
        Literal["bearer", "x-api-key", "api-key", "none"], _doc("The header that carries the credential.")
    ] = "bearer"
    headers: Annotated[
        dict[FieldName, FieldValue], _doc("Header fields sent with every request; they replace the caller's.")
    ] = msgspec.field(default_factory=dict)
    query: Annotated[
        dict[QueryName, Text], _doc("Query parameters sent with every request; they replace the caller's.")
    ] = msgspec.field(default_factory=dict)
    proxy: Annotated[ProxyUrl | None, _doc("An outbound proxy: http://[user:password@]host:port.")] = None
    timeouts: UpstreamTimeouts = UpstreamTimeouts()
    breaker: Breaker = Breaker()
    probe: Annotated[Probe | None, _doc("Active health checks; left out: learned from traffic alone.")] = None
    pool: Pool = Pool()
    max_in_flight: Annotated[
        Count | None, _doc("Requests at this upstream at once; left out: limits.max_in_flight.")
    ] = None
    ca_file: Annotated[
        ReadableFile | None, _doc("PEM file: the private CA that signed the upstream's certificate.")
    ] = None


class Target(Section, frozen=True, kw_only=True):
    """One upstream of a model. A plain name stands for `{name: …}`."""

    shorthand: ClassVar[str] = "name"

    name: Annotated[Text, _doc("The upstream, as written under `upstreams`.")]
    model: Annotated[Text | None, _doc("The model's name there; left out: as the caller wrote it.")] = None
    weight: Annotated[float, Meta(gt=0, le=1_000_000), _doc("Share of the requests within its tier.")] = 1.0
    tier: Annotated[
        int, Meta(ge=1, le=1000), _doc("Asked only while no upstream of a lower tier is available.")
    ] = 1


class Price(Section, frozen=True, kw_only=True, dict=True):
    """USD per million tokens, exact to six decimals."""

    input: Annotated[Usd, _doc("Tokens of the prompt.")]
    cached_input: Annotated[
        Usd | None, _doc("Tokens of the prompt that the provider had cached; left out: like input.")
    ] = None
    output: Annotated[Usd, _doc("Tokens of the answer, reasoning included.")]

    @cached_property
    def picos(self) -> tuple[int, int, int]:
        """Picodollars (1e-12 USD) of one token: of the prompt, of its cached part, of the answer."""
        cached_input = self.input if self.cached_input is None else self.cached_input
        # A millionth of a dollar per million tokens is one.
        return int(self.input.scaleb(6)), int(cached_input.scaleb(6)), int(self.output.scaleb(6))


class Model(Section, frozen=True, kw_only=True):
    """One model name, or a pattern with `*` and `?`."""

    upstreams: Annotated[tuple[Target, ...], Meta(min_length=1), _doc("Where it is served, in order.")]
    requests_per_minute: Annotated[
        Count | None, _doc("Requests a minute of all callers together; null is no limit.")
    ] = None
    tokens_per_minute: Annotated[
        Count | None, _doc("Tokens a minute of all callers together; null is no limit.")
    ] = None
    max_output: Annotated[
        Count, _doc("Tokens reserved for an answer whose request names no maximum of its own.")
    ] = 4096
    fallback: Annotated[
        tuple[Text, ...], _doc("Models to ask instead while no upstream of this one can answer.")
    ] = ()
    hedge_after: Annotated[
        Seconds | None,
        _doc("Seconds without a first byte until a second upstream is asked too; null: never."),
    ] = None
    price: Annotated[Price | None, _doc("What its tokens cost; left out: costs are unknown.")] = None
    list_price: Annotated[
        Price | None, _doc("The price that `usage --baseline` compares with; left out: there is none.")
    ] = None
    websocket: Annotated[bool, _doc("Lets callers open WebSockets (/v1/realtime, /v1/responses).")] = False


class Plan(Section, frozen=True, kw_only=True):
    """What one caller may use. Null is no limit."""

    requests_per_minute: Annotated[Count | None, _doc("Requests a minute of one caller.")] = None
    burst: Annotated[
        Count | None, _doc("Requests at once after a pause; left out: those of a whole minute.")
    ] = None
    tokens_per_minute: Annotated[
        Count | None, _doc("Tokens a minute of one caller, prompt and answer together.")
    ] = None
    max_in_flight: Annotated[Count | None, _doc("Requests of one caller at once.")] = None
    priority: Annotated[
        int, Meta(ge=0, le=100), _doc("Share of the queue's turns: a plan's weight is 1 + priority.")
    ] = 0
    total_requests_per_minute: Annotated[
        Count | None, _doc("Requests a minute of all callers of the plan together.")
    ] = None
    budget_day: Annotated[
        Usd | None, _doc("USD a day (UTC) of one caller; a key's own budget goes before it.")
    ] = None
    budget_month: Annotated[Usd | None, _doc("USD a month (UTC) of one caller.")] = None
    total_budget_day: Annotated[Usd | None, _doc("USD a day of all callers of the plan together.")] = None
    total_budget_month: Annotated[Usd | None, _doc("USD a month of all callers of the plan together.")] = None


#: Plans that exist without being written; what a file writes replaces single values of theirs.
SHIPPED_PLANS: dict[str, dict[str, object]] = {
    "basic": {"requests_per_minute": 30, "burst": 10, "tokens_per_minute": 100_000, "max_in_flight": 5},
    "pro": {"requests_per_minute": 100, "burst": 20, "max_in_flight": 20, "priority": 5},
    "enterprise": {"requests_per_minute": 500, "burst": 100, "max_in_flight": 100, "priority": 10},
    "anonymous": {"requests_per_minute": 30, "burst": 20, "max_in_flight": 2},
}


class Jwt(Section, frozen=True, kw_only=True):
    """Callers with a token of somebody's identity service, or of `headrace token issue`."""

    algorithms: Annotated[
        tuple[Literal["HS256", "RS256", "ES256"], ...],
        Meta(min_length=1),
        _doc("The algorithms that are accepted; HS256 never together with the others."),
    ] = ("HS256",)
    secret: Annotated[SecretText | None, _doc("The shared secret of HS256.")] = None
    jwks_url: Annotated[HttpUrl | None, _doc("Where the public keys of RS256 and ES256 are.")] = None
    issuer: Annotated[Text, _doc("The `iss` that a token must have.")] = "headrace"
    audience: Annotated[Text, _doc("The `aud` that a token must have.")] = "headrace"
    plan_claim: Annotated[Text, _doc("The claim that names the plan.")] = "plan"


class Auth(Section, frozen=True, kw_only=True):
    """Who may call."""

    mode: Annotated[
        Literal["required", "open"],
        _doc("`open` ignores every credential; only while `listen` is loopback or a unix socket."),
    ] = "required"
    database: Annotated[
        KeyDatabase, _doc("The key store: sqlite:PATH, or redis://… for one store of many machines.")
    ] = "sqlite:headrace.db"
    pepper: Annotated[
        SecretText | None,
        _doc("What keys are hashed with; left out: one is made beside the database, mode 0600."),
    ] = None
    jwt: Annotated[Jwt | None, _doc("Tokens as credentials; left out: only keys.")] = None


class Queue(Section, frozen=True, kw_only=True):
    """The queue of a machine, for requests that find no slot."""

    max_waiting: Annotated[int, Meta(ge=0, le=1_000_000), _doc("Requests that may wait.")] = 200
    max_wait: Annotated[Seconds, _doc("Seconds that one may wait.")] = 10.0


class PerIp(Section, frozen=True, kw_only=True):
    """One address: spent by failed authentication and by anonymous requests, before any store is asked."""

    requests_per_minute: Annotated[Count, _doc("Such requests a minute.")] = 600
    burst: Annotated[Count, _doc("Such requests at once after a pause.")] = 100


class Limits(Section, frozen=True, kw_only=True):
    """How much may be used."""

    store: Annotated[
        LimitStore, _doc("Where the counters are: memory (one machine), or redis://… / rediss://…")
    ] = "memory"
    on_store_failure: Annotated[
        Literal["local", "open", "closed"],
        _doc("Without the store: count on this machine, allow everything, or answer 503."),
    ] = "local"
    mode: Annotated[
        Literal["enforce", "observe"], _doc("`observe` counts who would be refused and refuses nobody.")
    ] = "enforce"
    max_in_flight: Annotated[Count, _doc("Requests at once, of the whole process group.")] = 1000
    queue: Queue = Queue()
    per_ip: PerIp = PerIp()


class Cors(Section, frozen=True, kw_only=True):
    """Which web pages may call."""

    origins: Annotated[
        tuple[Origin, ...], _doc("Origins as browsers send them: https://app.example; never `*` or null.")
    ] = ()
    max_age: Annotated[
        int, Meta(ge=0, le=86400), _doc("Seconds that a browser may remember a preflight.")
    ] = 3600


class BrowserApi(Section, frozen=True, kw_only=True):
    """/api/chat and /api/chat/stream: a web page asks without holding a key."""

    model: Annotated[Text, _doc("The model that answers, as written under `models`.")]
    plan: Annotated[Text, _doc("The plan of each address that asks.")] = "anonymous"
    max_tokens: Annotated[Count, _doc("Tokens of an answer, at most and by default.")] = 2000
    temperature: Annotated[float, Meta(ge=0, le=2), _doc("Where the page names none.")] = 0.7


class DrainForUsage(Section, frozen=True, kw_only=True):
    """Reads on after the caller has left, for the usage at the stream's end. Past a bound it is cancelled."""

    seconds: Annotated[Seconds, _doc("Seconds that one stream is read on.")] = 30.0
    bytes: Annotated[Bytes, _doc("Bytes that are read on of one stream.")] = 1_048_576
    streams: Annotated[Count, _doc("Streams read on at once, of one process.")] = 50


class OnDisconnect(Section, frozen=True, kw_only=True):
    """What happens upstream when a caller leaves. A plain `cancel` stands for the default."""

    drain_for_usage: DrainForUsage | None = None


class Streams(Section, frozen=True, kw_only=True):
    """How streams are delivered."""

    heartbeat: Annotated[
        SecondsOrOff, _doc("Seconds of upstream silence before a comment is sent; 0 is off.")
    ] = 15.0
    commit_after: Annotated[
        SecondsOrOff, _doc("Seconds without a first byte before 200 and comments are sent; 0 is off.")
    ] = 30.0
    on_disconnect: Annotated[
        Literal["cancel"] | OnDisconnect,
        _doc("`cancel` ends the upstream's answer at once; `drain_for_usage: {…}` reads it to its usage."),
    ] = "cancel"
    usage: Annotated[
        Literal["observe", "inject", "off"],
        _doc("`inject` asks for usage where a caller did not, and takes the extra chunk out again."),
    ] = "observe"
    wrap_json: Annotated[
        bool, _doc("Delivers plain JSON that answers a streaming request as one event and [DONE].")
    ] = False
    verify_sample: Annotated[
        float,
        Meta(ge=0, le=1),
        _doc("Share of event streams whose upstream and delivered bytes are hashed and compared; 0 is off."),
    ] = 0.0


class Retry(Section, frozen=True, kw_only=True):
    """When a request is tried again, before its first byte has gone to the caller."""

    attempts: Annotated[int, Meta(ge=1, le=20), _doc("Attempts at most, the first included.")] = 3
    base: Annotated[
        Seconds, _doc("Seconds: the first back-off is random up to this, the next up to its double.")
    ] = 0.25
    max: Annotated[
        Seconds, _doc("Seconds of the longest back-off; an upstream's longer Retry-After is passed on.")
    ] = 8.0
    budget: Annotated[
        float,
        Meta(ge=0, le=1),
        _doc("Retries as a share of requests; 0: only what never reached an upstream."),
    ] = 0.2
    statuses: Annotated[tuple[Status, ...], _doc("Answers that are tried again.")] = (429, 502, 503, 504, 529)
    stale_connection: Annotated[
        bool,
        _doc("Asks once more when a kept connection turns out to be closed before a byte of the answer."),
    ] = True


class Ledger(Section, frozen=True, kw_only=True):
    """One row for each request that reached an upstream."""

    database: Annotated[LedgerDatabase, _doc("sqlite:PATH; one file a machine.")] = "sqlite:headrace.db"
    keep_days: Annotated[int, Meta(ge=1, le=36500), _doc("Days after which rows are deleted.")] = 400


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
    playground: Annotated[bool, _doc("The page at / that tries models out.")] = True
    max_body_bytes: Annotated[Bytes, _doc("Bytes of one JSON request body.")] = 33_554_432
    max_upload_bytes: Annotated[Bytes, _doc("Bytes of one upload: files, audio, images.")] = 536_870_912
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
    plans: Annotated[
        dict[PlanName, Plan], _doc("Plans by name; basic, pro, enterprise and anonymous exist unwritten.")
    ] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()
    cors: Cors = Cors()
    browser_api: Annotated[BrowserApi | None, _doc("The API for web pages; left out: there is none.")] = None
    streams: Streams = Streams()
    retry: Retry = Retry()
    ledger: Ledger = Ledger()
    log: Log = Log()
    drain: Annotated[
        SecondsOrOff, _doc("Seconds that open requests get at shutdown; 0 ends them at once.")
    ] = 120.0
