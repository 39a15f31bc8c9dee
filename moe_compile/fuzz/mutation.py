"""What a mutation is, and places that many programs have: behind the routing, in the loop, inside an expert."""

from __future__ import annotations

from dataclasses import dataclass

Change = tuple[str, str]
Sizes = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Mutation:
    """Replaces the first ``old`` that a program holds (all its occurrences) by the ``new`` of the same place.

    ``also``: further replacements, all of them. ``sizes``: axes that the program needs for the change to have a
    meaning, as values or as the axis whose size they take. ``same``: a rounding or an order, so eager results of
    changed and unchanged programs agree. ``refuse``: an expert draws random numbers, so a rewrite is wrong whatever
    it returns.
    """

    changes: tuple[Change, ...]
    refuse: bool = False
    also: tuple[Change, ...] = ()
    sizes: Sizes = ()
    same: bool = False


def m(
    *changes: Change, refuse: bool = False, also: tuple[Change, ...] = (), sizes: Sizes = (), same: bool = False
) -> Mutation:
    """A mutation with its alternatives as arguments."""
    return Mutation(changes, refuse, also, sizes, same)


def routed(line: str) -> tuple[Change, ...]:
    """``line`` between the routing and the experts, or at the start of a layer that is given its routing."""
    heads = ("weights, ids = self.router(x)\n", "weights, ids, logits = self.router(x)\n", "x = hidden_states\n")
    return tuple((head, f"{head}        {line}\n") for head in heads)


_LOOPS = (
    "e = index[0]\n",
    *(
        f"for e in {over}:\n"
        for over in (
            *(f"range({n})" for n in ("self.num_experts", 1, 2, 3, 4, 5, 7, 8, 16)), "list(range(self.num_experts))",
            "ids.unique().tolist()", "hit",
        )
    ),
    *(f"for e, {what}:\n" for what in ("_ in enumerate(self.experts)", "count in enumerate(counts)")),
    "for e, end in enumerate(bins.tolist()):\n",
)  # fmt: skip


def in_loop(line: str) -> tuple[Change, ...]:
    """``line`` before the rest of the loop over the experts."""
    return tuple((head, f"{head}            {line}\n") for head in _LOOPS)


def before(anchor: str, line: str) -> Change:
    """``line`` before the line that begins with ``anchor``, in the body of a method."""
    return f"\n        {anchor}", f"\n        {line}\n        {anchor}"


def before_activation(line: str) -> tuple[Change, ...]:
    """``line`` between the first projection and the activation."""
    steps = (
        "F.silu(",
        "F.gelu(",
        "F.relu(",
        "torch.relu(",
        "torch.tanh(",
        "nn.functional.",
        "gate",
        "0.5 * gate",
        "up",
    )
    return (*(before(f"h = {step}", line) for step in steps), before("gate, up = gate.clamp", line))


def everywhere(new: str, *olds: str) -> tuple[Change, ...]:
    """Each of ``olds`` with ``new`` behind it."""
    return tuple((old, old + new) for old in olds)
