"""Rules for rows: those a mask picks for one expert, those a sort orders, and the weights gathered for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of, value
from .engine import Engine, Rules, argument, aten, ids_of, is_float, is_integer, normal_dim, rank
from .facts import (
    Atom,
    Coordinates,
    Dim,
    Dims,
    Filled,
    Gate,
    Ids,
    Index,
    Inverse,
    Leaf,
    Picked,
    Range,
    RouterWeight,
    Rows,
    SortedIds,
    Sum,
    Val,
    Wt,
    flat_names,
    is_token,
    names,
    refuse,
    same,
    size_of,
)
from .routing import as_router_weight, ids_dims, token_count, top_k
from .values import lift, weight_leaf, x_leaf, x_rows


def rows_of_mask(gate: Gate) -> Rows | None:
    """The row space that ``nonzero(mask)`` or ``x[mask]`` enumerates."""
    if gate.weight is not None or gate.expert is None or gate.rows is not None or "e" in flat_names(gate.dims):
        return None
    kind = "hit" if "k" in flat_names(gate.dims) or not gate.distinct else "hit_token"
    return Rows(kind, gate.ids, gate.expert, names(gate.dims))


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
        label = names((dim,))[0]
        what = "slot" if label == ("k",) else "token" if label and label[0].startswith("t") else "zero"
        if len(label) > 1 or (what == "token" and sum(is_token(d) for d in gate.dims) > 1):
            return None
        out.append(Index(((Atom("r", _count(node)),),), rows, what))
    if node.target is aten.nonzero.default:
        return Coordinates(((Atom("r", _count(node)),), ()), tuple(out))
    return out


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
    if len(fact.columns) == 1 and rank(node) == 1:
        return fact.columns[0]
    return None


def names_token(engine: Engine, index: Index) -> bool:
    """Whether an index vector holds the token of each row (the only one where T = 1)."""
    return index.what == "token" or (index.what == "zero" and same(token_count(engine, index.rows.ids), 1))


def names_slot(engine: Engine, index: Index) -> bool:
    """Whether an index vector holds the slot of each row (the only one where K = 1)."""
    return index.what == "slot" or (index.what == "zero" and same(top_k(engine, index.rows.ids), 1))


def pick(fact: Any, dim: int, index: Index, node: fx.Node) -> Any:
    """``fact`` gathered along its token dimension by the tokens of ``index``'s rows."""
    label = fact.dims[dim]
    if label and not is_token(label):
        return None
    dims = (*fact.dims[:dim], index.dims[0], *fact.dims[dim + 1 :])
    if isinstance(fact, Val):
        if fact.rows is not None or "k" in flat_names(fact.dims) or "e" in flat_names(fact.dims):
            return None
        return replace(fact, dims=dims, rows=index.rows)
    if isinstance(fact, Gate):
        if fact.rows is not None:
            return None
        return replace(fact, dims=dims, rows=index.rows)
    return None


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
        if isinstance(fact, Gate) and dim == 0:
            return _by_mask(engine, node, source, fact)
        if isinstance(fact, Inverse) and dim == 0:
            return _unsort(engine, node, source, fact)
        if fact is None or isinstance(fact, (Ids, SortedIds)):
            return _by_ids(engine, node, source, dim, index, fact)
        return None
    if len(where) == 2 and [i for i, _ in where] == [0, 1]:
        a, b = facts
        if isinstance(a, Index) and isinstance(b, Index) and names_token(engine, a) and names_slot(engine, b):
            return _pair_weight(engine, node, source, a, b)
        if isinstance(a, Index) and isinstance(b, Index):
            raise refuse("MC207", "the router weights are indexed [slot, token], expected [token, slot]", node)
        if isinstance(a, Index) != isinstance(b, Index) and is_float(source):
            raise refuse("MC207", "the router weights are indexed by something else than token and slot", node)
        if isinstance(a, Range) and is_token_range(engine, a, where[1][1]):
            return all_by_ids(engine, node, source, where[1][1], 1)
    return None


def _by_rows(engine: Engine, node: fx.Node, source: fx.Node, dim: int, index: Index) -> Any:
    fact = engine.fact(source)
    if (
        isinstance(fact, (Sum, Filled))
        and dim == 0
        and names_token(engine, index)
        and ids_of(fact) in (None, index.rows.ids)
    ):
        return Picked(
            (index.dims[0], (Atom("f", shape_of(source)[-1]),)), engine.base(source), engine.version(source), index.rows
        )
    if index.what == "pair" and dim == 0:
        return _flat_weight(engine, node, source, index)
    if not names_token(engine, index) or not same(shape_of(source)[dim], token_count(engine, index.rows.ids)):
        return None
    if isinstance(fact, Gate):
        return pick(fact, dim, index, node)
    val = x_rows(engine, source)
    return pick(val, dim, index, node) if val is not None else None


