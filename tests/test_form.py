"""The look into a form: what is found, what is refused, and that the cuts between pieces do not matter."""

from __future__ import annotations

import email
import email.policy
import itertools
import random
import time

import aiohttp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.form import Field, FormScan, boundary_of, is_form, with_model

B = b"sep"


def part(headers: str | bytes, body: bytes = b"x", boundary: bytes = B) -> bytes:
    raw = headers.encode() if isinstance(headers, str) else headers
    return b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, raw, body)


def field(name: str, value: str | bytes, boundary: bytes = B) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return part(f'Content-Disposition: form-data; name="{name}"', raw, boundary)


def file(content: bytes, boundary: bytes = B) -> bytes:
    headers = 'Content-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg'
    return part(headers, content, boundary)


END = b"--sep--\r\n"
MODEL = field("model", "m")


def scan(form: bytes, cuts: list[int] | None = None, boundary: bytes = B) -> Field | None:
    """Looks through a form that comes in pieces."""
    scanner = FormScan(boundary)
    edges = [0, *sorted(cuts or []), len(form)]
    for start, end in itertools.pairwise(edges):
        scanner.feed(form[start:end])
    return scanner.model


def outcome(form: bytes, cuts: list[int] | None = None, boundary: bytes = B) -> Field | str | None:
    try:
        return scan(form, cuts, boundary)
    except BadRequest as error:
        return error.code


def every_byte(form: bytes) -> list[int]:
    return list(range(len(form)))


# ── the Content-Type ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ("Multipart/Form-Data;Boundary=abc", b"abc"),
        ("multipart/form-data; charset=utf-8; boundary=abc", b"abc"),
        ('multipart/form-data; boundary="a b:c=/d?"', b"a b:c=/d?"),
        ('multipart/form-data; boundary="abc" ;', b"abc"),
        ("multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW", None),
        ("multipart/form-data; boundary=" + "a" * 70, b"a" * 70),
    ],
)
def test_boundaries(content_type: str, boundary: bytes | None) -> None:
    """Tokens and quoted strings of 1 to 70 characters (RFC 2046 5.1.1)."""
    assert is_form(content_type)
    assert boundary_of(content_type) == boundary or boundary is None


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data;",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="a "',
        'multipart/form-data; boundary="a\\b"',
        'multipart/form-data; boundary="a',
        'multipart/form-data; boundary="a\r\nb"',
        "multipart/form-data; boundary=a b",
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary=a; BOUNDARY=a",
        "multipart/form-data; boundary=a, multipart/form-data; boundary=b",
        "multipart/form-data; boundary*=utf-8''a",
        "multipart/form-data boundary=a",
        "multipart/form-data; boundary=ä",
        "multipart/form-data; boundary=" + "a" * 71,
        "multipart/form-data; boundary=a*b",
    ],
)
def test_hostile_boundaries(content_type: str) -> None:
    """One that servers might read in different ways is none."""
    with pytest.raises(BadRequest) as refused:
        boundary_of(content_type)
    assert refused.value.code == "bad_request"


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/mixed; boundary=a", "x"])
def test_no_form(content_type: str) -> None:
    assert not is_form(content_type)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────

FOUND = {
    "first": MODEL + file(b"abc") + END,
    "last": file(b"abc") + MODEL + END,
    "between": field("language", "en") + MODEL + file(b"") + END,
    "no epilogue's line break": MODEL + b"--sep--",
    "an epilogue": MODEL + END + b"whatever\r\n",
    "padding": b"--sep \t\r\n" + MODEL.partition(b"\r\n")[2] + END,
    "plain text": part(
        'Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=utf-8', b"m"
    )
    + END,
    "an unquoted name": part("content-disposition: Form-Data; NAME=model", b"m") + END,
    "8bit": part('Content-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: 8bit', b"m")
    + END,
}


@pytest.mark.parametrize("kind", FOUND)
def test_found(kind: str) -> None:
    """In any order, among any parts, in one piece or byte by byte."""
    form = FOUND[kind]
    for cuts in ([], every_byte(form)):
        found = scan(form, cuts)
        assert found is not None
        assert found.value == "m"
        assert form[found.start : found.end] == b"m"


