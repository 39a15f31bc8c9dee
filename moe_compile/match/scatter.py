"""Rules for expert outputs that are written into a buffer: scattered sums, masked and indexed assignment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of
from .engine import Engine, Rules
from .facts import Filled, Gate, Index, Inverse, Part, Picked, Range, RouterWeight, Rows, Sum, Val, refuse
from .gathered import is_token_range
from .labels import Atom, Dims, fits, flat_names, is_rows, is_vector, names, same, token_dims
from .nodes import argument, aten, is_float, is_integer, normal_dim, rank, writes
from .pairs import assign, names_pair, pair_dim, token_and_slot_dims
from .routing import ids_dims, token_count, top_k
from .rows import names_slot, names_token, rows_of_mask


def _index_add(engine: Engine, node: fx.Node) -> Any:
    target, dim, index, src = node.args[0], node.args[1], node.args[2], node.args[3]
    if argument(node, 4, "alpha", 1) != 1:
        raise refuse("MC304", f"index_add with alpha={argument(node, 4, 'alpha')}", node)
    return _scatter_sum(engine, node, target, dim, index, src)


def _scatter_add(engine: Engine, node: fx.Node) -> Any:
    target, dim, index, src = node.args[0], node.args[1], node.args[2], node.args[3]
    where = engine.fact(index)
    if not isinstance(where, Index):
        return None
    return _scatter_sum(engine, node, target, dim, index, src)


def _scatter_sum(engine: Engine, node: fx.Node, target: Any, dim: Any, index: Any, src: Any) -> Any:
    """Rows added into ``zeros`` or a running sum at their tokens."""
    where, val, into = engine.fact(index), engine.fact(src), engine.fact(target)
    if not isinstance(val, Val):
        return None
    if not isinstance(where, Index) or not names_token(engine, where):
        raise refuse("MC207", "expert outputs are added at positions that are not the routed tokens", node)
    if normal_dim(int(dim), rank(target)) != 0 or rank(target) != 2:
        return None
    if where.rows != val.rows:
        raise refuse("MC207", "an expert's output is added to other rows than it was computed on", node)
    if not is_vector(where.dims[:1]) or (len(where.dims) == 2 and not same(shape_of(index)[1], shape_of(src)[1])):
        return None  # a token more often than once per row, or some columns
    return _accumulate(engine, node, target, into, val)


def _accumulate(engine: Engine, node: fx.Node, target: fx.Node, into: Any, val: Val) -> Sum | None:
    if not is_rows(val.dims):
        return None
    shape = shape_of(target)
    dims: Dims = (*token_dims(shape[:-1]), (Atom("f", shape[-1]),))
    part = Part(replace(val, dims=dims), val.gate)
    if isinstance(into, Sum):
        return replace(into, parts=(*into.parts, part))
    if isinstance(into, Filled) and into.number == 0:
        return Sum(dims, (part,))
    if isinstance(into, Filled):
        raise refuse("MC210", f"the sum over experts starts from {into.number}, not from zero", node)
    raise refuse("MC210", "the sum over experts starts from another tensor, not from zeros", node)


def _index_put(engine: Engine, node: fx.Node) -> Any:
    target, indices, src = node.args[0], node.args[1], node.args[2]
    assert isinstance(target, fx.Node) and isinstance(indices, (list, tuple))
    accumulate = bool(argument(node, 3, "accumulate", False))
    into, value = engine.fact(target), engine.fact(src)
    where = [(i, n) for i, n in enumerate(indices) if isinstance(n, fx.Node)]
    if len(where) == 2:
        return _assign_by_pair(engine, node, target, into, where, value) or _combine_matrix(
            engine, node, target, where, src
        )
    if len(where) != 1 or where[0][0] != 0:
        return None
    index = engine.fact(where[0][1])
    if isinstance(index, Index) and not is_vector(index.dims):
        return None
    if isinstance(index, Gate) and is_integer(where[0][1]):
        return None  # zeros and ones as row numbers, no mask
    once = isinstance(value, Val) and not accumulate and writes(node.target)
    if isinstance(index, Index) and index.rows.kind == "hit" and index.what in ("pair", "slot") and once:
        if not names_pair(engine, index):
            return None
        return assign(engine, node, target, into, (pair_dim(engine, index.rows),), index.rows, value)
    if isinstance(index, Index) and index.what == "pair":
        return _unsort_put(engine, node, into, index, value, src)
    if isinstance(index, Gate) and "k" in flat_names(index.dims):
        found = rows_of_mask(index)
        return assign(engine, node, target, into, index.dims, found, value) if once and found is not None else None
    rows = index.rows if isinstance(index, Index) and names_token(engine, index) and rank(target) == 2 else None
    if isinstance(index, Gate) and rank(target) == len(index.dims) + 1:
        rows = rows_of_mask(index)
    if rows is None:
        return None
    if isinstance(value, Picked):
        if value.rows != rows or value.buffer is not engine.base(target) or value.version != engine.version(target):
            raise refuse("MC204", "the running sum was written between reading and assigning its rows", node)
        if value.part is None or accumulate:
            return None
        total = _accumulate(engine, node, target, into, value.part.val)
        # Reading, adding and writing back loses a term if a token stands twice among the rows.
        if total is None or (rows.kind == "sorted" and not same(top_k(engine, rows.ids), 1)):
            return None
        return replace(total, needs=total.needs | {"distinct"}) if rows.per_pair else total
    if not isinstance(value, Val) or value.rows != rows:
        return None
    if accumulate:
        return _accumulate(engine, node, target, into, value)
    if not same(top_k(engine, rows.ids), 1):
        raise refuse("MC304", "an expert's output overwrites the result (= instead of +=) although K > 1", node)
    started = (engine.base(target), engine.version(target)) in engine.pieces
    if started or (isinstance(into, Filled) and into.number != 0):
        return assign(engine, node, target, into, (pair_dim(engine, rows),), rows, value) if once else None
    if _holds_only(into, rows):
        return _accumulate(engine, node, target, into, value)
    raise refuse("MC304", "an expert's output overwrites what the result holds already", node)


def _assign_by_pair(engine: Engine, node: fx.Node, target: fx.Node, into: Any, where: Any, value: Any) -> Any:
    """``buffer[tokens, slots] = expert(rows)``."""
    (i, a), (j, b) = ((at, engine.fact(n)) for at, n in where)
    if (i, j) != (0, 1) or not isinstance(a, Index) or not isinstance(b, Index) or not isinstance(value, Val):
        return None
    if not names_token(engine, a) or not names_slot(engine, b) or argument(node, 3, "accumulate", False):
        return None
    if a.rows != b.rows:
        raise refuse("MC207", "tokens and slots come from different masks", node)
    if not writes(node.target):
        return None
    return assign(engine, node, target, into, token_and_slot_dims(engine, a.rows), a.rows, value)


def _holds_only(into: Any, rows: Rows) -> bool:
    """Whether a buffer holds zeros where these rows stand: nothing but other experts' rows of the same top-1 ids."""
    if not isinstance(into, Sum):
        return isinstance(into, Filled)
    same_ids = all(p.val.rows is not None and p.val.rows.ids == rows.ids for p in into.parts)
    return into.base is None and same_ids and rows.expert not in {p.val.rows.expert for p in into.parts if p.val.rows}


