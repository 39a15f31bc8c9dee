"""Tutorials and Grok-1: all experts on all tokens, then a weighted sum or a gather."""

from __future__ import annotations

import torch
from foreign.parts import E, H, K, SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F


class SoftDense(nn.Module):
    """A stack of all outputs against gates that are zero where an expert was not chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(self.gate(x), dim=-1).topk(K, dim=-1)
        gates = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter_(1, ids, weights)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.einsum("te,teh->th", gates, outputs)


class SoftDenseSum(SoftDense):
    """The same by Python's ``sum``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(self.gate(x), dim=-1).topk(K, dim=-1)
        gates = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter_(1, ids, weights)
        return sum(gates[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class Grok(SoftDense):
    """The outputs of all experts, of which the chosen are gathered."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(self.gate(x).float(), dim=-1).topk(K, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        picked = torch.gather(outputs, 1, ids.unsqueeze(-1).expand(-1, -1, H))
        return (picked * weights.to(x.dtype).unsqueeze(-1)).sum(1)


class ProbabilityColumn(SoftDense):
    """The dense probabilities themselves, read where an expert was chosen."""

    def forward(self, x: Tensor) -> Tensor:
        probs = F.softmax(self.gate(x), dim=-1)
        ids = probs.topk(K, dim=-1).indices
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            out[mask] += probs[mask, e].unsqueeze(-1) * expert(x[mask])
        return out


class ThreeLayers(SoftDense):
    """Experts of three linear maps, which the op does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, H)) for _ in range(E)
        )
