"""Compile time of a naive layer with many experts: ``backend="inductor"`` against ``backend="moe_compile"``.

``python benchmarks/compile_time.py --out benchmarks/results/compile_time.json``. Each figure is the first
call of a compiled layer in a fresh process with every compile cache off; the run with the median time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

BACKENDS = ("inductor", "moe_compile")
FORMS = ("DenseLoop", "GatherLoop", "GatherLoop (whole)", "StackedLoop")
WHOLE = " (whole)"


def stacked() -> Any:
    """``GatherLoop`` with the weights of all experts in two tensors."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from moe_compile import demo

    class StackedLoop(demo.NaiveMoE):
        def __init__(self, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int) -> None:
            super().__init__(num_experts, top_k, hidden_size, intermediate_size)
            del self.experts
            self.w13 = nn.Parameter(torch.randn(num_experts, 2 * intermediate_size, hidden_size) * hidden_size**-0.5)
            self.w2 = nn.Parameter(torch.randn(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5)

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.route(x)
            out = torch.zeros_like(x)
            for e in range(self.num_experts):
                token, slot = torch.where(ids == e)
                gate, up = F.linear(x[token], self.w13[e]).chunk(2, dim=-1)
                out.index_add_(0, token, F.linear(F.silu(gate) * up, self.w2[e]) * weights[token, slot, None])
            return out

    return StackedLoop


def first_call(form: str, backend: str, sizes: tuple[int, int, int, int], tokens: int) -> dict[str, Any]:
    """Child process: seconds of the first call, and of one warm call."""
    import torch

    from moe_compile import demo
    from moe_compile.backend import moe_compile

    name = form.removesuffix(WHOLE)
    layer = stacked() if name == "StackedLoop" else getattr(demo, name)
    sample = demo.naive(layer, sizes, tokens, torch.device("cpu"), torch.float32)
    chosen: Any = moe_compile if backend == "moe_compile" else backend
    # Inductor's own start-up (imports, the compiler's first run) belongs to no layer.
    torch.compile(lambda x: (x @ x).sin() + 1)(torch.ones(8, 8))
    with torch.no_grad():
        compiled = torch.compile(sample.model, backend=chosen, fullgraph=form.endswith(WHOLE))
        start = time.perf_counter()
        compiled(*sample.args)
        cold = time.perf_counter() - start
        start = time.perf_counter()
        compiled(*sample.args)
        warm = time.perf_counter() - start
    return {
        "form": form,
        "backend": backend,
        "first_call_s": cold,
        "second_call_s": warm,
        "torch": torch.__version__,
    }


def child(form: str, backend: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One fresh process without caches."""
    command = [sys.executable, __file__, "--child", form, backend]
    command += ["--sizes", ",".join(map(str, arguments.sizes)), "--tokens", str(arguments.tokens)]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=arguments.timeout)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"form": form, "backend": backend, "failed": lines[-1] if lines else "no output"}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=lambda s: tuple(map(int, s.split(","))), default=(128, 8, 64, 32))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    parser.add_argument("--forms", type=lambda s: s.split(","), default=list(FORMS))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        form, backend = arguments.child
        print(json.dumps(first_call(form, backend, arguments.sizes, arguments.tokens)))
        return 0
    runs, rows = [], []
    for form in arguments.forms:
        seconds: dict[str, float] = {}
        for backend in BACKENDS:
            found = [child(form, backend, arguments) for _ in range(arguments.repeats)]
            runs += found
            times = [run["first_call_s"] for run in found if "first_call_s" in run]
            if times:
                seconds[backend] = median(times)
        shown = [f"{seconds[b]:.1f} s" if b in seconds else "failed" for b in BACKENDS]
        both = all(b in seconds for b in BACKENDS)
        rows.append([form, *shown, f"{seconds['inductor'] / seconds['moe_compile']:.1f}x" if both else "-"])
        print("  ".join(rows[-1]), flush=True)
    experts, top_k, hidden, inner = arguments.sizes
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": runs[0].get("torch")}
    layer = f"E={experts} K={top_k} H={hidden} I={inner} T={arguments.tokens}"
    table = {"columns": ["form", "inductor", "moe_compile", "inductor / moe_compile"], "rows": rows}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "layer": layer, "runs": runs, "table": table}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("failed" in run for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
