"""The search for plans, with a clock of the test's own. The interpreter runs plans where a test is about results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compile import cli, tuning
from moe_compile.kernels import config, experts, tuned
from moe_compile.kernels.config import Plan
from moe_compile.tuning import Problem, tune

LAYER = tuned.Layer(4, 2, 32, 16, "float32", "concat", "stacked")  # the interpreter's half precision is unsound
CPU = torch.device("cpu")


def problem(tokens: int, **changes: Any) -> Problem:
    return Problem(LAYER._replace(**changes), tokens, "silu", CPU, config.H200)


class Clock:
    """Says how long a plan takes by looking at the plan that just "ran"; the result is the twin's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, price: Callable[[Plan], float]) -> None:
        self.price, self.ran = price, []  # type: ignore[var-annotated]
        monkeypatch.setattr(Problem, "run", lambda problem, plan: self.run(plan))

    def run(self, plan: Plan) -> torch.Tensor:
        self.ran.append(plan)
        return TRUTH.clone()

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        return self.price(self.ran[-1])


TRUE = Problem.truth
TRUTH = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fixed_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "truth", lambda self: TRUTH)


def test_climbs_to_the_fastest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda plan: 100.0 + abs(plan.up.stages - 3) + 5 * abs(plan.down.group - 16))
    p = problem(300)
    first = p.standard()
    assert first.path == "sorted" and first.down.group == 8
    result = tune(p, 200, clock)
    assert result.entry is not None
    assert (result.entry.plan.up.stages, result.entry.plan.down.group) == (3, 16)
    assert result.entry.us == 100.0
    assert result.default_us == clock.price(first)
    assert result.failed == 0
    assert "us, path sorted" in str(result)


def test_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    result = tune(problem(40), 5, Clock(monkeypatch, lambda plan: 1.0), lambda n, text: steps.append(n))
    assert result.tried == 5
    assert steps == [1, 2, 3, 4, 5]
    assert result.entry is None
    assert "the standard plan stays" in str(result)


def test_another_path_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(40)
    assert [plan.path for plan in p.starts()] == ["decode", "sorted"]
    result = tune(p, 1, Clock(monkeypatch, lambda plan: 1.0 if plan.path == "sorted" else 2.0))
    assert result.entry is not None and result.entry.plan.path == "sorted"
    assert [plan.path for plan in problem(1).starts()] == ["gemv", "decode"]
    assert [plan.path for plan in problem(2).starts()] == ["decode", "gemv"]
    assert [plan.path for plan in problem(2, storage="transposed").starts()] == ["decode"]
    assert [plan.path for plan in problem(1000).starts()] == ["sorted"]


def test_a_small_gain_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda plan: 99.0 if plan.up.group == 16 else 100.0)
    assert tune(problem(300), 60, clock).entry is None


@pytest.mark.parametrize("what", ["wrong", "nan", "raises"])
def test_an_unfit_plan_is_never_kept(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    clock = Clock(monkeypatch, lambda plan: 1.0 if plan.up.group == 16 else 100.0)

    def spoiled(plan: Plan) -> torch.Tensor:
        out = clock.run(plan)
        if plan.up.group != 16:
            return out
        if what == "raises":
            raise RuntimeError("out of resource: shared memory")
        return out * (1.01 if what == "wrong" else math.nan)

    monkeypatch.setattr(Problem, "run", lambda self, plan: spoiled(plan))
    result = tune(problem(300), 60, clock)
    assert result.entry is None
    assert result.failed == 1


def test_a_standard_plan_that_gives_nan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "run", lambda self, plan: TRUTH * math.nan)
    with pytest.raises(RuntimeError, match="gives NaN"):
        tune(problem(20), 3, lambda call: 1.0)


@pytest.mark.parametrize("layout", ["single", "concat", "interleaved", "separate"])
@pytest.mark.parametrize("storage", tuned.STORAGES)
def test_problems(layout: str, storage: str) -> None:
    p = problem(17, layout=layout, storage=storage)
    assert experts.layer_of(p.ids, 4, p.up, p.down) == p.layer
    stacked = [w.parts[0] if w.table is None else torch.stack(list(w.parts)) for w in (p.up.w, p.down.w)]
    assert [w.shape for w in stacked] == [(4, 32 if layout in ("concat", "interleaved") else 16, 32), (4, 32, 16)]
    truth = TRUE(p)
    assert torch.isfinite(truth).all() and truth.abs().max() > 0
    for plan in p.starts():
        assert tuning._error(p.run(plan), truth) < 1e-5