def _by_mask(engine: Engine, node: fx.Node, source: fx.Node, mask: Gate) -> Any:
    rows = rows_of_mask(mask)
    if rows is None:
        return None
    n = len(mask.dims)
    row: Dim = (Atom("r", shape_of(node)[0]),)
    fact = engine.fact(source)
    shape = shape_of(source)
    if isinstance(fact, (Sum, Filled)) and "k" not in flat_names(mask.dims) and ids_of(fact) in (None, mask.ids):
        return Picked((row, (Atom("f", shape[-1]),)), engine.base(source), engine.version(source), rows)
    if fact is None and "k" in flat_names(mask.dims) and n == len(shape):
        gate = Gate(mask.dims, mask.ids, expert=mask.expert)
        weight = as_router_weight(engine, source, gate, mask.dims)
        return None if weight is None else replace(gate, dims=(row,), weight=weight, rows=rows, summed=True)
    if isinstance(fact, Gate) and names(fact.dims[:n]) == names(mask.dims) and fact.rows is None:
        return replace(fact, dims=(row, *fact.dims[n:]), rows=rows)
    if "k" not in flat_names(mask.dims) and not isinstance(fact, (Gate, Wt)):
        val = x_rows(engine, source)
        if val is not None and names(val.dims[:n]) == names(mask.dims):
            return replace(val, dims=(row, *val.dims[n:]), rows=rows)
    return None


def _pair_weight(engine: Engine, node: fx.Node, source: fx.Node, token: Index, slot: Index) -> Any:
    if token.rows != slot.rows:
        raise refuse("MC207", "tokens and slots come from different masks", node)
    if engine.fact(source) is not None and not isinstance(engine.fact(source), Val):
        return None
    shape = shape_of(source)
    ids = token.rows.ids
    tail = shape[2:]
    if not is_float(source) or len(shape) < 2 or any(not same(s, 1) for s in tail):
        return None
    if not same(shape[1], top_k(engine, ids)) or not same(shape[0], shape_of(ids.node)[0]):
        return None
    dims = (token.dims[0], *(() for _ in tail))
    weight = RouterWeight(engine.flat_leaf(source))
    return Gate(dims, ids, weight=weight, expert=token.rows.expert, summed=True, rows=token.rows)


def _flat_weight(engine: Engine, node: fx.Node, source: fx.Node, index: Index) -> Any:
    """``w.view(-1)[order]``: the weight of each sorted pair; ``x`` repeated per pair likewise."""
    fact = engine.fact(source)
    if fact is None and is_float(source) and rank(source) <= 2 and all(same(s, 1) for s in shape_of(source)[1:]):
        ids = index.rows.ids
        k = top_k(engine, ids)
        if same(shape_of(source)[0], token_count(engine, ids) * k):
            dims = (index.dims[0], *(() for _ in shape_of(source)[1:]))
            return Gate(dims, ids, weight=RouterWeight(engine.flat_leaf(source)), summed=True, rows=index.rows)
    val = fact if isinstance(fact, Val) and fact.expr == ("x",) else None
    val = lift(engine, source, x_leaf) if fact is None else val
    if isinstance(val, Val) and val.rows is None and len(val.dims) == 2:
        label = val.dims[0]
        k = top_k(engine, index.rows.ids)
        if len(label) >= 2 and label[-1].name == "*" and same(label[-1].size, k) and is_token(label[:-1]):
            return replace(val, dims=(index.dims[0], val.dims[1]), rows=index.rows)
    return None


def _unsort(engine: Engine, node: fx.Node, source: fx.Node, inverse: Inverse) -> Any:
    val = engine.fact(source)
    if not isinstance(val, Val) or val.rows != inverse.rows or len(val.dims) != 2:
        return None
    gate = val.gate
    if gate is not None:
        gate = replace(gate, rows=None)
    return replace(val, dims=(*inverse.dims, val.dims[1]), rows=None, gate=gate)


def gathered_weight(engine: Engine, node: fx.Node, source: fx.Node, ids: Leaf, dims: Dims) -> Any:
    """``weights[ids]``: each pair's own weight, labelled by the pair's dimensions."""
    shape = shape_of(source)
    if len(shape) == 3 and value(source).dtype.is_complex:
        raise refuse("MC401", f"the experts' weights are {value(source).dtype}", node)
    if len(shape) not in (2, 3) or not all(isinstance(s, int) for s in shape) or not is_float(source):
        return None
    if len(shape) == 2:
        weight: Any = Wt(((Atom("e", shape[0]),), (Atom("w0", shape[1]),)), engine.leaf(source), "axis")
    else:
        weight = lift(engine, source, weight_leaf)
    if not isinstance(weight, Wt) or weight.source != "axis" or names(weight.dims[:1]) != (("e",),):
        return None
    return replace(weight, dims=(*dims, *weight.dims[1:]), source="ids", ids=ids, expert=weight.dims[0][0].size)


