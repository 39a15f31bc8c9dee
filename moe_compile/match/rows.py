"""Rules for rows: those a mask picks for one expert, those a sort orders, and the weights gathered for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of, value
from . import gathered
from .engine import Engine, Rules, ids_of
from .facts import Coordinates, Filled, Gate, Index, Inverse, Picked, Range, Rows, Sum, Val, Wt, refuse
from .gathered import by_ids, is_token_range, per_token_by_ids
from .labels import Atom, Dim, flat_names, is_rows, is_token, is_vector, names, same
from .nodes import argument, aten, is_float, is_integer, normal_dim, rank
from .pairs import names_pair, token_major
from .routing import as_router_weight, token_count, top_k
from .row_weights import flat_weight, in_rows, lines_up, pair_weight, token_weight
from .slots import root_of
from .values import x_rows


def rows_of_mask(gate: Gate) -> Rows | None:
    """The row space that ``nonzero(mask)`` or ``x[mask]`` enumerates."""
    if gate.weight is not None or gate.expert is None or gate.rows is not None or "e" in flat_names(gate.dims):
        return None
    kind = "hit" if "k" in flat_names(gate.dims) or not gate.distinct else "hit_token"
    order = tuple(name for label in names(gate.dims) for name in label)
    return Rows(kind, gate.ids, gate.expert, (order,), gate.slot)


def _nonzero(engine: Engine, node: fx.Node) -> Any:
    """``where(mask)`` / ``nonzero(as_tuple=True)``: one index vector per dimension of the mask."""
    gate = engine.fact(node.args[0])
    if not isinstance(gate, Gate):
        return None
    rows = rows_of_mask(gate)
    if rows is None:
        return None
    out: list[Any] = []
    for dim in gate.dims:
        what = _coordinate(names((dim,))[0], rows.order[0], token_major(gate.dims))
        if what is None:
            return None
        out.append(Index(((Atom("r", _count(node)),),), rows, what))
    if node.target is aten.nonzero.default:
        return Coordinates(((Atom("r", _count(node)),), ()), tuple(out))
    return out


def _coordinate(label: tuple[str, ...], every: tuple[str, ...], ordered: bool) -> str | None:
    """What the index vector of a mask's dimension ``label`` counts, ``every`` being the labels of the whole mask."""
    if not label:
        return "zero"
    if label == ("k",):
        return "slot"
    if label == tuple(sorted(name for name in every if name != "k")):
        return "token"  # all tokens in one dimension, in their order
    return "pair" if ordered and label == every else None


def _count(node: fx.Node) -> Any:
    out = value(node)
    return out[0].shape[0] if isinstance(out, (list, tuple)) else out.shape[0]


def _column(engine: Engine, node: fx.Node) -> Any:
    """``nonzero(mask)[:, i]`` and ``unbind(1)`` / ``squeeze(-1)`` / ``view(-1)`` of one column."""
    fact = engine.fact(node.args[0])
    if not isinstance(fact, Coordinates):
        return None
    if node.target is aten.select.int and normal_dim(int(node.args[1]), 2) == 1:  # type: ignore[arg-type]
        index = node.args[2]
        return fact.columns[index] if isinstance(index, int) else None
    if node.target is aten.unbind.int and normal_dim(int(argument(node, 1, "dim", 0)), 2) == 1:
        return list(fact.columns)
    if len(fact.columns) == 1 and rank(node) == 1 and node.target is not aten.select.int:
        return fact.columns[0]
    return None


def names_token(engine: Engine, index: Index) -> bool:
    """Whether an index vector holds the token of each row (the only one where T = 1)."""
    return index.what == "token" or (index.what == "zero" and same(token_count(engine, index.rows.ids), 1))


def names_slot(engine: Engine, index: Index) -> bool:
    """Whether an index vector holds the slot of each row (the only one where K = 1)."""
    return index.what == "slot" or (index.what == "zero" and same(top_k(engine, index.rows.ids), 1))


def pick(fact: Val | Gate, dim: int, index: Index) -> Val | Gate | None:
    """``fact`` gathered along its token dimension by the tokens of ``index``'s rows."""
    label = fact.dims[dim]
    if label and not is_token(label):
        return None
    dims = (*fact.dims[:dim], index.dims[0], *fact.dims[dim + 1 :])
    if isinstance(fact, Val):
        if fact.rows is not None or "k" in flat_names(fact.dims) or "e" in flat_names(fact.dims):
            return None
        gate, gate_in = (None if g is None else in_rows(g, index.rows) for g in (fact.gate, fact.gate_in))
        return replace(fact, dims=dims, rows=index.rows, gate=gate, gate_in=gate_in)
    return None if fact.rows is not None else replace(in_rows(fact, index.rows), dims=dims, rows=index.rows)


