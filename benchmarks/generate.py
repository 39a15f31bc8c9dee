"""Whole Hugging Face models: prefill and ``generate()``, tokens per second, ``inductor`` against ``moe_compile``.

    python benchmarks/generate.py --out benchmarks/results/generate_h200.json

The shapes of published models with random weights and as many layers as ``--layers`` says; no hub. Prefill is one
forward of ``--prompt`` tokens under ``torch.compile``, eager launches. Decoding is ``generate()`` with a static cache,
which compiles one step with CUDA graphs (``mode="reduce-overhead"``) by itself; only the backend differs. Before
anything is timed both must choose the same next tokens where the original is sure of them. A first phase runs all
processes side by side, so that the timed ones find warm caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("inductor", "moe_compile")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, head_dim=128,
             num_attention_heads=32, num_key_value_heads=4, vocab_size=151936, norm_topk_prob=True),
    ),
    "mixtral-8x7b": (
        "mixtral",
        dict(hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2,
             num_attention_heads=32, num_key_value_heads=8, vocab_size=32000),
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        dict(hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4, head_dim=64,
             num_attention_heads=64, num_key_value_heads=8, vocab_size=201088),
    ),
}  # fmt: skip
TINY = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=512, num_experts=8, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
MARK = "RESULT "


def build(name: str, layers: int, device: str, tiny: bool) -> Any:
    """A causal model with random weights, made on the device."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, sizes = MODELS[name]
    own: dict[str, Any] = {**sizes, **(TINY if tiny else {}), "num_hidden_layers": layers, "pad_token_id": 0}
    config = CONFIG_MAPPING[kind](**own)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def seconds(run: Any, device: str, repeats: int) -> float:
    """Median wall time of a call, the device waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def agree(ours: Tensor, theirs: Tensor) -> float:
    """Share of positions whose next token is the same, among those where the margin of ``theirs`` is no rounding."""
    two = theirs.float().topk(2, dim=-1).values
    sure = (two[..., 0] - two[..., 1]) > 0.05 * two[..., 0].abs()
    same = ours.argmax(-1) == theirs.argmax(-1)
    return float(same[sure].float().mean()) if bool(sure.any()) else 1.0


def measure(name: str, backend: str, a: argparse.Namespace) -> dict[str, Any]:
    """One model under one backend, in a process of its own."""
    from transformers import CompileConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(name, a.layers, device, a.tiny)
    ids = torch.randint(1, model.config.vocab_size, (1, a.prompt), device=device)
    row: dict[str, Any] = {"model": name, "backend": backend, "layers": a.layers, "torch": torch.__version__}
    if device == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        start = time.perf_counter()
        out = compiled(input_ids=ids, use_cache=False).logits
        row["prefill_first_call_s"] = time.perf_counter() - start
        row["same_tokens"] = agree(out, model(input_ids=ids, use_cache=False).logits)
        prefill = seconds(lambda: compiled(input_ids=ids, use_cache=False), device, a.repeats)
        row["prefill_tokens_per_s"] = a.prompt / prefill
        config = CompileConfig(backend=backend, mode="reduce-overhead")
        short = ids[:, : min(a.prompt, 64)]

        def generate(new: int) -> Any:
            return model.generate(
                short, max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation="static",
                compile_config=config, max_cache_len=64 + a.new,
            )  # fmt: skip

        generate(a.new)
        generate(a.new)
        few, many = seconds(lambda: generate(4), device, a.repeats), seconds(lambda: generate(a.new), device, a.repeats)
        row["decode_tokens_per_s"] = (a.new - 4) / (many - few)
        row["generate_tokens_per_s"] = a.new / many
    return row


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line per model and measure."""
    out = []
    for name in dict.fromkeys(r["model"] for r in rows):
        by = {r["backend"]: r for r in rows if r["model"] == name and "failed" not in r}
        for what in ("prefill", "decode", "generate"):
            found = [by[b][f"{what}_tokens_per_s"] if b in by else None for b in BACKENDS]
            shown = [f"{v:.0f}" if v else "failed" for v in found]
            out.append([name, what, *shown, f"{found[1] / found[0]:.2f}" if found[0] and found[1] else "-"])
    return {"columns": ["model", "", *(f"{b}, tokens/s" for b in BACKENDS), "moe_compile / inductor"], "rows": out}


def start(name: str, backend: str, a: argparse.Namespace, repeats: int) -> subprocess.Popen[str]:
    """A process for one model under one backend."""
    sizes = [f"--{n}={getattr(a, n)}" for n in ("layers", "prompt", "new")] + ["--tiny"] * a.tiny
    command = [sys.executable, __file__, "--child", name, backend, *sizes, f"--repeats={repeats}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], timeout: float) -> tuple[dict[str, Any] | None, str]:
    """What a process measured, or None and why."""
    try:
        out, err = process.communicate(timeout=max(timeout, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, f"more than {timeout:.0f} s"
    found = [line for line in out.splitlines() if line.startswith(MARK)]
    if found:
        return json.loads(found[0][len(MARK) :]), ""
    return None, (err.strip().splitlines() or ["no output"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda s: s.split(","), default=list(MODELS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill")
    parser.add_argument("--new", type=int, default=68, help="tokens that are generated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a try without a GPU")
    parser.add_argument("--timeout", type=float, default=280, help="seconds for one process, and for the first phase")
    parser.add_argument("--cold", action="store_true", help="leave out the parallel first phase")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        name, backend = a.child
        print(MARK + json.dumps(measure(name, backend, a)))
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cache = tempfile.mkdtemp(prefix="moe_compile_bench_")
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(variable, os.path.join(cache, variable.lower()))
    runs = [(name, backend) for name in a.models for backend in BACKENDS]
    if not a.cold:
        first = [start(name, backend, a, repeats=1) for name, backend in runs]
        deadline = time.monotonic() + a.timeout
        for process in first:
            finish(process, deadline - time.monotonic())
    rows: list[dict[str, Any]] = []
    for name, backend in runs:
        row, why = finish(start(name, backend, a, a.repeats), a.timeout)
        rows.append(row or {"model": name, "backend": backend, "failed": why})
        print(rows[-1], flush=True)
    keys = ("gpu", "torch", "layers")
    machine = {key: rows[0][key] for key in keys if key in rows[0]}
    result = {"machine": machine, "runs": rows, "table": table(rows)}
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
