"""Host time of one eager call of the experts ops: ``python benchmarks/host.py --out FILE.json``.

Calls between two synchronisations, few enough that the GPU's queue never fills, on layers so narrow that the GPU does
not matter much; medians of the rounds. A call is one of ``torch.ops.moe_compile.*_inner``, as Inductor's code makes it:
the first of its kind, which plans and compiles, is not counted. Needs a CUDA device; DeepGEMM's case is left out where
there is none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from experts import versions

import moe_compile.ops  # noqa: F401  registers the ops
from moe_compile.ops.fp8 import KernelUnavailable
from moe_compile.quantize import quantize_blocks
from moe_compile.spec import Activation

CALLS, ROUNDS = 60, 15
ACTIVATION = Activation("silu")
CASES = [  # weights, E, K, H, I, T
    ("bf16", 128, 8, 256, 128, 1), ("bf16", 128, 8, 256, 128, 16), ("bf16", 128, 8, 256, 128, 1024),
    ("bf16", 8, 2, 256, 2048, 4096), ("bf16, separate", 128, 8, 256, 128, 16), ("fp8, triton", 128, 8, 256, 128, 1),
    ("fp8, triton", 128, 8, 256, 128, 16), ("fp8, triton", 128, 8, 256, 128, 512),
    ("fp8, deepgemm", 128, 8, 256, 128, 512),
]  # fmt: skip
COLUMNS = ["weights", "E", "K", "H", "I", "T", "us"]


def program(kind: str, E: int, K: int, H: int, I: int, T: int) -> Callable[[], object]:
    """One call."""
    torch.manual_seed(0)
    device = "cuda"
    x = torch.randn(T, H, device=device).bfloat16()
    weights, ids = torch.randn(T, E, device=device).softmax(-1).topk(K)
    rows, act = (x, weights, ids), (ACTIVATION.name, ACTIVATION.args(), ACTIVATION.gated)
    w1 = torch.randn(E, 2 * I, H, device=device).mul_(H**-0.5).bfloat16()
    w2 = torch.randn(E, H, I, device=device).mul_(I**-0.5).bfloat16()
    if kind.startswith("bf16"):
        apart = kind.endswith("separate")
        w1s, w2s = ([m.clone() for m in w] if apart else [w] for w in (w1, w2))
        return lambda: torch.ops.moe_compile.experts_inner(*rows, w1s, [], w2s, [], [], [], *act)
    fp8 = (*quantize_blocks(w1), *quantize_blocks(w2))
    kernels = kind.split()[-1]
    return lambda: torch.ops.moe_compile.experts_fp8_inner(*rows, *fp8, *act, kernels=kernels)


def microseconds(call: Callable[[], object]) -> float:
    """Per call."""
    for _ in range(5):
        call()
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    out = parser.parse_args().out
    rows: list[list[object]] = []
    with torch.no_grad():
        for case in CASES:
            try:
                rows.append([*case, round(microseconds(program(*case)), 1)])
            except KernelUnavailable as error:
                print(*case, error, flush=True)
                continue
            print(*rows[-1], flush=True)
    if out is not None:
        out.write_text(json.dumps({"machine": versions(), "table": {"columns": COLUMNS, "rows": rows}}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
