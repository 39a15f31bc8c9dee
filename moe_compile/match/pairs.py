"""A buffer of one row per token-expert pair, filled expert by expert: each pair has one id, so each row is set once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of
from .engine import Engine
from .facts import Filled, Gate, Index, Rows, Unfinished, Val, refuse
from .labels import Atom, Dim, Dims, is_rows, names, same, size_of
from .routing import token_count, top_k
from .stack import stacked_values


def names_pair(engine: Engine, index: Index) -> bool:
    """Whether an index vector holds the flat number ``token * K + slot`` of each row."""
    if index.what == "slot":
        return same(token_count(engine, index.rows.ids), 1)
    return index.what == "pair" or (index.what == "token" and same(top_k(engine, index.rows.ids), 1))


def pair_dim(engine: Engine, rows: Rows) -> Dim:
    """The label of a dimension that runs over all pairs, slots within tokens."""
    label = (Atom("t0", token_count(engine, rows.ids)), Atom("k", top_k(engine, rows.ids)))
    return tuple(a for a in label if not same(a.size, 1))


def token_and_slot_dims(engine: Engine, rows: Rows) -> Dims:
    """The labels of a tensor indexed by token, then slot."""
    token, slot = Atom("t0", token_count(engine, rows.ids)), Atom("k", top_k(engine, rows.ids))
    return tuple(() if same(a.size, 1) else (a,) for a in (token, slot))


def token_major(dims: Dims) -> bool:
    """Whether dimensions run over tokens, then slots: the order in which pairs are counted."""
    order = [a for label in names(dims) for a in label]
    return order == sorted(order, key=lambda n: (n == "k", n)) and all(a == "k" or a[0] == "t" for a in order)


def assign(engine: Engine, node: fx.Node, target: fx.Node, into: Any, dims: Dims, rows: Rows, val: Val) -> Any:
    """``buffer[pairs of one expert] = expert(rows)`` into a fresh buffer ``[*dims, H]``, whatever it held before.

    Once the experts 0..n-1 were assigned, the buffer holds one output per pair, if every id is below n: that is
    proved at the end, as for weights gathered by the ids. Each state of the buffer keeps the experts so far.
    """
    base, version = engine.base(target), engine.version(target)
    shape = shape_of(target)
    pieces = engine.pieces.get((base, version), {} if isinstance(into, Filled) else None)
    if pieces is None or not engine.same_view(target, base) or len(shape) != len(dims) + 1 or not token_major(dims):
        return None
    if not all(same(size, size_of(label)) for size, label in zip(shape, dims, strict=False)):
        return None
    e = rows.expert
    if rows.kind != "hit" or rows.slot is not None or e is None:
        return None
    if val.rows != rows or not val.slots or not is_rows(val.dims):
        return None
    if e in pieces:
        raise refuse("MC208", f"rows of expert {e} are assigned twice", node)
    other = next(iter(pieces.values()), val)
    if other.rows is None or other.rows.ids != rows.ids or other.x != val.x:
        raise refuse("MC207", f"expert {e} is assigned by other ids or from another input than the first", node)
    pieces = {**pieces, e: val}
    engine.pieces[base, version + 1] = pieces
    out = (*dims, (Atom("f", shape[-1]),))
    if len(pieces) < 2 or sorted(pieces) != list(range(len(pieces))):
        return Unfinished(out, rows.ids)
    return _finished(node, [pieces[i] for i in range(len(pieces))], out, rows)


def _finished(node: fx.Node, vals: list[Val], dims: Dims, rows: Rows) -> Val:
    """One expression over all pairs, with each pair's own weights."""
    gates = {tuple(_without_rows(g, dims, node, e) for g in (v.gate, v.gate_in)) for e, v in enumerate(vals)}
    if len(gates) != 1:
        raise refuse("MC207", "the experts are weighted by different tensors", node)
    ((gate, gate_in),) = gates
    alike = [replace(v, dims=dims, rows=None, gate=None, gate_in=None, expert=None) for v in vals]
    val = stacked_values(node, alike, 0)
    experts = len(vals)
    slots = tuple(
        replace(s, weight=replace(s.weight, source="ids", ids=rows.ids, expert=experts))
        if s.weight.source == "axis"
        else s
        for s in val.slots
    )
    return replace(val, dims=dims, slots=slots, gate=gate, gate_in=gate_in, expert=experts)


def _without_rows(gate: Gate | None, dims: Dims, node: fx.Node, e: int) -> Gate | None:
    """The weight of every pair, of which ``gate`` is that of the pairs of expert ``e``."""
    if gate is None:
        return None
    if gate.expert != e or gate.slot is not None:
        raise refuse("MC208", f"rows of expert {e} are weighted for expert {gate.expert}", node)
    return replace(gate, dims=(*dims[:-1], ()), expert=None, rows=None)
