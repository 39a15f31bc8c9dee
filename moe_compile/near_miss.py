"""Why a candidate was not rewritten: the nearest form, the failing fact, its source line and what to do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from . import legality, torch_compat
from .canonical import Canonical
from .codes import CODES
from .match.engine import Engine, Miss, ids_of
from .match.facts import Gate, Leaf, Sum, Val
from .match.slots import root_of
from .report import REFUSED, Site
from .spec import NoMatch

topk = torch.ops.aten.topk.default
_FORM_OF_ROWS = {"hit": "index_add_loop", "hit_token": "bool_mask_loop", "sorted": "grouped_mm"}


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
            found |= {s.weight.source for s in fact.slots}
        elif isinstance(fact, Gate):
            found.add("gate" if fact.expert is not None else "matrix")
    for sign, form in (("ids", "gathered_weights"), ("axis", "all_experts"), ("gate", "dense_loop")):
        if sign in found:
            return form
    return "all_experts" if "matrix" in found else ""


def refusals(
    engine: Engine,
    candidates: dict[fx.Node, tuple[fx.Node, Sum]],
    refused: dict[fx.Node, tuple[str, NoMatch]],
    done: set[fx.Node],
) -> list[Site]:
    """One row per routing decision that was not rewritten: its refusal, else the step that went furthest."""
    sites = []
    explained = {root_of(ids) for ids in done}
    for node, (form, error) in refused.items():
        leaf = ids_of(candidates[node][1])
        if leaf is None or root_of(leaf.node) in explained:
            continue
        explained.add(root_of(leaf.node))
        reason = _inner_reason(engine, node, candidates[node][1], leaf) or error
        sites.append(_refusal(engine, form or nearest_form(engine, leaf.node), reason, node))
    for ids, user in engine.ids.items():
        if root_of(ids) in explained:
            continue
        misses = [m for m in engine.misses if m.ids is not None and m.ids.node is ids]
        if not misses and not _feeds_weights(engine, ids):
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


def _lost_at(engine: Engine, nodes: Iterable[fx.Node]) -> NoMatch | None:
    """The first of ``nodes`` that makes something unknown of an expert's value."""
    for node in sorted(nodes, key=engine.position.__getitem__):
        values = [engine.first_facts.get(n) for n in node.all_input_nodes]
        if node not in engine.first_facts and any(isinstance(v, Val) and v.slots for v in values):
            name = str(node.target).removeprefix("aten.")
            return NoMatch("MC303", f"{name} of an expert's value is not a row-wise step of an expert MLP", node)
    return None


def _unrouted_misses(engine: Engine, explained: set[fx.Node]) -> list[Site]:
    """A step that failed before any routing was seen, where a top-k of the graph is still without a row."""
    misses = [m for m in engine.misses if m.ids is None]
    routed = {n for ids in explained for n in (ids, *ids.all_input_nodes)}
    open_choices = [n for n in engine.position if n.target is topk and n not in routed]
    if not misses or not open_choices:
        return []
    last = max(misses, key=lambda m: m.position)
    return [_refusal(engine, "", last.error, open_choices[-1])]


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
    lost = _lost_at(engine, later)
    if lost is not None:
        return _refusal(engine, form, lost, user)
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
