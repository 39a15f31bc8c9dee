"""The tile of ``tile.py`` with weights, and rows where they are in order, read by the tensor memory accelerator.

A descriptor made on the host and passed by value names the whole weight, so one thread asks for a tile of
weights, which arrives in shared memory as the tensor core wants it: no addresses in registers. What lies
outside of the tensor reads as zero. The expert is a dimension of its own, hence a tile that reaches past the
last row of its expert reads zeros and never the next expert. Weights stored ``[E, in, out]`` (``turned``) come
as they lie, and the tensor core turns them. fp32 does not come here (``config.select``): its steps are added
otherwise (``tile._add_step``).

Shape legend: see ``spec.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .config import Tiles
from .operand import Operand
from .tile import Projection, dot, finish_tile

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

AVAILABLE = TensorDescriptor is not None
CAPABILITY = 9  # the first major version of devices that have it


def describe(projection: Projection, plan: Tiles) -> tuple[Any, Any]:
    """Descriptors of the weight and of a separate up weight (else None); wants ``Projection.describable``."""
    layout = projection.epilogue.layout
    bn = projection.columns_of(plan)
    if layout == "concat" and not projection.w.turned:
        w = projection.w.first  # [E, 2*N, D], seen as [E*2, N, D]
        sizes, out = [2 * w.shape[0], projection.columns, w.shape[2]], w.stride(1)
        block = [1 if plan.swap else 2, bn, plan.bk]
        return TensorDescriptor(w, sizes, [projection.columns * out, out, 1], block), None
    rows = 2 * bn if layout == "interleaved" else bn
    block = [1, plan.bk, rows] if projection.w.turned else [1, rows, plan.bk]
    first = _describe(projection.w, block)
    return first, None if projection.up is None else _describe(projection.up, block)


def _describe(role: Operand, block: list[int]) -> Any:
    w = role.stored
    # the tensor that the call was given stands for the address: a view of it is unknown to ``replay``
    return TensorDescriptor(role.first, list(w.shape), list(w.stride()), block)


def describe_rows(x: Tensor, bm: int, bk: int) -> Any:
    """Descriptor of dense rows ``x [.., D]``."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [bm, bk])


def is_descriptor(value: Any) -> bool:
    """Whether a launch argument is a descriptor."""
    return AVAILABLE and isinstance(value, TensorDescriptor)


