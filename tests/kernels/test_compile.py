"""The launches compile for an H200 without one (the interpreter accepts much that the compiler refuses)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

H200_SHARED_BYTES = 227 * 1024


@pytest.mark.slow
def test_sm90() -> None:
    script = Path(__file__).with_name("compile_sm90.py")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split() for line in result.stdout.splitlines()[1:]]
    assert {line[1] for line in lines} == {
        "gemv_up_kernel", "gemv_down_kernel", "decode_kernel", "count_kernel", "scan_kernel", "place_kernel",
        "permute_kernel", "grouped_kernel", "combine_kernel", "tiles_kernel", "invert_kernel", "route_kernel",
        "scaled_gemv_up_kernel", "scaled_gemv_down_kernel", "quantize_kernel", "activate_kernel",
    }  # fmt: skip
    for case, kernel, *counts in lines:
        shared, tensor_core, descriptors, fma, sub = map(int, counts)
        assert shared <= H200_SHARED_BYTES
        if kernel in ("decode_kernel", "grouped_kernel"):
            exact = case.startswith("fp32")
            assert (tensor_core > 0) == (not exact)
            # a step of 16 multiply-adds per sum, and two subtractions that the compiler must not cancel
            assert not exact or sub == fma // 16 * 2 > 0
        if kernel == "grouped_kernel":
            described = ("prefill", "ladder", "tall", "concat", "many", "two", "single")
            assert (descriptors > 0) == (case.removeprefix("turned-") in described)
