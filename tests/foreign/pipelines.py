"""In the style of torchtitan, MegaBlocks and vLLM's plain reference: pairs in expert order, or all pairs at once."""

from __future__ import annotations

import torch
from foreign.parts import INTER, E, H, K, stack
from torch import Tensor, nn
from torch.nn import functional as F


class Titan(nn.Module):
    """``histc`` counts, ``torch._grouped_mm``, weights applied to the rows, ``scatter_add``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.w1, self.w2, self.w3 = stack(INTER, H), stack(H, INTER), stack(INTER, H)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, H)
        scores, ids = torch.topk(torch.sigmoid(self.gate(x).to(torch.float32)), k=K, dim=1)
        counts = torch.histc(ids.view(-1).float(), bins=E, min=0, max=E - 1)
        order = torch.argsort(ids.view(-1), stable=True)
        scores, tokens = scores.view(-1)[order], order // K
        index = tokens.reshape(-1, 1).expand(-1, H)
        rows = torch.gather(x, dim=0, index=index)
        offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = F.silu(torch._grouped_mm(rows, self.w1.transpose(-2, -1), offs=offs))
        h = h * torch._grouped_mm(rows, self.w3.transpose(-2, -1), offs=offs)
        y = torch._grouped_mm(h, self.w2.transpose(-2, -1), offs=offs)
        y = (y.to(torch.float32) * scores.reshape(-1, 1)).to(x.dtype)
        return torch.zeros_like(x).scatter_add(dim=0, index=index, src=y).reshape(shape)


class MegaBlocks(nn.Module):
    """Sorted bins whose borders are read on the host, one product per bin."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.w1, self.w2 = stack(H, INTER), stack(INTER, H)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        _, indices = torch.sort(ids.flatten())
        bins = torch.cumsum(torch.bincount(ids.flatten(), minlength=E), 0).tolist()
        rows = x[indices // K]
        y, start = torch.empty_like(rows), 0
        for e, end in enumerate(bins):
            y[start:end] = F.gelu(rows[start:end] @ self.w1[e], approximate="tanh") @ self.w2[e]
            start = end
        out = torch.zeros_like(x)
        return out.index_add_(0, indices // K, y * weights.flatten()[indices, None])


class VllmReference(nn.Module):
    """``torch_moe``: every token repeated per slot, ``if mask.sum():``, assignment by mask."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.w1, self.w2 = stack(2 * INTER, H), stack(H, INTER)

    def forward(self, a: Tensor) -> Tensor:
        count = a.shape[0]
        weight, ids = torch.topk(torch.softmax(self.gate(a), dim=-1, dtype=torch.float32), K)
        a = a.view(count, -1, H).repeat(1, K, 1).reshape(-1, H)
        out = torch.zeros(count * K, self.w2.shape[1], dtype=a.dtype, device=a.device)
        weight, ids = weight.view(-1), ids.view(-1)
        for i in range(self.w1.shape[0]):
            mask = ids == i
            if mask.sum():
                h = a[mask] @ self.w1[i].transpose(0, 1)
                h = F.silu(h[..., :INTER]) * h[..., INTER:]
                out[mask] = h @ self.w2[i].transpose(0, 1)
        return (out.view(count, -1, self.w2.shape[1]) * weight.view(count, -1, 1).to(out.dtype)).sum(dim=1)
