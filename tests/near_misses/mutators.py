"""Near misses: one-line changes of base programs, each with what must become of it.

A mutator is a number of ``NAMES`` and a function ``base class -> changed class``; ``near(...)`` registers it for some
bases, each with its expectation: ``EQUAL`` (rewritten, because it still is the plain layer), codes ``MC...`` (refused
with them, one for each routing decision) or ``UNSEEN`` (the program has no routing decision, so there is no candidate).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bases import LOOPS, Base, Dense, tokens
from support import Outcome, assert_accurate, rewritten
from torch.utils._pytree import tree_leaves

EQUAL, UNSEEN = "equal", "unseen"

NAMES = {
    1: "one expert has another activation", 2: "one expert has a bias", 3: "one expert has another inner size",
    4: "two experts swapped against the ids", 5: "expert list reversed", 6: "the last expert is skipped",
    7: "one expert is visited twice", 8: "ids offset by one", 9: "weights from another token",
    10: "weights squared", 11: "index_copy instead of add", 12: "assigned instead of added",
    13: "accumulates into the input", 14: "the sum starts from the input", 15: "the sum starts from ones",
    16: "token index from a different mask", 17: "slot index wrong", 18: "top-k of the smallest",
    19: "top-k over the tokens (expert choice)", 20: "weights from the softmax of another tensor",
    21: "renormalised before a drop", 22: "capacity limit", 23: "tokens dropped by a threshold",
    24: "dropout inside an expert", 25: "noise in the router", 26: "experts skipped at random",
    27: "expert output detached", 28: "weights detached", 29: "a scale per expert", 30: "a LayerNorm per expert",
    31: "BatchNorm inside an expert", 32: "experts see a position or another input",
    33: "a mean over tokens inside an expert", 34: "an expert reads the sum of those before",
    35: "the loop breaks early", 36: "nested MoE", 37: "a weight shared by two experts",
    38: "a weight written between uses", 39: "a hook on an expert", 40: "a forward pre-hook on the layer",
    41: "a parametrized weight", 42: "a tensor subclass as weight", 43: "a DTensor as weight",
    44: "mixed dtypes across experts", 45: "float64 model", 46: "complex model", 47: "int8 weights with a scale",
    48: "an expert on another device", 49: "an inner output is returned", 50: "every expert's output is saved",
    51: "router values written after use", 52: "combined by maximum", 53: "combined by mean",
    54: "expert outputs concatenated", 55: "soft MoE without top-k", 56: "weights under a threshold are zero",
    57: "gate and up swapped", 58: "silu on the other half", 59: "interleaved read as concatenated",
    60: "square weights transposed", 61: "as many experts as features", 62: "K = E", 63: "E = 1",
    64: "a factor after a nonlinearity", 65: "a bias after the sum", 66: "the mask multiplies the input",
    67: "padding mask after the layer", 68: "in-place activation on a shared tensor",
    69: "a view of the output is written later", 70: "hidden states through fp8 or int",
    71: "autocast ends inside the loop", 72: "a reduction that is no plain sum",
}  # fmt: skip

NESTED = 36  # its inner layers are rewritten, as dense loops
LOOP_FORMS = tuple(base.form for base in LOOPS)  # the nearest form of a broken loop may be another kind of loop

Change = Callable[[type[Base]], type[Base]]


@dataclass(frozen=True)
class Case:
    """One program: mutator ``number`` on ``base``."""

    number: int
    base: type[Base]
    change: Change
    expect: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    count: int = 5
    note: str = ""

    @property
    def id(self) -> str:
        name = NAMES.get(self.number, "") if not self.note else f"{NAMES.get(self.number, '')}: {self.note}"
        return f"{self.number:02d} {name} [{self.base.__name__}]"

    def layer(self) -> Base:
        torch.manual_seed(0)
        return self.change(self.base)(**self.sizes).eval()


class Cases(list[Case]):
    """Cases of one test file, in entries of one change each."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[list[Case]] = []

    def near(self, number: int, change: Change, expect: Mapping[type[Base], str], note: str = "", **sizes: int) -> None:
        """Register ``change`` as mutator ``number`` for every base of ``expect``."""
        count = sizes.pop("count", 5)
        self += [Case(number, base, change, verdict, sizes, count, note) for base, verdict in expect.items()]
        self.entries.append(self[-len(expect) :])

    def quick(self) -> list[Case]:
        """What every run checks: one base of each entry, in turn, and four different bases of each mutator."""
        taken: dict[int, list[Case]] = {}
        for cases in self.entries:
            taken.setdefault(cases[0].number, []).append(cases[cases[0].number % len(cases)])
        for case in self:
            known = taken[case.number]
            if len({c.base for c in known}) < 4 and case.base not in {c.base for c in known}:
                known.append(case)
        return [c for cases in taken.values() for c in cases]

    def chosen(self) -> list[Any]:
        """pytest parameters: ``quick``, or every base with ``MOE_COMPILE_NEAR_MISSES=all``."""
        every = os.environ.get("MOE_COMPILE_NEAR_MISSES") == "all"
        return [pytest.param(c, id=c.id) for c in (self if every else self.quick())]


