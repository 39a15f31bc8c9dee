"""Near misses in the sum and its observers: refused with the reason, or rewritten because they are equal."""

from __future__ import annotations

import pytest
from combining import CASES
from mutators import check


@pytest.mark.parametrize("case", CASES.chosen())
def test_near_miss(case):
    check(case)
