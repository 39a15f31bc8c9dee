"""Warm-up on a real device: afterwards captures compile and load nothing, and a second process compiles nothing.

Each case is two fresh processes (``warm_child.py``) on caches of their own. Without DeepGEMM its case is skipped; with
``REQUIRE_DEEPGEMM=1`` it fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_compile

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

SCRIPT = Path(__file__).with_name("warm_child.py")


def child(case: str, caches: Path) -> dict[str, Any]:
    root = str(Path(moe_compile.__file__).parents[1])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "DG_JIT_CACHE_DIR": str(caches / "deepgemm"),
        "MOE_COMPILE_TUNED": str(caches / "tuned"),
    }
    done = subprocess.run([sys.executable, str(SCRIPT), case], capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(case, told)
    return told


def check_first(told: dict[str, Any]) -> None:
    assert told["kernels"] == told["compiled"] > 5 and told["there"] == 0
    assert told["compiled here"] == []  # all by other processes: this one only read them
    assert told["asked"] > 5  # the hook sees what is read


def check_second(told: dict[str, Any], first: dict[str, Any]) -> None:
    assert (told["compiled"], told["there"], told["compiled here"]) == (0, first["kernels"], [])


def test_captures_of_a_hugging_face_model(tmp_path: Path) -> None:
    first = child("hf", tmp_path)
    check_first(first)
    assert first["asked in captures"] == []
    assert first["worst"] <= 0.02  # bfloat16 against the implementation of transformers
    assert first["left"] < 6 << 20  # half the weights of one layer: no copy of them stays
    second = child("hf", tmp_path)
    check_second(second, first)
    assert second["asked in captures"] == []


def test_a_compiled_naive_model(tmp_path: Path) -> None:
    first = child("naive", tmp_path)
    check_first(first)
    assert first["asked in captures"] == [] and first["worst"] <= 0.02
    check_second(child("naive", tmp_path), first)


def test_first_captures_take_deepgemm(tmp_path: Path) -> None:
    first = child("fp8", tmp_path)
    if "skip" in first:
        if os.environ.get("REQUIRE_DEEPGEMM") == "1":
            pytest.fail(first["skip"])
        pytest.skip(first["skip"])
    check_first(first)
    assert first["gemms"] > 0 and first["cubins"] > 0
    assert first["asked in captures"] == [] and first["new cubins"] == 0
    # at the first call of each size, where MC511 would send it to Triton
    assert first["deepgemm"] == [768, 769, 800, 1000, 1023, 1024, 1337, 1999, 2048]
    assert first["equal"] and first["finite"]
    second = child("fp8", tmp_path)
    check_second(second, first)
    assert second["cubins"] == first["cubins"] and second["deepgemm"] == first["deepgemm"]
