"""In the style of mistral-inference."""

from __future__ import annotations

import torch
from foreign.parts import E, H, K, SwiGLU
from torch import Tensor, nn


class MistralMoE(nn.Module):
    """Top-k of the raw logits, softmax over the chosen in fp32, an indexed ``+=`` per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))

    def forward(self, inputs: Tensor) -> Tensor:
        chosen, selected = torch.topk(self.gate(inputs), K)
        weights = nn.functional.softmax(chosen, dim=1, dtype=torch.float).to(inputs.dtype)
        results = torch.zeros_like(inputs)
        for i, expert in enumerate(self.experts):
            batch, nth = torch.where(selected == i)
            results[batch] += weights[batch, nth, None] * expert(inputs[batch])
        return results
