"""Calls that are like an earlier one: the same kernels again, without the host code that chose them.

Triton looks at every argument of every launch to find the kernel that it has compiled, and asks the driver about every
tensor; together with what plans, allocates and describes, a small layer's host takes longer than its GPU. All of that
depends on nothing but what makes calls alike (``ops.calls.kind_of``). So the first call of a kind leaves a ``Program``:
its kernels in order, and for every argument whether it is a number, the address of one of the call's tensors, or one
inside a single piece of memory that holds all that the kernels hand on to each other. CUDA graphs do the same for one
set of addresses; a program takes any.

Nothing is guessed: a tensor is known as one of the call's by identity, and as its memory because ``Start.empty``
gave it. If a kernel was handed any other, say a copy that made rows dense, calls of that kind go the long way each
time, as they do while a profiler listens to Triton's launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ..torch_compat import raw_stream
from .launch import Launch, Start, note_of_thread, once, settled
from .tma import is_descriptor

ALIGNMENT = 256  # bytes: as the allocator aligns, hence what the compiler was told of addresses stays true
LARGEST = 1 << 28  # bytes between the kernels: above, memory that is given back early counts more than host time


class Found:
    """A compiled kernel with everything of a launch that alike calls share."""

    __slots__ = ("_compiled", "_function", "_grid", "_metadata", "_run", "constants")

    def __init__(self, compiled: Any, grid: tuple[int, ...], constants: tuple[Any, ...]) -> None:
        self._compiled = compiled  # newer Tritons unload a kernel that nobody holds any more
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata
        self._grid = (*grid, 1, 1)[:3]
        self.constants = constants  # compile-time arguments, which the launcher wants and leaves alone

    def start(self, stream: int, args: Sequence[Any]) -> None:
        """Launch on a stream, as Inductor launches Triton's kernels; no hook is called."""
        self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *args)


class Kernels:
    """What the first of all calls that are alike left to the others.

    Alike: equal in everything that a launch or the compiler depends on, but for the addresses and contents of tensors.
    That is the shapes, strides, dtypes and device of all tensors, and whether each starts on 16 bytes.
    """

    __slots__ = ("_program", "ready")

    def __init__(self) -> None:
        self.ready: tuple[Found, ...] = ()
        self._program: Program | None = None

    def program(self) -> Program | None:
        """What does a whole call, unless somebody wants to see its launches."""
        return None if self._program is None or _watched() else self._program

    def call(self) -> Start:
        """What starts the kernels of one call; ``done`` keeps what it found."""
        return once if _watched() else Call(self.ready)

    def done(self, call: Start, given: Sequence[Tensor | None] = (), results: Sequence[Tensor] = ()) -> None:
        """All kernels of the call were launched.

        Args:
            given: the tensors that alike calls bring along, in an order of the caller's.
            results: what the call returns. Without them there will be no program: not all was done by ``call``.
        """
        if isinstance(call, Call) and not call.ready and call.complete:
            self.ready = tuple(found for found, _ in call.steps)
            self._program = _program(call, given, results) if results else None


