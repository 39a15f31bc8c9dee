"""Tiny causal language models of every MoE family that has one, built from configurations alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

# Families whose causal model is built from the configuration of this type.
MODELS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "minimax_m2",
    "glm4_moe", "nemotron_h", "olmoe", "flex_olmo",
    "lfm2_moe", "afmoe", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v32", "deepseek_v4", "dots1",
    "ernie4_5_moe",
    "exaone_moe", "gemma4_text", "glm4_moe_lite", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "laguna", "mellum", "mimo_v2_flash", "minimax",
    "qwen3_next", "solar_open", "zaya", "aria_text", "qwen3_5_moe_text", "jetmoe", "dbrx",
    "llama4_text", "longcat_flash", "doge",
)  # fmt: skip
QUICK = MODELS[:12]

SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2,
    moe_topk=2, moe_k=2, n_group=1, topk_group=1, first_k_dense_replace=0, num_dense_layers=0,
    kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
)  # fmt: skip
_MLA = dict(num_key_value_heads=4)
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _MLA, "deepseek_v3": _MLA, "deepseek_v32": _MLA, "axk1": _MLA, "glm4_moe_lite": _MLA,
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "dots1": dict(n_shared_experts=1, layer_types=["full_attention"] * 2),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, layer_types=["mamba", "attention"]),
    "zaya": dict(num_experts_per_tok=1),
    "longcat_flash": _MLA,
    "dbrx": dict(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32),
    ),
    "doge": dict(is_moe=True, num_experts=16),
    "gemma4_text": dict(enable_moe_block=True, top_k_experts=2),
}  # fmt: skip


def build(model_type: str) -> nn.Module:
    """A two-layer model in eval mode with random weights."""
    cls = CONFIG_MAPPING[model_type]
    config = cls(**{**SMALL, **CHANGES.get(model_type, {})})
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    fill_small(model)
    return model.eval()


def fill_small(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