NOT_FOUND = {
    "none": file(b"abc") + END,
    "empty": b"",
    "other names": field("models", "m") + field("xmodel", "m") + field("my model", "m") + END,
    "not closed": MODEL.removesuffix(b"\r\n"),
    "in a file": file(b'Content-Disposition: form-data; name="model"\r\n\r\nm\r\n') + END,
    "a whole part with another boundary": file(field("model", "m", b"inner") + b"--inner--") + END,
    "a file name": part('Content-Disposition: form-data; name="f"; filename="x\\"; name=\\"model"') + END,
    "a delimiter's beginning": file(b"\r\n--se\r\n\r\n--s" + MODEL[5:]) + END,
    "another field's value": field("prompt", 'name="model"\r\n\r\nm') + END,
}


@pytest.mark.parametrize("kind", NOT_FOUND)
def test_not_found(kind: str) -> None:
    """What only looks like a model is none."""
    form = NOT_FOUND[kind]
    assert scan(form) is None
    assert scan(form, every_byte(form)) is None


@pytest.mark.parametrize("value", ["", "a", "ö" * 128, "gpt-4.1 mini/x:y", "😀" * 128])
def test_values(value: str) -> None:
    """Any text up to 128 characters, also none."""
    found = scan(field("model", value) + END)
    assert found is not None
    assert found.value == value


DISPOSITION = "Content-Disposition: form-data; "
REFUSED = {
    "no form": b'{"model":"m"}',
    "another boundary": field("model", "m", b"other") + b"--other--",
    "a preamble": b"hello\r\n" + MODEL + END,
    "a line break first": b"\r\n" + MODEL + END,
    "bare line feeds": (MODEL + END).replace(b"\r\n", b"\n"),
    "a bare line feed behind the delimiter": MODEL.replace(b"sep\r\n", b"sep\n") + END,
    "a bare line feed before a delimiter": MODEL[:-2] + b"\n" + MODEL + END,
    "a delimiter in a line": file(b"abc--sep") + END,
    "a longer delimiter": MODEL + b"--separate\r\n\r\n" + END,
    "a delimiter in the headers": part('X: a\r\n--sep\r\nContent-Disposition: form-data; name="a"') + END,
    "no empty line": b'--sep\r\nContent-Disposition: form-data; name="model"\r\n--sep--\r\n',
    "no line break before the delimiter": part(DISPOSITION + "name=a", b"")[:-2] + END,
    "no headers": b"--sep\r\n\r\nm\r\n" + END,
    "a part after the end": MODEL + END + MODEL,
    "a second end": MODEL + END + END,
    "endless padding": b"--sep" + b" " * 100 + b"\r\n" + MODEL,
    "endless headers": part(DISPOSITION + "name=a\r\nX: " + "y" * 9000) + END,
    "no disposition": part("Content-Type: text/plain") + END,
    "another disposition": part('Content-Disposition: attachment; name="model"') + END,
    "two dispositions": part(DISPOSITION + "name=a\r\n" + DISPOSITION + "name=model") + END,
    "two names": part(DISPOSITION + "name=a; name=model") + END,
    "an extended name": part(DISPOSITION + "name=a; name*=utf-8''model") + END,
    "a folded line": part('Content-Disposition: form-data;\r\n name="model"') + END,
    "a blank before the colon": part('Content-Disposition : form-data; name="model"') + END,
    "a bare carriage return": part(b"X: a\rContent-Disposition: form-data; name=model") + END,
    "an open quote": part(DISPOSITION + 'name="model') + END,
    "an escaped letter": part(DISPOSITION + 'name="mod\\el"') + END,
    "a percent": part(DISPOSITION + 'name="%6dodel"') + END,
    "another case": field("Model", "m") + END,
    "a blank in the name": field("model ", "m") + END,
    "a file": part(DISPOSITION + 'name="model"; filename="m"') + END,
    "coded": part(DISPOSITION + 'name="model"\r\nContent-Transfer-Encoding: base64', b"bQ==") + END,
    "utf-16": part(DISPOSITION + 'name="model"\r\nContent-Type: text/plain; charset=utf-16') + END,
    "json": part(DISPOSITION + 'name="model"\r\nContent-Type: application/json', b'"m"') + END,
    "no utf-8": field("model", b"\xff") + END,
    "129 characters": field("model", "ö" * 129) + END,
    "long": field("model", "a" * 1000) + END,
    "a line break in the model": field("model", "a\r\nb") + END,
    "a control character": field("model", "a\0") + END,
    "too many parts": field("a", "b") * 1001 + END,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    """What servers read in different ways: in one piece or byte by byte."""
    form = REFUSED[kind]
    assert outcome(form) == "bad_request"
    assert outcome(form, every_byte(form)) == "bad_request"


@pytest.mark.parametrize("second", [MODEL, field("model", "other"), part(DISPOSITION + "name=model")])
@pytest.mark.parametrize("between", [b"", file(b"z" * 100_000)])
def test_a_second_model(second: bytes, between: bytes) -> None:
    """Whichever of two an upstream takes: it is not asked."""
    assert outcome(MODEL + between + second + END) == "duplicate_key"
    assert outcome(MODEL + second + END, every_byte(MODEL + second)) == "duplicate_key"


def test_another_name() -> None:
    """Only the value changes, whatever its length."""
    form = file(b"abc") + field("model", "ö") + field("language", "en") + END
    found = scan(form)
    assert found is not None
    for name in ("a", "gpt-4.1-eu", "ü" * 50):
        again = with_model(form, found, name)
        assert again == file(b"abc") + field("model", name) + field("language", "en") + END
        found_again = scan(again)
        assert found_again is not None
        assert found_again.value == name


# ── any form, any cuts ───────────────────────────────────────────────────────────────────────────────────

NASTY = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            [
                *(b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"-", b"--", b" ", b":"),
                *(b"sep", b"--sep", b"\r\n--sep", b"--sep--", b"m", b"model"),
                *(b'name="model"', b'Content-Disposition: form-data; name="model"'),
            ]
        ),
        max_size=14,
    ).map(b"".join),
)
NAMES = st.sampled_from(["model", "file", "prompt", "Model", "model ", "a"])
FORMS = st.one_of(
    NASTY,
    st.builds(
        lambda parts, tail: b"".join(field(name, value) for name, value in parts) + tail,
        st.lists(st.tuples(NAMES, NASTY), max_size=4),
        st.sampled_from([END, b"", b"--sep--", END + END]),
    ),
)


