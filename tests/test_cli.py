"""The command line: every subcommand works, tells JSON, and exits with 0 or 1."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compile import bench, cli, config, demo, doctor
from moe_compile.demo import DenseLoop, NaiveMoE, Sample
from moe_compile.spec import NoMatch

MODEL = """
import torch
from moe_compile.demo import DenseLoop
from torch import nn

def make_model():
    torch.manual_seed(0)
    return DenseLoop(4, 2, 16, 24).eval(), (torch.randn(6, 16),)

def make_plain():
    return nn.Linear(4, 4), torch.ones(2, 4)

def make_keywords():
    model, (x,) = make_model()
    return model, (), {"x": x}

def make_nothing():
    return 3
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "some_model.py"
    path.write_text(MODEL)
    return str(path)


def test_explain(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert cli.main(["explain", f"{model}:make_model", "--html", str(page)]) == 0
    assert capsys.readouterr().out.startswith("moe_compile: 1 of 1 MoE candidate rewritten")
    assert page.read_text().startswith("<!doctype html>")


def test_a_command_called_from_python_leaves_the_log_as_it_was(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("moe_compile.report")
    monkeypatch.setattr(log, "level", logging.INFO)
    within: list[int] = []
    monkeypatch.setattr(cli, "load_target", lambda _: within.append(log.level) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["explain", f"{model}:make_plain"])
    assert (within, log.level) == ([logging.ERROR], logging.INFO)


def test_explain_json_with_keywords(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{model}:make_keywords", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "rewritten"


def test_explain_without_moe_exits_with_one(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"{model}:make_plain"]) == 1
    assert "no MoE candidate found" in capsys.readouterr().out


def test_check(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", f"{model}:make_model", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["ok"] and row["rewritten"] == 1 and row["report"][0]["status"] == "rewritten"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{model}:nothing_there", "has no function 'nothing_there'"),
        ("{model}:make_nothing", "must return (model, args)"),
        ("{model}", "must look like path.py:function"),
        ("missing.py:make", "there is no file 'missing.py'"),
    ],
)
def test_wrong_targets(model: str, target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", target.format(model=model)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tune"],
        ["bench", "--layer", "8,2,64"],
        ["bench", "--layer", "2,4,8,8"],
        ["bench", "--tokens", "0"],
    ],
)
def test_wrong_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "BUDGET_S", 0.01)
    assert cli.main(["bench", "--layer", "4,2,16,24", "--tokens", "3", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["tokens"] == 3 and all(row[name] > 0 for name in ("eager", "torch.compile", "moe_compile"))


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device, dtype = demo.device_and_dtype()
    sample = demo.naive(DenseLoop, (4, 2, 16, 24), 6, device, dtype)
    monkeypatch.setattr(demo, "samples", lambda: [sample])
    monkeypatch.setattr(bench, "BUDGET_S", 0.01)
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    for part in (
        "1 of 1 MoE candidate rewritten",
        "moe_compile check: ok",
        "speed-up",
        "pip install 'transformers",
    ):
        assert part in out


def test_demo_fails_when_nothing_is_rewritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch import nn, ones

    monkeypatch.setattr(demo, "samples", lambda: [Sample("plain", nn.Linear(4, 4), (ones(2, 4),), {})])
    monkeypatch.setattr(bench, "BUDGET_S", 0.01)
    assert cli.main(["demo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["model"] == "plain"


def test_demo_models_agree() -> None:
    import torch

    torch.manual_seed(0)
    dense, gather = (kind(4, 2, 16, 24) for kind in (demo.DenseLoop, demo.GatherLoop))
    gather.load_state_dict(dense.state_dict())
    x = torch.randn(9, 16)
    assert isinstance(dense, NaiveMoE)
    torch.testing.assert_close(dense(x), gather(x))


def test_doctor_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.findings()
    names = {f.name for f in found}
    assert {"torch", "backend", "experts op on cpu", "option strict"} <= names
    assert not [f for f in found if f.status == doctor.BAD], doctor.as_text(found)
    assert "all well" in doctor.as_text(found)
    json.dumps(doctor.as_rows(found))


def test_doctor_names_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOE_COMPILE_EXPERTS", "gpu")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("moe_compile.functional.fused_experts", broken)
    assert cli.main(["doctor", "--json"]) == 1
    bad = {row["name"]: row["text"] for row in json.loads(capsys.readouterr().out) if row["status"] == "BAD"}
    assert "no kernel" in bad["experts op on cpu"] and "'gpu'" in bad["options"]


def test_doctor_shows_measured_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moe_compile.kernels import experts, tuned
    from moe_compile.kernels.config import select

    path = tmp_path / "table.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(experts, "table_of", lambda folder, index: path)
    assert [(f.status, f.text) for f in doctor._tables()] == [(doctor.OK, f"none in {path}")]
    entry = tuned.Entry(select("sorted", 64, 2, 8, 64, 64, 2), 1.0, 2.0)
    tuned.merge(path, {"a": {64: entry, 128: entry}, "b": {1: entry}})
    assert doctor._tables()[0].text == f"3 for 2 layers in {path}"
    path.write_text("{}")
    assert (doctor._tables()[0].status, "tune" in doctor._tables()[0].fix) == (doctor.BAD, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._tables() == []


@pytest.mark.parametrize(
    ("code", "status", "words", "fix"),
    [
        ("MC501", "note", "nowhere; fp8 layers run on Triton", "MOE_COMPILE_DEEP_GEMM"),
        ("MC502", "BAD", "MC502: nowhere", "CUDA_HOME"),
        ("MC503", "BAD", "MC503: nowhere", "MOE_COMPILE_DEEP_GEMM=0"),
        ("MC504", "note", "MC504: nowhere", ""),
    ],
)
def test_doctor_judges_deep_gemm(
    monkeypatch: pytest.MonkeyPatch, code: str, status: str, words: str, fix: str
) -> None:
    assert torch.cuda.is_available() or doctor._deep_gemm()[0].text == "not looked for: there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("moe_compile.deepgemm.provider.find", lambda device: NoMatch(code, "nowhere"))
    (found,) = doctor._deep_gemm()
    assert (found.status, found.text) == (status, words) and fix in found.fix


def test_doctor_shows_deep_gemm_and_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moe_compile.deepgemm.provider import Provider

    works = Provider(sys, "deep_gemm 2.5.0 at /x", "2.5.0", "12.9 (/cuda/bin/nvcc)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("moe_compile.deepgemm.provider.find", lambda device: works)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path))
    expected = f"deep_gemm 2.5.0 at /x, nvcc 12.9 (/cuda/bin/nvcc), compiles into {tmp_path}"
    assert [(f.status, f.text) for f in doctor._deep_gemm()] == [(doctor.OK, expected)]
    for mode, status in ((0o700, doctor.OK), (0o777, doctor.BAD)):
        tmp_path.chmod(mode)
        assert [f.status for f in doctor._cache_directories() if f.name == "DeepGEMM cache"] == [status]
    monkeypatch.delenv("DG_JIT_CACHE_DIR")
    assert doctor._deep_gemm_cache().endswith(".deep_gemm")


def test_doctor_notes_the_kill_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMPILE", "0")
    assert not config.enabled()
    assert any(f.name == "MOE_COMPILE" for f in doctor.findings())


def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_compile", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "doctor" in done.stdout
