"""Money a day as an SVG: bars of days, stacked by model, for light and dark surroundings.

Drawn by hand: one file without scripts, fonts or requests, small enough to mail. Colours are told apart by
people who see few of them, too, and every value is also text: in the legend, and under the pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html import escape

import msgspec

from proxy.pricing import usd

_WIDTH, _HEIGHT = 960, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 28, 136, 44
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_WIDEST_BAR, _BAR_SHARE = 44.0, 0.68
_NARROW = 6.0  # slots below this have no gaps: they would flicker
_TICKS = 4
_DATE_WIDTH = 64  # one label of the axis, with air
_RADIUS = 3.0
#: Models with a colour of their own; the others together are grey.
_SHOWN = 6
_OTHERS = "other models"
_LEGEND_CHARACTER = 6.7  # the mean width of one at 12 px; names are measured by it
_NAME_CHARACTERS = 28
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Okabe and Ito's colours ("Color Universal Design", 2008) in this order and toned to one weight: neighbours
# differ in lightness as well.
_LIGHT = ("#2563a8", "#e08a1e", "#1f9e83", "#b5568d", "#7fb4e0", "#c9b31c")
_DARK = ("#5b9bdf", "#eda649", "#3fbf9f", "#d27bac", "#a8d0f2", "#e0cf55")
_GREY_LIGHT, _GREY_DARK = "#a3a8b1", "#737985"


class Series(msgspec.Struct, frozen=True):
    """picos: one a day."""

    name: str
    picos: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.picos)


def svg(first_day: int, days: int, costs: Mapping[tuple[int, str], int]) -> str:
    """first_day: days since 1970-01-01; costs: (day, model) -> picodollars."""
    drawn = _series(first_day, days, costs)
    whole = sum(series.total for series in drawn)
    top, step = _scale(max((sum(each) for each in zip(*(s.picos for s in drawn), strict=True)), default=0))
    period = _period(first_day, days)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="spend" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        f' width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-labelledby="spend-title spend-desc">',
        f'<title id="spend-title">Spend a day, {period}</title>',
        f'<desc id="spend-desc">{_text(_described(drawn, whole, period))}</desc>',
        f"<style>{_style()}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}" rx="12"/>',
        f'<text class="head" x="{_LEFT - 44}" y="44">{_dollars(whole)}</text>',
        f'<text class="sub" x="{_LEFT - 44}" y="66">{period}, days in UTC</text>',
        *_legend(drawn),
        *_grid(top, step),
        *_bars(drawn, first_day, days, top),
        *_dates(first_day, days),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _series(first_day: int, days: int, costs: Mapping[tuple[int, str], int]) -> list[Series]:
    """The dearest first, the rest as one."""
    models: dict[str, list[int]] = {}
    for (day, model), picos in costs.items():
        if 0 <= day - first_day < days and picos:
            models.setdefault(model, [0] * days)[day - first_day] += picos
    dearest = sorted(models, key=lambda model: (-sum(models[model]), model))
    # One more than fits is not worth a group of its own.
    own = dearest if len(dearest) <= _SHOWN else dearest[: _SHOWN - 1]
    drawn = [Series(model, tuple(models[model])) for model in own]
    if rest := dearest[len(own) :]:
        sums = tuple(map(sum, zip(*(models[model] for model in rest), strict=True)))
        drawn.append(Series(f"{len(rest)} {_OTHERS}", sums))
    return drawn


# ── numbers and dates ───────────────────────────────────────────────────────────────────────────────────


def _scale(most: int) -> tuple[int, int]:
    """The top of the axis and the step of its lines, in picodollars: 1, 2, 2.5 or 5 times a power of ten."""
    if most <= 0:
        return 10**12, 10**12 // 2
    power = 10 ** max(0, len(str(most // _TICKS)) - 1)
    steps = (power * tenths // 10 for tenths in (10, 20, 25, 50, 100) if power * tenths % 10 == 0)
    step = max(1, next(each for each in steps if each * _TICKS >= most))
    return -(-most // step) * step, step


def _dollars(picos: int) -> str:
    """To the cent; what is less than ten cents to two digits that say something."""
    amount = usd(picos)
    if picos >= 10**11 or not picos:
        return f"${amount.quantize(Decimal('0.01')):,f}"
    digits = 1 - amount.adjusted()
    return f"${round(amount, digits):f}"


def _tick(picos: int, step: int) -> str:
    """As many decimals as the steps need."""
    if not picos:
        return "$0"
    amount = usd(step).normalize()
    decimals = max(0, -int(amount.as_tuple().exponent))
    decimals = 2 if decimals == 1 else decimals
    return f"${usd(picos):,.{decimals}f}"


def _date(day: int) -> datetime:
    return _EPOCH + timedelta(days=day)


def _short(day: int) -> str:
    date = _date(day)
    return f"{date.day} {date:%b}"


def _period(first_day: int, days: int) -> str:
    first, last = _date(first_day), _date(first_day + days - 1)
    if days == 1:
        return f"{first.day} {first:%B %Y}"
    start = f"{first.day} {first:%b}" if first.year == last.year else f"{first.day} {first:%b %Y}"
    return f"{start} to {last.day} {last:%b %Y}"


def _described(drawn: Sequence[Series], whole: int, period: str) -> str:
    by_model = ", ".join(f"{series.name} {_dollars(series.total)}" for series in drawn)
    return f"{_dollars(whole)} from {period}" + (f": {by_model}." if by_model else ": nothing was spent.")


# ── drawing ─────────────────────────────────────────────────────────────────────────────────────────────


def _style() -> str:
    light = "".join(f".m{at}{{fill:{colour}}}" for at, colour in enumerate((*_LIGHT, _GREY_LIGHT)))
    dark = "".join(f".m{at}{{fill:{colour}}}" for at, colour in enumerate((*_DARK, _GREY_DARK)))
    return (
        ".spend{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif;"
        "display:block;max-width:100%;height:auto}"
        ".paper{fill:#fff}.head{font-size:26px;font-weight:650;fill:#15181d;letter-spacing:-.01em}"
        ".sub,.tick{fill:#666d78}.name{fill:#3a4049}.sum{fill:#666d78}"
        ".tick,.sum,.head{font-variant-numeric:tabular-nums}"
        ".line{stroke:#e8eaee}.base{stroke:#b9bec7}.day:hover{opacity:.78}.band{fill:transparent}"
        f"{light}"
        "@media (prefers-color-scheme:dark){.paper{fill:#16191f}.head{fill:#f0f2f5}"
        ".sub,.tick,.sum{fill:#99a1ad}.name{fill:#d3d8e0}.line{stroke:#2a2f38}.base{stroke:#4b525e}"
        f"{dark}}}"
    )


def _class(series: Series, at: int) -> str:
    return f"m{len(_LIGHT)}" if series.name.endswith(_OTHERS) else f"m{at}"


def _legend(drawn: Sequence[Series]) -> Iterator[str]:
    x, y = float(_LEFT - 44), 94.0
    for at, series in enumerate(drawn):
        name, cost = _shortened(series.name), _dollars(series.total)
        width = 40 + (len(name) + len(cost)) * _LEGEND_CHARACTER
        if x > _LEFT and x + width > _WIDTH - _RIGHT:
            x, y = float(_LEFT - 44), y + 18
        yield (
            f'<g transform="translate({x:.0f} {y:.0f})"><title>{_text(series.name)}</title>'
            f'<rect class="{_class(series, at)}" y="-9" width="10" height="10" rx="2.5"/>'
            f'<text x="16"><tspan class="name">{_text(name)}</tspan>'
            f'<tspan class="sum" dx="6">{cost}</tspan></text></g>'
        )
        x += width


def _text(words: str) -> str:
    """Control characters are none of XML's, however they are written (XML 1.0, section 2.2)."""
    return escape("".join(each if each.isprintable() or each == "\n" else "?" for each in words))


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 1] + "…"


