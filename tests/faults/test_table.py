"""The table is whole, and what it names is there."""

from __future__ import annotations

from tests.faults.table import TABLE
from tests.kit.tables import complete


def test_thirty_five_rows_and_their_tests() -> None:
    complete(TABLE, 35)
