"""Facts about a whole region that no single rule can see: borders that hold, nothing inside used elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .canonical import placeholder_value, shape_of, tensor_inputs, value
from .loops import marks
from .match.engine import Engine
from .match.facts import Filled, Leaf, Picked, Sum, Val, refuse
from .match.layer import Found
from .match.nodes import VIEWS, aten, keeps_order, mutated, writes, written

_SIZE_CHECKS = ("sym_size", "_assert_scalar", "sym_constrain_range", "_assert_tensor_metadata")
_COMPARISONS = ("ge", "le", "gt", "lt", "eq", "ne", "and_", "mul", "add", "sub", "sym_max", "sym_min")


@dataclass(frozen=True)
class Region:
    """The canonical nodes that a layer replaces; ``buffer`` and ``aliases`` hold the result after the layer too.

    ``kept`` lie between border and output, but something else needs them: they run as before.
    """

    nodes: frozenset[fx.Node]
    buffer: fx.Node
    aliases: tuple[fx.Node, ...]
    kept: frozenset[fx.Node]


def region_of(engine: Engine, found: Found) -> Region:
    """The region between a layer's border and its output, proved to be replaceable.

    Raises:
        NoMatch: MC203 an inner value is used elsewhere, MC204 a write lies between, MC211 autocast,
            MC507 gradients are needed.
    """
    border = {leaf.node for leaf in found.leaves}
    nodes = between(engine, found.output, border)
    _borders_hold(engine, found)
    _nothing_used_outside(engine, found, nodes)
    _no_mode_changes(engine, found, nodes)
    _no_double(engine, found, nodes)
    _no_gradients(engine, found)
    base = engine.base(found.output)
    aliases = (n for n in (base, *engine.views(base)) if n in nodes and n is not found.output and _whole(n, base))
    kept = _needed_elsewhere(engine, found, nodes)
    return Region(frozenset(nodes - kept), base, tuple(aliases), frozenset(kept))


def _needed_elsewhere(engine: Engine, found: Found, nodes: set[fx.Node]) -> set[fx.Node]:
    """What a border value or anything outside reads, back through every write that it sees.

    A write has no users in Dynamo's graph, so it would go with the layer, and what reads the buffer would stay.
    """
    end, result = engine.position[found.output], engine.base(found.output)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        for base in map(engine.base, mutated(node)):
            writers.setdefault(base, []).append(node)

    def outside(node: fx.Node, user: fx.Node) -> bool:
        replaced = node is found.output or (written(node) is result and engine.position[user] > end)
        return user not in nodes and not replaced and not is_size_check(user) and user.target is not marks.mark

    kept: set[fx.Node] = set()
    todo = [node for node in nodes if any(outside(node, user) for user in node.users)]
    while todo:
        node = todo.pop()
        if node in kept or node not in nodes:
            continue
        kept.add(node)
        for read in node.all_input_nodes:
            writes_seen = writers.get(engine.base(read), ())
            todo += [read, *(w for w in writes_seen if engine.position[w] < engine.position[node])]
    for node in kept:
        if any(engine.base(buffer) is result for buffer in mutated(node)):
            raise refuse("MC203", f"{node.name}, a step of the layer's sum, is also needed elsewhere", node)
    return kept


def between(engine: Engine, output: fx.Node, border: set[fx.Node]) -> set[fx.Node]:
    """Everything from the output back to the border; a fresh tensor reads only the shape of its argument."""
    seen: set[fx.Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node in seen or node in border or node.op in ("placeholder", "get_attr"):
            continue
        seen.add(node)
        fresh = isinstance(engine.first_facts.get(node), Filled) and node.target not in VIEWS
        if not fresh or writes(node.target):
            todo.extend(tensor_inputs(node))
    return seen


def _borders_hold(engine: Engine, found: Found) -> None:
    """Border values are not written between their first use and the layer's output."""
    end = engine.position[found.output]
    for leaf in found.leaves:
        if engine.writes_before(leaf.node, end) != leaf.version:
            raise refuse("MC204", f"{leaf.node.name} is written in place inside the layer", leaf.node)


def _nothing_used_outside(engine: Engine, found: Found, nodes: set[fx.Node]) -> None:
    end = engine.position[found.output]
    base = engine.base(found.output)
    borders = {engine.base(leaf.node) for leaf in found.leaves} - {base}
    for node in nodes:
        if engine.base(node) in borders:
            continue  # a view of a border value is no inner value
        for user in node.users:
            if user in nodes or is_size_check(user):
                continue
            inner = engine.first_facts.get(node)
            if node is found.output:
                continue
            if written(node) is base and engine.position[user] > end:
                continue
            if isinstance(inner, Val) and not inner.slots:
                continue
            if isinstance(inner, (Val, Sum, Picked)) or (inner is None and _is_heavy(node)):
                raise refuse("MC203", f"{node.name}, inside the layer, is also used by {user.name}", user)
            if mutated(node):
                raise refuse("MC204", f"{node.name} is written in place and used outside the layer", user)
    _buffers_are_not_seen(engine, nodes, found.output, borders)


