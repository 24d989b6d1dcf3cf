"""What an answer cost: exact, or not known.

A price is in USD per million tokens with at most six decimals, so one token costs a whole number of
picodollars (1e-12 USD) and every cost is an integer sum: nothing is ever rounded. Only `cost_nanos` rounds,
for counters of 64 bits that are shared between processes.
"""

from __future__ import annotations

from decimal import Decimal

import msgspec

from proxy.usage import Source, Usage

_DECIMALS = 6
_HIGHEST = 1_000_000
_PICOS_PER_NANO = 1000


class Price(msgspec.Struct, frozen=True):
    """USD per million tokens. `cached_input` is `input` if it is left out."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None

    def __post_init__(self) -> None:
        for amount in (self.input, self.output, self.cached_input):
            if amount is not None and not _is_price(amount):
                raise ValueError(
                    f"a price is 0 to {_HIGHEST} USD per million tokens, with at most {_DECIMALS} decimals"
                )


def _is_price(amount: Decimal) -> bool:
    if not amount.is_finite() or amount.is_signed() or amount > _HIGHEST:
        return False
    return amount == round(amount, _DECIMALS)


def cost_usd(usage: Usage, price: Price | None) -> Decimal | None:
    """USD, exact; None if the usage or the price is not known. An estimate costs what it estimates."""
    picos = _cost_picos(usage, price)
    # The constructor is exact; arithmetic would round to the 28 digits of the default context.
    return None if picos is None else Decimal(f"{picos}e-12")


def cost_nanos(usage: Usage, price: Price | None) -> int | None:
    """Nanodollars (1e-9 USD), rounded up: a budget may end a billionth early, it is never overdrawn."""
    picos = _cost_picos(usage, price)
    return None if picos is None else -(-picos // _PICOS_PER_NANO)


def _cost_picos(usage: Usage, price: Price | None) -> int | None:
    if price is None or usage.source is Source.UNKNOWN:
        return None
    cached_input = price.input if price.cached_input is None else price.cached_input
    return (
        (usage.prompt_tokens - usage.cached_tokens) * _picos(price.input)
        + usage.cached_tokens * _picos(cached_input)
        + usage.completion_tokens * _picos(price.output)
    )


def _picos(price: Decimal) -> int:
    """Picodollars a token: a millionth of a dollar per million is one."""
    return int(price.scaleb(_DECIMALS))


def format_usd(amount: Decimal) -> str:
    """All digits and no exponent, at least cents: `7.40`, `0.0000075`."""
    whole, _, decimals = f"{amount:f}".partition(".")
    return f"{whole}.{decimals.rstrip('0').ljust(2, '0')}"
