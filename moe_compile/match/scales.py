"""Scales of fp8 weights: which number multiplies which element, read from the product that widens them.

``w1[e].to(x.dtype) * scale[e].repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]`` is the fp8 weight ``w1``
with ``scale`` per block. The weight's side has facts (``Wt``), which keep their leaf through the cast. The scale's
side is walked back here, to a tensor of which every place of the product reads one known place (``Spread``). Whatever
cannot be read that way is refused with MC408: then the product is an unknown weight.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from ..canonical import shape_of, value
from ..quantize import BLOCK, FP8
from .engine import Engine, Rules
from .facts import Leaf, Scales, SortedIds, Wt, refuse
from .fp8 import kind_of, shared
from .labels import Atom, Dim, Dims, regroup, same, size_of
from .nodes import FLOATS, argument, aten, is_fp8, normal_dim
from .routing import ids_dims
from .values import lift, weight_leaf

_BLOCKS = {"w0": ("w0o", "w0i"), "w1": ("w1o", "w1i")}


class Piece(NamedTuple):
    """One dimension of a scale: place ``i`` reads place ``i // block`` of the root's ``dim``; None: always the same.

    ``dim`` is the labels of a dimension of the ids, where the ids picked the root's rows.
    """

    dim: Any
    size: Any
    block: int = 1


class Spread(NamedTuple):
    """A scale as every place of it reads ``root``, of which one row, or the row of every pair, may be picked."""

    root: fx.Node
    pieces: tuple[Piece, ...]
    expert: int | None = None
    ids: Leaf | None = None

    def at(self, dim: int, *pieces: Piece) -> Spread:
        """With other pieces in place of one."""
        return self._replace(pieces=(*self.pieces[:dim], *pieces, *self.pieces[dim + 1 :]))


ONE = Piece(None, 1)


# ------------------------------------------------------------------------------------- the scale, walked back


def spread(engine: Engine, node: fx.Node) -> Spread | None:
    """What every place of a scale reads, or None.

    Raises:
        NoMatch: MC204 when the scale is written after it was read.
    """
    source = node.args[0] if node.op == "call_function" and node.args else None
    step = _STEPS.get(node.target)
    if step is None or not isinstance(source, fx.Node):
        return _root(engine, node)
    if not engine.unchanged(node):
        raise refuse("MC204", f"the scale {source.name} of fp8 weights is written after it was read", node)
    if node.target is operator.getitem:
        if source.target is not aten.unbind.int or not isinstance(source.args[0], fx.Node):
            return _root(engine, node)
        inner = spread(engine, source.args[0])
        return None if inner is None else _row(inner, int(argument(source, 1, "dim", 0)), node.args[1])
    inner = spread(engine, source)
    found: Spread | None = None if inner is None else step(engine, node, inner)
    return found


def _root(engine: Engine, node: fx.Node) -> Spread | None:
    """Any value that depends on parameters alone."""
    shape = shape_of(node)
    if not engine.is_param(node) or value(node).dtype not in FLOATS or not all(isinstance(s, int) for s in shape):
        return None
    return Spread(node, tuple(Piece(d, s) if s != 1 else ONE for d, s in enumerate(shape)))


def _merged(pieces: list[Piece]) -> Piece | None:
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
    return found if target in FLOATS and not _leaves_half(source, target) else None


def _leaves_half(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether numbers were squeezed through float16, where they may have become infinite or zero."""
    return source is torch.float16 and target is not torch.float16


def _row(found: Spread, dim: int, index: Any) -> Spread | None:
    dim = normal_dim(dim, len(found.pieces))
    piece = found.pieces[dim]
    if piece.dim is None:
        return found.at(dim)
    if piece.dim != 0 or piece.block != 1 or found.expert is not None or not isinstance(index, int):
        return None
    return found.at(dim)._replace(expert=index % piece.size)


