"""Time tile configurations of the sorted path on one GPU, both GEMMs apart: ``python benchmarks/sweep_prefill.py``.

Every candidate's output is checked against the tiles that use no descriptors. The first phase compiles in one
process per layer, so that the second finds a warm cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peers import LAYERS, Layer, route
from torch import Tensor

from moe_compile.kernels.activation import Epilogue
from moe_compile.kernels.config import Plan, Tiles, select
from moe_compile.kernels.experts import device_of
from moe_compile.kernels.grouped import gather_projection, sorted_projection
from moe_compile.kernels.operand import Operand
from moe_compile.kernels.sort import Sorted, sort_pairs
from moe_compile.kernels.tile import Projection

INF = float("inf")
MAX_ERROR = 1e-2
WIDE = Tiles(128, 256, 64, 8, 3, swap=False, group=8, tma=True)
SWAPPED = Tiles(128, 256, 64, 8, 4, swap=True, tail=2, group=4, tma=True)


def candidates(tokens: int, processors: int) -> tuple[dict[str, Tiles], dict[str, Tiles]]:
    """Tiles of the two GEMMs by name."""
    ladder = replace(SWAPPED, tail=0, ladder=True)
    if tokens <= 1024:
        few = {
            "ladder g4": ladder,
            "ladder g1": replace(ladder, group=1),
            "ladder s3": replace(ladder, stages=3),
            "swap tail2 s4": SWAPPED,
            "swap tail2 s4 g1": replace(SWAPPED, group=1),
            "tail2 s4": replace(WIDE, stages=4, tail=2),
            "64 swap tail1 s4": replace(SWAPPED, bm=64, tail=1),
        }
        down = {
            "ladder wn128": replace(ladder, wn=128),
            "64x128 w4 swap tail1 s4": replace(SWAPPED, bm=64, wn=128, warps=4, tail=1),
        }
        return few, {**few, **down}
    persistent = replace(WIDE, programs=processors)
    up = {
        "s3 g8": WIDE,
        "s3 g1": replace(WIDE, group=1),
        "s3 g16": replace(WIDE, group=16),
        "s4 g8": replace(WIDE, stages=4),
        "s4 g8 tail1": replace(WIDE, stages=4, tail=1),
        "s3 g16 tail1": replace(WIDE, group=16, tail=1),
        "s3 g16 persistent": replace(persistent, group=16),
        "ladder g4": ladder,
    }
    down = {
        "s3 g16 persistent rows": replace(persistent, group=16, rows_tma=True),
        "s3 g8 persistent rows": replace(persistent, rows_tma=True),
        "s4 g8 rows": replace(WIDE, stages=4, rows_tma=True),
        "s4 g16 rows": replace(WIDE, stages=4, group=16, rows_tma=True),
        "s4 g8": replace(WIDE, stages=4),
        "s4 g8 tail1": replace(WIDE, stages=4, tail=1),
        "s3 g16 persistent": replace(persistent, group=16),
        "ladder g4": ladder,
    }
    return up, down


def projections(layer: Layer) -> tuple[Projection, Projection]:
    w1 = torch.empty(layer.E, 2 * layer.I, layer.H, dtype=torch.bfloat16, device="cuda")
    w2 = torch.empty(layer.E, layer.H, layer.I, dtype=torch.bfloat16, device="cuda")
    up = Projection(
        Operand([w1.normal_(0, layer.H**-0.5)]), layer.I, Epilogue("silu", (1, INF, INF, INF, 0), "concat")
    )
    return up, Projection(Operand([w2.normal_(0, layer.I**-0.5)]), layer.H)


def difference(ours: Tensor, expected: Tensor) -> float:
    error = float((ours - expected).float().norm() / expected.float().norm())
    return error if error == error else INF


def sweep(layer: Layer, tokens: int, rep: int, up: Projection, down: Projection) -> list[dict[str, Any]]:
    """Cells of one layer and number of tokens; ``rep`` 0 only compiles."""
    from triton.testing import do_bench

    torch.manual_seed(tokens)
    x = torch.randn(tokens, layer.H, device="cuda").bfloat16()
    _, ids = route(torch.randn(tokens, layer.E, device="cuda"), layer.K)
    device = device_of(0)

    def plan(tma: bool) -> Plan:
        return select("sorted", tokens, layer.K, layer.E, layer.H, layer.I, 2, device, (tma, tma))

    @lru_cache
    def pairs(bm: int, rest: int) -> Sorted:
        return sort_pairs(ids, layer.E, bm, rest)

    def first(tiles: Tiles) -> Tensor:
        out: Tensor = gather_projection(x, pairs(tiles.bm, tiles.rest), layer.K, up, tiles)
        return out

    def second(tiles: Tiles) -> Tensor:
        out: Tensor = sorted_projection(h, pairs(tiles.bm, tiles.rest), down, tiles)
        return out

    pointers, now = plan(False), plan(True)
    h = first(pointers.up)
    cells: list[dict[str, Any]] = []
    up_tiles, down_tiles = candidates(tokens, device.processors)
    for gemm, run, tiles, current, others, columns in (
        ("up", first, pointers.up, now.up, up_tiles, 2 * layer.I),
        ("down", second, pointers.down, now.down, down_tiles, layer.I),
    ):
        expected = run(tiles)
        flops = 2 * tokens * layer.K * layer.H * columns
        for name, candidate in {"pointers": tiles, "plan": current, **others}.items():
            cell: dict[str, Any] = {"layer": layer.name, "tokens": tokens, "gemm": gemm, "tiles": name}
            try:
                cell["error"] = difference(run(candidate), expected)
                if cell["error"] > MAX_ERROR:
                    cell["failed"] = "wrong"
                elif rep:
                    ms = do_bench(lambda: run(candidate), warmup=10, rep=rep, return_mode="median")  # noqa: B023
                    cell.update(ms=ms, tflops=flops / ms / 1e9)
            except Exception as error:  # one candidate must not end the run
                cell["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            cells.append(cell)
            if rep or "failed" in cell:
                print(text(cell), flush=True)
    return cells


def text(cell: dict[str, Any]) -> str:
    head = f"{cell['layer']:14} {cell['tokens']:6} {cell['gemm']:4} {cell['tiles']:24}"
    if "failed" in cell:
        return f"{head} failed: {cell['failed']} {cell.get('error', '')}"
    return f"{head} {cell['ms']:8.4f} ms {cell['tflops']:6.0f} TFLOP/s  error {cell['error']:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=lambda s: s.split(","), default=list(LAYERS))
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[1024, 4096, 16384])
    parser.add_argument("--rep", type=int, default=30, help="milliseconds of timed runs per candidate")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start = time.monotonic()
    tokens = ",".join(map(str, arguments.tokens))
    if not arguments.compile_only:
        os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="moe_compile_sweep_"))
        command = [sys.executable, __file__, "--compile-only", "--tokens", tokens, "--layers"]
        for process in [subprocess.Popen([*command, name]) for name in arguments.layers]:
            process.wait()
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    cells: list[dict[str, Any]] = []
    for name in arguments.layers:
        up, down = projections(LAYERS[name])
        for count in arguments.tokens:
            cells += sweep(LAYERS[name], count, 0 if arguments.compile_only else arguments.rep, up, down)
    if arguments.compile_only:
        return 0
    print(f"done after {time.monotonic() - start:.0f} s; the best:")
    for key in dict.fromkeys((c["layer"], c["tokens"], c["gemm"]) for c in cells):
        timed = [c for c in cells if "ms" in c and (c["layer"], c["tokens"], c["gemm"]) == key]
        if timed:
            print(text(min(timed, key=lambda c: float(c["ms"]))))
    if arguments.out:
        arguments.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
