"""From one ``Sum`` of weighted expert outputs to a ``spec.MoE``: every field is proved here or refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import fx

from ..canonical import shape_of, value
from ..spec import Experts, MoE
from .engine import Engine
from .expert import experts_of
from .facts import Gate, Leaf, Part, RouterWeight, Slot, Sum, Val, refuse
from .labels import same
from .nodes import aten, holds_ids
from .routing import top_k
from .stack import merge_weights
from .values import renumber, slots_of


@dataclass(frozen=True)
class Routing:
    """The border of a layer."""

    ids: Leaf
    weight: RouterWeight | None
    x: Leaf


@dataclass(frozen=True)
class Found:
    """A proved layer: the spec (handles are ``Handle``/``Routing`` parts), and where it ends."""

    moe: MoE
    routing: Routing
    output: fx.Node
    base: Leaf | None
    leaves: tuple[Leaf, ...]


def build(engine: Engine, output: fx.Node, total: Sum, form: str) -> Found:
    """Prove that ``total`` is the whole sum of one MoE layer.

    Raises:
        NoMatch: with the first fact that fails.
    """
    val, weighted_input = _one_expression(total, output)
    ids = _same_routing(total, output)
    router = _router_weight(total, output)
    experts = experts_of(engine, val, output)
    _sizes(engine, val, ids, router, experts, output)
    _tokens_in_order(total, output)
    if weighted_input:
        _weighted_input_is_exact(val, experts, output)
    if total.needs or any(_needs_distinct(p, weighted_input) for p in total.parts):
        _prove_distinct(engine, ids, output)
    if router is not None and router.dense:
        prove_range(engine, ids, shape_of(router.leaf.node)[-1], output)
    grouped = any(p.val.rows is not None and p.val.rows.grouped for p in total.parts)
    if grouped or any(s.weight.source == "ids" for s in val.slots):  # an id below zero would move every group
        prove_range(engine, ids, experts.num_experts, output)
    moe = MoE(
        hidden_states=val.x,
        topk_ids=ids,
        topk_weights=router,
        top_k=int(top_k(engine, ids)),
        experts=experts,
        weight_on_input=weighted_input,
        out_dtype=value(output).dtype,
        form=form,
    )
    leaves = [val.x, ids, *([router.leaf] if router is not None else [])]
    for weight in experts.weights:
        leaves += [h.leaf for h in weight.parts]
        leaves += [weight.scale.part.leaf] if weight.scale is not None else []
    if total.base is not None:
        leaves.append(total.base)
    return Found(moe, Routing(ids, router, val.x), output, total.base, tuple(leaves))


def rebased(engine: Engine, total: Sum, node: fx.Node) -> Sum:
    """The sum with what all experts share (a projection before them) moved out, to the border."""
    first = total.parts[0].val
    if len(total.parts) == 1 and expert_of(total.parts[0]) is not None:
        return total  # a single expert shares its weights with nobody
    shared = set(first.slots)
    for part in total.parts:
        shared &= set(part.val.slots)
    shared = {s for s in shared if s.weight.source == "one"}
    if not shared:
        return total
    keys, out = set(), []
    for part in total.parts:
        val = part.val
        mine = {i for i, s in enumerate(val.slots) if s in shared}
        found: list[Any] = []
        _shared_inputs(val.expr, mine, found)
        if len(found) != 1 or _reads_input(val.expr, found[0]) or val.gate_in is not None:
            raise refuse("MC202", "experts share a weight", node)
        (expr,) = found
        used = sorted(slots_of(expr))
        place = [used.index(i) if i in used else 0 for i in range(len(val.slots))]
        keys.add((val.x, tuple(val.slots[i] for i in used), renumber(expr, place)))
        kept = [i for i in range(len(val.slots)) if i not in mine]
        order = [kept.index(i) if i in kept else 0 for i in range(len(val.slots))]
        new = renumber(_substitute(val.expr, expr), order)
        out.append(replace(part, val=replace(val, expr=new, slots=tuple(val.slots[i] for i in kept))))
    at = engine.made.get(keys.pop()) if len(keys) == 1 else None
    if at is None:
        raise refuse("MC202", "experts share a weight", node)
    leaf = engine.leaf_at(at)
    return replace(total, parts=tuple(replace(p, val=replace(p.val, x=leaf)) for p in out))


def _shared_inputs(expr: Any, shared: set[int], found: list[Any]) -> None:
    """The largest subexpressions made of shared weights alone."""
    slots = slots_of(expr)
    if not slots:
        return
    if slots <= shared:
        if expr not in found:
            found.append(expr)
        return
    for inner in expr[2] if expr[0] == "op" else (expr[4],) if expr[0] == "cut" else (expr[2],):
        _shared_inputs(inner, shared, found)


def _reads_input(expr: Any, inner: Any) -> bool:
    """Whether ``expr`` reads the input itself outside of ``inner``."""
    if expr == inner:
        return False
    if expr[0] == "op":
        return any(_reads_input(a, inner) for a in expr[2])
    return bool(expr == ("x",) or (expr[0] != "const" and _reads_input(expr[-1], inner)))


def _substitute(expr: Any, inner: Any) -> Any:
    """``expr`` with ``inner`` as its input."""
    if expr == inner:
        return ("x",)
    if expr[0] in ("lin", "bias"):
        return (expr[0], expr[1], _substitute(expr[2], inner))
    if expr[0] == "cut":
        return (*expr[:4], _substitute(expr[4], inner))
    if expr[0] == "op":
        return (expr[0], expr[1], tuple(_substitute(a, inner) for a in expr[2]), expr[3])
    return expr


def _gate_of(part: Part) -> Gate | None:
    return part.gate if part.gate is not None else part.val.gate_in


def expert_of(part: Part) -> int | None:
    """The constant expert id that a part belongs to, or None when it covers all experts."""
    gate = _gate_of(part)
    if part.val.rows is not None and part.val.rows.expert is not None:
        return part.val.rows.expert
    return gate.expert if gate is not None else None


def _one_expression(total: Sum, node: fx.Node) -> tuple[Val, bool]:
    """All parts as one expression with an ``e`` dimension on every weight."""
    first = total.parts[0]
    inputs = {p.val.gate_in is not None for p in total.parts}
    if len(inputs) > 1 or any(p.val.gate_in is not None and p.gate is not None for p in total.parts):
        raise refuse("MC302", "the router weight is applied to the input and to the output", node)
    weighted_input = inputs.pop()
    experts = [expert_of(p) for p in total.parts]
    if experts[0] is None:
        if len(total.parts) != 1:
            raise refuse("MC208", f"{len(total.parts)} sums over all experts are added up", node)
        val = first.val
        if val.rows is not None and val.rows.kind != "sorted":
            raise refuse("MC208", "the sum does not cover the experts one by one", node)
        sources = {s.weight.source for s in val.slots}
        if not sources <= {"axis", "ids"} or len(sources) != 1:
            raise refuse("MC201", f"some weights are not per expert ({', '.join(sorted(sources))})", node)
        return val, weighted_input
    if None in experts:
        raise refuse("MC208", "a sum over all experts is mixed with single experts", node)
    order = sorted(range(len(experts)), key=lambda i: experts[i])  # type: ignore[arg-type,return-value]
    ids = [experts[i] for i in order]
    if ids != list(range(len(ids))):
        raise refuse("MC208", f"experts {_short(ids)} are summed, expected each of 0..{len(ids) - 1} once", node)
    parts = [total.parts[i] for i in order]
    for e, part in enumerate(parts):
        gate = _gate_of(part)
        if gate is not None and gate.expert != e:
            raise refuse("MC208", f"rows of expert {e} are weighted for expert {gate.expert}", node)
        v = part.val
        if v.x != first.val.x:
            raise refuse("MC207", f"expert {e} reads another input than expert 0", v.x.node)
        if v.expr != parts[0].val.expr or len(v.slots) != len(parts[0].val.slots):
            raise refuse("MC201", f"expert {e} computes something else than expert 0", node)
        for n, slot in enumerate(v.slots):
            if slot.weight.source == "row" and slot.weight.expert != e:
                raise refuse("MC208", f"tokens of expert {e} go through row {slot.weight.expert}", node)
            if slot.transposed != parts[0].val.slots[n].transposed:
                raise refuse("MC201", "some experts' weights are transposed and others are not", node)
    if len(parts) < 2:
        raise refuse("MC208", "a single expert is no mixture", node)
    slots = tuple(
        Slot(merge_weights([p.val.slots[n].weight for p in parts], node), parts[0].val.slots[n].transposed)
        for n in range(len(parts[0].val.slots))
    )
    val = replace(parts[0].val, slots=slots, expr=renumber(parts[0].val.expr, list(range(len(slots)))))
    return val, weighted_input


def _short(ids: list[Any]) -> str:
    text = [str(i) for i in ids]
    return "[" + ", ".join(text if len(text) <= 8 else [*text[:4], "..", *text[-2:]]) + "]"


def _same_routing(total: Sum, node: fx.Node) -> Leaf:
    leaves = set()
    for part in total.parts:
        gate, rows = _gate_of(part), part.val.rows
        if any(of is not None and of.slot is not None for of in (gate, rows)):
            raise refuse("MC213", "some experts are summed over one slot of the top-k only", node)
        leaves |= {gate.ids} if gate is not None else set()
        leaves |= {rows.ids} if rows is not None else set()
        leaves |= {s.weight.ids for s in part.val.slots if s.weight.ids is not None}
    if len(leaves) != 1:
        raise refuse("MC207", f"the experts are chosen by {len(leaves)} different index tensors", node)
    return leaves.pop()


def _router_weight(total: Sum, node: fx.Node) -> RouterWeight | None:
    found = {g.weight if (g := _gate_of(p)) is not None else None for p in total.parts}
    if len(found) != 1:
        raise refuse("MC207", "the experts are weighted by different tensors", node)
    return found.pop()


def _needs_distinct(part: Part, weighted_input: bool) -> bool:
    gate = _gate_of(part)
    if weighted_input and (part.val.rows is None or part.val.rows.kind == "hit_token"):
        # One run of the expert on the input times all its weights: a run per slot is something else.
        return all(s.weight.source != "ids" for s in part.val.slots)
    if gate is None:
        return part.val.rows is not None and part.val.rows.kind == "hit_token"
    return gate.distinct


# ------------------------------------------------------------------------------------- routing facts


def _sizes(engine: Engine, val: Val, ids: Leaf, router: RouterWeight | None, experts: Experts, node: fx.Node) -> None:
    """T, K and H agree between the border values and the output."""
    k = top_k(engine, ids)
    if not isinstance(k, int):
        raise refuse("MC207", f"top-k is not a constant: {k}", node)
    shape = shape_of(ids.node)
    tokens = prod(shape[:-1] if len(shape) > 1 else shape)
    if not same(prod(shape_of(val.x.node)[:-1]), tokens):
        raise refuse("MC207", "hidden states and expert ids have different numbers of tokens", node)
    if router is not None and not router.dense and not same(prod(shape_of(router.leaf.node)), tokens * k):
        raise refuse("MC207", "router weights and expert ids have different sizes", node)
    out = shape_of(node)
    if not same(prod(out), tokens * experts.hidden_size) or not same(out[-1], experts.hidden_size):
        raise refuse("MC207", "the result does not have one row per token", node)
    if shape_of(val.x.node)[-1] != experts.hidden_size:
        raise refuse("MC207", "the input features are not the experts' hidden size", node)


def _tokens_in_order(total: Sum, node: fx.Node) -> None:
    """The result's tokens stand first, in the order of the hidden states."""
    order = [a.name for d in total.dims for a in d]
    tokens = sorted(n for n in order if n.startswith("t"))
    if order[: len(tokens)] != tokens:
        raise refuse("MC207", "the result has its tokens in another order than the hidden states", node)


