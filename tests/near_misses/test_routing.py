"""Near misses in the router and its weights: refused with the reason, or rewritten because they are equal."""

from __future__ import annotations

import pytest
from mutators import check
from routing import CASES


@pytest.mark.parametrize("case", CASES.chosen())
def test_near_miss(case):
    check(case)
