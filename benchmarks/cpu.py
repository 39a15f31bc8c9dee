"""Experts on CPU: ``torch.ops.moe_compile.experts`` against the ``grouped_mm`` of transformers, both compiled.

    python benchmarks/cpu.py [--out benchmarks/results/cpu.json] [--seconds 4]

One Qwen3-MoE-like layer (E=64, K=8, H=512, I=256). The baseline is ``Qwen3MoeExperts`` with
``_experts_implementation="grouped_mm"`` under ``torch.compile`` (Inductor, static shapes, no_grad); ours is
a compiled function that calls the op with the same stacked weights. Both are judged by float64 first:
the relative L2 error of ours may be twice that of the baseline plus a floor. Every round then times both,
in turns, with new routing of the same shape, so noise on the machine meets both alike and no expert
stays in cache by luck; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_compile.ops  # noqa: F401  registers the ops
from moe_compile.spec import Activation, Experts, MoE, Weight

E, K, H, I = 64, 8, 512, 256
TOKENS = (1, 64, 512)
DTYPES = (torch.float32, torch.bfloat16)
FLOOR = {torch.float32: 1e-7, torch.bfloat16: 1e-3}
ROUTINGS = 16
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


def baseline(dtype: torch.dtype) -> Qwen3MoeExperts:
    """The experts module of transformers with random weights of unit gain."""
    config = Qwen3MoeConfig(num_experts=E, num_experts_per_tok=K, hidden_size=H, moe_intermediate_size=I)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config)
    with torch.no_grad():
        module.gate_up_proj.normal_(0, H**-0.5)
        module.down_proj.normal_(0, I**-0.5)
    return module.to(dtype).requires_grad_(False)


def make_inputs(tokens: int, dtype: torch.dtype) -> Inputs:
    """Hidden states, and ids and weights as a softmax router with normalised top-k gives them."""
    weights, ids = torch.randn(tokens, E).softmax(-1).topk(K)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.randn(tokens, H).to(dtype), ids, weights.to(dtype)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def measure(layers: dict[str, Layer], inputs: list[Inputs], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, the layers in turns."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 20 or time.perf_counter() < end:
        arguments = inputs[rounds % len(inputs)]
        order = list(layers.items())
        for name, layer in order if rounds % 2 else reversed(order):
            start = time.perf_counter()
            layer(*arguments)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


def case(dtype: torch.dtype, tokens: int, seconds: float) -> dict[str, Any]:
    """Check, then time, one dtype and number of tokens."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = baseline(dtype)
    w1, w2 = module.gate_up_proj.detach(), module.down_proj.detach()
    act = Activation("silu")

    def experts(hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.moe_compile.experts(
            hidden_states, weights, ids, [w1], [], [w2], [], [], [], act.name, act.args(), True
        )

    layers: dict[str, Layer] = {
        "transformers": torch.compile(module, dynamic=False),
        "moe_compile": torch.compile(experts, dynamic=False),
    }
    inputs = [make_inputs(tokens, dtype) for _ in range(ROUTINGS)]
    hidden_states, ids, weights = inputs[0]
    spec = Experts(E, H, I, Weight((w1,), True), Weight((w2,), True), activation=act)
    exact = MoE(hidden_states, ids, weights, K, spec).reference(torch.float64)
    errors = {name: relative_error(layer(*inputs[0]), exact) for name, layer in layers.items()}
    limit = 2 * errors["transformers"] + FLOOR[dtype]
    if not errors["moe_compile"] <= limit:  # written so that NaN fails
        raise SystemExit(f"{dtype} T={tokens}: error {errors['moe_compile']:.2e} is above {limit:.2e}")
    measure(layers, inputs, min(1.0, seconds / 4))  # warm-up
    times = measure(layers, inputs, seconds)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "rounds": len(times["moe_compile"]),
        "median_ms": {name: 1e3 * t for name, t in medians.items()},
        "quartiles_ms": {name: [1e3 * q for q in statistics.quantiles(t)] for name, t in times.items()},
        "relative_error": errors,
        "speedup": medians["transformers"] / medians["moe_compile"],
    }


def table(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """All cases in the form that ``benchmarks/tables.py`` puts into the docs."""
    columns = ["dtype", "T", "transformers, ms", "moe_compile, ms", "speed-up", "error, theirs", "error, ours"]
    cells = []
    for r in rows:
        ms, err = r["median_ms"], r["relative_error"]
        times = [f"{ms[name]:.2f}" for name in ("transformers", "moe_compile")]
        errors = [f"{err[name]:.1e}" for name in ("transformers", "moe_compile")]
        cells.append([r["dtype"], r["tokens"], *times, f"{r['speedup']:.2f}", *errors])
    return {"columns": columns, "rows": cells}


def markdown(table: dict[str, list[Any]]) -> str:
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def processor() -> str:
    """The processor's name; Linux keeps it where ``platform`` does not look."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Experts on CPU against grouped_mm of transformers, compiled.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--seconds", type=float, default=4.0, help="timing budget of each case")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with torch.no_grad():
        rows = [case(dtype, tokens, options.seconds) for dtype in DTYPES for tokens in TOKENS]
    result: dict[str, Any] = {
        "layer": {"E": E, "K": K, "H": H, "I": I},
        "machine": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "load_before": load,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "table": table(rows),
        "cases": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result["table"]))


if __name__ == "__main__":
    main()
