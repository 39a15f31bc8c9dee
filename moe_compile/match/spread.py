"""What every place of a spread-out tensor of parameters reads: walked back through views, copies and gathers.

``scale[e].repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]`` has at ``(n, k)`` what ``scale`` has at
``(e, n // 128, k // 128)``: the root, and for every dimension which one of the root it runs along and how fast.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from ..canonical import shape_of, value
from .engine import Engine
from .facts import Leaf, SortedIds, refuse
from .labels import Atom, same, size_of
from .nodes import FLOATS, argument, aten, is_float, normal_dim
from .routing import ids_dims


class Piece(NamedTuple):
    """One dimension of a scale: place ``i`` reads place ``i // block`` of the root's ``dim``; None: always the same.

    ``dim`` is the labels of a dimension of the ids, where the ids picked the root's rows.
    """

    dim: Any
    size: Any
    block: int = 1


class Spread(NamedTuple):
    """A scale as every place of it reads ``root``.

    Along the root's dimension ``axis`` one place may be picked, ``expert``, or by ``ids`` that of every pair, whose
    ``pairs`` dimensions came in its place. ``rounded``: the narrower type that the numbers went through.
    """

    root: fx.Node
    pieces: tuple[Piece, ...]
    axis: int | None = None
    expert: int | None = None
    ids: Leaf | None = None
    pairs: int = 0
    rounded: torch.dtype | None = None

    def at(self, dim: int, *pieces: Piece) -> Spread:
        """With other pieces in place of one."""
        return self._replace(pieces=(*self.pieces[:dim], *pieces, *self.pieces[dim + 1 :]))


ONE = Piece(None, 1)


def spread(engine: Engine, node: fx.Node) -> Spread | None:
    """What every place of a scale reads, or None.

    Raises:
        NoMatch: MC204 when the scale is written after it was read.
    """
    step = _STEPS.get(node.target)
    if step is None:
        return _root(engine, node)
    source: Any = node.args[0]
    if not engine.unchanged(node):
        raise refuse("MC204", f"the scale {source.name} of fp8 weights is written after it was read", node)
    if node.target is operator.getitem:
        if source.target is not aten.unbind.int:
            return _root(engine, node)
        source = source.args[0]
    inner = spread(engine, source)
    found: Spread | None = None if inner is None else step(engine, node, inner)
    return found


def _root(engine: Engine, node: fx.Node) -> Spread | None:
    """Any value that depends on parameters alone."""
    shape = shape_of(node)
    if not engine.is_param(node) or not is_float(node) or not all(isinstance(s, int) for s in shape):
        return None
    return Spread(node, tuple(Piece(d, s) if s != 1 else ONE for d, s in enumerate(shape)))


def merged(pieces: list[Piece]) -> Piece | None:
    """Dimensions that are merged in row-major order: copies come last, or the places cannot be told by a division."""
    found = ONE
    for piece in pieces:
        if piece.dim is None:
            block = found.block * piece.size if found.dim is not None else 1
            found = Piece(found.dim, found.size * piece.size, block)
        elif found == ONE:
            found = piece
        else:
            return None
    return found


def _through(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    source, target = value(node.args[0]).dtype, value(node).dtype  # type: ignore[arg-type]
    if target not in FLOATS or (found.rounded is not None and not holds(found.rounded, target)):
        return None
    return found if holds(target, source) else found._replace(rounded=target)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a float type has all numbers of another: a cast to it and back changes none."""
    return torch.promote_types(wide, narrow) == wide


def _row(found: Spread, dim: int, index: Any) -> Spread | None:
    dim = normal_dim(dim, len(found.pieces))
    piece = found.pieces[dim]
    if piece.dim is None:
        return found.at(dim)
    if piece.block != 1 or not isinstance(index, int):
        return None
    return found.at(dim)._replace(axis=piece.dim, expert=index % piece.size)


