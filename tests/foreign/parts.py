"""Sizes and the expert module that the layers of this folder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

H, INTER, E, K = 32, 48, 6, 2


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)``, the expert of most repositories."""

    def __init__(self, hidden: int = H, inter: int = INTER) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inter, bias=False)
        self.w2 = nn.Linear(inter, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inter, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def stack(*shape: int) -> nn.Parameter:
    """A random ``[E, *shape]`` parameter scaled by its last size."""
    return nn.Parameter(torch.randn(E, *shape) / shape[-1] ** 0.5)
