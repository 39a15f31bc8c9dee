"""Why a candidate was not rewritten: the nearest form, the failing fact, its source line and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from . import legality, torch_compat
from .canonical import Canonical, shape_of, tensor_inputs, value
from .codes import CODES
from .match.engine import Engine, Miss, ids_of
from .match.facts import Counts, Gate, Leaf, Picked, Sum, Val
from .match.labels import same
from .match.layer import chosen_from
from .match.slots import root_of
from .report import REFUSED, Site
from .spec import NoMatch

topk = torch.ops.aten.topk.default
_FORM_OF_ROWS = {"hit": "index_add_loop", "hit_token": "bool_mask_loop", "sorted": "grouped_mm"}

_FORM_OF_SIGN = {
    "stack": "stack_gather", "ids": "gathered_weights", "axis": "all_experts", "gate": "dense_loop",
    "matrix": "all_experts",
}  # fmt: skip


def nearest_form(engine: Engine, ids: fx.Node) -> str:
    """The form whose first steps a routing decision goes through."""
    found: set[str] = set()
    for fact in engine.first_facts.values():
        leaf = ids_of(fact)
        if not isinstance(leaf, Leaf) or leaf.node is not ids:
            continue
        rows = getattr(fact, "rows", None)
        if rows is not None:
            return _FORM_OF_ROWS[rows.kind]
        if isinstance(fact, Val):
            found |= {"stack" if s.weight.leaves and s.weight.source == "ids" else s.weight.source for s in fact.slots}
        elif isinstance(fact, Gate):
            found.add("gate" if fact.expert is not None else "matrix")
    return next((form for sign, form in _FORM_OF_SIGN.items() if sign in found), "")


def refusals(
    engine: Engine,
    candidates: dict[fx.Node, tuple[fx.Node, Sum]],
    refused: dict[fx.Node, tuple[str, NoMatch]],
    done: set[fx.Node],
) -> list[Site]:
    """One row per routing decision that was not rewritten: its refusal, else the step that went furthest."""
    unread = engine.copy.refusal
    if unread is not None:
        return [_refusal(engine, "", unread, unread.node)]
    sites = []
    explained = {root_of(ids) for ids in done}
    for node, (form, error) in refused.items():
        leaf = ids_of(candidates[node][1])
        if leaf is None or root_of(leaf.node) in explained:
            continue
        explained.add(root_of(leaf.node))
        total = candidates[node][1]
        reason = _inner_reason(engine, node, total, leaf) or _reads_the_sum(engine, node, total, leaf) or error
        sites.append(_refusal(engine, form or nearest_form(engine, leaf.node), reason, node))
    for ids, user in engine.ids.items():
        if root_of(ids) in explained:
            continue
        misses = [m for m in engine.misses if m.ids is not None and m.ids.node is ids]
        if not misses and not _feeds_weights(engine, ids) and not _chooses_experts(engine, ids):
            continue
        explained.add(root_of(ids))
        sites.append(_nearest_miss(engine, misses, ids, user))
    return sites + _unrouted_misses(engine, explained)


def _inner_reason(engine: Engine, output: fx.Node, total: Sum, ids: Leaf) -> NoMatch | None:
    """Why a value inside a refused layer lost its meaning, if one did: nearer to the cause than the refusal."""
    gates = [g for p in total.parts for g in (p.gate, p.val.gate_in) if g is not None]
    router = {g.weight.leaf.node for g in gates if g.weight is not None}
    inside = {n for n in legality.between(engine, output, router) if engine.position[n] > engine.position[ids.node]}
    misses = [m for m in engine.misses if m.node in inside]
    if misses:
        return max(misses, key=lambda m: m.position).error
    return _lost_at(engine, inside - {output})


def _reads_the_sum(engine: Engine, node: fx.Node, total: Sum, ids: Leaf) -> NoMatch | None:
    """What became of a sum that ends before the last expert: another step than an addition read it."""
    if len(_asked(engine, ids.node)) <= len(total.parts):
        return None
    for user in (n for n in engine.position if n.op == "call_function"):
        read = [engine.first_facts.get(n) for n in user.all_input_nodes if engine.position[n] >= engine.position[node]]
        if user not in engine.first_facts and any(isinstance(f, (Sum, Picked)) for f in read):
            name = str(user.target).removeprefix("aten.")
            return NoMatch("MC210", f"{name} reads the sum of the experts so far", user)
    return None


def _lost_at(engine: Engine, nodes: Iterable[fx.Node], stacks: set[int] | None = None) -> NoMatch | None:
    """The first of ``nodes`` that makes something unknown of an expert's value (one of a stack of that many)."""
    for node in sorted(nodes, key=engine.position.__getitem__):
        values = [engine.first_facts.get(n) for n in node.all_input_nodes]
        if node in engine.first_facts or node.op != "call_function":
            continue
        if any(isinstance(v, Val) and v.slots and (stacks is None or _stack_size(v) in stacks) for v in values):
            name = str(node.target).removeprefix("aten.")
            random = _random_source(engine, node)
            if random is not None:
                return NoMatch("MC205", f"random numbers ({random.name}) reach an expert's value in {name}", random)
            return NoMatch("MC303", f"{name} of an expert's value is not a row-wise step of an expert MLP", node)
    return None


