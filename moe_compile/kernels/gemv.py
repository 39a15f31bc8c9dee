"""One or two tokens: matrix-vector products on the CUDA cores, the layer in two launches.

With one row per expert nothing is shared, so the work is to keep enough loads in flight: a program of the
first kernel owns a few columns of one pair; one of the second owns a few columns of a token and walks its
experts in a fixed order, several at once, which needs neither a combine launch nor atomics.

Shape legend: see ``spec.py``. Weights have stride one along their input dimension (``config.choose_path``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .combine import combine_twin
from .config import gemv_down_steps, gemv_up_steps
from .grouped import projection_twin
from .launch import Launch, Start, dependent, follow, once
from .operand import expert_base
from .tile import Projection


@triton.jit(do_not_specialize=["E"])
def gemv_up_kernel(
    x,
    x_stride,
    ids,
    scales,
    out,
    E,
    N,
    D,
    W,
    K: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN columns of one pair: ``out[pair, :]``; nothing is written for a pair without an expert."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    pair = tl.program_id(1)
    follow(PDL)
    e = tl.load(ids + pair).to(tl.int32)
    if (e >= 0) & (e < E):
        k = tl.arange(0, BK)
        row = tl.where(n < N, n, 0).to(tl.int64)
        base = expert_base(W.w, e, M.w, M.w_aligned)
        if M.layout == "interleaved":
            wp = base + (2 * row)[:, None] * W.w.out + k[None, :]
            up = wp + W.w.out
        elif M.layout == "separate":
            wp = base + row[:, None] * W.w.out + k[None, :]
            up = expert_base(W.up, e, M.up, M.up_aligned) + row[:, None] * W.up.out + k[None, :]
        else:
            wp = base + row[:, None] * W.w.out + k[None, :]
            up = wp + tl.cast(N, tl.int64) * W.w.out  # read for "concat" only
        xp = x + (pair // K).to(tl.int64) * x_stride + k
        g = tl.zeros((BN, BK), tl.float32)
        u = tl.zeros((BN, BK), tl.float32)
        for d in range(0, D, BK):
            inside = k < D - d
            if EVEN_D:
                wt = tl.load(wp + d, eviction_policy="evict_first")
                a = tl.load(xp + d)
            else:
                wt = tl.load(wp + d, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                a = tl.load(xp + d, mask=inside, other=0.0)
            if M.layout != "single":
                if EVEN_D:
                    ut = tl.load(up + d, eviction_policy="evict_first")
                else:
                    ut = tl.load(up + d, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
                u += ut.to(tl.float32) * a.to(tl.float32)[None, :]
            g += wt.to(tl.float32) * a.to(tl.float32)[None, :]
        gate = tl.sum(g, 1)
        value = tl.sum(u, 1)
        if scales is not None:
            scale = tl.load(scales + pair).to(tl.float32)
            gate *= scale
            value *= scale
        here = n < N
        if W.b.ptr is not None:
            bias = expert_base(W.b, e, M.b, False)
            first = 2 * n if M.layout == "interleaved" else n
            gate += tl.load(bias + first * W.b.out, mask=here, other=0.0).to(tl.float32)
            if M.layout == "interleaved":
                value += tl.load(bias + (first + 1) * W.b.out, mask=here, other=0.0).to(tl.float32)
            elif M.layout == "concat":
                value += tl.load(bias + (first + N) * W.b.out, mask=here, other=0.0).to(tl.float32)
        if W.b_up.ptr is not None:
            bias = expert_base(W.b_up, e, M.b_up, False)
            value += tl.load(bias + n * W.b_up.out, mask=here, other=0.0).to(tl.float32)
        y = activate(gate, value, M, out.dtype.element_ty == tl.float32)
        tl.store(out + pair.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=here)


@triton.jit
def _down_step(
    rows, ids, weights, first, step, row, D, E, W,
    K: tl.constexpr, M: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, EVEN_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of G experts of one token with BK of the depth: ``[G, BN, BK]``."""
    steps = tl.cdiv(D, BK)
    k = tl.arange(0, BK)
    s = step // steps * G + tl.arange(0, G)
    d = step % steps * BK
    e = tl.load(ids + first + s, mask=s < K, other=-1).to(tl.int32)  # [G]
    valid = (e >= 0) & (e < E)
    weight = valid.to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + first + s, mask=valid, other=0.0).to(tl.float32)
    base = expert_base(W.w, tl.where(valid, e, 0), M.w, M.w_aligned)
    wp = base[:, None, None] + row[None, :, None] * W.w.out + (d + k)[None, None, :]
    ap = rows + (first + s)[:, None] * D + (d + k)[None, :]
    if EVEN_D:
        inside = valid[:, None]
    else:
        inside = valid[:, None] & (k < D - d)[None, :]
    wt = tl.load(wp, mask=inside[:, None, :], other=0.0, eviction_policy="evict_first")
    follow(PDL)
    a = tl.load(ap, mask=inside, other=0.0).to(tl.float32) * weight[:, None]  # [G, BK]
    return wt.to(tl.float32) * a[:, None, :]


