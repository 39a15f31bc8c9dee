"""Rules for how weighted expert outputs become one tensor: sums in any order, scattered sums, masked assignment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..canonical import shape_of
from . import scatter
from .engine import Engine, Rules
from .facts import Filled, Gate, Part, Picked, RouterWeight, Sum, Val, refuse
from .labels import Dims, flat_names, same, size_of, unify
from .nodes import argument, aten, is_float, normal_dim, rank
from .routing import as_router_weight, pair_ids, sum_gate, top_k
from .views import as_dtype


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
    if isinstance(other, (int, float)):
        return mine if other == 0 else None
    if not isinstance(other, fx.Node) or mine.base is not None or not is_float(other):
        return None
    if not all(same(p, q) for p, q in zip(shape_of(other), shape_of(node), strict=False)):
        return None
    if node.target is aten.add_.Tensor and mine is tb:
        raise refuse("MC210", f"the sum over experts is added in place into {other.name}", node)
    if rank(other) != rank(node):
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
    dtype, source = node.kwargs.get("dtype"), node.args[0]
    if isinstance(dtype, torch.dtype) and isinstance(source, fx.Node):  # the terms are cast first
        fact = as_dtype(fact, dtype, source) if dtype is not torch.bool else None
    if where is None or not isinstance(fact, (Gate, Val)):
        return None
    dims = [where] if isinstance(where, int) else list(where)
    if not dims:  # all dimensions
        return None
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
    if isinstance(fa, Gate):
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
    if gate.weight is not None:
        return None
    labels = dict(zip(g_labels, gate.dims, strict=True))
    if any(c not in labels for c in o_labels):
        return None
    weight = as_router_weight_at(engine, other, tuple(labels[c] for c in o_labels))
    if weight is None:
        return None
    gone = {x.name for c in g_labels if c not in out_labels for x in labels[c]}
    if not gone <= {"k"}:
        return None
    left = tuple(labels[c] for c in out_labels)
    return replace(gate, dims=left, weight=weight, summed=gate.summed or "k" in gone, boolean=False)


def as_router_weight_at(engine: Engine, node: fx.Node, dims: Dims) -> Any:
    """A plain tensor with exactly the dimensions ``dims`` as router weight."""
    return as_router_weight(engine, node, Gate(dims, engine.leaf(node)), dims)


RULES: Rules = {
    aten.add.Tensor: _add, aten.add_.Tensor: _add,
    aten.sum.dim_IntList: _sum,
    **scatter.RULES,
}  # fmt: skip
