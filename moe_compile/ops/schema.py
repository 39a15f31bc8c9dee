"""The schemas of ``torch.ops.moe_compile.*`` and their fake implementations.

Shape legend: see ``spec.py``. Weights are always given as ``[.., out, in]`` with any strides:
one stacked tensor ``[E, out, in]`` in a list of one, or E tensors ``[out, in]`` in the order of the
expert ids. An absent role is an empty list. Ops are functional, never synchronise the device, return
fresh tensors, and treat ids outside ``[0, E)`` as contributing exactly zero.

``experts``
    ``hidden_states [T, H]``, ``topk_weights [T, K]`` (any float dtype), ``topk_ids [T, K]`` (int32/int64)
    -> ``[T, H]`` in ``out_dtype`` (default: the dtype of ``hidden_states``). ``w1`` gate (or fused gate/up,
    or the only input projection), ``w3`` up, ``w2`` down, ``b1 b3 b2`` their biases. ``activation`` and
    ``activation_args`` are ``spec.Activation.name`` and ``.args()``; sums are accumulated in fp32 or better.

``experts_fp8``
    ``experts`` with float8_e4m3fn weights ``w1 [E, 2I, H]`` (``[E, I, H]`` not gated, or with an up projection ``w3``
    of its own) and ``w2 [E, H, I]`` that mean ``w * scale``, one float32 scale per block of 128 x 128: ``w1_scale [E,
    ceil(rows/128), ceil(H/128)]``, the others likewise, with any strides: one number ``expand``ed is a scale per
    tensor. ``quantise``: the input of each GEMM is rounded to fp8 too, with a scale per row and 128 of the depth.
    Without, ``[E, rows, 1]`` is a scale per output channel. ``kernels``: ``triton``, or a rule of ``guards.RULES``,
    which sends a call to DeepGEMM where it holds, or ``deepgemm``, which raises where it cannot run.

``sort_pairs``
    ``topk_ids [T, K]`` -> ``order [P]`` int32, the flat pair numbers ``t*K + k`` sorted by expert and, within
    an expert, by pair number, pairs with ids out of range last; ``offsets [E + 1]`` int32, where expert ``e``
    owns ``order[offsets[e]:offsets[e + 1]]``.

``grouped_linear``
    ``rows [P, in]`` in sorted order -> ``[P, out]``: ``rows[s] @ weight[e].T + bias[e]`` for ``s`` in expert
    ``e``'s range; rows from ``offsets[E]`` on are zero.

``combine``
    ``rows [P, H]`` in sorted order -> ``[T, H]`` in ``out_dtype``: ``sum_k topk_weights[t, k] * rows[pos(t, k)]``
    in the fixed order of ``k``, in fp32 or better; pairs past ``offsets[E]`` are not read. ``topk_weights``
    None means weight one (the router weight was applied to the input).

``route``
    ``logits [T, E]`` -> weights ``[T, K]`` in ``dtype`` and int64 ids ``[T, K]``, the largest first; ``score``,
    ``renormalise``, ``eps`` and ``scale`` are the fields of ``spec.Router``.

``experts_inner``, ``experts_fp8_inner``, ``grouped_linear_inner``, ``combine_inner``, ``route_inner``
    The same ops without a backward that says what to do, for the graphs that Inductor runs, which autograd has
    already left: the Python function at its dispatch key costs more host time than a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "moe_compile"
library = torch.library.Library(NAMESPACE, "DEF")

SIGNATURES = {
    "experts": "(Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, "
    "Tensor[] w1, Tensor[] w3, Tensor[] w2, Tensor[] b1, Tensor[] b3, Tensor[] b2, "
    "str activation, float[] activation_args, bool gated, bool interleaved=False, "
    "bool weight_on_input=False, ScalarType? out_dtype=None) -> Tensor",
    "experts_fp8": "(Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, Tensor w1, Tensor w1_scale, "
    "Tensor w2, Tensor w2_scale, str activation, float[] activation_args, bool gated, bool interleaved=False, "
    "bool weight_on_input=False, bool quantise=True, str kernels='auto', ScalarType? out_dtype=None, "
    "Tensor? w3=None, Tensor? w3_scale=None) -> Tensor",
    "sort_pairs": "(Tensor topk_ids, int num_experts) -> (Tensor, Tensor)",
    "grouped_linear": "(Tensor rows, Tensor[] weight, Tensor[] bias, Tensor offsets) -> Tensor",
    "combine": "(Tensor rows, Tensor order, Tensor offsets, Tensor? topk_weights, int top_k, "
    "ScalarType? out_dtype=None) -> Tensor",
    "route": "(Tensor logits, int top_k, str score, bool renormalise, float eps, float scale, ScalarType dtype) "
    "-> (Tensor, Tensor)",
}
for _name, _signature in SIGNATURES.items():
    library.define(_name + _signature)


def num_experts(weight: Sequence[Tensor]) -> int:
    """E of a role: the leading size of a stacked tensor, else the number of tensors."""
    return weight[0].shape[0] if is_stacked(weight) else len(weight)


def is_stacked(weight: Sequence[Tensor]) -> bool:
    """Whether a weight matrix role is one ``[E, out, in]`` tensor."""
    return len(weight) == 1 and weight[0].dim() == 3


@torch.library.register_fake(f"{NAMESPACE}::experts", lib=library)
def _experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Sequence[Tensor],
    w3: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b3: Sequence[Tensor],
    b2: Sequence[Tensor],
    activation: str,
    activation_args: Sequence[float],
    gated: bool,
    interleaved: bool = False,
    weight_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = out_dtype or hidden_states.dtype
    return hidden_states.new_empty(hidden_states.shape[0], w2[0].shape[-2], dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::experts_fp8", lib=library)
def _experts_fp8(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    activation: str,
    activation_args: Sequence[float],
    gated: bool,
    interleaved: bool = False,
    weight_on_input: bool = False,
    quantise: bool = True,
    kernels: str = "auto",
    out_dtype: torch.dtype | None = None,
    w3: Tensor | None = None,
    w3_scale: Tensor | None = None,
) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], w2.shape[1], dtype=out_dtype or hidden_states.dtype)


@torch.library.register_fake(f"{NAMESPACE}::sort_pairs", lib=library)
def _sort_pairs(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    order = topk_ids.new_empty(pairs, dtype=torch.int32)
    return order, topk_ids.new_empty(num_experts + 1, dtype=torch.int32)


@torch.library.register_fake(f"{NAMESPACE}::grouped_linear", lib=library)
def _grouped_linear(rows: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight[0].shape[-2])


@torch.library.register_fake(f"{NAMESPACE}::combine", lib=library)
def _combine(
    rows: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    top_k: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return rows.new_empty(rows.shape[0] // top_k, rows.shape[1], dtype=out_dtype or rows.dtype)


@torch.library.register_fake(f"{NAMESPACE}::route", lib=library)
def _route(
    logits: Tensor, top_k: int, score: str, renormalise: bool, eps: float, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


def _no_backward(name: str) -> None:
    def setup(ctx: object, inputs: object, output: object) -> None:
        """Nothing is saved."""

    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(
            f"torch.ops.{NAMESPACE}.{name} has no backward yet: call it under torch.no_grad(), "
            "or keep the original program where gradients are needed"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=library)


INNER = {
    "experts": _experts,
    "experts_fp8": _experts_fp8,
    "grouped_linear": _grouped_linear,
    "combine": _combine,
    "route": _route,
}
BELOW_AUTOGRAD: dict[Any, Any] = {}  # an op -> its inner form

for _name, _fake in INNER.items():
    _no_backward(_name)
    library.define(f"{_name}_inner{SIGNATURES[_name]}")
    torch.library.register_fake(f"{NAMESPACE}::{_name}_inner", _fake, lib=library)
    BELOW_AUTOGRAD[getattr(torch.ops.moe_compile, _name).default] = getattr(
        torch.ops.moe_compile, f"{_name}_inner"
    ).default


def implement(name: str, function: Callable[..., Any], device: str) -> None:
    """Register the implementation of an op, and of its inner form, for a dispatch key."""
    library.impl(name, function, device)
    if name in INNER:
        library.impl(f"{name}_inner", function, device)
