"""Rules for rows in expert order that are cut into one group per expert, and joined again (``loops.marks``).

Also for lists of the experts that were hit: ``nonzero(counts > 0)``, ``unique(ids)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import fx

from ..canonical import shape_of, value
from ..loops import marks
from .engine import Engine, Rules
from .facts import Counts, Fact, Filled, Gate, Index, Leaf, Rows, Val, counts_pairs, refuse
from .labels import Atom, flat_names, is_rows, names, same
from .layer import chosen_from
from .nodes import argument, aten, holds_ids
from .routing import ids_dims
from .scatter import _scatter_add
from .stack import merge_weights
from .values import renumber


@dataclass(frozen=True)
class HitMask(Fact):
    """``[E]``: whether an expert has a pair. E may be less than the number of experts that ids name."""

    ids: Leaf


@dataclass(frozen=True)
class Hits(Fact):
    """The ids of the experts that have a pair, each once, among the first ``experts`` (None: all)."""

    ids: Leaf
    experts: int | None = None


def counts_of(engine: Engine, fact: Any) -> Counts | None:
    """A value as rows per expert; of a single token the gates of its experts are that, with nothing left to sum."""
    if isinstance(fact, Gate) and names(fact.dims) == (("e",),) and counts_pairs(fact):
        if fact.distinct and chosen_from(engine, fact.ids.node) is None:
            return None
        return Counts(fact.dims, fact.ids)
    return fact if isinstance(fact, Counts) else None


def _segment(engine: Engine, node: fx.Node) -> Any:
    """Rows in sorted order -> the rows of one expert."""
    source, sizes, index, running = node.args
    counts, fact = counts_of(engine, engine.fact(sizes)), engine.fact(source)
    order = getattr(fact, "rows", None)
    if not isinstance(fact, (Val, Index, Gate)) or order is None or order.kind != "sorted":
        return None
    if not isinstance(counts, Counts) or counts.ids != order.ids or counts.ends != running:
        raise refuse("MC207", "rows are cut by numbers that are not the row counts of these sorted ids", node)
    experts = counts.dims[0][0].size if counts.dims[0] else 1
    assert isinstance(index, int)
    if not isinstance(experts, int) or not 0 <= index < experts:
        raise refuse("MC208", f"group {index} of {experts} groups of rows", node)
    if names(fact.dims[:1]) != (("r",),) or "e" in flat_names(fact.dims):
        return None
    rows = Rows("hit", order.ids, index, order.order, grouped=True)
    dims = ((Atom("r", shape_of(node)[0]),), *fact.dims[1:])
    if isinstance(fact, Index):
        return replace(fact, dims=dims, rows=rows)
    if isinstance(fact, Gate):
        return replace(fact, dims=dims, rows=rows, expert=index)
    gate = replace(fact.gate, rows=rows, expert=index) if fact.gate is not None else None
    inner = replace(fact.gate_in, rows=rows, expert=index) if fact.gate_in is not None else None
    return replace(fact, dims=dims, rows=rows, gate=gate, gate_in=inner)


def _join(engine: Engine, node: fx.Node) -> Any:
    """What every expert made of its group, one after the other: rows in sorted order again."""
    parts, like = node.args
    assert isinstance(parts, (list, tuple))
    vals, source = [engine.fact(p) for p in parts], engine.fact(like)
    if not all(isinstance(v, Val) and v.slots and v.rows is not None for v in vals):
        return None
    order = getattr(source, "rows", None)
    if order is None or order.kind != "sorted":
        return None
    return _in_order(node, vals, order)


def _in_order(node: fx.Node, vals: Sequence[Val], order: Rows) -> Val | None:
    """The rows of all experts in sorted order, from the group of each."""
    first = vals[0]
    for e, v in enumerate(vals):
        if v.rows != Rows("hit", order.ids, e, order.order, grouped=True):
            raise refuse("MC208", f"the rows of expert {e} are not those of group {e}", node)
        if v.x != first.x or v.expr != first.expr or len(v.slots) != len(first.slots):
            raise refuse("MC201", f"expert {e} computes something else than expert 0", node)
        if v.gate is not None or v.gate_in is not None or not is_rows(v.dims):
            return None
        if any(a.transposed != b.transposed for a, b in zip(v.slots, first.slots, strict=True)):
            raise refuse("MC201", "some experts' weights are transposed and others are not", node)
    row = (Atom("r", shape_of(node)[0]),)
    slots = []
    for n, slot in enumerate(first.slots):
        weight = merge_weights([v.slots[n].weight for v in vals], node)
        weight = replace(weight, dims=(row, *weight.dims[1:]), source="ids", ids=order.ids, expert=len(vals))
        slots.append(replace(slot, weight=weight))
    expr = renumber(first.expr, list(range(len(slots))))
    return replace(first, dims=(row, first.dims[1]), rows=order, slots=tuple(slots), expr=expr)


@dataclass(frozen=True)
class Stored(Fact):
    """A fresh buffer of one row per pair, with what the first experts made of their groups."""

    vals: tuple[Val, ...]


def _store(engine: Engine, node: fx.Node) -> Any:
    """``y[start:end] = rows``: group after group, the rows of all experts."""
    buffer, source, sizes, index, running = node.args
    assert isinstance(buffer, fx.Node) and isinstance(source, fx.Node)
    fact, val, counts = engine.fact(buffer), engine.fact(source), counts_of(engine, engine.fact(sizes))
    if not isinstance(fact, (Filled, Stored)) or not isinstance(val, Val) or not val.slots or val.rows is None:
        return None
    if len(buffer.users) > 1:
        raise refuse("MC204", "the buffer of the experts' rows is read or written elsewhere meanwhile", node)
    vals = (*(fact.vals if isinstance(fact, Stored) else ()), val)
    row, width = shape_of(buffer)[0], shape_of(buffer)[1:]
    if value(buffer).dtype != value(source).dtype or not all(map(same, width, shape_of(source)[1:])):
        raise refuse("MC302", "the buffer of the experts' rows has another dtype or width than they", node)
    if counts is None or counts.ids != val.rows.ids or counts.ends != running or index != len(vals) - 1:
        raise refuse("MC207", f"group {index} of rows is stored at another place than it comes from", node)
    if not same(row, prod(shape_of(val.rows.ids.node))):
        raise refuse("MC207", "the buffer of the experts' rows has more or fewer rows than there are pairs", node)
    if len(vals) < counts.dims[0][0].size:
        return Stored(fact.dims, vals)
    return _in_order(node, vals, Rows("sorted", val.rows.ids, order=val.rows.order))


def _listed(engine: Engine, node: fx.Node) -> Any:
    """Numbers fetched to the host: what their tensor meant then. Lists of lists index otherwise than a matrix does."""
    fact = engine.fact(node.args[0])
    if isinstance(fact, (Index, Gate)) and len(fact.dims) != 1:
        return None
    return fact if isinstance(fact, (Index, Hits, Counts, Gate)) else None


def _positive(engine: Engine, node: fx.Node) -> Any:
    """``counts > 0``, ``counts != 0``."""
    fact = counts_of(engine, engine.fact(node.args[0]))
    bound = 1 if node.target is aten.ge.Scalar else 0
    if fact is None or fact.ends or node.args[1] != bound:
        return None
    return HitMask(fact.dims, fact.ids)


def _hit_list(engine: Engine, node: fx.Node) -> Any:
    """``nonzero`` of the experts that have a pair."""
    fact = engine.fact(node.args[0])
    fact = fact if isinstance(fact, HitMask) else counts_of(engine, fact)
    if fact is None or (isinstance(fact, Counts) and fact.ends) or names(fact.dims) != (("e",),):
        return None
    experts = fact.dims[0][0].size
    if node.target in (aten.where.default, aten.nonzero_numpy.default):
        return [Hits(((),), fact.ids, experts)]
    return Hits(((), ()), fact.ids, experts)


def _any_pair(engine: Engine, node: fx.Node) -> Any:
    """``one_hot(ids).any(dims)`` over tokens and slots."""
    gate = engine.fact(node.args[0])
    if not isinstance(gate, Gate) or not counts_pairs(gate) or argument(node, 2, "keepdim", False):
        return None
    where = argument(node, 1, "dim")
    dims = [where] if isinstance(where, int) else list(where or ())
    chosen = {d % len(gate.dims) for d in dims}
    left = tuple(d for i, d in enumerate(gate.dims) if i not in chosen)
    return HitMask(left, gate.ids) if names(left) == (("e",),) else None


def _unique(engine: Engine, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    found = ids_dims(engine, source)
    if found is None:
        return None
    return [Hits(((),), found[0]), None, None]


def _of_hits(engine: Engine, node: fx.Node) -> Any:
    """Views of a list of hit experts."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    fact = engine.fact(source)
    if isinstance(fact, HitMask):
        return fact if len(shape_of(node)) == 1 else None
    return fact if isinstance(fact, Hits) and holds_ids(node) else None