@triton.jit(do_not_specialize=["E"])
def gemv_down_kernel(
    rows,
    ids,
    weights,
    out,
    E,
    N,
    D,
    W,
    K: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN columns of one token over all its experts, G of them at once: ``out[t, :]``.

    The ids, their weights and the first step of W2 are asked for before the wait: only ``rows`` come from the kernel
    before this one, and everything older was complete before that one let this one come up.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * K
    row = tl.where(n < N, n, 0).to(tl.int64)
    acc = _down_step(rows, ids, weights, first, 0, row, D, E, W, K, M, G, BK, EVEN_D, PDL)
    for step in range(1, tl.cdiv(K, G) * tl.cdiv(D, BK)):
        acc += _down_step(rows, ids, weights, first, step, row, D, E, W, K, M, G, BK, EVEN_D, False)
    y = tl.sum(tl.sum(acc, 2), 0)
    if W.b.ptr is not None:
        for g in range(0, K, G):
            s = g + tl.arange(0, G)
            e = tl.load(ids + first + s, mask=s < K, other=-1).to(tl.int32)
            valid = (e >= 0) & (e < E)
            weight = valid.to(tl.float32)
            if weights is not None:
                weight = tl.load(weights + first + s, mask=valid, other=0.0).to(tl.float32)
            bias = expert_base(W.b, tl.where(valid, e, 0), M.b, False)[:, None] + n[None, :] * W.b.out
            b = tl.load(bias, mask=valid[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
            y += tl.sum(b * weight[:, None], 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


def gemv_up(
    x: Tensor,
    ids: Tensor,
    experts: int,
    projection: Projection,
    scales: Tensor | None = None,
    start: Start = once,
) -> Tensor:
    """Tokens ``x [T, D]`` -> ``[P, N]`` in the order of the pairs; twin: ``grouped.projection_twin``."""
    pairs, top_k = ids.numel(), ids.shape[1]
    out = start.empty(x, pairs, projection.columns)
    if pairs == 0:
        return out
    n, d = projection.columns, projection.depth

    def launch() -> Launch:
        bn, bk = gemv_up_steps(d, projection.epilogue.gated)
        constants = {"K": top_k, "M": projection.meaning, "BN": bn, "BK": bk, "EVEN_D": d % bk == 0}
        grid = (triton.cdiv(n, bn), pairs)
        return Launch(gemv_up_kernel, grid, {**constants, "num_warps": 4, **dependent(x)})

    start(launch, x, x.stride(0), ids, scales, out, experts, n, d, projection.weights)
    return out


def gemv_down(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    experts: int,
    projection: Projection,
    out_dtype: torch.dtype,
    start: Start = once,
) -> Tensor:
    """Pairs ``rows [P, D]`` -> ``[T, N]``: down projection and weighted sum in one launch."""
    tokens, top_k = ids.shape
    out = start.empty(rows, tokens, projection.columns, dtype=out_dtype)
    if tokens == 0:
        return out
    n, d = projection.columns, projection.depth

    def launch() -> Launch:
        g, bn, bk = gemv_down_steps(d, top_k)
        constants = {"K": top_k, "M": projection.meaning, "G": g, "BN": bn, "BK": bk, "EVEN_D": d % bk == 0}
        grid = (triton.cdiv(n, bn), tokens)
        return Launch(gemv_down_kernel, grid, {**constants, "num_warps": 4, **dependent(rows)})

    start(launch, rows, ids, weights, out, experts, n, d, projection.weights)
    return out


def gemv_down_twin(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    experts: int,
    projection: Projection,
    out_dtype: torch.dtype,
) -> Tensor:
    """Torch twin of ``gemv_down``."""
    expert = ids.reshape(-1)
    valid = (expert >= 0) & (expert < experts)
    y = projection_twin(rows, torch.where(valid, expert, -1), projection, None)
    position = torch.arange(expert.numel(), device=rows.device)
    return combine_twin(y, position, valid, weights, ids.shape[1], out_dtype)