def _weighted_input_is_exact(val: Val, experts: Experts, node: fx.Node) -> None:
    """Where experts also run on unrouted tokens (input scaled by zero), they must map zero to zero."""
    if val.rows is not None or not any(s.weight.source == "axis" for s in val.slots):
        return
    if any(b is not None for b in (experts.b1, experts.b2, experts.b3)) or experts.activation is None:
        raise refuse("MC302", "experts also run on unrouted tokens and do not map zero to zero", node)


def _prove_distinct(engine: Engine, ids: Leaf, node: fx.Node) -> None:
    if same(top_k(engine, ids), 1) or chosen_from(engine, ids.node, whole_rows=True) is not None:
        return
    raise refuse("MC207", "a token may name one expert twice: the ids do not come from a top-k", node)


def prove_range(engine: Engine, ids: Leaf, experts: int, node: fx.Node) -> None:
    size = chosen_from(engine, ids.node)
    if size is None:
        raise refuse("MC207", f"the ids are not known to lie in [0, {experts}): they do not come from a top-k", node)
    if not isinstance(size, int) or size > experts:
        raise refuse("MC207", f"the ids come from a top-k over {size} scores, the weights hold {experts} experts", node)


_THROUGH = (
    aten.to.dtype, aten.view.default, aten.reshape.default, aten.clone.default, aten.contiguous.default,
    aten.detach.default, aten.squeeze.dim, aten.unsqueeze.default, aten.flatten.using_ints, aten._to_copy.default,
    aten.alias.default,
)  # fmt: skip


