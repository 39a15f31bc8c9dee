"""What a rewritten loop assumed, read off the canonical copy in program order (``loops.marks`` explains the kinds)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..loops import marks
from .engine import Engine, Rules
from .facts import Counts, Gate, Index, Leaf, Val
from .groups import Hits


@dataclass(frozen=True)
class Block:
    """Nodes between two positions that ran in the original only if an expert had a pair, or once per hit expert.

    ``ids`` and ``expert`` say which; None where ``evidence`` does not show it.
    """

    site: int
    begin: int
    end: int
    ids: Leaf | None
    expert: int | None
    evidence: fx.Node | None
    every: bool  # one iteration of a loop over hit experts


def _remember(engine: Engine, node: fx.Node) -> Any:
    evidence, kind, numbers = node.args
    assert isinstance(evidence, (list, tuple)) and isinstance(numbers, (list, tuple))
    tensor = evidence[0] if evidence else None
    engine.marks.append((node, kind, tuple(numbers), tensor, engine.fact(tensor)))
    return None


RULES: Rules = {marks.mark: _remember}


def blocks(engine: Engine) -> list[Block]:
    """Every marked block; a mark that is never closed ends with the graph and has no ids."""
    found: list[Block] = []
    opened: dict[int, Any] = {}
    for node, kind, numbers, tensor, fact in engine.marks:
        at, site = engine.position[node], numbers[0]
        if kind in ("hit", "nonempty", "count", "leave") and site in opened:
            begin, ids, expert, evidence, every = opened.pop(site)
            found.append(Block(site, begin, at, ids, expert, evidence, every))
        if kind == "hit":
            ids = fact.ids if isinstance(fact, Hits) else None
            opened[site] = (at, ids, numbers[1], tensor, True)
        elif kind == "count":
            ids = fact.ids if isinstance(fact, Counts) else None
            opened[site] = (at, ids, numbers[1], tensor, False)
        elif kind == "nonempty":
            opened[site] = (at, *_one_expert(fact), tensor, False)
        elif kind == "veto":
            found.append(Block(site, at, at, None, None, tensor, False))
    last = max(engine.position.values(), default=0)
    return found + [Block(site, begin, last, None, None, tensor, every)
                    for site, (begin, _, _, tensor, every) in opened.items()]  # fmt: skip


def _one_expert(fact: Any) -> tuple[Leaf | None, int | None]:
    """The routing and the expert whose pairs ``fact`` runs over: it is empty exactly when there are none."""
    if isinstance(fact, (Index, Val)) and fact.rows is not None and fact.rows.expert is not None:
        return fact.rows.ids, fact.rows.expert
    if isinstance(fact, Gate):
        if fact.rows is not None:
            return fact.rows.ids, fact.rows.expert
        if fact.weight is None and fact.expert is not None:
            return fact.ids, fact.expert
    return None, None