def _by_ids(engine: Engine, node: fx.Node, source: fx.Node, dim: int, index: fx.Node, fact: Any) -> Any:
    if isinstance(fact, SortedIds):
        found = gathered_weight(engine, node, source, fact.rows.ids, fact.dims) if dim == 0 else None
        return found
    if not is_integer(index):
        return None
    val = engine.fact(source)
    if isinstance(val, Val) and dim == 1 and "e" in flat_names(val.dims):
        return None
    if (val is not None and not isinstance(val, Wt)) or not engine.is_param(source) or dim != 0:
        return None
    found = ids_dims(engine, index)
    if found is None:
        return None
    leaf, dims = found
    return gathered_weight(engine, node, source, leaf, dims)


def is_token_range(engine: Engine, tokens: Range, ids: fx.Node) -> bool:
    """Whether ``tokens`` is ``arange(T)`` standing before the slots of ``ids [T, K]``: ``[T, 1]`` (or ``[T]``)."""
    found = ids_dims(engine, ids)
    if found is None or tokens.start != 0 or names(tokens.dims[:1]) != (("i",),) or any(tokens.dims[1:]):
        return False
    return len(tokens.dims) == len(found[1]) and same(size_of(tokens.dims[0]), token_count(engine, found[0]))


def all_by_ids(engine: Engine, node: fx.Node, source: fx.Node, index: fx.Node, dim: int) -> Any:
    """Outputs of all experts ``[t, e, f]`` gathered by the ids along ``e``: one output per pair ``[t, k, f]``."""
    val = engine.fact(source)
    if not isinstance(val, Val) or val.rows is not None or names((val.dims[dim],)) != (("e",),):
        return None
    found = ids_dims(engine, index)
    if found is None:
        return None
    leaf, dims = found
    experts = val.dims[dim][0].size
    slot = tuple(d for d in dims if names((d,)) == (("k",),))
    label: Dim = slot[0] if slot else ()
    slots = tuple(
        replace(s, weight=replace(s.weight, source="ids", ids=leaf, expert=experts)) if s.weight.source == "axis" else s
        for s in val.slots
    )
    if val.gate is not None:
        return None
    return replace(val, dims=(*val.dims[:dim], label, *val.dims[dim + 1 :]), slots=slots, expert=experts)


def _gather(engine: Engine, node: fx.Node) -> Any:
    """``gather(ys, dim_e, ids[..., None].expand(...))`` and ``take_along_dim``."""
    source, dim, index = node.args[0], argument(node, 1, "dim"), argument(node, 2, "index")
    if node.target is aten.take_along_dim.default:
        dim, index = index, dim
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
    val = engine.fact(source)
    if isinstance(val, Gate) and val.weight is None:
        return None
    if not isinstance(val, Val) or dim is None:
        if val is None and source.target in (aten.stack.default, aten.cat.default) and len(source.args[0]) > 1:  # type: ignore[arg-type]
            code = "MC401" if value(source).dtype.is_complex else "MC200"
            raise refuse(code, f"no stack of known experts' outputs ({value(source).dtype}) is gathered by ids", node)
        return None
    d = normal_dim(int(dim), len(val.dims))
    found = ids_dims(engine, index)
    if found is None or names((val.dims[d],)) != (("e",),):
        return None
    _, dims = found
    # The index must be ids over (t, k) at the right places and a plain copy over the features.
    for i, (mine, theirs) in enumerate(zip(val.dims, dims, strict=True)):
        label = names((theirs,))[0]
        if i == d:
            if label not in (("k",), ()):
                return None
        elif names((mine,))[0] != label and (label != ("*",) or names((mine,)) != (("f",),)):
            return None
        if names((mine,))[0] == ("f",) and label != ("*",) and node.target is not aten.take_along_dim.default:
            return None
    return all_by_ids(engine, node, source, index, d)


def _index_select(engine: Engine, node: fx.Node) -> Any:
    source, dim, index = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node) and isinstance(dim, int)
    fact = engine.fact(index)
    if isinstance(fact, Index):
        return _by_rows(engine, node, source, normal_dim(dim, rank(source)), fact)
    if isinstance(fact, Inverse) and dim == 0:
        return _unsort(engine, node, source, fact)
    if fact is None or isinstance(fact, (Ids, SortedIds)):
        return _by_ids(engine, node, source, normal_dim(dim, rank(source)), index, fact)
    return None


RULES: Rules = {
    aten.where.default: _nonzero, aten.nonzero_numpy.default: _nonzero, aten.nonzero.default: _nonzero,
    aten.select.int: _column, aten.unbind.int: _column, aten.squeeze.dim: _column, aten.view.default: _column,
    aten.reshape.default: _column, aten.flatten.using_ints: _column, aten.squeeze.default: _column,
    aten.index.Tensor: _index, aten.index_select.default: _index_select,
    aten.gather.default: _gather, aten.take_along_dim.default: _gather,
}  # fmt: skip
