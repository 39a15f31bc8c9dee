"""One or two tokens and fp8 weights with block scales: ``gemv.py`` with the depth cut into groups of one scale.

A tile of weights is ``[columns, groups, 128]``, so that a scale is read once per group. All columns of a program lie in
one block, hence ``MAX_COLUMNS`` divides their number. The vector is rounded to fp8 here if at all: it is short.

Shape legend: see ``spec.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .config import power_of_two
from .launch import Launch, Start, dependent, follow, once
from .operand import expert_base
from .scaled import GROUP, GROUP_, PLAIN_ROWS, groups, scales_of, to_fp8
from .tile import Projection

MAX_COLUMNS = 8
WEIGHTS = 8192  # of one step of a program


@triton.jit
def _rounded(a, QUANT: tl.constexpr):
    """``a [groups, 128]`` in fp32, as fp8 holds it if ``QUANT``."""
    if QUANT:
        q, scale = to_fp8(a, 1, False)
        return q.to(tl.float32) * scale[:, None]
    else:
        return a


@triton.jit
def _weights_times(wp, inside, a, scale):
    """Products of a tile of weights with ``a [groups, 128]``, scaled: ``[columns, groups, 128]``."""
    w = tl.load(wp, mask=inside[None, :, :], other=0.0, eviction_policy="evict_first")
    return w.to(tl.float32) * (a * scale[:, None])[None, :, :]


@triton.jit(do_not_specialize=["E"])
def scaled_gemv_up_kernel(
    x,
    x_stride,
    ids,
    factors,  # None, or one weight per pair, applied to the input
    out,
    E,
    N,
    D,
    Q,  # Scales
    W,  # Weights
    K: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN columns of one pair: ``out[pair, :]``; nothing is written for a pair without an expert."""
    WIDE: tl.constexpr = 2 if M.layout == "interleaved" else 1
    first = tl.program_id(0) * BN
    pair = tl.program_id(1)
    follow(PDL)
    e = tl.load(ids + pair).to(tl.int32)
    if (e >= 0) & (e < E):
        n = first + tl.arange(0, BN)
        row = tl.where(n < N, n, 0).to(tl.int64) * WIDE
        g = tl.arange(0, BG)
        k = g[:, None] * GROUP_ + tl.arange(0, GROUP_)[None, :]  # [BG, 128]
        wp = expert_base(W.w, e, M.w, M.w_aligned) + (row * W.w.out)[:, None, None] + k[None, :, :]
        block = Q.w + e.to(tl.int64) * Q.expert
        sp = block + (first * WIDE // GROUP_).to(tl.int64) * Q.row
        up, tp = wp + W.w.out, sp  # "interleaved"
        if M.layout == "concat":
            up = wp + tl.cast(N, tl.int64) * W.w.out
            tp = block + ((first + N) // GROUP_).to(tl.int64) * Q.row
        elif M.layout == "separate":
            up = expert_base(W.up, e, M.up, M.up_aligned) + (row * W.up.out)[:, None, None] + k[None, :, :]
            tp = Q.up + e.to(tl.int64) * Q.expert + (first // GROUP_).to(tl.int64) * Q.row
        xp = x + (pair // K).to(tl.int64) * x_stride + k
        gate = tl.zeros((BN, BG, GROUP_), tl.float32)
        value = tl.zeros((BN, BG, GROUP_), tl.float32)
        for d in range(0, tl.cdiv(D, GROUP_), BG):
            inside = k < D - d * GROUP_
            some = g * GROUP_ < D - d * GROUP_
            a = tl.load(xp + d * GROUP_, mask=inside, other=0.0).to(tl.float32)
            a = _rounded(a, QUANT)
            at = (d + g) * Q.inp
            gate += _weights_times(wp + d * GROUP_, inside, a, tl.load(sp + at, mask=some, other=0.0))
            if M.layout != "single":
                value += _weights_times(up + d * GROUP_, inside, a, tl.load(tp + at, mask=some, other=0.0))
        gate = tl.sum(tl.sum(gate, 2), 1)
        value = tl.sum(tl.sum(value, 2), 1)
        if factors is not None:
            factor = tl.load(factors + pair).to(tl.float32)
            gate *= factor
            value *= factor
        here = n < N
        if W.b.ptr is not None:
            bias = expert_base(W.b, e, M.b, False) + n * WIDE * W.b.out
            gate += tl.load(bias, mask=here, other=0.0).to(tl.float32)
            if M.layout == "interleaved":
                value += tl.load(bias + W.b.out, mask=here, other=0.0).to(tl.float32)
            elif M.layout == "concat":
                value += tl.load(bias + N * W.b.out, mask=here, other=0.0).to(tl.float32)
        if W.b_up.ptr is not None:
            bias = expert_base(W.b_up, e, M.b_up, False) + n * W.b_up.out
            value += tl.load(bias, mask=here, other=0.0).to(tl.float32)
        y = activate(gate, value, M, out.dtype.element_ty == tl.float32)
        tl.store(out + pair.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=here)


@triton.jit
def _down_step(
    rows, ids, weights, first, f, row, sp, D, E, Q, W,
    K: tl.constexpr, M: tl.constexpr, QUANT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of the groups ``f`` of a token's experts, all in one row: ``[BN, groups, 128]``."""
    per = tl.cdiv(D, GROUP_)
    slot, g = f // per, f % per
    c = tl.arange(0, GROUP_)
    e = tl.load(ids + first + slot, mask=slot < K, other=-1).to(tl.int32)
    valid = (e >= 0) & (e < E)
    weight = valid.to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + first + slot, mask=valid, other=0.0).to(tl.float32)
    e = tl.where(valid, e, 0)
    k = g[:, None] * GROUP_ + c[None, :]
    inside = valid[:, None] & (k < D)
    wp = expert_base(W.w, e, M.w, M.w_aligned)[None, :, None] + (row * W.w.out)[:, None, None] + k[None, :, :]
    scale = tl.load(sp + e.to(tl.int64) * Q.expert + g * Q.inp, mask=valid, other=0.0)
    w = tl.load(wp, mask=inside[None, :, :], other=0.0, eviction_policy="evict_first")
    follow(PDL)
    a = tl.load(rows + (first + slot)[:, None] * D + k, mask=inside, other=0.0).to(tl.float32)
    return w.to(tl.float32) * (_rounded(a, QUANT) * (scale * weight)[:, None])[None, :, :]


@triton.jit(do_not_specialize=["E"])
def scaled_gemv_down_kernel(
    rows,
    ids,
    weights,
    out,
    E,
    N,
    D,
    Q,
    W,
    K: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN columns of one token over all its experts: ``out[t, :]``; see ``gemv.gemv_down_kernel``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * K
    row = tl.where(n < N, n, 0).to(tl.int64)
    sp = Q.w + (tl.program_id(0) * BN // GROUP_).to(tl.int64) * Q.row
    f = tl.arange(0, BG)
    acc = _down_step(rows, ids, weights, first, f, row, sp, D, E, Q, W, K, M, QUANT, PDL)
    for at in range(BG, K * tl.cdiv(D, GROUP_), BG):
        acc += _down_step(rows, ids, weights, first, at + f, row, sp, D, E, Q, W, K, M, QUANT, False)
    y = tl.sum(tl.sum(acc, 2), 1)
    if W.b.ptr is not None:
        for k in range(K):
            e = tl.load(ids + first + k).to(tl.int32)
            if (e >= 0) & (e < E):
                weight = 1.0
                if weights is not None:
                    weight = tl.load(weights + first + k).to(tl.float32)
                bias = expert_base(W.b, e, M.b, False) + n * W.b.out
                y += tl.load(bias, mask=n < N, other=0.0).to(tl.float32) * weight
    tl.store(out + tl.program_id(1).to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


def _steps(many: int) -> tuple[int, int]:
    """Columns and groups of one step, out of ``many`` groups."""
    bg = min(power_of_two(many), 8)
    return min(MAX_COLUMNS, max(1, WEIGHTS // (bg * 128))), bg


def scaled_gemv_up(
    x: Tensor,
    ids: Tensor,
    experts: int,
    projection: Projection,
    quantise: bool,
    factors: Tensor | None = None,
    start: Start = once,
) -> Tensor:
    """Tokens ``x [T, D]`` -> ``[P, N]`` in the order of the pairs; twin: ``scaled_experts.scaled_twin``."""
    pairs, top_k = ids.numel(), ids.shape[1]
    out = start.empty(x, pairs, projection.columns)
    if pairs == 0:
        return out
    if projection.scale_rows != GROUP:
        raise ValueError("a scale per output channel has no matrix-vector kernel; take the path decode")
    n, d = projection.columns, projection.depth

    def launch() -> Launch:
        bn, bg = _steps(groups(d))
        bn = max(1, bn // 2) if projection.epilogue.gated else bn
        constants = {"K": top_k, "M": projection.meaning, "BN": bn, "BG": bg, "QUANT": quantise}
        grid = (triton.cdiv(n, bn), pairs)
        return Launch(scaled_gemv_up_kernel, grid, {**constants, "num_warps": 4, **dependent(x)})

    q = scales_of(projection, PLAIN_ROWS)
    start(launch, x, x.stride(0), ids, factors, out, experts, n, d, q, projection.weights)
    return out


def scaled_gemv_down(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    experts: int,
    projection: Projection,
    quantise: bool,
    out_dtype: torch.dtype,
    start: Start = once,
) -> Tensor:
    """Pairs ``rows [P, D]`` -> ``[T, N]``: down projection and weighted sum in one launch."""
    tokens, top_k = ids.shape
    out = start.empty(rows, tokens, projection.columns, dtype=out_dtype)
    if tokens == 0:
        return out
    if projection.scale_rows != GROUP:
        raise ValueError("a scale per output channel has no matrix-vector kernel; take the path decode")
    n, d = projection.columns, projection.depth

    def launch() -> Launch:
        bn, bg = _steps(top_k * groups(d))
        constants = {"K": top_k, "M": projection.meaning, "BN": bn, "BG": bg, "QUANT": quantise}
        grid = (triton.cdiv(n, bn), tokens)
        return Launch(scaled_gemv_down_kernel, grid, {**constants, "num_warps": 4, **dependent(rows)})

    q = scales_of(projection, PLAIN_ROWS)
    start(launch, rows, ids, weights, out, experts, n, d, q, projection.weights)
    return out
