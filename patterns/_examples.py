"""Building blocks that the examples of several forms share: routers and expert modules as users write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Router(nn.Module):
    """Softmax, top-k, renormalise: ``[T, H] -> weights [T, K], ids [T, K]``."""

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(self.gate(x), dim=-1, dtype=torch.float)
        weights, ids = torch.topk(scores, self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), ids


class GatedMLP(nn.Module):
    """``w2(silu(w1(x)) * w3(x))`` as three Linears."""

    def __init__(self, hidden: int, inter: int, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inter, bias=bias)
        self.w3 = nn.Linear(hidden, inter, bias=bias)
        self.w2 = nn.Linear(inter, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PlainMLP(nn.Sequential):
    """``Linear, GELU, Linear`` with biases."""

    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__(nn.Linear(hidden, inter), nn.GELU(), nn.Linear(inter, hidden))


class Layer(nn.Module):
    """Base of the examples: sizes, a router, and stacked weights for those that want them."""

    def __init__(self, hidden: int = 32, inter: int = 48, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.hidden, self.inter, self.experts, self.top_k = hidden, inter, experts, top_k
        self.router = Router(hidden, experts, top_k)

    def stack(self, *shape: int) -> nn.Parameter:
        """A random ``[E, *shape]`` parameter scaled by its last size."""
        return nn.Parameter(torch.randn(self.experts, *shape) / shape[-1] ** 0.5)
