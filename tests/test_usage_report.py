"""Reports: exact sums over one file or many, what was saved, what a month costs, and the picture."""

from __future__ import annotations

import csv
import io
import random
import re
import shutil
import sqlite3
from contextlib import closing
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import OperationError
from proxy.ledger_file import LedgerFile
from proxy.ledger_read import GROUPS, Group, LedgerFailed, Sums, grouped
from proxy.ledger_row import MOST, Row
from proxy.usage_chart import svg
from proxy.usage_report import (
    Line,
    as_csv,
    documents,
    fields_of,
    folded,
    lines,
    moment,
    notes,
    projection,
    saved_percent,
    table,
    total,
)
from tests.kit.ledger import row, unknown

DAY_S = 86400
NOON = 20_000 * DAY_S + DAY_S / 2  # 2024-10-04T12:00:00Z
USD = 10**12


def file_of(path: Path, rows: list[Row]) -> Path:
    with closing(LedgerFile(path)) as file:
        assert file.insert(rows) == 0
    return path


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_three_states(tmp_path: Path) -> None:
    """Unknown usage and missing prices are counted, and in no sum; an estimate is in both."""
    rows = [row(NOON), unknown(NOON), row(NOON, usage_source="estimated"), row(NOON, cost_picos=None)]
    (group,) = grouped([file_of(tmp_path / "l.db", rows)], (), None, None)
    assert group.sums == Sums(
        requests=4,
        estimated=1,
        unknown=1,
        unpriced=1,
        prompt_tokens=30,
        cached_tokens=12,
        completion_tokens=15,
        reasoning_tokens=3,
        cost_picos=14_000,
        list_cost_picos=20_000,
    )
    assert notes(group.sums) == [
        "1 request whose usage nobody reported: not in the cost",
        "1 request of models without a price: not in the cost",
        "1 request with an estimated usage: in the cost",
    ]


def test_no_saving_without_a_list_price(tmp_path: Path) -> None:
    """A model without one counts with its price on both sides; one without a price on neither."""
    rows = [
        row(NOON, cost_picos=2, list_cost_picos=10),
        row(NOON, cost_picos=5, list_cost_picos=None),
        row(NOON, cost_picos=None, list_cost_picos=1000),
    ]
    (group,) = grouped([file_of(tmp_path / "l.db", rows)], (), None, None)
    assert (group.sums.cost_picos, group.sums.list_cost_picos) == (7, 15)
    assert saved_percent(group.sums) == "53.33"
    assert saved_percent(Sums()) == "0.00"
    assert saved_percent(Sums(cost_picos=3, list_cost_picos=2)) == "-50.00"


def test_beyond_64_bits(tmp_path: Path) -> None:
    """27.7 million dollars, and absurd numbers of tokens: SQLite's own sum fails there."""
    rows = [row(NOON, cost_picos=MOST, list_cost_picos=MOST, prompt_tokens=2**62) for _ in range(3)]
    path = file_of(tmp_path / "l.db", rows)
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.OperationalError):
        connection.execute("SELECT sum(cost_picos) FROM ledger").fetchone()
    (group,) = grouped([path], ("model",), None, None)
    assert (group.sums.cost_picos, group.sums.prompt_tokens) == (3 * MOST, 3 * 2**62)
    (document,) = documents(lines([group], ("model",)), ("model",), baseline=False)
    assert document["cost_usd"] == "27670116.110564327421"


def test_groups_and_times(tmp_path: Path) -> None:
    """Every field; from `since` on, before `until`, to the millisecond."""
    rows = [
        row(NOON - DAY_S, key_id="a", model="m"),
        row(NOON, key_id="b", model="m", plan="basic"),
        row(NOON + 0.001, key_id="b", model="n"),
    ]
    path = file_of(tmp_path / "l.db", rows)
    assert [g.keys for g in grouped([path], ("day", "key", "model"), None, None)] == [
        (19_999, "a", "m"),
        (20_000, "b", "m"),
        (20_000, "b", "n"),
    ]
    assert total(grouped([path], ("model",), NOON, None)).requests == 2
    assert total(grouped([path], ("model",), NOON, NOON + 0.001)).requests == 1
    assert total(grouped([path], ("model",), NOON + 0.001, None)).requests == 1
    for field in GROUPS:
        assert total(grouped([path], (field,), None, None)).requests == 3
    folds = folded(grouped([path], ("day", "key", "model"), None, None), ("day", "key", "model"), ("key",))
    assert {(g.keys, g.sums.requests) for g in folds} == {(("a",), 1), (("b",), 2)}
    shown = lines(grouped([path], ("model", "day"), None, None), ("model", "day"))
    assert [line.keys for line in shown] == [("m", "2024-10-03"), ("m", "2024-10-04"), ("n", "2024-10-04")]


