"""MoE layers that are left alone: not provable, or across a border that tracing does not cross."""

from __future__ import annotations

import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from torch import Tensor, nn


class Modules(Layer):
    """A ModuleList of experts."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))


class TokenLoop(Modules):
    """A Python loop over tokens, each calling the module that its id names."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = []
        for t in range(x.shape[0]):
            y = torch.zeros_like(x[t])
            for k in range(self.top_k):
                y = y + w[t, k] * self.mlps[int(ids[t, k])](x[t])
            out.append(y)
        return torch.stack(out)


class TokenList(Modules):
    """The same over a list of lists of ids."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for t, chosen in enumerate(ids.tolist()):
            for k, e in enumerate(chosen):
                out[t] += w[t, k] * self.mlps[e](x[t])
        return out


class CountsElsewhere(Modules):
    """Counts fetched to the host in one method and used in another."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        order = ids.flatten().argsort(stable=True)
        sizes = ids.flatten().bincount(minlength=self.experts).tolist()
        rows = self.parallel(x[order // self.top_k], sizes)
        return torch.zeros_like(x).index_add(0, order // self.top_k, rows * w.flatten()[order, None])

    def parallel(self, rows: Tensor, sizes: list[int]) -> Tensor:
        groups = rows.split(sizes)
        return torch.cat([mlp(group) for mlp, group in zip(self.mlps, groups, strict=True)])


class Capacity(Modules):
    """Tokens past an expert's capacity are dropped."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            token, slot = token[:3], slot[:3]
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class Threshold(Modules):
    """An expert with fewer than three tokens is not run."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            mask = ids == e
            if mask.sum() > 2:
                token, slot = torch.where(mask)
                out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


EXAMPLES = (TokenLoop, TokenList, CountsElsewhere, Capacity, Threshold)
