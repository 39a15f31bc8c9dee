"""One slot of the top-k at a time: columns of the ids, and the parts of all slots merged into one per expert.

A loop ``for k: for e: out[ids[:, k] == e] += w[.., k] * expert_e(..)`` is a sum of K layers with one expert per
token each. Where the columns are those of one ``ids [.., K]`` and one ``w [.., K]``, each (slot, expert) exactly
once, it is one layer with K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from ..canonical import shape_of, value
from .engine import Engine
from .facts import Gate, Leaf, Part, RouterWeight, Rows, Sum, Val, refuse
from .labels import same
from .nodes import argument, aten, is_float, normal_dim, under_flat_views
from .values import is_opaque

_SWAPS = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default)
_SPLITS = (aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def column_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``(root, k)`` where ``node`` holds ``root[.., k]``, one number per token, in the order of the tokens."""
    found = _cut(under_flat_views(node))
    if found is None:
        return None
    root, dim, index = found
    while _is_whole_slice(root):
        root = root.args[0]  # type: ignore[assignment]
    if root.target in _SWAPS and len(shape_of(root)) == 2 and dim == 0 and _swaps(root):
        inner = root.args[0]
        assert isinstance(inner, fx.Node)
        root, dim = inner, 1
    size = shape_of(root)[-1]
    if dim != len(shape_of(root)) - 1 or dim == 0 or not isinstance(size, int) or size < 2:
        return None
    return root, index % size


