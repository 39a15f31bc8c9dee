"""CPU implementations of ``torch.ops.moe_compile.*``: grouped, in plain PyTorch ops.

Shape legend: see ``spec.py``. Pairs are sorted by expert, and experts taken in blocks whose intermediate
rows stay in cache: first GEMMs, activation, second GEMMs. A weighted sum in a fixed order ends it.

How the GEMMs of a call run is decided from its shape alone (``_choose``), because BLAS differs:

* bf16/fp16 without CPU instructions for it: PyTorch's own loop wins for a few rows (it reads half the
  bytes), else weights are upcast tile by tile into a float32 scratch: 2 to 8 times faster, more accurate.
* ``out.T = W @ rows.T`` beats ``rows @ W.T`` by up to 2 times for 2 to 100 rows of an expert, with AVX-512 for 2 to
  12 (but loses to it by 8 where weights are transposed views). The layout of the output buffer is what selects it.
* Where nothing is to be had from that, all experts of a block go to one ``F.grouped_mm``, if its form allows it:
  the same products, without Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import INF, Activation, Router
from .schema import implement, is_stacked
from .validate import check_combine, check_experts, check_grouped_linear, check_ids, check_route

BLOCK_BYTES = 1 << 20  # intermediate rows of one block: stays in cache, few calls of the activation
SPLIT_ROWS = 256  # one expert is split only into runs that still make an efficient GEMM
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


class Projection:
    """One weight role with its bias: ``out = rows @ weight[e].T + bias[e]``."""

    def __init__(self, weight: Tensors, bias: Tensors, method: Method) -> None:
        self.weight = weight[0].mT if is_stacked(weight) else weight
        self.stacked = is_stacked(weight)
        self.bias = bias[0] if len(bias) == 1 and bias[0].dim() == 2 else bias
        self.biased = len(bias) > 0
        self.width, inner = weight[0].shape[-2:]
        self.grouped = method.grouped
        self.layout = (1, 0) if method.columns else (0, 1)
        self.scratch: Tensor | None = None
        if weight[0].dtype != method.dtype:
            tile = min(self.width, max(1, TILE // inner))
            # The scratch [in, tile] keeps the weight's memory order: a transposing copy is many times slower.
            order = (1, 0) if weight[0].stride(-1) == 1 else (0, 1)
            self.scratch = torch.empty_permuted((inner, tile), order, dtype=method.dtype)

    def __call__(self, runs: list[Segment], rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows of one block (or one row for all runs), into ``out`` (row-major) when given."""
        if self.grouped:
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

    def _upcast(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, scratch: Tensor) -> None:
        step = scratch.shape[1]
        for start in range(0, self.width, step):
            part = slice(start, start + step)
            tile = scratch[:, : self.width - start].copy_(weight[:, part])
            torch.mm(x, tile, out=y[:, part])
        if bias is not None:
            y.add_(bias)


class Layer(NamedTuple):
    """The expert network on the rows of one block."""

    first: list[Projection]
    down: Projection
    activation: Activation
    interleaved: bool
    method: Method
    wide: torch.dtype  # of activations and sums

    def __call__(self, runs: list[Segment], rows: Tensor, out: Tensor | None = None) -> Tensor:
        rows = rows.to(self.method.dtype)  # [n, H]
        hidden = [project(runs, rows).to(self.wide) for project in self.first]  # [n, I or 2I]
        if self.activation.gated and len(hidden) == 1:
            (h,) = hidden
            hidden = [h[:, 0::2], h[:, 1::2]] if self.interleaved else list(h.chunk(2, dim=1))
        inner = _activate(self.activation, *hidden).to(self.method.dtype)  # [n, I]
        return self.down(runs, inner.contiguous() if self.method.repack else inner, out)


Build = Callable[[int, int], Layer]  # from the number of pairs and of experts that they hit


