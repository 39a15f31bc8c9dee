"""Whether what rewritten loops assumed is true: a block that ran only for experts with tokens adds nothing for others.

A block holds when it belongs to one expert of one routing decision whose layer was proved whole, contains steps of
that expert alone, and hands nothing else to the rest of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .canonical import shape_of
from .legality import Region, is_size_check
from .loops import marks
from .match.engine import Engine
from .match.facts import refuse
from .match.layer import Found, prove_range
from .match.marks import Block, blocks, pairs_of
from .match.nodes import mutated
from .match.shrunk import Loop
from .match.slots import root_of
from .spec import NoMatch
from .torch_compat import statically_true


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
    for loop in engine.loops:
        try:
            _stands_for_all(engine, loop, layers)
        except NoMatch as error:
            broken.append(Broken(loop.site, error))
    return broken


def _stands_for_all(engine: Engine, loop: Loop, layers: Sequence[tuple[Found, Region]]) -> None:
    """Nothing leaves a loop that was traced for two experts but sums that cover all, inside a proved layer."""
    regions = [region for _, region in layers]
    if not any(loop.grown & region.nodes for region in regions):
        raise refuse("MC215", "a loop over experts does not end in the sum of a layer that was rewritten")
    for node, at in engine.position.items():
        if not loop.begin < at < loop.end or node.op != "call_function" or node.target is marks.mark:
            continue
        inside = any(node in region.nodes for region in regions)
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random or (mutated(node) and not inside):
            raise refuse("MC215", f"{node.name} happens once for every expert", node)
        for user in node.users:
            after = engine.position[user] > loop.end and not is_size_check(user) and user.target is not marks.mark
            if after and node not in loop.grown and not is_size_check(node):
                raise refuse("MC215", f"{node.name} of one expert is used after the loop", user)


def _holds(engine: Engine, block: Block, layers: Sequence[tuple[Found, Region]]) -> None:
    pairs = block.pairs
    if pairs is None:
        raise refuse("MC214", "what decides whether this code runs is not the routing of one expert", block.evidence)
    routings = (pairs.ids.node, root_of(pairs.ids.node))
    layer = next((both for both in layers if both[0].routing.ids.node in routings), None)
    if layer is None:
        raise refuse("MC214", "the layer around this code was not rewritten", block.evidence)
    found, region = layer
    if statically_true(shape_of(found.routing.x.node)[0] == 0):
        raise refuse("MC214", "there are no tokens", block.evidence)
    if block.every:
        experts = found.moe.experts.num_experts
        prove_range(engine, found.routing.ids, experts, found.output)
        if block.listed is not None and block.listed < experts:
            raise refuse("MC214", f"the loop runs over {block.listed} experts, the layer has {experts}", block.evidence)
    for node, at in engine.position.items():
        if not block.begin < at < block.end or node.target is marks.mark or node.op != "call_function":
            continue
        own = pairs_of(engine.first_facts.get(node))
        if own is not None and not pairs.hold(own):
            raise refuse("MC214", f"a step of expert {own.expert} depends on the tokens of expert {pairs.expert}", node)
        if node in region.nodes or is_size_check(node):
            continue
        if mutated(node) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise refuse("MC214", f"{node.name} happens only if expert {pairs.expert} has tokens", node)
        for user in node.users:
            inside = block.begin < engine.position[user] < block.end
            if not inside and user not in region.nodes and not is_size_check(user) and user.target is not marks.mark:
                raise refuse("MC214", f"{node.name} is made only if expert {pairs.expert} has tokens", user)
