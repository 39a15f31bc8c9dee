"""Sorted pairs through ``torch._grouped_mm``: HF's ``grouped_mm`` implementation and hand-written pipelines.

order = argsort(ids.flatten());  offs = cumsum(histc(ids))  (or bincount, one_hot sums, searchsorted)
y = _grouped_mm(act(_grouped_mm(x[order // K], w13.mT, offs)), w2.mT, offs) * w[order]
out = y[argsort(order)].view(T, K, H).sum(1)                      (or index_add_, scatter_add, an indexed store)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from moe_compile.canonical import shape_of, value
from moe_compile.match.engine import Engine, Rules
from moe_compile.match.facts import (
    Counts,
    Gate,
    Index,
    Inverse,
    Leaf,
    Range,
    Rows,
    SortedIds,
    Sum,
    Val,
    Wt,
    counts_pairs,
    refuse,
)
from moe_compile.match.labels import Atom, flat_names, names, same
from moe_compile.match.layer import Found, build, chosen_from
from moe_compile.match.nodes import ID_DTYPES, argument, aten, is_ids, is_integer, normal_dim, rank
from moe_compile.match.pairs import names_pair
from moe_compile.match.routing import token_count, top_k
from moe_compile.match.values import lift, linear_map, weight_leaf
from moe_compile.match.views import as_dtype
from moe_compile.spec import NoMatch

from ._examples import Layer


def _flat_ids(engine: Engine, node: fx.Node) -> Leaf | None:
    """``ids.view(-1)``: all pairs in token-major order."""
    if rank(node) != 1 or engine.fact(node) is not None:
        return None
    source = engine.strip(node)
    flat = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
    while source.target in flat and engine.unchanged(source):  # they may copy
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        source = engine.strip(inner)
    if rank(source) not in (1, 2) or not is_ids(source):
        return None
    return engine.ids_leaf(source, node)


def _rows(leaf: Leaf) -> Rows:
    return Rows("sorted", leaf)


def _label(node: fx.Node) -> Any:
    return ((Atom("r", shape_of(node)[0]),),)


def _sort(engine: Engine, node: fx.Node) -> Any:
    """sort and argsort of the flat ids (ascending), or of the order itself (its inverse)."""
    source = node.args[0]
    descending = node.kwargs.get("descending", False)
    if node.target in (aten.sort.default, aten.argsort.default) and len(node.args) > 2:
        descending = node.args[2]
    assert isinstance(source, fx.Node)
    if descending or rank(source) != 1:
        return None
    fact = engine.fact(source)
    argsort = node.target in (aten.argsort.default, aten.argsort.stable)
    if isinstance(fact, Index) and fact.what == "pair" and fact.rows.kind == "sorted":
        inverse = Inverse((_pair_label(engine, fact.rows.ids),), fact.rows)
        return inverse if argsort else [None, inverse]
    leaf = _flat_ids(engine, source)
    if leaf is None:
        return None
    out = _label(source)
    # Each sort has its own order within an expert, so the row space is tied to this node through its order.
    rows = replace(_rows(leaf), order=((node.name,),))
    index = Index(out, rows, "pair")
    return index if argsort else [SortedIds(out, rows), index]


def _pair_label(engine: Engine, ids: Leaf) -> Any:
    shape = shape_of(ids.node)
    label = [Atom("t0", shape[0]), *([Atom("k", shape[1])] if len(shape) > 1 else [])]
    return tuple(a for a in label if not same(a.size, 1))


def _divide(engine: Engine, node: fx.Node) -> Any:
    """``order // K``: the token of each sorted pair; ``order % K``: its slot."""
    fact, by = engine.fact(node.args[0]), node.args[1]
    if not isinstance(fact, Index) or not names_pair(engine, fact):
        return None
    if not same(by, top_k(engine, fact.rows.ids)):
        raise refuse("MC207", f"pairs are divided by {by}, but each token has {top_k(engine, fact.rows.ids)}", node)
    if node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode) and node.kwargs.get("rounding_mode") != "floor":
        return None
    return replace(fact, what="slot" if "remainder" in str(node.target) else "token")


def _take_ids(engine: Engine, node: fx.Node) -> Any:
    """``ids.view(-1)[order]``: the sorted ids; ``arange(T).repeat_interleave(K)[order]``: the tokens."""
    source, indices = node.args[0], node.args[1]
    if not isinstance(indices, (list, tuple)):
        indices = [node.args[2]]
    assert isinstance(source, fx.Node)
    if len(indices) != 1:
        return None
    order = engine.fact(indices[0])
    if not isinstance(order, Index) or order.what != "pair":
        return None
    fact = engine.fact(source)
    if isinstance(fact, Range) and fact.start == 0 and len(fact.dims) == 1:
        ids = order.rows.ids
        label = names(fact.dims)[0]
        each_k = label == ("i", "*") or (label == ("*",) and same(token_count(engine, ids), 1))
        each_k = each_k and same(fact.dims[0][-1].size, top_k(engine, ids))
        return replace(order, what="token") if each_k else None
    if fact is None and is_integer(source):
        leaf = _flat_ids(engine, source)
        if leaf == order.rows.ids and order.rows.kind == "sorted":
            return SortedIds(order.dims, order.rows)
    return None


