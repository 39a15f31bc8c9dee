"""What the CUDA ops share: how calls are told apart, operands, devices, and Triton's late import.

A call that is like an earlier one in all that is checked, planned and compiled (``kind_of``) was checked and planned
by that one. Shape legend: see ``spec.py``.
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
from .tables import pointer_table

if TYPE_CHECKING:
    from ..kernels.activation import Epilogue
    from ..kernels.config import Plan
    from ..kernels.operand import Operand
    from ..kernels.replay import Kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Roles = tuple[tuple[Sequence[Tensor], tuple[int, ...]], ...]


class Kind:
    """Calls alike in all that is checked and planned, and whether one of them was checked."""

    __slots__ = ("_kernels", "checked", "choice", "experts", "part", "plan", "warm")

    def __init__(self) -> None:
        self.checked = False
        self.experts = 0
        self.part = 0  # tokens that are computed at a time, if not all
        self.plan: Plan | None = None
        self.choice: Any = None  # of fp8
        self.warm = False
        self._kernels: dict[tuple[bool, ...], Kernels] = {}

    def kernels(self, *aligned: bool) -> Kernels:
        """Those compiled for the alignment of the addresses in the pointer tables."""
        found = self._kernels.get(aligned)
        if found is None:
            found = self._kernels[aligned] = kernel("replay", "Kernels")()
        return found


@lru_cache(maxsize=4096)
def kind_of(*key: Any) -> Kind:
    """The kind of a call; the key has everything that checks, plans and the compiler look at."""
    return Kind()


def traits(t: Tensor) -> tuple[Any, ...]:
    """What of a tensor a check, a plan or the compiler can depend on."""
    return t.dtype, t.shape, t.stride(), t.data_ptr() % 16, t.get_device()


def role_traits(parts: Sequence[Tensor]) -> tuple[Any, ...]:
    """Of separate weights the first, without its address: the kernels read a table, which lies on 16 bytes."""
    if not parts:
        return ()
    first = parts[0]
    if len(parts) == 1:
        return traits(first)
    return len(parts), first.dtype, first.shape, first.stride(), first.get_device()


def fit(count: int, dtype: torch.dtype, roles: Roles) -> bool:
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


# What kernels find a role at, and whether that is a table of addresses which all lie on 16 bytes.
Place = tuple[Tensor | None, bool]


def place(role: str, parts: Sequence[Tensor], dims: int) -> Place:
    """A role that fits: the stacked tensor, or the table of the separate ones; None where it is absent."""
    if not parts:
        return None, False
    return (parts[0], False) if parts[0].dim() == dims + 1 else pointer_table(parts, role)


def operand(parts: Sequence[Tensor], found: Place) -> Operand | None:
    """A role as the kernels take it, where ``place`` found it."""
    if not parts:
        return None
    table, aligned = found
    make: Callable[..., Operand] = kernel("operand", "Operand")
    return make(parts) if table is parts[0] else make(parts, table, aligned)


def check_device(like: Tensor, **others: Tensor) -> None:
    """Activations of a dtype that the kernels know, and everything on one device."""
    if like.dtype not in DTYPES:
        raise TypeError(f"activations are {like.dtype}; on CUDA pass float32, bfloat16 or float16")
    for name, tensor in others.items():
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, the activations are on {like.device}; move one of them")


def table_of(x: Tensor) -> Any:
    """The plans that were measured on this kind of GPU, if any."""
    return kernel("tuned", "load")(kernel("experts", "table_of")(tuned_folder(), x.get_device()))


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@lru_cache(maxsize=256)
def epilogue(name: str, args: tuple[float, ...], layout: str) -> Epilogue:
    """The activation as the kernels take it, one object for all calls of a layer."""
    made: Epilogue = kernel("activation", "Epilogue")(name, args, layout)
    return made


@lru_cache(maxsize=64)
def kernel(module: str, name: str) -> Any:
    """``moe_compile.kernels.<module>.<name>``, imported at the first call."""
    try:
        return getattr(import_module(f"moe_compile.kernels.{module}"), name)
    except ImportError as error:
        raise RuntimeError(
            f"moe_compile: the CUDA ops need Triton 3.6 or newer, which cannot be imported ({error}); "
            "pip install triton"
        ) from error
