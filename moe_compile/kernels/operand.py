"""How a kernel sees the weights of all experts: one tensor, or a table of pointers, with any strides.

Shape legend: see ``spec.py``. The one addressing rule is ``base(e) = table[e]`` for separate weights
and ``w + e * stride_e`` for stacked ones; row and column strides follow from there. Gate and up are
addressed independently, which covers fused, separate and transposed storage with the same code.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_TYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
VECTOR_BYTES = 16  # the widest load of one thread; alignment below it makes the compiler split loads


class Address(NamedTuple):
    """What a kernel gets of one role; an absent role is all None and zeros."""

    ptr: Any  # the stacked tensor, or the int64 table
    expert: int  # strides in elements
    out: int
    inp: int


ABSENT = Address(None, 0, 0, 0)


class Operand(NamedTuple):
    """One role (for example "down projection") of all experts.

    Args:
        parts: one stacked tensor ``[E, out, in]`` (bias ``[E, out]``) or E separate ones, alike in
            shape, strides and dtype.
        table: int64 ``[E]`` of data pointers; None exactly when stacked.
        aligned: every pointer of the table starts on a full vector (kernels then load full vectors,
            as far as the strides allow it, which the compiler checks for itself).
    """

    parts: Sequence[Tensor]
    table: Tensor | None = None
    aligned: bool = False

    @property
    def first(self) -> Tensor:
        """The stacked tensor, or the first separate one."""
        return self.parts[0]

    def expert(self, e: int) -> Tensor:
        """``[out, in]`` (bias ``[out]``) of one expert, for the torch twins."""
        return self.first[e] if self.table is None else self.parts[e]

    def address(self) -> Address:
        """Pointer and strides as the kernels take them."""
        strides = self.first.stride()
        if self.table is None:
            ptr, expert, strides = self.first, strides[0], strides[1:]
        else:
            ptr, expert = self.table, 0
        return Address(ptr, expert, strides[0], strides[1] if len(strides) > 1 else 0)

    @property
    def turned(self) -> bool:
        """Whether the weights (not biases) of an expert are dense along ``out`` and not along ``in``."""
        out, inp = self.first.stride()[-2:]
        return out == 1 != inp

    @property
    def stored(self) -> Tensor:
        """``[E, out, in]``, or ``[E, in, out]`` of turned weights, if stacked."""
        return self.first.mT if self.turned else self.first

    @property
    def describable(self) -> bool:
        """Whether a tensor descriptor (TMA) can hold the weights: stacked, dense rows, all of it on vectors.

        The driver also wants every stride to be a multiple of the one below it.
        """
        if self.table is not None:
            return False
        w = self.stored
        expert, row, element = w.stride()
        size = w.element_size()
        even = row * size % VECTOR_BYTES == 0 and w.data_ptr() % VECTOR_BYTES == 0
        return element == 1 and even and row >= w.shape[2] and expert >= row and expert % row == 0

    def element(self) -> Any:
        """Element type behind the table, or None when stacked: a compile-time switch of the kernels."""
        return None if self.table is None else TRITON_TYPE[self.first.dtype]


def make_operand(parts: Sequence[Tensor], dims: int) -> Operand:
    """An operand of ``dims`` dimensions per expert (2 for a matrix, 1 for a bias), its table built anew.

    ``ops.cuda`` has a cached form that never synchronises; this one serves tests and tools.
    """
    if is_stacked(parts, dims):
        return Operand(parts)
    pointers = [p.data_ptr() for p in parts]
    table = torch.tensor(pointers, dtype=torch.int64, device=parts[0].device)
    return Operand(parts, table, all_aligned(pointers))


def is_stacked(parts: Sequence[Tensor], dims: int) -> bool:
    """Whether a role is one tensor with a leading expert dimension."""
    return len(parts) == 1 and parts[0].dim() == dims + 1


def all_aligned(pointers: Sequence[int]) -> bool:
    """Whether every address starts on a full vector."""
    return all(p % VECTOR_BYTES == 0 for p in pointers)


@triton.jit
def expert_base(role, e, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the first element of expert ``e`` of a role (an ``Address``)."""
    if ELEMENT is None:
        base = role.ptr + e.to(tl.int64) * role.expert
    else:
        base = tl.load(role.ptr + e).to(tl.pointer_type(ELEMENT))
        if ALIGNED:
            base = tl.multiple_of(base, 16)
    return base
