"""The weights of each pair's expert are gathered.

y = einsum("tkih,th->tki", w1[ids], x) ..; (y * w[..., None]).sum(1)"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from moe_compile.match.engine import Engine, Rules
from moe_compile.match.facts import Sum
from moe_compile.match.layer import Found, build
from moe_compile.match.nodes import aten
from moe_compile.spec import NoMatch

from ._examples import Layer

ANCHORS = (aten.sum.dim_IntList, aten.einsum.default, aten.bmm.default, aten.matmul.default, aten.index_add_.default)
RULES: Rules = {}


class GptFast(Layer):
    """gpt-fast: einsum over the gathered weights, gate and up apart."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w1 = self.stack(self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)
        self.w3 = self.stack(self.inter, self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        w1, w2, w3 = self.w1[ids], self.w2[ids], self.w3[ids]
        x1 = F.silu(torch.einsum("ti,taoi->tao", x, w1))
        x3 = torch.einsum("ti,taoi->tao", x, w3)
        y = torch.einsum("tao,taio->tai", x1 * x3, w2)
        return torch.einsum("tai,ta->ti", y, w)


class GptOssReference(Layer):
    """gpt-oss reference: biases, interleaved clamped SwiGLU, einsum combine."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.b13 = self.stack(2 * self.inter)
        self.w2 = self.stack(self.hidden, self.inter)
        self.b2 = self.stack(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        t = torch.einsum("beck,bk->bec", self.w13[ids, ...], x) + self.b13[ids, ...]
        glu, linear = t[..., ::2], t[..., 1::2]
        glu, linear = glu.clamp(min=None, max=7.0), linear.clamp(min=-7.0, max=7.0)
        t = glu * torch.sigmoid(1.702 * glu) * (linear + 1)
        t = torch.einsum("beck,bek->bec", self.w2[ids, ...], t) + self.b2[ids, ...]
        return torch.einsum("bec,be->bc", t, w)


class BatchedMM(Layer):
    """transformers' ``batched_mm``: flat pairs, ``bmm`` with the gathered weights."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(self.top_k, dim=0)
        h = torch.bmm(self.w13[flat], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        y = torch.bmm(self.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        y = y * w.reshape(-1, 1)
        return y.view(x.shape[0], self.top_k, -1).sum(dim=1)


EXAMPLES = (GptFast, GptOssReference, BatchedMM)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """One part whose weights are rows of stacks chosen by the ids."""
    slots = [s for p in total.parts for s in p.val.slots]
    if (
        len(total.parts) != 1
        or total.parts[0].val.rows is not None
        or not all(s.weight.source == "ids" and not s.weight.leaves for s in slots)
    ):
        raise NoMatch("MC200", "the weights are not gathered by the ids", output)
    return build(engine, output, total, "gathered_weights")
