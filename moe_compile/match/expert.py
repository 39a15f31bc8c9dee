"""The two GEMMs of an expert and what stands between them, from a matched expression to ``spec.Experts``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..canonical import PLAIN_TENSORS, value
from ..spec import Activation, Experts, Weight
from .activation import activation_of
from .engine import Engine
from .facts import Leaf, Slot, Val, Wt, refuse
from .fp8 import check_fp8, from_fp8, scale_of


@dataclass(frozen=True)
class Handle:
    """How the lowering gets one weight tensor: the border node, then a slice and a transposition of it."""

    leaf: Leaf
    cut: tuple[str, int, int, int] | None = None


def experts_of(engine: Engine, val: Val, node: fx.Node) -> Experts:
    """The two GEMMs and what stands between them."""
    expr, b2 = val.expr, None
    if expr[0] == "bias":
        b2, expr = val.slots[expr[1]], expr[2]
    if expr[0] != "lin":
        raise refuse("MC303", f"the expert does not end in a linear map but in {_name(expr)}", node)
    w2, middle = val.slots[expr[1]], expr[2]
    if middle == ("x",):
        raise refuse("MC301", "an expert is a single linear map", node)
    inner: list[Any] = []
    _inner_maps(middle, inner, node)
    if len(inner) > 2:
        raise refuse("MC301", f"an expert has {len(inner)} input projections", node)
    maps = [_map(val, m) for m in inner]
    count = _count(w2.weight)
    out_features, inter = _features(w2)
    hidden = _features(maps[0][0])[1]
    if out_features != hidden:
        raise refuse("MC201", f"experts map H={hidden} to {out_features} features", node)
    for m, b in [*maps, (w2, b2)]:
        for slot in (m, b):
            if slot is not None and _count(slot.weight) != count:
                raise refuse("MC208", f"weights of {_count(slot.weight)} and of {count} experts meet", node)
    fp8 = check_fp8(val, [*maps, (w2, b2)], node)
    common: dict[str, Any] = dict(num_experts=count, hidden_size=hidden, w2=_weight(w2), b2=_bias(b2))
    built = _known(maps, inner, middle, inter, common)
    if built is None and fp8:
        raise refuse("MC301", "fp8 experts have an activation that the op does not know", node)
    if built is None:
        built = _custom(maps, inner, middle, inter, common)
    _dtypes(engine, val, built, node)
    return built


def _inner_maps(expr: Any, found: list[Any], node: fx.Node) -> None:
    """The distinct ``lin(x)`` (with their bias) inside an expression, in order of appearance."""
    if expr[0] == "x":
        raise refuse("MC301", "the expert's input bypasses its first linear map", node)
    if expr[0] == "bias" or expr[0] == "lin":
        lin = expr[2] if expr[0] == "bias" else expr
        if lin[2] != ("x",):
            raise refuse("MC301", "an expert has more than two linear maps in a row", node)
        if expr not in found:
            found.append(expr)
    elif expr[0] == "cut":
        _inner_maps(expr[4], found, node)
    elif expr[0] == "op":
        for a in expr[2]:
            _inner_maps(a, found, node)


def _map(val: Val, expr: Any) -> tuple[Slot, Slot | None]:
    if expr[0] == "bias":
        return val.slots[expr[2][1]], val.slots[expr[1]]
    return val.slots[expr[1]], None


def _known(maps: Any, inner: Any, middle: Any, inter: int, common: Any) -> Experts | None:
    """The experts with a closed-form activation, or None."""
    if len(inner) == 2:
        for gate, up in ((0, 1), (1, 0)):
            act = _activation(middle, {inner[gate]: ("gate",), inner[up]: ("up",)})
            if act is not None and act.gated and _rows(maps[0][0]) == _rows(maps[1][0]) == inter:
                (w1, b1), (w3, b3) = maps[gate], maps[up]
                return Experts(
                    **common,
                    intermediate_size=inter,
                    w1=_weight(w1),
                    b1=_bias(b1),
                    w3=_weight(w3),
                    b3=_bias(b3),
                    activation=act,
                )
        return None
    (w1, b1), whole = maps[0], inner[0]
    rows = _rows(w1)
    act = _activation(middle, {whole: ("gate",)})
    if act is not None and not act.gated and rows == inter:
        return Experts(**common, intermediate_size=inter, w1=_weight(w1), b1=_bias(b1), activation=act)
    if rows != 2 * inter:
        return None
    halves = [("cut", 0, inter, 1, whole), ("cut", inter, rows, 1, whole)]
    lanes = [("cut", 0, rows, 2, whole), ("cut", 1, rows, 2, whole)]
    for interleaved, (first, second) in ((False, halves), (True, lanes)):
        act = _activation(middle, {first: ("gate",), second: ("up",)})
        if act is not None and act.gated:
            return Experts(
                **common,
                intermediate_size=inter,
                w1=_weight(w1),
                b1=_bias(b1),
                activation=act,
                interleaved=interleaved,
            )
        act = _activation(middle, {second: ("gate",), first: ("up",)})
        if act is not None and act.gated:
            up_rows, gate_rows = first[1:4], second[1:4]
            return Experts(
                **common,
                intermediate_size=inter,
                activation=act,
                w1=_weight(w1, gate_rows),
                b1=_bias(b1, gate_rows),
                w3=_weight(w1, up_rows),
                b3=_bias(b1, up_rows),
            )
    return None


def _custom(maps: Any, inner: Any, middle: Any, inter: int, common: Any) -> Experts:
    """Two grouped GEMMs around the user's own row-wise expression."""
    (w1, b1), other = maps[0], maps[1] if len(maps) > 1 else (None, None)
    return Experts(
        **common,
        intermediate_size=inter,
        w1=_weight(w1),
        b1=_bias(b1),
        w3=_weight(other[0]) if other[0] is not None else None,
        b3=_bias(other[1]),
        activation=None,
        custom=(middle, tuple(inner)),
    )


