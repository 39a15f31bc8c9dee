"""Rules for what an expert computes: linear maps with per-expert weights, biases and row-wise operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..canonical import shape_of
from .engine import Engine, Rules
from .facts import Gate, Ids, Slot, Sum, Val, Wt, refuse
from .labels import Atom, Dim, Dims, flat_names, same, token_dims, unify, unify_dim
from .nodes import VIEWS, argument, aten, is_float, is_fp8, rank

_SPREADS = frozenset(
    {aten.expand.default, aten.unsqueeze.default, aten.repeat.default, aten.repeat_interleave.self_int}
)
_PEELED = VIEWS | _SPREADS | {aten.clone.default, aten._unsafe_view.default}


# ------------------------------------------------------------------------------------- border values


def lift(engine: Engine, node: fx.Node, base: Any) -> Any:
    """The fact of a node without one: ``base(engine, leaf_node)`` at its root, then the views on the way back.

    The value of an earlier layer or projection is a root too: what it means there does not matter here.
    """
    known = engine.fact(node)
    if known is not None and not is_opaque(known):
        return known
    source = node.args[0] if node.args else None
    peeled = node.target in _PEELED and isinstance(source, fx.Node) and engine.unchanged(node)
    if peeled and isinstance(source, fx.Node) and (known is None or is_opaque(engine.fact(source))):
        inner = lift(engine, source, base)
        if inner is not None and not isinstance(inner, list):
            engine.facts[source], before = inner, engine.facts.get(source)
            try:
                outer = next((f for r in engine.rules.get(node.target, ()) if (f := r(engine, node)) is not None), None)
            finally:
                if before is None:
                    del engine.facts[source]
                else:
                    engine.facts[source] = before
            if outer is not None and not isinstance(outer, list) and _spread(outer, inner):
                return outer
    return base(engine, node)


def is_opaque(fact: Any) -> bool:
    """A finished value of its own: the sum of another layer, or a linear map that all experts share."""
    return isinstance(fact, Sum) or (
        isinstance(fact, Val) and bool(fact.slots) and fact.rows is None and fact.gate is None
    )


def _spread(outer: Any, inner: Any) -> bool:
    """Worth reading through: the views copied, inserted or (for weights) moved dimensions."""
    if isinstance(outer, Wt):
        return True
    if isinstance(outer, Ids) and len(outer.dims) < len(inner.dims):
        return True  # ids.view(-1): all pairs
    return any(not d or any(a.name == "*" for a in d) for d in outer.dims)


def x_leaf(engine: Engine, node: fx.Node) -> Val | None:
    """A plain activation ``[t.., f]`` as an expert's input."""
    shape = shape_of(node)
    if len(shape) < 2 or not is_float(node) or not isinstance(shape[-1], int) or shape[-1] < 2:
        return None
    dims = (*token_dims(shape[:-1]), (Atom("f", shape[-1]),))
    return Val(dims, ("x",), engine.leaf(node))


def weight_leaf(engine: Engine, node: fx.Node) -> Wt | None:
    """A plain tensor as a weight: ``[out, in]`` of one expert or ``[E, out, in]`` of all."""
    shape = shape_of(node)
    if len(shape) not in (2, 3) or not all(isinstance(s, int) for s in shape):
        return None
    if not (is_float(node) or is_fp8(node)):
        return None
    if len(shape) == 2:
        return Wt(tuple((Atom(n, s),) for n, s in zip(("w0", "w1"), shape, strict=True)), engine.leaf(node), "one")
    dims = tuple((Atom(n, s),) for n, s in zip(("e", "w0", "w1"), shape, strict=True))
    return Wt(dims, engine.leaf(node), "axis")


def bias_leaf(engine: Engine, node: fx.Node, batched: bool) -> Wt | None:
    """A plain tensor as a bias: ``[out]`` of one expert, or ``[E, out]`` of all when ``batched``."""
    shape = shape_of(node)
    if len(shape) not in (1, 2) or not all(isinstance(s, int) for s in shape) or not is_float(node):
        return None
    if len(shape) == 1:
        return Wt(((Atom("w0", shape[0]),),), engine.leaf(node), "one")
    if not batched or not engine.is_param(node):
        return None
    return Wt(((Atom("e", shape[0]),), (Atom("w0", shape[1]),)), engine.leaf(node), "axis")


