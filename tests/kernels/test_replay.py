"""``replay``: later calls of a kind launch what its first call found, with their own addresses, or nothing else."""

from __future__ import annotations

import ctypes
import gc
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from layers import Layer, quantised, relative_error
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_compile.kernels import config, experts, replay, scaled_experts
from moe_compile.kernels.launch import Launch, Start, noting, once
from moe_compile.kernels.replay import Kernels, Program
from moe_compile.ops import calls, cuda, fp8
from moe_compile.spec import Activation


class Kernel:
    """A Triton function that writes down its launches, and those of what it "compiled"."""

    arg_names = ("x", "n", "W", "B")

    def __init__(self, name: str, log: list[tuple[Any, ...]], compiles: bool = True) -> None:
        self.name, self.log, self.compiles = name, log, compiles
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.log.append(("bound", self.name, grid, args, constants))
            if not self.compiles:
                return None
            self.compiled.append(Compiled(self))
            return self.compiled[-1]

        return launch


class Compiled:
    function, packed_metadata = 11, (1, 2)

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @property
    def run(self) -> Any:
        kernel = self.kernel  # as Triton's, what launches holds nothing of the object it comes from

        def run(x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
            assert (stream, function, metadata) == (STREAM, 11, (1, 2))
            assert rest[:3] == (None, None, None)  # no hook is called
            kernel.log.append(("direct", kernel.name, (x, y, z), rest[3:]))

        return run


STREAM = 77


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "raw_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def call(kernels: Kernels, log: list[tuple[Any, ...]], x: Any, compiles: bool = True, names: str = "ab") -> None:
    start = kernels.call()
    for name in names:
        constants = {"W": 8, "B": name, "num_warps": 4}
        start(lambda n=name, c=constants: Launch(Kernel(n, log, compiles), (3, 2), c), x, 7)
    kernels.done(start)


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
    assert kernels.program() is None  # nobody said what the call was given


def test_what_was_found_stays_loaded() -> None:
    """Triton 3.9 unloads a kernel when its last reference goes, and its own may go before ours."""
    kernels, log = Kernels(), list[tuple[Any, ...]]()
    start = kernels.call()
    kernel = Kernel("a", log)
    start(lambda: Launch(kernel, (1,), {"W": 1, "B": 2}), 0, 0)
    kernels.done(start)
    held = weakref.ref(kernel.compiled[-1])
    kernel.compiled.clear()
    del start
    gc.collect()
    assert held() is not None
    del kernels
    gc.collect()
    assert held() is None


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
    kernels.done(one)
    kernels.done(two)
    log.clear()
    call(kernels, log, 1)
    assert [entry[:2] for entry in log] == [("direct", "a"), ("direct", "b")]


def test_the_interpreter_compiles_nothing() -> None:
    log: list[tuple[Any, ...]] = []
    kernels = Kernels()
    for x in (1, 2):
        call(kernels, log, x, compiles=False)
    assert [(entry[0], entry[3]) for entry in log] == [("bound", (1, 7))] * 2 + [("bound", (2, 7))] * 2
    assert kernels.program() is None


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


# --- programs ---------------------------------------------------------------------------------------


def record(kernels: Kernels, given: Sequence[Tensor | None], *args: Any, results: int = 1, own: int = 0) -> list[Any]:
    """A call with one kernel, which is handed ``args``, ``own`` pieces of memory and ``results`` results."""
    log: list[tuple[Any, ...]] = []
    start = kernels.call()
    first = next(t for t in given if t is not None)
    pieces = [start.empty(first, 5, dtype=torch.int8) for _ in range(own)]
    made = [start.empty(first, 2, 3) for _ in range(results)]
    kernel = Kernel("a", log)
    kernel.arg_names = (*(f"x{i}" for i in range(len(args) + own + results)), "W")  # type: ignore[assignment]
    start(lambda: Launch(kernel, (4,), {"W": 8}), *args, *pieces, *made)
    kernels.done(start, given, made)
    return log


def test_a_program_tells_kernels_the_addresses_of_its_call() -> None:
    x, table, kernels = torch.ones(4), torch.ones(6), Kernels()
    log = record(kernels, (x, None, table), x, 5, None, ((table, 1), (None, 2)), own=2)
    program = kernels.program()
    assert program is not None
    log.clear()
    other, there = torch.ones(4), torch.ones(6)
    (result,) = program((other, None, there))
    assert result.shape == (2, 3) and result.dtype == torch.float32
    ((kind, _, grid, args),) = log
    assert (kind, grid) == ("direct", (4, 1, 1))
    expected = (other.data_ptr(), 5, None, ((there.data_ptr(), 1), (None, 2)))
    assert args[:4] == expected and args[6:] == (result.data_ptr(), 8)
    assert args[5] - args[4] == replay.ALIGNMENT


def test_descriptors_are_of_this_calls_tensors() -> None:
    x, w, kernels = torch.ones(4), torch.ones(2, 4, 16), Kernels()
    log = record(kernels, (x, w), TensorDescriptor(w, [8, 16], [16, 1], [4, 16]))
    program = kernels.program()
    assert program is not None
    made = []
    for other in (torch.ones(2, 4, 16), torch.ones(2, 4, 16)):
        for _ in range(2):
            log.clear()
            program((x, other))
            descriptor = log[0][3][0]
            assert descriptor.base.data_ptr() == other.data_ptr()
            assert (descriptor.shape, descriptor.strides, descriptor.block_shape) == ([8, 16], [16, 1], [4, 16])
            made.append(descriptor)
    assert made[0] is made[1] and made[1] is not made[2]


@pytest.mark.parametrize("why", ["copy", "nested copy", "described copy", "twice", "result", "large"])
def test_without_proof_no_program(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, kernels = torch.ones(4), torch.ones(2, 16), Kernels()
    given: Sequence[Tensor | None] = (x, w)
    arg: Any = w
    if why == "copy":
        arg = w.clone()
    elif why == "nested copy":
        arg = (1, (w.clone(), 2))
    elif why == "described copy":
        arg = TensorDescriptor(w.clone(), [2, 16], [16, 1], [2, 16])
    elif why == "twice":
        given = (x, w, w)
    elif why == "large":
        monkeypatch.setattr(replay, "LARGEST", 2 * replay.ALIGNMENT - 1)
    if why == "result":  # made by somebody else
        start = kernels.call()
        start(lambda: Launch(Kernel("a", []), (1,), {"W": 1, "B": 2}), x, 0)
        kernels.done(start, given, [torch.ones(3)])
    else:
        record(kernels, given, x, arg, own=2)
    assert kernels.program() is None
    assert kernels.ready


@pytest.mark.parametrize(("largest", "held"), [(1 << 20, True), (999, False)])
def test_a_large_call_gives_memory_back_early(largest: int, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large for a program is not held to the end of its first call either."""
    monkeypatch.setattr(replay, "LARGEST", largest)
    log: list[tuple[Any, ...]] = []
    start, x = Kernels().call(), torch.ones(4)
    early = start.empty(x, 500, dtype=torch.int8)
    for _ in range(2):
        start(lambda: Launch(Kernel("a", log), (1,), {"W": 1, "B": 2}), early, 0)
        start.empty(x, 500, dtype=torch.int8)
    gone = weakref.ref(early)
    del early
    log.clear()
    assert (gone() is not None) == held


def test_what_listens_to_launches_hears_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chain:
        def __init__(self, *calls: Any) -> None:
            self.calls = calls

    for name in ("launch_enter_hook", "launch_exit_hook"):
        x, kernels = torch.ones(4), Kernels()
        record(kernels, (x,), x)
        with monkeypatch.context() as patch:
            for hook, heard in ((None, False), (Chain(), False), (print, True)):
                patch.setattr(replay.knobs.runtime, name, hook)
                assert (kernels.program() is None) == heard
                assert (kernels.call() is once) == heard
            patch.setattr(replay.knobs.runtime, name, Chain(print))
            assert kernels.program() is None
        with noting(lambda launch, args: None):
            assert kernels.program() is None
        assert kernels.program() is not None


# --- whole layers: what a program launches runs under the interpreter ---------------------------------


class Interpreted:
    """What the interpreter stands in for: a compiled kernel, which is told numbers instead of tensors."""

    function, packed_metadata = 0, ()

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.kernel, self.args = kernel, args

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        names = self.kernel.arg_names
        args = [like_first(*pair) for pair in zip(rest[5:], self.args, strict=False)]
        constants = dict(zip(names[len(args) :], rest[5 + len(args) :], strict=True))
        self.kernel[(x, y, z)](*args, **constants)


def like_first(now: Any, first: Any) -> Any:
    """The tensor at the address ``now``, of the form that ``first`` has."""
    if isinstance(first, Tensor):
        if isinstance(now, Tensor):  # the long way
            return now
        assert type(now) is int
        size = sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True)) + 1
        raw = (ctypes.c_char * (size * first.element_size())).from_address(now)
        return torch.frombuffer(raw, dtype=first.dtype).as_strided(first.shape, first.stride())
    if isinstance(first, tuple):
        parts = [like_first(*pair) for pair in zip(now, first, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, TensorDescriptor):
        base = like_first(now.base.data_ptr(), first.base)
        return TensorDescriptor(base, now.shape, now.strides, now.block_shape)
    assert now == first
    return now


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> Iterator[list[str]]:
    """``program`` for every call that was one, else its plan's path."""
    seen: list[str] = []

    def settled(kernel: Any) -> Any:
        class Compiles:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Interpreted]:
                def launch(*args: Any, **constants: Any) -> Interpreted:
                    kernel[grid](*args, **constants)
                    return Interpreted(kernel, args)

                return launch

        return Compiles()

    run, follow, scaled = Program.__call__, experts.follow_plan, scaled_experts.follow_scaled
    monkeypatch.setattr(replay, "settled", settled)
    monkeypatch.setattr(Program, "__call__", lambda self, given: seen.append("program") or run(self, given))
    monkeypatch.setattr(experts, "follow_plan", lambda plan, *args: seen.append(plan.path) or follow(plan, *args))
    monkeypatch.setattr(
        scaled_experts, "follow_scaled", lambda plan, *args: seen.append(plan.path) or scaled(plan, *args)
    )
    calls.kernel.cache_clear()
    calls.kind_of.cache_clear()
    yield seen
    calls.kernel.cache_clear()
    calls.kind_of.cache_clear()


FORMS: dict[str, dict[str, Any]] = {
    "concat": {},
    "interleaved": {"layout": "interleaved", "bias": True},
    "separate": {"layout": "separate", "separate": True, "bias": True},
    "on input": {"weight_on_input": True, "activation": Activation("relu", gated=False)},
}


@pytest.mark.parametrize("path", config.PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_layers(form: str, path: str, programs: list[str]) -> None:
    for seed in range(3):
        layer = Layer(9, 5, 2, 16, 24, seed=seed, routing="sentinels", **FORMS[form])
        out = cuda.experts(*layer.op_args(), path=path)  # type: ignore[arg-type]
        assert relative_error(out, layer.truth()) < 2e-6
    assert programs == [path, "program", "program"]


@pytest.mark.parametrize("seed", range(24))
def test_random_layers(seed: int, programs: list[str]) -> None:
    """Other rows, ids, router weights and experts at every call; rows with gaps between them are taken as they lie."""
    draw = random.Random(seed)
    gated = draw.random() < 0.7
    form: dict[str, Any] = {
        "T": draw.choice([1, 2, 5, 40]), "E": draw.choice([1, 3, 9]), "K": draw.choice([1, 2, 4]),
        "H": draw.choice([16, 19, 48]), "I": draw.choice([8, 13, 32]),
        "activation": Activation(draw.choice(["silu", "gelu", "relu2"]), gated),
        "layout": draw.choice(["concat", "interleaved", "separate"]),
        "separate": draw.random() < 0.4, "transposed": draw.random() < 0.3, "bias": draw.random() < 0.5,
        "weight_on_input": draw.random() < 0.3, "routing": draw.choice(["random", "sentinels", "nobody"]),
        "index": draw.choice([torch.int32, torch.int64]),
    }  # fmt: skip
    path = None if form["transposed"] else draw.choice([*config.PATHS, None])
    gaps = draw.random() < 0.5
    for turn in range(3):
        layer = Layer(**form, seed=100 * seed + turn)
        if gaps:
            layer.x = torch.cat([layer.x, layer.x + 1], 1)[:, : layer.H]
        out = cuda.experts(*layer.op_args(), path=path)  # type: ignore[arg-type]
        assert relative_error(out, layer.truth()) < 3e-6
    assert programs[1:] == ["program"] * 2 and programs[0] != "program"


@pytest.mark.parametrize("form", ["concat", "interleaved", "separate"])
def test_layers_by_descriptors(form: str, programs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and rows by descriptor, rows put in order first: of three kinds of memory."""
    tiles = config.Tiles(16, 32, 16, 4, 2, False, tma=True, rows_tma=True)
    monkeypatch.setattr(experts, "plan_of", lambda *args: config.Plan("sorted", tiles, tiles))
    for seed in range(2):
        layer = Layer(40, 5, 2, 16, 32, layout=form, transposed=form == "interleaved", seed=seed)
        out = cuda.experts(*layer.op_args())  # type: ignore[arg-type]
        assert relative_error(out, layer.truth()) < 2e-6
    assert programs == ["sorted", "program"]


@pytest.mark.parametrize("path", config.PATHS)
def test_fp8_layers(path: str, programs: list[str]) -> None:
    outs = []
    for seed in (0, 1, 0):
        layer = Layer(6, 3, 2, 128, 128, seed=seed, routing="sentinels")
        args = fp8_args(layer)
        outs.append(fp8.experts_fp8(*args, kernels="triton", path=path))  # type: ignore[arg-type]
        calls.kind_of.cache_clear() if seed else None
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
    assert programs == [path, "program", path]


def fp8_args(layer: Layer) -> tuple[Any, ...]:
    up, down = quantised(layer)
    a = layer.activation
    return (
        layer.x, layer.weights, layer.ids, up.w.first, up.scale, down.w.first, down.scale, a.name, a.args(), a.gated,
    )  # fmt: skip


def test_rows_that_are_not_dense_go_the_long_way(programs: list[str]) -> None:
    layer = Layer(9, 5, 2, 16, 24)
    layer.x = layer.x.t().contiguous().t()
    for _ in range(3):
        out = cuda.experts(*layer.op_args(), path="sorted")  # type: ignore[arg-type]
        assert relative_error(out, layer.truth()) < 2e-6
    assert programs == ["sorted"] * 3


def test_one_weight_in_two_roles(programs: list[str]) -> None:
    """A later call brings two."""
    layer = Layer(9, 5, 2, 16, 24, layout="separate")
    both, other = layer.w3, layer.w1
    layer.w1 = both
    for w1 in (both, other):
        layer.w1 = w1
        out = cuda.experts(*layer.op_args(), path="sorted")  # type: ignore[arg-type]
        assert relative_error(out, layer.truth()) < 2e-6
    assert programs == ["sorted"] * 2


def test_no_tokens_have_no_program(programs: list[str]) -> None:
    for _ in range(2):
        assert cuda.experts(*Layer(0).op_args()).shape == (0, 19)  # type: ignore[arg-type]
    assert "program" not in programs


def test_routers(programs: list[str]) -> None:
    for seed in range(3):
        logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
        weights, ids = cuda.route(logits, 3, "softmax", True, 0.0, 2.0, torch.float32)
        top = logits.softmax(-1).topk(3)
        assert torch.equal(ids, top.indices)
        assert torch.allclose(weights, 2 * top.values / top.values.sum(-1, keepdim=True))
    assert programs == ["program"] * 2


def test_a_plain_start_gives_plain_memory() -> None:
    x = torch.ones(3, dtype=torch.float64)
    assert Start().empty(x, 2, 5).dtype == torch.float64
    assert Start().empty(x, 2, 5, dtype=torch.int32).shape == (2, 5)
