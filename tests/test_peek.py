"""What is read of a body: any bytes give a Peek or a BadRequest, and every parser would read the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.peek import Peek, peek, peeking, with_model

FIELDS = tuple(Peek.__struct_fields__)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=12,
)
KEYS = st.one_of(
    st.sampled_from(FIELDS), st.sampled_from(["messages", "mod", "models", "Model", ""]), st.text()
)


def look(body: bytes) -> Peek:
    """What `peek` says; a large body, looked at in steps, is told the same."""
    try:
        found = peek(body)
    except BadRequest:
        with pytest.raises(BadRequest):
            in_steps(body)
        raise
    assert in_steps(body) == found
    return found


def in_steps(body: bytes, step_bytes: int = 7) -> Peek:
    steps = peeking(body, step_bytes)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Peek = end.value
            return found


def attempt(body: bytes) -> Peek | BadRequest:
    """Either is an answer; anything else fails the test."""
    try:
        return look(body)
    except BadRequest as error:
        return error


def escaped(text: str) -> str:
    """The same JSON string, every character as an escape."""
    units = text.encode("utf-16-be", "surrogatepass")
    return '"' + "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2)) + '"'


@given(st.binary(max_size=200))
@example(b"")
@example(b"{}")
@example(b"\xff")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"model":"m","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
@example(b'{"model":"\\ud800"}')
@example(b'{"mod\\u0065l":"m"}')
@example(b'{"n":1e400}')
def test_any_bytes(body: bytes) -> None:
    """Never anything but a Peek or a BadRequest."""
    found = attempt(body)
    if isinstance(found, BadRequest):
        assert found.status == 400
        assert found.code in ("invalid_json", "duplicate_key", "bad_request")


@given(st.text(max_size=100))
def test_any_text(text: str) -> None:
    """The same for text that looks more like JSON."""
    assert attempt(f'{{"model":{text}}}'.encode("utf-8", "surrogatepass")) is not None


@given(JSON.filter(lambda value: not isinstance(value, dict)))
def test_not_an_object(value: Any) -> None:
    """A body that is no object is refused."""
    with pytest.raises(BadRequest) as raised:
        look(json.dumps(value).encode())
    assert raised.value.code == "invalid_json"


@given(
    st.lists(st.tuples(KEYS, JSON), max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.booleans(),
)
@settings(max_examples=400)
def test_agrees_with_the_reference(pairs: list[tuple[str, Any]], escape: list[bool], spaced: bool) -> None:
    """What is accepted has each routing key once, and peek reads the value that every parser would."""
    blank = " \n" if spaced else ""
    members = [
        f"{escaped(key) if hidden else json.dumps(key)}{blank}:{blank}{json.dumps(value)}"
        for (key, value), hidden in zip(pairs, escape, strict=False)
    ]
    body = ("{" + ",".join(members) + "}").encode()
    names = [key for key, _ in pairs]
    doubled = {name for name in FIELDS if names.count(name) > 1}
    found = attempt(body)
    if isinstance(found, BadRequest):
        assert found.code != "duplicate_key" or found.param in doubled
        return
    assert not doubled
    for name in FIELDS:
        assert getattr(found, name) == dict(pairs).get(name)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "spelling", ['"{0}" \n:', '"{0}":', "{1}:", '"{0}"\t\r\n :'], ids=["blank", "plain", "escaped", "blanks"]
)
def test_every_duplicate_is_found(name: str, spelling: str) -> None:
    """However the second key is spelt, and wherever it stands."""
    value = {"model": '"m"', "stream": "true"}.get(name, "1")
    second = spelling.format(name, escaped(name))
    for body in (
        f'{{"{name}":{value},{second}{value}}}',
        f'{{"{name}":{value},"x":{{"{name}":1}},{second}{value}}}',
        f'{{{second}{value},"messages":[{{"role":"user","content":"\\"{name}\\":"}}],"{name}":{value}}}',
    ):
        with pytest.raises(BadRequest) as raised:
            look(body.encode())
        assert (raised.value.code, raised.value.param) == ("duplicate_key", name)


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m","tools":[{"model":"x"},{"model":"y"}]}',
        '{"model":"m","a":{"model":"x","model":"y"}}',
        '{"model":"m","messages":[{"content":"say \\"model\\": twice, \\"model\\":"}]}',
        '{"model":"m","user":"\\u0041\\u0062"}',
        '{"model":"m","x":1,"x":2}',
    ],
)
def test_no_false_alarm(body: str) -> None:
    """Keys of inner objects, text that looks like keys, and keys that route nothing may repeat."""
    assert look(body.encode()).model == "m"


@pytest.mark.parametrize("digits", [4299, 4300])
def test_long_numbers_that_are_still_read(digits: int) -> None:
    """Python's own limit is 4300 digits."""
    assert look(b'{"model":"m","seed":' + b"9" * digits + b"}").model == "m"