def _experts(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    w1: Tensors, w3: Tensors, w2: Tensors, b1: Tensors, b3: Tensors, b2: Tensors,
    activation: str, activation_args: Sequence[float], gated: bool, interleaved: bool = False,
    weight_on_input: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:
    with torch.no_grad():  # parameters may require grad, which ``out=`` refuses
        roles = (w1, w3, w2, b1, b3, b2)
        experts = check_experts(hidden_states, topk_weights, topk_ids, *roles, gated, interleaved)
        act = _activation(activation, gated, tuple(activation_args))
        wide = _accumulator(hidden_states.dtype)

        def layer(pairs: int, hit: int) -> Layer:
            method = _choose(hidden_states.dtype, pairs, hit, (w1, w3, w2), bool(b1 or b3 or b2))
            first = [Projection(w, b, method) for w, b in ((w1, b1), (w3, b3)) if w]
            return Layer(first, Projection(w2, b2, method), act, interleaved, method, wide)

        run = _one_token if len(topk_ids) == 1 else _many_tokens
        total = run(layer, hidden_states, topk_weights, topk_ids, experts, weight_on_input)
        return total.to(out_dtype or hidden_states.dtype)


def _one_token(
    layer: Build, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: int, on_input: bool
) -> Tensor:
    """Decoding: no sort, no gather, since the host's own work counts here."""
    ids = topk_ids[0].tolist()
    valid = [k for k, expert in enumerate(ids) if 0 <= expert < experts]
    network = layer(len(valid), len(valid))
    scale = topk_weights.reshape(-1, 1).to(network.wide)  # [K, 1]
    scale = scale if len(valid) == len(ids) else scale[valid]
    rows = hidden_states * scale if on_input else hidden_states  # [n, H] or [1, H]
    result = network([(ids[k], row, row + 1) for row, k in enumerate(valid)], rows)  # [n, H]
    return (result.to(network.wide) if on_input else result * scale).sum(0, keepdim=True)


def _many_tokens(
    layer: Build, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: int, on_input: bool
) -> Tensor:
    order, position, segments = _route(topk_ids, experts)
    network, top_k = layer(len(order), len(segments)), topk_ids.shape[1]
    none_left_out = len(order) == len(position)
    if network.method.columns and _blas().vector > 1:
        order, position, segments = _filled(order, position, segments)
    pairs = len(order)
    # The rows of pairs that count, and one row that stands for all others and is never read.
    result = torch.empty(pairs + 1, network.down.width, dtype=network.method.dtype)  # [S + 1, H]
    row_bytes = sum(p.width for p in network.first) * network.method.dtype.itemsize
    for start, end, runs in _blocks(segments, row_bytes):
        rows = hidden_states.index_select(0, order[start:end] // top_k)  # [n, H]
        if on_input:
            rows = rows * topk_weights.reshape(-1, 1)[order[start:end]].to(network.wide)
        network(runs, rows, result[start:end])
    return _weighted_sum(result, position, pairs, none_left_out, None if on_input else topk_weights, top_k)


def _sort_pairs(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    check_ids(topk_ids)
    key, order = _sort(topk_ids, num_experts)
    offsets = torch.searchsorted(key, torch.arange(num_experts + 1, dtype=key.dtype), out_int32=True)
    return order.to(torch.int32), offsets


def _grouped_linear(rows: Tensor, weight: Tensors, bias: Tensors, offsets: Tensor) -> Tensor:
    with torch.no_grad():
        experts = check_grouped_linear(rows, weight, bias, offsets)
        ends = offsets.tolist()
        segments = [(e, ends[e], ends[e + 1]) for e in range(experts) if ends[e] < ends[e + 1]]
        method = _choose(rows.dtype, ends[-1], len(segments), (weight,), bool(bias))
        project = Projection(weight, bias, method)
        out = rows.new_empty(rows.shape[0], project.width)  # [P, out]
        for start, end, runs in _blocks(segments, project.width * method.dtype.itemsize):
            out[start:end] = project(runs, rows[start:end].to(method.dtype))
        out[ends[-1] :].zero_()
        return out


def _combine(
    rows: Tensor, order: Tensor, offsets: Tensor, topk_weights: Tensor | None, top_k: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    with torch.no_grad():
        check_combine(rows, order, offsets, topk_weights, top_k)
        pairs = int(offsets[-1])
        position = _invert(order.to(torch.int64), pairs)
        total = _weighted_sum(rows, position, pairs, pairs == len(order), topk_weights, top_k)
        return total.to(out_dtype or rows.dtype)


def _sort(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Expert of every pair in sorted order (E when out of range), and the pair numbers in that order."""
    key = topk_ids.reshape(-1).clamp(-1, experts).remainder_(experts + 1)  # -1 becomes E, as E does
    return torch.sort(key, stable=True)  # [P], [P]


def _invert(order: Tensor, pairs: int) -> Tensor:
    """Row of every pair; ``pairs`` for all rows from there on."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).clamp_(max=pairs))


def _route(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, list[Segment]]:
    """The pair of every row [S], the row of every pair [P], and each expert's rows."""
    key, order = _sort(topk_ids, experts)
    hit, counts = torch.unique_consecutive(key, return_counts=True)
    segments: list[Segment] = []
    pairs = 0
    for expert, count in zip(hit.tolist(), counts.tolist(), strict=True):
        if expert < experts:
            segments.append((expert, pairs, pairs + count))
            pairs += count
    return order[:pairs], _invert(order, pairs), segments


def _filled(order: Tensor, position: Tensor, segments: list[Segment]) -> tuple[Tensor, Tensor, list[Segment]]:
    """The same with experts whose rows almost fill their last vector given what it lacks: rows that nobody reads.

    They repeat the expert's last row, so they hold nothing that is not in a row that counts.
    """
    vector, filled = _blas().vector, list[Segment]()
    repeats = [1] * len(order)
    more = 0
    for expert, start, end in segments:
        missing = (start - end) % vector
        missing = missing if missing <= MISSING_ROWS else 0
        repeats[end - 1] += missing
        filled.append((expert, start + more, end + more + missing))
        more += missing
    if not more:
        return order, position, segments
    times = torch.tensor(repeats)
    moved = torch.cat([times.cumsum(0) - times, torch.tensor([len(order) + more])])  # where a row went, and the last
    return order.repeat_interleave(times, output_size=len(order) + more), moved[position], filled


def _blocks(segments: list[Segment], row_bytes: int) -> Iterator[tuple[int, int, list[Segment]]]:
    """Cut segments into ``(start, end, runs)``, where runs count rows from ``start``."""
    limit = BLOCK_BYTES // row_bytes  # rows of several experts together
    step = max(SPLIT_ROWS, limit)  # rows of one expert
    runs: list[Segment] = []
    start = 0
    for expert, first, last in segments:
        for begin in range(first, last, step):
            end = min(last, begin + step)
            if runs and end - start > limit:
                yield start, begin, runs
                runs = []
            start = start if runs else begin
            runs.append((expert, begin - start, end - start))
    if runs:
        yield start, start + runs[-1][2], runs


def _choose(dtype: torch.dtype, pairs: int, hit: int, roles: Sequence[Tensors], biased: bool) -> Method:
    """Pick the method from the mean number of rows of an expert; both tricks need weights dense in ``in``."""
    row_major = all(r[0].stride(-1) == 1 for r in roles if r)
    together = pairs > hit and not biased and all(_fits_grouped_mm(r) for r in roles if r)
    if dtype in (torch.bfloat16, torch.float16):
        if _native_gemm(dtype):
            keep = all(r[0].shape[-1] % NATIVE_BLOCK == 0 for r in roles if r)
        else:
            keep, together = row_major and pairs <= NATIVE_ROWS * hit, False
        if keep:
            return Method(dtype, grouped=together)
        dtype, together = torch.float32, False
    method = _by_rows(dtype, pairs, hit, row_major and _bytes(roles, dtype) >= _blas().least)
    return method._replace(grouped=together and not method.columns and dtype == torch.float32)


def _fits_grouped_mm(weight: Tensors) -> bool:
    """Whether ``F.grouped_mm`` takes a role, and rows to be multiplied by it: rows start on 16 bytes."""
    w = weight[0]
    per_vector = 16 // w.itemsize
    return is_stacked(weight) and w.stride(2) == 1 and not any(n % per_vector for n in (*w.stride()[:2], w.shape[2]))


def _bytes(roles: Sequence[Tensors], dtype: torch.dtype) -> int:
    return sum(r[0].numel() * len(r) for r in roles if r) * dtype.itemsize


def _by_rows(dtype: torch.dtype, pairs: int, hit: int, possible: bool) -> Method:
    columns = possible and hit < pairs <= _blas().columns * hit
    return Method(dtype, columns, repack=columns and pairs < STRIDED_ROWS * hit)


@cache
def _blas() -> Blas:
    """That of this CPU."""
    return BLAS.get(torch.backends.cpu.get_cpu_capability(), Blas())


@cache
def _native_gemm(dtype: torch.dtype) -> bool:
    """Whether this CPU and this build of PyTorch multiply ``dtype`` matrices without emulation."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name, lambda: False)())


_activation = lru_cache(maxsize=64)(Activation.from_args)


def _gelu(gate: Tensor) -> Tensor:
    """``F.gelu``, whose ``1 + erf(x)`` loses digits below zero in its vectorised form (AVX-512, torch 2.13)."""
    return torch.special.erfc(gate * -(0.5**0.5)).mul_(gate).mul_(0.5)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # each gives a fresh dense tensor
    "silu": F.silu, "gelu": _gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": torch.relu,
    "relu2": lambda gate: torch.relu(gate).square_(), "identity": torch.clone,
}


def _activate(act: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``act(gate, up)`` with fused kernels and few temporaries; the result is dense."""
    g = gate.clamp(max=act.gate_limit) if act.gate_limit < INF else gate
    a = _FUNCTIONS[act.name](g) if act.alpha == 1.0 else torch.sigmoid(g * act.alpha).mul_(g)
    if act.act_limit < INF:
        a.clamp_(max=act.act_limit)
    if up is None:
        return a
    u = up.clamp(-act.up_limit, act.up_limit) if act.up_limit < INF else up
    return a.mul_(u + act.up_offset if act.up_offset else u)


def _weighted_sum(
    rows: Tensor, position: Tensor, pairs: int, none_left_out: bool, weights: Tensor | None, top_k: int
) -> Tensor:
    """``[T, H]`` in the accumulation dtype, summed in the order of k; reads rows before ``pairs``, where others are."""
    total = len(position)
    wide = _accumulator(rows.dtype)
    if pairs == 0:  # embedding_bag wants at least one row
        return rows.new_zeros(total // top_k, rows.shape[1], dtype=wide)
    weights = None if weights is None else weights.reshape(-1).to(wide)
    skipped = None if none_left_out else pairs  # embedding_bag never reads its padding row
    bags = torch.arange(0, total, top_k)
    return torch.embedding_bag(rows.to(wide), position, bags, False, 0, False, weights, False, skipped)[0]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _router(
    logits: Tensor, top_k: int, score: str, renormalise: bool, eps: float, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_route(logits, top_k)
    return Router(score, renormalise, eps, scale).reference(logits, top_k, dtype)


implement("experts", _experts, "CPU")
implement("sort_pairs", _sort_pairs, "CPU")
implement("grouped_linear", _grouped_linear, "CPU")
implement("combine", _combine, "CPU")
implement("route", _router, "CPU")
