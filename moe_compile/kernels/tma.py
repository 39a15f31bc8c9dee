"""The tile of ``tile.py`` with weights, and rows where they are in order, read by the tensor memory accelerator.

A descriptor made on the host and passed by value names the whole weight, so one thread asks for a tile of
weights, which arrives in shared memory as the tensor core wants it: no addresses in registers. What lies
outside of the tensor reads as zero. The expert is a dimension of its own, hence a tile that reaches past the
last row of its expert reads zeros and never the next expert.

Shape legend: see ``spec.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .operand import Operand
from .tile import Projection, Shape, dot, finish_tile

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

AVAILABLE = TensorDescriptor is not None
CAPABILITY = 9  # the first major version of devices that have it


def describe(projection: Projection, shape: Shape) -> tuple[Any, Any]:
    """Descriptors of the weight and of a separate up weight (else None); wants ``Projection.describable``."""
    layout = projection.epilogue.layout
    if layout == "concat":
        w = projection.w.first  # [E, 2*N, D], seen as [E*2, N, D]
        sizes, out = [2 * w.shape[0], projection.columns, w.shape[2]], w.stride(1)
        block = [1 if shape.swap else 2, shape.bn, shape.bk]
        return TensorDescriptor(w, sizes, [projection.columns * out, out, 1], block), None
    rows = 2 * shape.bn if layout == "interleaved" else shape.bn
    first = _describe(projection.w, [1, rows, shape.bk])
    return first, None if projection.up is None else _describe(projection.up, [1, rows, shape.bk])


def _describe(role: Operand, block: list[int]) -> Any:
    return TensorDescriptor(role.first, list(role.first.shape), list(role.first.stride()), block)


def describe_rows(x: Tensor, bm: int, bk: int) -> Any:
    """Descriptor of dense rows ``x [.., D]``."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [bm, bk])


@triton.jit
def described_tile(
    x,  # rows of activations [.., D]
    x_stride,
    x_row,  # [BM] int64, a valid row of x even where not ok
    xd,  # None, or the descriptor of x
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
    FUSED: tl.constexpr = M.layout == "concat" and not S.swap
    TWO: tl.constexpr = M.layout == "separate" or (M.layout == "concat" and S.swap)
    WN: tl.constexpr = 2 * S.bn if M.layout == "interleaved" else S.bn
    ROWS: tl.constexpr = 2 * S.bn if FUSED else WN
    PARTS: tl.constexpr = 2 if M.layout == "concat" else 1
    k = tl.arange(0, S.bk)
    xp = x + x_row[:, None] * x_stride + k[None, :]  # [BM, BK]
    acc = tl.zeros((ROWS, BM) if S.swap else (BM, ROWS), tl.float32)
    if TWO:
        acc_up = tl.zeros((ROWS, BM) if S.swap else (BM, ROWS), tl.float32)
    for d in range(0, D, S.bk):
        if xd is not None:
            a = xd.load([first, d])
        elif S.even_d:
            a = tl.load(xp)
        else:
            # zero weights do not help against a NaN in what comes after the row
            a = tl.load(xp, mask=(k < D - d)[None, :], other=0.0)
        acc = dot(a, tl.reshape(wd.load([e * PARTS, tn * WN, d]), (ROWS, S.bk)), acc, S.swap)
        if TWO:
            if M.layout == "separate":
                ut = ud.load([e, tn * WN, d])
            else:
                ut = wd.load([e * 2 + 1, tn * WN, d])
            acc_up = dot(a, tl.reshape(ut, (ROWS, S.bk)), acc_up, S.swap)
        xp += S.bk
    if FUSED:
        acc, acc_up = tl.split(tl.permute(tl.reshape(acc, (BM, 2, S.bn)), (0, 2, 1)))
    finish_tile(
        acc, acc_up if TWO or FUSED else None, scales, pair, out, out_row, ok, e, tn, N, W, M, S, BM
    )
