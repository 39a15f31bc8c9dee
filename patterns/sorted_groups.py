"""Pairs in expert order, cut into one group of rows per expert by counts that the program fetches to the host.

order = argsort(ids.flatten());  groups = x[order // K].split(counts.tolist())
out = cat([expert_e(group_e)])[argsort(order)] ..                 (or each group added back by its own index)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from moe_compile.match.engine import Engine, Rules
from moe_compile.match.facts import Sum
from moe_compile.match.labels import flat_names
from moe_compile.match.layer import Found, build
from moe_compile.match.nodes import aten
from moe_compile.spec import NoMatch

from ._examples import GatedMLP, Layer

ANCHORS = (
    aten.sum.dim_IntList, aten.index_add_.default, aten.index_add.default, aten.scatter_add_.default,
    aten.scatter_add.default, aten.einsum.default, aten.bmm.default, aten.matmul.default,
    aten.scatter_reduce_.two, aten.scatter_reduce.two,
)  # fmt: skip
RULES: Rules = {}


class MoeInfer(Layer):
    """DeepSeek's published ``moe_infer``: counts as a NumPy array, slices, ``cat``, stored back by the order."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        return self.moe_infer(x, ids, w)

    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        cnts = topk_ids.new_zeros((topk_ids.shape[0], len(self.mlps)))
        cnts.scatter_(1, topk_ids, 1)
        sizes = cnts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        tokens_per_expert = sizes.cpu().numpy()
        outputs = []
        start_idx = 0
        for i, num_tokens in enumerate(tokens_per_expert):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            expert = self.mlps[i]
            tokens_for_this_expert = sorted_tokens[start_idx:end_idx]
            expert_out = expert(tokens_for_this_expert)
            outputs.append(expert_out)
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        final_out = (
            new_x.view(*topk_ids.shape, -1)
            .type(topk_weight.dtype)
            .mul_(topk_weight.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(new_x.dtype)
        )
        return final_out


class CumsumSlices(Layer):
    """DeepSeek-V2-Lite: a running sum of counts, each group added back by ``scatter_reduce_``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        flat_w = w.view(-1, 1)
        cache = torch.zeros_like(x)
        idxs = ids.view(-1).argsort()
        tokens_per_expert = ids.view(-1).bincount(minlength=self.experts).cpu().numpy().cumsum(0)
        token_idxs = idxs // self.top_k
        for i, end_idx in enumerate(tokens_per_expert):
            start_idx = 0 if i == 0 else tokens_per_expert[i - 1]
            if start_idx == end_idx:
                continue
            expert = self.mlps[i]
            exp_token_idx = token_idxs[start_idx:end_idx]
            expert_out = expert(x[exp_token_idx])
            expert_out.mul_(flat_w[idxs[start_idx:end_idx]])
            cache.scatter_reduce_(0, exp_token_idx.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum")
        return cache


class SplitCat(Layer):
    """``split(counts)``, a list comprehension, ``index_add``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=self.experts).tolist()
        chunks = x[order // self.top_k].split(counts)
        ys = torch.cat([mlp(c) for mlp, c in zip(self.mlps, chunks, strict=True)])
        out = torch.zeros_like(x)
        return out.index_add(0, order // self.top_k, ys * w.flatten()[order, None])


class Bins(Layer):
    """In the style of MegaBlocks: borders of bins on the host, each bin's rows written into one buffer."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        indices = ids.flatten().sort(stable=True).indices
        bins = torch.cumsum(torch.bincount(ids.flatten(), minlength=self.experts), 0).tolist()
        rows = x[indices // self.top_k]
        y, start = torch.empty_like(rows), 0
        for e, end in enumerate(bins):
            y[start:end] = self.mlps[e](rows[start:end])
            start = end
        out = torch.zeros_like(x)
        return out.index_add_(0, indices // self.top_k, y * w.flatten()[indices, None])


EXAMPLES = (MoeInfer, CumsumSlices, SplitCat, Bins)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """One part joined from the groups of all experts, or a part for each group."""
    rows = [p.val.rows for p in total.parts]
    groups = all(r is not None and r.grouped for r in rows)
    joined = len(total.parts) == 1 and all(s.weight.leaves for s in total.parts[0].val.slots)
    if not groups and not (joined and any("r" in flat_names(s.weight.dims) for s in total.parts[0].val.slots)):
        raise NoMatch("MC200", "rows in expert order are not cut into groups by their counts", output)
    return build(engine, output, total, "sorted_groups")
