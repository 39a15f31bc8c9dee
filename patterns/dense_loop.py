"""Every expert on every token, then a masked sum.

out = sum_e (w * [ids == e]).sum(-1) * expert_e(x)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moe_compile.match.engine import Engine, Rules
from moe_compile.match.facts import Sum
from moe_compile.match.layer import Found, build, expert_of
from moe_compile.match.nodes import aten
from moe_compile.spec import NoMatch

from ._examples import GatedMLP, Layer, PlainMLP

ANCHORS = (aten.add.Tensor, aten.add_.Tensor)
RULES: Rules = {}


class MaskedDense(Layer):
    """A ModuleList, each expert's weight is the sum over the slots that chose it."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            out = out + (w * (ids == e)).sum(-1, keepdim=True) * mlp(x)
        return out


class ScatteredDense(Layer):
    """The weights scattered to ``[T, E]`` first, one column per expert; biases and GELU."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(PlainMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        dense = torch.zeros(x.shape[0], self.experts, dtype=w.dtype, device=w.device).scatter_(1, ids, w)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            out += dense[:, e : e + 1] * mlp(x)
        return out


class StackedDense(Layer):
    """Rows of stacked parameters instead of modules, ``[E, 2I, H]`` with the gate first."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            gate, up = F.linear(x, self.w13[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.w2[e])
            out = out + y * torch.where(ids == e, w, 0.0).sum(-1, keepdim=True)
        return out


EXAMPLES = (MaskedDense, ScatteredDense, StackedDense)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """Single experts, each on every token."""
    if any(expert_of(p) is None or p.val.rows is not None for p in total.parts):
        raise NoMatch("MC200", "not every expert runs on all tokens by itself", output)
    return build(engine, output, total, "dense_loop")