def test_files_of_many_machines(tmp_path: Path) -> None:
    """Sixteen files, more than SQLite attaches, that share rows: the sum is that of all rows, each once."""
    chance = random.Random(5)
    rows = [row(NOON - chance.randrange(10 * DAY_S), cost_picos=chance.randrange(10**13)) for _ in range(800)]
    paths = [file_of(tmp_path / f"{n}.db", chance.sample(rows, 300)) for n in range(16)]
    paths.append(file_of(tmp_path / "all.db", rows))
    merged = grouped(paths, ("day",), None, None)
    assert merged == grouped(paths[-1:], ("day",), None, None)
    assert merged == grouped([*paths, *paths], ("day",), None, None)
    assert total(merged).cost_picos == sum(each.cost_picos or 0 for each in rows)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """One line that names the file."""
    with pytest.raises(LedgerFailed, match=r"no\.db: `headrace serve` makes it"):
        grouped([tmp_path / "no.db"], (), None, None)
    (tmp_path / "text.db").write_text("nothing" * 1000)
    with pytest.raises(LedgerFailed, match=r"text\.db cannot be read: file is not a database"):
        grouped([tmp_path / "text.db"], (), None, None)


def test_a_copy_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """Of a ledger that is being written, without the files beside it: what was checkpointed is there."""
    path = file_of(tmp_path / "l.db", [row(NOON)])
    (tmp_path / "copies").mkdir()
    copy = Path(shutil.copy(path, tmp_path / "copies" / "l.db"))
    copy.parent.chmod(0o555)
    assert total(grouped([copy], (), None, None)).requests == 1
    copy.parent.chmod(0o755)


# ── what people ask ──────────────────────────────────────────────────────────────────────────────────────


def test_times_as_people_write_them() -> None:
    assert moment("since", "2024-10-04", NOON) == NOON - DAY_S / 2
    assert moment("since", "2024-10-04T12:00:00Z", NOON) == NOON
    assert moment("since", "2024-10-04T14:00:00+02:00", NOON) == NOON
    assert moment("since", "7d", NOON) == NOON - 7 * DAY_S
    assert moment("since", "24h", NOON) == NOON - DAY_S
    for wrong in ("yesterday", "2024-13-01", "2024-10-04 nonsense", "", "-1d", "7"):
        with pytest.raises(OperationError, match="since: expected"):
            moment("since", wrong, NOON)


def test_fields_as_people_write_them() -> None:
    assert fields_of("key, model,day,key") == ("key", "model", "day")
    assert fields_of("") == ()
    with pytest.raises(OperationError, match=r"by: unknown field 'modle' \(did you mean 'model'\?\)"):
        fields_of("modle")


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────

LINES = [
    Line(("gpt-4.1", "2024-10-03"), Sums(1200, 0, 0, 0, 500_000, 0, 200_000, 0, 7_400_000_000_000, 17 * USD)),
    Line(("=cmd()", "2024-10-04"), Sums(3, 1, 2, 0, 10, 4, 5, 1, 7_500_000, 7_500_000)),
]
WHOLE = total(Group((), line.sums) for line in LINES)


TABLE = """\
model    requests   prompt  cached  completion  unknown  estimated   cost USD    list USD  saved USD  saved %
-------  --------  -------  ------  ----------  -------  ---------  ---------  ----------  ---------  -------
gpt-4.1     1,200  500,000       0     200,000        0          0       7.40       17.00       9.60    56.47
=cmd()          3       10       4           5        2          1  0.0000075   0.0000075       0.00     0.00
-------  --------  -------  ------  ----------  -------  ---------  ---------  ----------  ---------  -------
total       1,203  500,010       4     200,005        2          1  7.4000075  17.0000075       9.60    56.47
"""[:-1]


def test_as_a_table() -> None:
    """Numbers to the right, thousands apart, money with all its digits, no warnings without a cause."""
    shown = table([Line(line.keys[:1], line.sums) for line in LINES], ("model",), WHOLE, baseline=True)
    assert shown == TABLE
    empty = table([], ("model",), Sums(), baseline=False).split("\n")
    assert empty[0].split("  ")[0] == "model"
    assert empty[-1].startswith("total")


def test_as_csv() -> None:
    """A spreadsheet reads it back, and takes no name for a formula."""
    read = list(csv.DictReader(io.StringIO(as_csv(LINES, ("model", "day"), baseline=True))))
    assert [each["model"] for each in read] == ["gpt-4.1", "'=cmd()"]
    assert read[0]["cost_usd"] == "7.40"
    assert read[1]["cost_usd"] == "0.0000075"
    assert list(read[0])[:3] == ["model", "day", "requests"]
    assert list(read[0])[-3:] == ["list_cost_usd", "saved_usd", "saved_percent"]


def test_as_json() -> None:
    """Counts are numbers, money is text."""
    first = documents(LINES, ("model", "day"), baseline=True)[0]
    assert first == {
        "model": "gpt-4.1",
        "day": "2024-10-03",
        "requests": 1200,
        "prompt_tokens": 500_000,
        "cached_tokens": 0,
        "completion_tokens": 200_000,
        "unknown": 0,
        "unpriced": 0,
        "estimated": 0,
        "cost_usd": "7.40",
        "list_cost_usd": "17.00",
        "saved_usd": "9.60",
        "saved_percent": "56.47",
    }
    assert "saved_usd" not in documents(LINES, ("model", "day"), baseline=False)[0]


