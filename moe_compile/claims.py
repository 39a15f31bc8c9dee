"""Whether what rewritten loops assumed is true: a block that ran only for experts with tokens adds nothing for others.

A block holds when it belongs to one expert of one routing decision whose layer was proved whole, contains steps of
that expert alone, and hands nothing else to the rest of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .canonical import shape_of
from .legality import Region, is_size_check
from .loops import marks
from .match.engine import Engine, writes
from .match.facts import Fact, Gate
from .match.layer import Found, prove_range
from .match.marks import Block, blocks
from .spec import NoMatch


@dataclass(frozen=True)
class Broken:
    """An assumption that could not be proved."""

    site: int
    error: NoMatch


def check(engine: Engine, layers: Sequence[tuple[Found, Region]]) -> list[Broken]:
    """Every assumption of the graph that does not follow from the proved ``layers``."""
    broken = []
    for block in blocks(engine):
        try:
            _holds(engine, block, layers)
        except NoMatch as error:
            broken.append(Broken(block.site, error))
    return broken


def _holds(engine: Engine, block: Block, layers: Sequence[tuple[Found, Region]]) -> None:
    if block.ids is None or block.expert is None:
        raise NoMatch("MC213", "what decides whether this code runs is not the routing of one expert", block.evidence)
    layer = next((both for both in layers if both[0].routing.ids == block.ids), None)
    if layer is None:
        raise NoMatch("MC213", "the layer around this code was not rewritten", block.evidence)
    found, region = layer
    if torch.fx.experimental.symbolic_shapes.statically_known_true(shape_of(found.routing.x.node)[0] == 0):
        raise NoMatch("MC213", "there are no tokens", block.evidence)
    if block.every:
        prove_range(engine, block.ids, found.moe.experts.num_experts, found.output)
    for node, at in engine.position.items():
        if not block.begin < at < block.end or node.target in marks.OPS[:1] or node.op != "call_function":
            continue
        fact = engine.first_facts.get(node)
        expert = _expert(fact)
        if expert is not None and expert != block.expert:
            raise NoMatch("MC213", f"a step of expert {expert} runs only if expert {block.expert} has tokens", node)
        if node in region.nodes or is_size_check(node):
            continue
        if writes(node.target):
            raise NoMatch("MC213", f"{node.name} is written only if expert {block.expert} has tokens", node)
        for user in node.users:
            inside = block.begin < engine.position.get(user, block.end) < block.end
            if not inside and user not in region.nodes and not is_size_check(user) and user.target not in marks.OPS:
                raise NoMatch("MC213", f"{node.name} is made only if expert {block.expert} has tokens", user)


def _expert(fact: Any) -> int | None:
    """The single expert that a value belongs to."""
    if not isinstance(fact, Fact):
        return None
    rows = getattr(fact, "rows", None)
    if rows is not None and rows.expert is not None:
        return int(rows.expert)
    if isinstance(fact, Gate):
        return fact.expert
    return None