def _select(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    return _row(found, int(node.args[1]), node.args[2])  # type: ignore[arg-type]


def _unbound(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    """``scale.unbind(0)[e]``."""
    return _row(found, int(argument(node.args[0], 1, "dim", 0)), node.args[1])  # type: ignore[arg-type]


def _gather(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    """``scale[ids]``: the row of every pair's expert."""
    dim, indices = (0, node.args[1]) if node.target is aten.index.Tensor else (node.args[1], [node.args[2]])
    assert isinstance(indices, (list, tuple))
    if dim != 0 or len(indices) != 1 or not found.pieces:
        return None
    index, (axis, _, block) = indices[0], found.pieces[0]
    if not isinstance(axis, int) or block != 1:
        return None
    assert isinstance(index, fx.Node)
    fact = engine.fact(index)
    pair = (fact.rows.ids, fact.dims) if isinstance(fact, SortedIds) else ids_dims(engine, index)
    if pair is None:
        return None
    leaf, dims = pair
    pieces = [Piece(d, size_of(d)) if d else ONE for d in dims]
    return found.at(0, *pieces)._replace(axis=axis, ids=leaf, pairs=sum(map(bool, dims)))


def _unsqueeze(engine: Engine, node: fx.Node, found: Spread) -> Spread:
    at = normal_dim(int(node.args[1]), len(found.pieces) + 1)  # type: ignore[arg-type]
    return found._replace(pieces=(*found.pieces[:at], ONE, *found.pieces[at:]))


def _expand(engine: Engine, node: fx.Node, found: Spread) -> Spread:
    shape = shape_of(node)
    pieces = ((ONE,) * (len(shape) - len(found.pieces))) + found.pieces
    # what was cut to one place (``s[:1]``) forgets its dimension of the root, which then nothing counts
    grown = (Piece(None, s) if same(p.size, 1) else p for p, s in zip(pieces, shape, strict=True))
    return found._replace(pieces=tuple(grown))


def _view(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    left: list[Piece] = []
    for piece in found.pieces:
        if piece.block > 1 and piece.size % piece.block == 0:
            left += [Piece(piece.dim, piece.size // piece.block), Piece(None, piece.block)]
        elif not same(piece.size, 1):
            left.append(piece)
    out = []
    for size in shape_of(node):
        taken: list[Piece] = []
        while not same(_size(taken), size):
            if not left:
                return None
            first = left.pop(0)
            if first.dim is None and all(isinstance(n, int) for n in (first.size, _size(taken), size)):
                rest, over = divmod(size, _size(taken))
                if not over and first.size % rest == 0:  # copies can be cut anywhere
                    left.insert(0, Piece(None, first.size // rest))
                    first = Piece(None, rest)
            taken.append(first)
        whole = merged(taken)
        if whole is None:
            return None
        out.append(whole)
    return found._replace(pieces=tuple(out))


def _size(pieces: list[Piece]) -> Any:
    return size_of(tuple(Atom("*", p.size) for p in pieces))


def _permute(engine: Engine, node: fx.Node, found: Spread) -> Spread:
    n = len(found.pieces)
    order = list(range(n))
    if node.target is aten.permute.default:
        order = [normal_dim(d, n) for d in argument(node, 1, "dims")]
    elif node.target in (aten.t.default, aten.numpy_T.default):
        order.reverse()
    else:
        a, b = (-2, -1) if node.target is aten.mT.default else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
        a, b = normal_dim(a, n), normal_dim(b, n)
        order[a], order[b] = b, a
    return found._replace(pieces=tuple(found.pieces[d] for d in order))


def _repeat_interleave(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    count, dim = node.args[1], argument(node, 2, "dim")
    if not isinstance(count, int) or (dim is None and len(found.pieces) != 1):
        return None
    dim = normal_dim(int(dim or 0), len(found.pieces))
    piece = merged([found.pieces[dim], Piece(None, count)])
    assert piece is not None  # copies come last
    return found.at(dim, piece)


def _slice(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    """``[:n]``, of a piece that was repeated past the end of the weight; ``_axis`` asks that no block is left over."""
    dim = normal_dim(int(argument(node, 1, "dim", 0)), len(found.pieces))
    if argument(node, 2, "start") not in (None, 0) or argument(node, 4, "step", 1) != 1:
        return None
    return found.at(dim, found.pieces[dim]._replace(size=shape_of(node)[dim]))


_STEPS: dict[Any, Any] = {
    aten.clone.default: _through, aten.contiguous.default: _through, aten.detach.default: _through,
    aten.alias.default: _through, aten.to.dtype: _through, aten.to.dtype_layout: _through, aten.to.other: _through,
    aten._to_copy.default: _through, aten.type_as.default: _through,
    operator.getitem: _unbound, aten.select.int: _select, aten.index.Tensor: _gather,
    aten.index_select.default: _gather, aten.unsqueeze.default: _unsqueeze, aten.expand.default: _expand,
    aten.expand_as.default: _expand, aten.view.default: _view, aten.reshape.default: _view,
    aten._unsafe_view.default: _view, aten.flatten.using_ints: _view, aten.unflatten.int: _view,
    aten.squeeze.default: _view, aten.squeeze.dim: _view, aten.squeeze.dims: _view,
    aten.permute.default: _permute, aten.transpose.int: _permute, aten.swapaxes.default: _permute,
    aten.swapdims.default: _permute, aten.t.default: _permute, aten.mT.default: _permute,
    aten.numpy_T.default: _permute, aten.repeat_interleave.self_int: _repeat_interleave, aten.slice.Tensor: _slice,
}  # fmt: skip
