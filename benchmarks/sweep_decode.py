"""Time tile configurations of the path without a sort on one GPU: ``python benchmarks/sweep_decode.py``.

Both GEMMs apart, CUDA-graph replays with a cleared L2 cache. Every output is checked against the first candidate's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experts import graphed
from peers import LAYERS, Layer, route
from sweep_prefill import MAX_ERROR, difference, projections

from moe_compile.kernels.config import Tiles
from moe_compile.kernels.decode import decode_projection
from moe_compile.kernels.experts import device_of, run
from moe_compile.kernels.tile import Projection

BASE = Tiles(16, 128, 128, 4, 5, swap=True, evict="evict_first")
UP = {
    "64 k128 w4 s5": BASE,
    "64 k128 w4 s4": replace(BASE, stages=4),
    "64 k256 w4 s3": replace(BASE, bk=256, stages=3),
    "64 k64 w4 s6": replace(BASE, bk=64, stages=6),
    "128 k128 w8 s3": replace(BASE, wn=256, warps=8, stages=3),
    "128 k128 w4 s3": replace(BASE, wn=256, stages=3),
    "128 k64 w8 s5": replace(BASE, wn=256, bk=64, warps=8),
    "32 k128 w4 s6": replace(BASE, wn=64, stages=6),
    "32 k256 w4 s4": replace(BASE, wn=64, bk=256, stages=4),
}
DOWN = {
    "128 k128 w4 s4": replace(BASE, stages=4),
    "128 k128 w4 s5": BASE,
    "128 k128 w8 s4": replace(BASE, stages=4, warps=8),
    "128 k64 w8 s6": replace(BASE, bk=64, warps=8, stages=6),
    "128 k64 w4 s6": replace(BASE, bk=64, stages=6),
    "128 k256 w8 s3": replace(BASE, bk=256, warps=8, stages=3),
    "64 k128 w4 s6": replace(BASE, wn=64, stages=6),
    "64 k256 w4 s4": replace(BASE, wn=64, bk=256, stages=4),
}
HEIGHTS = {"16": (16, 0), "32": (32, 0), "32/16": (32, 1), "64/32": (64, 1)}


def heights(tokens: int) -> dict[str, tuple[int, int]]:
    """Rows of a tile and whether it has a half one, by name."""
    return {n: h for n, h in HEIGHTS.items() if n == "16" or tokens > 16}


def sweep(layer: Layer, tokens: int, rep: int, up: Projection, down: Projection) -> list[dict[str, Any]]:
    """Cells of one layer and number of tokens; ``rep`` 0 only compiles."""
    from triton.testing import do_bench

    torch.manual_seed(tokens)
    x = torch.randn(tokens, layer.H, device="cuda").bfloat16()
    _, ids = route(torch.randn(tokens, layer.E, device="cuda"), layer.K)
    rows = torch.randn(tokens * layer.K, layer.I, device="cuda").bfloat16()
    cells: list[dict[str, Any]] = []
    for gemm, projection, source, tiles in (("up", up, x, UP), ("down", down, rows, DOWN)):
        expected = None
        for height, (bm, tail) in heights(tokens).items():
            for name, one in tiles.items():
                plan = replace(one, bm=bm, tail=tail)
                cell: dict[str, Any] = {
                    "layer": layer.name,
                    "tokens": tokens,
                    "gemm": gemm,
                    "tiles": f"{height} {name}",
                }

                def program(_: Any, __: Any, p: Projection = projection, t: Tiles = plan, s: Any = source) -> Any:
                    return decode_projection(s, ids, layer.E, p, t, s is x)

                try:
                    out = program(None, None)
                    expected = out if expected is None else expected
                    cell["error"] = difference(out, expected)
                    if cell["error"] > MAX_ERROR:
                        cell["failed"] = "wrong"
                    elif rep:
                        graph, _ = graphed(program, x, ids)
                        cell["ms"] = do_bench(graph.replay, warmup=5, rep=rep, return_mode="median")
                except Exception as error:  # one candidate must not end the run
                    cell["failed"] = f"{type(error).__name__}: {str(error)[:120]}"
                cells.append(cell)
    return cells


def paths(layer: Layer, tokens: int, rep: int, up: Projection, down: Projection) -> list[dict[str, Any]]:
    """The whole layer with and without a sort."""
    from triton.testing import do_bench

    torch.manual_seed(tokens)
    x = torch.randn(tokens, layer.H, device="cuda").bfloat16()
    weights, ids = route(torch.randn(tokens, layer.E, device="cuda"), layer.K)
    cells: list[dict[str, Any]] = []
    expected = None
    for path in ("decode", "sorted"):

        def program(_: Any, __: Any, path: str = path) -> Any:
            return run(x, weights, ids, layer.E, up, down, path=path, device=device_of(0))

        graph, out = graphed(program, x, ids)
        expected = out if expected is None else expected
        cell: dict[str, Any] = {"layer": layer.name, "tokens": tokens, "gemm": "layer", "tiles": path}
        cell["error"] = difference(out, expected)
        cell["ms"] = do_bench(graph.replay, warmup=10, rep=max(rep, 1), return_mode="median")
        cells.append(cell)
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=lambda s: s.split(","), default=list(LAYERS))
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[16, 64, 128])
    parser.add_argument("--rep", type=int, default=15, help="milliseconds of timed runs per candidate")
    parser.add_argument("--paths", action="store_true", help="the whole layer with and without a sort instead")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.rep:
        command = [sys.executable, __file__, *["--paths"] * arguments.paths, "--rep", "0", "--layers"]
        jobs = [(n, t) for n in arguments.layers for t in arguments.tokens]
        for process in [subprocess.Popen([*command, name, "--tokens", str(t)]) for name, t in jobs]:
            process.wait()
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    cells: list[dict[str, Any]] = []
    for name in arguments.layers:
        up, down = projections(LAYERS[name])
        for tokens in arguments.tokens:
            measure = paths if arguments.paths else sweep
            cells += measure(LAYERS[name], tokens, arguments.rep, up, down)
    for key in dict.fromkeys((c["layer"], c["tokens"], c["gemm"]) for c in cells if arguments.rep):
        mine = [c for c in cells if (c["layer"], c["tokens"], c["gemm"]) == key]
        best = sorted((c["ms"], c["tiles"]) for c in mine if "ms" in c)[:5]
        failed = [(c["tiles"], c["failed"]) for c in mine if "failed" in c]
        print(*key, " | ".join(f"{tiles} {ms:.4f}" for ms, tiles in best), failed[:2], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