def _random_source(engine: Engine, node: fx.Node) -> fx.Node | None:
    """The random operation behind a node, or behind an input of it that has no meaning of its own."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        at = todo.pop()
        if at in seen or (at is not node and at in engine.first_facts):
            continue
        seen.add(at)
        if torch.Tag.nondeterministic_seeded in getattr(at.target, "tags", ()):
            return at
        todo.extend(tensor_inputs(at))
    return None


def _unrouted_misses(engine: Engine, explained: set[fx.Node]) -> list[Site]:
    """A step that failed before any routing was seen, where a top-k of the graph is still without a row."""
    misses = [m for m in engine.misses if m.ids is None]
    routed = {n for ids in explained for n in (ids, *ids.all_input_nodes)}
    open_choices = [n for n in engine.position if n.target is topk and n not in routed]
    if not misses or not open_choices:
        return []
    last, inner = max(misses, key=lambda m: m.position), misses
    while inner:  # the cause lies before what it led to
        last = max(inner, key=lambda m: m.position)
        inside = legality.between(engine, tensor_inputs(last.node)[0], set())
        inner = [m for m in misses if m.node in inside]
    return [_refusal(engine, "", _lost_at(engine, inside) or last.error, open_choices[-1])]


def _chooses_experts(engine: Engine, ids: fx.Node) -> bool:
    """Whether ids that no expert was seen to read are still expert ids.

    They come from a top-k, and two of them at least are asked for by number or their counts are as many as there are
    stacked weights; so tokens compared with one end-of-text id, or ids scattered into an attention mask, are none.
    """
    if chosen_from(engine, ids) is None:
        return False
    return len(_asked(engine, ids)) > 1 or any(_has_stack_of(engine, n) for n in _stack_sizes(engine, ids))


def _asked(engine: Engine, ids: fx.Node) -> set[int]:
    """The experts that ``ids`` are compared with one by one."""
    return {f.expert for f in _gates(engine, ids) if isinstance(f, Gate) and f.expert is not None}


def _gates(engine: Engine, ids: fx.Node) -> list[Gate | Counts]:
    """The masks, combine matrices and counts made of ``ids``."""
    found = [f for f in engine.first_facts.values() if isinstance(f, (Gate, Counts))]
    return [f for f in found if f.ids.node is ids]


def _stack_sizes(engine: Engine, ids: fx.Node) -> set[Any]:
    """How many experts the combine matrices and counts of ``ids`` tell apart."""
    return {a.size for f in _gates(engine, ids) for d in f.dims for a in d if a.name == "e"}


def _stack_size(val: Val) -> Any:
    """Number of experts of a value that all experts of a stack compute at once, or None."""
    sizes = [a.size for s in val.slots if s.weight.source == "axis" for d in s.weight.dims for a in d if a.name == "e"]
    return sizes[0] if sizes else None


def _has_stack_of(engine: Engine, size: object) -> bool:
    """Whether any product of the graph reads weights ``[size, out, in]``."""
    products = (n for n in engine.position if n.op == "call_function" and str(n.target).startswith(_PRODUCTS))
    return any(len(s) == 3 and same(s[0], size) for n in products for s in map(shape_of, tensor_inputs(n)))


_PRODUCTS = ("aten.bmm", "aten.baddbmm", "aten.matmul", "aten.einsum", "aten._grouped_mm")
_DROPS = ("slice", "bitwise_and", "__and__", "logical_and", "cumsum", "gt", "ge", "lt", "le")


def _choice_lost_at(engine: Engine, nodes: Iterable[fx.Node], ids: fx.Node) -> NoMatch | None:
    """The first of ``nodes`` that makes something unknown of a mask, a row index or a count of ``ids``."""
    for node in sorted(nodes, key=engine.position.__getitem__):
        known = [ids_of(engine.first_facts.get(n)) for n in node.all_input_nodes]
        if node in engine.first_facts or legality.is_size_check(node):
            continue
        if not any(isinstance(k, Leaf) and k.node is ids for k in known):
            continue
        name = str(node.target).removeprefix("aten.")
        result = value(node)
        if isinstance(result, torch.Tensor) and result.dtype.is_complex:
            return NoMatch("MC401", f"the experts' values are {result.dtype}", node)
        if name.split(".")[0] in _DROPS:
            return NoMatch("MC209", f"{name} of the routing decision limits or drops the tokens of an expert", node)
        return NoMatch("MC200", f"{name} of the routing decision is no step that a form knows", node)
    return None


def _feeds_weights(engine: Engine, ids: fx.Node) -> bool:
    """Whether a routing decision picks rows or weights of experts."""
    for fact in engine.first_facts.values():
        leaf = ids_of(fact) if isinstance(fact, (Val, Sum)) else None
        if isinstance(leaf, Leaf) and leaf.node is ids:
            return True
    return False


def _nearest_miss(engine: Engine, misses: list[Miss], ids: fx.Node, user: fx.Node) -> Site:
    form = nearest_form(engine, ids)
    if misses:
        last = max(misses, key=lambda m: m.position)
        return _refusal(engine, form, last.error, user)
    later = [n for n, at in engine.position.items() if at > engine.position[user] and n.op == "call_function"]
    if _feeds_weights(engine, ids):
        lost = [_lost_at(engine, later)]
    else:
        lost = [_lost_at(engine, engine.position, _stack_sizes(engine, ids)), _choice_lost_at(engine, later, ids)]
    found = [error for error in lost if error is not None]
    if found:
        return _refusal(engine, form, min(found, key=lambda e: engine.position[e.node]), user)
    error = NoMatch(
        "MC200", "experts are chosen here, but their outputs are combined in a way that no form knows", user
    )
    return _refusal(engine, form, error, user)


def _refusal(engine: Engine, form: str, error: NoMatch, node: fx.Node) -> Site:
    at = error.node if isinstance(error.node, fx.Node) else node
    location = where(engine.copy, at) or where(engine.copy, node)
    fix = CODES[error.code].fix if error.code in CODES else ""
    return Site(REFUSED, form=form, code=error.code, reason=error.reason, location=location, fix=fix)


def where(copy: Canonical, node: fx.Node) -> str:
    """The user's line behind a canonical node."""
    origin = copy.origin(node) or copy.first_origin.get(node)
    return torch_compat.user_frame(origin) if origin is not None else torch_compat.user_frame(node)
