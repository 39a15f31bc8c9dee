"""Time the experts op against what a user would pick today, on one GPU.

Run ``python benchmarks/experts.py --out benchmarks/results/experts_h100.json``; it needs a GPU and
transformers. Every output is checked against a float32 reference before it is timed, with freed memory full
of NaN, and tried for whether a second call gives the same bits. Up to ``--graph-tokens`` tokens CUDA-graph
replays are timed, beyond that eager calls: medians of ``triton.testing.do_bench``, which clears the L2 cache
before each run, ``--runs`` of them or more. The limit comes from a copy and a matrix product timed in the same
run. One process per layer; a peer that fails is a row, not the end. The peers ``vllm``, ``vllm_best``, ``tk`` and
``dg_bf16`` are used from a vLLM wheel that ``python benchmarks/carry.py WHEEL`` has unpacked. A first phase
compiles every program in parallel processes, so that the timed phase finds warm caches; ``hand_ma`` finds its
kernels there, but measures them again by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peers import (
    DEFAULT_PEERS,
    HF_COMPILED,
    LAYERS,
    PEERS,
    TOKENS,
    Layer,
    Program,
    applies,
    build,
    compiles,
    reference,
)
from torch import Tensor

SIDE_BY_SIDE = 10  # processes that compile: each holds the weights of a layer
ROUTINGS = ("normal", "zipf", "one")
SAMPLE = 384
MAX_ERROR = 0.02
MARK = "RESULT "


def weights(layer: Layer) -> tuple[Tensor, Tensor]:
    """Random ``w1 [E, 2I, H]`` and ``w2 [E, H, I]`` in bf16, scaled by the fan-in."""
    torch.manual_seed(0)
    w1 = torch.empty(layer.E, 2 * layer.I, layer.H, dtype=torch.bfloat16, device="cuda")
    w2 = torch.empty(layer.E, layer.H, layer.I, dtype=torch.bfloat16, device="cuda")
    return w1.normal_(0, layer.H**-0.5), w2.normal_(0, layer.I**-0.5)


def inputs(layer: Layer, tokens: int, routing: str) -> tuple[Tensor, Tensor]:
    """``x [T, H]`` in bf16 and router logits ``[T, E]`` in float32.

    ``normal``: N(0, 1), a little uneven. ``zipf``: expert number r is chosen as if with probability 1/r, without
    replacement (Gumbel's trick). ``one``: all tokens choose the same K experts.
    """
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    x = torch.randn(tokens, layer.H, generator=generator, device="cuda").bfloat16()
    logits = torch.randn(tokens, layer.E, generator=generator, device="cuda")
    rank = torch.arange(1, layer.E + 1, device="cuda")
    if routing == "zipf":
        uniform = torch.rand(tokens, layer.E, generator=generator, device="cuda").clamp_min(1e-7)
        logits = -rank.log() - (-uniform.log()).log()
    elif routing == "one":
        logits = logits + 100.0 * (rank <= layer.K)
    return x, logits


def ceilings() -> dict[str, float]:
    """What this GPU reaches now: a copy of 4 GiB (TB/s, read and written), ten 8192**3 products after a rest, and
    many of them (TFLOP/s)."""
    from triton.testing import do_bench

    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    a @ b
    torch.cuda.synchronize()
    time.sleep(1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    flops = 2 * 8192**3
    sustained_ms = do_bench(lambda: a @ b, rep=300, return_mode="median")
    rates = {
        "copy_tbs": 2 * source.nbytes / copy_ms / 1e9,
        "dense_tflops": 10 * flops / start.elapsed_time(end) / 1e9,
        "sustained_tflops": flops / sustained_ms / 1e9,
    }
    return {name: round(rate, 3) for name, rate in rates.items()}


def poison() -> None:
    """Leave NaN in the memory that the next calls will be given."""
    free, _ = torch.cuda.mem_get_info()
    sizes = [min(8 << 30, free // 3), *[256 << 20] * 4, *[1 << 19] * 64]
    blocks = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes]
    torch.cuda.synchronize()
    del blocks


def relative_error(out: Tensor, layer: Layer, w1: Tensor, w2: Tensor, x: Tensor, logits: Tensor) -> float:
    """Relative L2 error on all tokens, or a sample of them; infinite if any output is not finite."""
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    pick = torch.randperm(x.shape[0], device="cuda")[:SAMPLE]
    expected = reference(layer, w1, w2, x[pick], logits[pick])
    return float((out[pick].float() - expected).norm() / expected.norm())


def graphed(program: Program, x: Tensor, logits: Tensor) -> tuple[Any, Tensor]:
    """A CUDA graph of one call, and the tensor that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            program(x, logits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = program(x, logits)
    return graph, out


def median_ms(call: Callable[[], object], rep: int, runs: int) -> float:
    """Milliseconds of a call: the median of as many as fill ``rep`` milliseconds, and of ``runs`` at least."""
    from triton.testing import do_bench

    once: float = do_bench(call, warmup=1, rep=1, return_mode="median")
    ms: float = do_bench(call, warmup=25, rep=max(rep, runs * once), return_mode="median")
    return ms


def measure(
    name: str, layer: Layer, w1: Tensor, w2: Tensor, x: Tensor, logits: Tensor, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One cell: ``{"ms", "error", "repeats", "peak_mib", "graph"}``; the peak is that of one call, without weights."""
    program = build(name, layer, w1, w2)
    program(x, logits)
    poison()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = program(x, logits)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    error, repeats = relative_error(out, layer, w1, w2, x, logits), torch.equal(out, program(x, logits))
    if not error <= MAX_ERROR:
        return {"failed": f"relative error {error:.3g}"}
    cell = {"error": error, "repeats": repeats, "peak_mib": round(peak, 2)}
    # The eager loop reads sizes back to the host, which a graph cannot hold.
    if x.shape[0] > arguments.graph_tokens or name == "hf_eager":
        ms = median_ms(lambda: program(x, logits), arguments.rep, arguments.runs)
        return {**cell, "ms": ms, "graph": False}
    graph, out = graphed(program, x, logits)
    out.fill_(float("nan"))
    graph.replay()
    error = relative_error(out, layer, w1, w2, x, logits)
    if not error <= MAX_ERROR:
        return {"failed": f"relative error {error:.3g} in a graph replay"}
    ms = median_ms(graph.replay, arguments.rep, arguments.runs)
    return {**cell, "ms": ms, "graph": True}


def run_layer(layer: Layer, arguments: argparse.Namespace) -> None:
    """Child process: print one marked JSON line per cell."""
    torch.backends.cuda.matmul.allow_tf32 = False
    w1, w2 = weights(layer)
    for count in arguments.tokens:
        x, logits = inputs(layer, count, arguments.routing)
        hit = int(torch.topk(logits, layer.K, dim=-1).indices.unique().numel())
        for name in arguments.peers:
            if not applies(name, layer, count):
                continue
            torch._dynamo.reset()
            cell: dict[str, Any] = {"layer": layer.name, "tokens": count, "peer": name, "hit": hit}
            try:
                if arguments.compile_only:
                    build(name, layer, w1, w2)(x, logits)
                else:
                    cell.update(measure(name, layer, w1, w2, x, logits, arguments))
            except Exception as error:  # one failing peer must not end the run
                cell["failed"] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                )
            torch.cuda.empty_cache()
            print(MARK + json.dumps(cell), flush=True)


def child(
    layer: str, arguments: argparse.Namespace, peers: list[str], tokens: list[int], compile_only: bool
) -> subprocess.Popen[str]:
    """Start a process for one layer."""
    command = [sys.executable, __file__, "--child", "--layers", layer, "--peers", ",".join(peers)]
    command += ["--tokens", ",".join(map(str, tokens)), "--rep", str(arguments.rep), "--runs", str(arguments.runs)]
    command += ["--routing", arguments.routing, "--graph-tokens", str(arguments.graph_tokens)]
    environment = dict(os.environ)
    if compile_only:
        command.append("--compile-only")
        if "hand_ma" in peers:  # what it measures beside other processes must not be found again
            environment["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="moe_compile_bench_")
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def collect(process: subprocess.Popen[str], seconds: float) -> list[dict[str, Any]]:
    """The cells that a child printed before it ended or its time was up."""
    try:
        text, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    return [json.loads(line[len(MARK) :]) for line in text.splitlines() if line.startswith(MARK)]


def summary(cells: list[dict[str, Any]], peers: list[str], rates: dict[str, float]) -> dict[str, Any]:
    """``{"columns", "rows"}`` with ours against the best of Hugging Face's compiled implementations and of all."""
    ratios = ["best HF compiled / ours", "best peer / ours", "ours / limit"]
    columns = ["layer", "T", "experts hit", "limit ms", *peers, *ratios]
    rows = []
    for key in dict.fromkeys((c["layer"], c["tokens"]) for c in cells):
        found = {c["peer"]: c for c in cells if (c["layer"], c["tokens"]) == key}
        hit = next(iter(found.values()))["hit"]
        limit = LAYERS[key[0]].limit_ms(key[1], hit, rates["copy_tbs"], rates["dense_tflops"])
        times = {name: found[name]["ms"] for name in peers if "ms" in found.get(name, {})}
        shown = [f"{times[n]:.4f}" if n in times else ("failed" if n in found else "-") for n in peers]
        ours = times.pop("ours", None)
        theirs = [min((times[n] for n in names if n in times), default=None) for names in (HF_COMPILED, times)]
        gains = [f"{best / ours:.2f}" if best and ours else "-" for best in theirs]
        rows.append([key[0], key[1], hit, f"{limit:.4f}", *shown, *gains, f"{ours / limit:.2f}" if ours else "-"])
    return {"columns": columns, "rows": rows}


def text(table: dict[str, Any]) -> str:
    """Aligned plain text."""
    lines = [table["columns"], *table["rows"]]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(str(c).rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def versions() -> dict[str, Any]:
    import transformers
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(LAYERS)
    parser.add_argument(
        "--layers", type=lambda s: s.split(","), default=list(LAYERS), help=f"default {names}"
    )
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=list(TOKENS))
    parser.add_argument(
        "--peers",
        type=lambda s: s.split(","),
        default=list(DEFAULT_PEERS),
        help=f"default {','.join(DEFAULT_PEERS)}; also {','.join(PEERS[len(DEFAULT_PEERS) :])}",
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--quick", action="store_true", help="olmoe with 1, 128 and 4096 tokens")
    parser.add_argument("--routing", choices=ROUTINGS, default="normal", help="default normal")
    parser.add_argument(
        "--graph-tokens", type=int, default=128, metavar="T", help="up to here graph replays; default 128"
    )
    parser.add_argument("--rep", type=int, default=80, help="milliseconds of timed runs per cell")
    parser.add_argument("--runs", type=int, default=25, help="timed runs per cell at least; default 25")
    parser.add_argument("--seconds", type=float, default=480, help="no layer is started after this time")
    parser.add_argument("--cold", action="store_true", help="leave out the parallel compile phase")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.tokens = ["olmoe"], [1, 128, 4096]
    for given, known in ((arguments.layers, LAYERS), (arguments.peers, PEERS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return arguments


def main() -> int:
    arguments = arguments_of()
    if arguments.child:
        run_layer(LAYERS[arguments.layers[0]], arguments)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/experts.py needs a GPU", file=sys.stderr)
        return 1
    start = time.monotonic()
    cache = tempfile.mkdtemp(prefix="moe_compile_bench_")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, os.path.join(cache, name.lower()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not arguments.cold:
        compiled = [(layer, name) for layer in arguments.layers for name in arguments.peers if compiles(name)]
        together = [(*both, arguments.tokens) for both in compiled if both[1] != "hand_ma"]
        # compiled one by one
        alone = [(*both, [count]) for both in compiled if both[1] == "hand_ma" for count in arguments.tokens]

        def warm(one: tuple[str, str, list[int]]) -> None:
            layer, name, tokens = one
            process = child(layer, arguments, [name], tokens, True)
            collect(process, arguments.seconds / 3 - (time.monotonic() - start))

        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            list(pool.map(warm, [*together, *alone]))
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    cells: list[dict[str, Any]] = []
    rates = ceilings()
    torch.cuda.empty_cache()
    machine = {**versions(), **rates, "routing": arguments.routing, "graph_tokens": arguments.graph_tokens}
    result: dict[str, Any] = {"machine": machine, "cells": cells, "table": summary(cells, arguments.peers, rates)}
    for layer in arguments.layers:
        left = arguments.seconds - (time.monotonic() - start)
        if left <= 0:
            print(f"out of time before {layer}", flush=True)
            break
        cells += collect(child(layer, arguments, arguments.peers, arguments.tokens, False), left)
        result["table"] = summary(cells, arguments.peers, rates)
        if arguments.out:  # after each layer: a run that is cut off leaves what it has
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{layer} done after {time.monotonic() - start:.0f} s", flush=True)
    print(text(result["table"]))
    for cell in cells:
        if "failed" in cell:
            print(f"failed: {cell['layer']} T={cell['tokens']} {cell['peer']}: {cell['failed']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