def _select(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    return _row(found, int(node.args[1]), node.args[2])  # type: ignore[arg-type]


def _gather(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    """``scale[ids]``: the row of every pair's expert."""
    indices = node.args[1] if node.target is aten.index.Tensor else [node.args[2]]
    dim = 0 if node.target is aten.index.Tensor else node.args[1]
    assert isinstance(indices, (list, tuple))
    index = indices[0]
    if dim != 0 or len(indices) != 1 or not isinstance(index, fx.Node) or found.pieces[0].dim != 0:
        return None
    if found.pieces[0].block != 1 or found.ids is not None:
        return None
    fact = engine.fact(index)
    pair = (fact.rows.ids, fact.dims) if isinstance(fact, SortedIds) else ids_dims(engine, index)
    if pair is None:
        return None
    leaf, dims = pair
    return found.at(0, *(Piece(d, size_of(d)) if d else ONE for d in dims))._replace(ids=leaf)


def _unsqueeze(engine: Engine, node: fx.Node, found: Spread) -> Spread:
    at = normal_dim(int(node.args[1]), len(found.pieces) + 1)  # type: ignore[arg-type]
    return found._replace(pieces=(*found.pieces[:at], ONE, *found.pieces[at:]))


def _expand(engine: Engine, node: fx.Node, found: Spread) -> Spread:
    shape = shape_of(node)
    pieces = ((ONE,) * (len(shape) - len(found.pieces))) + found.pieces
    grown = (Piece(None, s) if p == ONE else p for p, s in zip(pieces, shape, strict=True))
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
            known = first.dim is None and isinstance(first.size, int) and isinstance(_size(taken), int)
            if known and isinstance(size, int):  # copies can be cut anywhere
                rest = max(size // _size(taken), 1)
                if first.size > rest and first.size % rest == 0:
                    left.insert(0, Piece(None, first.size // rest))
                    first = Piece(None, rest)
            taken.append(first)
        merged = _merged(taken)
        if merged is None:
            return None
        out.append(merged)
    return found._replace(pieces=tuple(out)) if not left else None


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
    piece = _merged([found.pieces[dim], Piece(None, count)])
    return None if piece is None else found.at(dim, piece)


def _slice(engine: Engine, node: fx.Node, found: Spread) -> Spread | None:
    """``[:n]``, of a piece that was repeated past the end of the weight; ``_axis`` asks that no block is left over."""
    dim = normal_dim(int(argument(node, 1, "dim", 0)), len(found.pieces))
    piece, size = found.pieces[dim], shape_of(node)[dim]
    if same(piece.size, size):
        return found
    if argument(node, 2, "start") not in (None, 0) or argument(node, 4, "step", 1) != 1 or not isinstance(size, int):
        return None
    return found.at(dim, piece._replace(size=size))


_STEPS: dict[Any, Any] = {
    aten.clone.default: _through, aten.contiguous.default: _through, aten.detach.default: _through,
    aten.alias.default: _through, aten.to.dtype: _through, aten.to.dtype_layout: _through, aten.to.other: _through,
    aten._to_copy.default: _through, aten.type_as.default: _through,
    operator.getitem: _through, aten.select.int: _select, aten.index.Tensor: _gather,
    aten.index_select.default: _gather, aten.unsqueeze.default: _unsqueeze, aten.expand.default: _expand,
    aten.expand_as.default: _expand, aten.view.default: _view, aten.reshape.default: _view,
    aten._unsafe_view.default: _view, aten.flatten.using_ints: _view, aten.unflatten.int: _view,
    aten.squeeze.default: _view, aten.squeeze.dim: _view, aten.squeeze.dims: _view,
    aten.permute.default: _permute, aten.transpose.int: _permute, aten.swapaxes.default: _permute,
    aten.swapdims.default: _permute, aten.t.default: _permute, aten.mT.default: _permute,
    aten.numpy_T.default: _permute, aten.repeat_interleave.self_int: _repeat_interleave, aten.slice.Tensor: _slice,
}  # fmt: skip


# ------------------------------------------------------------------------------------- the product


def stored(engine: Engine, node: Any) -> Wt | None:
    """An fp8 weight, as it is stored or widened already."""
    fact = engine.fact(node)
    if fact is None and is_fp8(node) and engine.is_param(node):
        fact = lift(engine, node, weight_leaf)
    return fact if isinstance(fact, Wt) and is_fp8(fact.leaf.node) else None


def _widen(engine: Engine, node: fx.Node) -> Wt | None:
    """``w.to(dtype)``: the fp8 numbers in a float type that holds all of them, or scaled ones, rounded."""
    source = node.args[0]
    weight = stored(engine, source)
    if weight is None or value(node).dtype not in FLOATS:
        return None
    assert isinstance(source, fx.Node)
    if weight.scales is None:
        return weight
    if _leaves_half(value(source).dtype, value(node).dtype):
        raise refuse("MC408", "scaled fp8 weights are rounded to float16 and widened again", node)
    return replace(weight, scales=replace(weight.scales, dtype=value(node).dtype))


def _cut_in_blocks(engine: Engine, node: fx.Node) -> Wt | None:
    """``w.view(N // 128, 128, K // 128, 128)``."""
    weight = stored(engine, node.args[0])
    if weight is None or weight.cut is not None:
        return None
    dims = regroup(weight.dims, shape_of(node)) or _split(weight.dims, shape_of(node))
    return None if dims is None else weight.with_dims(dims)


def _split(dims: Dims, shape: tuple[Any, ...]) -> Dims | None:
    """Labels after a view that cuts dimensions of a matrix in two."""
    left = [a for d in dims for a in d]
    out: list[Dim] = []
    for size in shape:
        if same(size, 1):
            out.append(())
            continue
        if not left:
            return None
        atom = left.pop(0)
        if not same(atom.size, size):
            if atom.name not in _BLOCKS or not isinstance(size, int) or atom.size % size:
                return None
            outer, inner = _BLOCKS[atom.name]
            left.insert(0, Atom(inner, atom.size // size))
            atom = Atom(outer, size)
        out.append((atom,))
    return tuple(out) if not left else None


def _times(engine: Engine, node: fx.Node) -> Wt | None:
    """An fp8 weight times its scales."""
    for weight, other in (node.args[:2], node.args[1::-1]):
        fact = stored(engine, weight)
        if fact is None:
            continue
        dtype = value(fact.leaf.node).dtype
        if dtype is not FP8:
            raise refuse("MC408", f"weights are {dtype}, the op takes {FP8}", node)
        if fact.scales is not None:
            raise refuse("MC408", f"fp8 weights are multiplied twice, the second time by {other}", node)
        found = spread(engine, other) if isinstance(other, fx.Node) else None
        if found is None or len(found.pieces) > len(fact.dims):
            raise refuse("MC408", f"fp8 weights are multiplied by {other}, which is not read as their scales", node)
        scales = _scales(engine, fact, found, node)
        given = shared(scales)
        if not (kind_of(given) or kind_of(given[::-1])):  # which dimension is ``out`` shows in the linear map
            text = " x ".join("all" if block is None else str(block) for block in given)
            known = f"{BLOCK[0]} x {BLOCK[1]}, per output channel or per tensor"
            raise refuse("MC408", f"{text} features of fp8 weights share a scale; the op takes {known}", node)
        return replace(fact, scales=scales)
    return None


def _scales(engine: Engine, weight: Wt, found: Spread, node: fx.Node) -> Scales:
    """Which dimension of the root counts what.

    Raises:
        NoMatch: MC408 with what a scale does not fit.
    """
    along: dict[str, list[Piece]] = {"w0": [], "w1": []}
    expert = _expert(weight, found, node)
    pieces = (*(ONE,) * (len(weight.dims) - len(found.pieces)), *found.pieces)
    for label, piece in zip(weight.dims, pieces, strict=True):
        if not label and not same(piece.size, 1):
            raise refuse("MC408", "fp8 weights are repeated by the product with their scales", node)
        name = label[0].name[:2] if len(label) == 1 else ""
        if name in along:
            along[name].append(piece if piece.dim is not None else Piece(None, label[0].size))
        elif name == "e" and piece == Piece(piece.dim, label[0].size) and isinstance(piece.dim, int):
            expert = piece.dim
        elif piece.dim is not None and not (piece.dim == label and found.ids == weight.ids):
            raise refuse("MC408", "the scales of fp8 weights are counted by something else than the weights", node)
    shape = shape_of(found.root)
    count = _experts(weight)
    if expert is not None and shape[expert] != count:
        raise refuse("MC408", f"{shape[expert]} rows of scales belong to fp8 weights of {count} experts", node)
    rows, columns = (_axis(along[name], shape, node) for name in ("w0", "w1"))
    if weight.cut is not None and (rows.dim is not None or columns.dim is not None):
        raise refuse("MC408", "a slice of fp8 weights is scaled: scale the whole matrix", node)
    counted = [d for d in (expert, rows.dim, columns.dim) if d is not None]
    if len(set(counted)) != len(counted):
        raise refuse("MC408", "one dimension of the scales counts two dimensions of fp8 weights", node)
    axes, blocks = (expert, rows.dim, columns.dim), (rows.block, columns.block)
    return Scales(engine.leaf(found.root), axes, blocks, value(node).dtype)


def _experts(weight: Wt) -> Any:
    """E of a stack that a weight comes from."""
    return shape_of(weight.leaf.node)[0] if weight.source in ("row", "axis", "ids") else 1


def _expert(weight: Wt, found: Spread, node: fx.Node) -> int | None:
    """The root's dimension of experts where one row was selected of it, or the row of every pair."""
    if found.ids is not None:
        if weight.ids != found.ids or found.expert is not None:
            raise refuse("MC408", "fp8 weights and their scales are gathered by different ids", node)
        return 0
    if found.expert is None:
        return None
    if weight.source != "row" or found.expert != weight.expert:
        whose = f"of expert {weight.expert}" if weight.source == "row" else "of all experts"
        raise refuse("MC408", f"fp8 weights {whose} are multiplied by row {found.expert} of the scales", node)
    return 0


def _axis(pieces: list[Piece], shape: tuple[Any, ...], node: fx.Node) -> Piece:
    """How the scales run along one dimension of the matrix."""
    piece = _merged([p for p in pieces if not same(p.size, 1)])
    if piece is None or isinstance(piece.dim, tuple):
        raise refuse("MC408", "the scales of fp8 weights do not run along blocks of neighbours", node)
    if piece.dim is not None and shape[piece.dim] != -(-piece.size // piece.block):
        blocks = f"{shape[piece.dim]} scales for {piece.size} features in blocks of {piece.block}"
        raise refuse("MC408", f"{blocks}: some scales belong to nothing", node)
    return piece


RULES: Rules = {
    aten.to.dtype: _widen, aten.to.dtype_layout: _widen, aten._to_copy.default: _widen, aten.type_as.default: _widen,
    aten.to.other: _widen,
    aten.view.default: _cut_in_blocks, aten.reshape.default: _cut_in_blocks, aten._unsafe_view.default: _cut_in_blocks,
    aten.unflatten.int: _cut_in_blocks,
    aten.mul.Tensor: _times,
}  # fmt: skip
