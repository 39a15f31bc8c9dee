"""Near misses inside an expert: refused with the reason, or rewritten because they are equal."""

from __future__ import annotations

import pytest
from inside import CASES
from mutators import check


@pytest.mark.parametrize("case", CASES.chosen())
def test_near_miss(case):
    check(case)
