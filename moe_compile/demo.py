"""Small models for ``python -m moe_compile demo`` and ``bench``: the MoE layers that people write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class NaiveMoE(nn.Module):
    """Router and a ``ModuleList`` of experts; each kind of loop is a subclass."""

    def __init__(self, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList([Expert(hidden_size, intermediate_size) for _ in range(num_experts)])

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, H]`` -> weights ``[T, K]`` in the dtype of ``x`` and ids ``[T, K]``."""
        probabilities = F.softmax(self.gate(x), dim=-1, dtype=torch.float)
        weights, ids = torch.topk(probabilities, self.top_k, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), ids


class GatherLoop(NaiveMoE):
    """Mixtral as in transformers 4: gather the tokens of each expert, add its output back."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class DenseLoop(NaiveMoE):
    """Every expert sees every token; a mask keeps what was routed."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            weight = (weights * (ids == e)).sum(dim=-1, keepdim=True)  # [T, 1], zero where not routed
            out = out + self.experts[e](x) * weight
        return out


@dataclass(frozen=True)
class Sample:
    """A model with inputs, ready to call: ``sample.model(*sample.args, **sample.kwargs)``."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The GPU in bfloat16 if there is one, else the CPU in float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def naive(
    kind: type[NaiveMoE],
    sizes: tuple[int, int, int, int],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Sample:
    """A naive layer with ``sizes = (E, K, H, I)`` and random input ``[tokens, H]``."""
    torch.manual_seed(0)
    layer = kind(*sizes).to(device, dtype).eval()
    x = torch.randn(tokens, sizes[2], device=device, dtype=dtype)
    experts, top_k, hidden, inner = sizes
    return Sample(f"{kind.__name__} E={experts} K={top_k} H={hidden} I={inner} T={tokens}", layer, (x,), {})


def tiny_mixtral(device: torch.device, dtype: torch.dtype) -> Sample | None:
    """A two-layer Mixtral with random weights, None without transformers."""
    try:
        from transformers import AutoModelForCausalLM, MixtralConfig
    except ImportError:
        return None
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
    ids = torch.randint(0, 256, (2, 32), device=device)
    return Sample("Mixtral (Hugging Face, 2 layers, random weights)", model, (), {"input_ids": ids})


def samples() -> list[Sample]:
    """What ``demo`` shows, on the best device here: naive layers whose experts take the time, and not Python."""
    device, dtype = device_and_dtype()
    sizes, tokens = ((16, 4, 1024, 512), 512) if device.type == "cuda" else ((8, 2, 256, 512), 128)
    out = [naive(kind, sizes, tokens, device, dtype) for kind in (GatherLoop, DenseLoop)]
    mixtral = tiny_mixtral(device, dtype)
    return out if mixtral is None else [*out, mixtral]