class Call(Start):
    """One call: the first of its like launches through Triton and notes what it finds, the others use that."""

    __slots__ = ("_next", "_room", "_stream", "complete", "memory", "ready", "steps")

    def __init__(self, ready: tuple[Found, ...]) -> None:
        self.ready = ready
        self._next = iter(ready)
        self._stream: int | None = None
        self.complete = True  # the interpreter compiles nothing
        self.steps: list[tuple[Found, tuple[Any, ...]]] = []
        self.memory: list[Tensor] = []  # kept to the end of the call, so that no two are one after the other
        self._room = LARGEST

    def __call__(self, make: Callable[[], Launch], *args: Any) -> None:
        """``make`` is asked in the first call only."""
        if self.ready:
            found = next(self._next)
            if self._stream is None:
                self._stream = raw_stream(torch.cuda.current_device())
            found.start(self._stream, (*args, *found.constants))
            return
        kernel, grid, constants = make()
        compiled = settled(kernel)[grid](*args, **constants)
        if compiled is None:
            self.complete = False
            return
        names = kernel.arg_names[len(args) :]
        found = Found(compiled, grid, tuple(constants[name] for name in names))
        self.steps.append((found, args if self._room >= 0 else ()))

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this call."""
        made = super().empty(like, *shape, dtype=dtype)
        if not self.ready and self._room >= 0:
            self.memory.append(made)
            self._room -= made.nbytes
            if self._room < 0:  # there will be no program, so hold on to nothing that the call gives back early
                self.memory.clear()
                self.steps = [(found, ()) for found, _ in self.steps]
        return made


class Program:
    """All kernels of a call, told the addresses of what it brings along.

    Args:
        steps: kernels, each with its arguments, where ``Slot`` stands for an address.
        results: shapes and dtypes.
        offsets: bytes from the start of the memory between the kernels to each piece of it.
        size: bytes of that memory.

    Slots number the call's tensors, then the results, then the pieces.
    """

    __slots__ = ("_offsets", "_results", "_size", "_steps")

    def __init__(
        self,
        steps: Sequence[tuple[Found, tuple[Any, ...]]],
        results: Sequence[tuple[torch.Size, torch.dtype]],
        offsets: Sequence[int],
        size: int,
    ) -> None:
        self._steps = [_Step(found, args) for found, args in steps]
        self._results, self._offsets, self._size = list(results), list(offsets), size

    def __call__(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """Launch everything on the current stream of the current device, where the tensors are."""
        like = given[0]
        assert like is not None
        results = [like.new_empty(shape, dtype=dtype) for shape, dtype in self._results]
        addresses = [0 if t is None else t.data_ptr() for t in given]
        addresses += [t.data_ptr() for t in results]
        if self._size:
            memory = like.new_empty(self._size, dtype=torch.uint8)
            start = memory.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        stream = raw_stream(like.get_device())
        for step in self._steps:
            step.start(stream, addresses)
        return results


class Slot(int):
    """In place of an address: its number."""


class _Step:
    """One launch; the arguments that hold addresses are put in anew."""

    __slots__ = ("_args", "_filled", "_found", "_plain")

    def __init__(self, found: Found, args: tuple[Any, ...]) -> None:
        self._found = found
        self._args = [*args, *found.constants]
        self._plain = [(i, int(v)) for i, v in enumerate(args) if isinstance(v, Slot)]
        self._filled = [(i, v) for i, v in enumerate(args) if isinstance(v, (_Nested, _Described))]

    def start(self, stream: int, addresses: list[int]) -> None:
        args = self._args.copy()
        for i, slot in self._plain:
            args[i] = addresses[slot]
        for i, value in self._filled:
            args[i] = value.at(addresses)
        self._found.start(stream, args)


class _Nested:
    """A tuple with slots somewhere in it."""

    __slots__ = ("_parts",)

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self._parts = parts

    def at(self, addresses: list[int]) -> tuple[Any, ...]:
        return tuple(
            [
                addresses[part] if type(part) is Slot else part.at(addresses) if type(part) is _Nested else part
                for part in self._parts
            ]
        )


class _Base:
    """Something at an address, as far as Triton asks a descriptor's tensor."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _Described:
    """A tensor descriptor whose tensor has a slot."""

    __slots__ = ("_descriptor", "_last", "_slot")

    def __init__(self, descriptor: Any, slot: int) -> None:
        self._descriptor, self._slot = copy(descriptor), slot
        self._descriptor.base = None  # a program holds no tensor
        self._last: tuple[int, Any] = (-1, None)

    def at(self, addresses: list[int]) -> Any:
        address = addresses[self._slot]
        last, made = self._last
        if last != address:
            made = copy(self._descriptor)
            made.base = _Base(address)
            self._last = address, made
        return made


class _Unknown(Exception):
    """A kernel was handed a tensor that is neither the call's nor memory of it."""


def _program(call: Call, given: Sequence[Tensor | None], results: Sequence[Tensor]) -> Program | None:
    """The program of a call that ran, None where one of its tensors is unknown or there is too much between them."""
    mine = {id(t) for t in call.memory}
    returned = {id(t) for t in results}
    between = [t for t in call.memory if id(t) not in returned]
    known = [t for t in (*given, *results, *between) if t is not None]
    # one tensor in two places would be two in another call
    if len({id(t) for t in known}) != len(known) or not returned <= mine:
        return None
    slots = {id(t): Slot(i) for i, t in enumerate((*given, *results, *between)) if t is not None}
    offsets, size = [], 0
    for t in between:
        offsets.append(size)
        size += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
    if size > LARGEST:
        return None
    try:
        steps = [(found, tuple([_slotted(arg, slots) for arg in args])) for found, args in call.steps]
    except _Unknown:
        return None
    return Program(steps, [(t.shape, t.dtype) for t in results], offsets, size)


def _slotted(value: Any, slots: dict[int, Slot]) -> Any:
    """An argument with slots in place of tensors."""
    if isinstance(value, Tensor):
        if id(value) not in slots:
            raise _Unknown
        return slots[id(value)]
    if isinstance(value, tuple):
        parts = tuple([_slotted(part, slots) for part in value])
        return _Nested(parts) if any(isinstance(part, (Slot, _Nested)) for part in parts) else value
    if is_descriptor(value):
        return _Described(value, _slotted(value.base, slots))
    return value


def _watched() -> bool:
    """Whether launches are noted, or a profiler listens to Triton's."""
    runtime = knobs.runtime
    return note_of_thread() is not None or _listens(runtime.launch_enter_hook) or _listens(runtime.launch_exit_hook)


def _listens(hook: Any) -> bool:
    """An empty chain of hooks is none; what is no chain is one."""
    return hook is not None and bool(getattr(hook, "calls", True))
