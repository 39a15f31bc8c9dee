"""CPU implementations of ``torch.ops.moe_compile.*``: grouped, in plain PyTorch ops.

Shape legend: see ``spec.py``. Pairs are sorted by expert, so every expert that was hit owns one run of
rows and its weights are read once. Experts are taken in blocks whose intermediate rows stay in cache:
first GEMMs of the block, activation, second GEMMs of the block. One fixed-order weighted sum ends it.

How the GEMMs of one call run is decided once, from its shape alone (``_choose``), because BLAS differs:

* bf16/fp16 without CPU instructions for it: PyTorch's own loop wins for a few rows (it reads half the
  bytes), else each weight is upcast tile by tile into one small float32 scratch, 2 to 10 times faster
  and more accurate, since nothing is rounded before the end.
* ``out.T = W @ rows.T`` beats ``rows @ W.T`` by up to 2 times for 2 to 100 rows of an expert. The layout
  of the output buffer is what selects it: ``mm`` passes column-major outputs to BLAS as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import INF, Activation
from .schema import is_stacked, library
from .validate import check_combine, check_experts, check_grouped_linear, check_ids

BLOCK_BYTES = 1 << 20  # intermediate rows of one block: small enough for a core's second-level cache
SPLIT_ROWS = 256  # one expert is split only into runs that still make an efficient GEMM
TILE = 1 << 20  # elements of a weight that are upcast at a time
NATIVE_ROWS = 3  # up to here (rows of an expert, on average) half precision GEMMs win without upcast
COLUMN_ROWS = 128  # up to here ``W @ rows.T`` wins
STRIDED_ROWS = 16  # from here on BLAS takes column-major rows as fast as row-major ones

Segment = tuple[int, int, int]  # expert, first row, end row


class Method(NamedTuple):
    """How the GEMMs of one call run."""

    dtype: torch.dtype  # of the GEMMs
    columns: bool  # outputs are column-major
    repack: bool  # rows are made row-major before the second GEMM


class Projection:
    """One weight role with its bias: ``out = rows @ weight[e].T + bias[e]``."""

    def __init__(self, weight: Sequence[Tensor], bias: Sequence[Tensor], method: Method) -> None:
        self.weight = weight[0] if is_stacked(weight) else weight
        self.bias = bias[0] if len(bias) == 1 and bias[0].dim() == 2 else bias
        self.width = weight[0].shape[-2]
        self.dtype = method.dtype
        self.row_major = weight[0].stride(-1) == 1
        self.scratch: Tensor | None = None
        if weight[0].dtype != method.dtype:
            inner = weight[0].shape[-1]
            self.tile = min(self.width, max(1, TILE // inner))
            # The scratch keeps the weight's own memory order: a transposing copy is many times slower.
            shape = (self.tile, inner) if self.row_major else (inner, self.tile)
            self.scratch = torch.empty(shape, dtype=method.dtype)

    def __call__(self, expert: int, rows: Tensor, out: Tensor) -> None:
        weight = self.weight[expert]  # [out, in]
        bias = self.bias[expert] if len(self.bias) else None
        if self.scratch is None:
            _linear(rows, weight, bias, out)
            return
        scratch = self.scratch if self.row_major else self.scratch.t()  # [tile, in]
        bias = None if bias is None else bias.to(self.dtype)
        for start in range(0, self.width, self.tile):
            part = slice(start, start + self.tile)
            tile = scratch[: min(self.tile, self.width - start)].copy_(weight[part])
            _linear(rows, tile, None if bias is None else bias[part], out[:, part])


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Sequence[Tensor],
    w3: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b3: Sequence[Tensor],
    b2: Sequence[Tensor],
    activation: str,
    activation_args: Sequence[float],
    gated: bool,
    interleaved: bool = False,
    weight_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    with torch.no_grad():  # parameters may require grad, which ``out=`` refuses
        experts = check_experts(
            hidden_states, topk_weights, topk_ids, w1, w3, w2, b1, b3, b2, gated, interleaved
        )
        act = _activation(activation, gated, tuple(activation_args))
        top_k = topk_ids.shape[1]
        key, order = _sort(topk_ids, experts)  # [P], [P]
        segments = _segments(key, experts)
        pairs = segments[-1][2] if segments else 0
        method = _choose(hidden_states.dtype, pairs, len(segments), (w1, w3, w2))
        first = [Projection(w1, b1, method)]
        if w3:
            first.append(Projection(w3, b3, method))
        down = Projection(w2, b2, method)

        wide = _accumulator(hidden_states.dtype)
        token = order[:pairs] // top_k
        scale = topk_weights.reshape(-1)[order[:pairs], None].to(wide) if weight_on_input else None
        # The pairs that count, and one row that stands for all others and is never read.
        result = torch.empty(pairs + 1, down.width, dtype=method.dtype)  # [P + 1, H]
        for start, end, runs in _blocks(segments, sum(p.width for p in first) * method.dtype.itemsize):
            rows = hidden_states.index_select(0, token[start:end])  # [n, H]
            if scale is not None:
                rows = rows.to(wide).mul_(scale[start:end])
            hidden = [_run(p, runs, rows.to(method.dtype), method.columns) for p in first]  # [n, I or 2I]
            inner = _activate(act, *_halves(hidden, gated, interleaved, wide)).to(method.dtype)  # [n, I]
            inner = inner.contiguous() if method.repack else inner
            _run(down, runs, inner, method.columns, result[start:end])
        weights = None if weight_on_input else topk_weights
        return _weighted_sum(result, order, pairs, weights, top_k).to(out_dtype or hidden_states.dtype)


def _sort_pairs(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    check_ids(topk_ids)
    key, order = _sort(topk_ids, num_experts)
    offsets = torch.searchsorted(key, torch.arange(num_experts + 1, dtype=key.dtype), out_int32=True)
    return order.to(torch.int32), offsets


def _grouped_linear(
    rows: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor
) -> Tensor:
    with torch.no_grad():
        experts = check_grouped_linear(rows, weight, bias, offsets)
        ends = offsets.tolist()
        segments = [(e, ends[e], ends[e + 1]) for e in range(experts) if ends[e] < ends[e + 1]]
        method = _choose(rows.dtype, ends[-1], len(segments), (weight,))
        project = Projection(weight, bias, method)
        out = rows.new_empty(rows.shape[0], project.width)  # [P, out]
        for start, end, runs in _blocks(segments, project.width * method.dtype.itemsize):
            out[start:end] = _run(project, runs, rows[start:end].to(method.dtype), method.columns)
        out[ends[-1] :].zero_()
        return out


def _combine(
    rows: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    top_k: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    with torch.no_grad():
        check_combine(rows, order, offsets, topk_weights, top_k)
        pairs = int(offsets[-1])
        result = _weighted_sum(rows, order.to(torch.int64), pairs, topk_weights, top_k)
        return result.to(out_dtype or rows.dtype)


def _sort(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Expert of every pair in sorted order (E when out of range), and the pair numbers in that order."""
    # -1 and E, the borders that clamp leaves, are the same modulo E + 1.
    key = topk_ids.reshape(-1).clamp(-1, experts).remainder_(experts + 1)  # [P]
    return torch.sort(key, stable=True)


