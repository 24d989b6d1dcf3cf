"""Prices: exact to the last digit, and nothing is billed that is not known."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import parse
from proxy.pricing import cost_nanos, cost_picos, cost_usd, format_picos, format_usd, usd
from proxy.schema import Price
from proxy.usage import UNKNOWN, Source, Usage
from proxy.yamlstruct import ConfigError

PRICES = st.decimals(0, 1_000_000, places=6)
COUNTS = st.integers(0, 2**53)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    prompt = draw(COUNTS)
    source = draw(st.sampled_from([Source.REPORTED, Source.ESTIMATED]))
    return Usage(prompt, draw(st.integers(0, prompt)), draw(COUNTS), 0, source)


def price(input: str, output: str, cached: str | None = None) -> Price:
    return Price(
        input=Decimal(input), output=Decimal(output), cached_input=Decimal(cached) if cached else None
    )


def configured(prices: dict[str, object]) -> Price:
    """As a configuration file says it."""
    model = {"upstreams": ["up"], "price": prices}
    document = {"upstreams": {"up": {"base_url": "mock:"}}, "models": {"m": model}}
    found = parse(yaml.safe_dump(document), "test.yaml", {}).models["m"].price
    assert found is not None
    return found


def test_an_example() -> None:
    """500,000 input and 200,000 output at 2 and 32 a million."""
    usage = Usage(500_000, 0, 200_000, 0, Source.REPORTED)
    assert cost_usd(usage, price("2", "32")) == Decimal("7.40")
    assert cost_nanos(usage, price("2.00", "32.00")) == 7_400_000_000


def test_cached_tokens_have_their_own_price() -> None:
    """Which is the input's if none is given; reasoning is part of the output."""
    usage = Usage(1_000_000, 400_000, 100_000, 90_000, Source.REPORTED)
    assert cost_usd(usage, price("2", "8", "0.5")) == Decimal("2.2")
    assert cost_usd(usage, price("2", "8")) == Decimal("2.8")
    assert cost_usd(usage, price("2", "8", "0.0")) == Decimal("2.0")


def test_what_is_not_known_costs_nothing_that_is_known() -> None:
    """Unknown usage or a model without a price: None, not zero. An estimate has a cost."""
    assert cost_usd(UNKNOWN, price("2", "8")) is None
    assert cost_nanos(UNKNOWN, price("2", "8")) is None
    assert cost_usd(Usage(1, 0, 1, 0, Source.REPORTED), None) is None
    assert cost_usd(Usage(1000, 0, 0, 0, Source.ESTIMATED), price("2", "8")) == Decimal("0.002")
    assert cost_usd(Usage(0, 0, 0, 0, Source.REPORTED), price("2", "8")) == 0


@given(usages(), PRICES, PRICES, st.none() | PRICES)
def test_exact(usage: Usage, per_input: Decimal, per_output: Decimal, per_cached: Decimal | None) -> None:
    """No digit is lost, also beyond the 28 of the default context; nanodollars are rounded up."""
    given_price = Price(input=per_input, output=per_output, cached_input=per_cached)
    cached = per_input if per_cached is None else per_cached
    exact = (
        Fraction(per_input) * (usage.prompt_tokens - usage.cached_tokens)
        + Fraction(cached) * usage.cached_tokens
        + Fraction(per_output) * usage.completion_tokens
    ) / 1_000_000
    cost, nanos = cost_usd(usage, given_price), cost_nanos(usage, given_price)
    assert cost is not None
    assert nanos is not None
    assert Fraction(cost) == exact
    assert cost_picos(usage, given_price) == exact * 10**12
    assert usd(int(exact * 10**12)) == cost
    assert 0 <= nanos - exact * 10**9 < 1
    assert Fraction(Decimal(format_usd(cost))) == exact
    assert format_picos(int(exact * 10**12)) == format_usd(cost)
    assert given_price == Price(input=per_input, output=per_output, cached_input=per_cached)


@pytest.mark.parametrize("amount", ["-1", "-0", "NaN", "Infinity", "0.0000001", "1000000.000001", "1E-99999"])
def test_what_is_no_price(amount: str) -> None:
    """A configuration with it is refused, by the name of the field."""
    for field in ("input", "output", "cached_input"):
        prices = {"input": "1", "output": "1"} | {field: amount}
        with pytest.raises(ConfigError, match=rf"price\.{field}: (expected US dollars|must be at most)"):
            configured(prices)


@pytest.mark.parametrize(
    ("written", "meant"), [(2.3, "2.3"), (0.1, "0.1"), (2, "2"), ("0.0375", "0.0375"), (1e-6, "0.000001")]
)
def test_numbers_of_a_configuration(written: object, meant: str) -> None:
    """A YAML float is the decimal that was written, not its binary neighbour."""
    assert configured({"input": written, "output": 0}).input == Decimal(meant)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("7.4", "7.40"),
        ("7.400000000000", "7.40"),
        ("0", "0.00"),
        ("0E-12", "0.00"),
        ("7.5E-6", "0.0000075"),
        ("1E+3", "1000.00"),
        ("100", "100.00"),
    ],
)
def test_text(amount: str, text: str) -> None:
    """All digits, no exponent, at least cents."""
    assert format_usd(Decimal(amount)) == text
