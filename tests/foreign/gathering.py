"""In the style of gpt-fast and of the gpt-oss reference: the weights of the chosen experts are gathered."""

from __future__ import annotations

import torch
from foreign.parts import INTER, E, H, K, stack
from torch import Tensor, nn
from torch.nn import functional as F


class GptFastMoE(nn.Module):
    """``ConditionalFeedForward`` behind its router, on ``[B, S, H]``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.w1, self.w2, self.w3 = stack(INTER, H), stack(H, INTER), stack(INTER, H)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, H)
        weights, indices = torch.topk(F.softmax(self.gate(x), dim=-1), K, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        x1 = F.silu(torch.einsum("ti,taoi -> tao", x, self.w1[indices]))
        x3 = torch.einsum("ti, taoi -> tao", x, self.w3[indices])
        outs = torch.einsum("tao, taio -> tai", (x1 * x3), self.w2[indices])
        return torch.einsum("tai,ta -> ti", outs, weights)


class GptOssMLPBlock(nn.Module):
    """RMS norm, biased experts with interleaved clamped SwiGLU, a residual."""

    def __init__(self, limit: float = 7.0) -> None:
        super().__init__()
        self.limit = limit
        self.norm = nn.RMSNorm(H)
        self.gate = nn.Linear(H, E)
        self.mlp1_weight, self.mlp1_bias = stack(2 * INTER, H), stack(2 * INTER)
        self.mlp2_weight, self.mlp2_bias = stack(H, INTER), stack(H)

    def swiglu(self, x: Tensor, alpha: float = 1.702) -> Tensor:
        glu, linear = x[..., ::2], x[..., 1::2]
        glu, linear = glu.clamp(min=None, max=self.limit), linear.clamp(min=-self.limit, max=self.limit)
        return glu * torch.sigmoid(alpha * glu) * (linear + 1)

    def forward(self, x: Tensor) -> Tensor:
        t = self.norm(x)
        experts = torch.topk(self.gate(t), k=K, dim=-1, sorted=True)
        weights, indices = F.softmax(experts.values, dim=1), experts.indices
        t = torch.einsum("beck,bk->bec", self.mlp1_weight[indices, ...], t) + self.mlp1_bias[indices, ...]
        t = self.swiglu(t)
        t = torch.einsum("beck,bek->bec", self.mlp2_weight[indices, ...], t)
        t += self.mlp2_bias[indices, ...]
        return x + torch.einsum("bec,be->bc", t, weights)
