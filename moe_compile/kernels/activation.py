"""What happens between the two GEMMs, inside the epilogue of the first, and its torch twin.

The formula and its constants are those of ``spec.Activation``. NaN is carried through every clamp and
rectifier, as torch does: hardware minimum and maximum would drop it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LAYOUTS = ("single", "concat", "interleaved", "separate")


class Function(NamedTuple):
    """The activation as a compile-time argument; an infinite limit is None and costs nothing."""

    name: str
    alpha: float
    gate_limit: float | None
    up_limit: float | None
    act_limit: float | None
    up_offset: float
    gated: bool


@dataclass(frozen=True)
class Epilogue:
    """The activation of one layer, hashable, so that the launch constants are built once per layer.

    ``layout`` says where the up rows are: ``single`` (not gated), ``concat`` ([gate; up] in one weight),
    ``interleaved`` (alternating rows of one weight) or ``separate`` (a weight of their own).
    """

    name: str
    args: tuple[float, float, float, float, float]
    layout: str

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"gate/up layout {self.layout!r} is not one of {', '.join(LAYOUTS)}")

    @cached_property
    def gated(self) -> bool:
        return self.layout != "single"

    @cached_property
    def function(self) -> Function:
        """The compile-time argument of the kernels."""
        alpha, gate, up, act, offset = self.args
        limits = [None if v == math.inf else float(v) for v in (gate, up, act)]
        return Function(self.name, float(alpha), limits[0], limits[1], limits[2], float(offset), self.gated)


NO_EPILOGUE = Epilogue("identity", (1.0, math.inf, math.inf, math.inf, 0.0), "single")


@triton.jit
def activate(g, u, F: tl.constexpr, ONCE: tl.constexpr):
    """fp32 gate and up of any shape -> fp32; ``F`` has the fields of ``Function``, no gate ignores ``u``.

    ``ONCE``: computed and returned in fp64, so that an fp32 result is rounded once. The fast exponential and
    division of the hardware are off by several roundings of fp32, which shows in an fp32 layer and in no other.
    """
    if ONCE:
        g = g.to(tl.float64)
        u = u.to(tl.float64)
    if F.gate_limit is not None:
        g = tl.minimum(g, F.gate_limit, propagate_nan=tl.PropagateNan.ALL)
    if F.name == "silu":
        a = g * tl.sigmoid(F.alpha * g)
    elif F.name == "gelu":
        a = 0.5 * g * (1.0 + tl.math.erf(g * 0.7071067811865476))
    elif F.name == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) == sigmoid(2 z)
        a = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif F.name == "relu":
        a = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif F.name == "relu2":
        a = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
        a = a * a
    else:
        tl.static_assert(F.name == "identity")
        a = g
    if F.act_limit is not None:
        a = tl.minimum(a, F.act_limit, propagate_nan=tl.PropagateNan.ALL)
    if F.gated:
        if F.up_limit is not None:
            u = tl.minimum(u, F.up_limit, propagate_nan=tl.PropagateNan.ALL)
            u = tl.maximum(u, -F.up_limit, propagate_nan=tl.PropagateNan.ALL)
        a = a * (u + F.up_offset)
    return a


def activate_twin(gate: Tensor, up: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Torch twin of ``activate``; ``up`` is None exactly when the layout is ``single``."""
    alpha, gate_limit, up_limit, act_limit, up_offset = epilogue.args
    g = gate.clamp(max=gate_limit)
    if epilogue.name == "silu":
        a = g * torch.sigmoid(alpha * g)
    elif epilogue.name == "gelu":
        a = torch.nn.functional.gelu(g)
    elif epilogue.name == "gelu_tanh":
        a = torch.nn.functional.gelu(g, approximate="tanh")
    elif epilogue.name in ("relu", "relu2"):
        a = torch.relu(g)
        a = a * a if epilogue.name == "relu2" else a
    else:
        a = g
    a = a.clamp(max=act_limit)
    if up is None:
        return a
    return a * (up.clamp(-up_limit, up_limit) + up_offset)
