"""The whole layer with fp8 weights that carry scales, by Triton kernels: ``experts.follow_plan`` for them.

Shape legend: see ``spec.py``. With ``quantise`` the input of each GEMM is rounded to fp8 with a scale per row and 128
of the depth, as in DeepSeek-V3 and vLLM (w8a8); else rows stay as they are (w8a16), which is what a program means
that widens its weights and then multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import BLOCK, FP8, dequantize_blocks, dequantize_rows
from ..quantize import quantize_rows as quantize_rows_twin
from .combine import combine_pairs, combine_sorted, combine_twin
from .config import H200, Device, Plan
from .decode import decode_projection
from .experts import arranged, is_dense
from .grouped import gather_projection, projection_twin, sorted_projection
from .launch import Start, once
from .operand import Operand
from .quantize import quantize_rows
from .scaled import GROUP, Quant, groups
from .scaled_gemv import MAX_COLUMNS, scaled_gemv_down, scaled_gemv_up
from .scaled_plans import choose_scaled_path, select_scaled
from .sort import sort_pairs
from .tile import Projection


def plan_scaled(
    ids: Tensor, experts: int, up: Projection, down: Projection, quantise: bool, elements: int,
    path: str | None = None, device: Device = H200,
) -> Plan:  # fmt: skip
    """How ``follow_scaled`` computes the layer; depends on shapes and strides alone."""
    (tokens, top_k), hidden, inter = ids.shape, up.depth, up.columns
    if path is None:
        # the columns of a matrix-vector program lie in one block of scales
        blocks = up.scale_rows == down.scale_rows == GROUP
        dense = is_dense(up, down) and blocks and inter % MAX_COLUMNS == 0 and down.columns % MAX_COLUMNS == 0
        path = choose_scaled_path(tokens, top_k, experts, hidden, inter, dense, quantise)
    return select_scaled(
        path, tokens, top_k, experts, hidden, inter, up.epilogue.gated, quantise, elements, device
    )


def follow_scaled(
    plan: Plan,
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    up: Projection,
    down: Projection,
    quantise: bool,
    weight_on_input: bool,
    out_dtype: torch.dtype | None,
    start: Start = once,
) -> Tensor:
    """``x [T, H]``, ``weights [T, K]``, ``ids [T, K]`` -> ``[T, H]``."""
    (tokens, top_k), dtype = ids.shape, out_dtype or x.dtype
    if tokens == 0:
        return x.new_empty(0, down.columns, dtype=dtype)
    x, ids, on_input, on_output = arranged(x, weights, ids, weight_on_input)
    if plan.path == "gemv":
        h = scaled_gemv_up(x, ids, experts, up, quantise, on_input, start)
        return scaled_gemv_down(h, ids, on_output, experts, down, quantise, dtype, start)
    rows, first, second, inner = x, Quant(), Quant(), x.dtype
    if quantise:
        rows, scale = quantize_rows(x, start)
        between = start.empty(x, tokens * top_k, groups(up.columns), dtype=torch.float32)
        first, second, inner = Quant(scale, between), Quant(between), FP8
    if plan.path == "decode":
        h = decode_projection(rows, ids, experts, up, plan.up, True, on_input, start, first, inner)
        y = decode_projection(h, ids, experts, down, plan.down, False, None, start, second, x.dtype)
        return combine_pairs(y, ids, on_output, experts, dtype, start)
    pairs = sort_pairs(ids, experts, plan.up.bm, plan.up.rest, start)
    h = gather_projection(rows, pairs, top_k, up, plan.up, on_input, start, first, inner)
    y = sorted_projection(h, pairs, down, plan.down, start, second, x.dtype)
    return combine_sorted(y, pairs.inverse, pairs.offsets, on_output, top_k, dtype, start)


def scaled_twin(rows: Tensor, expert: Tensor, projection: Projection, scales: Tensor | None, quantise: bool) -> Tensor:
    """Torch twin of every scaled GEMM, in fp32: weights and, with ``quantise``, rows are what fp8 holds of them."""
    if quantise:
        rows = dequantize_rows(*quantize_rows_twin(rows))
    wide = Projection(
        _wide(projection.w, projection.scale, projection.scale_rows),
        projection.columns,
        projection.epilogue,
        None if projection.up is None else _wide(projection.up, projection.up_scale, projection.scale_rows),
        projection.b,
        projection.b_up,
    )
    return projection_twin(rows.float(), expert, wide, scales)


def _wide(role: Operand, scale: Tensor | None, rows: int) -> Operand:
    assert scale is not None
    block = BLOCK if rows == GROUP else (rows, role.first.shape[-1])
    return Operand((dequantize_blocks(role.first, scale, block),))


def run_scaled_twin(
    x: Tensor, weights: Tensor, ids: Tensor, experts: int, up: Projection, down: Projection, quantise: bool,
    weight_on_input: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Torch twin of ``follow_scaled``."""
    top_k, expert = ids.shape[1], ids.reshape(-1)
    valid = (expert >= 0) & (expert < experts)
    expert = torch.where(valid, expert, -1)
    rows = x.repeat_interleave(top_k, dim=0)  # [P, H]
    h = scaled_twin(rows, expert, up, weights.reshape(-1) if weight_on_input else None, quantise)
    y = scaled_twin(h, expert, down, None, quantise).to(x.dtype)
    position = torch.arange(expert.numel(), device=x.device)
    return combine_twin(y, position, valid, None if weight_on_input else weights, top_k, out_dtype or x.dtype)
