"""Warm-up without a GPU: which numbers of tokens it looks at, which layers it finds, real compilations, errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_compile
from moe_compile import cli, router_pass, warming
from moe_compile.deepgemm import experts as deepgemm_experts
from moe_compile.demo import DenseLoop
from moe_compile.kernels import ahead, launch, workers
from moe_compile.warming import Failure, WarmUp, WarmUpError, progress, warm_layers, warmup
from moe_compile.warming.calls import Layer, inputs_of, layer_of, layers_of_size, recorded
from moe_compile.warming.tokens import grid, regimes

SCRIPT = Path(__file__).with_name("warm_sm90.py")


# --- real compilations ------------------------------------------------------------------------------


def start(mode: str, cache: Path, places: Path | None = None) -> subprocess.Popen[str]:
    root = str(Path(moe_compile.__file__).parents[1])
    path = os.pathsep.join([root, *([str(places)] if places else [])])
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCRIPT), mode],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


@pytest.mark.slow
def test_two_kernels_by_two_workers_then_none(tmp_path: Path) -> None:
    """Two processes warm up at once: each kernel is compiled by one of them. A third finds both."""
    both = [start("two", tmp_path), start("two", tmp_path)]
    told = [end(process) for process in both]
    for one in told:
        assert one["launches"] == 6 and one["needed"] == ["combine_kernel", "invert_kernel"]
        assert not one["errors"]
        assert one["hits"] == [True, True]  # a real launch looks for the very same key
        assert all(one["in memory"])
    assert sum(one["compiled"] for one in told) == 2
    again = end(start("two", tmp_path))
    assert (again["missing"], again["compiled"], again["hits"]) == (0, 0, [True, True])


@pytest.mark.slow
def test_one_bad_kernel_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "warm_dies.py").write_text("import os, sys\nprint('no memory', file=sys.stderr)\nos._exit(3)\n")
    told = end(start("broken", tmp_path / "cache", tmp_path))
    assert told["compiled"] == 2 and told["hits"] == [True, True]
    refused, died = sorted(told["errors"], key=lambda text: "process" in text)
    assert "has no attribute" in refused
    assert "ended with code 3" in died and "no memory" in died


@pytest.mark.slow
def test_an_interrupt_leaves_the_cache_sound(tmp_path: Path) -> None:
    told = end(start("interrupt", tmp_path))
    assert told["interrupted"] and told["compiled"] == 1
    again = end(start("two", tmp_path))
    assert again["missing"] in (0, 1) and not again["errors"] and again["hits"] == [True, True]


# --- numbers of tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("highest", [1, 2, 63, 64, 65, 1000, 16384])
def test_grid(highest: int) -> None:
    numbers = grid(highest)
    assert numbers == sorted(set(numbers)) and numbers[0] == 1 and numbers[-1] == highest
    assert set(range(1, min(64, highest) + 1)) <= set(numbers)
    assert len(numbers) < 300
    beyond = [n for n in numbers if n > 64]
    if highest > 100:  # sizes that Triton tells apart
        assert any(n % 16 for n in beyond) and any(n % 16 == 0 for n in beyond)


def test_every_border_is_found() -> None:
    """Also a regime much narrower than the grid, between two others."""
    borders = (3, 65, 501, 513, 1024, 4099, 9001)
    asked: list[int] = []

    def kind(number: int) -> int:
        asked.append(number)
        return sum(number >= border for border in borders)

    found = regimes(kind, 16384)
    assert set(found.values()) == set(range(8))
    for border in borders:
        assert border in found and border - 1 in found
    assert len(asked) == len(set(asked)) < 400


def test_a_plan_between_two_equal_ones_is_found() -> None:
    """As a measured table makes it: a range of a third around one number."""
    assert 7 in regimes(lambda n: 7 if 2300 <= n <= 2900 else 1, 16384).values()


# --- layers of a model ------------------------------------------------------------------------------


def test_layers_of_a_naive_model() -> None:
    block = nn.Sequential(DenseLoop(4, 2, 16, 24), DenseLoop(4, 2, 16, 24), DenseLoop(3, 1, 16, 24)).eval()
    found = recorded(block, (torch.randn(6, 16),), {})
    assert sorted((str(layer), count) for layer, count in found.items()) == [
        ("experts E=3 K=1 H=16 I=24 float32 silu", 1),
        ("experts E=4 K=2 H=16 I=24 float32 silu", 2),
    ]
    for layer in found:
        layer.call(1)
        layer.call(9)


def test_the_fused_router_is_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_pass, "DEVICES", ("cpu",))
    found = recorded(DenseLoop(4, 2, 16, 24).eval(), (torch.randn(6, 16),), {})
    assert sorted(map(str, found)) == ["experts E=4 K=2 H=16 I=24 float32 silu", "route [4] float32"]


def test_hugging_face_models_need_no_inputs() -> None:
    from hf_models import build

    model = build("mixtral").to(torch.bfloat16)
    moe_compile.optimize(model)
    weights = {t.data_ptr() for t in model.parameters()}
    (layer,), counts = (found := recorded(model, *inputs_of(model, (), {}))), list(found.values())
    assert counts == [2] and str(layer) == "experts E=4 K=2 H=32 I=48 bfloat16 silu"
    assert layer.args[1].dtype == torch.float32  # what this router gives, which no flag says
    assert {layer.args[3][0].data_ptr(), layer.args[5][0].data_ptr()} <= weights  # its own weights, no copy
    moe_compile.restore(model)
    assert recorded(model, *inputs_of(model, (), {})) == found


def test_recording_runs_none_of_our_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_models import build

    model = moe_compile.optimize(build("mixtral"))

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it ran")

    monkeypatch.setattr("moe_compile.ops.cpu.check_experts", never)
    with torch.no_grad(), pytest.raises(AssertionError, match="it ran"):
        model(**model.dummy_inputs)
    assert recorded(model, (), dict(model.dummy_inputs))


def test_rows_keep_what_kernels_depend_on() -> None:
    wide = torch.zeros(6, 40)[:, :16]
    ids, weights = torch.zeros(6, 2, dtype=torch.int32), torch.zeros(6, 2, dtype=torch.bfloat16)
    w1, w2 = torch.zeros(4, 48, 16), torch.zeros(4, 16, 24)
    rest = ([w1], [], [w2], [], [], [], "silu", [1.0], True)
    layer = layer_of("experts", (wide, weights, ids, *rest), {}, 6)
    x, tw, ti = (form.make(5, torch.device("cpu")) for form in layer.args[:3])
    assert (x.shape, x.stride()) == ((5, 16), (40, 1))
    assert (tw.dtype, ti.dtype, ti.shape) == (torch.bfloat16, torch.int32, (5, 2))
    assert layer == layer_of("experts", (wide[:3], weights[:3], ids[:3], *rest), {}, 3)  # whatever the tokens
    for other in (
        (wide.contiguous(), weights, ids, *rest),
        (wide, weights.float(), ids, *rest),
        (wide, weights, ids.long(), *rest),
        (wide, weights, ids, [torch.zeros(4, 16, 48).mT], *rest[1:]),
        (wide, weights, ids, *rest[:6], "gelu", *rest[7:]),
    ):
        assert layer != layer_of("experts", other, {}, 6)


def test_rows_by_pairs() -> None:
    offsets, w = torch.zeros(5, dtype=torch.int32), torch.zeros(4, 24, 16)
    layer = layer_of("grouped_linear", (torch.zeros(12, 16), [w], [], offsets), {}, 6)
    assert layer.args[0].make(10, torch.device("cpu")).shape == (20, 16)
    assert layer.args[3].make(10, torch.device("cpu")).shape == (5,)


@pytest.mark.parametrize("fp8", [False, True])
def test_layers_without_a_model(fp8: bool) -> None:
    layers = layers_of_size((4, 2, 128, 256), torch.bfloat16, fp8, "silu", torch.device("cpu"))
    assert [layer.args[1].dtype for layer in layers] == [torch.float32, torch.bfloat16]
    name = "experts_fp8 E=4 K=2 H=128 I=256 float8_e4m3fn silu" if fp8 else "experts E=4 K=2 H=128 I=256 bfloat16 silu"
    assert {str(layer) for layer in layers} == {name}
    for layer in layers:
        layer.call(3)


# --- the whole, with kernels that only write down -------------------------------------------------


class FakeKernel:
    """Its own key; a launch is written down."""

    arg_names = ("x",)

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.__name__, self.log = name, log

    def __getitem__(self, grid: Any) -> Any:
        return lambda tokens: self.log.append((self.__name__, tokens))


def fake_layer(kernels: dict[int, list[str]], log: list[tuple[str, int]]) -> Layer:
    """``kernels``: from which number of tokens on which kernels run."""

    class Fake(Layer):
        def call(self, tokens: int) -> None:
            for name in kernels[max(n for n in kernels if n <= tokens)]:
                if name == "oom":
                    raise torch.OutOfMemoryError("no memory")
                launch.once(lambda n=name: launch.Launch(FakeKernel(n, log), (1,), {}), tokens)

        def __str__(self) -> str:
            return f"layer {sorted(kernels)}"

    return Fake("experts", (), {}, torch.device("cpu"), (str(kernels),))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU whose compilers only write down."""
    state: dict[str, Any] = {"cached": set(), "broken": {}, "jobs": [], "workers": None}

    def needed(each: launch.Launch, args: tuple[Any, ...]) -> ahead.Needed:
        name = each.kernel.__name__
        source = ahead.Source("m", name, {}, {}, {}, {}, ("cuda", 90, 32), {})
        return ahead.Needed(f"key {name}", name, source)

    def compile_all(jobs: list[workers.Job], count: int, step: Any) -> None:
        state["jobs"] += sorted(job.source.function for job in jobs)
        state["workers"] = count
        for job in jobs:
            error = state["broken"].get(job.source.function, "")
            if not error:
                state["cached"].add(job.key)
            step(workers.Answer(job, not error, error))

    monkeypatch.setattr(ahead, "needed", needed)
    monkeypatch.setattr(ahead, "is_cached", lambda key, function: key in state["cached"])
    monkeypatch.setattr(workers, "compile_all", compile_all)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return state


