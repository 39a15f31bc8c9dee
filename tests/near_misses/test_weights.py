"""Near misses about the weight tensors: refused with the reason, or rewritten because they are equal."""

from __future__ import annotations

import pytest
from mutators import check
from weights import CASES


@pytest.mark.parametrize("case", CASES.chosen())
def test_near_miss(case):
    check(case)
