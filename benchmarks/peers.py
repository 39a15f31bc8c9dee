"""The programs that ``experts.py`` times: the routed part of a layer, from logits to the weighted sum.

Shapes: ``x [T, H]``, ``logits [T, E]`` float32, ``w1 [E, 2I, H]`` (gate first), ``w2 [E, H, I]``. Every
program routes alike: softmax in float32, top-k, renormalise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile.ops  # noqa: F401  (registers torch.ops.moe_compile)

Program = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer; ``E`` experts, ``K`` per token, hidden ``H``, intermediate ``I``."""

    name: str
    E: int
    K: int
    H: int
    I: int

    def limit_ms(self, tokens: int, experts_hit: int, copy_tbs: float, dense_tflops: float) -> float:
        """Physical limit in bf16: the bytes that must move at the rate of a copy, or the arithmetic at a GEMM's."""
        weights = experts_hit * 3 * self.H * self.I * 2
        activations = 2 * tokens * self.H * 2 + tokens * self.E * 4
        flops = 6 * tokens * self.K * self.H * self.I
        return max((weights + activations) / copy_tbs, flops / dense_tflops) / 1e9

    def gathered_bytes(self, tokens: int) -> int:
        """What batched_mm copies: the weights of every chosen expert, for every token."""
        return tokens * self.K * 3 * self.H * self.I * 2


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("qwen3-30b-a3b", 128, 8, 2048, 768),
        Layer("mixtral-8x7b", 8, 2, 4096, 14336),
        Layer("deepseek-v3", 64, 8, 7168, 2048),
        Layer("gpt-oss-20b", 32, 4, 2880, 2880),
        Layer("olmoe", 64, 8, 2048, 1024),
    )
}
TOKENS = (1, 16, 128, 1024, 4096, 16384)
DEFAULT_PEERS = ("ours", "hf_grouped_c", "hf_batched_c", "hand_c", "hf_grouped", "hf_eager")
WHEEL_PEERS = ("vllm", "vllm_best", "tk", "dg_bf16")  # see wheel_peers.py and deepgemm_peer.py
PEERS = (*DEFAULT_PEERS, "hand_ma", *WHEEL_PEERS)
HF_COMPILED = ("hf_grouped_c", "hf_batched_c")
BATCHED_BYTES = 24 << 30


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Router weights ``[T, K]`` in float32 and ids ``[T, K]``."""
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float), top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), ids


def applies(name: str, layer: Layer, tokens: int) -> bool:
    """batched_mm copies weights per token: only few tokens fit. DeepGEMM pads experts to blocks: it wants many."""
    if name == "hf_batched_c":
        return tokens <= 128 and layer.gathered_bytes(tokens) <= BATCHED_BYTES
    return name != "dg_bf16" or tokens > 128


def compiles(name: str) -> bool:
    """Whether the first call of a peer compiles something."""
    return name in ("ours", "hand_ma", *WHEEL_PEERS) or name.endswith("_c")


def build(name: str, layer: Layer, w1: Tensor, w2: Tensor) -> Program:
    """The program of a peer; names that end in ``_c`` or ``_ma``, and ours, go through torch.compile."""
    if name == "dg_bf16":
        import deepgemm_peer

        return deepgemm_peer.build(layer, w1, w2)
    if name in WHEEL_PEERS:
        import wheel_peers  # needs Triton and an unpacked wheel

        return wheel_peers.build(name, layer, w1, w2)
    if name == "ours":
        return torch.compile(_ours(layer, w1, w2), backend="moe_compile", dynamic=False)
    if name == "hand_c":
        return torch.compile(_hand(layer, w1, w2), dynamic=False)
    if name == "hand_ma":
        return torch.compile(_hand(layer, w1, w2), dynamic=False, mode="max-autotune-no-cudagraphs")
    implementation = {"hf_grouped": "grouped_mm", "hf_batched": "batched_mm", "hf_eager": "eager"}
    program = _hugging_face(layer, w1, w2, implementation[name.removesuffix("_c")])
    return torch.compile(program, dynamic=False) if name.endswith("_c") else program


def _ours(layer: Layer, w1: Tensor, w2: Tensor) -> Program:
    def program(x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = route(logits, layer.K)
        constants = [1.0, float("inf"), float("inf"), float("inf"), 0.0]  # plain silu
        out: Tensor = torch.ops.moe_compile.experts(
            x, weights, ids, [w1], [], [w2], [], [], [], "silu", constants, True
        )
        return out

    return program


def _hand(layer: Layer, w1: Tensor, w2: Tensor) -> Program:
    """Sort, two grouped products, weighted sum: what one writes with ``torch._grouped_mm``."""
    w1_t, w2_t = w1.transpose(-2, -1), w2.transpose(-2, -1)

    def program(x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = route(logits, layer.K)
        flat = ids.flatten()
        order = flat.argsort()
        experts = torch.arange(layer.E, device=x.device, dtype=flat.dtype)
        ends = torch.searchsorted(flat[order], experts, right=True).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // layer.K], w1_t, offs=ends).chunk(2, dim=-1)
        rows = torch._grouped_mm(F.silu(gate) * up, w2_t, offs=ends)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=x.device)
        pairs = rows[place].view(x.shape[0], layer.K, layer.H)
        return (pairs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    return program


def _hugging_face(layer: Layer, w1: Tensor, w2: Tensor, implementation: str) -> Program:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=layer.H,
        intermediate_size=layer.I,
        num_local_experts=layer.E,
        num_experts_per_tok=layer.K,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = nn.Parameter(w1, requires_grad=False)
    experts.down_proj = nn.Parameter(w2, requires_grad=False)

    def program(x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = route(logits, layer.K)
        out: Tensor = experts(x, ids, weights)
        return out

    return program


def reference(layer: Layer, w1: Tensor, w2: Tensor, x: Tensor, logits: Tensor) -> Tensor:
    """The same in float32, expert by expert; ``x`` and ``logits`` may be a sample of the tokens."""
    weights, ids = route(logits, layer.K)
    out = torch.zeros(x.shape[0], layer.H, device=x.device)
    for e in range(layer.E):
        token, slot = torch.where(ids == e)
        if token.numel():
            gate, up = (x[token].float() @ w1[e].float().t()).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ w2[e].float().t()
            out.index_add_(0, token, rows * weights[token, slot, None])
    return out