def _index(engine: Engine, node: fx.Node) -> Any:
    """``x[tokens]``, ``x[None, tokens]``, ``x[mask]``, ``w[tokens, slots]``, ``weights[ids]`` and the like."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    where = [(i, n) for i, n in enumerate(indices) if isinstance(n, fx.Node)]
    facts = [engine.fact(n) for _, n in where]
    if len(where) == 1:
        ((dim, index),) = where
        fact = facts[0]
        if isinstance(fact, Index):
            return _by_rows(engine, node, source, dim, fact)
        if isinstance(fact, Gate) and dim == 0 and not is_integer(index):  # zeros and ones as row numbers, no mask
            return _by_mask(engine, node, source, fact)
        if isinstance(fact, Inverse) and dim == 0:
            return _unsort(engine, node, source, fact)
        return by_ids(engine, node, source, dim, index, fact)
    if len(where) == 2 and [i for i, _ in where] == [0, 1]:
        a, b = facts
        if isinstance(a, Index) and isinstance(b, Index) and names_token(engine, a) and names_slot(engine, b):
            return pair_weight(engine, node, source, a, b)
        if isinstance(a, Index) and isinstance(b, Index):
            raise refuse("MC207", "the router weights are indexed [slot, token], expected [token, slot]", node)
        if isinstance(a, Index) != isinstance(b, Index) and is_float(source):
            raise refuse("MC207", "the router weights are indexed by something else than token and slot", node)
        if isinstance(a, Range) and is_token_range(engine, a, where[1][1]):
            return per_token_by_ids(engine, node, source, where[1][1])
    return None


def _by_rows(engine: Engine, node: fx.Node, source: fx.Node, dim: int, index: Index) -> Any:
    fact = engine.fact(source)
    if not is_vector(index.dims) or rank(source) == 0:
        return None
    if (
        isinstance(fact, (Sum, Filled))
        and dim == 0
        and rank(source) == 2
        and names_token(engine, index)
        and _accumulates(fact, index.rows)
    ):
        return Picked(
            (index.dims[0], (Atom("f", shape_of(source)[-1]),)), engine.base(source), engine.version(source), index.rows
        )
    if dim == 0 and (index.what == "pair" or (index.what == "slot" and names_pair(engine, index))):
        return flat_weight(engine, node, source, index)
    if not names_token(engine, index) or not same(shape_of(source)[dim], token_count(engine, index.rows.ids)):
        return None
    if isinstance(fact, Gate):
        return pick(fact, dim, index)
    if dim == 0 and (picked := token_weight(engine, source, index.rows, index.dims[0])) is not None:
        return picked
    val = x_rows(engine, source)
    return pick(val, dim, index) if val is not None else None


def _by_mask(engine: Engine, node: fx.Node, source: fx.Node, mask: Gate) -> Any:
    rows = rows_of_mask(mask)
    if rows is None:
        return None
    n = len(mask.dims)
    row: Dim = (Atom("r", shape_of(node)[0]),)
    fact = engine.fact(source)
    shape = shape_of(source)
    if isinstance(fact, (Sum, Filled)) and "k" not in flat_names(mask.dims) and _accumulates(fact, rows):
        return Picked((row, (Atom("f", shape[-1]),)), engine.base(source), engine.version(source), rows)
    if "k" in flat_names(mask.dims) and fact is None and all(same(s, 1) for s in shape[n:]):
        dims = (*mask.dims, *(() for _ in shape[n:]))
        weight = as_router_weight(engine, source, Gate(dims, mask.ids), dims)
        gate = Gate((row, *dims[n:]), mask.ids, expert=mask.expert, weight=weight, rows=rows, summed=True)
        return None if weight is None else gate
    if isinstance(fact, Gate) and names(fact.dims[:n]) == names(mask.dims) and fact.rows is None:
        return replace(in_rows(fact, rows), dims=(row, *fact.dims[n:]), rows=rows)
    if n == 1 and (picked := token_weight(engine, source, rows, row)) is not None:
        return picked
    if not isinstance(fact, (Gate, Wt)):
        val = x_rows(engine, source)
        if val is not None and lines_up(val.dims[:n], mask.dims):
            return replace(val, dims=(row, *val.dims[n:]), rows=rows)
        if val is not None and not flat_names(val.dims) & {"k", "e", "r"}:
            raise refuse("MC207", "the mask picks rows that are not the tokens of its pairs", node)
    return None


def _accumulates(fact: Any, rows: Rows) -> bool:
    """Whether a sum is the one that rows of this routing are added to, not the value of an earlier layer."""
    ids = ids_of(fact)
    return ids is None or root_of(ids.node) is root_of(rows.ids.node)


def _unsort(engine: Engine, node: fx.Node, source: fx.Node, inverse: Inverse) -> Any:
    val = engine.fact(source)
    if not isinstance(val, Val) or val.rows != inverse.rows or not is_rows(val.dims):
        return None
    gate = val.gate
    if gate is not None:
        gate = replace(gate, rows=None)
    return replace(val, dims=(*inverse.dims, val.dims[1]), rows=None, gate=gate)


def _index_select(engine: Engine, node: fx.Node) -> Any:
    source, dim, index = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node) and isinstance(dim, int)
    fact = engine.fact(index)
    if isinstance(fact, Index):
        return _by_rows(engine, node, source, normal_dim(dim, rank(source)), fact)
    if isinstance(fact, Inverse) and dim == 0:
        return _unsort(engine, node, source, fact)
    return by_ids(engine, node, source, normal_dim(dim, rank(source)), index, fact)


RULES: Rules = {
    aten.where.default: _nonzero, aten.nonzero_numpy.default: _nonzero, aten.nonzero.default: _nonzero,
    aten.select.int: _column, aten.unbind.int: _column, aten.squeeze.dim: _column, aten.view.default: _column,
    aten.reshape.default: _column, aten.flatten.using_ints: _column, aten.squeeze.default: _column,
    aten.index.Tensor: _index, aten.index_select.default: _index_select,
    **gathered.RULES,
}  # fmt: skip
