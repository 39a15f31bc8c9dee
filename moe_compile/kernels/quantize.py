"""Rows to fp8 with one scale per 128 columns: as they lie, in padded expert order, and after the activation.

Padded expert order is what grouped GEMMs with one expert per row block want: the rows of an expert start at a
multiple of the block, so row block ``j`` is tile ``j`` of the sort's table and row ``i`` of it the pair ``i`` of that
tile. The rows between an expert's last and the next block are never written here nor read by anybody who counts.

Shape legend: see ``spec.py``. ``M`` rows of the padded order, ``G`` groups of 128 columns. Scales may lie in any order:
a GEMM by descriptors wants those of one group side by side (``mn_major``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize import FP8
from ..quantize import quantize_rows as quantize_rows_twin
from .activation import Epilogue, activate, activate_twin
from .config import power_of_two
from .launch import Launch, Start, dependent, follow, once
from .scaled import GROUP_, groups, to_fp8
from .sort import Sorted

MN_VECTOR = 4  # scales in 16 bytes: what the pitch of ``mn_major`` is a multiple of


def mn_major(rows: int, columns: int, like: Tensor) -> Tensor:
    """Uninitialised scales ``[rows, G]`` that lie group by group, every group on 16 bytes."""
    pitch = -(-rows // MN_VECTOR) * MN_VECTOR
    return like.new_empty(groups(columns), pitch, dtype=torch.float32).t()[:rows]


@triton.jit(do_not_specialize=["T", "capacity"])
def quantize_kernel(
    x,
    x_stride,
    position,  # None, or [T*K]: where in the padded order, -1 for pairs without an expert
    weights,  # None, or [T*K] with position: a factor of every pair, which its scales take along
    tiles,  # with position: the sort's table
    out,
    scale,
    scale_row,
    scale_group,
    layout,  # with position: [M] expert of every row, -1 in blocks of none
    T,
    H,
    capacity,
    K: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
    A: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM tokens times BG groups; with ``position`` every token goes to its K rows, and the programs share the table."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    c = g[:, None] * GROUP_ + tl.arange(0, GROUP_)[None, :]
    here = t < T
    inside = here[:, None, None] & (c < H)[None, :, :]
    follow(PDL)
    v = tl.load(x + t.to(tl.int64)[:, None, None] * x_stride + c[None, :, :], mask=inside, other=0.0)
    q, s = to_fp8(v.to(tl.float32), 2, True)  # [BM, BG, 128], [BM, BG]
    grouped = here[:, None] & (g * GROUP_ < H)[None, :]
    if position is None:
        row = t.to(tl.int64)
        tl.store(out + row[:, None, None] * H + c[None, :, :], q, mask=inside)
        tl.store(scale + row[:, None] * scale_row + g[None, :] * scale_group, s, mask=grouped)
    else:
        for k in tl.range(0, K, loop_unroll_factor=8):
            row = tl.load(position + t.to(tl.int64) * K + k, mask=here, other=-1).to(tl.int64)
            valid = row >= 0
            tl.store(out + row[:, None, None] * H + c[None, :, :], q, mask=inside & valid[:, None, None])
            at = scale + row[:, None] * scale_row + g[None, :] * scale_group
            factor = s
            if weights is not None:
                w = tl.load(weights + t.to(tl.int64) * K + k, mask=here, other=0.0).to(tl.float32)
                factor = s * w[:, None]
            tl.store(at, factor, mask=grouped & valid[:, None])
        if tl.program_id(1) == 0:
            live = tl.load(tiles)
            for j in range(tl.program_id(0), capacity, tl.num_programs(0)):
                e = tl.load(tiles + 1 + j, mask=j < live, other=-1)
                tl.store(layout + j * A + tl.arange(0, A), tl.zeros((A,), tl.int32) + e)


@triton.jit(do_not_specialize=["capacity"])
def activate_kernel(
    x,  # [M, N or 2N] in padded order
    offsets,
    tiles,
    out,  # [M, N]
    scale,
    scale_row,
    scale_group,
    N,
    capacity,
    F: tl.constexpr,
    LAYOUT: tl.constexpr,
    A: tl.constexpr,
    BM: tl.constexpr,
    PDL: tl.constexpr,
):
    """BM rows of one tile times one group of columns: activation, then fp8."""
    PARTS: tl.constexpr = A // BM
    follow(PDL)
    j = tl.program_id(0) // PARTS
    first = tl.program_id(0) % PARTS * BM
    if j < tl.load(tiles):
        e = tl.load(tiles + 1 + j)
        count = tl.load(offsets + e + 1) - tl.load(tiles + 1 + capacity + j) - first
        if count > 0:
            m = tl.arange(0, BM)
            g = tl.program_id(1)
            n = g * GROUP_ + tl.arange(0, GROUP_)
            row = (j * A + first + m).to(tl.int64)
            inside = (m < count)[:, None] & (n < N)[None, :]
            if LAYOUT == "single":
                gate = tl.load(x + row[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
                up = gate
            elif LAYOUT == "concat":
                at = x + row[:, None] * (2 * N) + n[None, :]
                gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                up = tl.load(at + N, mask=inside, other=0.0).to(tl.float32)
            else:
                tl.static_assert(LAYOUT == "interleaved")
                both = g * (2 * GROUP_) + tl.arange(0, 2 * GROUP_)
                at = x + row[:, None] * (2 * N) + both[None, :]
                wide = tl.load(at, mask=(m < count)[:, None] & (both < 2 * N)[None, :], other=0.0)
                gate, up = tl.split(tl.reshape(wide.to(tl.float32), (BM, GROUP_, 2)))
            # an activation need not be zero at zero: what lies past the last column is no part of the group
            y = tl.where((n < N)[None, :], activate(gate, up, F, False), 0.0)
            q, s = to_fp8(y, 1, True)
            tl.store(out + row[:, None] * N + n[None, :], q, mask=inside)
            tl.store(scale + row * scale_row + g * scale_group, s, mask=m < count)


def quantize_rows(x: Tensor, start: Start = once) -> tuple[Tensor, Tensor]:
    """``x [T, H]`` -> e4m3 ``[T, H]`` and float32 scales ``[T, G]``; the twin is ``moe_compile.quantize``'s."""
    tokens, hidden = x.shape
    q = start.empty(x, tokens, hidden, dtype=FP8)
    scale = start.empty(x, tokens, groups(hidden), dtype=torch.float32)
    if tokens:
        _quantize(x, None, 1, None, q, scale, None, 0, start)
    return q, scale


