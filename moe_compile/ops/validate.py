"""Argument checks that the op implementations share: typed errors that say what, which values, what to do.

Shape legend: see ``spec.py``. Only metadata is read, never a value, so nothing here synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantize import BLOCK, FP8
from .schema import is_stacked, num_experts

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int32, torch.int64)
MAX_PAIRS = 2**31 - 1 - 2**20  # tokens times top_k, with room for what a last program counts past the end


def check_experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Sequence[Tensor],
    w3: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b3: Sequence[Tensor],
    b2: Sequence[Tensor],
    gated: bool,
    interleaved: bool,
) -> int:
    """Check every argument of ``experts`` and return E."""
    _rows_and_router(hidden_states, topk_weights, topk_ids)
    if not w1 or not w2:
        raise ValueError(f"w1 has {len(w1)} tensors and w2 {len(w2)}; both projections are required")
    if not gated and (w3 or interleaved):
        raise ValueError("w3 and interleaved belong to gated activations; pass gated=True or drop them")
    if w3 and interleaved:
        raise ValueError("interleaved gate/up rows need one fused w1; drop w3 or pass interleaved=False")
    if b3 and not w3:
        raise ValueError("b3 is the bias of w3, which is absent; put a fused bias into b1")
    dtype, hidden = hidden_states.dtype, hidden_states.shape[1]
    experts, inner = num_experts(w1), w2[0].shape[-1]
    first = 2 * inner if gated and not w3 else inner  # gate and up share one fused w1
    _role("w1", w1, experts, (first, hidden), dtype)
    _role("w3", w3, experts, (inner, hidden), dtype)
    _role("w2", w2, experts, (hidden, inner), dtype)
    _role("b1", b1, experts, (first,), dtype)
    _role("b3", b3, experts, (inner,), dtype)
    _role("b2", b2, experts, (hidden,), dtype)
    return experts


def check_fp8(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    gated: bool,
    interleaved: bool,
    quantise: bool,
    w3: Tensor | None = None,
    w3_scale: Tensor | None = None,
) -> None:
    """Check every argument of ``experts_fp8``."""
    _rows_and_router(hidden_states, topk_weights, topk_ids)
    if interleaved and not gated:
        raise ValueError("interleaved belongs to gated activations; pass gated=True or drop it")
    if (w3 is None) != (w3_scale is None) or (w3 is not None and (interleaved or not gated)):
        raise ValueError("w3 and w3_scale go together, with a gated activation and no interleaved rows")
    up = [] if w3 is None or w3_scale is None else [("w3", w3, w3_scale)]
    roles = [("w1", w1, w1_scale), *up, ("w2", w2, w2_scale)]
    for name, weight, _ in roles:
        _dims(name, weight, ("E", "out", "in"))
        if weight.dtype != FP8:
            raise TypeError(f"{name} is {weight.dtype}, expected {FP8}; quantise it by moe_compile.quantize_blocks")
    experts, hidden, inner = w2.shape
    first = (experts, (2 if gated and not up else 1) * inner, hidden_states.shape[1])
    if tuple(w1.shape) != first or hidden != hidden_states.shape[1]:
        raise ValueError(
            f"w1 {_shape(w1)} and w2 {_shape(w2)} do not fit hidden_states {_shape(hidden_states)}: with w2 "
            f"[E, H, I] w1 is {list(first)} and H is {hidden_states.shape[1]}"
        )
    for name, weight, scale in roles:
        if name == "w3" and tuple(weight.shape) != first:
            raise ValueError(f"w3 is {_shape(weight)}, expected {list(first)}, as w1")
        expected = [experts, *(-(-size // block) for size, block in zip(weight.shape[1:], BLOCK, strict=True))]
        channels = [experts, weight.shape[1], 1]
        if _shape(scale) != expected and (quantise or _shape(scale) != channels):
            per_channel = "" if quantise else f", or {channels}: one per output channel"
            raise ValueError(
                f"{name}_scale is {_shape(scale)}, expected {expected}: one scale per block of "
                f"{BLOCK[0]} x {BLOCK[1]}{per_channel}"
            )
        if scale.dtype != torch.float32:
            raise TypeError(f"{name}_scale is {scale.dtype}, expected float32; use {name}_scale.float()")
    for _, _, scale in up:
        if scale.shape != w1_scale.shape:
            raise ValueError(f"w3_scale is {_shape(scale)} and w1_scale {_shape(w1_scale)}: both per block or channel")


def block_of(weight: Tensor, scale: Tensor) -> tuple[int, int]:
    """``(out, in)`` features that share a scale: a checked ``[E, out, 1]`` is one per output channel.

    It is one per block as well only where a block is a channel.
    """
    return (1, weight.shape[-1]) if scale.shape[-2] == weight.shape[-2] else BLOCK


def check_ids(topk_ids: Tensor) -> None:
    """``topk_ids`` is an int32 or int64 ``[T, K]``."""
    if topk_ids.dtype not in IDS:
        raise TypeError(f"topk_ids is {topk_ids.dtype}; pass int32 or int64 expert ids")
    _dims("topk_ids", topk_ids, ("T", "K"))
    if topk_ids.shape[1] < 1:
        raise ValueError(f"topk_ids is {_shape(topk_ids)}; every token needs at least one expert, so K >= 1")
    if topk_ids.numel() > MAX_PAIRS:
        raise ValueError(
            f"topk_ids {_shape(topk_ids)} has {topk_ids.numel()} pairs, and a pair's number has 32 bits; split the "
            f"tokens over calls of at most {MAX_PAIRS // topk_ids.shape[1]}"
        )


def check_grouped_linear(
    rows: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor
) -> None:
    """Check every argument of ``grouped_linear``."""
    _floats("rows", rows)
    _dims("rows", rows, ("P", "in"))
    if not weight:
        raise ValueError("weight is an empty list; pass one stacked [E, out, in] or E tensors [out, in]")
    experts, out = num_experts(weight), weight[0].shape[-2]
    _role("weight", weight, experts, (out, rows.shape[1]), rows.dtype)
    _role("bias", bias, experts, (out,), rows.dtype)
    check_offsets(offsets, experts)


def check_combine(
    rows: Tensor, order: Tensor, offsets: Tensor, topk_weights: Tensor | None, top_k: int
) -> None:
    """Check every argument of ``combine``."""
    _floats("rows", rows)
    _dims("rows", rows, ("P", "H"))
    check_offsets(offsets, None)
    if top_k < 1 or rows.shape[0] % top_k:
        raise ValueError(f"{rows.shape[0]} rows are not T * top_k, top_k={top_k}; pass the K of the router")
    if order.shape != rows.shape[:1] or order.dtype not in IDS:
        raise ValueError(
            f"order is {order.dtype} {_shape(order)} for rows {_shape(rows)}; "
            "pass the order that sort_pairs gave"
        )
    if topk_weights is not None and topk_weights.shape != (rows.shape[0] // top_k, top_k):
        raise ValueError(
            f"topk_weights {_shape(topk_weights)} does not fit {rows.shape[0]} rows and top_k={top_k}; "
            f"pass [{rows.shape[0] // top_k}, {top_k}]"
        )


def check_offsets(offsets: Tensor, experts: int | None) -> None:
    """``offsets`` is an int32 or int64 ``[E + 1]``; E is not checked when None."""
    length = offsets.numel() if experts is None else experts + 1
    if offsets.dtype not in IDS or offsets.dim() != 1 or offsets.numel() != length or length < 2:
        raise ValueError(
            f"offsets is {offsets.dtype} {_shape(offsets)}, expected integers "
            f"[{'E + 1' if experts is None else length}]; pass the offsets that sort_pairs gave"
        )


def check_route(logits: Tensor, top_k: int) -> None:
    """Check every argument of ``route`` but the fields of ``spec.Router``."""
    _floats("logits", logits)
    _dims("logits", logits, ("T", "E"))
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"top_k is {top_k}, but the logits are {_shape(logits)}; choose 1 to {logits.shape[1]} experts"
        )


def _rows_and_router(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
    """``hidden_states [T, H]``, ``topk_weights`` and ``topk_ids`` ``[T, K]``."""
    _floats("hidden_states", hidden_states)
    check_ids(topk_ids)
    _dims("hidden_states", hidden_states, ("T", "H"))
    if topk_ids.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"topk_ids {_shape(topk_ids)} and hidden_states {_shape(hidden_states)} disagree on the number "
            "of tokens; flatten batch and sequence of both to one leading dimension"
        )
    if not topk_weights.is_floating_point():
        raise TypeError(f"topk_weights is {topk_weights.dtype}; pass the router's floating point weights")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights {_shape(topk_weights)} and topk_ids {_shape(topk_ids)} differ; "
            "both are [T, K], one weight for every chosen expert"
        )


def _role(
    name: str, tensors: Sequence[Tensor], experts: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """One weight role: absent, one stacked tensor, or one tensor for every expert."""
    if not tensors:
        return
    matrix = len(shape) == 2
    stacked = is_stacked(tensors) if matrix else len(tensors) == 1 and tensors[0].dim() == 2
    if not stacked and len(tensors) != experts:
        raise ValueError(
            f"{name} has {len(tensors)} tensors for {experts} experts; "
            "pass one stacked tensor or one tensor for every expert"
        )
    expected = (experts, *shape) if stacked else shape
    for tensor in tensors:
        if tensor.shape != expected:
            fix = "weights are [.., out, in], a transposed view will do" if matrix else "biases are [.., out]"
            raise ValueError(f"{name} is {_shape(tensor)}, expected {list(expected)}; {fix}")
        if tensor.dtype != dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} but the rows it multiplies are {dtype}; cast one of them, "
                "the op never converts a weight"
            )


def _floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; pass float32, bfloat16, float16 or float64")


def _dims(name: str, tensor: Tensor, dims: tuple[str, ...]) -> None:
    if tensor.dim() != len(dims):
        raise ValueError(
            f"{name} is {_shape(tensor)}, expected [{', '.join(dims)}]; flatten the leading dimensions"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