def _combine_matrix(engine: Engine, node: fx.Node, target: fx.Node, where: Any, src: Any) -> Any:
    """``zeros[T, E][arange(T)[:, None], ids] = w``."""
    (_, first), (_, second) = where
    filled = engine.fact(target)
    tokens = engine.fact(first)
    if not isinstance(tokens, Range) or not isinstance(filled, Filled):
        return None
    if not is_token_range(engine, tokens, second):
        return None
    found = ids_dims(engine, second)
    shape = shape_of(target)
    if found is None or filled.number != 0 or engine.fact(src) is not None:
        return None
    leaf, dims = found
    values = (*(1 for _ in range(2 - rank(src))), *shape_of(src))  # one token's weights may come as [K]
    if len(shape) != 2 or len(dims) != 2 or values != shape_of(second) or not is_float(src):
        return None
    out = (dims[0], (Atom("e", shape[1]),))
    adds = bool(argument(node, 3, "accumulate", False))
    return Gate(out, leaf, weight=RouterWeight(engine.flat_leaf(src)), summed=True, distinct=not adds)


def _unsort_put(engine: Engine, node: fx.Node, into: Any, index: Index, value: Any, src: Any) -> Any:
    """``buffer[order] = rows``: back to pair order; ``buffer[order] = arange``: the inverse permutation."""
    if not isinstance(into, Filled) or argument(node, 3, "accumulate", False) or index.rows.kind != "sorted":
        return None
    size = shape_of(node)[0]
    ids = index.rows.ids
    k = top_k(engine, ids)
    tokens = token_count(engine, ids)
    if not same(size, tokens * k):
        return None
    label = tuple(x for x in (Atom("t0", tokens), Atom("k", k)) if not same(x.size, 1))
    if isinstance(value, Range) and value.start == 0 and fits(value.dims, (size,)) and rank(node) == 1:
        if names(value.dims) not in ((("i",),), ((),)):
            return None
        return Inverse((label,), index.rows)
    if isinstance(value, Val) and value.rows == index.rows and is_rows(value.dims):
        gate = replace(value.gate, rows=None) if value.gate is not None else None
        return replace(value, dims=(label, value.dims[1]), rows=None, gate=gate)
    return None


RULES: Rules = {
    aten.index_add_.default: _index_add, aten.index_add.default: _index_add,
    aten.scatter_add_.default: _scatter_add, aten.scatter_add.default: _scatter_add,
    aten.index_put_.default: _index_put, aten.index_put.default: _index_put,
}  # fmt: skip
