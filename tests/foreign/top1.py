"""In the style of Switch and ST-MoE layers."""

from __future__ import annotations

import torch
from foreign.parts import INTER, E, H, stack
from torch import Tensor, nn
from torch.nn import functional as F


class Switch(nn.Module):
    """One expert per token, by ``argmax``; its probability scales the result; no capacity."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, INTER, bias=False), nn.ReLU(), nn.Linear(INTER, H, bias=False)) for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        probs = F.softmax(self.router(x).float(), dim=-1).to(x.dtype)
        chosen, best = torch.argmax(probs, dim=-1), probs.max(dim=-1).values
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens = torch.nonzero(chosen == e).squeeze(-1)
            out[tokens] = expert(x[tokens])
        return out * best.unsqueeze(-1)


class StMoE(nn.Module):
    """Dispatch and combine tensors ``[T, E, C]`` by einsum: tokens past the capacity are dropped."""

    def __init__(self, capacity: int = 4) -> None:
        super().__init__()
        self.capacity = capacity
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = stack(H, INTER), stack(INTER, H)

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        combine = x.new_zeros(x.shape[0], E, self.capacity)
        used = x.new_zeros(E, dtype=torch.long)
        for k in range(2):
            mask = F.one_hot(ids[:, k], E)
            position = (mask.cumsum(0) - 1 + used) * mask
            mask = mask * (position < self.capacity)
            used = used + mask.sum(0)
            place = F.one_hot(position.sum(-1).clamp(max=self.capacity - 1), self.capacity)
            combine = combine + gates[:, k, None, None] * mask[..., None] * place[:, None]
        rows = torch.einsum("td,tec->ecd", x, combine.bool().to(x.dtype))
        y = torch.einsum("ech,ehd->ecd", F.gelu(torch.einsum("ecd,edh->ech", rows, self.up)), self.down)
        return torch.einsum("ecd,tec->td", y, combine)
