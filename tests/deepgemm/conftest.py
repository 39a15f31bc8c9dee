"""A machine on which DeepGEMM could run, made of fakes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_packages import PACKAGE, Install, fake_nvcc, write

from moe_compile import config
from moe_compile.deepgemm import provider


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """One Hopper GPU that computes on the CPU, nvcc 12.9, and no package anywhere."""
    provider.reset()
    monkeypatch.setattr(provider, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(provider, "_capturing", lambda: False)
    monkeypatch.setattr(provider, "_device", lambda index: torch.device("cpu"))
    for name in (config.DEEP_GEMM, "CUDA_PATH", "DG_JIT_NVCC_COMPILER"):
        monkeypatch.delenv(name, raising=False)
    fake_nvcc(tmp_path / "cuda", "Cuda compilation tools, release 12.9, V12.9.86")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("deep_gemm", "vllm", provider._INSIDE_VLLM):
        monkeypatch.setitem(sys.modules, name, None)  # "known not to exist", whatever is installed here
    yield
    for name in [n for n in sys.modules if n.startswith("deep_gemm.")]:
        del sys.modules[name]
    provider.reset()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Make a package importable as ``deep_gemm``."""

    def installed(text: str = PACKAGE, version: str = "9.9") -> Path:
        site = tmp_path / "site"
        monkeypatch.delitem(sys.modules, "deep_gemm")
        monkeypatch.syspath_prepend(str(site))
        return write(site, text, version)

    return installed


@pytest.fixture
def inside_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Install a vLLM that must not be run, with a package inside."""

    def installed(text: str = PACKAGE) -> Path:
        site = tmp_path / "other_site"
        package = write(site / "vllm" / "third_party", text)
        for init in (site / "vllm" / "__init__.py", site / "vllm" / "third_party" / "__init__.py"):
            init.write_text("raise AssertionError('vLLM was run')")
        monkeypatch.delitem(sys.modules, "vllm")
        monkeypatch.syspath_prepend(str(site))
        return package

    return installed
