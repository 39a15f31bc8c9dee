"""The whole layer with fp8 weights by DeepGEMM's grouped GEMMs, and Triton kernels for what lies around them.

As vLLM's ``DeepGemmExperts`` computes it, in fewer launches: sort (2 or 3), rows to fp8 in padded expert order, GEMM,
activation to fp8, GEMM, weighted sum. Nothing waits for the device; rows that pad an expert's last block are neither
written nor read by our kernels. Shape legend: see ``spec.py``; ``M`` rows of the padded order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.combine import combine_padded
from ..kernels.experts import arranged
from ..kernels.launch import Launch, Start, note_of_thread, once
from ..kernels.quantize import activate_quantize, mn_major, quantize_permute
from ..kernels.sort import sort_pairs, tile_capacity
from ..kernels.tile import Projection

if TYPE_CHECKING:
    from .provider import Provider

# Mean rows per expert from which blocks of so many rows win: lower blocks pad less, higher ones multiply faster.
ROWS_PER_EXPERT: tuple[tuple[int, int], ...] = ((128, 64), (64, 32), (32, 0))


def alignment(tokens: int, top_k: int, experts: int, possible: tuple[int, ...]) -> int:
    """Rows of a block for this many tokens."""
    mean = tokens * top_k / experts
    return next((rows for rows, least in ROWS_PER_EXPERT if mean >= least and rows in possible), max(possible))


def follow_deepgemm(
    provider: Provider,
    align: int,
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    up: Projection,
    down: Projection,
    weight_on_input: bool,
    out_dtype: torch.dtype | None,
    start: Start = once,
) -> Tensor:
    """``x [T, H]``, ``weights [T, K]``, ``ids [T, K]`` -> ``[T, H]``.

    Args:
        up: with one dense weight ``[E, 2I, H]`` or ``[E, I, H]``, dense scales and no bias; ``down`` likewise.
    """
    (tokens, top_k), dtype = ids.shape, out_dtype or x.dtype
    if tokens == 0:
        return x.new_empty(0, down.columns, dtype=dtype)
    x, ids, on_input, on_output = arranged(x, weights, ids, weight_on_input)
    assert up.scale is not None and down.scale is not None
    pairs = sort_pairs(ids, experts, align, start=start, padded=True)
    rows, scale, layout = quantize_permute(x, pairs, top_k, align, on_input, start)
    wide = x.new_empty(rows.shape[0], up.w.first.shape[1], dtype=torch.bfloat16)  # [M, 2I]
    y = x.new_empty(rows.shape[0], down.columns, dtype=torch.bfloat16)  # [M, H]
    with provider.alignment(align):
        _multiply(provider, align, rows, scale, up, wide, layout)
        h, between = activate_quantize(wide, pairs, up.columns, up.epilogue, align, start)
        _multiply(provider, align, h, between, down, y, layout)
    return combine_padded(y, pairs.inverse, on_output, top_k, dtype, start)


def _multiply(
    provider: Provider, align: int, a: Tensor, a_scale: Tensor, projection: Projection, out: Tensor, layout: Tensor
) -> None:
    note = note_of_thread()
    if note is not None:
        note(Launch(GEMM, (), {"align": align}), (provider, a.shape[0], projection))
        return
    b, b_scale = projection.w.first, projection.scale
    assert b_scale is not None
    provider.grouped_fp8(a, a_scale, b, b_scale, out, layout)
    _ran.add(_size(align, a.shape[0], b))


# --- which kernels of DeepGEMM are compiled and loaded ----------------------------------------------
#
# DeepGEMM chooses its tiles by the rows, too, and compiles them at the first call that needs them. What has run in
# this process with so many rows can be captured.

GEMM = "deepgemm"  # stands for the kernel where launches are noted
_ran: set[tuple[Any, ...]] = set()


def _size(align: int, rows: int, b: Tensor) -> tuple[Any, ...]:
    return b.get_device(), align, rows, tuple(b.shape)


def blocks(provider: Provider, tokens: int, top_k: int, experts: int) -> tuple[int, int]:
    """Rows of a block, and rows ``M`` of the padded order, for this many tokens."""
    align = alignment(tokens, top_k, experts, provider.alignments)
    return align, tile_capacity(tokens * top_k, experts, align) * align


def has_run(provider: Provider, ids: Tensor, up: Projection, down: Projection) -> bool:
    """Whether both GEMMs have run before for so many ids."""
    tokens, top_k = ids.shape
    size = blocks(provider, tokens, top_k, down.w.first.shape[0])
    return all(_size(*size, p.w.first) in _ran for p in (up, down))


def rehearse(provider: Provider, align: int, rows: int, projection: Projection) -> bool:
    """Let DeepGEMM compile and load what it multiplies so many rows with; False if it had.

    One block is really multiplied, the others belong to no expert.
    """
    b = projection.w.first
    if _size(align, rows, b) in _ran:
        return False
    a = torch.zeros(rows, b.shape[2], dtype=torch.uint8, device=b.device).view(b.dtype)
    scale = mn_major(rows, b.shape[2], a).zero_()
    layout = torch.full((rows,), -1, dtype=torch.int32, device=b.device)
    layout[:align] = 0
    out = torch.empty(rows, b.shape[1], dtype=torch.bfloat16, device=b.device)
    with torch.cuda.device(b.device), provider.alignment(align):
        _multiply(provider, align, a, scale, projection, out, layout)
    return True