@pytest.mark.parametrize("digits", [4301, 5000, 100_000])
@pytest.mark.parametrize("pad", [0, 1, 1000, 2149, 2150, 2151])
def test_too_long_numbers(digits: int, pad: int) -> None:
    """Wherever it stands, a number that Python refuses is refused."""
    with pytest.raises(BadRequest):
        look(b'{"model":"m","pad":"' + b"p" * pad + b'","seed":' + b"9" * digits + b"}")


@pytest.mark.parametrize(
    "number",
    [
        "-{0}",
        "0.{0}",
        "{0}.5",
        "{0}e1",
        "1e{0}",
        "1E-{0}",
        "[1,{0}]",
        "-0.{0}",
        '"{0}"',
        '"a\\"{0}"',
        "1{0}E+1",
    ],
)
def test_forms_of_long_numbers(number: str) -> None:
    """Only integers have a longest size; in steps it is the same."""
    body = '{"model":"m","x":' + number.format("9" * 5000) + "}"
    refused = number in ("-{0}", "[1,{0}]")
    found = attempt(body.encode())
    assert isinstance(found, BadRequest) == refused


@pytest.mark.parametrize(
    "body",
    [
        '{"a":12,"a":1,"n":1,"n":1}',
        '{"a":[{"n":2},"}"],"a":1, "n":1 ,"n":2}',
        '{"n":1,"a":"x\\"}","a":"y","\\u006e":1}',
        '{"a":{"b":{}},"a":{"b":{ }},"n":1,"n":1}',
        '{"n":1,"n":12}',
    ],
)
def test_a_duplicate_behind_other_duplicates(body: str) -> None:
    """Of a name that routes nothing the first value is stepped over as well as the last."""
    for step_bytes in (1, 100):
        with pytest.raises(BadRequest) as raised:
            in_steps(body.encode(), step_bytes)
        assert raised.value.code == "duplicate_key"
        assert raised.value.param == "n"


def test_a_large_body_is_looked_at_in_steps() -> None:
    """2 MB, of which the decoder alone takes a part at once: nobody waits for the rest."""
    body = json.dumps(
        {"model": "m", "messages": [{"content": "Grüße\n" * 300_000}]}, ensure_ascii=False
    ).encode()
    assert sum(1 for _ in peeking(body)) > len(body) // 2**18


def test_a_large_object_is_looked_at_in_steps() -> None:
    """So is one of many members, and a value with many parts that has to be walked over."""
    members = ",".join(f'"{number}":0' for number in range(1000))
    parts = ",".join("[0]" for _ in range(1000))
    for body in (f'{{"model":"m",{members}}}', f'{{"a":[{parts}],"a":0,"model":"m"}}'):
        assert sum(1 for _ in peeking(body.encode(), len(body))) >= 5
        assert in_steps(body.encode()).model == "m"


@pytest.mark.parametrize(
    ("look_at", "suspicious"),
    [(peek, '"\\u006e":1'), (peek, '"x":' + "9" * 4300), (in_steps, '"x":[' + "9" * 4300 + ",2.0]")],
)
def test_what_is_costly_to_check_has_a_limit(look_at: Callable[[bytes], Peek], suspicious: str) -> None:
    """Of a body above 1 MiB nobody looks closely at escaped names or at numbers of thousands of digits."""
    small, large = (
        f'{{"model":"m","pad":"{"p " * count}",{suspicious}}}'.encode() for count in (2**10, 2**19)
    )
    assert look_at(small).model == "m"
    with pytest.raises(BadRequest, match="not plain JSON"):
        look_at(large)


def test_digits_in_text_are_no_number() -> None:
    """A long run of digits inside a string is content."""
    assert look(b'{"model":"m","user":"' + b"9" * 10_000 + b'"}').model == "m"


@given(
    st.dictionaries(st.text().filter(lambda key: key != "model"), JSON, max_size=6),
    st.text(max_size=20),
    st.text(),
)
def test_with_model(document: dict[str, Any], old: str, new: str) -> None:
    """Only the model changes, and the order of the members stays."""
    body = json.dumps({**document, "model": old}).encode()
    out = json.loads(with_model(body, new))
    assert out == {**json.loads(body), "model": new}
    assert list(out) == [*document, "model"]


def test_with_model_keeps_bytes() -> None:
    """Other members keep their own spelling."""
    body = b'{"a":1.0e+5,"model":"x","b":{"model" : "x"},"c":"\\u00e9","d":123456789012345678901234567890}'
    assert with_model(body, "y") == body.replace(b'"model":"x"', b'"model":"y"', 1)
