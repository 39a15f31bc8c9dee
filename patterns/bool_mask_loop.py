"""Each expert on the tokens of a boolean mask.

m = (ids == e).any(-1);  out[m] += g[m, e, None] * expert_e(x[m])
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from moe_compile.match.engine import Engine, Rules
from moe_compile.match.facts import Sum
from moe_compile.match.layer import Found, build
from moe_compile.match.nodes import aten
from moe_compile.spec import NoMatch

from ._examples import GatedMLP, Layer

ANCHORS = (aten.index_put_.default, aten.index_put.default)
RULES: Rules = {}


class BoolMask(Layer):
    """The weights scattered to ``[T, E]``, rows assigned back."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        g = torch.zeros(x.shape[0], self.experts, dtype=w.dtype, device=w.device).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            m = (ids == e).any(dim=-1)
            out[m] += g[m, e].unsqueeze(-1) * mlp(x[m])
        return out


class MaskedWeightSum(Layer):
    """The weight of a token is the masked sum over its slots."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            hit = ids == e
            m = hit.any(dim=-1)
            weight = (w * hit).sum(dim=-1)
            out[m] = out[m] + weight[m, None] * mlp(x[m])
        return out


class AnyMask(Layer):
    """makeMoE: ``if mask.any():`` around the step of an expert."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                g = torch.where(ids == e, w, 0.0).sum(-1)
                out[mask] += g[mask, None] * mlp(x[mask])
        return out


EXAMPLES = (BoolMask, MaskedWeightSum, AnyMask)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """Each part stands on the tokens of one expert."""
    if any(p.val.rows is None or p.val.rows.kind != "hit_token" for p in total.parts):
        raise NoMatch("MC200", "not every expert runs on the tokens of its mask", output)
    return build(engine, output, total, "bool_mask_loop")