def _count(engine: Engine, node: fx.Node) -> Any:
    """histc(ids, E, 0, E-1) and bincount(ids, minlength=E) as rows per expert."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    exact = (*ID_DTYPES, torch.float32, torch.float64)  # they hold every id
    while source.target in (aten.to.dtype, aten.contiguous.default) and isinstance(source.args[0], fx.Node):
        if value(source).dtype not in exact:
            return None
        source = source.args[0]
    fact = engine.fact(source)
    leaf = fact.rows.ids if isinstance(fact, SortedIds) else _flat_ids(engine, source)
    if leaf is None:
        return None
    if node.target is aten.histc.default:
        bins, low, high = argument(node, 1, "bins", 100), argument(node, 2, "min", 0), argument(node, 3, "max", 0)
        if low != 0 or high not in (bins - 1, bins):
            return None
        if high == bins:
            raise refuse("MC207", f"histc with {bins} bins over [0, {high}] mixes experts", node)
        return Counts(((Atom("e", bins),),), leaf)
    if argument(node, 1, "weights") is not None:
        return None
    return Counts(((Atom("e", argument(node, 2, "minlength", 0)),),), leaf)


def _slice_counts(engine: Engine, node: fx.Node) -> Any:
    """``bincount(ids, minlength=E)[:E]`` changes nothing when the ids lie in range."""
    fact = engine.fact(node.args[0])
    if not isinstance(fact, Counts) or argument(node, 2, "start") not in (None, 0) or argument(node, 4, "step", 1) != 1:
        return None
    end = argument(node, 3, "end")
    return replace(fact, dims=((Atom("e", end),),)) if isinstance(end, int) and end > 0 else None


def _sum_one_hot(engine: Engine, node: fx.Node) -> Any:
    """``one_hot(ids.view(-1), E).sum(0)``."""
    gate = engine.fact(node.args[0])
    dims = argument(node, 1, "dim")
    if not isinstance(gate, Gate) or not counts_pairs(gate) or dims is None:
        return None
    chosen = [normal_dim(d, len(gate.dims)) for d in ([dims] if isinstance(dims, int) else dims)]
    left = [d for i, d in enumerate(gate.dims) if i not in chosen]
    if names(tuple(left)) != (("e",),) or flat_names(gate.dims) - {"k", "e", "t0", "t1"}:
        return None
    if gate.distinct and chosen_from(engine, gate.ids.node) is None:
        return None  # an expert that a token names twice would count once
    return _of_dtype(Counts((left[0],), gate.ids), node)


def _of_dtype(counts: Counts, node: fx.Node) -> Any:
    """Counts in the dtype of ``node``, if it holds large numbers: ``sum`` and ``cumsum`` may cast."""
    return as_dtype(counts, value(node).dtype, node)


def _cumsum(engine: Engine, node: fx.Node) -> Any:
    fact = engine.fact(node.args[0])
    if isinstance(fact, Gate) and any(name.startswith("t") for name in flat_names(fact.dims)):
        raise refuse("MC209", "tokens are counted one by one per expert: they get places in bins of a fixed size", node)
    if isinstance(fact, Gate) and names(fact.dims) == (("e",),) and counts_pairs(fact):
        fact = Counts(fact.dims, fact.ids)  # T = 1: the one-hot rows were summed over the slots alone
    return _of_dtype(replace(fact, ends=True), node) if isinstance(fact, Counts) and not fact.ends else None


def _searchsorted(engine: Engine, node: fx.Node) -> Any:
    """``searchsorted(sorted_ids, arange(E), right=True)``: the ends; with ``arange(1, E+1)`` from the left likewise."""
    ids, span = engine.fact(node.args[0]), engine.fact(node.args[1])
    if not isinstance(ids, SortedIds) or not isinstance(span, Range):
        return None
    right = bool(node.kwargs.get("right", False)) or node.kwargs.get("side") == "right"
    if span.start != (0 if right else 1):
        raise refuse("MC207", "searchsorted gives the starts of the experts, not their ends", node)
    return Counts(((Atom("e", shape_of(node)[0]),),), ids.rows.ids, ends=True)


def _grouped_mm(engine: Engine, node: fx.Node) -> Any:
    rows, weight = node.args[0], node.args[1]
    offs = argument(node, 2, "offs")
    assert isinstance(rows, fx.Node) and isinstance(weight, fx.Node)
    ends = engine.fact(offs)
    val = engine.fact(rows)
    if not isinstance(val, Val) or val.rows is None:
        if isinstance(ends, Counts) and val is not None:  # of unknown rows the step that lost them says why
            raise refuse("MC207", "the rows of _grouped_mm are not the routed tokens in the order of the experts", node)
        return None
    if argument(node, 3, "bias") is not None:
        raise refuse("MC301", "_grouped_mm with its own bias", node)
    if val.rows.kind != "sorted":
        return None
    if not isinstance(ends, Counts) or not ends.ends or ends.ids != val.rows.ids:
        raise refuse("MC207", "the offsets of _grouped_mm are not the row counts of these sorted ids", node)
    w = engine.fact(weight)
    w = w if isinstance(w, Wt) else lift(engine, weight, weight_leaf)
    if not isinstance(w, Wt) or w.source != "axis" or names(w.dims[:1]) != (("e",),):
        return None
    experts = w.dims[0][0].size
    if ends.dims[0][0].size != experts:
        raise refuse("MC208", f"offsets for {ends.dims[0][0].size} experts, weights for {experts}", node)
    gathered = replace(w, dims=(val.dims[0], *w.dims[1:]), source="ids", ids=val.rows.ids, expert=experts)
    return linear_map(val, "ri", gathered, "rio", "ro", node)


RULES: Rules = {
    aten.sort.default: _sort, aten.sort.stable: _sort, aten.argsort.default: _sort, aten.argsort.stable: _sort,
    aten.floor_divide.default: _divide, aten.div.Tensor_mode: _divide, aten.div.Scalar_mode: _divide,
    aten.remainder.Scalar: _divide, aten.floor_divide.Scalar: _divide,
    aten.index.Tensor: _take_ids, aten.index_select.default: _take_ids,
    aten.histc.default: _count, aten.bincount.default: _count, aten.slice.Tensor: _slice_counts,
    aten.sum.dim_IntList: _sum_one_hot, aten.cumsum.default: _cumsum,
    aten.searchsorted.Tensor: _searchsorted,
    aten._grouped_mm.default: _grouped_mm,
}  # fmt: skip
ANCHORS = (
    aten.sum.dim_IntList, aten.index_add_.default, aten.index_add.default, aten.scatter_add_.default,
    aten.scatter_add.default, aten.einsum.default, aten.bmm.default, aten.matmul.default,
)  # fmt: skip


def late_rules() -> Rules:
    """Rules for ops that exist only once transformers is imported: its ``grouped_mm`` for other dtypes."""
    packet = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {} if packet is None else {packet.default: _grouped_mm}


class _Sorted(Layer):
    """Stacked weights, and the part that all variants share."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def pipeline(self, rows: Tensor, offs: Tensor) -> Tensor:
        """Two grouped GEMMs over sorted rows."""
        h = torch._grouped_mm(rows, self.w13.transpose(-2, -1), offs)
        gate, up = h.chunk(2, dim=-1)
        return torch._grouped_mm(F.silu(gate) * up, self.w2.transpose(-2, -1), offs)


