"""The slots of the top-k one after the other, and in each slot the experts one after the other.

for k: for e:  m = ids[:, k] == e;  out[m] += w[m, k, None] * expert_e(x[m])
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from moe_compile.match.engine import Engine, Rules
from moe_compile.match.facts import Sum
from moe_compile.match.layer import Found, build
from moe_compile.match.nodes import aten
from moe_compile.match.slots import merge_slots
from moe_compile.spec import NoMatch

from ._examples import GatedMLP, Layer, PlainMLP

ANCHORS = (
    aten.index_put_.default, aten.index_put.default, aten.index_add_.default, aten.index_add.default,
    aten.scatter_add_.default, aten.scatter_add.default, aten.add.Tensor, aten.add_.Tensor,
)  # fmt: skip
RULES: Rules = {}


class SlotThenExpert(Layer):
    """A boolean mask for every slot and expert, rows added back by the mask."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, mlp in enumerate(self.mlps):
                mask = ids[:, k] == e
                out[mask] += w[mask, k, None] * mlp(x[mask])
        return out


class ExpertThenSlot(Layer):
    """The other way round, on columns of one mask, with ``where`` and ``index_add_``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(PlainMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            hit = ids == e
            for k in range(self.top_k):
                token = torch.where(hit[:, k])[0]
                out.index_add_(0, token, mlp(x[token]) * w[token, k].unsqueeze(-1))
        return out


class SlotDense(Layer):
    """Every expert on every token, once per slot, under the slot's mask."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            weight, chosen = w[:, k : k + 1], ids[:, k : k + 1]
            for e, mlp in enumerate(self.mlps):
                out = out + (chosen == e) * weight * mlp(x)
        return out


class SlotAny(Layer):
    """A mask for every slot and expert, skipped where it is empty."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.experts):
                mask = ids[:, k] == e
                if mask.any():
                    out[mask] += w[mask, k, None] * self.mlps[e](x[mask])
        return out


EXAMPLES = (SlotThenExpert, ExpertThenSlot, SlotDense, SlotAny)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """Each part is about one slot; merged, there is one part for each expert."""
    merged = merge_slots(engine, total, output)
    if merged is None:
        raise NoMatch("MC200", "the sum does not go slot by slot", output)
    return build(engine, output, merged, "slot_loop")
