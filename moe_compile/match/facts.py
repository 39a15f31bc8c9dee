"""What is proved about a value: its labelled dimensions (``labels``) and the kinds of facts.

Facts say what the elements are. ``Val`` is an expert's value on some rows, ``Gate`` the router weight of an expert
(``w * [ids == e]``), ``Sum`` a sum of weighted expert outputs: the goal is one ``Sum`` over all experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from ..spec import NoMatch
from .labels import Dims, joined


class Leaf(NamedTuple):
    """A node at the border of the region, at the version of its buffer when it was read."""

    node: fx.Node
    version: int


@dataclass(frozen=True)
class Fact:
    """Base: every fact labels the dimensions of its tensor."""

    dims: Dims

    def with_dims(self, dims: Dims) -> Fact:
        return replace(self, dims=dims)


@dataclass(frozen=True)
class Ids(Fact):
    """Expert ids: a leaf of integers ``[t.., k]``."""

    leaf: Leaf


@dataclass(frozen=True)
class RouterWeight:
    """The border's routing weight: a leaf, then elementwise steps that the lowering repeats.

    ``dense``: the leaf holds a number per expert, ``[T, E]``, of which each pair has that of its own id.
    """

    leaf: Leaf
    steps: tuple[Any, ...] = ()
    dense: bool = False


@dataclass(frozen=True)
class Rows:
    """A row space ``r``. ``hit``: the pairs with id ``expert``; ``hit_token``: the tokens that have such a pair;
    ``sorted``: all pairs in expert order. ``order`` is the order of enumeration (labels of the mask). ``slot``: only
    the pairs of one slot. ``grouped``: cut from rows in sorted order."""

    kind: str
    ids: Leaf
    expert: int | None = None
    order: tuple[tuple[str, ...], ...] = ()
    slot: int | None = None
    grouped: bool = False

    @property
    def per_pair(self) -> bool:
        """Whether a token stands in as many rows as it has pairs there, not in one."""
        return self.kind == "sorted" or self.grouped or any("k" in label for label in self.order)


@dataclass(frozen=True)
class Gate(Fact):
    """``w * [ids == e]`` (``w`` None: one); summed over ``k`` when ``summed``; on picked rows when ``rows``.

    ``expert`` None means that the expert is the ``e`` atom among the dimensions. ``distinct``: right only if no
    token names an expert twice. ``boolean``: a truth value. ``slot``: only this slot of the ids counts.
    """

    ids: Leaf
    weight: RouterWeight | None = None
    expert: int | None = None
    summed: bool = False
    boolean: bool = False
    distinct: bool = False
    rows: Rows | None = None
    slot: int | None = None


def counts_pairs(gate: Gate) -> bool:
    """Whether a gate with an ``e`` dimension counts every pair of every expert as one."""
    return gate.weight is None and gate.expert is None and gate.rows is None and gate.slot is None


@dataclass(frozen=True)
class Masked(Fact):
    """Scores of the chosen experts, minus infinity elsewhere: a gate once a function sends -inf to zero."""

    gate: Gate

    def with_dims(self, dims: Dims) -> Masked:
        return Masked(dims, replace(self.gate, dims=dims))


@dataclass(frozen=True)
class Index(Fact):
    """An integer vector over rows: the ``token``, the ``slot`` or the flat ``pair`` of each row."""

    rows: Rows
    what: str


@dataclass(frozen=True)
class Coordinates(Fact):
    """``nonzero(mask)`` as a matrix ``[r, mask dims]``: its columns are the index vectors."""

    columns: tuple[Index, ...]


@dataclass(frozen=True)
class SortedIds(Fact):
    """The expert ids of all pairs in sorted order."""

    rows: Rows


@dataclass(frozen=True)
class Inverse(Fact):
    """Position of each pair in sorted order."""

    rows: Rows


@dataclass(frozen=True)
class Counts(Fact):
    """Rows per expert; ``ends``: their running sum."""

    ids: Leaf
    ends: bool = False


@dataclass(frozen=True)
class Range(Fact):
    """``arange(start, start+n)``."""

    start: int


@dataclass(frozen=True)
class Filled(Fact):
    """A fresh tensor of one number (None: uninitialised)."""

    number: float | None


@dataclass(frozen=True)
class Unfinished(Fact):
    """A buffer of one row per pair in which the rows of some experts are still missing."""

    ids: Leaf


@dataclass(frozen=True)
class Scales:
    """What an fp8 weight is multiplied by (``match.scales``): a border value.

    Args:
        axes: the dimensions of the leaf that count experts, blocks along ``w0`` and along ``w1``; None: one for all.
        blocks: how many neighbours along ``w0`` and ``w1`` share a scale, where an axis counts them.
        dtype: what the scaled weight was rounded to, before it is multiplied.
    """

    leaf: Leaf
    axes: tuple[int | None, int | None, int | None]
    blocks: tuple[int, int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Wt(Fact):
    """A weight of one expert, of every expert (``e`` atom) or of each pair's expert (``source`` "ids").

    ``source``: "one" (a tensor of its own), "row" (row ``expert`` of a stack), "axis", "ids".
    ``cut`` = (start, stop, step) along ``w0`` (the output features), taken from the leaf.
    ``scales``: the leaf is fp8, and the weight is it times these.
    """

    leaf: Leaf
    source: str
    expert: int | None = None
    ids: Leaf | None = None
    cut: tuple[str, int, int, int] | None = None
    leaves: tuple[Leaf, ...] = ()
    scales: Scales | None = None

    def key(self) -> tuple[Any, ...]:
        """What must agree between experts, apart from the tensor itself."""
        return (self.source in ("one", "row"), self.cut, self.scales)

    def with_dims(self, dims: Dims) -> Wt:
        return replace(self, dims=tuple(joined(d) for d in dims))


@dataclass(frozen=True)
class Slot:
    """A weight used in an expression: which tensor, and whether its last dimension is the output."""

    weight: Wt
    transposed: bool = False


@dataclass(frozen=True)
class Val(Fact):
    """An expert's value on some rows.

    ``expr`` is a tree: ``("x",)``, ``("lin", slot, arg)``, ``("bias", slot, arg)``, ``("cut", start, stop, step,
    arg)``, ``("op", overload, args)`` with ``("const", v)`` leaves. ``slots`` are the weights it names.
    """

    expr: Any
    x: Leaf
    slots: tuple[Slot, ...] = ()
    rows: Rows | None = None
    gate: Gate | None = None
    gate_in: Gate | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Part:
    """One contribution to a sum: a weighted expert output with the gate that goes with it."""

    val: Val
    gate: Gate | None


@dataclass(frozen=True)
class Sum(Fact):
    """A sum of contributions over tokens ``[t.., f]`` (plus ``base``, a value from outside, when present)."""

    parts: tuple[Part, ...]
    base: Leaf | None = None
    needs: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Picked(Fact):
    """``sum[rows]``, and the contribution added to it so far: half of ``out[m] = out[m] + y``."""

    buffer: fx.Node
    version: int
    rows: Rows
    part: Part | None = None


def refuse(code: str, reason: str, node: Any = None) -> NoMatch:
    """Shorthand so that rules read ``raise refuse(...)``."""
    return NoMatch(code, reason, node)
