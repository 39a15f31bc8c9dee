"""Hugging Face's ``FP8Experts`` (fine-grained fp8): what is proved of one, and the op call that follows.

Weights are float8_e4m3fn with a float32 scale per block of 128 x 128; the input of each GEMM is rounded to fp8 with a
scale per row and 128 columns, found as it comes (``activation_scheme="dynamic"``). Other formats that the class knows
(fp4, scales in e8m0, static or per-tensor scales, other blocks) mean something else and are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .guards import Facts, TokenRange, decide
from .quantize import BLOCK, FP8
from .spec import NoMatch

SCALE = "_scale_inv"
NOTE = "_moe_compile_note"  # on a module: what reports add to the kernels


def is_fp8(module: Any) -> bool:
    """Whether a stacked experts module carries scales."""
    return hasattr(module, f"gate_up_proj{SCALE}") or hasattr(module, f"up_proj{SCALE}")


def check_fp8(module: Any, up: str) -> None:
    """Raise ``NoMatch`` unless the op computes what the module means; ``up`` names the first projection."""
    if getattr(module, "activation_scheme", None) != "dynamic":
        raise NoMatch("MC402", f"activation_scheme is {getattr(module, 'activation_scheme', None)!r}, not 'dynamic'")
    block = getattr(module, "block_size", None)
    if block is None or tuple(block) != BLOCK:
        raise NoMatch("MC402", f"block_size is {block}, not {BLOCK}: the kernels know blocks of that size only")
    for name in (up, "down_proj"):
        weight: Any = getattr(module, name, None)
        scale: Any = getattr(module, name + SCALE, None)
        for label, tensor, dtype in ((name, weight, FP8), (name + SCALE, scale, torch.float32)):
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
                raise NoMatch("MC402", f"{label} is {type(tensor).__name__}, not a plain tensor")
            if tensor.dtype != dtype:
                raise NoMatch("MC402", f"{label} is {tensor.dtype}, not {dtype}")
        blocks = [weight.shape[0], *(-(-n // b) for n, b in zip(weight.shape[1:], BLOCK, strict=True))]
        if list(scale.shape) != blocks:
            raise NoMatch("MC201", f"{name + SCALE} is {list(scale.shape)}, the blocks of {name} are {blocks}")
    if getattr(module, f"{up}_bias", None) is not None or getattr(module, "down_proj_bias", None) is not None:
        raise NoMatch("MC506", "fp8 experts with biases")


def run_fp8(
    module: Any, up: str, how: tuple[Any, ...], x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``[T, H] -> [T, H]`` by one op; ``how`` as in ``hf_family``."""
    name, constants, gated, interleaved, kernels = how
    return torch.ops.moe_compile.experts_fp8.default(
        x, top_k_weights, top_k_index, getattr(module, up), getattr(module, up + SCALE), module.down_proj,
        getattr(module, f"down_proj{SCALE}"), name, list(constants), gated, interleaved, kernels=kernels,
    )  # fmt: skip


def describe_fp8(module: Any, up: str, top_k: int | None, kernels: str) -> str:
    """The op and which kernels run it for which number of tokens, for reports: ``top_k`` is None where unknown."""
    note = module.__dict__.get(NOTE)
    return f"moe_compile::experts_fp8 by {_kernels(module, up, top_k, kernels)}{f'; {note}' if note else ''}"


def _kernels(module: Any, up: str, top_k: int | None, kernels: str) -> str:
    w1, w2 = getattr(module, up), module.down_proj
    if kernels == "triton" or w2.device.type != "cuda":
        return "Triton" if w2.device.type == "cuda" else "PyTorch"
    if kernels == "deepgemm":
        return "DeepGEMM"
    if top_k is None:
        return "DeepGEMM or Triton"
    experts, hidden, inter = w2.shape
    dense = [
        getattr(module, name).is_contiguous() and getattr(module, name + SCALE).is_contiguous()
        for name in (up, "down_proj")
    ]
    sizes = (experts, top_k, hidden, inter)
    facts = Facts(*sizes, w1.dtype, w2.dtype, dense[0], dense[1], hidden_contiguous=True, provider=None)
    decision = decide(kernels, facts, TokenRange(0, None))
    if not decision.failed:  # only now is a package looked for, and tried
        from .deepgemm.provider import find

        found = find(w2.get_device())
        if isinstance(found, NoMatch):
            decision = decide(kernels, replace(facts, provider=found), TokenRange(0, None))
    rows = "" if decision.failed else " (rows that are not bfloat16: Triton)"
    return f"{decision.text()}{rows}"