class HistcInverse(_Sorted):
    """transformers 5 ``grouped_mm``: sort, histc, cumsum, an inverse permutation, a sum over the slots."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        sorted_ids, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(sorted_ids.float(), bins=self.experts, min=0, max=self.experts - 1)
        offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
        y = self.pipeline(x[order // self.top_k], offs) * w.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        return y[inverse].view(x.shape[0], self.top_k, -1).sum(dim=1).to(x.dtype)


class BincountIndexAdd(_Sorted):
    """argsort, bincount, and the weighted rows added back by ``index_add_``."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        order = ids.flatten().argsort(stable=True)
        token = order // self.top_k
        offs = ids.flatten().bincount(minlength=self.experts).cumsum(0).to(torch.int32)
        y = self.pipeline(x[token], offs) * w.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token, y.to(x.dtype))


class OneHotScatterAdd(_Sorted):
    """Counts as a sum of one-hot rows, ``scatter_add``."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        flat = ids.view(-1)
        order = torch.argsort(flat)
        token = torch.div(order, self.top_k, rounding_mode="floor")
        offs = F.one_hot(flat, self.experts).sum(0).cumsum(0).to(torch.int32)
        y = self.pipeline(x.index_select(0, token), offs) * w.view(-1).index_select(0, order).unsqueeze(-1)
        index = token.unsqueeze(-1).expand(-1, x.shape[-1])
        return torch.zeros_like(x).scatter_add(0, index, y)


class SearchSorted(_Sorted):
    """Offsets by ``searchsorted``, the inverse by a second argsort."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        order = torch.argsort(ids.view(-1), stable=True)
        sorted_ids = ids.view(-1)[order]
        ends = torch.arange(self.experts, device=x.device)
        offs = torch.searchsorted(sorted_ids, ends, right=True).to(torch.int32)
        y = self.pipeline(x[order // self.top_k], offs)
        y = y[torch.argsort(order)].view(x.shape[0], self.top_k, -1)
        return (y * w.unsqueeze(-1)).sum(dim=1)


EXAMPLES = (HistcInverse, BincountIndexAdd, OneHotScatterAdd, SearchSorted)


def match(engine: Engine, output: fx.Node, total: Sum) -> Found:
    """One part whose weights went through ``_grouped_mm``."""
    if len(total.parts) != 1 or not any("r" in flat_names(s.weight.dims) for s in total.parts[0].val.slots):
        raise NoMatch("MC200", "no grouped GEMM over sorted pairs", output)
    return build(engine, output, total, "grouped_mm")
