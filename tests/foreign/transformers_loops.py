"""In the style of transformers' loops from 4.36 to 4.55: Mixtral, OLMoE, Qwen2-MoE, Phi-3.5-MoE, JetMoE."""

from __future__ import annotations

import torch
from foreign.parts import INTER, E, H, K, SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F


class Mixtral(nn.Module):
    """4.45: every expert in turn, ``where`` on its mask, ``index_add_``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, selected = torch.topk(F.softmax(self.gate(x), dim=1, dtype=torch.float), K, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), selected

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        states = states.view(-1, H)
        weights, selected = self.route(states)
        final = torch.zeros((batch * length, H), dtype=states.dtype, device=states.device)
        mask = F.one_hot(selected, num_classes=E).permute(2, 1, 0)
        for expert_idx in range(E):
            idx, top_x = torch.where(mask[expert_idx].squeeze(0))
            current = self.experts[expert_idx](states[None, top_x].reshape(-1, H)) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(states.dtype))
        return self.finish(states, final).reshape(batch, length, H)

    def finish(self, states: Tensor, final: Tensor) -> Tensor:
        return final


class MixtralLists(Mixtral):
    """4.36: the indices as Python lists, experts without tokens skipped."""

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        states = states.view(-1, H)
        weights, selected = self.route(states)
        final = torch.zeros((batch * length, H), dtype=states.dtype, device=states.device)
        mask = F.one_hot(selected, num_classes=E).permute(2, 1, 0)
        for expert_idx in range(E):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            top_x_list, idx_list = top_x.tolist(), idx.tolist()
            current = states[None, top_x_list].reshape(-1, H)
            current = expert_layer(current) * weights[top_x_list, idx_list, None]
            final.index_add_(0, top_x, current.to(states.dtype))
        return final.reshape(batch, length, H)


class MixtralHit(Mixtral):
    """4.55: only the experts that were hit."""

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        states = states.view(-1, H)
        weights, selected = self.route(states)
        final = torch.zeros((batch * length, H), dtype=states.dtype, device=states.device)
        mask = F.one_hot(selected, num_classes=E).permute(2, 1, 0)
        expert_hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(mask[expert_idx].squeeze(0))
            current = states[None, top_x].reshape(-1, H)
            current = expert_layer(current) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(states.dtype))
        return final.reshape(batch, length, H)


class Olmoe(Mixtral):
    """Weights not renormalised."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, selected = torch.topk(F.softmax(self.gate(x), dim=1, dtype=torch.float), K, dim=-1)
        return weights.to(x.dtype), selected


class Qwen2Moe(Olmoe):
    """A shared expert under a sigmoid gate beside the routed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert, self.shared_expert_gate = SwiGLU(), nn.Linear(H, 1, bias=False)

    def finish(self, states: Tensor, final: Tensor) -> Tensor:
        return final + F.sigmoid(self.shared_expert_gate(states)) * self.shared_expert(states)


class PhiMoE(Mixtral):
    """The evaluation path of the sparse mixer: two arg-maxima, each with its own masked softmax."""

    def route(self, x: Tensor, jitter: float = 0.01) -> tuple[Tensor, Tensor]:
        scores = self.gate(x)
        best, first = scores.max(dim=-1, keepdim=True)
        far = ((best - scores) / scores.abs().clamp(min=best)) > 2 * jitter
        weight = scores.masked_fill(far, float("-inf")).softmax(-1).gather(dim=-1, index=first)
        rest = torch.scatter(scores, -1, first, float("-inf"))
        best, second = rest.max(dim=-1, keepdim=True)
        far = ((best - scores) / scores.abs().clamp(min=best)) > 2 * jitter
        other = rest.masked_fill(far, float("-inf")).softmax(-1).gather(dim=-1, index=second)
        return torch.concat((weight, other), dim=-1), torch.concat((first, second), dim=-1)


class JetMoe(nn.Module):
    """Sorted pairs, split by sizes on the host, one product per expert and layer, added back by index."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.input = nn.Parameter(torch.randn(E, 2 * INTER, H) / H**0.5)
        self.output = nn.Parameter(torch.randn(E, H, INTER) / INTER**0.5)

    def parallel(self, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([F.linear(part, weight[i]) for i, part in enumerate(rows.split(sizes, dim=0))], dim=0)

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.gate(x).topk(K, dim=1)
        gates = torch.softmax(top, dim=1).type_as(x)
        zeros = torch.zeros([x.size(0), E], dtype=gates.dtype, device=gates.device)
        sizes = zeros.scatter(1, ids, 1).long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        batch = order.div(K, rounding_mode="trunc")
        hidden = self.parallel(x[batch], self.input, sizes)
        gate, up = hidden.chunk(2, dim=-1)
        y = self.parallel(F.silu(gate) * up, self.output, sizes) * gates.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, batch, y)
