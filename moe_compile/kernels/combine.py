"""The weighted sum over a token's experts, in the fixed order of k, in fp32.

Shape legend: see ``spec.py``. A pair without an expert contributes nothing and its row, which nobody
wrote, is never read: masking the load (not the product) is what keeps a stray NaN out. Gathering a token's
rows, instead of scattering expert outputs with atomics, makes the sum deterministic (as in SonicMoE,
https://arxiv.org/abs/2512.14080).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import power_of_two
from .launch import Launch, Start, dependent, follow, once


@triton.jit(do_not_specialize=["T", "E"])
def combine_kernel(
    rows,
    position,
    offsets,
    ids,
    weights,
    out,
    T,
    E,
    H,
    K: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows are in sorted order when ``position`` is given, else in the order of the pairs.

    A position from ``offsets[E]`` on, or without ``offsets`` a negative one, is that of a pair without an expert.
    """
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BH + tl.arange(0, BH)
    here = t < T
    inside = (c < H)[None, :]
    pair = t.to(tl.int64) * K
    acc = tl.zeros((BM, BH), tl.float32)
    follow(PDL)
    if offsets is not None:
        total = tl.load(offsets + E)
    for k in tl.range(0, K, loop_unroll_factor=8):
        if position is not None:
            r = tl.load(position + pair + k, mask=here, other=0).to(tl.int64)
            if offsets is not None:
                valid = here & (r < total)
            else:
                valid = here & (r >= 0)
        else:
            r = pair + k
            e = tl.load(ids + r, mask=here, other=-1)
            valid = (e >= 0) & (e < E)
        v = tl.load(rows + r[:, None] * H + c[None, :], mask=valid[:, None] & inside, other=0.0)
        v = v.to(tl.float32)
        if weights is not None:
            weight = tl.load(weights + pair + k, mask=valid, other=0.0).to(tl.float32)
            v = v * weight[:, None]
        acc += v
    tl.store(
        out + t.to(tl.int64)[:, None] * H + c[None, :],
        acc.to(out.dtype.element_ty),
        mask=here[:, None] & inside,
    )


@triton.jit(do_not_specialize=["P"])
def invert_kernel(order, inverse, P, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """inverse[order[s]] = s."""
    follow(PDL)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(inverse + tl.load(order + s, mask=s < P, other=0), s, mask=s < P)


def invert(order: Tensor) -> Tensor:
    """Position of every pair in ``order [P]``, int32."""
    pairs = order.numel()
    inverse = torch.empty_like(order, dtype=torch.int32)
    if pairs:
        constants = {"BLOCK": 1024, **dependent(order)}
        once(lambda: Launch(invert_kernel, (triton.cdiv(pairs, 1024),), constants), order, inverse, pairs)
    return inverse


def _launch(
    rows: Tensor,
    pairs: int,
    position: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    weights: Tensor | None,
    experts: int,
    top_k: int,
    out_dtype: torch.dtype,
    start: Start,
) -> Tensor:
    tokens, hidden = pairs // top_k, rows.shape[1]
    out = start.empty(rows, tokens, hidden, dtype=out_dtype)
    if tokens == 0 or hidden == 0:
        return out

    def launch() -> Launch:
        bh = min(max(power_of_two(hidden), 16), 1024)
        bm = 1 if tokens < 1024 else max(1, 2048 // bh)
        grid = (triton.cdiv(tokens, bm), triton.cdiv(hidden, bh))
        return Launch(combine_kernel, grid, {"K": top_k, "BM": bm, "BH": bh, **dependent(rows)})

    start(launch, rows, position, offsets, ids, weights, out, tokens, experts, hidden)
    return out


def combine_sorted(
    rows: Tensor,
    position: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    top_k: int,
    out_dtype: torch.dtype,
    start: Start = once,
) -> Tensor:
    """``rows [P, H]`` in sorted order, ``position [P]`` of every pair -> ``[T, H]``."""
    experts = offsets.shape[0] - 1
    return _launch(rows, rows.shape[0], position, offsets, None, weights, experts, top_k, out_dtype, start)


def combine_padded(
    rows: Tensor, position: Tensor, weights: Tensor | None, top_k: int, out_dtype: torch.dtype, start: Start = once
) -> Tensor:
    """``rows [M, H]``, ``position [P]`` of every pair, negative for none -> ``[T, H]``."""
    return _launch(rows, position.shape[0], position, None, None, weights, 0, top_k, out_dtype, start)


def combine_pairs(
    rows: Tensor, ids: Tensor, weights: Tensor | None, experts: int, out_dtype: torch.dtype, start: Start = once
) -> Tensor:
    """``rows [P, H]`` in the order of the pairs of ``ids [T, K]`` -> ``[T, H]``."""
    return _launch(rows, rows.shape[0], None, None, ids, weights, experts, ids.shape[1], out_dtype, start)


def combine_twin(
    rows: Tensor, position: Tensor, valid: Tensor, weights: Tensor | None, top_k: int, out_dtype: torch.dtype
) -> Tensor:
    """Torch twin of all: ``position [P]`` of every pair, ``valid [P]`` whether its row counts."""
    y = rows[position.long()].float()  # [P, H]
    if weights is not None:
        y = y * weights.reshape(-1, 1).float()
    y = torch.where(valid[:, None], y, 0.0).view(-1, top_k, rows.shape[1])
    out = torch.zeros_like(y[:, 0])  # [T, H]
    for k in range(top_k):
        out = out + y[:, k]
    return out.to(out_dtype)
