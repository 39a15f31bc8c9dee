"""The router weight (and the repeated token) of each picked row: by token, by token and slot, or by pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of
from .engine import Engine
from .facts import Gate, Index, RouterWeight, Rows, Val, refuse
from .labels import Dim, Dims, same, size_of
from .nodes import is_float, rank
from .pairs import token_major
from .routing import token_count, top_k
from .slots import dense_column, of_one_slot
from .values import lift, x_leaf


def in_rows(gate: Gate, rows: Rows) -> Gate:
    """A token that names the expert twice may stand in two rows, each with the sum of both weights."""
    several = rows.per_pair or rows.slot is not None
    return replace(gate, distinct=gate.distinct or (gate.summed and several))


def token_weight(engine: Engine, source: fx.Node, rows: Rows, row: Dim) -> Gate | None:
    """``w[:, k][tokens]``, ``w[mask, k]``: the weight of the one slot; ``probs[mask, e]``: that of the expert."""
    shape, tokens = shape_of(source), token_count(engine, rows.ids)
    if not is_float(source) or any(not same(s, 1) for s in shape[1:]) or not same(shape[0], tokens):
        return None
    dims = (row, *(() for _ in shape[1:]))
    weight = dense_column(engine, source, rows, tokens)
    if weight is None and (engine.fact(source) is not None or not of_one_slot(rows, top_k(engine, rows.ids))):
        return None
    return Gate(
        dims,
        rows.ids,
        weight=weight or RouterWeight(engine.flat_leaf(source)),
        expert=rows.expert,
        summed=True,
        rows=rows,
        slot=rows.slot,
        distinct=rows.kind == "hit_token",
    )


def pair_weight(engine: Engine, node: fx.Node, source: fx.Node, token: Index, slot: Index) -> Any:
    if token.rows != slot.rows:
        raise refuse("MC207", "tokens and slots come from different masks", node)
    if engine.fact(source) is not None and not isinstance(engine.fact(source), Val):
        return None
    shape = shape_of(source)
    ids = token.rows.ids
    tail = shape[2:]
    if not is_float(source) or any(not same(s, 1) for s in tail):
        return None
    if not same(shape[1], top_k(engine, ids)) or not same(shape[0], token_count(engine, ids)):
        return None
    dims = (token.dims[0], *(() for _ in tail))
    weight = RouterWeight(engine.flat_leaf(source))
    return Gate(dims, ids, weight=weight, expert=token.rows.expert, summed=True, rows=token.rows)


def flat_weight(engine: Engine, node: fx.Node, source: fx.Node, index: Index) -> Any:
    """``w.view(-1)[order]``: the weight of each sorted pair; ``x`` repeated per pair likewise."""
    fact = engine.fact(source)
    if fact is None and is_float(source) and rank(source) <= 2 and all(same(s, 1) for s in shape_of(source)[1:]):
        ids = index.rows.ids
        k = top_k(engine, ids)
        if same(shape_of(source)[0], token_count(engine, ids) * k):
            dims = (index.dims[0], *(() for _ in shape_of(source)[1:]))
            weight = RouterWeight(engine.flat_leaf(source))
            return Gate(dims, ids, weight=weight, expert=index.rows.expert, summed=True, rows=index.rows)
    val = fact if isinstance(fact, Val) and fact.expr == ("x",) else None
    val = lift(engine, source, x_leaf) if fact is None else val
    if isinstance(val, Val) and val.rows is None and len(val.dims) == 2:
        label = val.dims[0]
        k = top_k(engine, index.rows.ids)
        if label and label[-1].name == "*" and same(label[-1].size, k) and all(a.name[0] == "t" for a in label[:-1]):
            gate, gate_in = (None if g is None else in_rows(g, index.rows) for g in (val.gate, val.gate_in))
            dims = (index.dims[0], val.dims[1])
            return replace(val, dims=dims, rows=index.rows, gate=gate, gate_in=gate_in)
    return None


def lines_up(dims: Dims, mask: Dims) -> bool:
    """Whether a value stands once per token of a mask, and is copied along its slots."""
    tokens, copies = ([a for d in dims for a in d if (a.name == "*") is copied] for copied in (False, True))
    counted, slots = ([a for d in mask for a in d if (a.name == "k") is slot] for slot in (False, True))
    if len(copies) != len(slots) or not all(same(a.size, b.size) for a, b in zip(copies, slots, strict=True)):
        return False
    if not token_major(mask) or [a for d in dims for a in d] != [*tokens, *copies]:
        return False  # copies of a token stand beside each other
    if not all(a.name.startswith("t") for a in tokens):
        return False
    return same(size_of(tuple(tokens)), size_of(tuple(counted)))
