"""The pass: canonical copy -> facts -> anchors in Inductor's PatternMatcherPass -> proof -> lowering."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import claims, legality, lower, near_miss, planning, torch_compat
from .canonical import Canonical, canonicalise
from .loops import effects, substitution
from .loops import marks as loop_marks
from .match import combine, groups, marks, routing, rows, scales, stack, values, views
from .match.engine import Engine, Rule, ids_of
from .match.facts import Sum
from .match.layer import Found, rebased
from .patterns import FORMS, grouped_mm, name_of
from .report import REWRITTEN, Site, record
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
    plans: list[planning.Plan] = field(default_factory=list)
    original: fx.Graph | None = None
    broken: list[claims.Broken] = field(default_factory=list)  # what rewritten loops assumed and nobody could prove
    miss: substitution.Miss | None = None  # the nearest one, for rewritten loops


def facts_of(copy: Canonical) -> Engine:
    """Run every rule over a canonical copy."""
    tables = [
        views.RULES,
        scales.RULES,
        values.RULES,
        stack.RULES,
        groups.RULES,
        marks.RULES,
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
    """Find and prove every MoE layer of ``gm``; changes nothing.

    A graph of rewritten loops is not one to run: what was proved in it is recorded here, and their functions are
    traced as they were written.
    """
    if not lower.has_marks(gm):
        return _analyse(gm)
    result = _or_trace_again(_analyse, gm)
    proved = not result.broken and not effects.changed()
    for site in result.sites if proved else ():
        record(site)
    substitution.trace_again((b.site for b in result.broken), result.miss, bottom=proved)


def _analyse(gm: fx.GraphModule) -> Result:
    result = Result()
    if not _worth_a_look(gm):
        return result
    copy = canonicalise(gm)
    engine = facts_of(copy)
    candidates = _candidates(engine)
    passes = torch_compat.matcher_pass()
    anchors = {target for form in FORMS for target in form.ANCHORS}
    refused: dict[fx.Node, tuple[str, NoMatch]] = {}
    layers: list[tuple[Found, legality.Region]] = []

    def check(match: Any) -> bool:
        node = match.nodes[0]
        if node not in candidates:
            return False
        try:
            form, found = _prove(engine, *candidates[node])
            region = legality.region_of(engine, found)
            planning.shape_is_restorable(found)
            plan = planning.plan_of(copy, found, region)
        except NoMatch as error:
            refused[node] = (getattr(error, "form", ""), error)
            return False
        layers.append((found, region))
        result.plans.append(plan)
        result.sites.append(
            Site(REWRITTEN, form=form, location=near_miss.where(copy, node), spec=found.moe, kernel=kernel_text(found))
        )
        return True

    torch_compat.register_anchor(passes, sorted(anchors, key=str), check, lambda match, *a, **k: None)
    passes.apply(copy.graph)
    done = {plan.found.routing.ids.node for plan in result.plans}
    result.sites += near_miss.refusals(engine, candidates, refused, done)
    result.broken = claims.check(engine, layers)
    for site in result.sites:
        if site.code is not None:
            result.miss = substitution.Miss(site.code, site.reason, site.location)
            return result
    for error in (b.error for b in result.broken[:1]):
        location = near_miss.where(copy, error.node) if isinstance(error.node, fx.Node) else ""
        result.miss = substitution.Miss(error.code, error.reason, location)
    return result


def rewrite_graph(gm: fx.GraphModule) -> Result:
    """``analyse_graph``, then replace every proved layer of ``gm`` by its op; a failure leaves ``gm`` as it was.

    A graph of rewritten loops (``loops/``) that cannot be proved is no graph to run: Dynamo traces again.
    """
    if not lower.has_marks(gm):
        return _rewrite(gm)
    result = _or_trace_again(_rewrite, gm)
    if result.broken or lower.has_marks(gm) or effects.changed():
        if effects.changed():
            result.miss = substitution.Miss("MC214", "Python state changes only for experts with tokens", "")
        log.debug("rewritten loops are not proved: %s", "; ".join(str(b.error) for b in result.broken) or result.sites)
        substitution.trace_again((b.site for b in result.broken), result.miss)
    return result


def _or_trace_again(step: Callable[[fx.GraphModule], Result], gm: fx.GraphModule) -> Result:
    """``step`` of a graph of rewritten loops: what it cannot read is traced as it was written."""
    try:
        return step(gm)
    except Exception as error:
        log.debug("rewritten loops cannot be analysed: %s: %s", type(error).__name__, error)
        substitution.trace_again(())


def _rewrite(gm: fx.GraphModule) -> Result:
    result = _analyse(gm)
    if not result.plans or result.broken:
        return result
    result.original = torch_compat.copy_graph(gm.graph)
    try:
        for plan in result.plans:
            lower.lower(plan)
        lower.erase_marks(gm.graph)
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
            if node.target in loop_marks.OPS:
                return True
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


def kernel_text(found: Found) -> str:
    """Which kernel serves a layer, as text for the report."""
    device = found.moe.hidden_states.node.meta["val"].device.type
    if found.moe.experts.activation is None:
        return f"{device}: two grouped GEMMs around the original activation"
    if found.moe.experts.fp8:
        where = "cuda: Triton, by T" if device == "cuda" else f"{device}: GEMMs"
        return f"{where}; fp8 weights, widened in the kernel"
    return "cuda: Triton, by T" if device == "cuda" else f"{device}: grouped GEMMs"