@triton.jit
def tile_rows(order, first, skip, length, K: tl.constexpr, BM: tl.constexpr):
    """Sorted rows ``first + skip`` on, as far as below ``length``: which are, their numbers, pairs, rows of x."""
    m = skip + tl.arange(0, BM)
    ok = m < length
    s = first + tl.where(ok, m, 0)
    if order is not None:
        pair = tl.load(order + s)
        x_row = (pair // K).to(tl.int64)
    else:
        pair = s
        x_row = s.to(tl.int64)
    return ok, s.to(tl.int64), pair, x_row


@triton.jit
def _row_tile(xp, k, left, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(xp)
    else:
        # zero weights do not help against a NaN in what comes after the row
        return tl.load(xp, mask=(k < left)[None, :], other=0.0)


@triton.jit
def _weight_tile(wd, e, n, up, N, d, ROWS: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    """``[ROWS, BK]`` of the weights from row ``n`` on; of a concat layout gate rows, or with ``up`` = 1 up rows."""
    if M.turned:
        # past the last gate column lie up columns: they end in columns of the result that nobody stores
        return tl.trans(tl.reshape(wd.load([e, d, up * N + n]), (S.bk, ROWS)))
    else:
        PARTS: tl.constexpr = 2 if M.layout == "concat" else 1
        return tl.reshape(wd.load([e * PARTS + up, n, d]), (ROWS, S.bk))


@triton.jit
def _up_tile(wd, ud, e, n, N, d, ROWS: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    """The same of the up rows, wherever they are."""
    if M.layout == "separate":
        return _weight_tile(ud, e, n, 0, N, d, ROWS, M, S)
    else:
        return _weight_tile(wd, e, n, 1, N, d, ROWS, M, S)


@triton.jit
def described_tile(
    x,  # rows of activations [.., D]
    x_stride,
    x_row,  # [BM] int64, a valid row of x even where not ok
    xd,  # None, or the descriptor of x, whose rows are then in sorted order
    first,  # the first row, with xd
    scales,
    pair,
    out,
    out_row,
    ok,
    e,
    tn,
    N,
    D,
    wd,  # the descriptors of the weights
    ud,
    W,
    M: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
):
    """``tile.expert_tile`` with descriptors; with ``xd``, rows that are not ok are other rows of x, or zero."""
    # gate and up as the two halves of one operand: one wide tensor-core instruction instead of two
    FUSED: tl.constexpr = M.layout == "concat" and not S.swap and not M.turned
    TWO: tl.constexpr = M.layout == "separate" or (M.layout == "concat" and not FUSED)
    WN: tl.constexpr = 2 * S.bn if M.layout == "interleaved" else S.bn
    ROWS: tl.constexpr = 2 * S.bn if FUSED else WN
    k = tl.arange(0, S.bk)
    xp = x + x_row[:, None] * x_stride + k[None, :]  # [BM, BK]
    acc = tl.zeros((ROWS, BM) if S.swap else (BM, ROWS), tl.float32)
    if TWO:
        acc_up = tl.zeros((ROWS, BM) if S.swap else (BM, ROWS), tl.float32)
    for d in range(0, D, S.bk):
        if xd is not None:
            a = xd.load([first, d])
        else:
            a = _row_tile(xp, k, D - d, S.even_d)
        acc = dot(a, _weight_tile(wd, e, tn * WN, 0, N, d, ROWS, M, S), acc, S.swap)
        if TWO:
            acc_up = dot(a, _up_tile(wd, ud, e, tn * WN, N, d, ROWS, M, S), acc_up, S.swap)
        xp += S.bk
    if FUSED:
        acc, acc_up = tl.split(tl.permute(tl.reshape(acc, (BM, 2, S.bn)), (0, 2, 1)))
    finish_tile(
        acc, acc_up if TWO or FUSED else None, scales, pair, out, out_row, ok, e, tn, N, W, M, S, BM
    )


@triton.jit
def shared_tile(
    x, x_stride, order, scales, out, first, length, e, tn, N, D, wd, ud, W,
    K: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """BA + BB rows, both powers of two, over the same weights; swapped operands only."""
    TWO: tl.constexpr = M.layout == "concat" or M.layout == "separate"
    WN: tl.constexpr = 2 * S.bn if M.layout == "interleaved" else S.bn
    k = tl.arange(0, S.bk)
    oka, sa, pa, ra = tile_rows(order, first, 0, length, K, BA)
    okb, sb, pb, rb = tile_rows(order, first, BA, length, K, BB)
    xa = x + ra[:, None] * x_stride + k[None, :]  # [BA, BK]
    xb = x + rb[:, None] * x_stride + k[None, :]  # [BB, BK]
    ca = tl.zeros((WN, BA), tl.float32)
    cb = tl.zeros((WN, BB), tl.float32)
    if TWO:
        ua = tl.zeros((WN, BA), tl.float32)
        ub = tl.zeros((WN, BB), tl.float32)
    for d in range(0, D, S.bk):
        a = _row_tile(xa, k, D - d, S.even_d)
        b = _row_tile(xb, k, D - d, S.even_d)
        wt = _weight_tile(wd, e, tn * WN, 0, N, d, WN, M, S)
        ca = dot(a, wt, ca, True)
        cb = dot(b, wt, cb, True)
        if TWO:
            ut = _up_tile(wd, ud, e, tn * WN, N, d, WN, M, S)
            ua = dot(a, ut, ua, True)
            ub = dot(b, ut, ub, True)
        xa += S.bk
        xb += S.bk
    finish_tile(ca, ua if TWO else None, scales, pa, out, sa, oka, e, tn, N, W, M, S, BA)
    finish_tile(cb, ub if TWO else None, scales, pb, out, sb, okb, e, tn, N, W, M, S, BB)
