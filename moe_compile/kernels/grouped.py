"""Grouped GEMM over pairs in expert order, with gather, bias and activation fused.

One program computes one tile; which expert and which rows come from the tile table that the sort wrote
(MegaBlocks, https://arxiv.org/abs/2211.15841, builds its block-sparse topology likewise), so the grid is an
upper bound known on the host and late programs return at once. Tiles run in groups of a few row tiles
times all columns, so that weights and rows are found in L2 (Triton's matrix multiplication tutorial).

Shape legend: see ``spec.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate_twin
from .config import Tiles
from .launch import PLAIN, Launch, Start, dependent, follow, once
from .permute import permute
from .scaled import PLAIN_ROWS, Quant, scaled_tile, scales_of
from .sort import Sorted, tile_table
from .tile import Projection, expert_tile
from .tma import describe, describe_rows, described_tile, shared_tile, tile_rows


@triton.jit
def _rows(
    x, x_stride, xd, order, scales, out, first, length, e, tn, N, D, wd, ud, Q, W,
    K: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM rows of one expert from sorted row ``first`` on, ``length`` of them real."""
    ok, s, pair, x_row = tile_rows(order, first, 0, length, K, BM)
    if Q.w is not None:
        scaled_tile(x, x_stride, x_row, scales, pair, out, s, ok, e, tn, N, D, Q, W, M, S, BM)
    elif wd is None:
        expert_tile(x, x_stride, x_row, scales, pair, out, s, ok, e, tn, N, D, W, M, S, BM)
    else:
        described_tile(
            x, x_stride, x_row, xd, first, scales, pair, out, s, ok, e, tn, N, D, wd, ud, W, M, S, BM
        )


