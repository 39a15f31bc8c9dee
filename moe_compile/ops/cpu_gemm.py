"""Grouped GEMMs on the CPU, in plain PyTorch ops.

How the GEMMs of a call run is decided from shapes and from the rows that experts have (``choose``), as BLAS differs:

* bf16/fp16 without CPU instructions for it: PyTorch's own loop wins for a few rows (it reads half the
  bytes), else weights are upcast tile by tile into a float32 scratch: 2 to 8 times faster, more accurate.
* ``out.T = W @ rows.T`` beats ``rows @ W.T`` by up to 2 times for 2 to 100 rows of an expert, with AVX-512 for 2 to
  12 (but loses to it by 8 where weights are transposed views). The layout of the output buffer is what selects it.
* Where nothing is to be had from that, all experts of a block go to one ``F.grouped_mm``, if its form allows it:
  the same products, without Python between them.
* That still is one call of BLAS per expert. Experts given as many rows as the fullest of them has make one batched
  product, which takes a half to a thirtieth of the time where experts are small, or rows few and CPU instructions
  for half precision quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .schema import is_stacked

TILE = 1 << 20  # elements of a weight that are upcast at a time
NATIVE_ROWS = 3  # up to here (rows of an expert, on average) half precision GEMMs win without upcast
# oneDNN's AMX GEMM of a width that is not a multiple of this reads on into the next row, times zero: a NaN there
# would reach another token (seen with PyTorch 2.11 and 2.13). Such widths are upcast.
NATIVE_BLOCK = 32
STRIDED_ROWS = 16  # from here on BLAS takes column-major rows as fast as row-major ones


class Blas(NamedTuple):
    """What MKL does with ``W @ rows.T``, measured on two kinds of AMD EPYC, by their instructions.

    Args:
        columns: mean rows of an expert up to which it wins.
        vector: columns that end in a vector not quite full of so many take up to 2.5 times as long as in a full one.
        least: bytes of the weights of all experts from which it wins; smaller ones stay in the cache.
    """

    columns: int = 128
    vector: int = 1
    least: int = 0


# What one more call of BLAS costs, in multiply-adds of a batched product (AMD EPYC with AVX-512, two threads).
CALL = {torch.bfloat16: 6_500_000, torch.float16: 6_500_000, torch.float32: 260_000, torch.float64: 260_000}
IDLE_ROWS = 32  # reading the weights of an expert without rows costs as much as so many rows
BATCHED_ROWS = 256  # experts with more rows than that are many rows: a call of their own costs nothing
BLAS = {"AVX512": Blas(columns=12, vector=16, least=1 << 24)}
MISSING_ROWS = 5  # of 16: columns that lack so many or fewer are better filled

Segment = tuple[int, int, int]  # expert, first row, end row
Tensors = Sequence[Tensor]


class Method(NamedTuple):
    """How the GEMMs of one call run."""

    dtype: torch.dtype  # of the GEMMs
    columns: bool = False  # outputs are column-major
    repack: bool = False  # rows are made row-major before the second GEMM
    grouped: bool = False  # all experts of a block in one call
    batched: bool = False  # the same, with as many rows for every expert


class Routing(NamedTuple):
    """How many rows the experts of a call have."""

    pairs: int
    experts: int
    hit: int  # experts that have rows
    most: int  # rows of the fullest expert


class Projection:
    """One weight role with its bias: ``out = rows @ weight[e].T + bias[e]``."""

    def __init__(self, weight: Tensors, bias: Tensors, method: Method) -> None:
        self.weight = weight[0].mT if is_stacked(weight) else weight
        self.stacked = is_stacked(weight)
        self.bias = bias[0] if len(bias) == 1 and bias[0].dim() == 2 else bias
        self.biased = len(bias) > 0
        self.width, inner = weight[0].shape[-2:]
        self.method = method
        self.layout = (1, 0) if method.columns else (0, 1)
        self.scratch: Tensor | None = None
        if weight[0].dtype != method.dtype:
            tile = min(self.width, max(1, TILE // inner))
            # The scratch [in, tile] keeps the weight's memory order: a transposing copy is many times slower.
            order = (1, 0) if weight[0].stride(-1) == 1 else (0, 1)
            self.scratch = torch.empty_permuted((inner, tile), order, dtype=method.dtype)

    def __call__(self, runs: list[Segment], rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows of one block (or one row for all runs), into ``out`` (row-major) when given."""
        if self.method.batched:
            return self._batched(runs, rows, out)
        if self.method.grouped:
            return self._grouped(runs, rows) if out is None else out.copy_(self._grouped(runs, rows))
        buffer, n = out, runs[-1][2] if runs else 0
        if buffer is None or self.layout != (0, 1):
            buffer = torch.empty_permuted((n, self.width), self.layout, dtype=rows.dtype)  # [n, out]
        sizes = [end - start for _, start, end in runs]
        xs = rows.split_with_sizes(sizes) if len(rows) == n else [rows] * n
        ys = buffer.split_with_sizes(sizes)
        for (expert, _, _), x, y in zip(runs, xs, ys, strict=True):
            weight = self.weight[expert] if self.stacked else self.weight[expert].t()  # [in, out]
            if self.scratch is not None:
                self._upcast(x, weight, self.bias[expert] if self.biased else None, y, self.scratch)
            elif self.biased:
                torch.addmm(self.bias[expert], x, weight, out=y)
            else:
                torch.mm(x, weight, out=y)
        return buffer if out is None or out is buffer else out.copy_(buffer)

    def _grouped(self, runs: list[Segment], rows: Tensor) -> Tensor:
        """All at once: the experts from the first to the last of the block, some of which may have no rows."""
        first, last = runs[0][0], runs[-1][0]
        counts = [0] * (last - first + 1)
        for expert, start, end in runs:
            counts[expert - first] += end - start
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
        assert isinstance(self.weight, Tensor)
        return F.grouped_mm(rows, self.weight[first : last + 1], offs=ends)

    def _batched(self, runs: list[Segment], rows: Tensor, out: Tensor | None) -> Tensor:
        """The same for adjacent experts that have equally many rows."""
        assert isinstance(self.weight, Tensor)
        experts = slice(runs[0][0], runs[0][0] + len(runs))
        out = rows.new_empty(len(rows), self.width) if out is None else out
        result = out.view(len(runs), -1, self.width)
        torch.bmm(rows.view(len(runs), -1, rows.shape[1]), self.weight[experts], out=result)
        if isinstance(self.bias, Tensor):
            result.add_(self.bias[experts].unsqueeze(1))
        return out

    def _upcast(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, scratch: Tensor) -> None:
        step = scratch.shape[1]
        for start in range(0, self.width, step):
            part = slice(start, start + step)
            tile = scratch[:, : self.width - start].copy_(weight[:, part])
            torch.mm(x, tile, out=y[:, part])
        if bias is not None:
            y.add_(bias)


