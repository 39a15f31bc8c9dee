"""A few tokens and fp8 weights with block scales: two launches as in ``gemv.py``, by groups of the depth.

A tile of weights is ``[8, groups, columns, 16]``: a thread holds 16 weights of a column, all of one scale, sums their
products in its registers and scales the sum, so that registers are free for loads. Columns come after the depth, so
that threads lie side by side along it. All columns of a program lie in one block, hence ``MAX_COLUMNS`` divides their
number. The vector is rounded to fp8 here if at all: it is short.

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
from .scaled import GROUP, GROUP_, LARGEST_, PLAIN_ROWS, SMALLEST_, groups, scales_of
from .tile import Projection

MAX_COLUMNS = 8
VECTOR: tl.constexpr = tl.constexpr(16)  # fp8 weights in 16 bytes
VECTORS: tl.constexpr = tl.constexpr(GROUP // 16)  # of a group


@triton.jit
def _depth(g):
    """The depth ``[8, groups, 16]`` of groups ``g``."""
    c, v = tl.arange(0, VECTORS), tl.arange(0, VECTOR)
    return g[None, :, None] * GROUP_ + c[:, None, None] * VECTOR + v[None, None, :]


@triton.jit
def _rounded(a, QUANT: tl.constexpr):
    """``a [8, groups, 16]`` in fp32: its e4m3 values if ``QUANT`` and the scales ``[groups]`` that belong to them.

    ``q`` is ``a / scale`` as IEEE says, from one reciprocal per group and one correction (P. Markstein, IBM Journal of
    Research and Development 34, 1990): rows in bfloat16 lie on ties of fp8 often enough for the last bit to matter.
    """
    if QUANT:
        scale = tl.div_rn(tl.maximum(tl.max(tl.max(tl.abs(a), 2), 0), SMALLEST_), LARGEST_)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[None, :, None]
        q = a * inverse
        q = tl.fma(tl.fma(-q, tl.broadcast_to(scale[None, :, None], q.shape), a), tl.broadcast_to(inverse, q.shape), q)
        return q.to(tl.float8e4nv).to(tl.float32), scale
    else:
        return a, 1.0


@triton.jit
def _weights_times(w, a, scale):
    """``w [8, groups, columns, 16]`` times ``a [8, groups, 16]`` times ``scale [groups]``: ``[8, groups, columns]``."""
    return tl.sum(w.to(tl.float32) * a[:, :, None, :], 3) * scale[None, :, None]


@triton.jit
def _biases(W, e, n, here, N, M: tl.constexpr):
    """Those of columns ``n`` of expert ``e``, of the gate and of the up rows: ``[BN]`` each."""
    WIDE: tl.constexpr = 2 if M.layout == "interleaved" else 1
    gate = tl.zeros_like(n).to(tl.float32)
    value = gate
    if W.b.ptr is not None:
        bias = expert_base(W.b, e, M.b, False) + n * WIDE * W.b.out
        gate = tl.load(bias, mask=here, other=0.0).to(tl.float32)
        if M.layout == "interleaved":
            value = tl.load(bias + W.b.out, mask=here, other=0.0).to(tl.float32)
        elif M.layout == "concat":
            value = tl.load(bias + N * W.b.out, mask=here, other=0.0).to(tl.float32)
    if W.b_up.ptr is not None:
        bias = expert_base(W.b_up, e, M.b_up, False) + n * W.b_up.out
        value = tl.load(bias, mask=here, other=0.0).to(tl.float32)
    return gate, value


@triton.jit
def _weighted_biases(W, ids, weights, first, n, N, E, K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr):
    """The sum over a token's experts for columns ``n``: ``[BN]``."""
    y = tl.zeros_like(n).to(tl.float32)
    if W.b.ptr is not None:
        s = tl.arange(0, KP)
        e = tl.load(ids + first + s, mask=s < K, other=-1).to(tl.int32)
        valid = (e >= 0) & (e < E)
        weight = valid.to(tl.float32)
        if weights is not None:
            weight = tl.load(weights + first + s, mask=valid, other=0.0).to(tl.float32)
        bias = expert_base(W.b, tl.where(valid, e, 0), M.b, False)[:, None] + n[None, :] * W.b.out
        b = tl.load(bias, mask=valid[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        y = tl.sum(b * weight[:, None], 0)
    return y


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
        here = n < N
        gate_bias, value_bias = _biases(W, e, n, here, N, M)
        row = tl.where(here, n, 0).to(tl.int64) * WIDE
        g = tl.arange(0, BG)
        k = _depth(g)
        wp = expert_base(W.w, e, M.w, M.w_aligned) + (row * W.w.out)[None, None, :, None] + k[:, :, None, :]
        block = Q.w + e.to(tl.int64) * Q.expert
        sp = block + (first * WIDE // GROUP_).to(tl.int64) * Q.row
        up, tp = wp + W.w.out, sp  # "interleaved"
        if M.layout == "concat":
            up = wp + tl.cast(N, tl.int64) * W.w.out
            tp = block + ((first + N) // GROUP_).to(tl.int64) * Q.row
        elif M.layout == "separate":
            up = expert_base(W.up, e, M.up, M.up_aligned) + (row * W.up.out)[None, None, :, None] + k[:, :, None, :]
            tp = Q.up + e.to(tl.int64) * Q.expert + (first // GROUP_).to(tl.int64) * Q.row
        xp = x + (pair // K).to(tl.int64) * x_stride + k
        gate = tl.zeros((VECTORS, BG, BN), tl.float32)
        value = tl.zeros((VECTORS, BG, BN), tl.float32)
        for d in range(0, tl.cdiv(D, GROUP_), BG):
            inside = k < D - d * GROUP_
            some = g * GROUP_ < D - d * GROUP_
            at = (d + g) * Q.inp
            w = tl.load(wp + d * GROUP_, mask=inside[:, :, None, :], other=0.0, eviction_policy="evict_first")
            a = tl.load(xp + d * GROUP_, mask=inside, other=0.0).to(tl.float32)
            a, s = _rounded(a, QUANT)
            if M.layout != "single":
                u = tl.load(up + d * GROUP_, mask=inside[:, :, None, :], other=0.0, eviction_policy="evict_first")
                value += _weights_times(u, a, tl.load(tp + at, mask=some, other=0.0) * s)
            gate += _weights_times(w, a, tl.load(sp + at, mask=some, other=0.0) * s)
        gate = tl.sum(tl.sum(gate, 1), 0)
        value = tl.sum(tl.sum(value, 1), 0)
        if factors is not None:
            factor = tl.load(factors + pair).to(tl.float32)
            gate *= factor
            value *= factor
        y = activate(gate + gate_bias, value + value_bias, M, out.dtype.element_ty == tl.float32)
        tl.store(out + pair.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=here)


@triton.jit
def _down_step(
    rows, ids, weights, first, f, row, sp, D, E, Q, W,
    K: tl.constexpr, M: tl.constexpr, QUANT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of the groups ``f`` of a token's experts, all in one row: ``[8, groups, BN]``."""
    per = tl.cdiv(D, GROUP_)
    slot, g = f // per, f % per
    e = tl.load(ids + first + slot, mask=slot < K, other=-1).to(tl.int32)
    valid = (e >= 0) & (e < E)
    weight = valid.to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + first + slot, mask=valid, other=0.0).to(tl.float32)
    e = tl.where(valid, e, 0)
    k = _depth(g)
    inside = valid[None, :, None] & (k < D)
    base = expert_base(W.w, e, M.w, M.w_aligned)
    wp = base[None, :, None, None] + (row * W.w.out)[None, None, :, None] + k[:, :, None, :]
    scale = tl.load(sp + e.to(tl.int64) * Q.expert + g * Q.inp, mask=valid, other=0.0)
    w = tl.load(wp, mask=inside[:, :, None, :], other=0.0, eviction_policy="evict_first")
    follow(PDL)
    a = tl.load(rows + (first + slot)[None, :, None] * D + k, mask=inside, other=0.0).to(tl.float32)
    a, s = _rounded(a, QUANT)
    return _weights_times(w, a, scale * weight * s)


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
    KP: tl.constexpr,
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
    y = _weighted_biases(W, ids, weights, first, n, N, E, K, KP, M)
    f = tl.arange(0, BG)
    acc = _down_step(rows, ids, weights, first, f, row, sp, D, E, Q, W, K, M, QUANT, PDL)
    for at in range(BG, K * tl.cdiv(D, GROUP_), BG):
        acc += _down_step(rows, ids, weights, first, at + f, row, sp, D, E, Q, W, K, M, QUANT, False)
    y += tl.sum(tl.sum(acc, 1), 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


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
        bn, bg = MAX_COLUMNS // 2, min(power_of_two(groups(d)), 8)
        constants = {"K": top_k, "M": projection.meaning, "BN": bn, "BG": bg, "QUANT": quantise}
        grid = (triton.cdiv(n, bn), pairs)
        return Launch(scaled_gemv_up_kernel, grid, {**constants, "num_warps": 2, **dependent(x)})

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
        bn, bg = MAX_COLUMNS, min(power_of_two(top_k * groups(d)), 16)
        constants = {"K": top_k, "KP": power_of_two(top_k), "M": projection.meaning, "BN": bn, "BG": bg}
        options = {"QUANT": quantise, "num_warps": 4, **dependent(rows)}
        return Launch(scaled_gemv_down_kernel, (triton.cdiv(n, bn), tokens), {**constants, **options})

    q = scales_of(projection, PLAIN_ROWS)
    start(launch, rows, ids, weights, out, experts, n, d, q, projection.weights)
    return out
