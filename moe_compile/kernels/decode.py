"""Few tokens: every hit expert finds its own rows, without a sort, and streams its weights once.

One program column belongs to one expert (or to the first pair of one expert, when there are fewer pairs
than experts). It reads all ids, keeps its own and runs the shared tile over them. No atomics, one fixed
order, and an expert may occur several times within one token's top-k.

Shape legend: see ``spec.py``. Rows of the results are in the order of the pairs, ``t*K + k``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Tiles, power_of_two
from .launch import Launch, Start, dependent, follow, once
from .scaled import PLAIN_ROWS, Quant, scaled_tile, scales_of
from .tile import Projection, expert_tile


@triton.jit
def _slot(ids, mine, token, nth, ok, e, once, s, holds, K: tl.constexpr):
    """Which of the token's slots holds its ``nth`` pair with expert ``e``."""
    slot = tl.zeros_like(token)
    if once:
        slot_of = tl.sum(tl.where(mine, s[None, :], 0), 1)  # [TP]
        slot = tl.sum(tl.where(holds, slot_of[None, :], 0), 1)
    else:
        seen = tl.zeros_like(token)
        for k in range(K):
            own = tl.load(ids + token * K + k, mask=ok, other=-1).to(tl.int32) == e
            slot = tl.where(own & (seen == nth), k, slot)
            seen += own.to(tl.int32)
    return slot


@triton.jit
def _rows(
    x, x_stride, ids, scales, out, mine, hits, first, rows, e, tn, once, N, D, Q, W,
    K: tl.constexpr, TP: tl.constexpr, KP: tl.constexpr, BY_TOKEN: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """BM of the expert's rows, from its pair number ``first`` on."""
    t = tl.arange(0, TP)
    s = tl.arange(0, KP)
    j = first + tl.arange(0, BM)
    ok = j < rows
    after = tl.cumsum(hits, 0)
    # the token that holds the expert's j-th pair, and how many of its pairs come before in the token
    holds = ((after - hits)[None, :] <= j[:, None]) & (j[:, None] < after[None, :])  # [BM, TP]
    token = tl.sum(tl.where(holds, t[None, :], 0), 1)
    nth = j - tl.sum(tl.where(holds, (after - hits)[None, :], 0), 1)
    pair = token * K + _slot(ids, mine, token, nth, ok, e, once, s, holds, K)
    # where not ok this is row 0: readable, and rows do not mix
    row = (token if BY_TOKEN else pair).to(tl.int64)
    to = pair.to(tl.int64)
    if Q.w is None:
        expert_tile(x, x_stride, row, scales, pair, out, to, ok, e, tn, N, D, W, M, S, BM)
    else:
        scaled_tile(x, x_stride, row, scales, pair, out, to, ok, e, tn, N, D, Q, W, M, S, BM)


@triton.jit(do_not_specialize=["T", "E"])
def decode_kernel(
    x,
    x_stride,
    ids,
    scales,
    out,
    T,
    E,
    N,
    D,
    Q,
    W,
    K: tl.constexpr,
    TP: tl.constexpr,
    KP: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    TAIL: tl.constexpr,
    PDL: tl.constexpr,
):
    """``BY_TOKEN``: rows of x are tokens, else pairs, and x is what the first GEMM wrote. ``Q``: ``Scales``."""
    tn = tl.program_id(0)
    which = tl.program_id(1)
    t = tl.arange(0, TP)
    s = tl.arange(0, KP)
    number = t[:, None] * K + s[None, :]
    if BY_TOKEN:
        follow(PDL)
    id = tl.load(ids + number, mask=(t < T)[:, None] & (s < K)[None, :], other=-1).to(tl.int32)  # [TP, KP]
    if BY_EXPERT:
        e = which
        mine = id == e
        live = True
    else:
        e = tl.load(ids + which).to(tl.int32)
        mine = id == e
        # only the first pair of an expert works; the others find it and leave
        earlier = tl.sum(tl.sum((mine & (number < which)).to(tl.int32), 1), 0)
        live = (e >= 0) & (e < E) & (earlier == 0)
    hits = tl.sum(mine.to(tl.int32), 1)  # [TP]
    rows = tl.sum(hits, 0)
    once = tl.max(hits, 0) <= 1  # nobody chose the expert twice for one token
    if not BY_TOKEN:
        # the ids are older than the rows of x: they were complete before the first GEMM began
        follow(PDL)
    if live:
        if TAIL == 0 or rows > BM // 2:
            for first in range(0, rows, BM):
                _rows(
                    x, x_stride, ids, scales, out, mine, hits, first, rows, e, tn, once, N, D, Q, W,
                    K, TP, KP, BY_TOKEN, M, S, BM,
                )  # fmt: skip
        elif TAIL == 1 or rows > BM // 4:
            if rows > 0:
                _rows(
                    x, x_stride, ids, scales, out, mine, hits, 0, rows, e, tn, once, N, D, Q, W,
                    K, TP, KP, BY_TOKEN, M, S, BM // 2,
                )  # fmt: skip
        elif rows > 0:
            _rows(
                x, x_stride, ids, scales, out, mine, hits, 0, rows, e, tn, once, N, D, Q, W,
                K, TP, KP, BY_TOKEN, M, S, BM // 4,
            )  # fmt: skip


def decode_projection(
    x: Tensor,
    ids: Tensor,
    experts: int,
    projection: Projection,
    plan: Tiles,
    by_token: bool,
    scales: Tensor | None = None,
    start: Start = once,
    quant: Quant = PLAIN_ROWS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Tokens ``x [T, D]`` (``by_token``) or pairs ``x [P, D]`` -> ``[P, N]`` in the order of the pairs.

    Rows of pairs without an expert stay unwritten. The torch twin is ``grouped.projection_twin``.

    Args:
        dtype: of the result; default that of x.
    """
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    out = start.empty(x, pairs, projection.columns, dtype=dtype)
    if pairs == 0:
        return out

    def launch() -> Launch:
        shape = projection.shape(plan)
        by_expert = pairs >= experts
        grid = (triton.cdiv(projection.columns, shape.bn), experts if by_expert else pairs)
        constants = {
            "K": top_k,
            "TP": power_of_two(tokens),
            "KP": power_of_two(top_k),
            "BY_EXPERT": by_expert,
            "BY_TOKEN": by_token,
            "M": projection.meaning,
            "S": shape,
            "BM": plan.bm,
            "TAIL": plan.tail,
        }
        return Launch(decode_kernel, grid, {**constants, **plan.options, **dependent(x)})

    n, d = projection.columns, projection.depth
    q = scales_of(projection, quant)
    start(launch, x, x.stride(0), ids, scales, out, tokens, experts, n, d, q, projection.weights)
    return out
