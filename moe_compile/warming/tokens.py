"""For which numbers of tokens something changes, asked and not known: pure functions.

What is asked are the kernels that an op would start. So no second place has to know when they change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import TypeVar

Kind = TypeVar("Kind", bound=Hashable)

EACH = 64  # up to so many tokens every number is looked at
GROWTH = 1.06  # from one number to the next beyond; what changes between two that differ is sought by halving


def regimes(kind: Callable[[int], Kind], highest: int) -> dict[int, Kind]:
    """``kind`` of all numbers up to ``highest`` that show where it changes: both sides of every border.

    Found are all kinds but those that begin and end between two neighbours of a fine grid which are alike.
    """
    seen = {number: kind(number) for number in grid(highest)}
    numbers = sorted(seen)
    todo = list(itertools.pairwise(numbers))
    while todo:
        low, high = todo.pop()
        if high - low > 1 and seen[low] != seen[high]:
            middle = (low + high) // 2
            seen[middle] = kind(middle)
            todo += [(low, middle), (middle, high)]
    return seen


def grid(highest: int) -> list[int]:
    """All numbers up to 64, then ever fewer, each with the next multiple of 16, and powers of two."""
    numbers = set(range(1, min(EACH, highest) + 1)) | {highest}
    number = float(EACH)
    while number < highest:
        number *= GROWTH
        numbers |= {int(number), -(-int(number) // 16) * 16}
    numbers |= {1 << n for n in range(highest.bit_length())}
    return sorted(n for n in numbers if n <= highest)
