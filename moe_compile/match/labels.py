"""Labelled dimensions.

A tensor's dimensions are labelled with *atoms*: ``t0 t1 ..`` (token dimensions), ``k`` (slot of the top-k), ``e``
(expert), ``r`` (rows picked for one expert, or all pairs in sorted order), ``f`` (features; ``fo``/``fi`` once it is
split), ``w0 w1`` (the two dimensions of a weight matrix; ``w0o``/``w0i`` once it is cut into blocks) and ``*`` (a
broadcast copy of anything). A dimension is a tuple of atoms merged in row-major order, so a view only regroups atoms
and a permutation only reorders them. An atom of size one is never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..torch_compat import statically_true


@dataclass(frozen=True, eq=False)
class Atom:
    """One index space of a tensor dimension; ``size`` is an int or a symbolic integer.

    Equal means the same name and sizes that are known to be equal: comparing symbols must not add guards.
    """

    name: str
    size: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.name == other.name and same(self.size, other.size)

    def __hash__(self) -> int:
        return hash(self.name)


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return statically_true(a == b)


def atom(name: str, size: Any) -> Dim:
    """A dimension of one atom, or () when its size is one."""
    return () if same(size, 1) else (Atom(name, size),)


def names(dims: Dims) -> tuple[tuple[str, ...], ...]:
    """The atom names of every dimension."""
    return tuple(tuple(a.name for a in d) for d in dims)


def flat_names(dims: Dims) -> set[str]:
    """All atom names of a value."""
    return {a.name for d in dims for a in d}


def token_dims(shape: Sequence[Any]) -> Dims:
    """Labels for leading token dimensions."""
    return tuple(atom(f"t{i}", s) for i, s in enumerate(shape))


def is_rows(dims: Dims) -> bool:
    """Whether a value is a matrix of rows by features, neither turned nor cut (a dimension of one has no name)."""
    return len(dims) == 2 and names(dims)[0] in (("r",), ()) and names(dims)[1] in (("f",), ())


def is_vector(dims: Dims) -> bool:
    """Whether an index has one number for every row, each once."""
    return names(dims) in ((("r",),), ((),))


def fits(dims: Dims, shape: Sequence[Any]) -> bool:
    """Whether labels are those of a tensor of this shape."""
    return len(dims) == len(shape) and all(same(size_of(d), s) for d, s in zip(dims, shape, strict=True))


def is_token(dim: Dim) -> bool:
    """Whether a dimension runs over tokens only."""
    return bool(dim) and all(a.name.startswith("t") for a in dim)


def regroup(dims: Dims, shape: Sequence[Any]) -> Dims | None:
    """The labels after ``view(shape)``, or None when a dimension would be cut in the middle of an atom.

    The one cut that keeps a meaning is a feature dimension into two (``f`` -> ``fo``, ``fi``).
    """
    atoms = [a for d in dims for a in d]
    out: list[Dim] = []
    at = 0
    for i, size in enumerate(shape):
        if same(size, 1):
            out.append(())
            continue
        if at >= len(atoms):
            return None
        if atoms[at].name == "f" and statically_true(atoms[at].size > size):
            rest = [s for s in shape[i + 1 :] if not same(s, 1)]
            if at != len(atoms) - 1 or len(rest) != 1 or not same(size * rest[0], atoms[at].size):
                return None
            pieces = [(Atom("fo", size),), *(() if same(s, 1) else (Atom("fi", s),) for s in shape[i + 1 :])]
            return (*out, *pieces)
        total: Any = 1
        dim: list[Atom] = []
        while not (dim and same(total, size)):
            if at >= len(atoms):
                return None
            dim.append(atoms[at])
            total = total * atoms[at].size
            at += 1
        out.append(tuple(dim))
    return tuple(out) if at == len(atoms) else None


def joined(dim: Dim) -> Dim:
    """A weight's dimension that was cut into blocks, once they lie side by side again: ``w0o``, ``w0i`` -> ``w0``."""
    if len(dim) == 2 and [a.name for a in dim] in (["w0o", "w0i"], ["w1o", "w1i"]):
        return (Atom(dim[0].name[:2], dim[0].size * dim[1].size),)
    return dim


def unify(a: Dims, b: Dims) -> Dims | None:
    """The labels of an elementwise result (broadcasting, last dimensions aligned), or None if they disagree."""
    n = max(len(a), len(b))
    a = ((),) * (n - len(a)) + a
    b = ((),) * (n - len(b)) + b
    out: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        dim = unify_dim(x, y)
        if dim is None:
            return None
        out.append(dim)
    return tuple(out)


def unify_dim(x: Dim, y: Dim) -> Dim | None:
    """One dimension of ``unify``: equal labels, a broadcast size one, or a wildcard copy."""
    if not x or not y:
        return x or y
    if len(x) != len(y):
        if len(x) == 1 and x[0].name == "*":
            return y if same(x[0].size, size_of(y)) else None
        if len(y) == 1 and y[0].name == "*":
            return x if same(y[0].size, size_of(x)) else None
        return _unify_tokens(x, y)
    out = []
    for p, q in zip(x, y, strict=True):
        if p.name == q.name or q.name == "*":
            out.append(p)
        elif p.name == "*":
            out.append(q)
        else:
            return None
        if not same(p.size, q.size):
            return None
    return tuple(out)


def size_of(dim: Dim) -> Any:
    """Number of elements along a dimension."""
    total: Any = 1
    for a in dim:
        total = total * a.size
    return total


def _unify_tokens(x: Dim, y: Dim) -> Dim | None:
    """Tokens counted in one dimension and in several: equal when their numbers are."""
    mine, theirs = (tuple(a for a in d if a.name.startswith("t")) for d in (x, y))
    if not mine or not theirs or x[: len(mine)] != mine or y[: len(theirs)] != theirs:
        return None
    rest, other = x[len(mine) :], y[len(theirs) :]
    if [a.name for a in rest] != [a.name for a in other] or not same(size_of(mine), size_of(theirs)):
        return None
    return x if len(mine) < len(theirs) else y
