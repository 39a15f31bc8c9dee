"""Small packages that stand for DeepGEMM on the CPU, and what the tests ask of the search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_compile.deepgemm.provider import Provider, find
from moe_compile.spec import NoMatch

PACKAGE = """
import torch
from .parts.numbers import VERSION  # relative, as inside the real package

__version__ = VERSION
calls = []
alignment = 128


def set_mk_alignment_for_contiguous_layout(rows):
    global alignment
    alignment = rows


def get_mk_alignment_for_contiguous_layout():
    return alignment


def m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout, recipe=None, *, compiled_dims="nk"):
    calls.append(alignment)
    (a, a_scale), (b, b_scale) = a, b
    assert grouped_layout.dtype == torch.int32 and d.dtype == torch.bfloat16 and a_scale.stride(0) == 1
    n, k = b.shape[1:]
    a = a.float() * a_scale.repeat_interleave(128, 1)[:, :k]
    b = b.float() * b_scale.repeat_interleave(128, 1)[:, :n].repeat_interleave(128, 2)[:, :, :k]
    for start in range(0, len(a), alignment):
        rows = slice(start, start + alignment)
        d[rows] = (a[rows] @ b[grouped_layout[start]].T).bfloat16()
"""
WITHOUT_TAILS = PACKAGE.replace("    n, k =", "    assert b.shape[2] % 128 == 0, 'K'\n    n, k =")
WITHOUT_SETTER = PACKAGE.replace("def set_mk", "def _set_mk").replace("def get_mk", "def _get_mk")
SYMBOL = "/x/_C.so: undefined symbol: _ZN3c104cuda19CUDAErrorLogCaptureC1Ev"
ABI = f"raise ImportError({SYMBOL!r})"
Install = Callable[..., Path]


def write(folder: Path, text: str, version: str = "9.9") -> Path:
    """A package ``deep_gemm`` inside ``folder``."""
    package = folder / "deep_gemm"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    (package / "parts" / "__init__.py").touch()
    (package / "parts" / "numbers.py").write_text(f"VERSION = {version!r}")
    return package


def fake_nvcc(home: Path, told: str) -> None:
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{told}'\n")
    path.chmod(0o755)


def provided(device: int = 0) -> Provider:
    found = find(device)
    assert isinstance(found, Provider), found
    return found


def refused(code: str, *words: str) -> NoMatch:
    found = find()
    assert isinstance(found, NoMatch), found
    assert found.code == code and "\n" not in found.reason
    for word in words:
        assert word in found.reason, found.reason
    return found
