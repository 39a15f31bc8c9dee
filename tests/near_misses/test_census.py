"""The list of near misses is whole: every mutator, on at least four bases, and every plain base is rewritten."""

from __future__ import annotations

import combining
import experts
import inside
import layout
import pytest
import routing
import weights
from bases import BASES, MODULES
from mutators import EQUAL, NAMES, Case, check, override

MODULES_OF_CASES = (experts, weights, routing, inside, combining, layout)
# Checked otherwise, with the reason.
ELSEWHERE = {48: "a second device exists only on GPU machines: fake weights of another device in test_checklist.py"}


def bases_of(number):
    return {c.base for m in MODULES_OF_CASES for c in m.CASES.quick() if c.number == number}


def test_every_mutator_has_four_bases():
    assert sorted(NAMES) == list(range(1, 73))
    few = {n: len(bases_of(n)) for n in NAMES if len(bases_of(n)) < 4}
    assert few.keys() == ELSEWHERE.keys(), few
    assert len(MODULES) >= 4 and all(len(reason) > 40 for reason in ELSEWHERE.values())


def test_every_base_meets_most_mutators():
    assert sum(len(m.CASES.quick()) for m in MODULES_OF_CASES) >= 248
    for base in BASES:
        numbers = {c.number for m in MODULES_OF_CASES for c in m.CASES if c.base is base}
        assert len(numbers) >= 24, (base, sorted(numbers))


@pytest.mark.parametrize("base", BASES)
def test_plain_base_is_rewritten(base):
    check(Case(0, base, override(), EQUAL))
