"""Each expert on its own tokens, added back by index.

out.index_add_(0, tokens, w[tokens, slots] * expert_e(x[tokens]))
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

ANCHORS = (
    aten.index_add_.default, aten.index_add.default, aten.scatter_add_.default, aten.scatter_add.default,
    aten.index_put_.default, aten.index_put.default, aten.scatter_reduce_.two, aten.scatter_reduce.two,
)  # fmt: skip
RULES: Rules = {}


class WhereIndexAdd(Layer):
    """transformers 4.x Mixtral: one-hot mask, ``torch.where``, ``index_add_``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.experts).permute(2, 1, 0)
        for e in range(self.experts):
            slot, token = torch.where(mask[e])
            state = x[None, token].reshape(-1, x.shape[-1])
            y = self.mlps[e](state) * w[token, slot, None]
            out.index_add_(0, token, y.to(x.dtype))
        return out


class NonzeroIndexAdd(Layer):
    """``nonzero(as_tuple=True)`` on ``ids == e`` and stacked weights."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.w13[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.w2[e]) * w[token, slot].unsqueeze(-1)
            out = out.index_add(0, token, y)
        return out


class ScatterAdd(Layer):
    """``scatter_add_`` with the tokens spread over the features."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            token, slot = torch.where(ids == e)
            y = mlp(x[token]) * w[token, slot, None]
            out.scatter_add_(0, token.unsqueeze(-1).expand(-1, x.shape[-1]), y)
        return out


class MistralWhere(Layer):
    """mistral-inference: ``results[batch] += weights[batch, nth] * expert(inputs[batch])``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        results = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            batch, nth = torch.where(ids == e)
            results[batch] += w[batch, nth, None] * mlp(x[batch])
        return results


class HitLoop(Layer):
    """transformers 5 in eager mode: a loop over ``nonzero()`` of the experts that were hit, a sentinel skipped."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(ids, num_classes=self.experts + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.experts:
                continue
            slot, token = torch.where(mask[expert_idx])
            state = x[token]
            gate, up = F.linear(state, self.w13[expert_idx]).chunk(2, dim=-1)
            h = F.silu(gate) * up
            h = F.linear(h, self.w2[expert_idx])
            h = h * w[token, slot, None]
            out.index_add_(0, token, h.to(out.dtype))
        return out


class HitModules(Layer):
    """transformers 4.5x: the same with a ModuleList, indexed by a row of the hit list."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in hit:
            layer = self.mlps[expert_idx]
            idx, top_x = torch.where(mask[expert_idx].squeeze(0))
            state = x[None, top_x].reshape(-1, x.shape[-1])
            y = layer(state) * w[top_x, idx, None]
            out.index_add_(0, top_x, y.to(x.dtype))
        return out


class UniqueLoop(Layer):
    """A loop over ``ids.unique().tolist()``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            tok, slot = torch.where(ids == e)
            out[tok] += w[tok, slot, None] * self.mlps[e](x[tok])
        return out


class SkipEmpty(Layer):
    """``if token.numel() == 0: continue``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            tok, slot = torch.where(ids == e)
            if tok.numel() == 0:
                continue
            out.index_add_(0, tok, self.mlps[e](x[tok]) * w[tok, slot, None])
        return out


class IndexLists(Layer):
    """transformers 4.36 Mixtral: indices as Python lists."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.experts).permute(2, 1, 0)
        for e in range(self.experts):
            layer = self.mlps[e]
            idx, top_x = torch.where(mask[e])
            if top_x.shape[0] == 0:
                continue
            top_x_list = top_x.tolist()
            idx_list = idx.tolist()
            state = x[None, top_x_list].reshape(-1, x.shape[-1])
            y = layer(state) * w[top_x_list, idx_list, None]
            out.index_add_(0, top_x, y.to(x.dtype))
        return out


class SkipByCount(Layer):
    """DeepSeek-V3 reference: ``bincount().tolist()``, experts without tokens skipped by their count."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(ids.flatten(), minlength=self.experts).tolist()
        for i in range(self.experts):
            if counts[i] == 0:
                continue
            expert = self.mlps[i]
            idx, top = torch.where(ids == i)
            y[idx] += expert(x[idx]) * w[idx, top, None]
        return y


EXAMPLES = (
    WhereIndexAdd, NonzeroIndexAdd, ScatterAdd, MistralWhere, HitLoop,
    HitModules, UniqueLoop, SkipEmpty, IndexLists, SkipByCount,
)  # fmt: skip


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """Each part stands on the pairs of one expert."""
    if any(p.val.rows is None or p.val.rows.kind != "hit" for p in total.parts):
        raise NoMatch("MC200", "not every expert runs on its own token-slot pairs", output)
    return build(engine, output, total, "index_add_loop")
