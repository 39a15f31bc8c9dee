"""How kernels are launched: as dependents of the one before, and the second time without Triton's binding.

Programmatic dependent launch: the next kernel comes up while the last one ends (CUDA programming guide, 7.x).

Every kernel of this package calls ``follow`` before it touches anything that an earlier kernel wrote, or writes
anything. All programs wait, those without work too: then "the kernel before me has ended" means that all kernels
before it have. What lies before the wait may read only what the kernel before last had finished: that one had
ended before this one could be launched, because every kernel waits before it lets the next one come up.

Binding: Triton looks at every argument of every launch to find the kernel that it has compiled, which takes longer
than a small layer. ``Kernels`` keeps what it found for all calls that are alike.

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
DEPENDENT: dict[str, Any] = {"PDL": True, "launch_pdl": True}
PLAIN: dict[str, Any] = {"PDL": False}


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


Start = Callable[..., None]  # ``start(make, *args)`` launches ``make()`` with run-time arguments ``args``


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


def once(make: Callable[[], Launch], *args: Any) -> None:
    """Launch, as Triton does it."""
    launch, note = make(), _note.get()
    if note is not None:
        note(launch, args)
        return
    settled(launch.kernel)[launch.grid](*args, **launch.constants)


class Kernels:
    """The compiled kernels of calls that are alike, in the order of their launches.

    Alike: equal in everything that a launch or the compiler depends on, but for the addresses and contents of tensors.
    That is the shapes, strides, dtypes and device of all tensors, and whether each starts on 16 bytes.
    """

    __slots__ = ("ready",)

    def __init__(self) -> None:
        self.ready: tuple[tuple[Any, tuple[Any, ...]], ...] = ()

    def call(self) -> Call:
        """What starts the kernels of one call."""
        return Call(self) if _note.get() is None else NotedCall(self)


class Call:
    """A ``Start`` for one call: the first of its like launches through Triton and keeps the kernels it finds."""

    __slots__ = ("_found", "_kernels", "_ready")

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._ready = iter(kernels.ready) if kernels.ready else None
        self._found: list[tuple[Any, tuple[Any, ...]]] = []

    def __call__(self, make: Callable[[], Launch], *args: Any) -> None:
        """``make`` is asked in the first call only."""
        if self._ready is not None:
            run, rest = next(self._ready)
            run(*args, *rest)
            return
        kernel, grid, constants = make()
        compiled = settled(kernel)[grid](*args, **constants)
        if compiled is not None:  # the interpreter compiles nothing
            names = kernel.arg_names[len(args) :]
            self._found.append((compiled[(*grid, 1, 1)[:3]], tuple(constants[name] for name in names)))

    def end(self) -> None:
        """All kernels of the call were launched: later calls may use what this one found."""
        if self._ready is None:
            self._kernels.ready = tuple(self._found)


class NotedCall(Call):
    """A call that launches nothing, hence finds no kernels that later calls could use."""

    __slots__ = ()

    def __call__(self, make: Callable[[], Launch], *args: Any) -> None:
        once(make, *args)

    def end(self) -> None:
        """Nothing is kept."""