def each(bases: Any, verdict: str, **others: str) -> dict[type[Base], str]:
    """The same verdict for every base, except those named."""
    return {base: others.get(base.__name__, verdict) for base in bases}


def override(**methods: Any) -> Change:
    """Replace steps of the base: ``lambda self, ...``."""
    return lambda base: type(f"Near{base.__name__}", (base,), methods)


def wrap(**methods: Any) -> Change:
    """Replace steps by functions that get the base's own step first: ``lambda step, self, ...``."""

    def change(base: type[Base]) -> type[Base]:
        return type(f"Near{base.__name__}", (base,), {k: _wrapped(f, getattr(base, k)) for k, f in methods.items()})

    return change


def _wrapped(function: Any, step: Any) -> Any:
    return lambda self, *args: function(lambda *a: step(self, *a), self, *args)


def parts(function: Callable[[Any], None]) -> Change:
    """Change the modules of a layer after it was built."""

    def change(base: type[Base]) -> type[Base]:
        def build(self: Any) -> None:
            base.build(self)
            function(self)

        return type(f"Near{base.__name__}", (base,), {"build": build})

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(base: type[Base]) -> type[Base]:
        for one in changes:
            base = one(base)
        return base

    return change


def reference(layer: Base, x: torch.Tensor) -> Any:
    """The layer in float64 with the routing of its own precision."""
    torch.manual_seed(1)
    w, ids = layer.route(x)
    twin = copy.deepcopy(layer).double()
    twin.route = lambda _: (w.double(), ids)  # type: ignore[method-assign]
    return twin(x.double())


def run(case: Case) -> tuple[Outcome, Any, Any, Base, torch.Tensor]:
    """Compile and run a case and its original on equal inputs: outcome, original result, inputs afterwards."""
    layer = case.layer()
    torch.manual_seed(2)
    x = tokens(layer, case.count)
    mine, theirs = x.clone(), x.clone()
    twin = copy.deepcopy(layer)
    torch.manual_seed(1)
    outcome = rewritten(twin, mine)
    torch.manual_seed(1)
    original = copy.deepcopy(layer)
    with torch.no_grad():
        expected = original(theirs)
    assert torch.equal(mine, theirs), "the input was changed otherwise"
    for a, b in zip(twin.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(a, b), "a parameter or buffer was changed otherwise"
    return outcome, expected, x, layer, mine


def check(case: Case) -> None:
    """Run a case: its verdict, its reason, its place, and its numbers."""
    outcome, expected, x, layer, _ = run(case)
    expected_sites = [] if case.expect == UNSEEN else case.expect.split()
    found = [s.code or EQUAL for s in outcome.sites]
    assert found == expected_sites, [(s.code, s.reason) for s in outcome.sites]
    ops = outcome.ops.count("experts.default") + outcome.ops.count("combine.default")
    assert ops == found.count(EQUAL) and (ops or not outcome.ops)
    for site in outcome.sites:
        assert site.form in {
            case.base.form,
            *(LOOP_FORMS if case.base in LOOPS or case.number == NESTED else ()),
            "",
        }, site
        if site.status == "rewritten":
            assert site.form == (case.base.form if case.number != NESTED else Dense.form)
        else:
            assert site.reason and site.advice() and re.fullmatch(r".+\.py:\d+", site.location), site
    ours, theirs = tree_leaves(outcome.out), tree_leaves(expected)
    if not ops:
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) and a.abs().sum() > 0
        return
    with torch.no_grad():
        exact = tree_leaves(reference(layer, x))
    for a, b, right in zip(ours, theirs, exact, strict=True):
        if a.is_floating_point():
            assert_accurate(a, b, right)
        else:
            assert torch.equal(a, b)