def test_distinct_kernels_are_compiled_once_and_each_runs(machine: dict[str, Any]) -> None:
    log: list[tuple[str, int]] = []
    one = fake_layer({1: ["a", "b"], 40: ["a", "c"], 700: ["d"]}, log)
    two = fake_layer({1: ["a"], 333: ["e", "d"]}, log)
    machine["cached"].add("key e")
    result = warm_layers({one: 3, two: 1}, 1000, 7, False)
    assert machine["jobs"] == ["a", "b", "c", "d"] and machine["workers"] == 7
    # every kernel at the fewest tokens that need it, and no run without a new one
    assert log == [("a", 1), ("b", 1), ("a", 40), ("c", 40), ("e", 333), ("d", 333)]
    assert (result.layers, result.calls, result.kernels, result.compiled, result.there) == (2, 4, 5, 4, 1)
    text = "2 distinct layers of 4: 5 kernels, 4 compiled, 1 already there; "
    assert str(result).startswith(text) and not result.failures
    log.clear()
    machine["jobs"].clear()
    again = warm_layers({one: 3, two: 1}, 1000, None, False)
    assert (again.compiled, again.there, machine["jobs"]) == (0, 5, [])
    assert {name for name, _ in log} == set("abcde")  # another process would have to load them


def test_no_workers_compile_nothing_elsewhere(machine: dict[str, Any]) -> None:
    log: list[tuple[str, int]] = []
    warm_layers({fake_layer({1: ["a"], 5: ["b"]}, log): 1}, 10, 0, False)
    assert machine["jobs"] == [] and log == [("a", 1), ("b", 5)]


