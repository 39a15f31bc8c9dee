"""CUDA implementations of the ops: validate, find the pointer tables, let ``kernels`` do the rest.

Nothing here reads from the device, so every op can be captured in a CUDA graph and costs no synchronisation.
Triton is imported at the first call. A call of ``experts`` that is like an earlier one in shapes, strides, dtypes,
devices and alignment was checked and planned by that one; E separate tensors are compared with each other when
their pointer table is built. Shape legend: see ``spec.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Router
from .calls import check_device, epilogue, fit, kernel, kind_of, on, operand, place, role_traits, table_of, traits
from .parts import in_parts, tokens_of_part
from .schema import implement, num_experts
from .validate import (
    MAX_PAIRS,
    check_combine,
    check_experts,
    check_grouped_linear,
    check_ids,
    check_offsets,
    check_route,
)


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
    """``moe_compile::experts``; ``path`` (not in the schema) forces one of ``kernels.config.PATHS``, for all tokens."""
    x, args = hidden_states, tuple(activation_args)
    tensors = (traits(x), traits(topk_weights), traits(topk_ids))
    roles = (role_traits(w1), role_traits(w3), role_traits(w2), role_traits(b1), role_traits(b3), role_traits(b2))
    kind = kind_of(tensors, roles, activation, args, gated, interleaved, weight_on_input, out_dtype, path)
    layout = "separate" if w3 else ("interleaved" if interleaved else "concat") if gated else "single"
    if not kind.checked:
        kind.experts = _check(x, topk_weights, topk_ids, (w1, w3, w2, b1, b3, b2), gated, interleaved, layout)
        kind.part = tokens_of_part(x, topk_ids, w2[0].shape[-1]) if path is None else 0
        kind.checked = True
    if kind.part:

        def part(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            rest = (activation, activation_args, gated, interleaved, weight_on_input, out_dtype)
            return experts(x, weights, ids, w1, w3, w2, b1, b3, b2, *rest)

        return in_parts(part, kind.part, x, topk_weights, topk_ids, out_dtype)
    with on(x):
        at1, at3, at2 = place("w1", w1, 2), place("w3", w3, 2), place("w2", w2, 2)
        bias1, bias3, bias2 = place("b1", b1, 1), place("b3", b3, 1), place("b2", b2, 1)
        given = (x, topk_weights, topk_ids, at1[0], at3[0], at2[0], bias1[0], bias3[0], bias2[0])
        kernels = kind.kernels(at1[1], at3[1], at2[1])
        program = kernels.program()
        if program is not None:
            out: Tensor = program(given)[0]
            return out
        follow, projection = kernel("experts", "follow_plan"), kernel("tile", "Projection")
        count, hidden, inter = kind.experts, x.shape[1], w2[0].shape[-1]
        gate, value, act = operand(w1, at1), operand(w3, at3), epilogue(activation, args, layout)
        up = projection(gate, inter, act, value, operand(b1, bias1), operand(b3, bias3))
        down = projection(operand(w2, at2), hidden, b=operand(b2, bias2))
        if kind.plan is None:
            device = kernel("experts", "device_of")(x.get_device())
            kind.plan = kernel("experts", "plan_of")(topk_ids, count, up, down, path, device, table_of(x))
        call = kernels.call()
        out = follow(kind.plan, x, topk_weights, topk_ids, count, up, down, weight_on_input, out_dtype, call)
        kernels.done(call, given, [out])
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
        and topk_ids.numel() <= MAX_PAIRS
        and topk_weights.is_floating_point()
        and (gated or not (w3 or interleaved))
        and not (w3 and interleaved)
        and (layout == "separate" or not b3)
    )
    if sound:
        hidden, inter = x.shape[1], w2[0].shape[-1]
        rows = 2 * inter if layout in ("concat", "interleaved") else inter
        matrices = ((w1, (rows, hidden)), (w3, (inter, hidden)), (w2, (hidden, inter)))
        sound = fit(count, x.dtype, (*matrices, (b1, (rows,)), (b3, (inter,)), (b2, (hidden,))))
    if not sound:
        check_experts(x, topk_weights, topk_ids, w1, w3, w2, b1, b3, b2, gated, interleaved)
    names = ("w1", "w3", "w2", "b1", "b3", "b2")
    first = {name: parts[0] for name, parts in zip(names, roles, strict=True) if parts}
    check_device(x, topk_ids=topk_ids, topk_weights=topk_weights, **first)
    return count


def sort_pairs(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """``moe_compile::sort_pairs``."""
    sort = kernel("sort", "sort_pairs")
    check_ids(topk_ids)
    with on(topk_ids):
        pairs = sort(topk_ids.contiguous(), num_experts)
    return pairs.order, pairs.offsets


def grouped_linear(rows: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """``moe_compile::grouped_linear``."""
    linear, projection = kernel("grouped", "grouped_linear"), kernel("tile", "Projection")
    select = kernel("config", "select")
    count = num_experts(weight) if weight else 0
    sound = count > 0 and rows.dim() == 2
    if sound:
        (pairs, depth), columns = rows.shape, weight[0].shape[-2]
        sound = fit(count, rows.dtype, ((weight, (columns, depth)), (bias, (columns,))))
    if not sound:
        check_grouped_linear(rows, weight, bias, offsets)
    check_offsets(offsets, count)
    check_device(rows, offsets=offsets, weight=weight[0], **({"bias": bias[0]} if bias else {}))
    if pairs == 0:
        return rows.new_empty(0, columns)
    with on(rows):
        w, b = operand(weight, place("weight", weight, 2)), operand(bias, place("bias", bias, 1))
        what = projection(w, columns, b=b)
        device = kernel("experts", "device_of")(rows.get_device())
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
    add_up, invert = kernel("combine", "combine_sorted"), kernel("combine", "invert")
    check_combine(rows, order, offsets, topk_weights, top_k)
    check_device(rows, order=order, offsets=offsets)
    if topk_weights is not None:
        check_device(rows, topk_weights=topk_weights)
        topk_weights = topk_weights.contiguous()
    with on(rows):
        position = invert(order.contiguous())
        dtype = out_dtype or rows.dtype
        return add_up(rows.contiguous(), position, offsets.contiguous(), topk_weights, top_k, dtype)


def route(
    logits: Tensor, top_k: int, score: str, renormalise: bool, eps: float, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``moe_compile::route``."""
    kind = kind_of(traits(logits), top_k, score, renormalise, eps, scale, dtype)
    if not kind.checked:
        check_route(logits, top_k)
        check_device(logits)
        kind.checked = True
    kernels = kind.kernels()
    with on(logits):
        program = kernels.program()
        if program is not None:
            weights, ids = program((logits,))
            return weights, ids
        call = kernels.call()
        weights, ids = kernel("route", "route")(logits, top_k, Router(score, renormalise, eps, scale), dtype, call)
        kernels.done(call, (logits,), [weights, ids])
        return weights, ids


implement("experts", experts, "CUDA")
implement("sort_pairs", sort_pairs, "CUDA")
implement("grouped_linear", grouped_linear, "CUDA")
implement("combine", combine, "CUDA")
implement("route", route, "CUDA")
