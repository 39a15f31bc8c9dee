"""Options: precedence, errors that help, and the split of torch.compile's options."""

from __future__ import annotations

import logging

import pytest

from moe_compile import config
from moe_compile.config import OptionError, Options, effective, enabled, split_options


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", *(f"_{n.upper()}" for n in (*config.NAMES, "quantize", "strct"))):
        monkeypatch.delenv(f"MOE_COMPILE{name}", raising=False)


def test_defaults() -> None:
    defaults = {"strict": False, "experts": "auto", "deepgemm_rule": "auto", "verify": False, "dryrun": False}
    assert Options.resolve() == Options(**defaults)  # type: ignore[arg-type]


def test_call_over_environment_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMPILE_STRICT", "1")
    monkeypatch.setenv("MOE_COMPILE_EXPERTS", "triton")
    options = Options.resolve({"experts": "cpu"})
    assert options.strict and options.experts == "cpu"
    origins = {name: origin for name, (_, origin) in effective({"experts": "cpu"}).items()}
    defaults = {"deepgemm_rule": "default", "verify": "default", "dryrun": "default"}
    assert origins == {"strict": "environment", "experts": "call", **defaults}


@pytest.mark.parametrize(
    ("given", "kernels"),
    [
        ({}, "auto"),
        ({"deepgemm_rule": "vllm"}, "vllm"),
        ({"experts": "deepgemm", "deepgemm_rule": "vllm"}, "deepgemm"),
        ({"experts": "triton", "deepgemm_rule": "vllm"}, "triton"),
        ({"experts": "cpu"}, "auto"),
    ],
)
def test_named_kernels_go_before_a_rule(given: dict[str, str], kernels: str) -> None:
    assert Options.resolve(given).kernels == kernels


@pytest.mark.parametrize(
    ("raw", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False)]
)
def test_environment_booleans(monkeypatch: pytest.MonkeyPatch, raw: str, value: bool) -> None:
    monkeypatch.setenv("MOE_COMPILE_DRYRUN", raw)
    assert Options.resolve().dryrun is value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"strickt": True}, "unknown option 'strickt', did you mean 'strict'"),
        ({"zzz": 1}, "unknown option 'zzz'; the options are strict, experts"),
        ({"strict": 1}, r"option 'strict' takes True or False, got 1 \(int\)"),
        ({"strict": "yes"}, "takes True or False, got 'yes'"),
        ({"experts": "tritn"}, "did you mean 'triton'"),
        ({"experts": None}, r"takes one of 'auto', 'triton', 'deepgemm', 'cpu', got None \(NoneType\)"),
        ({"deepgemm_rule": "vlm"}, r"one of 'auto', 'vllm', got 'vlm' \(str\), did you mean 'vllm'"),
        ({"quantize": "fp8"}, r"'quantize' is none of a compilation: .* .*optimize\(model, quantize='fp8'\) takes it"),
    ],
)
def test_wrong_options_name_what_was_given(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.resolve(overrides)


@pytest.mark.parametrize(
    ("variable", "raw", "message"),
    [
        (
            "MOE_COMPILE_STRICT",
            "maybe",
            "MOE_COMPILE_STRICT takes 1/true/yes/on or 0/false/no/off, got 'maybe'",
        ),
        ("MOE_COMPILE_QUANTIZE", "fp8", "moe_compile.optimize"),
        ("MOE_COMPILE_EXPERTS", "gpu", "takes one of"),
    ],
)
def test_wrong_environment_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, raw: str, message: str
) -> None:
    monkeypatch.setenv(variable, raw)
    with pytest.raises(OptionError, match=message):
        Options.resolve()


def test_mistyped_environment_name_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOE_COMPILE_STRCT", "1")
    monkeypatch.setattr(config, "_warned", set())
    with caplog.at_level(logging.WARNING, "moe_compile.config"):
        Options.resolve()
        Options.resolve()
    assert [r.getMessage() for r in caplog.records] == [
        "environment variable MOE_COMPILE_STRCT is no option of moe_compile, did you mean 'strict'?"
    ]


def test_split_options() -> None:
    ours, theirs = split_options({"moe_compile.strict": True, "max_autotune": True})
    assert ours == {"strict": True} and theirs == {"max_autotune": True}
    assert split_options(None) == ({}, {})


def test_kill_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert enabled()
    monkeypatch.setenv("MOE_COMPILE", "0")
    assert not enabled()
    monkeypatch.setenv("MOE_COMPILE", "1")
    assert enabled()
    monkeypatch.setenv("MOE_COMPILE", "banana")
    with pytest.raises(OptionError, match="MOE_COMPILE takes"):
        enabled()


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Options().strict = True  # type: ignore[misc]
