"""Rules for operations that only move elements: they relabel dimensions and keep the fact."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..canonical import known_size, shape_of, value
from .engine import Engine, Rules
from .facts import (
    Coordinates,
    Counts,
    Fact,
    Filled,
    Gate,
    Ids,
    Index,
    Inverse,
    Masked,
    Picked,
    Range,
    SortedIds,
    Sum,
    Val,
    Wt,
    refuse,
)
from .labels import Atom, Dim, Dims, atom, regroup, same
from .nodes import FLOATS, ID_DTYPES, argument, aten, normal_dim

_COUNTING = (torch.int32, torch.int64, torch.float32, torch.float64)  # they hold every number of a row


def _through(engine: Engine, node: fx.Node) -> Fact | None:
    """Values unchanged: clone, contiguous, detach."""
    return _first(engine, node)


def _first(engine: Engine, node: fx.Node) -> Any:
    fact = engine.fact(node.args[0])
    return None if isinstance(fact, Coordinates) else fact  # a matrix of numbers: its columns have their own rule


def cast(engine: Engine, node: fx.Node) -> Fact | None:
    """A cast keeps the meaning when it goes to a float type of 16 bits or more, or between integers."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return as_dtype(_first(engine, node), value(node).dtype, source)


def as_dtype(fact: Any, dtype: torch.dtype, source: fx.Node) -> Any:
    """The fact of ``source.to(dtype)``, whose elements must be the same numbers, or rounded ones of a float type."""
    if isinstance(fact, (Val, Sum, Picked)):
        x = fact.buffer if isinstance(fact, Picked) else (fact if isinstance(fact, Val) else fact.parts[0].val).x.node
        narrow = dtype is torch.float16 and value(x).dtype is not torch.float16  # 1e5 would become infinite
        number = value(source).dtype in FLOATS  # truth values add up to one, not to two
        return fact if number and dtype in FLOATS and not narrow else None
    if isinstance(fact, Ids):
        return fact if dtype in ID_DTYPES else None
    if isinstance(fact, Wt):  # weights in another precision are other weights
        return fact if dtype == value(source).dtype else None
    if isinstance(fact, Gate):
        if fact.weight is not None and dtype not in FLOATS:
            return None
        truth = dtype is torch.bool
        once = truth and fact.summed and not fact.boolean  # a token that names the expert twice counts once
        return replace(fact, boolean=fact.boolean and truth, distinct=fact.distinct or once)
    if isinstance(fact, Filled):
        return fact if fact.number in (None, 0, 1) or dtype in FLOATS else None
    if isinstance(fact, Masked):
        return fact if dtype in FLOATS else None
    if isinstance(fact, (Index, SortedIds, Inverse, Counts, Range)):
        return fact if dtype in _COUNTING else None
    return None


