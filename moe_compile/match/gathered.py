"""Rules for what the ids gather: each pair's own weights, or each pair's output among those of all experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..canonical import shape_of, value
from .engine import Engine, Rules
from .facts import Index, Leaf, Range, SortedIds, Val, Wt, refuse
from .labels import Atom, Dim, Dims, is_token, names, same, size_of
from .nodes import argument, aten, is_float, is_fp8, normal_dim
from .pairs import token_major
from .routing import ids_dims, token_count
from .values import lift, weight_leaf, x_rows


def gathered_weight(engine: Engine, node: fx.Node, source: fx.Node, ids: Leaf, dims: Dims) -> Any:
    """``weights[ids]``: each pair's own weight, labelled by the pair's dimensions."""
    shape = shape_of(source)
    if len(shape) == 3 and value(source).dtype.is_complex:
        raise refuse("MC401", f"the experts' weights are {value(source).dtype}", node)
    if len(shape) not in (2, 3) or not all(isinstance(s, int) for s in shape):
        return None
    if not (is_float(source) or (is_fp8(source) and len(shape) == 3)):
        return None
    if len(shape) == 2:
        weight: Any = Wt(((Atom("e", shape[0]),), (Atom("w0", shape[1]),)), engine.leaf(source), "axis")
    else:
        weight = lift(engine, source, weight_leaf)
    if not isinstance(weight, Wt) or weight.source != "axis" or names(weight.dims[:1]) != (("e",),):
        return None
    return replace(weight, dims=(*dims, *weight.dims[1:]), source="ids", ids=ids, expert=weight.dims[0][0].size)


def by_ids(engine: Engine, node: fx.Node, source: fx.Node, dim: int, index: fx.Node, fact: Any) -> Any:
    if isinstance(fact, SortedIds):
        found = gathered_weight(engine, node, source, fact.rows.ids, fact.dims) if dim == 0 else None
        return found
    val = engine.fact(source)
    if (val is not None and not isinstance(val, Wt)) or not engine.is_param(source) or dim != 0:
        return None
    found = ids_dims(engine, index)
    if found is None:
        return None
    leaf, dims = found
    return gathered_weight(engine, node, source, leaf, dims)


def is_token_range(engine: Engine, tokens: Range, ids: fx.Node) -> bool:
    """Whether ``tokens`` is ``arange(T)`` standing before the slots of ``ids [T, K]``: ``[T, 1]`` (or ``[T]``)."""
    found = ids_dims(engine, ids)
    if found is None or tokens.start != 0 or any(tokens.dims[1:]):
        return False
    if names(tokens.dims[:1]) not in ((("i",),), ((),)):
        return False
    return len(tokens.dims) == len(found[1]) and same(size_of(tokens.dims[0]), token_count(engine, found[0]))


def per_token_by_ids(engine: Engine, node: fx.Node, source: fx.Node, ids: fx.Node) -> Any:
    """``ys[arange(T)[:, None], ids]`` of ``ys [T, E, H]``: each pair's output."""
    val, found = engine.fact(source), ids_dims(engine, ids)
    if not isinstance(val, Val) or len(val.dims) != 3 or found is None or not token_major((*val.dims[:1], *found[1])):
        return None
    if not same(size_of(val.dims[0]), token_count(engine, found[0])):
        return None
    picked = all_by_ids(val, *found, 1)
    if picked is None or len(found[1]) > 1:
        return picked
    return picked.with_dims((picked.dims[0], picked.dims[2]))


def all_by_ids(val: Val, leaf: Leaf, dims: Dims, dim: int) -> Val | None:
    """Outputs of all experts ``[t, e, f]`` gathered by the ids along ``e``: one output per pair ``[t, k, f]``."""
    if val.gate is not None or val.rows is not None or names((val.dims[dim],)) != (("e",),):
        return None
    experts = val.dims[dim][0].size
    slot = tuple(d for d in dims if names((d,)) == (("k",),))
    label: Dim = slot[0] if slot else ()
    slots = tuple(
        replace(s, weight=replace(s.weight, source="ids", ids=leaf, expert=experts)) if s.weight.source == "axis" else s
        for s in val.slots
    )
    return replace(val, dims=(*val.dims[:dim], label, *val.dims[dim + 1 :]), slots=slots, expert=experts)


def _gather(engine: Engine, node: fx.Node) -> Any:
    """``gather(ys, dim_e, ids[..., None].expand(...))`` and ``take_along_dim``."""
    source, dim, index = node.args[0], argument(node, 1, "dim"), argument(node, 2, "index")
    if node.target is aten.take_along_dim.default:
        dim, index = index, dim
    assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
    val, tokens = engine.fact(source), engine.fact(index)
    if isinstance(tokens, Index) and dim == 0:
        return _gather_tokens(engine, source, tokens)
    if not isinstance(val, Val) or dim is None:
        if val is None and source.target in (aten.stack.default, aten.cat.default) and len(source.args[0]) > 1:  # type: ignore[arg-type]
            code = "MC401" if value(source).dtype.is_complex else "MC200"
            raise refuse(code, f"no stack of known experts' outputs ({value(source).dtype}) is gathered by ids", node)
        return None
    d = normal_dim(int(dim), len(val.dims))
    found = ids_dims(engine, index)
    if found is None:
        return None
    leaf, dims = found
    # The index must be ids over (t, k) at the right places and a plain copy over the features.
    for i, (mine, theirs) in enumerate(zip(val.dims, dims, strict=True)):
        label = names((theirs,))[0]
        if i != d and not same(size_of(mine), size_of(theirs)):
            return None
        if i == d:
            if label not in (("k",), ()):
                return None
        elif names((mine,))[0] != label and (label != ("*",) or names((mine,)) != (("f",),)):
            return None
    return all_by_ids(val, leaf, dims, d)


def _gather_tokens(engine: Engine, source: fx.Node, index: Index) -> Any:
    """``gather(x, 0, tokens[:, None].expand(-1, H))``: whole rows of the tokens."""
    val = x_rows(engine, source)
    if index.what != "token" or val is None or names(index.dims) != (("r",), ("*",)):
        return None
    if not is_token(val.dims[0]) or not same(size_of(val.dims[0]), token_count(engine, index.rows.ids)):
        return None
    return (
        replace(val, dims=(index.dims[0], val.dims[1]), rows=index.rows)
        if same(index.dims[1][0].size, size_of(val.dims[1]))
        else None
    )


RULES: Rules = {aten.gather.default: _gather, aten.take_along_dim.default: _gather}