def test_failures_are_named_and_the_rest_is_done(machine: dict[str, Any]) -> None:
    log: list[tuple[str, int]] = []
    layers = {fake_layer({1: ["a"], 20: ["b", "c"], 50: ["c"]}, log): 1, fake_layer({1: ["d"], 9: ["oom"]}, log): 1}
    machine["broken"]["b"] = "PTXASError: no registers"
    with pytest.raises(WarmUpError) as caught:
        warm_layers(layers, 100, 2, False)
    error = caught.value
    assert error.code == "MC512" and error.result is not None
    whys = {failure.kernel: (failure.layer, failure.tokens, failure.reason) for failure in error.result.failures}
    assert whys["b"] == ("layer [1, 20, 50]", 20, "PTXASError: no registers")
    assert whys["the layer"][:2] == ("layer [1, 9]", 100) and "smaller max_tokens" in whys["the layer"][2]
    assert "(and 1 more); the rest is done" in str(error) and str(error).startswith("MC512: ")
    # a case with a broken kernel does not run: the compiler could take this process with it
    assert log == [("a", 1), ("c", 50)]


def test_what_does_not_run_is_a_failure(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    layer = fake_layer({1: ["a"], 3: ["b"]}, log)

    def run(kernel: FakeKernel, grid: Any) -> Any:
        if kernel.__name__ == "a":
            raise RuntimeError("first line\nan illegal address")
        return lambda tokens: log.append((kernel.__name__, tokens))

    monkeypatch.setattr(FakeKernel, "__getitem__", run)
    with pytest.raises(WarmUpError, match=r"a of layer .* at T=1: RuntimeError: an illegal address"):
        warm_layers({layer: 1}, 4, 1, False)
    assert log == [("b", 3)]


@pytest.mark.parametrize("change", [{"max_tokens": 0}, {"workers": -1}])
def test_bad_numbers(machine: dict[str, Any], change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}={next(iter(change.values()))}"):
        warm_layers({}, **{"max_tokens": 4, "workers": 1, **change}, progress=False)


# --- DeepGEMM ---------------------------------------------------------------------------------------


class FakeProvider:
    alignments = (64, 128)

    def __init__(self) -> None:
        self.ran: list[tuple[int, int, int]] = []
        self.rows = 0

    def alignment(self, rows: int) -> Any:
        from contextlib import nullcontext

        self.rows = rows
        return nullcontext()

    def grouped_fp8(self, a: Any, a_scale: Any, b: Any, b_scale: Any, out: Any, layout: Any) -> None:
        assert a.shape[0] == out.shape[0] == layout.shape[0] and a.shape[1] == b.shape[2]
        assert layout.tolist() == [0] * self.rows + [-1] * (len(layout) - self.rows)
        self.ran.append((self.rows, a.shape[0], b.shape[2]))


def test_deepgemm_runs_for_every_number_of_rows(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from moe_compile.kernels.operand import Operand
    from moe_compile.kernels.tile import Projection
    from moe_compile.quantize import FP8

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(deepgemm_experts, "_ran", set())
    provider = FakeProvider()
    up, down = (
        Projection(Operand([torch.zeros(4, n, k).to(FP8)]), n, scale=torch.zeros(4, n // 128, k // 128))
        for n, k in ((512, 128), (128, 256))
    )
    real = layers_of_size((4, 2, 128, 256), torch.bfloat16, True, "silu", torch.device("cpu"))

    class Fake(Layer):
        def call(self, tokens: int) -> None:
            if tokens >= 100:  # as ``follow_deepgemm`` does it
                align, rows = deepgemm_experts.blocks(provider, tokens, 2, 4)  # type: ignore[arg-type]
                for projection in (up, down):
                    a = torch.zeros(rows, projection.depth)
                    deepgemm_experts._multiply(provider, align, a, a, projection, a, a)  # type: ignore[arg-type]

    layer = Fake(**next(iter(real)).__dict__)
    assert not deepgemm_experts.has_run(provider, torch.zeros(300, 2), up, down)  # type: ignore[arg-type]
    result = warm_layers({layer: 1}, 300, 1, False)
    # all sizes of 100 to 300 tokens: blocks of 64 rows, then of 128
    sizes = {deepgemm_experts.blocks(provider, t, 2, 4) for t in range(100, 301)}  # type: ignore[arg-type]
    assert {(align, rows) for align, rows, _ in provider.ran} == sizes and len(sizes) == 4
    assert len(provider.ran) == result.gemms == 2 * len(sizes)
    for tokens in (100, 217, 300):  # any of them may be captured now, whatever was called before
        assert deepgemm_experts.has_run(provider, torch.zeros(tokens, 2), up, down)  # type: ignore[arg-type]
    assert not deepgemm_experts.has_run(provider, torch.zeros(900, 2), up, down)  # type: ignore[arg-type]
    assert warm_layers({layer: 1}, 300, 1, False).gemms == 0


# --- what users see ---------------------------------------------------------------------------------


def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WarmUpError, match="no CUDA device") as caught:
        warmup(DenseLoop(4, 2, 16, 24), torch.randn(6, 16))
    assert caught.value.code == "MC504" and caught.value.result is None


@pytest.mark.parametrize(
    ("model", "inputs", "code", "message"),
    [
        (DenseLoop(4, 2, 16, 24).eval(), (), "MC513", "pass inputs"),
        (nn.Linear(4, 4), (torch.ones(2, 4),), "MC513", "explain"),
        (DenseLoop(4, 2, 16, 24).eval(), (torch.ones(6, 16),), "MC504", "on cpu: move the model"),
    ],
)
def test_nothing_to_warm_up(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: tuple[Any, ...], code: str, message: str
) -> None:
    monkeypatch.setattr(warming, "require_cuda", lambda: None)
    with pytest.raises(WarmUpError, match=message) as caught:
        warmup(model, *inputs)
    assert caught.value.code == code


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for stream, wanted, text in (
        (Terminal(), True, "\r0/2 kernels\r1/2 kernels\r2/2 kernels\n"),
        (Terminal(), False, ""),
        (io.StringIO(), True, ""),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.Progress(2, "kernels", wanted) as bar:
            bar.step()
            bar.step()
        assert stream.getvalue() == text


def test_results_as_text() -> None:
    failure = Failure("grouped_kernel", "experts E=8", 512, "PTXASError: no")
    result = WarmUp(1, 48, 40, 38, 1, 12, 3.21, (failure,))
    assert str(result) == (
        "1 distinct layer of 48: 40 kernels, 38 compiled, 1 already there, 12 DeepGEMM sizes run, 1 failed; 3.2 s"
    )
    assert str(failure) == "grouped_kernel of experts E=8 at T=512: PTXASError: no"


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "some_model.py"
    path.write_text("def make():\n    return str, (1,), {'x': 2}\n")
    asked: list[Any] = []
    good = WarmUp(1, 2, 3, 3, 0, 0, 0.5)
    failed = WarmUp(1, 2, 3, 2, 0, 0, 0.5, (Failure("k", "l", 7, "no"),))

    def fake(model: Any, *args: Any, **options: Any) -> WarmUp:
        asked.append((model, args, options))
        if options["workers"] == 0:
            raise WarmUpError("MC512", "k failed", failed)
        return good

    monkeypatch.setattr(warming, "require_cuda", lambda: None)
    monkeypatch.setattr(warming, "warmup", fake)
    assert cli.main(["warmup", f"{path}:make", "--max-tokens", "99", "--workers", "3"]) == 0
    assert asked == [(str, (1,), {"max_tokens": 99, "workers": 3, "x": 2})]
    assert capsys.readouterr().out == f"{good}\n"
    assert cli.main(["warmup", f"{path}:make", "--json", "--workers", "0"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["failures"] == [{"kernel": "k", "layer": "l", "tokens": 7, "reason": "no"}]
    assert "MC512: k failed" in err


def test_command_line_for_a_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_compile.warming import calls

    asked: list[Any] = []
    monkeypatch.setattr(warming, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(calls, "layers_of_size", lambda *args: asked.append(args) or {})
    monkeypatch.setattr(warming, "warm_layers", lambda *args: asked.append(args) or WarmUp(2, 2, 3, 3, 0, 0, 0.5))
    assert cli.main(["warmup", "--layer", "8,2,64,128", "--dtype", "float16", "--fp8", "--max-tokens", "7"]) == 0
    assert asked[0] == ((8, 2, 64, 128), torch.float16, True, "silu", torch.device("cuda", 0))
    assert asked[1] == ({}, 7, None, True)
    assert "3 compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "path.py:function, or --layer"),
        (["a.py:make", "--layer", "8,2,64,128"], "path.py:function, or --layer"),
        (["--layer", "8,2,64,128", "--activation", "selu"], "'selu' is not one of"),
        (["--layer", "8,2,64,128"], "no CUDA device"),
        (["missing.py:make"], "no CUDA device"),
    ],
)
def test_wrong_command_lines(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["warmup", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--workers", "-1"], ["--max-tokens", "0"], ["--layer", "8,2"]])
def test_wrong_numbers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["warmup", *arguments])
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err