@given(st.lists(st.integers(0, MOST), max_size=5))
def test_no_digit_is_lost(costs: list[int]) -> None:
    """What is printed adds up to what is in the file."""
    made = [Line((str(at),), Sums(1, cost_picos=cost)) for at, cost in enumerate(costs)]
    printed = documents(made, ("key",), baseline=False)
    assert sum((Fraction(str(each["cost_usd"])) for each in printed), Fraction(0)) == Fraction(
        sum(costs), USD
    )


# ── a month ahead ────────────────────────────────────────────────────────────────────────────────────────


def test_today_stands_for_every_day() -> None:
    """The example: 7.40 so far today is 222.00 for 30 days."""
    ahead = projection({20_000: 7_400_000_000_000}, None, None, NOON)
    assert ahead is not None
    assert ahead.picos == 222 * USD
    assert ahead.text() == "7.40 USD a day (so far), 222.00 USD for 30 days"


def test_whole_days_are_the_better_basis() -> None:
    """Today is not one of them; a day without requests is; --since and --until cut days off."""
    days = {19_996: 4 * USD, 19_997: 2 * USD, 20_000: 100 * USD}
    ahead = projection(days, None, None, NOON)
    assert ahead is not None
    assert (ahead.picos, ahead.days) == (45 * USD, 4)
    assert ahead.text() == "1.50 USD a day (mean of 4 whole days), 45.00 USD for 30 days"
    since = projection(days, 19_996.5 * DAY_S, None, NOON)
    assert since is not None
    assert (since.picos, since.days) == (20 * USD, 3)
    until = projection(days, None, 19_997 * DAY_S, NOON)
    assert until is not None
    assert (until.picos, until.days) == (120 * USD, 1)
    assert projection({}, None, None, NOON) is None


def test_the_last_24_hours_are_one_day() -> None:
    """In two calendar days, none of them whole."""
    ahead = projection({19_999: 3 * USD, 20_000: 4 * USD}, NOON - DAY_S, None, NOON)
    assert ahead is not None
    assert ahead.picos == 210 * USD


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────────

SVG = "{http://www.w3.org/2000/svg}"
COSTS = {(20_000, "gpt-4.1"): 5 * USD, (20_002, "gpt-4.1"): 2 * USD, (20_002, "claude"): 500_000_000_000}


def words(picture: ElementTree.Element) -> list[str]:
    return ["".join(each.itertext()) for each in picture.iter(f"{SVG}text")]


def test_a_picture() -> None:
    """Total, period, a legend with the sums, round numbers on the axis, dates, the values under the pointer;
    both colour schemes; nothing is fetched or run."""
    text = svg(20_000, 3, COSTS)
    picture = ElementTree.fromstring(text)
    assert words(picture) == [
        "$7.50",
        "4 Oct to 6 Oct 2024, days in UTC",
        "gpt-4.1$7.00",
        "claude$0.50",
        "$0",
        "$2",
        "$4",
        "$6",
        "6 Oct",
        "5 Oct",
        "4 Oct",
    ]
    titles = [each.text for each in picture.iter(f"{SVG}title")]
    assert titles[0] == "Spend a day, 4 Oct to 6 Oct 2024"
    assert "6 Oct: $2.50\ngpt-4.1 $2.00\nclaude $0.50" in titles
    assert picture.get("role") == "img"
    assert set((picture.get("aria-labelledby") or "").split()) <= {e.get("id") for e in picture.iter()}
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"<script|href|url\(|@import|on\w+=", text)


def test_a_picture_of_nothing() -> None:
    """An empty month has axes, and says so."""
    picture = ElementTree.fromstring(svg(20_000, 30, {}))
    assert words(picture)[0] == "$0.00"
    assert "nothing was spent" in "".join(picture.find(f"{SVG}desc").itertext())  # type: ignore[union-attr]  # None would fail the test


def test_names_are_text() -> None:
    """A model's name cannot become markup."""
    picture = ElementTree.fromstring(svg(20_000, 1, {(20_000, "<script>&\"'"): USD}))
    assert any("<script>&\"'" in each for each in words(picture))
    assert not list(picture.iter(f"{SVG}script"))


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@given(
    st.integers(1, 400),
    st.dictionaries(st.tuples(st.integers(20_000, 20_420), NAMES), st.integers(0, 10**17), max_size=30),
)
def test_any_picture(days: int, costs: dict[tuple[int, str], int]) -> None:
    """It is XML, no bar leaves the axes, and it says what they are worth."""
    picture = ElementTree.fromstring(svg(20_000, days, costs))
    shown = sum(picos for (day, _), picos in costs.items() if day < 20_000 + days)
    assert abs(Decimal(words(picture)[0].strip("$").replace(",", "")) - Decimal(shown) / USD) <= Decimal(
        "0.005"
    )
    heights = [
        float(found[1])
        for each in picture.iter(f"{SVG}path")
        if (found := re.match(r"M[\d.]+ [\d.]+v-([\d.]+)", each.get("d") or ""))
    ]
    assert all(0 <= height <= 260.1 for height in heights)
    assert len(list(picture.iter(f"{SVG}g"))) >= days
