"""What a rewritten loop assumed, read off the canonical copy in program order (``loops.marks`` explains the kinds)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import fx

from ..loops import marks
from . import shrunk
from .engine import Engine, Rules
from .facts import Gate, Index, Leaf, Picked, Val
from .groups import Hits, counts_of
from .slots import root_of


class Pairs(NamedTuple):
    """The pairs of one expert in one routing decision; of one slot of it unless ``slot`` is None."""

    ids: Leaf
    expert: int
    slot: int | None = None

    def hold(self, others: Pairs) -> bool:
        """Whether ``others`` are among them: no pair here means none there."""
        root, slot = root_of(others.ids.node), others.slot
        if self.expert != others.expert:
            return False
        if self.ids == others.ids:
            return self.slot in (None, slot)
        return self.slot is None and root is self.ids.node and others.ids.version == self.ids.version


@dataclass(frozen=True)
class Block:
    """Nodes between two positions that ran in the original only if an expert had a pair, or once per hit expert.

    ``pairs`` says which expert; None where ``evidence`` does not show it. ``listed``: the loop could be over the first
    so many experts only (None: over all).
    """

    site: int
    begin: int
    end: int
    pairs: Pairs | None
    evidence: fx.Node | None
    every: bool  # one iteration of a loop over hit experts
    listed: int | None = None


def _remember(engine: Engine, node: fx.Node) -> Any:
    evidence: Any
    numbers: Any
    evidence, kind, numbers = node.args
    tensor = evidence[0] if evidence else None
    engine.marks.append((node, kind, tuple(numbers), tensor, engine.fact(tensor)))
    if kind == "loop":
        shrunk.begin(engine, numbers[0], numbers[1], node)
    elif kind == "probe":
        for expert, value in enumerate(evidence, numbers[2]):
            shrunk.probe(engine, (numbers[0], numbers[1], expert), value)
    elif kind == "end":
        shrunk.end(engine, numbers[0], node)
    return None


RULES: Rules = {marks.mark: _remember}


def blocks(engine: Engine) -> list[Block]:
    """Every marked block; a mark that is never closed ends with the graph and has no ids."""
    found: list[Block] = []
    opened: dict[int, Block] = {}
    last = max(engine.position.values(), default=0)
    for node, kind, numbers, tensor, fact in engine.marks:
        at, site = engine.position[node], numbers[0]
        if kind in ("hit", "nonempty", "count", "leave") and site in opened:
            found.append(replace(opened.pop(site), end=at))
        if kind == "hit":
            hits = fact if isinstance(fact, Hits) else None
            pairs = Pairs(hits.ids, numbers[1]) if hits is not None else None
            opened[site] = Block(site, at, last, pairs, tensor, True, hits.experts if hits is not None else None)
        elif kind == "count":
            counts = counts_of(engine, fact)
            pairs = Pairs(counts.ids, numbers[1]) if counts is not None else None
            opened[site] = Block(site, at, last, pairs, tensor, False)
        elif kind == "nonempty":
            weighed = isinstance(fact, Gate) and fact.rows is None and fact.weight is not None
            opened[site] = Block(site, at, last, None if weighed else pairs_of(fact), tensor, False)
        elif kind == "veto":
            found.append(Block(site, at, at, None, tensor, False))
    return found + [replace(block, pairs=None) for block in opened.values()]


def pairs_of(fact: Any) -> Pairs | None:
    """The pairs of the one expert that a value belongs to; rows of it are empty exactly when there are none."""
    rows = fact.rows if isinstance(fact, (Index, Val, Gate, Picked)) else None
    if rows is not None and rows.expert is not None:
        return Pairs(rows.ids, rows.expert, rows.slot)
    if isinstance(fact, Gate) and fact.expert is not None:
        return Pairs(fact.ids, fact.expert, fact.slot)
    return None
