"""What the op takes of fp8 weights: their formats, and how a matched scale becomes one of ``spec.Scale``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..canonical import PLAIN_TENSORS, shape_of, tensor_inputs, value
from ..quantize import BLOCK
from ..spec import Scale
from .facts import Leaf, Scales, Slot, Val, refuse
from .nodes import is_fp8

SCALES = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds all their numbers
CAPABILITY = (8, 9)  # the first with instructions for float8_e4m3fn, which Triton needs


@dataclass(frozen=True)
class ScaleHandle:
    """How the lowering gets the scales of a weight, ``[E, blocks of out, blocks of in]``, from the border node.

    ``axes``: which of its dimensions count experts and blocks (None: one for all, a dimension of one); ``cut`` is a
    slice of the blocks of ``out``.
    """

    leaf: Leaf
    axes: tuple[int | None, int | None, int | None]
    cut: tuple[int, int, int] | None = None


def scale_of(scales: Scales, slot: Slot, cut: tuple[str, int, int, int] | None) -> Scale:
    """The scales of a matrix, or of the part of it that ``cut`` takes.

    Raises:
        NoMatch: MC408 when the cut goes through a block.
    """
    expert, *axes = scales.axes
    blocks, sizes = list(scales.blocks), list(shape_of(slot.weight.leaf.node)[-2:])
    taken = None
    if cut is not None:
        name, start, stop, step = cut
        at = 0 if name == "w0" else 1
        sizes[at], block = len(range(start, stop, step)), blocks[at]
        if axes[at] is not None:
            along_out = slot.transposed == (at == 1)
            if not along_out or (block > 1 and (step != 1 or start % block)):
                raise refuse("MC408", f"fp8 weights are cut at {start}:{stop}, and {block} features share a scale")
            taken = (start // block, -(-stop // block), step)
    if slot.transposed:
        axes, blocks, sizes = axes[::-1], blocks[::-1], sizes[::-1]
    rows, columns = (size if axis is None else block for axis, block, size in zip(axes, blocks, sizes, strict=True))
    return Scale(ScaleHandle(scales.leaf, (expert, axes[0], axes[1]), taken), (rows, columns))


def check_fp8(val: Val, maps: Sequence[tuple[Slot, Slot | None]], node: fx.Node) -> bool:
    """Whether the matrices of an expert are fp8; ``maps`` are those with their biases.

    Raises:
        NoMatch: MC408 a format or scale that the op does not take, MC506 a bias, MC504 the device.
    """
    slots = [slot for slot, _ in maps]
    fp8 = [slot for slot in slots if is_fp8(slot.weight.leaf.node)]
    if not fp8:
        return False
    if len(fp8) < len(slots):
        other = next(value(s.weight.leaf.node).dtype for s in slots if s not in fp8)
        raise refuse("MC408", f"one projection is fp8 and another is {other}", node)
    for slot in fp8:
        _check_weight(slot, val, node)
    first, *others = [_kind(slot) for slot in fp8[:-1]]
    if any(kind != first for kind in others):
        raise refuse("MC408", f"gate and up are scaled per {first} and per {others[0]}", node)
    if any(bias is not None for _, bias in maps):
        raise refuse("MC506", "fp8 experts with biases", node)
    x = value(val.x.node)
    if x.device.type == "cuda":
        if x.dtype is torch.float64:
            raise refuse("MC401", "the hidden states are float64, and the kernels of fp8 weights add in float32", node)
        _check_device(x.device, node)
    return True


def _check_weight(slot: Slot, val: Val, node: fx.Node) -> None:
    weight, scales = slot.weight, slot.weight.scales
    stored = value(weight.leaf.node)
    if weight.leaves:
        raise refuse("MC408", "the fp8 weight of each expert is its own tensor", weight.leaf.node)
    if scales is None:
        raise refuse("MC408", "fp8 weights are multiplied as they are, without a scale", weight.leaf.node)
    rows = value(val.x.node).dtype
    if scales.dtype != rows:
        said = f"fp8 weights are widened to {scales.dtype}, the hidden states are {rows}"
        raise refuse("MC401", said, weight.leaf.node)
    tensor = value(scales.leaf.node)
    if type(tensor).__name__ not in PLAIN_TENSORS:
        raise refuse("MC402", f"the scales of fp8 weights are a {type(tensor).__name__}", scales.leaf.node)
    if tensor.dtype not in SCALES:
        raise refuse("MC408", f"the scales of fp8 weights are {tensor.dtype}, the op takes float32", scales.leaf.node)
    if tensor.device != stored.device:  # PyTorch takes one number from the CPU, the op does not
        raise refuse("MC401", f"scales are on {tensor.device}, the weights on {stored.device}", scales.leaf.node)
    if not _kind(slot):
        raise refuse("MC408", "each input feature of fp8 weights has its scale, and the op takes one per output", node)


def shared(scales: Scales) -> list[int | None]:
    """How many neighbours along ``w0`` and along ``w1`` share a scale; None: all."""
    return [None if axis is None else block for axis, block in zip(scales.axes[1:], scales.blocks, strict=True)]


def kind_of(given: list[int | None]) -> str:
    """``block``, of which one per tensor is a special case, or ``channel``; "" for what the op does not take.

    ``given``: how many neighbours along ``out`` and ``in`` share a scale.
    """
    if all(block in (None, size) for block, size in zip(given, BLOCK, strict=True)):
        return "block"
    return "channel" if given == [1, None] else ""


def _kind(slot: Slot) -> str:
    assert slot.weight.scales is not None
    given = shared(slot.weight.scales)
    return kind_of(given[::-1] if slot.transposed else given)


def _check_device(device: torch.device, node: fx.Node) -> None:
    if not torch.cuda.is_available():
        return  # traced on fake tensors: nothing runs here
    has = torch.cuda.get_device_capability(device)
    if has < CAPABILITY:
        raise refuse("MC504", f"fp8 weights need compute capability 8.9, {device} has {has[0]}.{has[1]}", node)


def from_fp8(node: fx.Node) -> bool:
    """Whether a value is computed from an fp8 tensor."""
    seen: set[fx.Node] = set()
    todo: list[Any] = [node]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if is_fp8(at):
            return True
        todo += tensor_inputs(at)
    return False
