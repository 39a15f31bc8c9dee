"""Rules for the routing decision: masks, one-hot and combine matrices, and their product with router weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..canonical import shape_of, value
from .engine import Engine, Rules
from .facts import Filled, Gate, Ids, Leaf, Masked, Range, RouterWeight, Sum, Val, refuse
from .labels import Atom, Dim, Dims, fits, flat_names, is_token, names, same, size_of, token_dims, unify
from .nodes import argument, aten, is_float, is_ids, is_integer, normal_dim, rank
from .slots import dense_column, of_one_slot
from .values import lift, x_rows


def ids_dims(engine: Engine, node: fx.Node) -> tuple[Leaf, Dims] | None:
    """A plain integer tensor as expert ids ``[t.., k]`` (or ``[t]`` for top-1), seen through views."""
    fact = engine.fact(node)
    if isinstance(fact, Ids):
        return fact.leaf, fact.dims
    if fact is not None or not is_integer(node):
        return None

    def base(en: Engine, leaf: fx.Node) -> Ids | None:
        shape = shape_of(leaf)
        if not shape or not is_ids(en.strip(leaf)):
            return None
        if len(shape) == 1:
            return Ids(token_dims(shape), en.leaf(leaf))
        last = shape[-1]
        slot: Dim = () if same(last, 1) else (Atom("k", last),)
        return Ids((*token_dims(shape[:-1]), slot), en.leaf(leaf))

    found = lift(engine, node, base)
    if not isinstance(found, Ids):
        return None
    return engine.ids_leaf(found.leaf.node, node), found.dims


def top_k(engine: Engine, leaf: Leaf) -> Any:
    """K of a routing decision: the last size of its ids (1 when they are ``[t]``)."""
    shape = shape_of(leaf.node)
    return shape[-1] if len(shape) > 1 else 1


def token_count(engine: Engine, ids: Leaf) -> Any:
    """T of a routing decision."""
    shape = shape_of(ids.node)
    total: Any = 1
    for s in shape[: max(1, len(shape) - 1)]:
        total = total * s
    return total


def _eq(engine: Engine, node: fx.Node) -> Any:
    a, b = node.args[0], node.args[1]
    assert isinstance(a, fx.Node)
    if isinstance(b, int) and not isinstance(b, bool):
        found = ids_dims(engine, a)
        if found is None:
            return None
        leaf, dims = found
        return Gate(dims, leaf, expert=b, boolean=True, summed="k" not in flat_names(dims))
    if not isinstance(b, fx.Node):
        return None
    if isinstance(engine.fact(a), Range):
        a, b = b, a
    span = engine.fact(b)
    found = ids_dims(engine, a)
    if not isinstance(span, Range) or found is None or span.start != 0:
        return None
    leaf, dims = found
    labels = tuple(tuple(Atom("e", x.size) if x.name == "i" else x for x in d) for d in span.dims)
    merged = unify(dims, labels)
    if merged is None:
        return None
    if "e" not in flat_names(merged):
        return None  # one expert
    return Gate(merged, leaf, boolean=True, summed="k" not in flat_names(merged))


def _one_hot(engine: Engine, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    found = ids_dims(engine, source)
    count = shape_of(node)[-1]
    if found is None or not isinstance(count, int) or count < 2:
        return None
    leaf, dims = found
    return Gate((*dims, (Atom("e", count),)), leaf, summed="k" not in flat_names(dims))


def as_router_weight(engine: Engine, node: Any, gate: Gate, dims: Dims) -> RouterWeight | None:
    """A plain tensor that lines up with ``[t.., k]`` of ``dims`` (and nothing else) as the router weight."""
    if not is_float(node) or engine.fact(node) is not None:
        return None
    shape = shape_of(node)
    if len(shape) > len(dims):
        return None
    labels = dims[len(dims) - len(shape) :]
    if not _token_major(labels):
        return None
    for size, label in zip(shape, labels, strict=True):
        routed = bool(label) and all(a.name == "k" or a.name.startswith("t") for a in label)
        if routed and not same(size, size_of(label)):
            return None
        if not routed and not same(size, 1):
            return None
    if any(is_token(d) or _is_slot(d) for d in dims[: len(dims) - len(shape)]):
        return None
    return RouterWeight(engine.flat_leaf(node))


def _token_major(dims: Dims) -> bool:
    """Whether tokens come before slots, in order: the lowering reads the tensor as ``[T, K]``."""
    order = [a.name for d in dims for a in d if a.name == "k" or a.name.startswith("t")]
    return order == sorted(order, key=lambda n: (n == "k", n))


def _is_slot(dim: Dim) -> bool:
    return any(a.name == "k" for a in dim)


def weigh(engine: Engine, node: fx.Node, gate: Gate, other: Any) -> Gate | None:
    """``gate * other`` for a plain router weight or a number."""
    if isinstance(other, (int, float)) and gate.weight is not None and not isinstance(other, bool):
        step = (aten.mul.Tensor, other)
        return replace(gate, weight=replace(gate.weight, steps=(*gate.weight.steps, step)))
    if gate.weight is None and isinstance(other, fx.Node) and gate.summed and not flat_names(gate.dims) & {"e", "k"}:
        dense = dense_column(engine, other, gate, token_count(engine, gate.ids))
        lined = all(same(s, 1) or is_token(d) for s, d in zip(shape_of(other)[::-1], gate.dims[::-1], strict=False))
        lined = lined and _token_major(gate.dims)
        if dense is not None and lined and len(shape_of(other)) <= len(gate.dims):
            # A truth value counts a token once however often it names the expert; so does the sum if it never does.
            return replace(gate, weight=dense, boolean=False)
    if gate.weight is not None or (gate.summed and "k" in _labels_of_ids(engine, gate)):
        return None
    weight = as_router_weight(engine, other, gate, gate.dims)
    return None if weight is None else replace(gate, weight=weight, boolean=False)


def _labels_of_ids(engine: Engine, gate: Gate) -> set[str]:
    return set() if of_one_slot(gate, top_k(engine, gate.ids)) else {"k"}


def _mul(engine: Engine, node: fx.Node) -> Any:
    a, b = node.args[0], node.args[1]
    for x, y in ((a, b), (b, a)):
        gate, other = engine.fact(x), engine.fact(y)
        if isinstance(gate, Gate) and gate.rows is None and other is None:
            weighted = weigh(engine, node, gate, y)
            if weighted is not None:
                return weighted
    for x, y in ((a, b), (b, a)):
        fact = engine.fact(x)
        if isinstance(fact, Val):
            return apply_gate(engine, node, fact, y)
        if isinstance(fact, Gate) and isinstance(y, fx.Node) and isinstance(engine.fact(y), (Sum, type(None))):
            lifted = x_rows(engine, y)
            if lifted is not None and "f" in flat_names(lifted.dims):
                return apply_gate(engine, node, lifted, x)
    return None


def apply_gate(engine: Engine, node: fx.Node, val: Val, other: Any) -> Val | None:
    """``val * other`` where ``other`` is a gate, or the plain router weight of every pair."""
    gate = engine.fact(other)
    if not isinstance(gate, Gate):
        ids = pair_ids(val) if val.rows is None else None
        if ids is None:
            return None
        dims = tuple(() if any(a.name == "f" for a in d) else d for d in val.dims)
        weight = as_router_weight(engine, other, Gate(dims, ids), dims)
        if weight is None:
            return None
        gate = Gate(dims, ids, weight=weight)
    if val.gate is not None:
        raise refuse("MC304", "an expert's output is weighted twice", node)
    product = unify(val.dims, gate.dims)
    if product is None:
        return None
    if gate.rows != val.rows and (gate.rows is not None or val.rows is not None):
        raise refuse("MC207", "the weights belong to other rows than the expert's output", node)
    return replace(val, dims=product, gate=replace(gate, dims=gate.dims))


def pair_ids(val: Val) -> Leaf | None:
    """The routing decision behind weights that were gathered per pair."""
    for slot in val.slots:
        if slot.weight.source == "ids":
            return slot.weight.ids
    return None


def _where(engine: Engine, node: fx.Node) -> Any:
    """``where(mask, weight, 0)``: the weight under the mask."""
    mask, yes, no = node.args[0], node.args[1], node.args[2]
    gate = engine.fact(mask)
    if not isinstance(gate, Gate) or not _is_zero(engine, no):
        return None
    found = weigh(engine, node, gate, yes)
    return found if found is not None and fits(found.dims, shape_of(node)) else None  # zeros may spread it


def _is_zero(engine: Engine, node: Any) -> bool:
    if isinstance(node, (int, float)):
        return node == 0
    fact = engine.fact(node)
    if isinstance(fact, Filled):
        return fact.number == 0
    target = node.target if isinstance(node, fx.Node) else None
    return target is aten.scalar_tensor.default and node.args[0] == 0


def _any(engine: Engine, node: fx.Node) -> Any:
    gate = engine.fact(node.args[0])
    if not isinstance(gate, Gate) or gate.weight is not None or gate.rows is not None:
        return None
    dim = normal_dim(argument(node, 1, "dim"), len(gate.dims))
    if names((gate.dims[dim],)) not in ((("k",),), ((),)):
        return None
    keep = bool(argument(node, 2, "keepdim", False))
    dims = (*gate.dims[:dim], *(((),) if keep else ()), *gate.dims[dim + 1 :])
    return replace(gate, dims=dims, summed=True, boolean=True, distinct=gate.distinct or not gate.summed)


def sum_gate(engine: Engine, node: fx.Node, gate: Gate, dims: list[int], keep: bool) -> Gate | None:
    """``gate`` summed over its slot dimension."""
    labels = {a.name for d in dims for a in gate.dims[d]}
    if not labels <= {"k"}:
        return None
    left = tuple(() if i in dims else d for i, d in enumerate(gate.dims) if keep or i not in dims)
    return replace(gate, dims=left, summed=gate.summed or "k" in labels, boolean=False)


def _scatter(engine: Engine, node: fx.Node) -> Any:
    """``zeros[T, E].scatter(1, ids, w)``: the combine matrix; ``full(-inf)`` then sigmoid or softmax likewise."""
    target, index, src = node.args[0], node.args[2], node.args[3]
    dim = argument(node, 1, "dim")
    assert isinstance(target, fx.Node) and isinstance(index, fx.Node)
    filled = engine.fact(target)
    if not isinstance(filled, Filled) or filled.number not in (0.0, float("-inf")):
        return None
    found = ids_dims(engine, index)
    shape = shape_of(target)
    if found is None or normal_dim(int(dim), len(shape)) != len(shape) - 1:
        return None
    leaf, dims = found
    if not isinstance(shape[-1], int) or shape[-1] < 2 or not _token_major(dims):
        return None
    if names(dims[-1:]) not in ((("k",),), ((),)):
        return None  # scattered over tokens
    if not all(same(a, b) for a, b in zip(shape[:-1], shape_of(index)[:-1], strict=True)):
        return None
    weight: RouterWeight | None
    if isinstance(src, (int, float)):
        if src != 1:
            return None
        weight = None
    else:
        if not isinstance(src, fx.Node) or rank(src) != rank(index):
            return None
        if not all(same(a, b) for a, b in zip(shape_of(src), shape_of(index), strict=True)):
            return None
        fact = engine.fact(src)
        if isinstance(fact, Filled) and fact.number == 1.0:
            weight = None
        elif fact is None and is_float(src):
            weight = RouterWeight(engine.flat_leaf(src))
        elif value(src).dtype.is_complex:
            raise refuse("MC401", f"the router weights are {value(src).dtype}", node)
        else:
            return None
    adds = "add" in str(node.target)
    out = (*dims[:-1], (Atom("e", shape[-1]),))
    gate = Gate(out, leaf, weight=weight, summed=True, distinct=not adds and "k" in flat_names(dims))
    return gate if filled.number == 0.0 else Masked(out, gate)


def _unmask(engine: Engine, node: fx.Node) -> Any:
    masked = engine.fact(node.args[0])
    if not isinstance(masked, Masked) or masked.gate.weight is None:
        return None
    if node.target in (aten.softmax.int, aten._softmax.default):
        dim = normal_dim(int(node.args[1]), len(masked.dims))  # type: ignore[arg-type]
        if names((masked.dims[dim],)) != (("e",),):
            return None
        step: Any = (aten.softmax.int, -1)
        dtype = argument(node, 2, "dtype")
        if isinstance(dtype, torch.dtype):
            step = (aten.softmax.int, -1, dtype)
        if not masked.gate.distinct:
            return None
    else:
        step = (aten.sigmoid.default,)
    weight = masked.gate.weight
    return replace(masked.gate, dims=masked.dims, weight=replace(weight, steps=(*weight.steps, step)))


RULES: Rules = {
    aten.eq.Scalar: _eq, aten.eq.Tensor: _eq, aten.one_hot.default: _one_hot,
    aten.mul.Tensor: _mul, aten.mul_.Tensor: _mul,
    aten.where.self: _where, aten.where.ScalarOther: _where, aten.any.dim: _any,
    aten.scatter.src: _scatter, aten.scatter_.src: _scatter, aten.scatter.value: _scatter,
    aten.scatter_.value: _scatter, aten.scatter_add.default: _scatter, aten.scatter_add_.default: _scatter,
    aten.sigmoid.default: _unmask, aten.softmax.int: _unmask,
}  # fmt: skip
