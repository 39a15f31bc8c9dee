"""A buffer of one row per pair, assigned expert by expert, then weighted and summed over the slots.

m = ids.view(-1) == e;  out[m] = expert_e(x.repeat_interleave(K, 0)[m]);  (out.view(T, K, H) * w[..., None]).sum(1)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moe_compile.match.engine import Engine, Rules
from moe_compile.match.facts import Sum
from moe_compile.match.layer import Found, build
from moe_compile.match.nodes import aten
from moe_compile.spec import NoMatch

from ._examples import GatedMLP, Layer

ANCHORS = (aten.sum.dim_IntList, aten.einsum.default, aten.bmm.default, aten.matmul.default)
RULES: Rules = {}


class RepeatedTokens(Layer):
    """vLLM's plain reference: tokens repeated per slot, a mask of the flat ids, weights at the end."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        count = x.shape[0]
        rows = x.view(count, -1, self.hidden).repeat(1, self.top_k, 1).reshape(-1, self.hidden)
        out = torch.zeros(count * self.top_k, self.hidden, dtype=x.dtype, device=x.device)
        flat = ids.view(-1)
        for e in range(self.experts):
            mask = flat == e
            gate, up = (rows[mask] @ self.w13[e].transpose(0, 1)).chunk(2, dim=-1)
            out[mask] = (F.silu(gate) * up) @ self.w2[e].transpose(0, 1)
        return (out.view(count, -1, self.hidden) * w.view(count, -1, 1).to(out.dtype)).sum(dim=1)


class TokenAndSlot(Layer):
    """Weighted outputs stored at ``[token, slot]`` of an uninitialised buffer."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.empty(x.shape[0], self.top_k, self.hidden, dtype=x.dtype, device=x.device)
        for e, mlp in enumerate(self.mlps):
            token, slot = torch.where(ids == e)
            out[token, slot] = mlp(x[token]) * w[token, slot, None]
        return out.sum(dim=1)


class FlatPairs(Layer):
    """The numbers of an expert's pairs by ``nonzero``, their tokens by a division."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        flat = ids.flatten()
        out = x.new_empty(flat.shape[0], self.hidden)
        for e, mlp in enumerate(self.mlps):
            pair = torch.nonzero(flat == e).flatten()
            out[pair] = mlp(x[pair // self.top_k])
        return torch.einsum("tkh,tk->th", out.view(-1, self.top_k, self.hidden), w)


EXAMPLES = (RepeatedTokens, TokenAndSlot, FlatPairs)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """One part whose values were assigned to a buffer of pairs, expert by expert."""
    (part,) = total.parts if len(total.parts) == 1 else (None,)
    ids = {s.weight.ids for s in part.val.slots} if part is not None else set()
    filled = {v.rows.ids for vals in engine.pieces.values() for v in vals.values() if v.rows is not None}
    if part is None or part.val.rows is not None or not ids <= filled:
        raise NoMatch("MC200", "the rows are not assigned to a buffer of pairs", output)
    return build(engine, output, total, "pair_assign")
