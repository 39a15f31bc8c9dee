"""Rows of tokens copied into expert order, so that the first GEMM can read them by descriptor.

A descriptor reads neighbouring rows only. Every token is read once and written to its K places, which moves fewer
bytes than gathering would: ``T*H`` are read instead of ``T*K*H``.

Shape legend: see ``spec.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import power_of_two
from .launch import Launch, Start, dependent, follow, once


@triton.jit(do_not_specialize=["T", "E"])
def permute_kernel(
    x,
    x_stride,
    position,
    offsets,
    out,
    T,
    E,
    H,
    K: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out[position[t*K + k], :] = x[t, :]`` for the pairs that have an expert."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BH + tl.arange(0, BH)
    here = t < T
    inside = (c < H)[None, :]
    follow(PDL)
    v = tl.load(x + t.to(tl.int64)[:, None] * x_stride + c[None, :], mask=here[:, None] & inside)
    total = tl.load(offsets + E)
    pair = t.to(tl.int64) * K
    for k in tl.range(0, K, loop_unroll_factor=8):
        s = tl.load(position + pair + k, mask=here, other=0).to(tl.int64)
        valid = here & (s < total)
        tl.store(out + s[:, None] * H + c[None, :], v, mask=valid[:, None] & inside)


def permute(x: Tensor, position: Tensor, offsets: Tensor, top_k: int, start: Start = once) -> Tensor:
    """Tokens ``x [T, H]``, ``position [P]`` of every pair -> ``[P, H]``; rows past the valid ones stay unwritten."""
    (tokens, hidden), pairs = x.shape, position.shape[0]
    out = start.empty(x, pairs, hidden)
    if pairs == 0 or hidden == 0:
        return out

    def launch() -> Launch:
        bh = min(max(power_of_two(hidden), 16), 1024)
        bm = max(1, 2048 // bh)
        grid = (triton.cdiv(tokens, bm), triton.cdiv(hidden, bh))
        return Launch(permute_kernel, grid, {"K": top_k, "BM": bm, "BH": bh, **dependent(x)})

    start(launch, x, x.stride(0), position, offsets, out, tokens, offsets.shape[0] - 1, hidden)
    return out


def permute_twin(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Torch twin of ``permute`` from the inverse of ``position``; the rows past the valid ones hold tokens too."""
    return x[order.long() // top_k]