# ------------------------------------------------------------------------------------- linear maps


def add_slot(slots: tuple[Slot, ...], slot: Slot) -> tuple[tuple[Slot, ...], int]:
    """Slots with ``slot`` among them, and its number."""
    if slot in slots:
        return slots, slots.index(slot)
    return (*slots, slot), len(slots)


def linear_map(val: Val, val_labels: str, weight: Wt, weight_labels: str, out_labels: str, node: fx.Node) -> Val | None:
    """``val`` times ``weight``, contracted over their one common label that is not in the output."""
    common = [c for c in val_labels if c in weight_labels and c not in out_labels]
    v = dict(zip(val_labels, val.dims, strict=True))
    w = dict(zip(weight_labels, weight.dims, strict=True))
    if len(common) != 1 or len(v) != len(val_labels) or len(w) != len(weight_labels):
        return None
    (c,) = common
    if len(v[c]) != 1 or v[c][0].name != "f" or len(w[c]) != 1 or w[c][0].name not in ("w0", "w1"):
        return None
    if not same(v[c][0].size, w[c][0].size):
        return None
    out_atom = "w0" if w[c][0].name == "w1" else "w1"
    dims: list[Dim] = []
    outputs = 0
    for label in out_labels:
        if label in w and (not v.get(label) or label not in v):
            d = w[label]
            if len(d) == 1 and d[0].name == out_atom:
                outputs += 1
                d = (Atom("f", d[0].size),)
            dims.append(d)
        elif label in w:
            merged = unify_dim(v[label], w[label]) if w[label] else v[label]
            if merged is None:
                return None
            dims.append(merged)
        elif label in v:
            dims.append(v[label])
        else:
            return None
    if outputs != 1 or any(not a.name.startswith(("t", "k", "e", "r", "f", "*")) for d in dims for a in d):
        return None
    if any(label not in out_labels and label != c for label in (*v, *w)):
        return None
    gate, gate_in = val.gate, val.gate_in
    if gate is not None and val.expr == ("x",):
        gate, gate_in = None, gate
    slots, number = add_slot(val.slots, Slot(weight, transposed=w[c][0].name == "w0"))
    return replace(val, dims=tuple(dims), expr=("lin", number, val.expr), slots=slots, gate=gate, gate_in=gate_in)


def contract(
    engine: Engine, node: fx.Node, a: fx.Node, a_labels: str, b: fx.Node, b_labels: str, out_labels: str
) -> Any:
    """A product of two tensors summed over the labels that are not in the output (einsum, matmul, bmm, linear)."""
    from .combine import weighted_sum  # combine builds on values: resolved when a rule runs

    fa, fb = engine.fact(a), engine.fact(b)
    if isinstance(fa, Gate) or isinstance(fb, Gate) or (isinstance(fa, Val) and fa.slots and not isinstance(fb, Wt)):
        found = weighted_sum(engine, node, a, a_labels, b, b_labels, out_labels)
        if found is not None:
            return found
    if isinstance(fb, Val) and fb.slots and not isinstance(fa, Wt):
        found = weighted_sum(engine, node, b, b_labels, a, a_labels, out_labels)
        if found is not None:
            return found
    if _is_weight(engine, a, fa, fb) and not _is_weight(engine, b, fb, fa):
        a, a_labels, fa, b, b_labels, fb = b, b_labels, fb, a, a_labels, fa
    val = fa if isinstance(fa, Val) else lift(engine, a, x_leaf)
    weight = fb if isinstance(fb, Wt) else lift(engine, b, weight_leaf)
    if not isinstance(val, Val) or not isinstance(weight, Wt):
        return None
    return linear_map(val, a_labels, weight, b_labels, out_labels, node)


def _is_weight(engine: Engine, node: fx.Node, fact: Any, other: Any) -> bool:
    if isinstance(fact, Wt):
        return True
    if isinstance(fact, Val) or isinstance(other, Wt):
        return False
    return isinstance(other, Val) or engine.is_param(node)


