"""How far fp8 experts are from float64, on the CPU: ``python benchmarks/fp8_accuracy.py --out FILE.json``.

Random layers, weights and rows from N(0, 1), weights scaled by the fan-in. Relative L2 errors of the op's output, in
bfloat16, against float64 products of two sets of weights: those that the fp8 values and their scales stand for (what a
checkpoint in fp8 means), and those that were quantised (what quantising a bfloat16 checkpoint would cost).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import moe_compile.ops  # noqa: F401  (registers torch.ops.moe_compile)
from moe_compile.quantize import dequantize_blocks, quantize_blocks
from moe_compile.spec import Activation, Experts, MoE, Weight

E, K, T = 8, 2, 64
SIZES = {"qwen3-30b-a3b": (2048, 768), "deepseek-v3": (7168, 2048)}
ACT = Activation()


def truth(x: Tensor, weights: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    experts = Experts(E, w2.shape[1], w2.shape[2], Weight((w1,), True), Weight((w2,), True))
    return MoE(x, ids, weights, K, experts).reference(torch.float64)


def error(ours: Tensor, expected: Tensor) -> str:
    return f"{float((ours.double() - expected).norm() / expected.norm()):.4f}"


def rows_of(name: str, H: int, I: int) -> list[list[str]]:
    """One line per scheme: name, scheme, error against the fp8 weights, error against the original ones."""
    g = torch.Generator().manual_seed(0)
    w1 = (torch.randn(E, 2 * I, H, generator=g) / H**0.5).bfloat16()
    w2 = (torch.randn(E, H, I, generator=g) / I**0.5).bfloat16()
    x = torch.randn(T, H, generator=g).bfloat16()
    weights, ids = torch.randn(T, E, generator=g).softmax(-1).topk(K)
    (q1, s1), (q2, s2) = quantize_blocks(w1), quantize_blocks(w2)
    meant = truth(x, weights, ids, dequantize_blocks(q1, s1), dequantize_blocks(q2, s2))
    original = truth(x, weights, ids, w1, w2)
    op, op_fp8 = torch.ops.moe_compile.experts, torch.ops.moe_compile.experts_fp8
    bf16 = op(x, weights, ids, [w1], [], [w2], [], [], [], ACT.name, ACT.args(), True)
    lines = [[name, "bf16 weights, bf16 rows", "-", error(bf16, original)]]
    for scheme, quantise in (("fp8 weights, bf16 rows (w8a16)", False), ("fp8 weights, fp8 rows (w8a8)", True)):
        ours = op_fp8(x, weights, ids, q1, s1, q2, s2, ACT.name, ACT.args(), True, quantise=quantise)
        lines.append([name, scheme, error(ours, meant), error(ours, original)])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    path = parser.parse_args().out
    rows = [line for name, sizes in SIZES.items() for line in rows_of(name, *sizes)]
    columns = ["sizes of", "scheme", "error, weights as fp8 means them", "error, weights before fp8"]
    machine = {"torch": torch.__version__, "device": "cpu", "E": E, "K": K, "T": T}
    path.write_text(json.dumps({"machine": machine, "table": {"columns": columns, "rows": rows}}, indent=1) + "\n")
    for line in [columns, *rows]:
        print(" | ".join(line))


if __name__ == "__main__":
    main()
