"""Random programs, seeds 126 to 188; four files, so that workers share them."""

from __future__ import annotations

import pytest
from programs import PER_FILE, is_accepted


@pytest.mark.parametrize("seed", range(2 * PER_FILE, 3 * PER_FILE))
def test_program(seed):
    is_accepted(seed)
