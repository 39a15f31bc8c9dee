"""All that rewriting one layer needs, looked up in the original graph before anything is touched."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from .canonical import Canonical, shape_of
from .layout import order_of_result
from .legality import Region
from .match.facts import Leaf, refuse
from .match.labels import same
from .match.layer import Found
from .match.nodes import writes


@dataclass
class Plan:
    """Everything needed to rewrite one layer, looked up before anything is touched."""

    found: Found
    output: fx.Node
    leaves: dict[Leaf, fx.Node]
    dead: list[fx.Node]
    aliases: dict[fx.Node, Any]  # nodes that hold the result after the layer -> their shape
    order: tuple[int, ...]  # of the result in memory, see ``layout``


def plan_of(copy: Canonical, found: Found, region: Region) -> Plan:
    """Find the original nodes of the border, the output and the inside of a layer.

    Raises:
        NoMatch: MC212 when a border value or the output exists only inside a composite operation, MC407 when the
            result lies in memory as nothing of ours can.
    """
    order_in_memory = order_of_result(found.output, region.aliases)
    output = _output(copy, found.output)
    leaves = {leaf: _origin(copy, leaf.node) for leaf in found.leaves}
    order = {n: i for i, n in enumerate(output.graph.nodes)}
    for leaf, node in leaves.items():
        if order[node] >= order[output]:
            raise refuse("MC212", f"{leaf.node.name} comes after the layer's output", leaf.node)
    aliases = {output: shape_of(found.output)}
    for alias in region.aliases:
        aliases |= dict.fromkeys(copy.origins.get(alias, []), shape_of(alias))
        shape_is_restorable(found, shape_of(alias))
    kept = {*leaves.values(), *_origins(copy, region.kept)}
    inside = _origins(copy, region.nodes) - kept
    dead = [n for n in output.graph.nodes if n in inside and n.op not in ("placeholder", "get_attr")]
    return Plan(found, output, leaves, dead, aliases, order_in_memory)


def _origins(copy: Canonical, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes of Dynamo's graph that some canonical ones were made for."""
    found: set[fx.Node] = set()
    for node in nodes:
        found.update(copy.origins.get(node, ()))
        if node in copy.first_origin:
            found.add(copy.first_origin[node])
    return found


def _origin(copy: Canonical, node: fx.Node) -> fx.Node:
    found, buffer = copy.origin(node), node
    while found is None and writes(buffer.target):  # ``out[m] = y`` has no value: the buffer holds it
        buffer = buffer.args[0]  # type: ignore[assignment]
        found = copy.origin(buffer)
    if found is None:
        raise refuse("MC212", f"{node.name} exists only inside a composite operation", node)
    return found


def _output(copy: Canonical, node: fx.Node) -> fx.Node:
    """The original node after which the layer's result exists.

    ``out[m] = y`` is one without a value of its own: ``out.contiguous()`` has that value too, but later.
    """
    first = copy.first_origin.get(node)
    if writes(node.target) and first is not None and first.target is operator.setitem:
        return first
    return _origin(copy, node)


def shape_is_restorable(found: Found, shape: Any = None) -> None:
    """Refuse an output whose shape is not that of the hidden states, nor ``[T, H]``, nor known but for one size."""
    x_shape, out_shape = shape_of(found.moe.hidden_states.node), shape or shape_of(found.output)
    unknown = sum(not isinstance(s, int) for s in out_shape)
    if len(out_shape) != 2 and not alike(out_shape, x_shape) and unknown > 1:
        raise refuse(
            "MC207", f"the result has shape {tuple(out_shape)}, the hidden states {tuple(x_shape)}", found.output
        )


def alike(a: Any, b: Any) -> bool:
    """Whether two shapes are proved to be equal."""
    return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
