"""Rules for stacks: the outputs, gates and weights of E single experts under one ``e`` dimension."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of
from .engine import Engine, Rules
from .facts import Gate, Slot, Val, Wt, refuse
from .labels import Atom, names
from .nodes import argument, aten, normal_dim, written
from .values import renumber


def _stack(engine: Engine, node: fx.Node) -> Any:
    """``stack([expert_0(x), .., expert_{E-1}(x)], dim)``: all experts' outputs under one ``e`` dimension."""
    items = node.args[0]
    assert isinstance(items, (list, tuple))
    dim = argument(node, 1, "dim", 0)
    vals = [engine.fact(i) for i in items]
    if len(vals) < 2:
        return None
    if all(isinstance(v, Gate) for v in vals):
        return _stack_gates(vals, normal_dim(int(dim), len(vals[0].dims) + 1))
    if not all(isinstance(v, Val) and v.slots for v in vals):
        return None
    at = normal_dim(int(dim), len(vals[0].dims) + 1)
    if not all(v.gate is not None and v.gate.summed for v in vals):
        return stacked_values(node, vals, at)
    n = len(vals[0].dims)
    gates = [v.gate.with_dims(((),) * (n - len(v.gate.dims)) + v.gate.dims) for v in vals]
    gate = _stack_gates(gates, at)
    if gate is None:
        raise refuse("MC208", "the weighted outputs are not stacked in the order of the experts", node)
    return replace(stacked_values(node, [replace(v, gate=None) for v in vals], at), gate=gate)


def _stack_gates(vals: list[Any], at: int) -> Gate | None:
    """``stack([w_0, .., w_{E-1}])`` of one layer's gates in order of the expert ids."""
    first = vals[0]
    for e, gate in enumerate(vals):
        if gate.expert != e or replace(gate, expert=0) != replace(first, expert=0):
            return None
    dims = (*first.dims[:at], (Atom("e", len(vals)),), *first.dims[at:])
    return replace(first, dims=dims, expert=None)


def stacked_values(node: fx.Node, vals: list[Val], at: int) -> Val:
    """E equal expressions with their own weights as one expression under an ``e`` dimension."""
    first = vals[0]
    for e, v in enumerate(vals):
        if v.x != first.x or v.dims != first.dims or v.rows is not None or v.gate is not None:
            raise refuse("MC201", f"expert {e} works on other values than expert 0", node)
        if v.expr != first.expr or len(v.slots) != len(first.slots):
            raise refuse("MC201", f"expert {e} computes something else than expert 0", node)
    count = len(vals)
    slots = []
    for n, slot in enumerate(first.slots):
        every = [v.slots[n] for v in vals]
        if slot.weight.source == "one" and all(s == slot for s in every):
            slots.append(slot)  # shared by all: it belongs before the experts
            continue
        merged = merge_weights([s.weight for s in every], node)
        if any(s.transposed != slot.transposed for s in every):
            raise refuse("MC201", "some experts' weights are transposed and others are not", node)
        slots.append(Slot(merged, slot.transposed))
    dims = (*first.dims[:at], (Atom("e", count),), *first.dims[at:])
    return replace(first, dims=dims, slots=tuple(slots), expr=renumber(first.expr, list(range(len(slots)))))


def merge_weights(weights: list[Wt], node: Any) -> Wt:
    """The weights of experts 0..E-1 (in this order) as one weight with an ``e`` dimension."""
    first = weights[0]
    count = len(weights)
    for e, w in enumerate(weights):
        if w.scales != first.scales:
            what = "its own tensor" if w.source == "one" else "scaled otherwise than that of expert 0"
            raise refuse("MC408", f"the fp8 weight of expert {e} is {what}", node)
        if w.key() != first.key() or names(w.dims) != names(first.dims):
            raise refuse("MC201", f"the weights of expert {e} have another form than those of expert 0", node)
        mine, ref = [x.size for d in w.dims for x in d], [x.size for d in first.dims for x in d]
        if mine != ref:
            raise refuse("MC201", f"expert {e} has weights of shape {mine}, expert 0 has {ref}", node)
    if any(w.source != first.source for w in weights):
        raise refuse("MC201", "experts mix weights of their own with rows of a stack", node)
    if first.source == "row":
        for e, w in enumerate(weights):
            if w.leaf != first.leaf and written(w.leaf.node) is written(first.leaf.node):
                raise refuse("MC204", f"the stacked weights are written before expert {e} reads them", node)
            if w.leaf != first.leaf:
                raise refuse("MC201", f"expert {e} reads another stacked weight than expert 0", node)
            if w.expert != e:
                raise refuse("MC208", f"expert {e} uses row {w.expert} of the stacked weights", node)
        size = shape_of(first.leaf.node)[0]
        if size != count:
            raise refuse("MC208", f"{count} experts are used, the stacked weights hold {size}", node)
        return replace(first, dims=((Atom("e", count),), *first.dims), source="axis", expert=None)
    if first.source == "one":
        leaves = tuple(w.leaf for w in weights)
        if len(set(leaves)) != count:
            raise refuse("MC202", "two experts share one weight tensor", node)
        return replace(first, dims=((Atom("e", count),), *first.dims), source="axis", leaves=leaves)
    raise refuse("MC201", "experts mix their own weights with gathered ones", node)


def _cat_rows(engine: Engine, node: fx.Node) -> Any:
    """``cat([y[None] ..])`` along a size-one dimension is a stack."""
    items = node.args[0]
    assert isinstance(items, (list, tuple))
    vals = [engine.fact(i) for i in items]
    if len(vals) < 2 or not all(isinstance(v, Val) and v.slots for v in vals):
        return None
    at = normal_dim(int(argument(node, 1, "dim", 0)), len(vals[0].dims))
    if vals[0].dims[at]:
        return None
    bare = [replace(v, dims=(*v.dims[:at], *v.dims[at + 1 :])) for v in vals]
    return stacked_values(node, bare, at)


RULES: Rules = {aten.stack.default: _stack, aten.cat.default: _cat_rows}
