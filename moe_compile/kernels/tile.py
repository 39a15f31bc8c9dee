"""One output tile of one expert: the inner loop that the sorted and the unsorted GEMMs share.

Shape legend: see ``spec.py``. A tile has BM rows (token-expert pairs) and BN output columns; it reads
WN rows of weights per step of the reduction: BN, or 2*BN when gate and up rows alternate, or BN from
each of two places. With ``SWAP`` the weights are the left, 64-row operand of the tensor core and the
few rows are its narrow side: Hopper's wgmma multiplies 64 rows at least, but 8 columns are enough.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activation import NO_EPILOGUE, Epilogue, activate
from .config import Tiles
from .operand import ABSENT, Address, Operand, expert_base


class Weights(NamedTuple):
    """Run-time argument: where the weights and biases of one GEMM are."""

    w: Address
    up: Address
    b: Address
    b_up: Address


class Meaning(NamedTuple):
    """Compile-time argument: what one GEMM computes. It starts with the fields of ``Function``, flat because
    Triton 3.6 cannot pass a named tuple inside another on to a function. The elements (``w``, ``up``, ``b``,
    ``b_up``) are set for separate weights only.
    """

    name: str
    alpha: float
    gate_limit: float | None
    up_limit: float | None
    act_limit: float | None
    up_offset: float
    gated: bool
    layout: str
    turned: bool  # weights are dense along their output dimension, not along their input dimension
    w: Any
    w_aligned: bool
    up: Any
    up_aligned: bool
    b: Any
    b_up: Any


class Shape(NamedTuple):
    """Compile-time argument: how a GEMM is cut into tiles."""

    bn: int
    bk: int
    swap: bool
    even_n: bool  # no partial tile along the columns
    even_d: bool  # no partial step along the depth
    vector_n: bool  # the columns are a multiple of 16
    evict: str
    scale_rows: int  # rows of an fp8 weight that share a scale (``scaled``)


class Projection:
    """The launch arguments of ``act(x @ w.T + b, x @ up.T + b_up)`` for all experts.

    Args:
        w: the only weight, or gate, or fused gate and up, ``[E, rows, depth]``.
        columns: output columns per expert.
        up: the up weight of a ``separate`` layout.
        scale: float32 ``[E, blocks of rows, blocks of the depth]``, the scales of an fp8 weight (``scaled``), or
            ``[E, rows, 1]``, one per output channel.
        up_scale: the same for ``up``.
    """

    __slots__ = ("b", "b_up", "columns", "depth", "epilogue", "scale", "up", "up_scale", "w", "weights")

    def __init__(
        self,
        w: Operand,
        columns: int,
        epilogue: Epilogue = NO_EPILOGUE,
        up: Operand | None = None,
        b: Operand | None = None,
        b_up: Operand | None = None,
        scale: Tensor | None = None,
        up_scale: Tensor | None = None,
    ) -> None:
        self.w, self.up, self.b, self.b_up = w, up, b, b_up
        self.scale, self.up_scale = scale, up_scale
        self.columns, self.epilogue = columns, epilogue
        self.depth: int = w.first.shape[-1]
        roles = (w, up, b, b_up)
        self.weights = Weights(*(ABSENT if role is None else role.address() for role in roles))

    @property
    def meaning(self) -> Meaning:
        """The compile-time meaning."""
        epilogue, (w_aligned, up_aligned) = self.epilogue, self.aligned
        roles = (self.w, self.up, self.b, self.b_up)
        w, up, b, b_up = (None if role is None else role.element() for role in roles)
        function, turned = epilogue.function, self.w.turned
        return Meaning(*function, epilogue.layout, turned, w, w_aligned, up, up_aligned, b, b_up)

    @property
    def aligned(self) -> tuple[bool, bool]:
        """Whether separate gate and up weights all start on full vectors, which the compiler is told."""
        return self.w.aligned, self.up is not None and self.up.aligned

    @property
    def apart(self) -> bool:
        """Whether a tile of gate and up takes two products, as no descriptor holds both (``tma``)."""
        layout = self.epilogue.layout
        return layout == "separate" or (layout == "concat" and self.w.turned)

    def columns_of(self, tiles: Tiles) -> int:
        """Output columns of one tile: ``wn`` counts gate and up rows together."""
        return tiles.wn // 2 if self.epilogue.gated else tiles.wn

    def shape(self, tiles: Tiles) -> Shape:
        """The compile-time shape under ``tiles``."""
        bn = self.columns_of(tiles)
        return Shape(
            bn,
            tiles.bk,
            tiles.swap,
            self.columns % bn == 0,
            self.depth % tiles.bk == 0,
            self.columns % 16 == 0,
            tiles.evict,
            self.scale_rows,
        )

    @property
    def scale_rows(self) -> int:
        """Rows of a weight that share a scale: 128 in blocks, or 1; a matrix of one row is a block."""
        rows = self.w.first.shape[-2]
        return 1 if self.scale is not None and self.scale.shape[1] == rows > 1 else 128

    @property
    def describable(self) -> bool:
        """Whether ``tma.describe`` can describe the weights."""
        w, up = self.w, self.up
        if not (w.describable and (up is None or (up.describable and up.turned == w.turned))):
            return False
        # gate and up rows of all experts count as one dimension
        expert, out, _ = w.first.stride()
        return self.epilogue.layout != "concat" or w.turned or expert == 2 * self.columns * out


@triton.jit
def dot(a, w, acc, SWAP: tl.constexpr):
    if SWAP:
        return tl.dot(w, tl.trans(a), acc, input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _add_step(a, w, acc, lost, SWAP: tl.constexpr):
    """``dot(a, w, acc)`` for fp32, which runs on the CUDA cores: the sum, and what its rounding lost.

    There one dot is one chain of multiply-adds, so a sum carried through every step would be a chain over the
    whole depth, whose error grows with the root of it. Here each step is a chain of its own. It starts from
    what the last addition lost, so the error is that of one step, whatever the depth.
    """
    part = dot(a, w, lost, SWAP)
    total = acc + part
    # an infinite sum has lost nothing: inf - inf would turn it into NaN
    return total, tl.where(tl.abs(total) < float("inf"), part - (total - acc), 0.0)


@triton.jit
def over_rows(v, SWAP: tl.constexpr):
    """A vector over the rows of a tile, shaped to broadcast over its accumulator."""
    if SWAP:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def _add_bias(acc, bias, n, limit, stride, SWAP: tl.constexpr):
    v = tl.load(bias + n * stride, mask=n < limit, other=0.0).to(tl.float32)
    if SWAP:
        return acc + v[:, None]
    else:
        return acc + v[None, :]


@triton.jit
def rows_of_weight(n, limit, EVEN: tl.constexpr, VECTOR: tl.constexpr):
    """Row numbers of a weight tile; those past the end read row 0, which costs no mask in the loop."""
    if not EVEN:
        n = tl.where(n < limit, n, 0)
        if VECTOR:
            # the limit is a multiple of 16, so chunks of 16 are wholly inside or wholly replaced
            n = tl.max_contiguous(tl.multiple_of(n, 16), 16)
    return n.to(tl.int64)


@triton.jit
def tile_values(
    acc,  # [BM, WN] fp32, swapped [WN, BM]
    acc_up,  # the same for up rows of their own, else None
    scales,  # None, or one weight per pair, applied to the input
    pair,  # [BM] position in scales
    ok,  # [BM]
    e,  # expert
    tn,  # tile number along N
    N,
    W,  # Weights
    M: tl.constexpr,  # Meaning
    S: tl.constexpr,  # Shape
    BM: tl.constexpr,
    EXACT: tl.constexpr,
):
    """``act(acc * scale + b[e], acc_up * scale + b_up[e])``, ``[BM, BN]``, swapped ``[BN, BM]``."""
    WIDE: tl.constexpr = M.layout == "interleaved"
    WN: tl.constexpr = 2 * S.bn if WIDE else S.bn
    n_in = tn * WN + tl.arange(0, WN)
    limit = N * 2 if WIDE else N
    if scales is not None:
        # a weight on the input commutes with the product, which keeps it out of the loop
        scale = over_rows(tl.load(scales + pair, mask=ok, other=0.0).to(tl.float32), S.swap)
        acc *= scale
        if acc_up is not None:
            acc_up *= scale
    if W.b.ptr is not None:
        bias = expert_base(W.b, e, M.b, False)
        acc = _add_bias(acc, bias, n_in, limit, W.b.out, S.swap)
        if M.layout == "concat":
            acc_up = _add_bias(acc_up, bias + N * W.b.out, n_in, limit, W.b.out, S.swap)
    if W.b_up.ptr is not None:
        acc_up = _add_bias(acc_up, expert_base(W.b_up, e, M.b_up, False), n_in, limit, W.b_up.out, S.swap)
    if WIDE:
        if S.swap:
            acc, acc_up = tl.split(tl.permute(tl.reshape(acc, (S.bn, 2, BM)), (0, 2, 1)))
        else:
            acc, acc_up = tl.split(tl.reshape(acc, (BM, S.bn, 2)))
    return activate(acc, acc if acc_up is None else acc_up, M, EXACT)


@triton.jit
def finish_tile(
    acc, acc_up, scales, pair, out, out_row, ok, e, tn, N, W, M: tl.constexpr, S: tl.constexpr, BM: tl.constexpr
):
    """``out[out_row, tile]`` = ``tile_values`` for the rows that are ok; ``out_row [BM]`` int64."""
    EXACT: tl.constexpr = out.dtype.element_ty == tl.float32
    y = tile_values(acc, acc_up, scales, pair, ok, e, tn, N, W, M, S, BM, EXACT).to(out.dtype.element_ty)
    if S.swap:
        y = tl.trans(y)
    c = tn * S.bn + tl.arange(0, S.bn)
    tl.store(out + out_row[:, None] * N + c[None, :], y, mask=ok[:, None] & (c < N)[None, :])


@triton.jit
def expert_tile(
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
    W,  # Weights
    M: tl.constexpr,  # Meaning
    S: tl.constexpr,  # Shape
    BM: tl.constexpr,
):
    """``out[out_row, tile] = act((x[x_row] * scale) @ w[e].T + b[e], ...)`` for the rows that are ok."""
    TWO: tl.constexpr = M.layout == "concat" or M.layout == "separate"
    WIDE: tl.constexpr = M.layout == "interleaved"
    WN: tl.constexpr = 2 * S.bn if WIDE else S.bn
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    k = tl.arange(0, S.bk)
    n_in = tn * WN + tl.arange(0, WN)
    limit = N * 2 if WIDE else N
    n = rows_of_weight(n_in, limit, S.even_n, S.vector_n)
    wp = expert_base(W.w, e, M.w, M.w_aligned) + n[:, None] * W.w.out + k[None, :] * W.w.inp  # [WN, BK]
    xp = x + x_row[:, None] * x_stride + k[None, :]  # [BM, BK]
    acc = tl.zeros((WN, BM) if S.swap else (BM, WN), tl.float32)
    if EXACT:
        lost = tl.zeros((WN, BM) if S.swap else (BM, WN), tl.float32)
    if TWO:
        acc_up = tl.zeros((WN, BM) if S.swap else (BM, WN), tl.float32)
        if EXACT:
            lost_up = tl.zeros((WN, BM) if S.swap else (BM, WN), tl.float32)
        if M.layout == "concat":
            up = wp + tl.cast(N, tl.int64) * W.w.out
            up_step = S.bk * W.w.inp
        else:
            up = expert_base(W.up, e, M.up, M.up_aligned) + n[:, None] * W.up.out + k[None, :] * W.up.inp
            up_step = S.bk * W.up.inp
    for d in range(0, D, S.bk):
        if S.even_d:
            a = tl.load(xp)
            wt = tl.load(wp, eviction_policy=S.evict)
        else:
            a = tl.load(xp, mask=(k < D - d)[None, :], other=0.0)
            wt = tl.load(wp, mask=(k < D - d)[None, :], other=0.0, eviction_policy=S.evict)
        if EXACT:
            acc, lost = _add_step(a, wt, acc, lost, S.swap)
        else:
            acc = dot(a, wt, acc, S.swap)
        if TWO:
            if S.even_d:
                ut = tl.load(up, eviction_policy=S.evict)
            else:
                ut = tl.load(up, mask=(k < D - d)[None, :], other=0.0, eviction_policy=S.evict)
            if EXACT:
                acc_up, lost_up = _add_step(a, ut, acc_up, lost_up, S.swap)
            else:
                acc_up = dot(a, ut, acc_up, S.swap)
            up += up_step
        xp += S.bk
        wp += S.bk * W.w.inp
    finish_tile(
        acc, acc_up if TWO else None, scales, pair, out, out_row, ok, e, tn, N, W, M, S, BM
    )
