"""What a request is expected to take: a quarter of its bytes, and 1,000 for each data: URL."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.tokens import estimate_prompt, most_output

IMAGE = "data:image/png;base64," + "iVBORw0KGgo" * 1000 + "="


def body(*texts: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(texts)}]}).encode()


@pytest.mark.parametrize(("size", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4000, 1000)])
def test_a_quarter_of_the_bytes(size: int, tokens: int) -> None:
    """Rounded up."""
    assert estimate_prompt(b"x" * size) == tokens


@given(st.integers(0, 5), st.text(max_size=50))
def test_data_urls(count: int, text: str) -> None:
    """Each counts 1,000 whatever it holds; the rest of the body counts as without them."""
    with_images, without = body(text, *[IMAGE] * count), body(text, *[""] * count)
    assert estimate_prompt(with_images) == -(-len(without) // 4) + 1000 * count


@pytest.mark.parametrize(
    "url",
    [
        "data:application/pdf;base64,JVBERi0xLjQ",
        "data:audio/wav;codecs=1;base64,UklGRg==",
        "data:;base64,",
        'data:image\\/png;base64,iVBO\\/Rw0\\r\\nKGgo"'[:-1],  # slashes and line ends, escaped
    ],
)
def test_forms_of_data_urls(url: str) -> None:
    """Any media type, with parameters, with JSON's escapes."""
    assert estimate_prompt(b'["%b"]' % url.encode()) == 1001


@pytest.mark.parametrize(
    "text",
    [
        "data: what do you think of it?",
        "data:image/png;base64, is how such a URL begins",
        "data:text/plain,hello",
        "see data:image/png;base64,iVBORw0KGgo",
        "data:" + "x" * 400 + ";base64,iVBO",
        "data:",
    ],
)
def test_what_is_text(text: str) -> None:
    """A string that only begins like one, or only mentions one."""
    assert estimate_prompt(body(text)) == -(-len(body(text)) // 4)


def test_a_string_without_an_end() -> None:
    """Whoever sends that is refused elsewhere; here it is text."""
    cut = b'["data:image/png;base64,iVBORw0KGgo'
    assert estimate_prompt(cut) == -(-len(cut) // 4)


@pytest.mark.parametrize(
    "unit",
    [b'"data:', b'"data:x;base64,', b'"data:;base64," ', b'"data:;base64,A",', b";base64,", b'"', b'"data:x'],
)
def test_large_bodies_are_no_burden(unit: bytes) -> None:
    """32 MB of what makes it look twice: tens of milliseconds, not seconds."""
    large = unit * (2**25 // len(unit))
    start = time.process_time()
    assert estimate_prompt(large) <= len(large) // 4 + 1000 * 10_000
    assert time.process_time() - start < 0.5


@given(st.none() | st.integers(1, 10_000), st.integers(1, 10_000), st.none() | st.integers(1, 20))
def test_most_output(max_tokens: int | None, max_output: int, n: int | None) -> None:
    """Every answer at its longest."""
    each = max_tokens if max_tokens is not None else max_output
    assert most_output(max_tokens, max_output, n) == each * (n or 1)
