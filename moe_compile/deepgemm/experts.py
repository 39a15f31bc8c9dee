"""The whole layer with fp8 weights by DeepGEMM's grouped GEMMs, and Triton kernels for what lies around them.

As vLLM's ``DeepGemmExperts`` computes it, in fewer launches: sort (2 or 3), rows to fp8 in padded expert order, GEMM,
activation to fp8, GEMM, weighted sum. Nothing waits for the device; rows that pad an expert's last block are neither
written nor read by our kernels. Shape legend: see ``spec.py``; ``M`` rows of the padded order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.combine import combine_padded
from ..kernels.experts import arranged
from ..kernels.launch import Start, once
from ..kernels.quantize import activate_quantize, quantize_permute
from ..kernels.sort import sort_pairs
from ..kernels.tile import Projection

if TYPE_CHECKING:
    from .provider import Provider

# Mean rows per expert from which blocks of so many rows win: lower blocks pad less, higher ones multiply faster.
ROWS_PER_EXPERT = ((128, 64), (64, 32), (32, 0))


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
        provider.grouped_fp8(rows, scale, up.w.first, up.scale, wide, layout)
        h, between = activate_quantize(wide, pairs, up.columns, up.epilogue, align, start)
        provider.grouped_fp8(h, between, down.w.first, down.scale, y, layout)
    return combine_padded(y, pairs.inverse, on_output, top_k, dtype, start)
