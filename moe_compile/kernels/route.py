"""The router in one launch: scores, the K largest of every token, their weights.

A warp holds the logits of one token and takes the largest K times; ties go to the lower expert, which is what
``torch.topk`` promises nothing about. Choosing by logits and not by their scores is the same choice, as both
functions rise, but for scores that rounding made equal. Shape legend: see ``spec.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import Router
from .config import power_of_two
from .launch import Launch, Start, dependent, follow, once

ROWS = 4  # tokens of one program, a warp each
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _rank(v):
    """int32 keys in the order of fp32 values, NaN above all as in torch; never ``LOWEST``."""
    bits = v.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(v != v, 0x7FFFFFFF, key)


@triton.jit(do_not_specialize=["T", "E"])
def route_kernel(
    logits,
    stride,
    weights,
    ids,
    T,
    E,
    eps,
    scale,
    K: tl.constexpr,
    KP: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PDL: tl.constexpr,
):
    """``weights [T, K]`` and ``ids [T, K]`` of ``logits [T, E]``, the largest first."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    k = tl.arange(0, KP)
    real = (e < E)[None, :]
    follow(PDL)
    at = logits + t.to(tl.int64)[:, None] * stride + e[None, :]
    v = tl.load(at, mask=(t < T)[:, None] & real, other=0.0).to(tl.float32)  # [ROWS, EP]
    if SOFTMAX:
        top = tl.max(tl.where(real, v, float("-inf")), 1)
        p = tl.where(real, tl.exp(v - top[:, None]), 0.0)
        p = p / tl.sum(p, 1)[:, None]
    else:
        p = 1.0 / (1.0 + tl.exp(-v))
    key = tl.where(real, _rank(v), LOWEST)
    chosen = tl.zeros((ROWS, KP), tl.int32)
    weight = tl.zeros((ROWS, KP), tl.float32)
    for j in tl.static_range(K):
        best = tl.argmax(key, 1)
        mine = e[None, :] == best[:, None]
        w = tl.sum(tl.where(mine, p, 0.0), 1)
        here = (k == j)[None, :]
        chosen = tl.where(here, best[:, None], chosen)
        weight = tl.where(here, w[:, None], weight)
        key = tl.where(mine, LOWEST, key)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, 1) + eps)[:, None]
    weight *= scale
    o = t.to(tl.int64)[:, None] * K + k[None, :]
    ok = (t < T)[:, None] & (k < K)[None, :]
    tl.store(weights + o, weight.to(weights.dtype.element_ty), mask=ok)
    tl.store(ids + o, chosen.to(tl.int64), mask=ok)


def route(
    logits: Tensor, top_k: int, router: Router, dtype: torch.dtype, start: Start = once
) -> tuple[Tensor, Tensor]:
    """``logits [T, E]`` -> weights ``[T, K]`` in ``dtype`` and int64 ids ``[T, K]``; twin: ``Router.reference``."""
    tokens, experts = logits.shape
    weights = start.empty(logits, tokens, top_k, dtype=dtype)
    ids = start.empty(logits, tokens, top_k, dtype=torch.int64)
    if tokens == 0:
        return weights, ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()

    def launch() -> Launch:
        rows = ROWS if tokens >= ROWS else 1
        constants = {
            "K": top_k,
            "KP": power_of_two(top_k),
            "EP": max(32, power_of_two(experts)),
            "ROWS": rows,
            "SOFTMAX": router.score == "softmax",
            "RENORMALISE": router.renormalise,
        }
        grid = (triton.cdiv(tokens, rows),)
        return Launch(route_kernel, grid, {**constants, "num_warps": rows, **dependent(logits)})

    start(launch, logits, logits.stride(0), weights, ids, tokens, experts, router.eps, router.scale)
    return weights, ids
