"""Every MoE class of transformers, tiny and with random weights: no hub, no downloads."""

from __future__ import annotations

import ast
import importlib
import pathlib
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn

EXPERTS, HIDDEN, INTER, TOP_K, TOKENS = 4, 16, 24, 2, 7
MODELS = pathlib.Path(transformers.__file__).parent / "models"

SILU = "silu"
# What each class computes between its GEMMs, where it is not plain silu(gate) * up:
# a string is the name of a fused activation, None means the module's own code between two GEMMs.
SPECIAL: dict[str, str | None] = {
    "Gemma4TextExperts": "gelu_tanh",
    "DiffusionGemmaTextExperts": "gelu_tanh",
    "NemotronHExperts": "relu2",
    "DeepseekV4Experts": "silu gate_limit=7 up_limit=7",
    "Glm5NextTextExperts": "silu gate_limit=7 up_limit=7",
    "HYV4Experts": "silu gate_limit=7 up_limit=7",
    "HYV4VLExperts": "silu gate_limit=7 up_limit=7",
    "MiniMaxM3VLExperts": "silu alpha=1.702 gate_limit=7 up_limit=7 up_offset=1",
    "GptOssExperts": "silu alpha=1.702 gate_limit=7 up_limit=7 up_offset=1 interleaved",
    "OpenAIPrivacyFilterExperts": "silu alpha=1.702 gate_limit=7 up_limit=7 up_offset=1",
    "Inkling2Experts": None,  # tanh caps
    "Inkling2LoopExperts": None,
    "MuseSparkExperts": None,  # a norm after each expert
}


def config(**changes: Any) -> SimpleNamespace:
    """One configuration that answers to every name an experts class asks for."""
    values: dict[str, Any] = dict(
        num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, moe_num_experts=EXPERTS,
        hidden_size=HIDDEN, moe_hidden_size=HIDDEN, intermediate_size=INTER, moe_intermediate_size=INTER,
        expert_ffn_hidden_size=INTER, ffn_hidden_size=INTER, moe_latent_size=None, zero_expert_num=2,
        num_experts_per_tok=TOP_K, hidden_act="silu", hidden_activation="gelu_pytorch_tanh",
        mlp_hidden_act="relu2", activation_function="silu", ffn_act_fn={"name": "silu"},
        swiglu_limit=7.0, swiglu_alpha=1.702, mlp_gate_softcap=5.0, mlp_up_softcap=5.0, post_norm_eps=1e-6,
        d_model=HIDDEN, d_ff=INTER, dropout_rate=0.0, dense_act_fn="relu", expert_capacity=3,
        router_bias=False, router_jitter_noise=0.0, router_ignore_padding_tokens=False,
        router_dtype="float32", _experts_implementation="eager",
    )  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def decorated() -> list[tuple[str, str]]:
    """``(family, class)`` of every class decorated with ``use_experts_implementation``."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        source = path.read_text()
        if "use_experts_implementation" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_implementation" in ast.unparse(d) for d in node.decorator_list
            ):
                found.append((f"{path.parent.name}.{path.stem}", node.name))
    return found


def build(module: str, name: str, *args: Any) -> nn.Module:
    """An instance with weights of a size that reaches the limits of clamped activations."""
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    made: nn.Module = cls(*(args or (config(),)))
    fill(made)
    return made.eval()


def fill(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)


def routing(experts: int = EXPERTS, tokens: int = TOKENS, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states ``[T, H]``, ids and weights ``[T, K]``; one expert gets no token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, experts - 1, generator=generator).topk(TOP_K).indices
    return hidden, ids, torch.rand(tokens, TOP_K, generator=generator)