def _buffers_are_not_seen(engine: Engine, nodes: set[fx.Node], output: fx.Node, borders: set[fx.Node]) -> None:
    """What is written inside belongs to the layer: nothing from outside sees it, for the writes go away.

    The result's own buffer may be read after the layer, as a whole: it is replaced there.
    """
    first: dict[fx.Node, int] = {}
    for node in nodes:
        for base in map(engine.base, mutated(node)):
            first[base] = min(engine.position[node], first.get(base, engine.position[node]))
    end = engine.position[output]
    for base, start in first.items():
        if base.op != "call_function":
            raise refuse("MC204", f"{base.name}, an input of the graph, is written inside the layer", output)
        if base in borders:
            raise refuse("MC204", f"{base.name}, which the layer reads, is written inside it", output)
        views = [base, *engine.views(base)]
        result = base is engine.base(output)
        for view in views:
            if view is output or (result and engine.position[view] > end):
                continue
            for user in view.users:
                at = engine.position[user]
                written_later = writes(user.target) and at > end and not _whole(view, base)
                inner = user in nodes or (user in views and not written_later)
                if inner or at < start or is_size_check(user):
                    continue
                if result and at > end and _whole(view, base) and value(view).dtype == value(output).dtype:
                    continue
                raise refuse("MC204", f"{view.name} looks into a buffer that is written inside the layer", user)


def _whole(node: fx.Node, base: fx.Node) -> bool:
    """Whether a node is its buffer after writes, possibly through views that keep all of it in order."""
    while node is not base and (writes(node.target) or keeps_order(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node is base


def _is_heavy(node: fx.Node) -> bool:
    return node.target in (aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default)


def is_size_check(node: fx.Node) -> bool:
    """Whether a node only looks at sizes (Dynamo's runtime assertions), transitively."""
    name = getattr(node.target, "__name__", str(node.target))
    if any(check in str(node.target) for check in _SIZE_CHECKS):
        return all(is_size_check(u) for u in node.users) if node.users else True
    if name.split(".")[0] in _COMPARISONS and not isinstance(value(node), torch.Tensor):
        return all(is_size_check(u) for u in node.users)
    return False


def _no_mode_changes(engine: Engine, found: Found, nodes: set[fx.Node]) -> None:
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise refuse("MC211", "the layer runs under autocast", found.output)
    first = min(engine.position[n] for n in nodes)
    depth = 0
    for node, at in engine.position.items():
        name = str(node.target)
        if "_enter_autocast" in name:
            depth += 1
        elif "_exit_autocast" in name:
            depth -= 1
        else:
            continue
        if first <= at <= engine.position[found.output] or (at < first and depth > 0):
            raise refuse("MC211", "the layer runs under autocast", node)


def _no_double(engine: Engine, found: Found, nodes: set[fx.Node]) -> None:
    """The op computes an expert of narrower numbers in float32: a step in float64 would lose digits."""
    if value(found.routing.x.node).dtype is torch.float64:
        return
    for node in nodes:
        val, fact = value(node), engine.first_facts.get(node)
        if not isinstance(val, torch.Tensor) or val.dtype is not torch.float64 or not isinstance(fact, Val):
            continue
        before = [engine.first_facts.get(i) for i in tensor_inputs(node)]
        step = fact.gate is None and all(getattr(f, "expr", None) != fact.expr for f in before)
        if step and fact.expr != ("x",):
            raise refuse("MC401", f"{node.name}, inside an expert, is float64; the hidden states are narrower", node)


def _no_gradients(engine: Engine, found: Found) -> None:
    """The op has no backward yet: where a gradient may be asked for, the original stays."""
    enabled = torch.is_grad_enabled()
    for node, at in engine.position.items():
        if "_set_grad_enabled" in str(node.target) and at < engine.position[found.output]:
            enabled = bool(node.args[0])
    if not enabled:
        return
    for leaf in found.leaves:
        if _needs_gradient(engine, leaf.node):
            raise refuse("MC507", f"{describe(leaf)} requires a gradient and grad mode is on", found.output)


def _needs_gradient(engine: Engine, node: fx.Node) -> bool:
    """Whether any input that a value is computed from requires a gradient."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if at.op == "placeholder":
            origin = engine.copy.origin(at)
            tensor = placeholder_value(origin) if origin is not None else value(at)
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                return True
        todo.extend(tensor_inputs(at))
    return False


def describe(leaf: Leaf) -> str:
    """A border value for a message: its name and shape."""
    return f"{leaf.node.name} {tuple(shape_of(leaf.node))}"