def choose(
    dtype: torch.dtype, routing: Routing, roles: Sequence[Tensors], biases: Sequence[Tensors] = ()
) -> Method:
    """Pick the method from the number of rows that experts have."""
    half = dtype in (torch.bfloat16, torch.float16)
    if half and not native_gemm(dtype):
        own_loop = _row_major(roles) and routing.pairs <= NATIVE_ROWS * routing.hit
        return Method(dtype) if own_loop else _by_rows(torch.float32, routing, roles)
    if half and any(r[0].shape[-1] % NATIVE_BLOCK for r in roles if r):
        return _by_rows(torch.float32, routing, roles)
    if _fits_bmm(dtype, routing, roles, biases):
        return Method(dtype, batched=True)
    method = Method(dtype) if half else _by_rows(dtype, routing, roles)
    together = dtype != torch.float64 and not method.columns and routing.pairs > routing.hit and not any(biases)
    return method._replace(grouped=together and all(_fits_grouped_mm(r) for r in roles if r))


def _fits_bmm(
    dtype: torch.dtype, routing: Routing, roles: Sequence[Tensors], biases: Sequence[Tensors]
) -> bool:
    """Whether one batched product takes all roles, and costs less than calls that leave out the rows it adds."""
    pairs, experts, hit, most = routing
    weights = [r[0] for r in roles if r]
    if not hit < pairs or most > BATCHED_ROWS or not all(is_stacked(r) for r in roles if r):
        return False
    added = experts * most - pairs + (experts - hit) * IDLE_ROWS
    if added * sum(w[0].numel() for w in weights) > hit * len(weights) * CALL[dtype]:
        return False
    if any(b and b[0].dim() != 2 for b in biases):
        return False
    return all(w.is_contiguous() or w.mT.is_contiguous() for w in weights)  # else it is copied


def _fits_grouped_mm(weight: Tensors) -> bool:
    """Whether ``F.grouped_mm`` takes a role, and rows to be multiplied by it: rows start on 16 bytes."""
    w = weight[0]
    per_vector = 16 // w.itemsize
    return is_stacked(weight) and w.stride(2) == 1 and not any(n % per_vector for n in (*w.stride()[:2], w.shape[2]))


def _row_major(roles: Sequence[Tensors]) -> bool:
    """Whether weights are dense in ``in``: what columns and PyTorch's own half precision loop need."""
    return all(r[0].stride(-1) == 1 for r in roles if r)


def _by_rows(dtype: torch.dtype, routing: Routing, roles: Sequence[Tensors]) -> Method:
    pairs, hit = routing.pairs, routing.hit
    size = sum(r[0].numel() * len(r) for r in roles if r) * dtype.itemsize  # bytes
    columns = hit < pairs <= blas().columns * hit and size >= blas().least and _row_major(roles)
    return Method(dtype, columns, repack=columns and pairs < STRIDED_ROWS * hit)


@cache
def blas() -> Blas:
    """That of this CPU."""
    return BLAS.get(torch.backends.cpu.get_cpu_capability(), Blas())


@cache
def native_gemm(dtype: torch.dtype) -> bool:
    """Whether this CPU and this build of PyTorch multiply ``dtype`` matrices without emulation."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name, lambda: False)())
