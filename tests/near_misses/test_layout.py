"""Near misses in the layout of the weights: refused with the reason, or rewritten because they are equal."""

from __future__ import annotations

import pytest
from layout import CASES
from mutators import check


@pytest.mark.parametrize("case", CASES.chosen())
def test_near_miss(case):
    check(case)
