"""Kernels run on CPU tensors under Triton's interpreter; with a GPU, ``tests/gpu`` runs them for real.

Triton decides at import whether its functions are interpreted, so the switch must come first. When another
test has already imported Triton without it, Triton's Python modules are imported anew: nothing on a machine
without a GPU can have used them.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["TRITON_INTERPRET"] = "1"
    loaded = sys.modules.get("triton")
    if loaded is not None and not hasattr(loaded.cdiv, "rewrite"):
        for name in list(sys.modules):
            ours = name.startswith("moe_compile.kernels.")
            if ours or name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C")):
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if ours and parent in sys.modules:  # else ``from moe_compile.kernels import`` finds the old one there
                    vars(sys.modules[parent]).pop(child, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton before 3.7 reads scalars by ``int(array([1]))``, which NumPy 2.4 made an error."""
    import numpy
    import triton

    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        reason = f"the interpreter of Triton {triton.__version__} needs numpy < 2.4, this is {numpy.__version__}"
        for item in items:
            if Path(__file__).parent in item.path.parents and item.path.name != "test_compile.py":
                item.add_marker(pytest.mark.skip(reason))


@pytest.fixture(scope="session", autouse=True)
def _fp8_as_on_a_gpu() -> None:
    """The interpreter drops the carry when it rounds to e4m3 (31.6 becomes 16), and reads its NaN as 480."""
    if torch.cuda.is_available():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float
    stored = {32: torch.float32, 16: torch.float16, 8: torch.float8_e4m3fn}

    def of(dtype: Any) -> torch.dtype:
        return torch.bfloat16 if dtype == tl.bfloat16 else stored[dtype.primitive_bitwidth]

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.float8e4nv not in (source, target):
            return theirs(data, source, target, rounding)
        bits = torch.from_numpy(np.ascontiguousarray(data).view(getattr(np, f"uint{source.primitive_bitwidth}")))
        out = bits.view(of(source)).to(of(target))
        return out.view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy()

    interpreter._convert_float = convert


@pytest.fixture(scope="session", autouse=True)
def _one_patch_per_launch() -> None:
    """At every call of a device function the interpreter looks at each name of Triton's language anew.

    What it replaces there has been replaced by the launch around it: 152 of 391 s in one profile of these tests.
    """
    if torch.cuda.is_available():
        return
    from triton.language import core
    from triton.runtime import interpreter

    theirs = interpreter._patch_lang
    nothing = getattr(interpreter, "_LangPatchScope", type(None))

    def patch(fn: Any) -> Any:
        seen = {id(value): value for value in fn.__globals__.values() if value in (interpreter.tl, core)}
        if any(core.is_builtin(lang.load) for lang in seen.values()) or not seen:
            return theirs(fn)
        return nothing()

    interpreter._patch_lang = patch

    of = interpreter._get_np_dtype
    known: dict[Any, Any] = {}

    def np_dtype(kind: Any) -> Any:  # theirs builds a table of all types at every call
        plain = kind.element_ty if type(kind) is core.block_type else kind
        if type(plain) is not core.dtype:
            return of(kind)
        if plain not in known:
            known[plain] = of(plain)
        return known[plain]

    interpreter._get_np_dtype = np_dtype


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CUDA ops' Python takes CPU tensors, and finds measured plans in ``table.json``."""
    from moe_compile.kernels import config, experts, operand, tuned
    from moe_compile.ops import calls, cuda, fp8, tables

    def table(parts: Any, role: str) -> tuple[torch.Tensor, bool]:
        tables.check_alike(parts, role)
        made = operand.make_operand(parts, parts[0].dim())
        assert made.table is not None
        return made.table, made.aligned

    for module in (cuda, fp8):
        monkeypatch.setattr(module, "on", lambda x: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(calls, "pointer_table", table)
    monkeypatch.setattr(experts, "device_of", lambda device: config.H200)
    monkeypatch.setattr(experts, "table_of", lambda folder, device: tmp_path / "table.json")
    tuned.load.cache_clear()
    calls.kernel.cache_clear()