def chosen_from(engine: Engine, node: fx.Node, whole_rows: bool = False) -> Any:
    """Number of scores that the ids were chosen from (top-k, sort or argmax over the last dimension), or None.

    ``whole_rows``: every row of ids is one choice. Two choices side by side (``topk`` over two heads, then
    ``view(T, 2 * K)``) may name one expert twice.
    """
    while node.target in _THROUGH:
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        if engine.version(node):
            return None  # a write may name any expert
        if not holds_ids(node) or (whole_rows and not same(shape_of(node)[-1], shape_of(inner)[-1])):
            return None
        node = inner
    if node.target is aten.slice.Tensor or node.target is aten.narrow.default:
        inner = node.args[0]  # some of the rows or slots: still a choice each
        assert isinstance(inner, fx.Node)
        node = inner
    if engine.version(node):
        return None
    if node.target in (aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable):
        source, dim = node.args[0], (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
    else:
        chosen = node.args[0] if node.args else None
        if (
            not isinstance(chosen, fx.Node)
            or node.args[1:] != (1,)
            or chosen.target not in (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
        ):
            return None
        at = 2 if chosen.target is aten.topk.default else 1
        source = chosen.args[0]
        dim = chosen.args[at] if len(chosen.args) > at else chosen.kwargs.get("dim", -1)
    assert isinstance(source, fx.Node)
    shape = shape_of(source)
    if dim not in (-1, len(shape) - 1):
        return None
    return shape[-1]
