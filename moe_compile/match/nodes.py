"""Readings of single nodes of a canonical graph: dtypes, dimensions, arguments, views and writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..canonical import shape_of, tensor_inputs, value
from ..torch_compat import statically_true

aten = torch.ops.aten
ID_DTYPES = (torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP8 = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip

# Results that share memory with their first argument.
VIEWS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.t.default,
        aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.expand.default,
        aten.select.int, aten.slice.Tensor, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
        aten.split.sizes, aten.unbind.int, aten.narrow.default, aten.flatten.using_ints, aten.detach.default,
        aten.alias.default, aten.contiguous.default, aten.to.dtype, aten.view_as.default, aten.expand_as.default,
        aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten.unflatten.int, aten.movedim.int,
        aten.swapaxes.default, aten.numpy_T.default, aten.mT.default, aten.view.dtype, aten.squeeze_.dim,
        aten.unsqueeze_.default, aten.swapdims.default, aten.adjoint.default,
    }
)  # fmt: skip
FLAT_VIEWS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
        aten.flatten.using_ints, aten.contiguous.default, aten.clone.default,
    }
)  # fmt: skip


def under_flat_views(node: fx.Node) -> fx.Node:
    """What lies under views that keep every element in row-major order."""
    while keeps_order(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def keeps_order(node: fx.Node) -> bool:
    """Whether a node has every element of its first argument in the same row-major order."""
    if node.target is aten.select.int:
        source, dim = node.args[:2]
        return bool(statically_true(shape_of(source)[dim] == 1))  # type: ignore[arg-type,index]
    return node.target in FLAT_VIEWS


def is_integer(node: fx.Node) -> bool:
    """Whether a node is an integer tensor."""
    val = value(node)
    return isinstance(val, torch.Tensor) and not val.dtype.is_floating_point and val.dtype is not torch.bool


def holds_ids(node: fx.Node) -> bool:
    """Whether a node's dtype holds every expert id: a cast to ``bool`` or ``int8`` makes other ids of them."""
    val = value(node)
    return isinstance(val, torch.Tensor) and val.dtype in ID_DTYPES


def is_ids(node: fx.Node) -> bool:
    """Whether the op takes a node's dtype as expert ids."""
    return holds_ids(node) and value(node).dtype is not torch.int16


def is_float(node: Any) -> bool:
    """Whether ``node`` is a floating-point tensor node of at least 16 bits."""
    val = value(node) if isinstance(node, fx.Node) else None
    return isinstance(val, torch.Tensor) and val.dtype in FLOATS


def is_fp8(node: Any) -> bool:
    """Whether ``node`` is a tensor node of 8-bit floats."""
    val = value(node) if isinstance(node, fx.Node) else None
    return isinstance(val, torch.Tensor) and val.dtype in FP8


def rank(node: fx.Node) -> int:
    """Number of dimensions of a node's tensor."""
    return len(shape_of(node))


def normal_dim(dim: int, n: int) -> int:
    """A dimension index as a non-negative number."""
    return dim % n if n else 0


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def writes(target: Any) -> bool:
    """Whether an op writes its first argument in place and returns it."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.arguments or len(schema.returns) != 1:
        return False
    infos = (schema.arguments[0].alias_info, schema.returns[0].alias_info)
    return all(info is not None and info.is_write for info in infos) and str(schema.arguments[0].type) == "Tensor"


def mutated(node: fx.Node) -> list[fx.Node]:
    """Every tensor that a node writes in place: what its schema says; a higher-order op may write all it reads."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return tensor_inputs(node) if isinstance(node.target, torch._ops.HigherOrderOperator) else []
    if not schema.is_mutable:
        return []
    found: list[Any] = []
    for i, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            found += tree_leaves(argument(node, i, arg.name))
    return [a for a in found if isinstance(a, fx.Node)]


def written(node: fx.Node) -> fx.Node:
    """The tensor that a chain of in-place operations returns."""
    while writes(node.target):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_pure(target: Any) -> bool:
    """Whether two calls with equal arguments give equal results and touch nothing."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", "") == "getitem"
    return not schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def is_getitem_of_view(node: fx.Node) -> bool:
    is_item = getattr(node.target, "__name__", "") == "getitem"
    return is_item and node.args[0].target in VIEWS  # type: ignore[union-attr,operator]