def quantize_permute(
    x: Tensor, pairs: Sorted, top_k: int, align: int, weights: Tensor | None = None, start: Start = once
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``x [T, H]`` -> e4m3 ``[M, H]``, MN-major scales ``[M, G]`` and int32 ``[M]`` expert of every row.

    Args:
        pairs: of ``sort_pairs(..., bm=align, padded=True)``; ``M = pairs.capacity * align``.
        weights: ``[T, K]`` factors of the rows, if they belong on the input.
    """
    rows, hidden = pairs.capacity * align, x.shape[1]
    q = x.new_empty(rows, hidden, dtype=FP8)
    scale = mn_major(rows, hidden, x)
    layout = x.new_empty(rows, dtype=torch.int32)
    if rows:
        _quantize(x, pairs, top_k, weights, q, scale, layout, align, start)
    return q, scale, layout


def _quantize(
    x: Tensor,
    pairs: Sorted | None,
    top_k: int,
    weights: Tensor | None,
    q: Tensor,
    scale: Tensor,
    layout: Tensor | None,
    align: int,
    start: Start,
) -> None:
    tokens, hidden = x.shape

    def launch() -> Launch:
        bg = min(power_of_two(groups(hidden)), 8)
        bm = 1 if tokens < 1024 else max(1, 16 // bg)
        grid = (triton.cdiv(tokens, bm), triton.cdiv(groups(hidden), bg))
        return Launch(quantize_kernel, grid, {"K": top_k, "BM": bm, "BG": bg, "A": align, **dependent(x)})

    position, tiles, capacity = (None, None, 0) if pairs is None else (pairs.inverse, pairs.tiles, pairs.capacity)
    start(
        launch, x, x.stride(0), position, weights, tiles, q, scale, scale.stride(0), scale.stride(1), layout, tokens,
        hidden, capacity,
    )  # fmt: skip


def activate_quantize(
    x: Tensor, pairs: Sorted, columns: int, epilogue: Epilogue, align: int, start: Start = once
) -> tuple[Tensor, Tensor]:
    """``x [M, 2I]`` (``[M, I]`` not gated) in padded order -> e4m3 ``[M, I]`` and MN-major scales ``[M, G]``."""
    rows = x.shape[0]
    q = x.new_empty(rows, columns, dtype=FP8)
    scale = mn_major(rows, columns, x)
    if rows == 0:
        return q, scale

    def launch() -> Launch:
        bm = min(align, 16)
        grid = (rows // bm, groups(columns))
        constants = {"F": epilogue.function, "LAYOUT": epilogue.layout, "A": align, "BM": bm}
        return Launch(activate_kernel, grid, {**constants, **dependent(x)})

    start(
        launch, x, pairs.offsets, pairs.tiles, q, scale, scale.stride(0), scale.stride(1), columns, pairs.capacity
    )
    return q, scale


def activate_quantize_twin(x: Tensor, columns: int, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    """Torch twin of ``activate_quantize``, for all rows."""
    gate, up = x.float(), None
    if epilogue.layout == "concat":
        gate, up = gate[:, :columns], gate[:, columns:]
    elif epilogue.layout == "interleaved":
        gate, up = gate[:, 0::2], gate[:, 1::2]
    return quantize_rows_twin(activate_twin(gate, up, epilogue))
