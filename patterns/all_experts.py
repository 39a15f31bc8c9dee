"""All experts on all tokens in one batched product.

ys = bmm(x.expand(E, ..), w);  out = sum_e combine[:, e] * ys[e]
"""

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

ANCHORS = (aten.sum.dim_IntList, aten.einsum.default, aten.bmm.default, aten.matmul.default)
RULES: Rules = {}


class EinsumOneHot(Layer):
    """einsum over all experts, combined by one-hot weights."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w1 = self.stack(self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)
        self.w3 = self.stack(self.inter, self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        combine = (F.one_hot(ids, self.experts).to(x.dtype) * w.unsqueeze(-1)).sum(dim=1)  # [T, E]
        h = F.silu(torch.einsum("th,eih->tei", x, self.w1)) * torch.einsum("th,eih->tei", x, self.w3)
        y = torch.einsum("tei,ehi->teh", h, self.w2)
        return torch.einsum("teh,te->th", y, combine)


class RepeatBmm(Layer):
    """transformers 4.5x gpt-oss in training: ``repeat`` and ``bmm`` with transposed weights and biases."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(self.hidden, 2 * self.inter)
        self.b13 = self.stack(2 * self.inter)
        self.w2 = self.stack(self.inter, self.hidden)
        self.b2 = self.stack(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        scores = torch.zeros(x.shape[0], self.experts, dtype=w.dtype, device=w.device).scatter_(1, ids, w)
        states = x.repeat(self.experts, 1).view(self.experts, -1, self.hidden)
        h = torch.bmm(states, self.w13) + self.b13[..., None, :]
        gate, up = h[..., ::2], h[..., 1::2]
        gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
        y = torch.bmm((up + 1) * (gate * torch.sigmoid(gate * 1.702)), self.w2) + self.b2[..., None, :]
        y = y.view(self.experts, x.shape[0], self.hidden)
        return (y * scores.transpose(0, 1).view(self.experts, x.shape[0])[..., None]).sum(dim=0)


class BroadcastMatmul(Layer):
    """``x[None] @ w`` by broadcasting, ReLU without a gate, combined by ``bmm``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w1 = self.stack(self.hidden, self.inter)
        self.w2 = self.stack(self.inter, self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        combine = torch.zeros(x.shape[0], self.experts, dtype=w.dtype, device=w.device).scatter(1, ids, w)
        y = torch.matmul(F.relu(torch.matmul(x.unsqueeze(0), self.w1)), self.w2)  # [E, T, H]
        return (y * combine.t().unsqueeze(-1)).sum(0)


class Llama4(Layer):
    """Llama 4: the sigmoid of the chosen logits scales the experts' input."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(self.hidden, 2 * self.inter)
        self.w2 = self.stack(self.inter, self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router.gate(x)
        top, ids = torch.topk(logits, self.top_k, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, top)
        scores = torch.sigmoid(scores.float()).to(x.dtype).transpose(0, 1)
        routed = x.repeat(self.experts, 1) * scores.reshape(-1, 1)
        states = routed.view(self.experts, -1, self.hidden)
        gate, up = torch.bmm(states, self.w13).chunk(2, dim=-1)
        y = torch.bmm(up * F.silu(gate), self.w2)
        return y.view(self.experts, -1, self.hidden).sum(dim=0)


EXAMPLES = (EinsumOneHot, RepeatBmm, BroadcastMatmul, Llama4)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """One part whose weights are whole stacks."""
    slots = [s for p in total.parts for s in p.val.slots]
    if len(total.parts) != 1 or not all(s.weight.source == "axis" for s in slots):
        raise NoMatch("MC200", "not all experts run in one batched product", output)
    return build(engine, output, total, "all_experts")
