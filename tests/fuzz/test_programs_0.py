"""Random programs, seeds 0 to 62; four files, so that workers share them."""

from __future__ import annotations

import pytest
from programs import PER_FILE, is_accepted


@pytest.mark.parametrize("seed", range(0 * PER_FILE, 1 * PER_FILE))
def test_program(seed):
    is_accepted(seed)