def _segments(key: Tensor, experts: int) -> list[Segment]:
    """Runs of equal experts in sorted keys; only experts that were hit appear, id E does not."""
    hit, counts = torch.unique_consecutive(key, return_counts=True)
    segments: list[Segment] = []
    start = 0
    for expert, count in zip(hit.tolist(), counts.tolist(), strict=True):
        if expert < experts:
            segments.append((expert, start, start + count))
            start += count
    return segments


def _blocks(segments: list[Segment], row_bytes: int) -> Iterator[tuple[int, int, list[Segment]]]:
    """Cut segments into ``(start, end, runs)``, where runs count rows from ``start``."""
    limit = max(1, BLOCK_BYTES // row_bytes)  # rows of several experts together
    step = max(SPLIT_ROWS, limit)  # rows of one expert
    runs: list[Segment] = []
    start = 0
    for expert, first, last in segments:
        for begin in range(first, last, step):
            end = min(last, begin + step)
            if runs and end - start > limit:
                yield start, begin, runs
                runs = []
            if not runs:
                start = begin
            runs.append((expert, begin - start, end - start))
    if runs:
        yield start, start + runs[-1][2], runs


def _choose(dtype: torch.dtype, pairs: int, hit: int, roles: Sequence[Sequence[Tensor]]) -> Method:
    """Pick the method from the mean number of rows of an expert; figures in ``benchmarks/results``."""
    if dtype in (torch.bfloat16, torch.float16):
        # Without instructions for the type, PyTorch's loop is fast along ``in`` only.
        few = pairs <= NATIVE_ROWS * hit and all(r[0].stride(-1) == 1 for r in roles if r)
        if few or _native_gemm(dtype):
            return Method(dtype, columns=False, repack=False)
        dtype = torch.float32
    columns = hit < pairs <= COLUMN_ROWS * hit
    return Method(dtype, columns, repack=columns and pairs < STRIDED_ROWS * hit)


@cache
def _native_gemm(dtype: torch.dtype) -> bool:
    """Whether this CPU and this build of PyTorch multiply ``dtype`` matrices without emulation."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    probe = getattr(torch.ops.mkldnn, name, None)
    return probe is not None and bool(probe())


def _run(
    project: Projection, runs: list[Segment], rows: Tensor, columns: bool, out: Tensor | None = None
) -> Tensor:
    """One projection of a block; into ``out`` (row-major) when given."""
    n = rows.shape[0]
    buffer = out
    if columns:
        buffer = torch.empty(project.width, n, dtype=rows.dtype).t()  # [n, out], column-major
    elif buffer is None:
        buffer = torch.empty(n, project.width, dtype=rows.dtype)
    for expert, start, end in runs:
        project(expert, rows[start:end], buffer[start:end])
    return buffer if out is None or buffer is out else out.copy_(buffer)


def _halves(
    hidden: list[Tensor], gated: bool, interleaved: bool, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gate and up, in the accumulation dtype."""
    gate = hidden[0].to(wide)
    if len(hidden) == 2:
        return gate, hidden[1].to(wide)
    if not gated:
        return gate, None
    half = gate.shape[1] // 2
    return (gate[:, 0::2], gate[:, 1::2]) if interleaved else (gate[:, :half], gate[:, half:])


_activation = lru_cache(maxsize=64)(Activation.from_args)


def _activate(act: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
    """``act(gate, up)`` with fused kernels and few temporaries; the result is dense."""
    g = gate.clamp(max=act.gate_limit) if act.gate_limit < INF else gate
    if act.name == "silu" and act.alpha == 1.0:
        a = F.silu(g)
    elif act.name == "silu":
        a = torch.sigmoid(g * act.alpha).mul_(g)
    elif act.name == "gelu":
        a = F.gelu(g)
    elif act.name == "gelu_tanh":
        a = F.gelu(g, approximate="tanh")
    elif act.name == "identity":
        a = g.clone()
    else:
        a = torch.relu(g)
        a = a.square_() if act.name == "relu2" else a
    if act.act_limit < INF:
        a.clamp_(max=act.act_limit)
    if up is None:
        return a
    u = up.clamp(-act.up_limit, act.up_limit) if act.up_limit < INF else up
    return a.mul_(u + act.up_offset if act.up_offset else u)


def _weighted_sum(rows: Tensor, order: Tensor, pairs: int, topk_weights: Tensor | None, top_k: int) -> Tensor:
    """``[T, H]`` in the accumulation dtype, summed in the order of k; reads the first ``pairs`` rows."""
    total = order.shape[0]
    if pairs == 0:
        return rows.new_zeros(total // max(1, top_k), rows.shape[1], dtype=_accumulator(rows.dtype))
    wide = rows.to(_accumulator(rows.dtype))
    # Pairs that do not count share one row number, which embedding_bag skips: it is never read.
    position = torch.empty_like(order).scatter_(0, order, torch.arange(total).clamp_(max=pairs))  # [P]
    weights = None if topk_weights is None else topk_weights.reshape(-1).to(wide.dtype)
    bags = torch.arange(0, total, top_k)
    padding = pairs if pairs < total else None
    return torch.embedding_bag(wide, position, bags, False, 0, False, weights, False, padding)[0]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


library.impl("experts", _experts, "CPU")
library.impl("sort_pairs", _sort_pairs, "CPU")
library.impl("grouped_linear", _grouped_linear, "CPU")
library.impl("combine", _combine, "CPU")
