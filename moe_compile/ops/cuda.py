"""CUDA implementations of the ops: validate, find the pointer tables, let ``kernels`` do the rest.

Nothing here reads from the device, so every op can be captured in a CUDA graph and costs no synchronisation.
Triton is imported at the first call. A call of ``experts`` that is like an earlier one in shapes, strides, dtypes,
devices and alignment was checked and planned by that one; E separate tensors are compared with each other when
their pointer table is built. Shape legend: see ``spec.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import tuned_folder
from ..spec import Router
from .schema import implement, num_experts
from .tables import pointer_table
from .validate import check_combine, check_experts, check_grouped_linear, check_ids, check_offsets, check_route

if TYPE_CHECKING:
    from ..kernels.activation import Epilogue
    from ..kernels.config import Plan
    from ..kernels.launch import Kernels
    from ..kernels.operand import Operand

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Roles = tuple[tuple[Sequence[Tensor], tuple[int, ...]], ...]


def experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Sequence[Tensor],
    w3: Sequence[Tensor],
    w2: Sequence[Tensor],
    b1: Sequence[Tensor],
    b3: Sequence[Tensor],
    b2: Sequence[Tensor],
    activation: str,
    activation_args: Sequence[float],
    gated: bool,
    interleaved: bool = False,
    weight_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
    path: str | None = None,
) -> Tensor:
    """``moe_compile::experts``; ``path`` (not in the schema) forces one of ``kernels.config.PATHS``."""
    follow, projection = _kernel("experts", "follow_plan"), _kernel("tile", "Projection")
    x, args = hidden_states, tuple(activation_args)
    tensors = (_traits(x), _traits(topk_weights), _traits(topk_ids))
    roles = (_role(w1), _role(w3), _role(w2), _role(b1), _role(b3), _role(b2))
    kind = _kind(tensors, roles, activation, args, gated, interleaved, weight_on_input, out_dtype, path)
    layout = "separate" if w3 else ("interleaved" if interleaved else "concat") if gated else "single"
    if not kind.checked:
        kind.experts = _check(x, topk_weights, topk_ids, (w1, w3, w2, b1, b3, b2), gated, interleaved, layout)
        kind.checked = True
    count = kind.experts
    hidden, inter = x.shape[1], w2[0].shape[-1]
    with _on(x):
        gate = _operand("w1", w1, 2, x)
        value = _operand("w3", w3, 2, x)
        up = projection(
            gate, inter, _epilogue(activation, args, layout), value, _operand("b1", b1, 1, x), _operand("b3", b3, 1, x)
        )
        down = projection(_operand("w2", w2, 2, x), hidden, b=_operand("b2", b2, 1, x))
        if kind.plan is None:
            device = _kernel("experts", "device_of")(x.get_device())
            kind.plan = _kernel("experts", "plan_of")(topk_ids, count, up, down, path, device, _table(x))
        call = kind.kernels(up.aligned, down.aligned).call()
        out: Tensor = follow(
            kind.plan, x, topk_weights, topk_ids, count, up, down, weight_on_input, out_dtype, call
        )
        call.end()
        return out


def _check(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    roles: Sequence[Sequence[Tensor]],
    gated: bool,
    interleaved: bool,
    layout: str,
) -> int:
    """The number of experts; raises where the first tensor of every role shows that something does not fit."""
    w1, w3, w2, b1, b3, b2 = roles
    count = num_experts(w1) if w1 and w2 else 0
    sound = (
        count > 0
        and x.dim() == 2
        and topk_ids.dim() == 2
        and topk_ids.dtype in (torch.int64, torch.int32)
        and topk_ids.shape[0] == x.shape[0]
        and topk_ids.shape == topk_weights.shape
        and topk_weights.is_floating_point()
        and (gated or not (w3 or interleaved))
        and not (w3 and interleaved)
        and (layout == "separate" or not b3)
    )
    if sound:
        hidden, inter = x.shape[1], w2[0].shape[-1]
        rows = 2 * inter if layout in ("concat", "interleaved") else inter
        matrices = ((w1, (rows, hidden)), (w3, (inter, hidden)), (w2, (hidden, inter)))
        sound = _fit(count, x.dtype, (*matrices, (b1, (rows,)), (b3, (inter,)), (b2, (hidden,))))
    if not sound:
        check_experts(x, topk_weights, topk_ids, w1, w3, w2, b1, b3, b2, gated, interleaved)
    _check_device(x, topk_ids=topk_ids, topk_weights=topk_weights)
    return count


def sort_pairs(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """``moe_compile::sort_pairs``."""
    sort = _kernel("sort", "sort_pairs")
    check_ids(topk_ids)
    with _on(topk_ids):
        pairs = sort(topk_ids.contiguous(), num_experts)
    return pairs.order, pairs.offsets


def grouped_linear(rows: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """``moe_compile::grouped_linear``."""
    linear, projection = _kernel("grouped", "grouped_linear"), _kernel("tile", "Projection")
    select = _kernel("config", "select")
    count = num_experts(weight) if weight else 0
    sound = count > 0 and rows.dim() == 2
    if sound:
        (pairs, depth), columns = rows.shape, weight[0].shape[-2]
        sound = _fit(count, rows.dtype, ((weight, (columns, depth)), (bias, (columns,))))
    if not sound:
        check_grouped_linear(rows, weight, bias, offsets)
    check_offsets(offsets, count)
    _check_device(rows, offsets=offsets)
    if pairs == 0:
        return rows.new_empty(0, columns)
    with _on(rows):
        what = projection(_operand("weight", weight, 2, rows), columns, b=_operand("bias", bias, 1, rows))
        device = _kernel("experts", "device_of")(rows.get_device())
        tma = (False, what.describable)
        plan = select("sorted", pairs, 1, count, columns, depth, rows.element_size(), device, tma)
        return linear(rows.contiguous(), offsets.contiguous(), what, plan.down)


def combine(
    rows: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_weights: Tensor | None,
    top_k: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``moe_compile::combine``."""
    add_up, invert = _kernel("combine", "combine_sorted"), _kernel("combine", "invert")
    check_combine(rows, order, offsets, topk_weights, top_k)
    _check_device(rows, order=order, offsets=offsets)
    if topk_weights is not None:
        _check_device(rows, topk_weights=topk_weights)
        topk_weights = topk_weights.contiguous()
    with _on(rows):
        position = invert(order.contiguous())
        dtype = out_dtype or rows.dtype
        return add_up(rows.contiguous(), position, offsets.contiguous(), topk_weights, top_k, dtype)


