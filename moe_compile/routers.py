"""Reads how a call of experts gets its weights and ids, in Inductor's graph of plain ATen operations.

The router of a layer stays in the user's program: it may be anything. Where it is one of the common ones, every step
of it proved here, ``lower.fuse_router`` replaces it by one launch. Shape legend: see ``spec.py``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .spec import Router

aten, prims = torch.ops.aten, torch.ops.prims
MAX_EXPERTS, MAX_TOP_K = 1024, 32  # what one warp holds and takes
# the ops that take rows, weights and ids first
EXPERTS = (torch.ops.moe_compile.experts.default, torch.ops.moe_compile.experts_fp8.default)


@dataclass(frozen=True)
class Chain:
    """A proved router: ``weights`` and ``ids`` are ``router`` of ``logits``."""

    router: Router
    logits: fx.Node  # [T, E]
    weights: fx.Node  # [T, K]
    ids: fx.Node  # [T, K]
    topk: fx.Node
    top_k: int


def read(experts: fx.Node) -> Chain | None:
    """The router of a call of one of ``EXPERTS``, None if it is not one of the common ones.

    ``softmax`` or ``sigmoid`` of all logits, top-k, optionally divided by the sum (plus a constant), times a constant;
    or top-k of the logits and ``softmax`` of those. In float32 throughout but for the logits and the result.
    """
    weights, ids = experts.args[1:3]
    if not isinstance(weights, fx.Node) or not isinstance(ids, fx.Node):
        return None
    topk = _item(ids, 1)
    if topk is None or not _chooses_largest(topk):
        return None
    source: Any = topk.args[0]
    top_k: Any = topk.args[1]
    inner, scale = _scaled(_uncast(weights))
    renormalise, eps = False, 0.0
    after = _softmax(inner)
    if after is not None and _item(_uncast(after), 0) is topk:
        found, logits = Router("softmax", True, 0.0, scale), source
    else:
        if (shared := _divided(inner)) is not None:
            (inner, eps), renormalise = shared, True
        score = _score(source)
        if score is None or not _takes(inner, topk, ids):
            return None
        name, logits = score
        found = Router(name, renormalise, eps, scale)
    if not _fits(logits, top_k):
        return None
    return Chain(found, logits, weights, ids, topk, top_k)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _float32(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _uncast(node: Any) -> Any:
    """What was cast, where float32 is on one side: the kernel rounds once, from float32."""
    if _is(node, prims.convert_element_type.default) and (_float32(node) or _float32(node.args[0])):
        value = node.args[0].meta.get("val")
        return node.args[0] if isinstance(value, torch.Tensor) and value.is_floating_point() else node
    return node


def _item(node: Any, index: int) -> fx.Node | None:
    """The ``topk`` whose output number ``index`` this is."""
    if _is(node, operator.getitem) and node.args[1] == index and _is(node.args[0], aten.topk.default):
        return node.args[0]
    return None


def _chooses_largest(topk: fx.Node) -> bool:
    """Along the last dimension of a matrix; in descending order unless nobody asked for an order."""
    given = tuple(topk.args[2:4])
    dim, largest = given + (-1, True)[len(given) :]
    return dim in (-1, 1) and largest is True and not topk.kwargs


def _over_rows(node: Any, target: Any) -> Any:
    """``x`` of ``target(x, [-1], keepdim=True)``."""
    if _is(node, target) and list(node.args[1:]) in ([[-1], True], [[1], True]) and not node.kwargs:
        return node.args[0]
    return None


def _softmax(node: Any) -> Any:
    """``z`` of a float32 ``softmax(z, -1)``, as Inductor decomposes it."""
    if not _is(node, aten.div.Tensor) or not _is(node.args[0], aten.exp.default) or not _float32(node):
        return None
    powers, total = node.args
    shifted = powers.args[0]
    if _over_rows(total, aten.sum.dim_IntList) is not powers or not _is(shifted, aten.sub.Tensor) or shifted.kwargs:
        return None
    z, largest = shifted.args
    return z if _over_rows(largest, aten.amax.default) is z and _float32(z) else None


def _score(node: Any) -> tuple[str, Any] | None:
    """The function and the logits of the scores that the top-k chooses from."""
    if _is(node, aten.sigmoid.default) and _float32(node.args[0]):
        return "sigmoid", _uncast(node.args[0])
    z = _softmax(node)
    return None if z is None else ("softmax", _uncast(z))


def _scaled(node: Any) -> tuple[Any, float]:
    """``v`` and ``c`` of a float32 ``v * c``."""
    if _is(node, aten.mul.Tensor) and isinstance(node.args[1], (int, float)) and _float32(node):
        return node.args[0], float(node.args[1])
    return node, 1.0


def _divided(node: Any) -> tuple[Any, float] | None:
    """``v`` and ``eps`` of a float32 ``v / (v.sum(-1, keepdim=True) + eps)``."""
    if not _is(node, aten.div.Tensor) or not _float32(node) or node.kwargs:
        return None
    v, total = node.args
    eps = 0.0
    if _is(total, aten.add.Tensor) and isinstance(total.args[1], (int, float)) and not total.kwargs:
        total, eps = total.args[0], float(total.args[1])
    return (v, eps) if _over_rows(total, aten.sum.dim_IntList) is v else None


def _takes(values: Any, topk: fx.Node, ids: fx.Node) -> bool:
    """Whether ``values`` are the chosen scores: of the top-k itself, or gathered by its ids."""
    if _is(values, aten.gather.default):
        source, dim, index = values.args[:3]
        return source is topk.args[0] and dim in (-1, 1) and index is ids
    return _item(values, 0) is topk


def _fits(logits: Any, top_k: Any) -> bool:
    value = logits.meta.get("val") if isinstance(logits, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not isinstance(top_k, int):
        return False
    known = isinstance(value.shape[1], int) and value.shape[1] <= MAX_EXPERTS
    return known and value.dtype in (torch.float32, torch.bfloat16, torch.float16) and top_k <= MAX_TOP_K
