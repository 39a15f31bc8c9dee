"""In the style of DeepSeek-V3's reference inference: groups of experts, a bias for the choice only, counts."""

from __future__ import annotations

import torch
from foreign.parts import E, H, K, SwiGLU
from torch import Tensor, nn


class GroupedGate(nn.Module):
    """Sigmoid scores; the best two groups by their best two biased scores; weights without the bias."""

    def __init__(self, groups: int = 3, kept: int = 2, scale: float = 2.5) -> None:
        super().__init__()
        self.groups, self.kept, self.scale = groups, kept, scale
        self.weight = nn.Parameter(torch.randn(E, H) / H**0.5)
        self.bias = nn.Parameter(torch.randn(E) / 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        original = nn.functional.linear(x, self.weight).sigmoid()
        scores = (original + self.bias).view(x.size(0), self.groups, -1)
        best = scores.topk(2, dim=-1)[0].sum(dim=-1).topk(self.kept, dim=-1)[1]
        dropped = scores.new_ones(x.size(0), self.groups, dtype=torch.bool).scatter_(1, best, False)
        scores = scores.masked_fill_(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        indices = torch.topk(scores, K, dim=-1)[1]
        weights = original.gather(1, indices)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self.scale
        return weights.type_as(x), indices


class DeepSeekMoE(nn.Module):
    """``counts.tolist()`` and ``continue`` where an expert has no tokens; shared experts on top."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GroupedGate()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))
        self.shared_experts = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        shape = x.size()
        x = x.view(-1, H)
        weights, indices = self.gate(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=E).tolist()
        for i in range(E):
            if counts[i] == 0:
                continue
            idx, top = torch.where(indices == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return (y + self.shared_experts(x)).view(shape)


class DeepSeekFloat(DeepSeekMoE):
    """The later version: the sum in fp32, and a cast back."""

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.gate(x)
        y = torch.zeros_like(x, dtype=torch.float32)
        for i in range(E):
            idx, top = torch.where(indices == i)
            y[idx] += self.experts[i](x[idx]).float() * weights[idx, top, None].float()
        y += self.shared_experts(x)
        return y.type_as(x)