@given(FORMS, st.data())
def test_cuts_do_not_matter(form: bytes, data: st.DataObject) -> None:
    """The same answer however the bytes arrive."""
    cuts = data.draw(st.lists(st.integers(0, len(form)), max_size=12))
    assert outcome(form, cuts) == outcome(form) == outcome(form, every_byte(form))


SAFE = st.binary(max_size=200).filter(lambda raw: b"--sep" not in raw)


@given(
    st.lists(st.tuples(st.sampled_from(["file", "prompt", "a"]), SAFE), max_size=5),
    st.text("ab-.ö/", max_size=20),
)
@example([], "")
def test_found_among_anything(parts: list[tuple[str, bytes]], model: str) -> None:
    """A well-formed form is never refused, and its model is where it is said to be."""
    raw = [field(name, value) for name, value in parts]
    at = random.Random(len(parts)).randrange(len(raw) + 1)
    form = b"".join([*raw[:at], field("model", model), *raw[at:], END])
    found = scan(form)
    assert found is not None
    assert found.value == model
    assert form[found.start : found.end] == model.encode()


@given(FORMS)
def test_python_reads_the_same(form: bytes) -> None:
    """Where a model is found, the standard library's parser finds exactly this one."""
    found = outcome(form + END)
    if not isinstance(found, Field):
        return
    message = email.message_from_bytes(
        b'Content-Type: multipart/form-data; boundary="sep"\r\n\r\n' + form + END, policy=email.policy.HTTP
    )
    values = [
        each.get_payload(decode=True)
        for each in message.iter_parts()
        if each.get_param("name", header="content-disposition") == "model"
    ]
    assert values == [found.value.encode()]


async def test_what_clients_write() -> None:
    """aiohttp's own forms, with parts as it describes them."""
    form = aiohttp.FormData({"model": "whisper-1", "language": "en"})
    form.add_field("file", b"\0\1--\r\n", filename="ü b.mp3", content_type="audio/mpeg")
    payload = form()
    boundary = boundary_of(payload.content_type)
    found = scan(await payload.as_bytes(), boundary=boundary)
    assert found is not None
    assert found.value == "whisper-1"


@pytest.mark.alone
def test_a_large_file_costs_little() -> None:
    """64 MB behind the model, in pieces as they come from a socket: far less than the sending of them."""
    scanner = FormScan(B)
    scanner.feed(MODEL + file(b"")[:-2])
    piece = random.Random(1).randbytes(2**18)
    began = time.process_time()
    for _ in range(256):
        scanner.feed(piece)
    assert time.process_time() - began < 1.0
    assert scanner.model is not None
    assert len(scanner._kept) < 100
