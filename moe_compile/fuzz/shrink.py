"""Make a failing case simple: axes go to their first values, one at a time, while the same failure persists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from .axes import AXES, Case, from_dict, valid
from .judge import Verdict, judge

_ORDER = (
    "mutation", "beside", "around", "inputs", "rank", "mode", "style", "routing", "renormalise", "router", "weight",
    "activation", "expert", "transposed", "layout", "dtype", "tokens", "top_k", "experts", "inter", "hidden", "form",
)  # fmt: skip


def shrink(case: Case, kind: str, run: Callable[[Case], Verdict] = judge) -> Case:
    """The simplest case found that still gives a verdict of ``kind``; ``case`` itself at worst."""
    moved = True
    while moved:
        moved = False
        for axis in _ORDER:
            for value in _simpler(case, axis):
                candidate = from_dict({**asdict(case), axis: value})
                if valid(candidate) and run(candidate).kind == kind:
                    case, moved = candidate, True
                    break
    return case


def _simpler(case: Case, axis: str) -> list[object]:
    """The values of an axis before the case's own, simplest first."""
    values = ["none"] if axis == "mutation" else list(AXES[axis])
    now = getattr(case, axis)
    return values[: values.index(now)] if now in values else values