def test_every_candidate_fits() -> None:
    """In half precision and with many rows, as on a GPU; nothing runs."""
    p = problem(4096, hidden=512, inter=256, dtype="bfloat16")
    plan = p.standard()
    assert plan.up.tma and plan.down.rows_tma
    near = list(p.neighbours(plan))
    assert len(near) == len(set(near)) > 30
    assert all(tuned.sound(t) for n in near for t in (n.up, n.down))
    assert all((n.up.bm, n.up.rest) == (n.down.bm, n.down.rest) for n in near)
    assert {n.down.programs for n in near} == {0, config.H200.processors}
    assert not list(p.neighbours(replace(plan, path="gemv")))
    plain = replace(plan.up, tma=False)
    assert p.fits(replace(plan, up=plain))
    assert not p.fits(replace(plan, up=replace(plain, stages=9)))  # shared memory
    assert not p.fits(replace(plan, up=replace(plain, warps=4)))  # registers
    assert not p.fits(replace(plan, up=replace(plain, rows_tma=True)))  # not sound
    assert problem(4096, hidden=512, inter=256, dtype="bfloat16", storage="transposed").standard() == plan
    p = problem(4096, hidden=512, inter=256, dtype="bfloat16", storage="separate")
    assert list(p.neighbours(p.standard()))
    assert not any(n.up.tma or n.down.tma for n in p.neighbours(p.standard()))


def test_results_are_kept_and_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    entry = tuned.Entry(problem(40).standard(), 1.0, 2.0)
    tuning.keep(path, tuning.Result(LAYER, 40, entry, 2.0, 7, 0))
    assert tuned.read(path) == {LAYER.name: {40: entry}}
    tuning.keep(path, tuning.Result(LAYER, 40, None, 2.0, 7, 0))
    assert tuned.read(path) == {}


def test_layers_without_a_choice() -> None:
    good = ((128, 8, 2048, 768), "bfloat16", "concat", "stacked", "silu")
    assert tuning.layer_of(*good) == (128, 8, 2048, 768, "bfloat16", "concat", "stacked")
    for i, value, words in (
        (0, (8, 2, 36, 64), "H=36"),
        (0, (8, 2, 64, 36), "I=36"),
        (1, "float32", "dtype 'float32'"),
        (2, "fused", "layout 'fused'"),
        (3, "sparse", "storage 'sparse'"),
        (4, "swish", "activation 'swish'"),
    ):
        bad = [*good]
        bad[i] = value
        with pytest.raises(ValueError, match=words):
            tuning.layer_of(*bad)


def test_command_line_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--layer", "8,2,64,32"]) == 2
    assert "tune measures on a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, as_json: bool
) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(experts, "table_of", lambda folder, index: path)
    monkeypatch.setattr(experts, "device_of", lambda index: config.H200)
    monkeypatch.setattr(tuning, "DTYPES", ("float32",))
    monkeypatch.setattr(cli, "DTYPES", ("float32", "float32"))
    real = Problem.__init__
    monkeypatch.setattr(Problem, "__init__", lambda self, a, b, c, device, e: real(self, a, b, c, CPU, e))
    clock = Clock(monkeypatch, lambda plan: 1.0 if plan.path == "sorted" else 2.0)
    monkeypatch.setattr(tuning, "graph_time", clock)
    command = ["tune", "--layer", "4,2,32,16", "--dtype", "float32", "--tokens", "20,40", "--budget", "2"]
    assert cli.main([*command, *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr()
    assert "T=40 (2 of 2)" in out.err
    assert set(tuned.read(path)[LAYER.name]) == {20, 40}
    if as_json:
        data = json.loads(out.out)
        assert [row["tokens"] for row in data["results"]] == [20, 40]
        assert data["results"][0]["kept"]["path"] == "sorted"
    else:
        assert "2.0 -> 1.0 us, path sorted" in out.out and str(path) in out.out
    ran = len(clock.ran)
    path.write_text("{}")
    assert cli.main(command) == 2
    assert "no table of format 1" in capsys.readouterr().err
    monkeypatch.setattr(experts, "table_of", lambda folder, index: path / "below a file")
    assert cli.main(command) == 2
    assert str(path) in capsys.readouterr().err
    assert len(clock.ran) == ran  # told before anything is measured


@pytest.mark.parametrize("budget", ["0", "-3", "many", "3,4"])
def test_a_budget_is_one_positive_number(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", "--layer", "8,2,64,32", "--budget", budget])
    assert budget in capsys.readouterr().err