def _view(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    dims = regroup(fact.dims, shape_of(node)) if fact is not None else None
    return fact.with_dims(dims) if dims is not None else None


def _permute(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    if fact is None:
        return None
    order = argument(node, 1, "dims")
    return fact.with_dims(tuple(fact.dims[normal_dim(int(d), len(fact.dims))] for d in order))


def _transpose(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    if fact is None:
        return None
    n = len(fact.dims)
    if node.target in (aten.t.default, aten.numpy_T.default):
        return fact.with_dims(tuple(reversed(fact.dims)))
    a, b = (-2, -1) if node.target is aten.mT.default else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
    dims = list(fact.dims)
    a, b = normal_dim(a, n), normal_dim(b, n)
    dims[a], dims[b] = dims[b], dims[a]
    return fact.with_dims(tuple(dims))


def _unsqueeze(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    if fact is None:
        return None
    at = normal_dim(int(node.args[1]), len(fact.dims) + 1)  # type: ignore[arg-type]
    return fact.with_dims((*fact.dims[:at], (), *fact.dims[at:]))


def _squeeze(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    if fact is None:
        return None
    n = len(fact.dims)
    where = argument(node, 1, "dim")
    chosen = range(n) if where is None else [where] if isinstance(where, int) else where
    drop = {normal_dim(int(d), n) for d in chosen}
    drop = {d for d in drop if same(shape_of(node.args[0])[d], 1)}  # type: ignore[arg-type]
    return fact.with_dims(tuple(d for i, d in enumerate(fact.dims) if i not in drop))


def expand_dims(dims: Dims, shape: tuple[Any, ...]) -> Dims:
    """Labels after ``expand``: a size-one dimension that grows becomes a wildcard copy."""
    dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple((Atom("*", s),) if not d and not same(s, 1) else d for d, s in zip(dims, shape, strict=True))


def _expand(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    return None if fact is None else fact.with_dims(expand_dims(fact.dims, shape_of(node)))


def repeat_dims(dims: Dims, node: fx.Node) -> Dims | None:
    """Labels after ``repeat(...)`` or ``repeat_interleave(n, dim)`` with plain numbers."""
    shape = shape_of(node)
    if node.target is aten.repeat_interleave.self_int:
        count, dim = node.args[1], argument(node, 2, "dim")
        if dim is None:
            if len(dims) != 1:
                return None
            dim = 0
        if same(count, 1):
            return dims
        d = normal_dim(int(dim), len(dims))
        return (*dims[:d], (*dims[d], Atom("*", count)), *dims[d + 1 :])
    dims = ((),) * (len(shape) - len(dims)) + dims
    counts = node.args[1]
    assert isinstance(counts, (list, tuple))
    return tuple(d if same(c, 1) else (Atom("*", c), *d) for d, c in zip(dims, counts, strict=True))


def _repeat(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    dims = repeat_dims(fact.dims, node) if fact is not None else None
    return fact.with_dims(dims) if dims is not None else None


def take(fact: Any, dim: int, start: int, stop: int, step: int) -> Fact | None:
    """``fact[..., start:stop:step, ...]`` along one dimension with known bounds; None when it has no meaning."""
    label: Dim = fact.dims[dim]
    if len(label) != 1:
        return None
    name, size = label[0].name, label[0].size
    count = len(range(start, stop, step))
    rest = (Atom(name, count),) if count != 1 else ()
    dims = (*fact.dims[:dim], rest, *fact.dims[dim + 1 :])
    if isinstance(size, int) and count == size:
        return fact  # the whole of it
    if isinstance(fact, Gate) and name == "e" and count == 1 and fact.expert is None:
        return replace(fact, dims=dims, expert=start)
    if isinstance(fact, Gate) and name == "k" and count == 1 and fact.weight is None and fact.rows is None:
        return replace(fact, dims=dims, slot=start, summed=True)
    if isinstance(fact, Wt):
        if name == "e" and fact.source == "axis" and count == 1:
            return replace(fact, dims=dims, source="row", expert=start)
        if name in ("w0", "w1") and fact.cut is None and fact.source != "ids":
            return replace(fact, dims=dims, cut=(name, start, stop, step))
    if isinstance(fact, Val) and isinstance(size, int):
        if name == "f":
            return replace(fact, dims=dims, expr=("cut", start, stop, step, fact.expr))
        if count == 1 and name in ("fo", "fi"):
            # One half (outer) or every n-th (inner) of a split feature dimension.
            outer, inner = (next(a.size for d in fact.dims for a in d if a.name == n) for n in ("fo", "fi"))
            others = tuple(tuple(Atom("f", a.size) if a.name in ("fo", "fi") else a for a in d) for d in dims)
            if name == "fo":
                cut = (start * inner, (start + 1) * inner, 1)
            else:
                cut = (start, outer * inner, inner)
            return replace(fact, dims=others, expr=("cut", *cut, fact.expr))
    return None


def _drop(fact: Any, dim: int) -> Any:
    return fact.with_dims((*fact.dims[:dim], *fact.dims[dim + 1 :]))


def _select(engine: Engine, node: fx.Node) -> Fact | None:
    source, dim, index = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    fact = engine.fact(source)
    if fact is None:
        fact = stacked_parameter(engine, source)
    if fact is None or isinstance(fact, Coordinates) or not isinstance(index, int):
        return None
    dim = normal_dim(dim, len(fact.dims))
    size = shape_of(source)[dim]
    if not isinstance(size, int):
        return None
    index = index % size
    if not fact.dims[dim]:
        return _drop(fact, dim)
    taken = take(fact, dim, index, index + 1, 1)
    return None if taken is None else _drop(taken, dim)


def stacked_parameter(engine: Engine, node: fx.Node) -> Wt | None:
    """A parameter ``[E, ..]`` (possibly seen through views) as the weight of every expert."""
    if not engine.is_param(node):
        return None
    shape = shape_of(node)
    if len(shape) not in (2, 3) or not all(isinstance(s, int) for s in shape):
        return None
    labels = ("e", "w0", "w1")[: len(shape)]
    dims = tuple((Atom(n, s),) for n, s in zip(labels, shape, strict=True))
    return Wt(dims, engine.leaf(node), "axis")


def _slice(engine: Engine, node: fx.Node) -> Fact | None:
    fact = _first(engine, node)
    if fact is None:
        return None
    dim = normal_dim(int(argument(node, 1, "dim", 0)), len(fact.dims))
    size = shape_of(node.args[0])[dim]  # type: ignore[arg-type]
    start, stop, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    if not isinstance(size, int):
        whole = (start in (None, 0)) and step == 1 and same(shape_of(node)[dim], size)
        return fact if whole else None
    if not all(isinstance(v, int) or v is None for v in (start, stop, step)):
        return None
    begin, end, stride = slice(start, stop, step).indices(size)
    return take(fact, dim, begin, end, stride)


def _pieces(node: fx.Node) -> list[tuple[int, int]] | None:
    """The (start, stop) of every output of chunk, split and unbind."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = normal_dim(int(argument(node, 1 if node.target is aten.unbind.int else 2, "dim", 0)), len(shape_of(source)))
    at, out = 0, []
    for piece in value(node):
        width = 1 if node.target is aten.unbind.int else known_size(piece.shape[dim])
        if not isinstance(width, int):
            return None
        out.append((at, at + width))
        at += width
    return out


def _multi(engine: Engine, node: fx.Node) -> list[Any] | None:
    """chunk, split, unbind: one fact per output, kept as a list for ``getitem``."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    fact = _first(engine, node)
    if fact is None and node.target is aten.unbind.int:
        fact = stacked_parameter(engine, source)
    pieces = _pieces(node)
    if fact is None or pieces is None:
        return None
    unbind = node.target is aten.unbind.int
    dim = normal_dim(int(argument(node, 1 if unbind else 2, "dim", 0)), len(fact.dims))
    facts: list[Any] = []
    for start, stop in pieces:
        taken = take(fact, dim, start, stop, 1) if fact.dims[dim] else fact
        facts.append(_drop(taken, dim) if unbind and taken is not None else taken)
    return facts


def _getitem(engine: Engine, node: fx.Node) -> Any:
    source, index = node.args
    facts = engine.fact(source)
    return facts[index] if isinstance(facts, list) else None  # type: ignore[index]


def _fresh(number: float | None) -> Any:
    def rule(engine: Engine, node: fx.Node) -> Fact | None:
        shape = shape_of(node)
        return Filled(tuple((Atom("?", s),) for s in shape), number)

    return rule


def _full(engine: Engine, node: fx.Node) -> Fact | None:
    at = 2 if node.target is aten.new_full.default else 1
    number = argument(node, at, "fill_value")
    return _fresh(float(number))(engine, node) if isinstance(number, (int, float)) else None


def _zero_(engine: Engine, node: fx.Node) -> Fact | None:
    return _fresh(0.0)(engine, node)


def _fill_(engine: Engine, node: fx.Node) -> Fact | None:
    number = node.args[1]
    return _fresh(float(number))(engine, node) if isinstance(number, (int, float)) else None


def _arange(engine: Engine, node: fx.Node) -> Fact | None:
    (size,) = shape_of(node)
    start = 0 if node.target is aten.arange.default else node.args[0]
    if node.target is aten.arange.start_step and argument(node, 2, "step", 1) != 1:
        return None
    exact = value(node).dtype in _COUNTING
    return Range((atom("i", size),), start) if isinstance(start, int) and exact else None


def _dropout(engine: Engine, node: fx.Node) -> Fact | None:
    """Dropout is the identity outside training or at p = 0."""
    p, train = argument(node, 1, "p"), argument(node, 2, "train")
    if train is False or p == 0:
        return _first(engine, node)
    if isinstance(engine.fact(node.args[0]), Val):
        raise refuse("MC205", f"dropout with p={p} inside an expert is random", node)
    return None


RULES: Rules = {
    aten.clone.default: _through, aten.contiguous.default: _through, aten.detach.default: _through,
    aten.alias.default: _through, aten.lift_fresh_copy.default: _through, aten.to.device: cast,
    aten.to.dtype: cast, aten.to.dtype_layout: cast, aten._to_copy.default: cast, aten.type_as.default: cast,
    aten.to.other: cast,
    aten.view.default: _view, aten.reshape.default: _view, aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view, aten.unflatten.int: _view, aten.view_as.default: _view,
    aten.permute.default: _permute, aten.transpose.int: _transpose, aten.t.default: _transpose,
    aten.mT.default: _transpose, aten.numpy_T.default: _transpose, aten.swapaxes.default: _transpose,
    aten.swapdims.default: _transpose,
    aten.unsqueeze.default: _unsqueeze, aten.squeeze.dim: _squeeze, aten.squeeze.default: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand, aten.expand_as.default: _expand, aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat,
    aten.select.int: _select, aten.slice.Tensor: _slice,
    aten.chunk.default: _multi, aten.split.Tensor: _multi, aten.split_with_sizes.default: _multi,
    aten.split.sizes: _multi, aten.unbind.int: _multi,
    operator.getitem: _getitem,
    aten.zeros_like.default: _fresh(0.0), aten.zeros.default: _fresh(0.0), aten.new_zeros.default: _fresh(0.0),
    aten.empty_like.default: _fresh(None), aten.empty.memory_format: _fresh(None),
    aten.new_empty.default: _fresh(None),
    aten.full.default: _full, aten.full_like.default: _full, aten.new_full.default: _full,
    aten.zero_.default: _zero_, aten.fill_.Scalar: _fill_,
    aten.arange.default: _arange, aten.arange.start: _arange, aten.arange.start_step: _arange,
    aten.dropout.default: _dropout,
}  # fmt: skip
