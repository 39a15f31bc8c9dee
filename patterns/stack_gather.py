"""Every expert on every token, then the chosen outputs.

ys = stack([f(x) for f in experts], 1);  ys.gather(1, ids)
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

ANCHORS = (aten.sum.dim_IntList, aten.einsum.default, aten.bmm.default, aten.matmul.default)
RULES: Rules = {}


class StackGather(Layer):
    """``torch.gather`` with the ids spread over the features."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        ys = torch.stack([mlp(x) for mlp in self.mlps], dim=1)
        index = ids.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return (ys.gather(1, index) * w.unsqueeze(-1)).sum(dim=1)


class StackIndex(Layer):
    """The same by advanced indexing with a token range."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        ys = torch.stack([mlp(x) for mlp in self.mlps], dim=1)
        chosen = ys[torch.arange(x.shape[0], device=x.device).unsqueeze(-1), ids]
        return torch.einsum("tkh,tk->th", chosen, w)


EXAMPLES = (StackGather, StackIndex)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """One part: separate weights chosen by the ids."""
    slots = [s for p in total.parts for s in p.val.slots]
    if (
        len(total.parts) != 1
        or total.parts[0].val.rows is not None
        or not all(s.weight.source == "ids" and s.weight.leaves for s in slots)
    ):
        raise NoMatch("MC200", "the outputs are not gathered from a stack of experts", output)
    return build(engine, output, total, "stack_gather")