def _activation(middle: Any, leaves: dict[Any, Any]) -> Activation | None:
    expr = _plain(middle, leaves)
    return activation_of(expr) if expr is not None else None


def _plain(expr: Any, leaves: dict[Any, Any]) -> Any:
    """An expression in ``activation_of``'s form, or None when a linear map is left over."""
    if expr in leaves:
        return leaves[expr]
    if expr[0] == "const":
        return expr
    if expr[0] != "op":
        return None
    name = expr[1].overloadpacket.__name__
    kwargs = dict(expr[3])
    args = [_plain(a, leaves) for a in expr[2]]
    if any(a is None for a in args):
        return None
    if name == "gelu":
        approximate = kwargs.pop("approximate", "none")
        if len(args) > 1:
            approximate = args.pop(1)[1]
        name = "gelu_tanh" if approximate == "tanh" else "gelu"
    if name in ("clamp", "hardtanh"):
        if any(a[0] != "const" for a in args[1:]):
            return None  # limits that are tensors
        low, high = kwargs.pop("min", None), kwargs.pop("max", None)
        given = [a[1] for a in args[1:]]
        low, high = given[0] if given else low, given[1] if len(given) > 1 else high
        args = [args[0], ("const", low), ("const", high)]
    if kwargs.pop("alpha", 1) != 1 or kwargs:
        return None
    return (name, *args)


def _name(expr: Any) -> str:
    return expr[1].overloadpacket.__name__ if expr[0] == "op" else str(expr[0])


def _count(weight: Wt) -> int:
    if weight.source == "axis":
        return _atom_size(weight, "e")
    assert weight.source == "ids" and weight.expert is not None
    return weight.expert


def _atom_size(weight: Wt, name: str) -> int:
    return next(int(a.size) for d in weight.dims for a in d if a.name == name)


def _features(slot: Slot) -> tuple[int, int]:
    """(out, in) features of a weight matrix."""
    rows, columns = _atom_size(slot.weight, "w0"), _atom_size(slot.weight, "w1")
    return (columns, rows) if slot.transposed else (rows, columns)


def _rows(slot: Slot) -> int:
    return _features(slot)[0]


def _weight(slot: Slot, cut: tuple[int, int, int] | None = None) -> Weight:
    """A matrix role; ``cut`` selects output features of it."""
    w = slot.weight
    taken = w.cut
    if cut is not None:
        if taken is not None:
            raise refuse("MC301", "a slice of a sliced weight")
        taken = ("w1" if slot.transposed else "w0", *cut)
    leaves = w.leaves or (w.leaf,)
    stacked = not w.leaves
    scale = None if w.scales is None else scale_of(w.scales, slot, taken)
    return Weight(tuple(Handle(leaf, taken) for leaf in leaves), stacked, slot.transposed, scale)


def _bias(slot: Slot | None, cut: tuple[int, int, int] | None = None) -> Weight | None:
    if slot is None:
        return None
    w = slot.weight
    if cut is not None and w.cut is not None:
        raise refuse("MC301", "a slice of a sliced bias")
    taken = w.cut if cut is None else ("w0", *cut)
    leaves = w.leaves or (w.leaf,)
    return Weight(tuple(Handle(leaf, taken) for leaf in leaves), not w.leaves)


def _dtypes(engine: Engine, val: Val, experts: Experts, node: fx.Node) -> None:
    dtype = value(val.x.node).dtype
    for weight in experts.weights:
        if not weight.stacked and from_fp8(weight.parts[0].leaf.node):
            # the op would need all widened weights at once, and the program has one at a time
            at = weight.parts[0].leaf.node
            raise refuse("MC408", "the weights of each expert are computed from an fp8 tensor", at)
        for handle in weight.parts:
            tensor = value(handle.leaf.node)
            if tensor.dtype != dtype and weight.scale is None:
                raise refuse("MC401", f"weights are {tensor.dtype}, the hidden states {dtype}", handle.leaf.node)
            if type(tensor).__name__ not in PLAIN_TENSORS:
                raise refuse("MC402", f"weights are a {type(tensor).__name__}", handle.leaf.node)
            if tensor.device != value(val.x.node).device:
                raise refuse("MC401", f"weights are on {tensor.device}, the hidden states elsewhere", handle.leaf.node)
    if value(node).dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise refuse("MC401", f"the result is {value(node).dtype}", node)
