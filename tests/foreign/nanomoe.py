"""In the style of nanoMoE: tokens are placed in fixed bins per expert by the running count of a one-hot mask."""

from __future__ import annotations

import torch
from foreign.parts import INTER, E, H, K, stack
from torch import Tensor, nn
from torch.nn import functional as F


class NanoMoE(nn.Module):
    """Bins of ``capacity`` tokens per expert; later tokens are dropped."""

    def __init__(self, factor: float = 1.25) -> None:
        super().__init__()
        self.factor = factor
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = stack(H, INTER), stack(INTER, H)

    def capacity(self, tokens: int) -> int:
        return int(K * self.factor * tokens / E)

    def forward(self, x: Tensor) -> Tensor:
        tokens, capacity = x.shape[0], self.capacity(x.shape[0])
        top, ids = self.gate(x).topk(K, dim=-1)
        probs = torch.zeros(tokens, E, dtype=x.dtype).scatter(1, ids, top.softmax(-1))
        mask = F.one_hot(ids, E).permute(1, 0, 2)  # [K, T, E]
        rank = mask.reshape(K * tokens, E).cumsum(0).reshape(K, tokens, E) - 1
        mask = mask * (rank < capacity)
        rank = (mask * rank).sum(-1)  # [K, T]
        weight = (mask * probs[None]).unsqueeze(-1) * F.one_hot(rank, capacity).unsqueeze(2)
        combine = weight.sum(0)  # [T, E, C]
        rows = combine.bool().to(x.dtype).permute(1, 2, 0) @ x  # [E, C, H]
        y = torch.bmm(F.gelu(torch.bmm(rows, self.up)), self.down)
        return combine.view(tokens, -1) @ y.view(-1, H)


class NanoMoEUnlimited(NanoMoE):
    """Bins as large as the batch: nothing is dropped, but that is a fact about values of a running count."""

    def capacity(self, tokens: int) -> int:
        return tokens * K
