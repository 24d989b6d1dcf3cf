"""The SDKs that people use, each in an environment of its own, driven through a running Headrace."""

import pytest

# Before it is imported: a failing case says what it saw.
pytest.register_assert_rewrite("tests.sdk.cases")
