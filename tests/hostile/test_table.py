"""The table is whole, and what it names is there."""

from __future__ import annotations

from tests.hostile.table import TABLE
from tests.hostile.test_inputs import INPUTS, SERVED
from tests.kit.tables import complete


def test_forty_rows_and_their_tests() -> None:
    complete(TABLE, 40)


def test_every_input_belongs_to_a_row() -> None:
    assert {each.row for each in (*INPUTS, *SERVED)} <= {row.number for row in TABLE.rows}
