"""Rules for how weighted expert outputs become one tensor: sums in any order, scattered sums, masked assignment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of
from .engine import Engine, Rules, argument, aten, is_float, normal_dim, rank
from .facts import (
    Atom,
    Dims,
    Filled,
    Gate,
    Index,
    Inverse,
    Part,
    Picked,
    Range,
    RouterWeight,
    Sum,
    Val,
    flat_names,
    names,
    refuse,
    same,
    size_of,
    unify,
)
from .routing import as_router_weight, ids_dims, pair_ids, sum_gate, token_count, top_k
from .rows import is_token_range, names_token, rows_of_mask


def is_output(engine: Engine, fact: Any) -> bool:
    """A weighted expert output on every token: one term of the sum."""
    return (
        isinstance(fact, Val)
        and fact.rows is None
        and (fact.gate is not None or fact.gate_in is not None)
        and bool(fact.slots)
        and not flat_names(fact.dims) & {"k", "e", "*", "fo", "fi"}
    )


def term(engine: Engine, fact: Any) -> Sum | None:
    """A fact as a sum: itself, or one weighted output."""
    if isinstance(fact, Sum):
        return fact
    if is_output(engine, fact):
        gate = fact.gate if fact.gate is not None else fact.gate_in
        if gate.expert is not None and not gate.summed:
            return None
        return Sum(fact.dims, (Part(fact, fact.gate),))
    return None


def _add(engine: Engine, node: fx.Node) -> Any:
    """``acc + term``, in any order; with something from outside the base is remembered."""
    if node.target in (aten.add.Scalar, aten.add_.Scalar):
        return None
    a, b = node.args[0], node.args[1]
    fa, fb = engine.fact(a), engine.fact(b)
    if isinstance(fa, Picked) or isinstance(fb, Picked):
        return _add_picked(engine, node, fa, fb)
    if isinstance(fa, Val) and isinstance(fb, Val) and fa.gate_in is not None and fa.gate_in == fb.gate_in:
        return None  # two values of one expert with a weighted input: a step inside the expert
    ta, tb = term(engine, fa), term(engine, fb)
    if ta is None and tb is None:
        return None
    if argument(node, 2, "alpha", 1) != 1:
        raise refuse("MC304", f"the sum over experts scales a term (alpha={argument(node, 2, 'alpha')})", node)
    if ta is not None and tb is not None:
        dims = unify(ta.dims, tb.dims)
        if dims is None:
            return None
        if ta.base is not None and tb.base is not None:
            return None
        return Sum(dims, ta.parts + tb.parts, ta.base or tb.base)
    mine, other, fact = (ta, b, fb) if ta is not None else (tb, a, fa)
    assert mine is not None
    if isinstance(fact, Filled):
        if fact.number == 0 and len(fact.dims) == len(mine.dims):
            return mine
        raise refuse("MC210", f"the sum over experts starts from {fact.number}, not from zero", node)
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return mine if other == 0 else None
    if not isinstance(other, fx.Node) or mine.base is not None or not is_float(other):
        return None
    if not all(same(p, q) for p, q in zip(shape_of(other), shape_of(node), strict=False)):
        return None
    if rank(other) != rank(node) or (str(node.target).endswith("add_.Tensor") and mine is tb):
        return None
    return replace(mine, base=engine.leaf(other))


def _add_picked(engine: Engine, node: fx.Node, fa: Any, fb: Any) -> Any:
    picked, other = (fa, fb) if isinstance(fa, Picked) else (fb, fa)
    if not isinstance(other, Val) or picked.part is not None:
        return None
    if argument(node, 2, "alpha", 1) != 1:
        raise refuse("MC304", "the sum over experts scales a term", node)
    if other.rows != picked.rows:
        raise refuse("MC207", "an expert's output is added to other rows than it was computed on", node)
    return replace(picked, part=Part(other, other.gate))


def _sum(engine: Engine, node: fx.Node) -> Any:
    fact = engine.fact(node.args[0])
    where = argument(node, 1, "dim")
    if where is None or fact is None or not isinstance(fact, (Gate, Val)):
        return None
    dims = [where] if isinstance(where, int) else list(where)
    dims = [normal_dim(d, len(fact.dims)) for d in dims]
    keep = bool(argument(node, 2, "keepdim", False))
    if isinstance(fact, Gate):
        return sum_gate(engine, node, fact, dims, keep)
    labels = {a.name for d in dims for a in fact.dims[d]}
    if not labels <= {"k", "e"}:
        return None
    left: Dims = tuple(() if i in dims else d for i, d in enumerate(fact.dims) if keep or i not in dims)
    return sum_over(engine, node, fact, left, labels)


def sum_over(engine: Engine, node: fx.Node, val: Val, left: Dims, labels: set[str]) -> Any:
    """``val`` summed over its slot and/or expert dimension."""
    gate = val.gate
    by_ids = pair_ids(val)
    if gate is None and by_ids is not None and ("k" in labels or same(top_k(engine, by_ids), 1)):
        gate = Gate((), by_ids, summed=True)
    source = gate if gate is not None else val.gate_in
    if source is None:
        raise refuse("MC304", "expert outputs are summed without router weights", node)
    if "e" in labels and source.expert is not None and by_ids is None:
        return None
    if "k" in labels and gate is not None:
        gate = replace(gate, summed=True)
    if val.expr[0] == "x":
        return None
    out = replace(val, dims=left, gate=gate)
    if flat_names(left) & {"k", "e", "*"}:
        return out
    if "e" in labels or by_ids is not None:
        return Sum(left, (Part(out, gate),))
    return out


def weighted_sum(
    engine: Engine, node: fx.Node, a: fx.Node, a_labels: str, b: fx.Node, b_labels: str, out_labels: str
) -> Any:
    """einsum or matmul that multiplies expert outputs by weights and sums over slots or experts."""
    fa, fb = engine.fact(a), engine.fact(b)
    if isinstance(fa, Gate) and isinstance(fb, Val):
        a, a_labels, fa, b, b_labels, fb = b, b_labels, fb, a, a_labels, fa
    order = "".join(dict.fromkeys(a_labels + b_labels))
    gone = [c for c in order if c not in out_labels]
    if isinstance(fa, Gate) and (isinstance(fb, Gate) or fb is None):
        return _gate_product(engine, node, fa, a_labels, b, b_labels, out_labels)
    if not isinstance(fa, Val):
        return None
    mine = dict(zip(a_labels, fa.dims, strict=True))
    spread = tuple(mine.get(c, ()) for c in order)
    if isinstance(fb, Gate):
        theirs = dict(zip(b_labels, fb.dims, strict=True))
        other: Any = fb.with_dims(tuple(theirs.get(c, ()) for c in order))
    elif fb is None:
        ids = pair_ids(fa)
        if ids is None:
            return None
        shape = dict(zip(b_labels, shape_of(b), strict=True))
        for c in b_labels:  # a label that the values lack may have size one: ``weights[:, None] @ ys``
            label = mine.get(c, ())
            if not all(x.name == "k" or x.name.startswith("t") for x in label):
                return None
            if not same(shape[c], size_of(label)):
                return None
        if any(x.name == "k" or x.name.startswith("t") for c in order if c not in b_labels for x in mine.get(c, ())):
            return None
        if not is_float(b):
            return None
        dims = tuple(mine.get(c, ()) if c in b_labels else () for c in order)
        if [c for c in order if c in b_labels and mine.get(c)] != [c for c in b_labels if mine.get(c)]:
            return None
        other = Gate(dims, ids, weight=RouterWeight(engine.flat_leaf(b)))
    else:
        return None
    if fa.gate is not None:
        raise refuse("MC304", "an expert's output is weighted twice", node)
    dims_ = unify(spread, other.dims)
    if dims_ is None:
        return None
    gated = replace(fa, dims=dims_, gate=other)
    labels = {x.name for c in gone for x in dims_[order.index(c)]}
    left = tuple(dims_[order.index(c)] for c in out_labels)
    if not gone:
        return replace(gated, dims=left)
    if not labels <= {"k", "e"}:
        return None
    return sum_over(engine, node, gated, left, labels)


def _gate_product(
    engine: Engine, node: fx.Node, gate: Gate, g_labels: str, other: fx.Node, o_labels: str, out_labels: str
) -> Gate | None:
    """``einsum("tk,tke->te", w, one_hot)``: the combine matrix."""
    if engine.fact(other) is not None or gate.weight is not None:
        return None
    labels = dict(zip(g_labels, gate.dims, strict=True))
    if any(c not in labels for c in o_labels):
        return None
    positions = [g_labels.index(c) for c in o_labels]
    if positions != sorted(positions):
        return None
    dims = tuple(labels[c] if c in o_labels else () for c in g_labels)
    weight = as_router_weight_at(engine, other, tuple(labels[c] for c in o_labels))
    if weight is None or flat_names(dims) & {"e"}:
        return None
    gone = {x.name for c in g_labels if c not in out_labels for x in labels[c]}
    if not gone <= {"k"}:
        return None
    left = tuple(labels[c] for c in out_labels)
    return replace(gate, dims=left, weight=weight, summed=gate.summed or "k" in gone, boolean=False)


def as_router_weight_at(engine: Engine, node: fx.Node, dims: Dims) -> Any:
    """A plain tensor with exactly the dimensions ``dims`` as router weight."""
    return as_router_weight(engine, node, Gate(dims, engine.leaf(node)), dims)


# ------------------------------------------------------------------------------------- scattered sums


def _index_add(engine: Engine, node: fx.Node) -> Any:
    target, dim, index, src = node.args[0], node.args[1], node.args[2], node.args[3]
    if argument(node, 4, "alpha", 1) != 1:
        raise refuse("MC304", f"index_add with alpha={argument(node, 4, 'alpha')}", node)
    return _scatter_sum(engine, node, target, dim, index, src)


def _scatter_add(engine: Engine, node: fx.Node) -> Any:
    target, dim, index, src = node.args[0], node.args[1], node.args[2], node.args[3]
    where = engine.fact(index)
    if not isinstance(where, Index) or names(where.dims) != (("r",), ("*",)):
        return None  # not one token per row
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
    return _accumulate(engine, node, target, into, val)


def _accumulate(engine: Engine, node: fx.Node, target: fx.Node, into: Any, val: Val) -> Sum:
    shape = shape_of(target)
    dims: Dims = ((Atom("t0", shape[0]),) if not same(shape[0], 1) else (), (Atom("f", shape[1]),))
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
        return _combine_matrix(engine, node, target, where, src)
    if len(where) != 1 or where[0][0] != 0:
        return None
    index = engine.fact(where[0][1])
    if isinstance(index, Index) and index.what == "pair":
        return _unsort_put(engine, node, into, index, value, src)
    rows = index.rows if isinstance(index, Index) and names_token(engine, index) else None
    if isinstance(index, Gate):
        rows = rows_of_mask(index)
    if rows is None:
        return None
    if isinstance(value, Picked):
        if value.rows != rows or value.buffer is not engine.base(target) or value.version != engine.version(target):
            raise refuse("MC204", "the running sum was written between reading and assigning its rows", node)
        if value.part is None or accumulate:
            return None
        found = _accumulate(engine, node, target, into, value.part.val)
        # Reading, adding and writing back loses a term if a token stands twice among the rows.
        return found if rows.kind == "hit_token" else replace(found, needs=found.needs | {"distinct"})
    if not isinstance(value, Val) or value.rows != rows:
        return None
    if accumulate:
        return _accumulate(engine, node, target, into, value)
    if same(top_k(engine, rows.ids), 1):
        return _accumulate(engine, node, target, into, value)
    raise refuse("MC304", "an expert's output overwrites the result (= instead of +=) although K > 1", node)


def _combine_matrix(engine: Engine, node: fx.Node, target: fx.Node, where: Any, src: Any) -> Any:
    """``zeros[T, E][arange(T)[:, None], ids] = w``."""
    (i, first), (j, second) = where
    filled = engine.fact(target)
    tokens = engine.fact(first)
    if (i, j) != (0, 1) or not isinstance(tokens, Range) or not isinstance(filled, Filled):
        return None
    if not is_token_range(engine, tokens, second):
        return None
    found = ids_dims(engine, second)
    shape = shape_of(target)
    if found is None or filled.number != 0 or not isinstance(src, fx.Node) or engine.fact(src) is not None:
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
    if not isinstance(into, Filled) or argument(node, 3, "accumulate", False):
        return None
    size = shape_of(node)[0]
    ids = index.rows.ids
    k = top_k(engine, ids)
    tokens = token_count(engine, ids)
    if not same(size, tokens * k):
        return None
    label = tuple(x for x in (Atom("t0", tokens), Atom("k", k)) if not same(x.size, 1))
    if isinstance(value, Range) and value.start == 0:
        return Inverse((label,), index.rows)
    if isinstance(value, Val) and value.rows == index.rows and len(value.dims) == 2:
        gate = replace(value.gate, rows=None) if value.gate is not None else None
        return replace(value, dims=(label, value.dims[1]), rows=None, gate=gate)
    return None


RULES: Rules = {
    aten.add.Tensor: _add, aten.add_.Tensor: _add,
    aten.sum.dim_IntList: _sum,
    aten.index_add_.default: _index_add, aten.index_add.default: _index_add,
    aten.scatter_add_.default: _scatter_add, aten.scatter_add.default: _scatter_add,
    aten.index_put_.default: _index_put, aten.index_put.default: _index_put,
}  # fmt: skip
