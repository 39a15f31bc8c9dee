"""The tile of ``tile.py`` with weights in fp8 that carry a scale per block, and rows in fp8 or as they are.

The scheme is DeepSeek-V3's (https://arxiv.org/abs/2412.19437, section 3.3): e4m3 weights with one float32 scale per
128 x 128 block, rows with one per 128 of the depth; a weight may have one per output channel instead. A step of the
loop is one block deep, so its product is scaled as it is added to the float32 sum, and the tensor core's own narrow
sum never spans more than a step. Rows that are not quantised are multiplied with weights widened to their dtype,
which is exact.

Shape legend: see ``spec.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..quantize import LARGEST, SMALLEST
from .operand import expert_base
from .tile import Projection, over_rows, rows_of_weight, tile_values

GROUP = 128  # rows of a weight, and steps of the depth, that share a scale

GROUP_: tl.constexpr = tl.constexpr(GROUP)
LARGEST_: tl.constexpr = tl.constexpr(LARGEST)
SMALLEST_: tl.constexpr = tl.constexpr(SMALLEST)


class Scales(NamedTuple):
    """Run-time argument: the float32 scales of one GEMM; None in place of a tensor where there are none.

    Without ``w`` the GEMM is not one of fp8 weights at all.
    """

    x: Any  # [rows, groups of the depth], dense
    x_row: int  # its stride
    w: Any  # [E, blocks of rows, blocks of the depth] or [E, rows, 1], any strides
    up: Any  # the same for an up weight of its own
    expert: int  # strides of w and up
    row: int
    inp: int
    out: Any  # [rows, groups of the columns], dense: where the scales of quantised results go


class Quant(NamedTuple):
    """What of one GEMM is quantised beside its weights."""

    x: Tensor | None = None  # scales of the rows, else they are not quantised
    out: Tensor | None = None  # filled with the scales of the results, else they are not quantised


PLAIN_ROWS = Quant()


def groups(columns: int) -> int:
    """How many scales a row of ``columns`` has."""
    return -(-columns // GROUP)


NO_SCALES = Scales(None, 0, None, None, 0, 0, 0, None)


def scales_of(projection: Projection, quant: Quant) -> Scales:
    """The launch argument for ``projection``."""
    w = projection.scale
    if w is None:
        return NO_SCALES
    x_row = 0 if quant.x is None else quant.x.stride(0)
    expert, row, inp = w.stride()
    inp = 0 if w.shape[2] == 1 else inp  # one per channel serves the whole depth
    return Scales(quant.x, x_row, w, projection.up_scale, expert, row, inp, quant.out)


@triton.jit
def to_fp8(y, AXIS: tl.constexpr, EXACT: tl.constexpr):
    """fp32 ``y``, one group along ``AXIS`` -> its e4m3 values and its scale.

    ``EXACT``: divided as IEEE says, to the bits of ``moe_compile.quantize``; where only rows are moved, that cannot be
    told in the time of whole layers.
    """
    largest = tl.maximum(tl.max(tl.abs(y), AXIS), SMALLEST_)
    if EXACT:
        scale = tl.div_rn(largest, LARGEST_)
        q = tl.div_rn(y, tl.expand_dims(scale, AXIS))
    else:
        scale = largest / LARGEST_
        q = y / tl.expand_dims(scale, AXIS)
    return q.to(tl.float8e4nv), scale


@triton.jit
def _row_scales(base, Q, first, tile, limit, WN: tl.constexpr, ROWS: tl.constexpr):
    """Where the scales of the WN weight rows from ``first`` on are, and which rows have the first of the two.

    In blocks rows that share none with the first share the next one: a tile is no higher than a block, or starts on
    one. With a scale for every row (``ROWS`` 1) the first has an address for each. ``tile`` numbers the first row and
    ``limit`` ends the rows that count.
    """
    end = first + tl.minimum(limit - tile, WN) - 1
    n = first + tl.arange(0, WN)
    low = n // GROUP_ == first // GROUP_
    upper = base + (end // GROUP_).to(tl.int64) * Q.row
    if ROWS == 1:
        lower = base + tl.minimum(n, end).to(tl.int64) * Q.row
    else:
        lower = base + (first // GROUP_).to(tl.int64) * Q.row
    return lower, upper, low


@triton.jit
def _weight_scales(lower, upper, low, at, ROWS: tl.constexpr):
    """The scales of all rows of a tile at one step along the depth."""
    if ROWS == 1:
        return tl.load(lower + at)
    else:
        return tl.where(low, tl.load(lower + at), tl.load(upper + at))


@triton.jit
def _scaled(part, lower, upper, low, at, sa, S: tl.constexpr, WHOLE: tl.constexpr):
    """``part`` times the scales of its weight rows and of its rows (``sa``); ``at`` is the step along the depth."""
    if WHOLE:
        s = tl.load(lower + at)
        both = s if sa is None else over_rows(sa * s, S.swap)
        return part * both
    elif S.swap:
        sw = _weight_scales(lower, upper, low, at, S.scale_rows)
        return part * (sw[:, None] if sa is None else sw[:, None] * sa[None, :])
    else:
        sw = _weight_scales(lower, upper, low, at, S.scale_rows)
        return part * (sw[None, :] if sa is None else sa[:, None] * sw[None, :])


@triton.jit
def _product(a, wt, SWAP: tl.constexpr):
    """``a @ wt.T`` of one step; the sum over the steps is the caller's."""
    if a.dtype != wt.dtype:
        wt = wt.to(a.dtype)
    if SWAP:
        return tl.dot(wt, tl.trans(a), input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(wt), input_precision="ieee")


