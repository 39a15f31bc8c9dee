"""Scales of fp8 weights: which number multiplies which element, read from the product that widens them.

``w1[e].to(x.dtype) * scale[e].repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]`` is the fp8 weight ``w1``
with ``scale`` per block. The weight's side has facts (``Wt``), which keep their leaf through the cast; the scale's
side is walked back (``spread``). A scale per output channel or per tensor may also multiply the outputs:
``F.linear(x, w1[e].to(x.dtype)) * scale[e]``. Whatever cannot be read that way is refused with MC408: then the product
is an unknown weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..canonical import shape_of, value
from ..quantize import BLOCK, FP8
from .engine import Engine, Rules
from .facts import Scales, Val, Wt, refuse
from .fp8 import kind_of, shared
from .labels import Atom, Dim, Dims, regroup, same, size_of
from .nodes import FLOATS, aten, is_fp8
from .spread import ONE, Piece, Spread, holds, merged, spread
from .values import lift, slots_of, weight_leaf

_BLOCKS = {"w0": ("w0o", "w0i"), "w1": ("w1o", "w1i")}
_ELSE = "the scales of fp8 weights are counted by something else than the weights"


def stored(engine: Engine, node: Any) -> Wt | None:
    """An fp8 weight, as it is stored or widened already."""
    fact = engine.fact(node)
    if is_fp8(node) and engine.is_param(node):
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
    rounded = value(source).dtype
    if not holds(rounded, value(node).dtype):
        raise refuse("MC408", f"scaled fp8 weights are rounded to {_short(rounded)} and widened again", node)
    return replace(weight, scales=replace(weight.scales, dtype=value(node).dtype))


def _cut_in_blocks(engine: Engine, node: fx.Node) -> Wt | None:
    """``w.view(N // 128, 128, K // 128, 128)``."""
    weight = stored(engine, node.args[0])
    if weight is None:
        return None
    dims = regroup(weight.dims, shape_of(node)) or _split(weight.dims, shape_of(node))
    return None if dims is None else weight.with_dims(dims)


def _split(dims: Dims, shape: tuple[Any, ...]) -> Dims | None:
    """Labels after a view that cuts dimensions of a matrix in two.

    A view has as many elements before as after, so atoms and sizes are used up together.
    """
    left = [a for d in dims for a in d]
    out: list[Dim] = []
    for size in shape:
        if same(size, 1):
            out.append(())
            continue
        atom = left.pop(0)
        if not same(atom.size, size):
            if atom.name not in _BLOCKS or atom.size % size:
                return None
            outer, inner = _BLOCKS[atom.name]
            left.insert(0, Atom(inner, atom.size // size))
            atom = Atom(outer, size)
        out.append((atom,))
    return tuple(out)


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
        return replace(fact, scales=_scales(engine, fact, found, node))
    return None


def _times_outputs(engine: Engine, node: fx.Node) -> Val | None:
    """The outputs of a linear map of fp8 weights, times their scales."""
    for outputs, other in (node.args[:2], node.args[1::-1]):
        val = engine.fact(outputs)
        if not isinstance(val, Val) or val.expr[0] != "lin" or not isinstance(other, fx.Node):
            continue
        slot = val.slots[val.expr[1]]
        weight = slot.weight
        if value(weight.leaf.node).dtype is not FP8 or weight.scales is not None:
            continue
        if val.expr[1] in slots_of(val.expr[2]):  # the same weight inside too, where nothing scales it
            continue
        found = spread(engine, other)
        if found is None or len(found.pieces) > len(val.dims):
            continue
        name = "w1" if slot.transposed else "w0"
        dims = tuple(tuple(Atom(name, a.size) if a.name == "f" else a for a in d) for d in val.dims)
        scales = _scales(engine, replace(weight, dims=dims), found, node)
        scaled = replace(slot, weight=replace(weight, scales=scales))
        return replace(val, slots=tuple(scaled if s is slot else s for s in val.slots))
    return None


def _scales(engine: Engine, weight: Wt, found: Spread, node: fx.Node) -> Scales:
    """Which dimension of the root counts what.

    Raises:
        NoMatch: MC408 with what a scale does not fit.
    """
    product = value(node).dtype
    if found.rounded is not None and not holds(found.rounded, product):
        said = f"the scales of fp8 weights are rounded to {_short(found.rounded)} before a product in {_short(product)}"
        raise refuse("MC408", said, node)
    along: dict[str, dict[str, Piece]] = {"w0": {}, "w1": {}}
    expert, pairs = _expert(weight, found, node), 0
    pieces = (*(ONE,) * (len(weight.dims) - len(found.pieces)), *found.pieces)
    for label, piece in zip(weight.dims, pieces, strict=True):
        if same(size_of(label), 1) and not same(piece.size, 1):
            raise refuse("MC408", "fp8 weights are repeated by the product with their scales", node)
        name = label[0].name if len(label) == 1 else ""
        whole = piece.block == 1 and same(piece.size, size_of(label))
        if piece.dim is None:
            for a in label:
                along.get(a.name[:2], {})[a.name] = Piece(None, a.size)
        elif name[:2] in along:
            along[name[:2]][name] = piece
        elif name == "e" and whole:
            expert = piece.dim
        elif piece.dim == label and whole:
            pairs += 1
        else:
            raise refuse("MC408", _ELSE, node)
    if pairs != found.pairs:  # those of one token or slot were taken for all
        raise refuse("MC408", _ELSE, node)
    shape = shape_of(found.root)
    count = shape_of(weight.leaf.node)[0]
    if expert is not None and shape[expert] != count:
        raise refuse("MC408", f"{shape[expert]} rows of scales belong to fp8 weights of {count} experts", node)
    rows, columns = (_axis(along[name], shape, node) for name in ("w0", "w1"))
    if weight.cut is not None and (rows.dim is not None or columns.dim is not None):
        raise refuse("MC408", "a slice of fp8 weights is scaled: scale the whole matrix", node)
    axes, blocks = (expert, rows.dim, columns.dim), (rows.block, columns.block)
    unread = [size for d, size in enumerate(shape) if d not in axes and size != 1]
    if unread:  # one of several was taken, ``s[:, :1]``: the lowering reads whole dimensions
        raise refuse("MC408", f"fp8 weights are multiplied by some of {tuple(shape)} scales", node)
    scales = Scales(engine.leaf(found.root), axes, blocks, value(node).dtype)
    given = shared(scales)
    if not (kind_of(given) or kind_of(given[::-1])):  # which dimension is ``out`` shows in the linear map
        text = " x ".join("all" if block is None else str(block) for block in given)
        known = f"{BLOCK[0]} x {BLOCK[1]}, per output channel or per tensor"
        raise refuse("MC408", f"{text} features of fp8 weights share a scale; the op takes {known}", node)
    return scales


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expert(weight: Wt, found: Spread, node: fx.Node) -> int | None:
    """The root's dimension of experts where one row was selected of it, or the row of every pair."""
    if found.ids is not None and weight.ids != found.ids:
        raise refuse("MC408", "fp8 weights and their scales are gathered by different ids", node)
    if found.expert is not None and found.expert != weight.expert:
        whose = f"of expert {weight.expert}" if weight.source == "row" else "of all experts"
        raise refuse("MC408", f"fp8 weights {whose} are multiplied by row {found.expert} of the scales", node)
    return found.axis


def _axis(pieces: dict[str, Piece], shape: tuple[Any, ...], node: fx.Node) -> Piece:
    """How the scales run along one dimension of the matrix, given by the names of its parts."""
    piece = merged([p for p in pieces.values() if not same(p.size, 1)])
    turned = list(pieces) != sorted(pieces, reverse=True)  # ``w0i`` before ``w0o``: neighbours do not share a scale
    if piece is None or (turned and piece.dim is not None):
        raise refuse("MC408", "the scales of fp8 weights do not run along blocks of neighbours", node)
    if piece.dim is not None and shape[piece.dim] != -(-piece.size // piece.block):
        blocks = f"{shape[piece.dim]} scales for {piece.size} features in blocks of {piece.block}"
        raise refuse("MC408", f"{blocks}: some scales belong to nothing", node)
    return piece


def _product(engine: Engine, node: fx.Node) -> Wt | Val | None:
    return _times(engine, node) or _times_outputs(engine, node)


RULES: Rules = {
    aten.to.dtype: _widen, aten.to.dtype_layout: _widen, aten._to_copy.default: _widen, aten.type_as.default: _widen,
    aten.to.other: _widen,
    aten.view.default: _cut_in_blocks, aten.reshape.default: _cut_in_blocks, aten._unsafe_view.default: _cut_in_blocks,
    aten.unflatten.int: _cut_in_blocks,
    aten.mul.Tensor: _product,
}  # fmt: skip
