"""The pass: canonical copy -> facts -> anchors in Inductor's PatternMatcherPass -> proof -> lowering."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import legality, lower, report, torch_compat
from .canonical import Canonical, canonicalise
from .match import combine, routing, rows, stack, values, views
from .match.engine import Engine, Miss, Rule, ids_of
from .match.facts import Leaf, Sum, Val
from .match.layer import Found, rebased
from .patterns import FORMS, grouped_mm, name_of
from .report import REFUSED, REWRITTEN, Site
from .spec import NoMatch

topk = torch.ops.aten.topk.default
log = logging.getLogger("moe_compile.match")
# Any routing decision goes through one of these; a graph without them is not traced a second time.
_ANCHOR_NAMES = (
    "topk", "argmax", "one_hot", "histc", "sort", "max", "scatter", "eq", "bincount", "gather", "index_select",
    "take_along_dim",
)  # fmt: skip


@dataclass
class Result:
    """What one graph held."""

    sites: list[Site] = field(default_factory=list)
    plans: list[lower.Plan] = field(default_factory=list)
    original: fx.Graph | None = None


def facts_of(copy: Canonical) -> Engine:
    """Run every rule over a canonical copy."""
    tables = [
        views.RULES,
        values.RULES,
        stack.RULES,
        combine.RULES,
        routing.RULES,
        rows.RULES,
        *(form.RULES for form in FORMS),
        grouped_mm.late_rules(),
    ]
    return Engine(copy, tables, _fallbacks).run()


def _fallbacks(target: Any) -> tuple[Rule, ...]:
    return (values.pointwise,) if values.is_pointwise(target) else ()


def analyse_graph(gm: fx.GraphModule) -> Result:
    """Find and prove every MoE layer of ``gm``; changes nothing."""
    result = Result()
    if not _worth_a_look(gm):
        return result
    copy = canonicalise(gm)
    engine = facts_of(copy)
    candidates = _candidates(engine)
    passes = torch_compat.matcher_pass()
    anchors = {target for form in FORMS for target in form.ANCHORS}
    refused: dict[fx.Node, tuple[str, NoMatch]] = {}

    def check(match: Any) -> bool:
        node = match.nodes[0]
        if node not in candidates:
            return False
        try:
            form, found = _prove(engine, *candidates[node])
            region = legality.region_of(engine, found)
            lower.shape_is_restorable(found)
            plan = lower.plan(copy, found, region)
        except NoMatch as error:
            refused[node] = (getattr(error, "form", ""), error)
            return False
        result.plans.append(plan)
        result.sites.append(
            Site(REWRITTEN, form=form, location=_where(copy, node), spec=found.moe, kernel=kernel_text(found))
        )
        return True

    torch_compat.register_anchor(passes, sorted(anchors, key=str), check, lambda match, *a, **k: None)
    passes.apply(copy.graph)
    done = {plan.found.routing.ids.node for plan in result.plans}
    result.sites += _refusals(engine, candidates, refused, done)
    return result


def rewrite_graph(gm: fx.GraphModule) -> Result:
    """``analyse_graph``, then replace every proved layer of ``gm`` by its op; a failure leaves ``gm`` as it was."""
    result = analyse_graph(gm)
    if not result.plans:
        return result
    result.original = torch_compat.copy_graph(gm.graph)
    try:
        for plan in result.plans:
            lower.lower(plan)
        gm.graph.lint()
    except Exception:
        gm.graph = result.original
        raise
    finally:
        gm.recompile()
    return result


def _worth_a_look(gm: fx.GraphModule) -> bool:
    """Whether anything in the graph could be a routing decision: tracing a copy costs time."""
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method"):
            name = getattr(node.target, "__name__", str(node.target)).lower()
            if any(a in name for a in _ANCHOR_NAMES) or (name == "getitem" and _indexes_by_tensor(node)):
                return True
    return False


def _indexes_by_tensor(node: fx.Node) -> bool:
    index = node.args[1]
    return any(isinstance(i, fx.Node) for i in (index if isinstance(index, tuple) else (index,)))


def _candidates(engine: Engine) -> dict[fx.Node, tuple[fx.Node, Sum]]:
    """For each routing decision and input the largest sum: the anchor that completes it -> its output.

    The output is the anchor itself, or a cast that is the anchor's only user.
    """
    best: dict[Any, tuple[fx.Node, fx.Node, Sum]] = {}
    for node, total in engine.sums:
        key = (ids_of(total), total.parts[0].val.x)
        known = best.get(key)
        if known is None or len(total.parts) > len(known[2].parts):
            best[key] = (node, node, total)
        elif _is_cast_of(node, known[1], total):
            best[key] = (known[0], node, total)
    return {anchor: (output, total) for anchor, output, total in best.values()}


def _is_cast_of(node: fx.Node, known: fx.Node, total: Sum) -> bool:
    """A cast of the result that nothing else uses belongs to the layer."""
    return node.args[:1] == (known,) and len(known.users) == 1 and "to" in str(node.target) and total.base is None


def _prove(engine: Engine, node: fx.Node, total: Sum) -> tuple[str, Found]:
    total = rebased(engine, total, node)
    nearest: tuple[str, NoMatch] | None = None
    for form in FORMS:
        try:
            return name_of(form), form.match(engine, node, total)
        except NoMatch as error:
            if error.code != "MC200" and nearest is None:
                nearest = (name_of(form), error)
    if nearest is None:
        raise NoMatch("MC200", "the sum fits no form", node)
    nearest[1].form = nearest[0]  # type: ignore[attr-defined]
    raise nearest[1]


def _refusals(
    engine: Engine,
    candidates: dict[fx.Node, tuple[fx.Node, Sum]],
    refused: dict[fx.Node, tuple[str, NoMatch]],
    done: set[fx.Node],
) -> list[Site]:
    """One row per routing decision that was not rewritten: its refusal, else the step that went furthest."""
    sites = []
    explained = set(done)
    for node, (form, error) in refused.items():
        leaf = ids_of(candidates[node][1])
        if leaf is None or leaf.node in explained:
            continue
        explained.add(leaf.node)
        sites.append(_refusal(engine, form, _inner_reason(engine, node, leaf) or error, node))
    for ids, user in engine.ids.items():
        if ids in explained:
            continue
        misses = [m for m in engine.misses if m.ids is not None and m.ids.node is ids]
        if not misses and not _feeds_weights(engine, ids):
            continue
        explained.add(ids)
        sites.append(_nearest_miss(engine, misses, user))
    return sites + _unrouted_misses(engine, explained)


def _inner_reason(engine: Engine, output: fx.Node, ids: Leaf) -> NoMatch | None:
    """Why a value inside a refused layer lost its meaning, if one did: nearer to the cause than the refusal."""
    inside = {n for n in legality.between(engine, output, set()) if engine.position[n] > engine.position[ids.node]}
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


def _nearest_miss(engine: Engine, misses: list[Miss], user: fx.Node) -> Site:
    if misses:
        last = max(misses, key=lambda m: m.position)
        return _refusal(engine, "", last.error, user)
    later = [n for n, at in engine.position.items() if at > engine.position[user] and n.op == "call_function"]
    lost = _lost_at(engine, later)
    if lost is not None:
        return _refusal(engine, "", lost, user)
    error = NoMatch(
        "MC200", "experts are chosen here, but their outputs are combined in a way that no form knows", user
    )
    return _refusal(engine, "", error, user)


def _refusal(engine: Engine, form: str, error: NoMatch, node: fx.Node) -> Site:
    from .codes import CODES

    at = error.node if isinstance(error.node, fx.Node) else node
    where = _where(engine.copy, at) or _where(engine.copy, node)
    fix = CODES[error.code].fix if error.code in CODES else ""
    return Site(REFUSED, form=form, code=error.code, reason=error.reason, location=where, fix=fix)


def _where(copy: Canonical, node: fx.Node) -> str:
    """The user's line behind a canonical node."""
    origin = copy.origin(node) or copy.first_origin.get(node)
    return torch_compat.user_frame(origin) if origin is not None else torch_compat.user_frame(node)


def kernel_text(found: Found) -> str:
    """Which kernel serves a layer, as text for the report."""
    device = found.moe.hidden_states.node.meta["val"].device.type
    if found.moe.experts.activation is None:
        return f"{device}: two grouped GEMMs around the original activation"
    return "cuda: Triton, by T" if device == "cuda" else f"{device}: grouped GEMMs"


__all__ = ["Result", "analyse_graph", "report", "rewrite_graph"]