@triton.jit
def _ladder(
    x, x_stride, order, scales, out, first, length, e, tn, N, D, wd, ud, Q, W,
    K: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The lowest tile that holds ``length`` rows, up to 5/4 of BM."""
    if length > BM:
        shared_tile(x, x_stride, order, scales, out, first, length, e, tn, N, D, wd, ud, W, K, M, S, BM, BM // 4)
    elif length > BM // 4 * 3:
        _rows(x, x_stride, None, order, scales, out, first, length, e, tn, N, D, wd, ud, Q, W, K, M, S, BM)
    elif length > BM // 2:
        shared_tile(
            x, x_stride, order, scales, out, first, length, e, tn, N, D, wd, ud, W, K, M, S, BM // 2, BM // 4
        )
    elif length > BM // 4:
        _rows(x, x_stride, None, order, scales, out, first, length, e, tn, N, D, wd, ud, Q, W, K, M, S, BM // 2)
    else:
        _rows(x, x_stride, None, order, scales, out, first, length, e, tn, N, D, wd, ud, Q, W, K, M, S, BM // 4)


@triton.jit
def _tile(
    t, n_tiles, x, x_stride, xd, xh, order, scales, offsets, tiles, out, capacity, N, D, wd, ud, Q, W,
    K: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Tile number ``t`` of ``n_tiles`` row tiles times all columns."""
    sweep = GROUP * tl.cdiv(N, S.bn)
    inside = t % sweep
    first = t // sweep * GROUP
    rows_of_sweep = tl.minimum(n_tiles - first, GROUP)
    tile = first + inside % rows_of_sweep
    tn = inside // rows_of_sweep
    e = tl.load(tiles + 1 + tile)
    r = tl.load(tiles + 1 + capacity + tile)
    n = tl.load(offsets + e + 1) - r
    # the last tile of an expert is often short: computing fewer rows costs only code size
    if REST > 0:
        n = tl.where(n > BM + REST, BM, n)
        _ladder(x, x_stride, order, scales, out, r, n, e, tn, N, D, wd, ud, Q, W, K, M, S, BM)
    elif TAIL == 0 or n > BM // 2:
        _rows(x, x_stride, xd, order, scales, out, r, n, e, tn, N, D, wd, ud, Q, W, K, M, S, BM)
    elif TAIL == 1 or n > BM // 4:
        _rows(x, x_stride, xh, order, scales, out, r, n, e, tn, N, D, wd, ud, Q, W, K, M, S, BM // 2)
    else:
        _rows(x, x_stride, None, order, scales, out, r, n, e, tn, N, D, wd, ud, Q, W, K, M, S, BM // 4)


@triton.jit(do_not_specialize=["P", "E", "capacity"])
def grouped_kernel(
    x,
    x_stride,
    xd,
    xh,
    order,
    scales,
    offsets,
    tiles,
    out,
    P,
    E,
    capacity,
    N,
    D,
    wd,
    ud,
    Q,
    W,
    K: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    REST: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ZERO_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """``order`` given: row ``order[s] // K`` of x; else row s of x. Writes ``out[s, :]``.

    ``xd`` and ``xh`` (of half the height), ``wd`` and ``ud`` are descriptors of x and of the weights, or None (see
    ``tma``); ``Q`` has the scales of fp8. With PROGRAMS every program takes its share of the tiles and loads
    the first steps of a tile while it ends the last.
    """
    columns = tl.cdiv(N, S.bn)
    t = tl.program_id(0)
    follow(PDL)
    n_tiles = tl.load(tiles)
    if PROGRAMS > 0:
        for u in tl.range(t, n_tiles * columns, PROGRAMS, flatten=True):
            _tile(
                u, n_tiles, x, x_stride, xd, xh, order, scales, offsets, tiles, out, capacity, N, D, wd, ud, Q, W,
                K, M, S, BM, TAIL, GROUP, REST,
            )  # fmt: skip
    elif t < n_tiles * columns:
        _tile(
            t, n_tiles, x, x_stride, xd, xh, order, scales, offsets, tiles, out, capacity, N, D, wd, ud, Q, W,
            K, M, S, BM, TAIL, GROUP, REST,
        )  # fmt: skip
    elif ZERO_REST:
        BN: tl.constexpr = S.bn
        rest = t - n_tiles * columns
        s = tl.load(offsets + E) + rest // columns * BM + tl.arange(0, BM)
        c = rest % columns * BN + tl.arange(0, BN)
        at = out + s.to(tl.int64)[:, None] * N + c[None, :]
        zero = tl.zeros((BM, BN), out.dtype.element_ty)
        tl.store(at, zero, mask=(s < P)[:, None] & (c < N)[None, :])


def _launch(
    x: Tensor,
    order: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor,
    tiles: Tensor,
    capacity: int,
    pairs: int,
    top_k: int,
    projection: Projection,
    plan: Tiles,
    zero_rest: bool,
    start: Start,
    quant: Quant = PLAIN_ROWS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out = start.empty(x, pairs, projection.columns, dtype=dtype)  # [P, N]
    if pairs == 0:
        return out

    def launch() -> Launch:
        shape = projection.shape(plan)
        # zeroing the rest can need one row tile more than the table holds
        programs = (capacity + zero_rest) * -(-projection.columns // shape.bn)
        # ptxas puts two products of a flattened loop one after the other (C7515): slower than no shared programs
        shared = 0 if projection.apart else plan.programs
        constants = {
            "K": top_k,
            "M": projection.meaning,
            "S": shape,
            "BM": plan.bm,
            "TAIL": plan.tail,
            "GROUP": plan.group,
            "REST": plan.rest,
            "PROGRAMS": shared,
            "ZERO_REST": zero_rest,
        }
        options = {**plan.options, **(dependent(x) if plan.chained else PLAIN)}
        return Launch(grouped_kernel, (min(programs, shared or programs),), {**constants, **options})

    weight, up = describe(projection, plan) if plan.tma else (None, None)
    rows = describe_rows(x, plan.bm, plan.bk) if plan.rows_tma else None
    half = describe_rows(x, plan.bm // 2, plan.bk) if plan.rows_tma and plan.tail else None
    experts, n, d = offsets.shape[0] - 1, projection.columns, projection.depth
    start(
        launch, x, x.stride(0), rows, half, order, scales, offsets, tiles, out, pairs, experts, capacity, n, d, weight,
        up, scales_of(projection, quant), projection.weights,
    )  # fmt: skip
    return out


def gather_projection(
    x: Tensor,
    pairs: Sorted,
    top_k: int,
    projection: Projection,
    plan: Tiles,
    scales: Tensor | None = None,
    start: Start = once,
    quant: Quant = PLAIN_ROWS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """GEMM 1: tokens ``x [T, D]`` -> ``[P, N]`` in sorted order; rows past the valid ones stay unwritten.

    With ``plan.rows_tma`` the rows of x are first put in that order (``permute``).

    Args:
        scales: ``[T, K]`` router weights, if they belong on the input.
        dtype: of the result; default that of x.
    """
    n = pairs.order.shape[0]
    if plan.rows_tma:
        x = permute(x, pairs.inverse, pairs.offsets, top_k, start)
    return _launch(
        x, pairs.order, scales, pairs.offsets, pairs.tiles, pairs.capacity, n, top_k, projection, plan, False, start,
        quant, dtype,
    )  # fmt: skip


def sorted_projection(
    rows: Tensor,
    pairs: Sorted,
    projection: Projection,
    plan: Tiles,
    start: Start = once,
    quant: Quant = PLAIN_ROWS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """GEMM 2: ``rows [P, D]`` in sorted order -> ``[P, N]``; rows past the valid ones stay unwritten."""
    n = rows.shape[0]
    return _launch(
        rows, None, None, pairs.offsets, pairs.tiles, pairs.capacity, n, 1, projection, plan, False, start, quant, dtype
    )


def grouped_linear(rows: Tensor, offsets: Tensor, projection: Projection, plan: Tiles) -> Tensor:
    """``rows [P, D]`` under any ``offsets [E + 1]`` -> ``[P, N]``; rows from ``offsets[E]`` on are zero."""
    # the rows may start anywhere, and late programs write the zeros
    plan = replace(plan, rows_tma=False, programs=0)
    tiles, capacity = tile_table(offsets, rows.shape[0], plan.bm, plan.rest)
    return _launch(rows, None, None, offsets, tiles, capacity, rows.shape[0], 1, projection, plan, True, once)


def projection_twin(rows: Tensor, expert: Tensor, projection: Projection, scales: Tensor | None) -> Tensor:
    """Torch twin of every GEMM here and in ``decode``: row i through expert ``expert[i]``, in fp32.

    Rows whose expert is out of range come back zero, where the kernels leave them unwritten.
    """
    out = torch.zeros(rows.shape[0], projection.columns, device=rows.device)  # [rows, N]
    n, layout = projection.columns, projection.epilogue.layout
    for e in range(int(expert.max()) + 1 if expert.numel() else 0):
        at = torch.where(expert == e)[0]
        if at.numel() == 0:
            continue
        a = rows[at].float()
        if scales is not None:
            a = a * scales[at, None].float()
        y = a @ projection.w.expert(e).float().t()
        if projection.b is not None:
            y = y + projection.b.expert(e).float()
        up: Tensor | None = None
        if layout == "separate":
            assert projection.up is not None
            up = a @ projection.up.expert(e).float().t()
            if projection.b_up is not None:
                up = up + projection.b_up.expert(e).float()
        elif layout == "interleaved":
            y, up = y[:, 0::2], y[:, 1::2]
        elif layout == "concat":
            y, up = y[:, :n], y[:, n:]
        out[at] = activate_twin(y, up, projection.epilogue)
    return out.to(rows.dtype)