def route(
    logits: Tensor, top_k: int, score: str, renormalise: bool, eps: float, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``moe_compile::route``."""
    kernel: Callable[..., tuple[Tensor, Tensor]] = _kernel("route", "route")
    kind = _kind(_traits(logits), top_k, score, renormalise, eps, scale, dtype)
    if not kind.checked:
        check_route(logits, top_k)
        _check_device(logits)
        kind.checked = True
    call = kind.kernels().call()
    with _on(logits):
        out = kernel(logits, top_k, Router(score, renormalise, eps, scale), dtype, call)
    call.end()
    return out


implement("experts", experts, "CUDA")
implement("sort_pairs", sort_pairs, "CUDA")
implement("grouped_linear", grouped_linear, "CUDA")
implement("combine", combine, "CUDA")
implement("route", route, "CUDA")


class _Kind:
    """Calls alike in all that is checked and planned, and whether one of them was checked."""

    __slots__ = ("_kernels", "checked", "experts", "plan")

    def __init__(self) -> None:
        self.checked = False
        self.experts = 0
        self.plan: Plan | None = None
        self._kernels: dict[tuple[tuple[bool, bool], ...], Kernels] = {}

    def kernels(self, *aligned: tuple[bool, bool]) -> Kernels:
        """Those compiled for the alignment of the addresses in the pointer tables."""
        found = self._kernels.get(aligned)
        if found is None:
            found = self._kernels[aligned] = _kernel("launch", "Kernels")()
        return found


@lru_cache(maxsize=4096)
def _kind(*key: Any) -> _Kind:
    """The kind of a call; the key has everything that checks, plans and the compiler look at."""
    return _Kind()


def _traits(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, t.stride(), t.data_ptr() % 16, t.get_device()


def _role(parts: Sequence[Tensor]) -> tuple[Any, ...]:
    """Of separate weights the first, without its address: the kernels read a table, which lies on 16 bytes."""
    if not parts:
        return ()
    first = parts[0]
    if len(parts) == 1:
        return _traits(first)
    return len(parts), first.dtype, first.shape, first.stride(), first.get_device()


def _fit(count: int, dtype: torch.dtype, roles: Roles) -> bool:
    """Whether every role that is present has the right shape and dtype, judged by its first tensor."""
    for parts, shape in roles:
        if not parts:
            continue
        first = parts[0]
        stacked = len(parts) == 1 and first.dim() == len(shape) + 1
        if first.dtype != dtype or first.shape != ((count, *shape) if stacked else shape):
            return False
        if not stacked and len(parts) != count:
            return False
    return True


def _operand(role: str, parts: Sequence[Tensor], dims: int, like: Tensor) -> Operand | None:
    """A role that fits, as the kernels take it; None where it is absent."""
    if not parts:
        return None
    if parts[0].device != like.device:
        _check_device(like, **{role: parts[0]})
    operand: Callable[..., Operand] = _kernel("operand", "Operand")
    if parts[0].dim() == dims + 1:
        return operand(parts)
    return operand(parts, *pointer_table(parts, role))


def _check_device(like: Tensor, **others: Tensor) -> None:
    if like.dtype not in DTYPES:
        raise TypeError(f"activations are {like.dtype}; on CUDA pass float32, bfloat16 or float16")
    for name, tensor in others.items():
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, the activations are on {like.device}; move one of them")


def _table(x: Tensor) -> Any:
    """The plans that were measured on this kind of GPU, if any."""
    return _kernel("tuned", "load")(_kernel("experts", "table_of")(tuned_folder(), x.get_device()))


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@lru_cache(maxsize=256)
def _epilogue(name: str, args: tuple[float, ...], layout: str) -> Epilogue:
    epilogue: Epilogue = _kernel("activation", "Epilogue")(name, args, layout)
    return epilogue


@lru_cache(maxsize=64)
def _kernel(module: str, name: str) -> Any:
    try:
        return getattr(import_module(f"moe_compile.kernels.{module}"), name)
    except ImportError as error:
        raise RuntimeError(
            f"moe_compile: the CUDA ops need Triton 3.6 or newer, which cannot be imported ({error}); "
            "pip install triton"
        ) from error