@triton.jit
def scaled_tile(
    x,  # rows of activations [.., D]
    x_stride,
    x_row,  # [BM] int64, a valid row of x even where not ok
    scales,  # None, or one weight per pair, applied to the input
    pair,  # [BM] position in scales
    out,  # [.., N], dense
    out_row,  # [BM] int64
    ok,  # [BM]
    e,  # expert
    tn,  # tile number along N
    N,
    D,
    Q,  # Scales
    W,  # Weights
    M: tl.constexpr,  # Meaning
    S: tl.constexpr,  # Shape
    BM: tl.constexpr,
):
    """``tile.expert_tile`` with scales; quantises what it writes where ``Q.out`` is given."""
    TWO: tl.constexpr = M.layout == "concat" or M.layout == "separate"
    WN: tl.constexpr = 2 * S.bn if M.layout == "interleaved" else S.bn
    # all rows of a tile share a block where tiles divide blocks and the up half starts on a tile
    WHOLE: tl.constexpr = S.even_n and S.scale_rows >= WN
    tl.static_assert(S.bk == GROUP_)
    k = tl.arange(0, GROUP_)
    n_in = tn * WN + tl.arange(0, WN)
    limit = N * 2 if M.layout == "interleaved" else N
    n = rows_of_weight(n_in, limit, S.even_n, S.vector_n)
    wp = expert_base(W.w, e, M.w, M.w_aligned) + n[:, None] * W.w.out + k[None, :] * W.w.inp  # [WN, BK]
    block = Q.w + e.to(tl.int64) * Q.expert
    tl.static_assert(WN <= GROUP_ or M.layout == "interleaved")
    lower, upper, low = _row_scales(block, Q, tn * WN, tn * WN, limit, WN, S.scale_rows)
    xp = x + x_row[:, None] * x_stride + k[None, :]  # [BM, BK]
    if Q.x is not None:
        ap = Q.x + x_row * Q.x_row
    acc = tl.zeros((WN, BM) if S.swap else (BM, WN), tl.float32)
    if TWO:
        acc_up = tl.zeros((WN, BM) if S.swap else (BM, WN), tl.float32)
        if M.layout == "concat":
            up = wp + tl.cast(N, tl.int64) * W.w.out
            up_step = GROUP_ * W.w.inp
            up_lower, up_upper, up_low = _row_scales(block, Q, tn * WN + N, tn * WN, N, WN, S.scale_rows)
        else:
            up = expert_base(W.up, e, M.up, M.up_aligned) + n[:, None] * W.up.out + k[None, :] * W.up.inp
            up_step = GROUP_ * W.up.inp
            own = Q.up + e.to(tl.int64) * Q.expert
            up_lower, up_upper, up_low = _row_scales(own, Q, tn * WN, tn * WN, N, WN, S.scale_rows)
    for g in range(0, tl.cdiv(D, GROUP_)):
        left = D - g * GROUP_
        if S.even_d:
            a = tl.load(xp)
            wt = tl.load(wp, eviction_policy=S.evict)
        else:
            a = tl.load(xp, mask=(k < left)[None, :], other=0.0)
            wt = tl.load(wp, mask=(k < left)[None, :], other=0.0, eviction_policy=S.evict)
        sa = tl.load(ap + g) if Q.x is not None else None
        acc += _scaled(_product(a, wt, S.swap), lower, upper, low, g * Q.inp, sa, S, WHOLE)
        if TWO:
            if S.even_d:
                ut = tl.load(up, eviction_policy=S.evict)
            else:
                ut = tl.load(up, mask=(k < left)[None, :], other=0.0, eviction_policy=S.evict)
            acc_up += _scaled(_product(a, ut, S.swap), up_lower, up_upper, up_low, g * Q.inp, sa, S, WHOLE)
            up += up_step
        xp += GROUP_
        wp += GROUP_ * W.w.inp
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    y = tile_values(acc, acc_up if TWO else None, scales, pair, ok, e, tn, N, W, M, S, BM, EXACT)
    c = tn * S.bn + tl.arange(0, S.bn)
    if Q.out is not None:
        tl.static_assert(S.bn == GROUP_)
        COLUMNS: tl.constexpr = 0 if S.swap else 1
        # what lies past the last column is no part of the group
        inside = (c < N)[:, None] if S.swap else (c < N)[None, :]
        y, scale = to_fp8(tl.where(inside, y, 0.0), COLUMNS, False)
        tl.store(Q.out + out_row * tl.cdiv(N, GROUP_) + tn, scale, mask=ok)
    else:
        y = y.to(out.dtype.element_ty)
    if S.swap:
        y = tl.trans(y)
    tl.store(out + out_row[:, None] * N + c[None, :], y, mask=ok[:, None] & (c < N)[None, :])
