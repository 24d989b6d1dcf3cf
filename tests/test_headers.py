"""Which fields cross, as a rule: what hypothesis draws, no credential and no hop-by-hop field survives."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import headers
from proxy.headers import CREDENTIALS, HOP_BY_HOP

NAMES = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ-_", min_size=1, max_size=24).map(str.encode)
KNOWN = st.sampled_from(sorted(HOP_BY_HOP | CREDENTIALS)).flatmap(
    lambda name: st.sampled_from([name, name.upper(), name.title()])
)
FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
VALUES = st.binary(max_size=30).filter(lambda value: not FORBIDDEN.search(value))
FIELDS = st.lists(st.tuples(st.one_of(NAMES, KNOWN), VALUES), max_size=20)


def lines_of(block: bytes) -> list[tuple[bytes, bytes]]:
    """What a receiver would read."""
    lines = [line for line in block.split(b"\r\n") if line]
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


def named(fields: list[tuple[bytes, bytes]]) -> set[bytes]:
    """What the `Connection` fields name."""
    values = [value for name, value in fields if name.lower() == b"connection"]
    return {option.strip().lower() for value in values for option in value.split(b",")}


@given(FIELDS)
def test_to_upstream_drops(fields: list[tuple[bytes, bytes]]) -> None:
    """Whatever a caller sends, neither a credential nor a hop-by-hop field nor a `_` name goes upstream."""
    out = lines_of(headers.to_upstream(fields, "ours"))
    assert out.pop() == (b"x-request-id", b"ours")
    names = {name.lower() for name, _ in out}
    assert not names & (HOP_BY_HOP | CREDENTIALS | named(fields))
    assert not any(b"_" in name for name in names)
    assert not names & {b"host", b"content-length", b"x-request-id", b"expect", b"x-forwarded-for"}


@given(st.lists(st.tuples(NAMES.map(lambda name: b"X-" + name.replace(b"_", b"-")), VALUES), max_size=20))
def test_to_upstream_keeps(fields: list[tuple[bytes, bytes]]) -> None:
    """Fields that are none of our business keep their bytes, their case, their order and their repetition."""
    dropped = {b"x-api-key", b"x-real-ip", b"x-request-id"}
    kept = [
        field
        for field in fields
        if field[0].lower() not in dropped
        and not field[0].lower().startswith((b"x-forwarded-", b"x-goog-", b"x-headrace-"))
    ]
    expected = b"".join(b"%b: %b\r\n" % field for field in [*kept, (b"x-request-id", b"ours")])
    assert headers.to_upstream(kept, "ours") == expected


@given(FIELDS, st.text("abc", max_size=20))
def test_to_upstream_looks_at_each_field_alone(fields: list[tuple[bytes, bytes]], request_id: str) -> None:
    """A field crosses beside others as it does alone, unless `Connection` names it; then comes the id."""
    ours = b"x-request-id: %b\r\n" % request_id.encode()
    alone = [
        headers.to_upstream([field], request_id).removesuffix(ours)
        for field in fields
        if field[0].lower() not in named(fields)
    ]
    assert headers.to_upstream(fields, request_id) == b"".join([*alone, ours])


@pytest.mark.parametrize("connection", [b"keep-alive", b"close", b"X-A", b"keep-alive, x-a ,X-B", b"", b","])
def test_what_connection_names_stays(connection: bytes) -> None:
    """However it is spelt, and before the field or behind it."""
    fields = [(b"x-A", b"1"), (b"Connection", connection), (b"X-b", b"2"), (b"X-C", b"3")]
    stay = {option.strip().lower() for option in connection.split(b",")}
    kept = b"".join(b"%b: %b\r\n" % each for each in fields if each[0].lower() not in stay | {b"connection"})
    assert headers.to_upstream(fields, "i") == kept + b"x-request-id: i\r\n"


def test_names_that_nobody_sends_twice_are_not_kept() -> None:
    """What is known about names is bounded."""
    for number in range(3000):
        assert headers.to_upstream([(b"X-%d" % number, b"1")], "i").startswith(b"X-%d: 1\r\n" % number)
    assert len(headers._LINE_STARTS) <= 1024


@given(FIELDS, st.booleans())
def test_to_caller_drops(fields: list[tuple[bytes, bytes]], keep_ratelimit: bool) -> None:
    """No hop-by-hop field, cookie or server name reaches the caller, and nothing that breaks a head."""
    out = headers.to_caller(fields, keep_ratelimit=keep_ratelimit)
    names = [name.lower().encode() for name, _ in out]
    assert not set(names) & (HOP_BY_HOP | named(fields) | {b"set-cookie", b"server", b"x-request-id"})
    assert names.count(b"x-upstream-request-id") <= 1 or b"x-upstream-request-id" in {
        name.lower() for name, _ in fields
    }
    assert not any(re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value) for _, value in out)


ANY = st.binary(max_size=30) | st.text("ab, -~\t", max_size=9).map(str.encode) | st.just(b"Keep-Alive")
NAMED = st.sampled_from([b"connection", b"X-Request-Id", b"request-id", b"X-RateLimit-Reset-Tokens", b"date"])


@given(st.lists(st.tuples(st.one_of(NAMES, KNOWN, NAMED), ANY), max_size=8), st.booleans())
def test_lines_say_what_pairs_say(fields: list[tuple[bytes, bytes]], keep_ratelimit: bool) -> None:
    """Fields are the same as bytes, unless one look does not tell."""
    lines = headers.lines_to_caller(fields, keep_ratelimit=keep_ratelimit)
    out = headers.to_caller(fields, keep_ratelimit=keep_ratelimit)
    if lines is None:
        odd = [value for _, value in fields if re.search(rb"[^\t -~]", value)]
        ids = [name for name, _ in fields if name.lower() in (b"request-id", b"x-request-id")]
        assert odd or len(ids) > 1 or named(fields) - {b"keep-alive"}
    else:
        assert lines.decode() == "".join(f"\r\n{name}: {value}" for name, value in out)


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"\0", b"\x7f", b"\xc3\xa9", b"\xe9"])
def test_no_value_begins_a_line(value: bytes) -> None:
    """What is rendered in one pass has no byte in it that could end a line, and none to be read as text."""
    for fields in ([(b"X-A", value)], [(b"x-request-id", value)], [(b"X-B", b"b"), (b"X-A", value)]):
        assert headers.lines_to_caller(fields, keep_ratelimit=True) is None


def test_replaced_fields() -> None:
    """A field of ours takes the place of the upstream's, in whatever case that is."""
    fields = [(b"X-Model", b"a"), (b"x-model", b"b"), (b"X-Model-Two", b"c")]
    lines = headers.lines_to_caller(fields, keep_ratelimit=True, replaced=frozenset({b"x-model"}))
    assert lines == b"\r\nX-Model-Two: c"


