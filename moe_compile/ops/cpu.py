"""CPU implementations of ``torch.ops.moe_compile.*``: grouped, in plain PyTorch ops.

Shape legend: see ``spec.py``. Pairs are sorted by expert, and experts taken in blocks whose intermediate
rows stay in cache: first GEMMs, activation, second GEMMs (``cpu_gemm``). A weighted sum in a fixed order ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import INF, Activation, Router
from .cpu_gemm import Method, Projection, Routing, Segment, Tensors, blas, choose
from .cpu_order import Many, blocks, filled, grouped, invert, sort
from .schema import implement
from .validate import check_combine, check_experts, check_grouped_linear, check_ids, check_route


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


Build = Callable[[Routing], Layer]


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

        def layer(routing: Routing) -> Layer:
            method = choose(hidden_states.dtype, routing, (w1, w3, w2), (b1, b3, b2))
            first = [Projection(w, b, method) for w, b in ((w1, b1), (w3, b3)) if w]
            return Layer(first, Projection(w2, b2, method), act, interleaved, method, wide)

        run = _one_token if len(topk_ids) == 1 else _many_tokens
        out_dtype = out_dtype or hidden_states.dtype
        return run(layer, hidden_states, topk_weights, topk_ids, experts, weight_on_input, out_dtype)


def _one_token(
    layer: Build, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: int, on_input: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Decoding: no sort, no gather, since the host's own work counts here."""
    ids = topk_ids[0].tolist()
    valid = [k for k, expert in enumerate(ids) if 0 <= expert < experts]
    network = layer(Routing(len(valid), experts, hit=len(valid), most=1))
    scale = topk_weights.reshape(-1, 1).to(network.wide)  # [K, 1]
    scale = scale if len(valid) == len(ids) else scale[valid]
    rows = hidden_states * scale if on_input else hidden_states  # [n, H] or [1, H]
    result = network([(ids[k], row, row + 1) for row, k in enumerate(valid)], rows)  # [n, H]
    return (result.to(network.wide) if on_input else result * scale).sum(0, keepdim=True).to(out_dtype)


def _many_tokens(
    layer: Build, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: int, on_input: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    groups, top_k = grouped(topk_ids, experts), topk_ids.shape[1]
    network = layer(groups.routing)
    none_left_out = groups.routing.pairs == topk_ids.numel()
    placed = groups.evened() if network.method.batched else groups.sorted()
    if network.method.columns and blas().vector > 1:
        placed = filled(placed)
    order, position, segments = placed
    pairs = len(order)
    # The rows of pairs that count, and one row that stands for all others and is never read.
    result = torch.empty(pairs + 1, network.down.width, dtype=network.method.dtype)  # [S + 1, H]
    row_bytes = sum(p.width for p in network.first) * network.method.dtype.itemsize
    for start, end, runs in blocks(segments, row_bytes):
        rows = hidden_states.index_select(0, order[start:end] // top_k)  # [n, H]
        if on_input:
            rows = rows * topk_weights.reshape(-1, 1)[order[start:end]].to(network.wide)
        network(runs, rows, result[start:end])
    weights = None if on_input else topk_weights
    return _weighted_sum(result, position, pairs, none_left_out, weights, top_k, out_dtype)


def _sort_pairs(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    check_ids(topk_ids)
    key, order = sort(topk_ids, num_experts)
    offsets = torch.searchsorted(key, torch.arange(num_experts + 1, dtype=key.dtype), out_int32=True)
    return order.to(torch.int32), offsets


def _grouped_linear(rows: Tensor, weight: Tensors, bias: Tensors, offsets: Tensor) -> Tensor:
    with torch.no_grad():
        check_grouped_linear(rows, weight, bias, offsets)
        ends = offsets[1:].tolist()
        groups = Many(torch.arange(ends[-1]), ends)
        method = choose(rows.dtype, groups.routing, (weight,), (bias,))
        project = Projection(weight, bias, method)
        out = rows.new_empty(rows.shape[0], project.width)  # [P, out]
        order, position, segments = groups.evened() if method.batched else groups.sorted()
        result = out
        if method.batched:
            rows = rows.index_select(0, order)
            result = rows.new_empty(len(order), project.width)
        for start, end, runs in blocks(segments, project.width * method.dtype.itemsize):
            result[start:end] = project(runs, rows[start:end].to(method.dtype))
        if method.batched:
            torch.index_select(result, 0, position, out=out[: ends[-1]])
        out[ends[-1] :].zero_()
        return out


def _combine(
    rows: Tensor, order: Tensor, offsets: Tensor, topk_weights: Tensor | None, top_k: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    with torch.no_grad():
        check_combine(rows, order, offsets, topk_weights, top_k)
        pairs = int(offsets[-1])
        position = invert(order.to(torch.int64), pairs)
        none_left_out = pairs == len(order)
        return _weighted_sum(rows, position, pairs, none_left_out, topk_weights, top_k, out_dtype or rows.dtype)


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
    rows: Tensor, position: Tensor, pairs: int, none_left_out: bool, weights: Tensor | None, top_k: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """``[T, H]``, summed in the order of k in the accumulation dtype; reads rows before ``pairs``, where others are."""
    total = len(position)
    if pairs == 0:  # embedding_bag wants at least one row
        return rows.new_zeros(total // top_k, rows.shape[1], dtype=out_dtype)
    # Without a padding row embedding_bag accumulates half precision in float32 by itself.
    half = rows.dtype == out_dtype and (weights is None or weights.dtype == out_dtype)
    wide = out_dtype if half and none_left_out else _accumulator(rows.dtype)
    weights = None if weights is None else weights.reshape(-1).to(wide)
    skipped = None if none_left_out else pairs  # embedding_bag never reads its padding row
    bags = torch.arange(0, total, top_k)
    return torch.embedding_bag(rows.to(wide), position, bags, False, 0, False, weights, False, skipped)[0].to(out_dtype)


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
