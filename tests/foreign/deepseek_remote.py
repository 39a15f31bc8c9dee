"""In the style of DeepSeek's remote code: ``moe_infer`` sorts the pairs and puts the rows back in order."""

from __future__ import annotations

import torch
from foreign.parts import INTER, E, H, K, SwiGLU, stack
from torch import Tensor, nn
from torch.nn import functional as F


class Remote(nn.Module):
    """The routing, and the way back, that both versions share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(self.gate(x).softmax(dim=-1, dtype=torch.float32), k=K, dim=-1, sorted=False)

    def back(self, outs: Tensor, idxs: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return (
            new_x.view(*topk_ids.shape, -1)
            .type(topk_weight.dtype)
            .mul_(topk_weight.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(new_x.dtype)
        )


class DeepSeekRemote(Remote):
    """Slices per expert by counts on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        topk_weight, topk_ids = self.route(x)
        counts = topk_ids.new_zeros((topk_ids.shape[0], E)).scatter_(1, topk_ids, 1).sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        outputs, start = [], 0
        for i, count in enumerate(counts.cpu().numpy()):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[i](sorted_tokens[start:end]))
            start = end
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        return self.back(outs, idxs, topk_ids, topk_weight)


class DeepSeekGrouped(Remote):
    """The same around two grouped products."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = stack(2 * INTER, H), stack(H, INTER)

    def forward(self, x: Tensor) -> Tensor:
        topk_weight, topk_ids = self.route(x)
        counts = topk_ids.new_zeros((topk_ids.shape[0], E)).scatter_(1, topk_ids, 1).sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        offs = counts.cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(sorted_tokens, self.w13.transpose(1, 2), offs).chunk(2, dim=-1)
        outs = torch._grouped_mm(F.silu(gate) * up, self.w2.transpose(1, 2), offs)
        return self.back(outs, idxs, topk_ids, topk_weight)