def _cut(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """``(source, dim, index)`` of a view that keeps one index of one dimension."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.select.int:
        index, dim = node.args[2], int(node.args[1])  # type: ignore[arg-type]
        return (source, normal_dim(dim, len(shape_of(source))), index) if isinstance(index, int) else None
    if node.target is aten.slice.Tensor:
        dim = normal_dim(int(argument(node, 1, "dim", 0)), len(shape_of(source)))
        start, size = argument(node, 2, "start") or 0, shape_of(source)[dim]
        if isinstance(start, int) and isinstance(size, int) and same(shape_of(node)[dim], 1):
            return source, dim, max(start + size, 0) if start < 0 else start
        return None
    whole = source.args[0] if source.target in _SPLITS else None
    if getattr(node.target, "__name__", "") != "getitem" or not isinstance(whole, fx.Node):
        return None
    dim = int(argument(source, 1 if source.target is aten.unbind.int else 2, "dim", 0))
    dim = normal_dim(dim, len(shape_of(whole)))
    pieces, index = value(source), node.args[1]
    alike = source.target is aten.unbind.int or all(same(p.shape[dim], 1) for p in pieces)
    return (whole, dim, index) if isinstance(index, int) and alike else None


def _is_whole_slice(node: fx.Node) -> bool:
    source = node.args[0] if node.target is aten.slice.Tensor else None
    return isinstance(source, fx.Node) and all(
        same(a, b) for a, b in zip(shape_of(source), shape_of(node), strict=True)
    )


def _swaps(node: fx.Node) -> bool:
    """Whether a movement of two dimensions exchanges them."""
    if node.target is aten.permute.default:
        return [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[union-attr,operator]
    return node.target is not aten.transpose.int or bool((node.args[1] - node.args[2]) % 2)  # type: ignore[operator]


def root_of(ids: fx.Node) -> fx.Node:
    """The ids of all slots that a routing decision is a column of, or its own node."""
    found = column_of(ids)
    return found[0] if found is not None else ids


def of_one_slot(gate: Gate | Rows, top_k: Any) -> bool:
    """Whether a gate or rows concern one pair per token: a column of the ids, or K = 1."""
    return gate.slot is not None or same(top_k, 1)


def dense_column(engine: Engine, source: fx.Node, of: Gate | Rows, tokens: Any) -> RouterWeight | None:
    """``probs[:, e]`` as the weight of expert ``e``: each pair's weight is ``probs[t, ids[t, k]]``."""
    found = None if of.slot is not None or column_of(of.ids.node) is not None else column_of(source)
    if found is None or found[1] != of.expert or not is_float(source):
        return None
    if any(known is not None and not is_opaque(known) for known in (engine.fact(source), engine.fact(found[0]))):
        return None
    if not same(prod(shape_of(found[0])[:-1]), tokens):
        return None
    return RouterWeight(engine.leaf(found[0]), dense=True)


# ------------------------------------------------------------------------------------- merging


def merge_slots(engine: Engine, total: Sum, node: fx.Node) -> Sum | None:
    """The parts of every slot as one part per expert over all slots; None when no part is about one slot.

    Raises:
        NoMatch: MC207 columns of different tensors, MC213 not every slot exactly once.
    """
    places = [_place(part) for part in total.parts]
    slots = {place for place in places if place is not None}
    if None in places or (len(slots) == 1 and not any(_selects(p) for p in total.parts)):
        return None
    (root, _), *_ = slots
    leaves = {leaf for leaf, _ in slots}
    if len(leaves) != 1:
        raise refuse("MC207", f"the slots are columns of {len(leaves)} different index tensors", node)
    count = shape_of(root.node)[-1]
    groups: dict[Any, list[tuple[int, Part]]] = {}
    for part, place in zip(total.parts, places, strict=True):
        assert place is not None
        rows, gate = part.val.rows, part.gate or part.val.gate_in
        expert = rows.expert if rows is not None else gate.expert if gate is not None else None
        groups.setdefault(expert, []).append((place[1], _merged(engine, part, *place, node)))
    parts = []
    for expert, items in groups.items():
        found = sorted(slot for slot, _ in items)
        if found != list(range(count)):
            whose = "" if expert is None else f" of expert {expert}"
            raise refuse("MC213", f"slots {found}{whose} are summed, expected each of 0..{count - 1} once", node)
        first = items[0][1]
        if any(part != first for _, part in items):
            raise refuse("MC213", f"expert {expert} computes something else or reads other weights per slot", node)
        parts.append(first)
    return replace(total, parts=tuple(parts))


def _selects(part: Part) -> bool:
    """Whether a part's mask is one slot of a mask over all slots: its ids have no node of their own."""
    return any(of.slot is not None for of in (part.gate, part.val.gate_in, part.val.rows) if of is not None)


def _place(part: Part) -> tuple[Leaf, int] | None:
    """The ids of all slots, and the one slot that a part is about."""
    val = part.val
    found = {(of.ids, of.slot) for of in (part.gate, val.gate, val.gate_in, val.rows) if of is not None}
    found |= {(s.weight.ids, None) for s in val.slots if s.weight.ids is not None}
    if len(found) != 1:
        return None
    ((ids, slot),) = found
    if slot is not None:
        return ids, slot
    column = column_of(ids.node)
    return None if column is None else (Leaf(column[0], ids.version), column[1])


def _merged(engine: Engine, part: Part, ids: Leaf, slot: int, node: fx.Node) -> Part:
    """A part as one about all slots, without what may differ from slot to slot."""
    val = part.val
    gates = [None if g is None else _all_slots(engine, g, ids, slot, node) for g in (part.gate, val.gate, val.gate_in)]
    rows = None if val.rows is None else replace(val.rows, ids=ids, slot=None, order=())
    weights = tuple(replace(s, weight=replace(s.weight, ids=ids)) if s.weight.ids is not None else s for s in val.slots)
    bare: Val = replace(val, dims=(), rows=rows, gate=gates[1], gate_in=gates[2], slots=weights)
    return Part(bare, gates[0])


def _all_slots(engine: Engine, gate: Gate, ids: Leaf, slot: int, node: fx.Node) -> Gate:
    weight = None if gate.weight is None else _whole_weight(engine, gate.weight, slot, node)
    return replace(gate, dims=(), ids=ids, slot=None, weight=weight, rows=None, summed=True)


def _whole_weight(engine: Engine, weight: RouterWeight, slot: int, node: fx.Node) -> RouterWeight:
    """The router weights of all slots, of which ``weight`` is the column ``slot``; a cast becomes a step."""
    if weight.dense:
        return weight
    at = weight.leaf.node
    casts: tuple[Any, ...] = ()
    while at.target is aten.to.dtype and isinstance(at.args[0], fx.Node):
        casts = ((torch.Tensor.to, value(at).dtype), *casts)
        at = under_flat_views(at.args[0])
    found = column_of(at)
    if found is None or found[1] != slot:
        held = "no column of a tensor" if found is None else f"column {found[1]}"
        raise refuse("MC207", f"the router weights of slot {slot} are {held}", node)
    if engine.writes_before(at, engine.position[at]) != weight.leaf.version:
        raise refuse("MC204", f"{found[0].name} is written between the reads of its columns", node)
    return RouterWeight(Leaf(found[0], weight.leaf.version), (*casts, *weight.steps))