def _scatter_reduce(engine: Engine, node: fx.Node) -> Any:
    """``scatter_reduce_(0, tokens, rows, "sum")``: the same as ``scatter_add_``."""
    if argument(node, 4, "reduce") != "sum" or argument(node, 5, "include_self", True) is not True:
        return None
    return _scatter_add(engine, node)


RULES: Rules = {
    marks.segment: _segment, marks.join: _join, marks.store: _store, marks.listed: _listed,
    aten.gt.Scalar: _positive, aten.greater.Scalar: _positive, aten.ne.Scalar: _positive, aten.ge.Scalar: _positive,
    aten.not_equal.Scalar: _positive,
    aten.nonzero.default: _hit_list, aten.where.default: _hit_list, aten.nonzero_numpy.default: _hit_list,
    aten.argwhere.default: _hit_list,
    aten.any.dim: _any_pair, aten.any.dims: _any_pair,
    aten._unique2.default: _unique,
    aten.view.default: _of_hits, aten.reshape.default: _of_hits, aten.squeeze.dim: _of_hits,
    aten.squeeze.default: _of_hits, aten.flatten.using_ints: _of_hits, aten.to.dtype: _of_hits,
    aten.scatter_reduce_.two: _scatter_reduce, aten.scatter_reduce.two: _scatter_reduce,
}  # fmt: skip