def _grid(top: int, step: int) -> Iterator[str]:
    for amount in range(0, top + 1, step):
        y = _y(amount, top)
        kind = "line" if amount else "base"
        yield f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        words = _tick(amount, step)
        yield f'<text class="tick" x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'


def _y(picos: int, top: int) -> float:
    return _TOP + _PLOT_HEIGHT * (1 - picos / top)


def _bars(drawn: Sequence[Series], first_day: int, days: int, top: int) -> Iterator[str]:
    slot = _PLOT_WIDTH / days
    width = min(_WIDEST_BAR, slot * _BAR_SHARE) if slot > _NARROW else slot
    for day in range(days):
        parts = [(at, series) for at, series in enumerate(drawn) if series.picos[day]]
        left = _LEFT + slot * day
        words = [f"{_short(first_day + day)}: {_dollars(sum(s.picos[day] for _, s in parts))}"]
        words += [f"{series.name} {_dollars(series.picos[day])}" for _, series in parts]
        # The band under the pointer is the whole day: a small bar can be asked too.
        yield f'<g class="day"><title>{_text(chr(10).join(words))}</title>'
        yield f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{slot:.1f}" height="{_PLOT_HEIGHT}"/>'
        below = 0
        for place, (at, series) in enumerate(parts):
            low, high = _y(below, top), _y(below + series.picos[day], top)
            gap = 1.0 if place and low - high > 3 else 0.0  # a line of paper between two colours
            last = place == len(parts) - 1
            shape = _bar(left + (slot - width) / 2, high, width, low - gap - high, rounded=last)
            yield f'<path class="{_class(series, at)}" d="{shape}"/>'
            below += series.picos[day]
        yield "</g>"


def _bar(x: float, y: float, width: float, height: float, *, rounded: bool) -> str:
    radius = min(_RADIUS, width / 2, height) if rounded else 0.0
    corner = f"a{radius:.1f} {radius:.1f} 0 0 1 "
    side, flat = height - radius, width - 2 * radius
    return (
        f"M{x:.1f} {y + height:.1f}v{-side:.1f}{corner}{radius:.1f} {-radius:.1f}h{flat:.1f}"
        f"{corner}{radius:.1f} {radius:.1f}v{side:.1f}z"
    )


def _dates(first_day: int, days: int) -> Iterator[str]:
    """As many as fit, evenly; always the last day, which is what people look for."""
    slot = _PLOT_WIDTH / days
    every = max(1, -(-_DATE_WIDTH // max(1, int(slot))), -(-days * _DATE_WIDTH // _PLOT_WIDTH))
    for day in range(days - 1, -1, -every):
        x = _LEFT + slot * (day + 0.5)
        yield (
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 22}" text-anchor="middle">'
            f"{_short(first_day + day)}</text>"
        )
