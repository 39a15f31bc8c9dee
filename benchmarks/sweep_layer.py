"""Time whole layers under several plans on one GPU: ``python benchmarks/sweep_layer.py``.

For the numbers of tokens between the regimes, where the choice of the path, the height of the tiles and the routing
play together. CUDA-graph replays with a cleared L2 cache, the plans in turn for three rounds, medians; every output is
checked against that of the plan in force. A first phase compiles in parallel processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from experts import ROUTINGS, graphed, inputs
from peers import LAYERS, Layer, route
from sweep_prefill import MAX_ERROR, difference, projections

from moe_compile.kernels.config import DECODE_IDS, Plan, Tiles, power_of_two
from moe_compile.kernels.experts import device_of, follow_plan, plan_of
from moe_compile.kernels.tile import Projection

ROUNDS = 3
SHARDS = 4
SHORT = Tiles(64, 128, 128, 4, 4, swap=True, tail=2, evict="evict_first")
ROW = Tiles(64, 128, 128, 4, 4, swap=True, tail=2, group=4)
LADDER = Tiles(64, 128, 128, 4, 4, swap=True, group=2, tma=True, ladder=True)
TALL = Tiles(128, 256, 64, 8, 4, swap=True, group=4, tma=True, ladder=True)


def both(path: str, tiles: Tiles) -> Plan:
    return Plan(path, tiles, tiles)


PLANS = {
    "decode 32": Plan("decode", replace(SHORT, bm=32, tail=1, stages=5), replace(SHORT, bm=32, tail=1)),
    "decode 64": both("decode", SHORT),
    "decode 64 w8": both("decode", replace(SHORT, warps=8)),
    "sorted 64 k64": both("sorted", replace(ROW, wn=256, bk=64, warps=8)),
    "sorted 64 k128": both("sorted", ROW),
    "sorted 128 k128": both("sorted", replace(ROW, bm=128, warps=8, stages=3)),
    "sorted 128 k64": both("sorted", replace(ROW, bm=128, wn=256, bk=64, warps=8)),
    "ladder 64 k128": both("sorted", LADDER),
    "ladder 64 k128 g4": both("sorted", replace(LADDER, group=4)),
    "ladder 128 k128": both("sorted", replace(TALL, wn=128, bk=128, stages=3)),
    "ladder 128 k64": both("sorted", TALL),
}


def sweep(
    layer: Layer, tokens: int, routing: str, up: Projection, down: Projection, shard: int | None
) -> dict[str, Any]:
    """Microseconds per plan and round; with a shard nothing is timed, only its share of the plans compiled."""
    from triton.testing import do_bench

    x, logits = inputs(layer, tokens, routing)
    weights, ids = route(logits, layer.K)

    def run(plan: Plan) -> torch.Tensor:
        out: torch.Tensor = follow_plan(plan, x, weights, ids, layer.E, up, down, False, None)
        return out

    now = plan_of(ids, layer.E, up, down, None, device_of(0))
    expected = run(now)
    graphs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for i, (name, plan) in enumerate({"in force": now, **PLANS}.items()):
        if shard is not None and i % SHARDS != shard:
            continue
        if plan.path == "decode" and power_of_two(tokens) * power_of_two(layer.K) > DECODE_IDS:
            continue
        try:
            error = difference(run(plan), expected)
            if error > MAX_ERROR:
                failed[name] = f"error {error:.2g}"
            elif shard is None:
                graphs[name] = graphed(lambda *_: run(plan), x, logits)[0]  # noqa: B023
        except Exception as error:  # one plan must not end the run
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS if shard is None else 0):
        for name, graph in graphs.items():
            times[name].append(1e3 * do_bench(graph.replay, warmup=3, rep=12, return_mode="median"))
    cell = {"layer": layer.name, "tokens": tokens, "routing": routing, "path": now.path}
    return {**cell, "us": times, "failed": failed}


def text(cell: dict[str, Any]) -> str:
    medians = {name: median(times) for name, times in cell["us"].items()}
    shown = "; ".join(f"{name} {us:.1f}{'*' if us == min(medians.values()) else ''}" for name, us in medians.items())
    head = f"{cell['layer']} T={cell['tokens']} {cell['routing']}, {cell['path']}: {shown}"
    return "; ".join([head, *(f"{name} failed ({why})" for name, why in cell["failed"].items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=lambda s: s.split(","), default=list(LAYERS))
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[64, 128, 256, 512, 1024])
    parser.add_argument("--routing", choices=ROUTINGS, default="normal")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.shard is None:
        os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="moe_compile_sweep_"))
        rest = ["--tokens", ",".join(map(str, a.tokens)), "--routing", a.routing]
        command = [sys.executable, __file__, *rest, "--layers"]
        jobs = [[*command, name, f"--shard={shard}"] for name in a.layers for shard in range(SHARDS)]
        for process in [subprocess.Popen(job) for job in jobs]:
            process.wait()
    cells = []
    for name in a.layers:
        up, down = projections(LAYERS[name])
        for tokens in a.tokens:
            cells.append(sweep(LAYERS[name], tokens, a.routing, up, down, a.shard))
            if a.shard is None:
                print(text(cells[-1]), flush=True)
        del up, down
        torch.cuda.empty_cache()
    if a.out:
        a.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