def _linear(engine: Engine, node: fx.Node) -> Any:
    x, w = node.args[0], node.args[1]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    labels = "abcdefgh"[: rank(x) - 1]
    fx_, fw = engine.fact(x), engine.fact(w)
    val = fx_ if isinstance(fx_, Val) else lift(engine, x, x_leaf)
    weight = fw if isinstance(fw, Wt) else lift(engine, w, weight_leaf)
    if not isinstance(val, Val) or not isinstance(weight, Wt) or len(weight.dims) != 2:
        return None
    out = linear_map(val, labels + "i", weight, "oi", labels + "o", node)
    bias = argument(node, 2, "bias")
    if out is None or bias is None:
        return out
    return add_bias(engine, out, bias, node)


def add_bias(engine: Engine, val: Val, bias: fx.Node, node: fx.Node) -> Val | None:
    """``val + bias``, where the bias belongs to the linear map that ``val`` ends with."""
    fact = engine.fact(bias)
    if fact is None:
        fact = lift(engine, bias, lambda en, n: bias_leaf(en, n, "e" in flat_names(val.dims)))
    if not isinstance(fact, Wt) or (fact.cut is not None and fact.cut[0] != "w0"):
        return None
    labels = tuple(tuple(Atom("f", a.size) if a.name == "w0" else a for a in d) for d in fact.dims)
    if "f" not in flat_names(labels) or unify(val.dims, labels) != val.dims or val.expr[0] != "lin":
        return None
    if val.gate is not None:
        raise refuse("MC302", "a bias is added after the router weight was applied", node)
    slots, number = add_slot(val.slots, Slot(replace(fact, dims=_bare(fact.dims))))
    return replace(val, slots=slots, expr=("bias", number, val.expr))


def _bare(dims: Dims) -> Dims:
    """Bias labels without the inserted size-one dimensions, so that equal biases compare equal."""
    return tuple(d for d in dims if d)


def _matmul(engine: Engine, node: fx.Node) -> Any:
    a, b = node.args[0], node.args[1]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    ra, rb = rank(a), rank(b)
    if ra > 4 or rb > 4:
        return None
    batch = max(ra, rb) - 2
    names = "abcd"[: max(batch, 0)]
    la = (names[len(names) - (ra - 2) :] if ra > 2 else "") + ("mi" if ra > 1 else "i")
    lb = (names[len(names) - (rb - 2) :] if rb > 2 else "") + ("io" if rb > 1 else "i")
    out = names + ("m" if ra > 1 else "") + ("o" if rb > 1 else "")
    return contract(engine, node, a, la, b, lb, out)


def _addmm(engine: Engine, node: fx.Node) -> Any:
    bias, a, b = node.args[0], node.args[1], node.args[2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node) and isinstance(bias, fx.Node)
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    batch = "b" if rank(a) == 3 else ""
    out = contract(engine, node, a, batch + "mi", b, batch + "io", batch + "mo")
    return add_bias(engine, out, bias, node) if isinstance(out, Val) else None


def _einsum(engine: Engine, node: fx.Node) -> Any:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    equation = equation.replace(" ", "")
    if "." in equation or len(operands) != 2:
        return None
    left, arrow, out = equation.partition("->")
    a_labels, b_labels = left.split(",")
    if not arrow:
        every = a_labels + b_labels
        out = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    a, b = operands
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return contract(engine, node, a, a_labels, b, b_labels, out)


# ------------------------------------------------------------------------------------- row-wise operations


def functional(target: Any) -> Any:
    """The out-of-place overload of an in-place one."""
    packet = target.overloadpacket.__name__
    if not packet.endswith("_") or packet.endswith("__"):
        return target
    return getattr(getattr(aten, packet[:-1]), target._overloadname)


