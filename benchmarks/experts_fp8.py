"""Time the fp8 experts op against vLLM's block-fp8 kernel and DeepGEMM, on one GPU.

Run ``MOE_COMPILE_DEEP_GEMM=carried/deep_gemm_home python benchmarks/experts_fp8.py --out FILE.json`` after
``python benchmarks/carry.py WHEEL``. The layers, inputs and method are those of ``experts.py``; weights are quantised
by blocks of 128 x 128, rows by 128 columns. Every output is checked against float32 products of the same rounded
operands before it is timed. The limit counts one byte per weight and the rate of ``torch._scaled_mm``.

Peers: ``ours`` (what the op chooses), ``triton`` and ``dg32``, ``dg64``, ``dg128`` (our two families by name, the
latter with blocks of so many rows), ``w8a16`` (ours, rows not quantised), ``bf16`` (ours, weights in bfloat16),
``vllm_fp8`` (vLLM's Triton kernel, the fastest of three settings, the first of which vLLM has without a tuned file).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from experts import MARK, SIDE_BY_SIDE, ceilings, collect, graphed, inputs, poison, text, versions, weights
from peers import LAYERS, TOKENS, Layer, Program, route
from torch import Tensor

import moe_compile.ops
from moe_compile.deepgemm import experts as deepgemm
from moe_compile.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows

PEERS = ("ours", "triton", "dg32", "dg64", "dg128", "w8a16", "bf16", "vllm_fp8")
SAMPLE = 256
# Against rounded rows, which two peers do not round; a sum that differs a little can round to another fp8 neighbour.
MAX_ERROR = {"w8a16": 0.08, "bf16": 0.08}
LIMIT_ERROR = 0.03
STANDARD = deepgemm.ROWS_PER_EXPERT
SILU = [1.0, float("inf"), float("inf"), float("inf"), 0.0]
Weights = dict[str, Tensor]


def quantised(layer: Layer, unquantised: bool) -> Weights:
    """``q1, s1, q2, s2`` in fp8 with scales, and ``w1, w2`` in bfloat16 where they are needed."""
    w1, w2 = weights(layer)
    (q1, s1), (q2, s2) = quantize_blocks(w1), quantize_blocks(w2)
    both = {"w1": w1, "w2": w2} if unquantised else {}
    return {**both, "q1": q1, "s1": s1, "q2": q2, "s2": s2}


def build(name: str, layer: Layer, w: Weights) -> Program:
    """The program of a peer."""
    if name == "vllm_fp8":
        import wheel_peers

        return wheel_peers.build(name, layer, (w["q1"], w["s1"]), (w["q2"], w["s2"]))
    kernels = {"ours": "auto", "w8a16": "triton", "bf16": ""}.get(name, "deepgemm" if name[:2] == "dg" else name)
    deepgemm.ROWS_PER_EXPERT = ((int(name[2:]), 0),) if name[:2] == "dg" else STANDARD

    def program(x: Tensor, logits: Tensor) -> Tensor:
        weight, ids = route(logits, layer.K)
        out: Tensor
        if name == "bf16":
            out = torch.ops.moe_compile.experts(
                x, weight, ids, [w["w1"]], [], [w["w2"]], [], [], [], "silu", SILU, True
            )
        else:
            out = torch.ops.moe_compile.experts_fp8(
                x, weight, ids, w["q1"], w["s1"], w["q2"], w["s2"], "silu", SILU, True,
                quantise=name != "w8a16", kernels=kernels,
            )  # fmt: skip
        return out

    return torch.compile(program, backend="moe_compile", dynamic=False)


def reference(layer: Layer, w: Weights, x: Tensor, logits: Tensor) -> Tensor:
    """The same in float32 on rounded rows, expert by expert."""
    weight, ids = route(logits, layer.K)
    out = torch.zeros(x.shape[0], layer.H, device=x.device)
    x = dequantize_rows(*quantize_rows(x))
    for e in range(layer.E):
        token, slot = torch.where(ids == e)
        if token.numel():
            gate, up = (x[token] @ dequantize_blocks(w["q1"][e], w["s1"][e]).t()).chunk(2, dim=-1)
            rows = dequantize_rows(*quantize_rows(torch.nn.functional.silu(gate) * up))
            y = rows @ dequantize_blocks(w["q2"][e], w["s2"][e]).t()
            out.index_add_(0, token, y * weight[token, slot, None])
    return out


def limit_ms(layer: Layer, tokens: int, hit: int, copy_tbs: float, fp8_tflops: float) -> float:
    """Physical limit: one byte per weight and its scales at the rate of a copy, or the arithmetic."""
    moved = hit * 3 * layer.H * layer.I * (1 + 4 / 128**2) + 2 * tokens * layer.H * 2 + tokens * layer.E * 4
    flops = 6 * tokens * layer.K * layer.H * layer.I
    return max(moved / copy_tbs, flops / fp8_tflops) / 1e9


def fp8_tflops() -> float:
    """Ten 8192**3 products of fp8 with one scale, after a rest."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    torch._scaled_mm(a, b.t(), one, one, **options)
    torch.cuda.synchronize()
    time.sleep(1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        torch._scaled_mm(a, b.t(), one, one, **options)
    end.record()
    torch.cuda.synchronize()
    return round(10 * 2 * n**3 / start.elapsed_time(end) / 1e9, 1)


def error_of(name: str, out: Tensor, layer: Layer, w: Weights, x: Tensor, logits: Tensor) -> float:
    """Relative L2 error on a sample of the tokens; infinite if any output is not finite."""
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    pick = torch.randperm(x.shape[0], device="cuda")[:SAMPLE]
    expected = reference(layer, w, x[pick], logits[pick])
    error = float((out[pick].float() - expected).norm() / expected.norm())
    if not error <= MAX_ERROR.get(name, LIMIT_ERROR):
        raise ArithmeticError(f"relative error {error:.3g}")
    return error


def measure(name: str, layer: Layer, w: Weights, x: Tensor, logits: Tensor, rep: int) -> dict[str, Any]:
    """One cell: ``{"ms", "error", "repeats", "graph"}``."""
    from triton.testing import do_bench

    program = build(name, layer, w)
    program(x, logits)
    poison()
    out = program(x, logits)
    cell = {"error": error_of(name, out, layer, w, x, logits), "repeats": torch.equal(out, program(x, logits))}
    if x.shape[0] > 128:
        ms = do_bench(lambda: program(x, logits), warmup=25, rep=rep, return_mode="median")
        return {**cell, "ms": ms, "graph": False}
    graph, out = graphed(program, x, logits)
    out.fill_(float("nan"))
    graph.replay()
    error_of(name, out, layer, w, x, logits)
    return {**cell, "ms": do_bench(graph.replay, warmup=25, rep=rep, return_mode="median"), "graph": True}


def run_layer(layer: Layer, arguments: argparse.Namespace) -> None:
    """Child process: print one marked JSON line per cell."""
    torch.backends.cuda.matmul.allow_tf32 = False
    w = quantised(layer, "bf16" in arguments.peers)
    for count in arguments.tokens:
        x, logits = inputs(layer, count, "normal")
        hit = int(torch.topk(logits, layer.K, dim=-1).indices.unique().numel())
        for name in arguments.peers:
            torch._dynamo.reset()
            moe_compile.ops.calls.kind_of.cache_clear()  # the choice of kernels is made anew
            cell: dict[str, Any] = {"layer": layer.name, "tokens": count, "peer": name, "hit": hit}
            try:
                if arguments.compile_only:
                    build(name, layer, w)(x, logits)
                else:
                    cell.update(measure(name, layer, w, x, logits, arguments.rep))
            except Exception as error:  # one failing peer must not end the run
                cell["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            torch.cuda.empty_cache()
            print(MARK + json.dumps(cell), flush=True)


def child(layer: str, arguments: argparse.Namespace, peers: list[str], compile_only: bool) -> subprocess.Popen[str]:
    """Start a process for one layer."""
    command = [sys.executable, __file__, "--child", "--layers", layer, "--peers", ",".join(peers)]
    command += ["--tokens", ",".join(map(str, arguments.tokens)), "--rep", str(arguments.rep)]
    return subprocess.Popen(command + ["--compile-only"] * compile_only, stdout=subprocess.PIPE, text=True)


def summary(cells: list[dict[str, Any]], peers: list[str], rates: dict[str, float]) -> dict[str, Any]:
    """``{"columns", "rows"}`` with ours against the best of the others that quantise rows."""
    columns = ["layer", "T", "experts hit", "limit ms", *peers, "vllm_fp8 / ours", "ours / limit"]
    rows = []
    for key in dict.fromkeys((c["layer"], c["tokens"]) for c in cells):
        found = {c["peer"]: c for c in cells if (c["layer"], c["tokens"]) == key}
        hit = next(iter(found.values()))["hit"]
        limit = limit_ms(LAYERS[key[0]], key[1], hit, rates["copy_tbs"], rates["fp8_tflops"])
        ms = {name: found[name]["ms"] for name in peers if "ms" in found.get(name, {})}
        shown = [f"{ms[n]:.4f}" if n in ms else ("failed" if n in found else "-") for n in peers]
        gain = f"{ms['vllm_fp8'] / ms['ours']:.2f}" if "vllm_fp8" in ms and "ours" in ms else "-"
        rows.append([*key, hit, f"{limit:.4f}", *shown, gain, f"{ms['ours'] / limit:.2f}" if "ours" in ms else "-"])
    return {"columns": columns, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=lambda s: s.split(","), default=list(LAYERS))
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=list(TOKENS))
    parser.add_argument("--peers", type=lambda s: s.split(","), default=list(PEERS), help=f"default {','.join(PEERS)}")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rep", type=int, default=40, help="milliseconds of timed runs per cell")
    parser.add_argument("--seconds", type=float, default=480, help="no layer is started after this time")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_layer(LAYERS[arguments.layers[0]], arguments)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/experts_fp8.py needs a GPU", file=sys.stderr)
        return 1
    from moe_compile.deepgemm.provider import Provider, find

    start = time.monotonic()
    cache = tempfile.mkdtemp(prefix="moe_compile_bench_")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "DG_JIT_CACHE_DIR"):
        os.environ.setdefault(name, os.path.join(cache, name.lower()))
    provider = find()
    print("DeepGEMM:", provider.name if isinstance(provider, Provider) else provider)

    def warm(one: tuple[str, str]) -> None:
        collect(child(one[0], arguments, [one[1]], True), arguments.seconds / 2 - (time.monotonic() - start))

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        list(pool.map(warm, [(layer, name) for layer in arguments.layers for name in arguments.peers]))
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    rates = {**ceilings(), "fp8_tflops": fp8_tflops()}
    torch.cuda.empty_cache()
    deep = provider.version if isinstance(provider, Provider) else "none"
    machine = {**versions(), "deep_gemm": deep, **rates}
    cells: list[dict[str, Any]] = []
    for layer in arguments.layers:
        left = arguments.seconds - (time.monotonic() - start)
        if left <= 0:
            print(f"out of time before {layer}", flush=True)
            break
        cells += collect(child(layer, arguments, arguments.peers, False), left)
        result = {"machine": machine, "cells": cells, "table": summary(cells, arguments.peers, rates)}
        if arguments.out:  # after each layer: a run that is cut off leaves what it has
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{layer} done after {time.monotonic() - start:.0f} s", flush=True)
    print(text(summary(cells, arguments.peers, rates)))
    for cell in cells:
        if "failed" in cell:
            print(f"failed: {cell['layer']} T={cell['tokens']} {cell['peer']}: {cell['failed']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