def test_what_is_remembered_of_names() -> None:
    """Whatever names an upstream makes up, few are kept, and no long ones; the answers stay right."""
    known = headers._LinesDown(frozenset(), keep_ratelimit=True)
    for number in range(3000):
        name = b"x-%d" % number
        assert known[name] == b"\r\n%b: " % name
        assert len(known) <= 1024
    long = b"x" * 65
    assert (known[long], long in known) == (b"\r\n%b: " % long, False)


def test_lines_as_pairs() -> None:
    """What we write as lines is read back as it was, colons and all."""
    assert headers.pairs("\r\na: b\r\nc: d: e\r\nf: ") == [("a", "b"), ("c", "d: e"), ("f", "")]
    assert headers.pairs("") == []


@given(st.binary(min_size=1, max_size=20).filter(FORBIDDEN.search))
def test_control_characters_are_dropped(value: bytes) -> None:
    """A field that aiohttp's writer would refuse, or that would split the head, is left out."""
    assert headers.to_caller([(b"X-A", value), (b"X-B", b"b")], keep_ratelimit=True) == [("X-B", "b")]


@given(st.binary(min_size=1, max_size=20).filter(FORBIDDEN.search))
def test_no_control_character_in_a_request_id(value: bytes) -> None:
    """The upstream's own id is a header value like any other."""
    out = headers.to_caller([(b"x-request-id", value)], keep_ratelimit=True)
    assert not any(re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text) for _, text in out)


