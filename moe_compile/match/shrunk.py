"""Loops that were traced for experts 0 and 1: their sums stand for all experts, once the two prove to be alike.

The body of expert ``e`` is that of expert 1 with ``1`` replaced by ``e`` and every tensor of expert 1 by the tensor
at the same place in the probes of expert ``e``. For expert 0 this must give what was traced.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from .engine import Engine
from .facts import Gate, Leaf, Part, Rows, Slot, Sum, Val, Wt, refuse
from .labels import same


@dataclass
class Loop:
    """One shrunk loop while the engine runs through it."""

    site: int
    experts: int
    begin: int
    sums: dict[fx.Node, Sum]
    end: int = -1
    probes: dict[int, dict[int, Any]] = field(default_factory=dict)  # call -> expert -> fact or leaf
    grown: set[fx.Node] = field(default_factory=set)  # nodes whose sums now cover all experts


def begin(engine: Engine, site: int, experts: int, node: fx.Node) -> None:
    """The loop's body follows."""
    sums = {n: f for n, f in engine.facts.items() if isinstance(f, Sum)}
    engine.loops.append(Loop(site, experts, engine.position[node], sums))


def probe(engine: Engine, numbers: tuple[int, ...], tensor: fx.Node) -> None:
    """What one expert computes in one call, or its own tensor."""
    loop = _open(engine, numbers[0])
    fact = engine.fact(tensor)
    loop.probes.setdefault(numbers[1], {})[numbers[2]] = fact if isinstance(fact, Val) else engine.leaf(tensor)


def end(engine: Engine, site: int, node: fx.Node) -> None:
    """Grow every sum of the loop to all experts.

    Raises:
        NoMatch: MC215 when the experts are not alike.
    """
    loop = _open(engine, site)
    loop.end = engine.position[node]
    tensors = _tensors(loop, node)
    known = {id(p) for s in loop.sums.values() for p in s.parts}
    for n, total in list(engine.facts.items()):
        if not isinstance(total, Sum) or loop.sums.get(n) is total:
            continue
        new = [p for p in total.parts if id(p) not in known]
        parts = [[p for p in new if _expert(p) == e] for e in (0, 1)]
        if not new or len(parts[0]) != len(parts[1]) or len(new) != 2 * len(parts[0]):
            continue
        for zero, one in zip(*parts, strict=True):
            if _bare(_moved(one, 0, tensors[0])) != _bare(zero):
                raise refuse("MC215", "expert 1 computes something else than expert 0", n)
        more = tuple(_moved(p, e, tensors[e]) for e in range(2, loop.experts) for p in parts[1])
        grown = replace(total, parts=total.parts + more)
        engine.facts[n] = engine.first_facts[n] = grown
        loop.grown.add(n)
    last: dict[fx.Node, fx.Node] = {}  # buffer -> its last write, which is where the sum is complete
    for n in sorted(loop.grown, key=engine.position.__getitem__):
        last[engine.base(n)] = n
    engine.sums += [(n, engine.facts[n]) for n in last.values()]


def _open(engine: Engine, site: int) -> Loop:
    for loop in reversed(engine.loops):
        if loop.site == site and loop.end < 0:
            return loop
    raise refuse("MC215", "the end of a loop without its beginning")


def _expert(part: Part) -> int | None:
    rows, gate = part.val.rows, part.gate if part.gate is not None else part.val.gate_in
    return rows.expert if rows is not None and rows.expert is not None else gate.expert if gate is not None else None


def _tensors(loop: Loop, node: fx.Node) -> list[dict[Leaf, Leaf]]:
    """For every expert: the tensor of expert 1 -> its own tensor at the same place."""
    found: list[dict[Leaf, Leaf]] = [{} for _ in range(loop.experts)]
    for by_expert in loop.probes.values():
        model = by_expert.get(1)
        for e in range(loop.experts):
            for mine, theirs in _pairs(model, by_expert.get(e), e, node):
                if found[e].setdefault(mine, theirs) != theirs:
                    raise refuse("MC215", f"one tensor of expert 1 stands for two of expert {e}", node)
    return found


def _pairs(model: Any, other: Any, expert: int, node: fx.Node) -> list[tuple[Leaf, Leaf]]:
    if isinstance(model, Leaf) and isinstance(other, Leaf):
        return [(model, other)]
    if not isinstance(model, Val) or not isinstance(other, Val):
        raise refuse("MC215", f"what expert {expert} computes is not known", node)
    if model.expr != other.expr or len(model.slots) != len(other.slots):
        raise refuse("MC201", f"expert {expert} computes something else than expert 1", node)
    out = []
    for a, b in zip(model.slots, other.slots, strict=True):
        alike = a.transposed == b.transposed and a.weight.key() == b.weight.key() and a.weight.source == b.weight.source
        if not alike or a.weight.source not in ("one", "row"):
            raise refuse("MC201", f"the weights of expert {expert} have another form than those of expert 1", node)
        sizes = [[x.size for d in w.dims for x in d] for w in (a.weight, b.weight)]
        if not all(map(same, *sizes)):  # as many of each: the same part of the same expression
            raise refuse("MC201", f"expert {expert} has weights of shape {sizes[1]}, expert 1 has {sizes[0]}", node)
        out.append((a.weight.leaf, b.weight.leaf))
    return out


def _moved(part: Part, expert: int, tensors: dict[Leaf, Leaf]) -> Part:
    """The part of expert 1 as that of ``expert``."""

    def rows(r: Rows | None) -> Rows | None:
        return replace(r, expert=expert) if r is not None and r.expert == 1 else r

    def gate(g: Gate | None) -> Gate | None:
        return replace(g, expert=expert if g.expert == 1 else g.expert, rows=rows(g.rows)) if g is not None else None

    def weight(w: Wt) -> Wt:
        if w.source == "row":
            return replace(w, expert=expert if w.expert == 1 else w.expert)
        return replace(w, leaf=tensors.get(w.leaf, w.leaf))

    val = part.val
    slots = tuple(Slot(weight(s.weight), s.transposed) for s in val.slots)
    moved = replace(val, rows=rows(val.rows), gate=gate(val.gate), gate_in=gate(val.gate_in), slots=slots)
    return Part(moved, gate(part.gate))


def _bare(part: Part) -> Part:
    """Without the numbers of rows, which differ between experts."""

    def bare(g: Gate | None) -> Gate | None:
        return replace(g, dims=()) if g is not None else None

    return Part(replace(part.val, gate=bare(part.val.gate), gate_in=bare(part.val.gate_in), dims=()), bare(part.gate))
