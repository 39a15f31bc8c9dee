"""How kernels are launched: as dependents of the one before.

Programmatic dependent launch: the next kernel comes up while the last one ends (CUDA programming guide, 7.x).

Every kernel of this package calls ``follow`` before it touches anything that an earlier kernel wrote, or writes
anything. All programs wait, those without work too: then "the kernel before me has ended" means that all kernels
before it have. What lies before the wait may read only what the kernel before last had finished: that one had
ended before this one could be launched, because every kernel waits before it lets the next one come up.

Instead of launching: inside ``noting`` every launch is handed to a function and left out (``ahead``, for warm-up).
What such calls return is memory that nobody wrote.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CAPABILITY = 9  # the first major version of devices that have it
# multiply and add in one instruction, as all figures were measured: Triton will not do so unasked from 3.10 on
PLAIN: dict[str, Any] = {"PDL": False, "enable_fp_fusion": True}
DEPENDENT: dict[str, Any] = {"PDL": True, "launch_pdl": True, "enable_fp_fusion": True}


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait for everything that was launched before, then let the next kernel come up."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def dependent(tensor: Tensor) -> dict[str, Any]:
    """The launch arguments for kernels on the device of ``tensor``."""
    return _of_device(tensor.get_device()) if tensor.is_cuda else PLAIN


@lru_cache(maxsize=64)
def _of_device(index: int) -> dict[str, Any]:
    ours = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= CAPABILITY
    return DEPENDENT if ours else PLAIN


class Launch(NamedTuple):
    """A kernel with its grid, its compile-time arguments and its options (``num_warps`` and the like)."""

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]


Note = Callable[[Launch, tuple[Any, ...]], None]  # takes a launch and its run-time arguments
_note: ContextVar[Note | None] = ContextVar("moe_compile_note", default=None)


@contextmanager
def noting(note: Note) -> Iterator[None]:
    """Launch nothing in this thread inside the ``with`` block, and call ``note`` for every launch left out."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


def note_of_thread() -> Note | None:
    """What takes the place of launches now, if anything."""
    return _note.get()


_settled: set[int] = set()


def settled(kernel: Any) -> Any:
    """The kernel, once Triton has hashed the functions that it calls, inner ones first.

    Triton 3.6 (3.9 no more) leaves out of a kernel's key the constants of functions that it hashes for the first time
    with that kernel. Keys would depend on what a process launches first, and the disk cache would miss.
    """
    if id(kernel) not in _settled and isinstance(kernel, JITFunction):
        _settled.add(id(kernel))
        for name in sorted(set(re.findall(r"\w+", kernel.src))):
            inner = kernel.__globals__.get(name)
            if isinstance(inner, JITFunction):
                settled(inner)
        _ = kernel.cache_key
    return kernel


class Start:
    """What starts the kernels of one call in a row and gives them memory: as Triton and torch do it."""

    def __call__(self, make: Callable[[], Launch], *args: Any) -> None:
        """Launch ``make()`` with run-time arguments ``args``."""
        launch, note = make(), _note.get()
        if note is not None:
            note(launch, args)
            return
        settled(launch.kernel)[launch.grid](*args, **launch.constants)

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory that a kernel of this call fills, on the device of ``like``."""
        return like.new_empty(shape, dtype=dtype)


once = Start()
