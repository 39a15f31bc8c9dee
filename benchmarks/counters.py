"""Hardware counters of the kernels of the experts op, by Nsight Compute: ``python benchmarks/counters.py``.

Needs ``ncu`` on the PATH. The kernels run one after the other with a cold cache each, as ncu replays them, so their
times are no measure of the whole layer: the counters say how near each comes to the memory or to the tensor cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "CASE "
CASES = [
    ("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 128), ("qwen3-30b-a3b", 1024), ("qwen3-30b-a3b", 4096),
    ("mixtral-8x7b", 1), ("mixtral-8x7b", 1024), ("mixtral-8x7b", 16384), ("deepseek-v3", 4096),
]  # fmt: skip
METRICS = {
    "us": "gpu__time_duration.sum",
    "memory %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "read MB": "dram__bytes_read.sum",
    "written MB": "dram__bytes_write.sum",
    "tensor cores %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "L2 hits %": "lts__t_sector_hit_rate.pct",
    "registers": "launch__registers_per_thread",
}
SCALE = {"us": 1e-3, "read MB": 1e-6, "written MB": 1e-6}  # from the base units that ncu is asked for


def child() -> None:
    """Run every case once inside the profiled range, and say which kernels it launches."""
    import torch
    from peers import LAYERS, route
    from sweep_prefill import projections

    from moe_compile.kernels.experts import device_of, follow_plan, plan_of
    from moe_compile.kernels.launch import Launch, Start

    class Watched(Start):
        """Launches, and keeps the kernels' names."""

        def __init__(self) -> None:
            self.seen: list[str] = []

        def __call__(self, make: Callable[[], Launch], *args: Any) -> None:
            launch = make()
            self.seen.append(launch.kernel.__name__)
            super().__call__(lambda: launch, *args)

    for name, tokens in CASES:
        layer = LAYERS[name]
        up, down = projections(layer)
        torch.manual_seed(tokens)
        x = torch.randn(tokens, layer.H, device="cuda").bfloat16()
        weights, ids = route(torch.randn(tokens, layer.E, device="cuda"), layer.K)
        plan = plan_of(ids, layer.E, up, down, None, device_of(0))
        start = Watched()
        for profiled in (False, True):  # the first call compiles
            start.seen.clear()
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.cudart().cudaProfilerStart()
            follow_plan(plan, x, weights, ids, layer.E, up, down, False, None, start)
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.cudart().cudaProfilerStop()
        print(MARK + json.dumps({"layer": name, "tokens": tokens, "kernels": start.seen}), flush=True)
        del up, down
        torch.cuda.empty_cache()


def parse(log: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per kernel from ncu's CSV, in the order of the launches.

    Raises:
        ValueError: ncu saw other kernels than were launched.
    """
    lines = [line for line in log.splitlines() if line.startswith('"')]
    found = list(csv.DictReader(lines))[1:]  # after the names comes a line of units
    launched = [(case, kernel) for case in cases for kernel in case["kernels"]]
    if [row["Kernel Name"] for row in found] != [kernel for _, kernel in launched]:
        raise ValueError(f"ncu saw {[row['Kernel Name'] for row in found]}, launched were {launched}")
    records = []
    for row, (case, kernel) in zip(found, launched, strict=True):
        values = {
            name: float(row[metric].replace(",", "")) * SCALE.get(name, 1.0) for name, metric in METRICS.items()
        }
        records.append({"layer": case["layer"], "tokens": case["tokens"], "kernel": kernel, **values})
    return records


def table(records: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [[r["layer"], r["tokens"], r["kernel"], *(f"{r[name]:.0f}" for name in METRICS)] for r in records]
    return {"columns": ["layer", "T", "kernel", *METRICS], "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += ["--profile-from-start", "off", "--clock-control", "none", "--metrics", ",".join(METRICS.values())]
        done = subprocess.run(
            [*command, sys.executable, __file__, "--child"], stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        lines = done.stdout.splitlines()
        cases = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
        if done.returncode or len(cases) != len(CASES):
            print(done.stdout, log.read_text() if log.exists() else "", sep="\n", file=sys.stderr)
            return 1
        records = parse(log.read_text(), cases)
    import torch
    import triton

    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    result: dict[str, Any] = {"machine": machine, "kernels": records, "table": table(records)}
    for row in result["table"]["rows"]:
        print(*row, sep="  ")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
