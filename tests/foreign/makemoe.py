"""In the style of makeMoE: a softmax over logits that are minus infinity where not chosen, boolean masks."""

from __future__ import annotations

import torch
from foreign.parts import E, H, K
from torch import Tensor, nn
from torch.nn import functional as F


class NoisyTopKRouter(nn.Module):
    """Noise is added while training only."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.noise = nn.Linear(H, E), nn.Linear(H, E)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.route(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        top, ids = logits.topk(K, dim=-1)
        return F.softmax(torch.full_like(logits, float("-inf")).scatter(-1, ids, top), dim=-1), ids


class MakeMoE(nn.Module):
    """``if mask.any():`` around each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = NoisyTopKRouter()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, 4 * H), nn.ReLU(), nn.Linear(4 * H, H), nn.Dropout(0.1)) for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.router(x)
        final = torch.zeros_like(x)
        flat_x, flat_gates = x.view(-1, x.size(-1)), gates.view(-1, gates.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (ids == i).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                weighted = expert(flat_x[flat_mask]) * flat_gates[flat_mask, i].unsqueeze(1)
                final[mask] += weighted.squeeze(1)
        return final
