"""``launch.Kernels``: later calls of a kind launch what its first call found, in the same order, or nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from moe_compile.kernels.launch import Kernels, Launch, noting, once


class Kernel:
    """A Triton function that writes down its launches, and those of what it "compiled"."""

    arg_names = ("x", "n", "W", "B")

    def __init__(self, name: str, log: list[tuple[Any, ...]], compiles: bool = True) -> None:
        self.name, self.log, self.compiles = name, log, compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.log.append(("bound", self.name, grid, args, constants))
            return Compiled(self) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.log.append(("direct", self.kernel.name, grid, args))


def call(kernels: Kernels, log: list[tuple[Any, ...]], x: int, compiles: bool = True, names: str = "ab") -> None:
    start = kernels.call()
    for name in names:
        constants = {"W": 8, "B": name, "num_warps": 4}
        start(lambda n=name, c=constants: Launch(Kernel(n, log, compiles), (3, 2), c), x, 7)
    start.end()


def test_the_second_call_is_direct() -> None:
    log: list[tuple[Any, ...]] = []
    kernels = Kernels()
    call(kernels, log, 1)
    assert [(kind, name, grid, args) for kind, name, grid, args, _ in log] == [
        ("bound", "a", (3, 2), (1, 7)),
        ("bound", "b", (3, 2), (1, 7)),
    ]
    log.clear()
    call(kernels, log, 2)
    # run-time arguments of this call, then the compile-time ones in the order of the signature, no options
    assert log == [("direct", "a", (3, 2, 1), (2, 7, 8, "a")), ("direct", "b", (3, 2, 1), (2, 7, 8, "b"))]


def test_a_call_that_failed_leaves_nothing() -> None:
    log: list[tuple[Any, ...]] = []
    kernels = Kernels()
    start = kernels.call()
    start(lambda: Launch(Kernel("a", log), (1,), {"W": 1, "B": 2}), 0, 0)
    with pytest.raises(RuntimeError, match="no memory"):
        start(fail, 0, 0)
    log.clear()
    call(kernels, log, 1)
    assert [entry[:2] for entry in log] == [("bound", "a"), ("bound", "b")]


def fail() -> Launch:
    raise RuntimeError("no memory")


def test_two_first_calls_at_once() -> None:
    """Both ran to their end before either had published: the later one wins, whole."""
    log: list[tuple[Any, ...]] = []
    kernels = Kernels()
    one, two = kernels.call(), kernels.call()
    for name in "ab":
        for start in (one, two):
            start(lambda n=name: Launch(Kernel(n, log), (1,), {"W": 1, "B": 2}), 0, 0)
    one.end()
    two.end()
    log.clear()
    call(kernels, log, 1)
    assert [entry[:2] for entry in log] == [("direct", "a"), ("direct", "b")]


def test_the_interpreter_compiles_nothing() -> None:
    log: list[tuple[Any, ...]] = []
    kernels = Kernels()
    for x in (1, 2):
        call(kernels, log, x, compiles=False)
    assert [(entry[0], entry[3]) for entry in log] == [("bound", (1, 7))] * 2 + [("bound", (2, 7))] * 2


def test_once() -> None:
    log: list[tuple[Any, ...]] = []
    once(lambda: Launch(Kernel("a", log), (5,), {"W": 1, "B": 2}), 3, 4)
    assert log == [("bound", "a", (5,), (3, 4), {"W": 1, "B": 2})]


def test_noted_launches_are_left_out_and_not_remembered() -> None:
    log: list[tuple[Any, ...]] = []
    noted: list[tuple[Any, ...]] = []
    kernels = Kernels()
    with noting(lambda launch, args: noted.append((launch.kernel.name, args))):
        call(kernels, log, 1)
        once(lambda: Launch(Kernel("c", log), (1,), {"W": 1, "B": 2}), 3, 4)
    assert noted == [("a", (1, 7)), ("b", (1, 7)), ("c", (3, 4))] and not log and not kernels.ready
    call(kernels, log, 2)
    assert [entry[:2] for entry in log] == [("bound", "a"), ("bound", "b")]
    log.clear()
    with noting(lambda launch, args: noted.append((launch.kernel.name, args))):
        call(kernels, log, 3)  # though it knows its kernels
    assert not log and noted[3:] == [("a", (3, 7)), ("b", (3, 7))]
    call(kernels, log, 4)
    assert [entry[:2] for entry in log] == [("direct", "a"), ("direct", "b")]