@given(VALUES)
def test_no_byte_of_a_value_is_lost(value: bytes) -> None:
    """UTF-8 goes out as it came, anything else as the UTF-8 of the same characters."""
    ((_, text),) = headers.to_caller([(b"X-A", value)], keep_ratelimit=True)
    written = text.encode()  # as aiohttp's writer does: fails for a surrogate, which that leaves out
    assert value in (written, written.decode().encode("latin-1", "replace"))


@pytest.mark.parametrize("keep", [True, False])
def test_ratelimit_fields(keep: bool) -> None:
    """The upstream's quota is shown only where the caller has none of its own."""
    fields = [
        (b"X-RateLimit-Limit-Requests", b"1"),
        (b"anthropic-ratelimit-tokens-limit", b"2"),
        (b"X", b"3"),
    ]
    kept = [name for name, _ in headers.to_caller(fields, keep_ratelimit=keep)]
    assert kept == (["X-RateLimit-Limit-Requests", "anthropic-ratelimit-tokens-limit"] if keep else []) + [
        "X"
    ]


def test_both_spellings_of_the_upstream_id() -> None:
    """Anthropic sends two ids with one value: one comes back."""
    fields = [(b"request-id", b"a"), (b"X-Request-Id", b"a")]
    assert headers.to_caller(fields, keep_ratelimit=True) == [("x-upstream-request-id", "a")]


@given(st.text(max_size=80))
def test_request_id(offered: str) -> None:
    """Whatever is offered, the chosen id is harmless; a harmless one is kept."""
    chosen = headers.request_id(offered)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", chosen)
    assert (chosen == offered) == bool(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", offered))


def test_minted_ids_differ() -> None:
    """Ids of our own do not repeat."""
    assert len({headers.request_id(None) for _ in range(1000)}) == 1000


TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.1", [], "203.0.113.1"),
        ("203.0.113.1", ["198.51.100.1"], "203.0.113.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1", "203.0.113.1"], "203.0.113.1"),
        ("10.0.0.1", ["127.0.0.1, nonsense, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("::1", ["2001:db8::1"], "2001:db8::1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        (None, ["198.51.100.1"], "198.51.100.1"),
        (None, [], "unix"),
    ],
)
def test_client_ip(peer: str | None, forwarded: list[str], expected: str) -> None:
    """The right-most hop that is not ours, and only if the socket's peer is ours."""
    assert headers.client_ip(peer, forwarded, TRUSTED) == expected


@given(st.one_of(st.none(), st.ip_addresses().map(str)), st.lists(st.text(max_size=40), max_size=4))
def test_client_ip_never_fails(peer: str | None, forwarded: list[str]) -> None:
    """Whatever stands in X-Forwarded-For, the result is an address, or `unix`."""
    found = headers.client_ip(peer, forwarded, TRUSTED)
    assert found == "unix" or ipaddress.ip_address(found)


TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("offered", "found"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"00-{TRACE}-b7ad6b7169203331-00", TRACE),
        (f"cc-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"cc-{TRACE}-b7ad6b7169203331-01-what-comes", TRACE),
        (f"cc-{TRACE}-b7ad6b7169203331-01.what", None),
        (f"00-{TRACE}-b7ad6b7169203331-01-what-comes", None),
        (f"ff-{TRACE}-b7ad6b7169203331-01", None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", None),
        (f" 00-{TRACE}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-b7ad6b7169203331-01\n", None),
        (TRACE, None),
        ("", None),
        (None, None),
    ],
)
def test_trace_id(offered: str | None, found: str | None) -> None:
    """Only a whole and valid field names a trace."""
    assert headers.trace_id(offered) == found


def test_value_of() -> None:
    """The first of a name, in any case."""
    fields = [(b"A", b"1"), (b"Content-Type", b"2"), (b"content-type", b"3")]
    assert headers.value_of(fields, b"content-type") == b"2"
    assert headers.value_of(fields, b"absent") is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0111, "12ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (59.1, "1m0s"),
        (360, "6m0s"),
        (3599.5, "1h0m0s"),
        (90061, "25h1m1s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Rounded up: whoever waits that long is never too early."""
    assert headers.duration(seconds) == text


def test_a_peer_without_an_address_is_no_proxy() -> None:
    """Whatever a listener calls it, it is in no network."""
    networks = (ipaddress.ip_network("0.0.0.0/0"),)
    assert headers.client_ip("peer", ["203.0.113.9"], networks) == "peer"
