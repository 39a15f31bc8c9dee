"""The whole layer on one device: the chosen path's kernels in a row.

``run`` is what the op calls on CUDA and what the tests call on CPU tensors under Triton's interpreter.
Shape legend: see ``spec.py``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from .combine import combine_pairs, combine_sorted, combine_twin
from .config import H200, PATHS, Device, Plan, choose_path, select
from .decode import decode_projection
from .gemv import gemv_down, gemv_up
from .grouped import gather_projection, projection_twin, sorted_projection
from .launch import Start, once
from .operand import Operand
from .sort import sort_pairs
from .tile import Projection
from .tma import AVAILABLE, CAPABILITY
from .tuned import Layer, Table, find, table_path


def run(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    up: Projection,
    down: Projection,
    weight_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
    path: str | None = None,
    device: Device = H200,
) -> Tensor:
    """``x [T, H]``, ``weights [T, K]``, ``ids [T, K]`` -> ``[T, H]``.

    Args:
        path: one of ``config.PATHS`` to force it; default by the number of tokens.
        device: what to plan for.
    """
    plan = plan_of(ids, experts, up, down, path, device)
    return follow_plan(plan, x, weights, ids, experts, up, down, weight_on_input, out_dtype)


def plan_of(
    ids: Tensor,
    experts: int,
    up: Projection,
    down: Projection,
    path: str | None = None,
    device: Device = H200,
    table: Table | None = None,
) -> Plan:
    """How ``run`` computes the layer: depends on shapes, strides and the alignment of stacked weights alone.

    Args:
        table: measured plans, which go before the standard ones where no path is forced.
    """
    tokens, top_k = ids.shape
    dense, tma = is_dense(up, down), (up.describable, down.describable)
    if table and path is None:
        measured = find(table, layer_of(ids, experts, up, down), tokens, device, dense=dense, tma=tma)
        if measured is not None:
            return measured
    if path is None:
        path = choose_path(tokens, top_k, experts, up.depth, up.columns, dense)
    elif path not in PATHS:
        raise ValueError(f"path {path!r} is not one of {', '.join(PATHS)}")
    elif path == "gemv" and not dense:
        raise ValueError("path 'gemv' needs weights with stride one along their input dimension")
    return select(path, tokens, top_k, experts, up.depth, up.columns, up.w.first.element_size(), device, tma)


def layer_of(ids: Tensor, experts: int, up: Projection, down: Projection) -> Layer:
    """What a table of measured plans knows a layer by."""
    roles = [up.w, down.w] if up.up is None else [up.w, up.up, down.w]
    forms = {_storage(role) for role in roles}
    dtype = str(up.w.first.dtype).removeprefix("torch.")
    storage = forms.pop() if len(forms) == 1 else "mixed"
    return Layer(experts, ids.shape[1], up.depth, up.columns, dtype, up.epilogue.layout, storage)


def _storage(role: Operand) -> str:
    if role.table is not None:
        return "separate"
    return "stacked" if role.first.stride(2) == 1 else "transposed"


def follow_plan(
    plan: Plan,
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    up: Projection,
    down: Projection,
    weight_on_input: bool,
    out_dtype: torch.dtype | None,
    start: Start = once,
) -> Tensor:
    """``run`` by a plan; which kernels are started in which order depends on the plan and on shapes alone."""
    top_k = ids.shape[1]
    dtype = out_dtype or x.dtype
    if x.shape[0] == 0:
        return x.new_empty(0, down.columns, dtype=dtype)
    x, ids, on_input, on_output = arranged(x, weights, ids, weight_on_input)
    if plan.path == "gemv":
        h = gemv_up(x, ids, experts, up, on_input, start)
        return gemv_down(h, ids, on_output, experts, down, dtype, start)
    if plan.path == "decode":
        h = decode_projection(x, ids, experts, up, plan.up, True, on_input, start)
        y = decode_projection(h, ids, experts, down, plan.down, False, None, start)
        return combine_pairs(y, ids, on_output, experts, dtype, start)
    pairs = sort_pairs(ids, experts, plan.up.bm, plan.up.rest, start)
    h = gather_projection(x, pairs, top_k, up, plan.up, on_input, start)
    y = sorted_projection(h, pairs, down, plan.down, start)
    return combine_sorted(y, pairs.inverse, pairs.offsets, on_output, top_k, dtype, start)


def arranged(
    x: Tensor, weights: Tensor, ids: Tensor, weight_on_input: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rows and ids as the kernels read them; the router weights for the input, and those for the output."""
    weights = weights.contiguous()
    on_input, on_output = (weights, None) if weight_on_input else (None, weights)
    return x if x.stride(1) == 1 else x.contiguous(), ids.contiguous(), on_input, on_output


@lru_cache(maxsize=64)
def device_of(index: int) -> Device:
    """The CUDA device with this index."""
    properties = driver.active.utils.get_device_properties(index)
    major, _ = torch.cuda.get_device_capability(index)
    tma = AVAILABLE and torch.version.hip is None and major >= CAPABILITY
    return Device(int(properties["max_shared_mem"]), int(properties["multiprocessor_count"]), tma, major == 9)


@lru_cache(maxsize=64)
def table_of(folder: str, index: int) -> Path:
    """The file of measured plans for the CUDA device with this index."""
    return table_path(folder, torch.cuda.get_device_name(index), triton.__version__)


def run_twin(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    experts: int,
    up: Projection,
    down: Projection,
    weight_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Torch twin of ``run``: the same roundings between the stages, one expert after the other."""
    top_k = ids.shape[1]
    expert = ids.reshape(-1)
    valid = (expert >= 0) & (expert < experts)
    expert = torch.where(valid, expert, -1)
    rows = x.repeat_interleave(top_k, dim=0)  # [P, H]
    h = projection_twin(rows, expert, up, weights.reshape(-1) if weight_on_input else None)
    y = projection_twin(h, expert, down, None)
    position = torch.arange(expert.numel(), device=x.device)
    return combine_twin(y, position, valid, None if weight_on_input else weights, top_k, out_dtype or x.dtype)


def is_dense(*projections: Projection) -> bool:
    """Whether every weight has stride one along its input dimension."""
    weights = [w for p in projections for w in (p.weights.w, p.weights.up)]
    return all(w.ptr is None or w.inp == 1 for w in weights)
