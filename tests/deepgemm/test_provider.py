"""Every way in which a DeepGEMM package can be missing, broken or in another place than the first."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_packages import ABI, PACKAGE, Install, fake_nvcc, provided, refused, write

from moe_compile import config
from moe_compile.deepgemm import provider


def test_the_variable_is_the_one_that_config_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert provider.ENVIRONMENT == config.DEEP_GEMM
    monkeypatch.setenv(config.DEEP_GEMM, "0")
    assert config.DEEP_GEMM not in config.unknown_environment()


def test_nothing_installed_lists_the_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused("MC501", "module deep_gemm", "vllm.third_party.deep_gemm")
    provider.reset()
    monkeypatch.setenv(config.DEEP_GEMM, str(tmp_path / "none"))
    refused("MC501", str(tmp_path / "none"), "module deep_gemm", "vllm.third_party.deep_gemm")


def test_a_mere_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deep_gemm").mkdir()
    monkeypatch.delitem(sys.modules, "deep_gemm")
    monkeypatch.syspath_prepend(str(tmp_path))
    refused("MC501")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ABI, ("ABI", "undefined symbol: _ZN3c104", "build DeepGEMM from source", "vllm 0.20.2")),
        ("assert False, 'one\\ntwo'", ("the import failed", "two")),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", ("the import failed", "libcudart.so.13")),
        ("", ("has no m_grouped_fp8_gemm_nt_contiguous",)),
    ],
)
def test_import_failures(install: Install, text: str, words: tuple[str, ...]) -> None:
    folder = install(text)
    refused("MC503", "module deep_gemm", *words)
    assert folder.is_dir()


def test_an_extension_for_another_python(install: Install) -> None:
    folder = install("from . import _C")
    (folder / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    refused("MC503", "ABI", "_C.cpython-27", "is not for Python 3.")


def test_nvcc_is_sought_before_the_import(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("raise AssertionError('imported')")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no_cuda"))
    refused("MC502", "12.3 or newer is needed", str(tmp_path / "no_cuda" / "bin" / "nvcc"))
    assert "deep_gemm" not in sys.modules


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("Cuda compilation tools, release 12.2, V12.2.91", ("is nvcc 12.2, needed 12.3",)),
        ("Cuda compilation tools, release 9.2, V9", ("is nvcc 9.2",)),
        ("hello", ("names no release",)),
    ],
)
def test_nvcc_too_old(install: Install, tmp_path: Path, told: str, words: tuple[str, ...]) -> None:
    install()
    fake_nvcc(tmp_path / "cuda", told)
    refused("MC502", *words)


def test_where_nvcc_is_sought(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, name in enumerate(("path", "cuda_path", "cuda_home", "named")):
        fake_nvcc(tmp_path / name, f"release 13.{number}")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path' / 'bin'}:/usr/bin:/bin")
    assert str(provider._nvcc()).startswith("13.0")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda_path"))
    assert str(provider._nvcc()).startswith("13.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda_home"))
    assert str(provider._nvcc()).startswith("13.2")
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(tmp_path / "named" / "bin" / "nvcc"))
    assert str(provider._nvcc()).startswith("13.3")


@pytest.mark.parametrize(("capability", "words"), [(None, "no such CUDA device"), ((8, 0), "8.0"), ((10, 0), "10.0")])
def test_wrong_architecture(install: Install, monkeypatch: pytest.MonkeyPatch, capability: Any, words: str) -> None:
    install()
    monkeypatch.setattr(provider, "_capability", lambda device: capability)
    refused("MC504", "9.0", words)
    assert "deep_gemm" not in sys.modules


def test_zero_switches_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setenv(config.DEEP_GEMM, "0")
    refused("MC501", "switched off by MOE_COMPILE_DEEP_GEMM=0")


def test_a_named_folder_goes_first(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(version="1.0")
    folder = write(tmp_path / "brought", PACKAGE, "2.0")
    monkeypatch.setenv(config.DEEP_GEMM, str(tmp_path / "brought"))
    found = provided()
    assert found.name == f"deep_gemm 2.0 at {folder}" and found.module.__name__ == "moe_compile_deep_gemm"
    assert "deep_gemm" not in sys.modules


@pytest.mark.parametrize("text", [None, ABI, PACKAGE + "    d.zero_()"])
def test_after_a_bad_folder_the_next_place_is_tried_with_a_warning(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str | None,
) -> None:
    folder = install()
    if text is not None:
        write(tmp_path / "brought", text)
    monkeypatch.setenv(config.DEEP_GEMM, str(tmp_path / "brought"))
    with caplog.at_level(logging.WARNING, "moe_compile.deepgemm"):
        assert provided().name.endswith(str(folder))
    assert str(tmp_path / "brought") in caplog.text and "is used instead" in caplog.text


def test_all_failures_are_told(install: Install, inside_vllm: Install) -> None:
    install(ABI)
    inside_vllm(PACKAGE + "    d.zero_()")
    refused("MC503", "module deep_gemm: ABI", "vllm.third_party.deep_gemm: the probe was wrong")


def test_the_copy_inside_vllm_without_vllm(
    inside_vllm: Install, caplog: pytest.LogCaptureFixture
) -> None:
    folder = inside_vllm()
    found = provided()
    assert found.name == f"deep_gemm 9.9 at {folder}"
    assert "vllm" not in sys.modules and "moe_compile_deep_gemm.parts.numbers" in sys.modules
    assert not caplog.records


def test_a_copy_that_vllm_has_loaded_is_not_loaded_twice(
    inside_vllm: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside_vllm()
    theirs = provided().module
    monkeypatch.setitem(sys.modules, provider._INSIDE_VLLM, theirs)
    provider.reset()
    assert provided().module is theirs and "moe_compile_deep_gemm" not in sys.modules


def test_the_real_device_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert provider._capability(0) is None and not provider._capturing()
    assert provider._capability(10_000) is None
    assert provider._device(1) == torch.device("cuda", 1)
