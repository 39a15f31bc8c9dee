"""Near misses whose experts differ or answer to other ids: refused with a reason, or rewritten as equal."""

from __future__ import annotations

import pytest
from experts import CASES
from mutators import check


@pytest.mark.parametrize("case", CASES.chosen())
def test_near_miss(case):
    check(case)