def is_pointwise(target: Any) -> bool:
    """Whether an op acts element by element and draws no random numbers."""
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def pointwise(engine: Engine, node: fx.Node) -> Any:
    """An elementwise operation on expert values (all on the same rows), numbers and nothing else."""
    vals: list[Val] = []
    if any(isinstance(arg, (fx.Node, list, tuple)) for arg in node.kwargs.values()):
        return None
    for arg in node.args:
        if isinstance(arg, fx.Node):
            fact = engine.fact(arg)
            if not isinstance(fact, Val):
                return None
            vals.append(fact)
        elif isinstance(arg, (list, tuple)):
            return None
    if not vals:
        return None
    first = vals[0]
    slots, dims = first.slots, first.dims
    gates = [v.gate for v in vals if v.gate is not None]
    target = functional(node.target)
    args: list[Any] = []
    for arg in node.args:
        if not isinstance(arg, fx.Node):
            args.append(("const", arg))
            continue
        val = engine.fact(arg)
        merged = unify(dims, val.dims)
        if merged is None:
            return None
        dims = merged
        if val.x != first.x or val.rows != first.rows or val.gate_in != first.gate_in:
            if val.slots and first.slots:
                raise refuse("MC207", "values of different inputs or rows meet inside an expert", node)
            return None
        slots, expr = _merge(slots, val)
        args.append(expr)
    order = [a.name for d in dims for a in d if a.name != "*"]
    if len(order) != len(set(order)):
        return None  # every element of one value meets every element of another
    if gates and not (len(gates) == 1 and target in (aten.mul.Tensor, aten.neg.default)):
        raise refuse("MC302", f"the router weight is applied before {target.overloadpacket.__name__}", node)
    kwargs = tuple(sorted((k, v) for k, v in node.kwargs.items()))
    gate = gates[0] if gates else None
    return replace(first, dims=dims, slots=slots, expr=("op", target, tuple(args), kwargs), gate=gate)


def _merge(slots: tuple[Slot, ...], val: Val) -> tuple[tuple[Slot, ...], Any]:
    """Slots of both, and ``val``'s expression renumbered into them."""
    if val.slots == slots[: len(val.slots)]:
        return slots, val.expr
    numbers = []
    for slot in val.slots:
        slots, number = add_slot(slots, slot)
        numbers.append(number)
    return slots, renumber(val.expr, numbers)


def renumber(expr: Any, numbers: list[int]) -> Any:
    """An expression with slot ``i`` called ``numbers[i]``."""
    if expr[0] in ("lin", "bias"):
        return (expr[0], numbers[expr[1]], renumber(expr[2], numbers))
    if expr[0] == "cut":
        return (*expr[:4], renumber(expr[4], numbers))
    if expr[0] == "op":
        return (expr[0], expr[1], tuple(renumber(a, numbers) for a in expr[2]), expr[3])
    return expr


def slots_of(expr: Any) -> set[int]:
    """The numbers of the weights in an expression."""
    if expr[0] in ("lin", "bias"):
        return {expr[1]} | slots_of(expr[2])
    if expr[0] == "cut":
        return slots_of(expr[4])
    return set().union(*(slots_of(a) for a in expr[2])) if expr[0] == "op" else set()


def _add(engine: Engine, node: fx.Node) -> Any:
    """A bias in its own addition; anything else is left to the other rules of ``add``."""
    if argument(node, 2, "alpha", 1) != 1:
        return None
    for a, b in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        val = engine.fact(a)
        if isinstance(val, Val) and val.expr[0] == "lin" and isinstance(b, fx.Node):
            other = engine.fact(b)
            if (other is None and engine.is_param(b)) or isinstance(other, Wt):
                return add_bias(engine, val, b, node)
    return None


def x_rows(engine: Engine, node: fx.Node) -> Val | None:
    """``node`` as expert input: its fact, or a border value seen through spreading views."""
    fact = engine.fact(node)
    if isinstance(fact, Val) and fact.expr == ("x",):
        return fact
    found = lift(engine, node, x_leaf) if fact is None or is_opaque(fact) else None
    return found if isinstance(found, Val) else None


RULES: Rules = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.bmm.default: _matmul,
    aten.addmm.default: _addmm, aten.baddbmm.default: _addmm,
    aten.einsum.default: _einsum,
    aten.add.Tensor: _add, aten.add_.Tensor: _add,
}  # fmt: skip
