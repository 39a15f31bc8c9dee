"""One fresh process of ``test_warming_cuda.py``: warm up, then capture, and tell what was compiled or loaded when.

``python warm_child.py hf | naive | fp8``; prints JSON in its last line. Caches are where the environment says.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs

import moe_compile
from moe_compile.kernels.workers import default_workers
from moe_compile.warming import WarmUp

# All regimes of a layer with 16 experts, 4 of them chosen: mean rows per expert are a quarter of the tokens.
TOKENS = (
    1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 127, 160, 161, 255, 320, 333, 512, 777, 1023,
    1024, 1025, 1337, 2048, 3001, 4095, 4096, 5000, 8191, 8192,
)  # fmt: skip
WORKERS = default_workers()
OURS = ("decode_kernel", "grouped_kernel", "gemv_up_kernel", "route_kernel", "place_kernel", "combine_kernel")

asked: list[tuple[str, bool]] = []  # every kernel that Triton compiled or read from its disk cache, in this process


def listen() -> None:
    knobs.compilation.listener = lambda **told: asked.append((told["src"].name, bool(told["cache_hit"])))


def captured(call: Callable[[], Tensor]) -> Tensor:
    """Its result by a graph, captured without a call before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    torch.cuda.synchronize()
    return out


def error(ours: Tensor, other: Tensor) -> float:
    return float((ours.double() - other.double()).norm() / other.double().norm())


def told(result: WarmUp) -> dict[str, Any]:
    return {
        "kernels": result.kernels,
        "compiled": result.compiled,
        "there": result.there,
        "gemms": result.gemms,
        "text": str(result),
        "asked": len({name for name, _ in asked}),
        "compiled here": [name for name, hit in asked if not hit],
    }


def hf() -> dict[str, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = moe_compile.optimize(MixtralForCausalLM(config).bfloat16().eval(), strict=True)
    square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    square @ square  # cuBLAS keeps a workspace, which is no copy of a weight
    before = torch.cuda.memory_allocated()
    result = moe_compile.warmup(model, max_tokens=8192, workers=WORKERS)
    out = {**told(result), "left": torch.cuda.memory_allocated() - before}
    asked.clear()
    experts = next(m for m in model.modules() if type(m).__name__ == "MixtralExperts")
    inputs, results = {}, {}
    with torch.no_grad():
        for tokens in TOKENS:
            x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
            weights, ids = torch.rand(tokens, 16, device="cuda").softmax(-1).topk(4)
            inputs[tokens] = (x, ids, weights)
            results[tokens] = captured(lambda t=tokens: experts(*inputs[t]))
        out["asked in captures"] = list(asked)
        moe_compile.restore(model)
        out["worst"] = max(error(results[t], experts(*inputs[t])) for t in TOKENS)
    return out


def naive() -> dict[str, Any]:
    from moe_compile.demo import DenseLoop

    torch.manual_seed(0)
    model = DenseLoop(16, 4, 512, 256).to("cuda", torch.bfloat16).eval()
    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    out = told(moe_compile.warmup(model, x, max_tokens=512, workers=WORKERS))
    asked.clear()
    compiled = torch.compile(model, backend="moe_compile", dynamic=True)
    with torch.no_grad():
        results = {t: compiled(x := torch.randn(t, 512, device="cuda", dtype=torch.bfloat16)) for t in (3, 8, 40, 500)}
        out["worst"] = error(results[500], model(x))
    # Inductor's own kernels are compiled now; ours are not
    out["asked in captures"] = [each for each in asked if each[0] in OURS]
    return out


def files(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).rglob("*.cubin"))


def fp8() -> dict[str, Any]:
    from moe_compile.deepgemm import experts as deepgemm_experts
    from moe_compile.deepgemm.provider import Provider, find
    from moe_compile.quantize import FP8
    from moe_compile.warming import warm_layers
    from moe_compile.warming.calls import Recorder

    found = find(0)
    if not isinstance(found, Provider):
        return {"skip": str(found)}
    E, K, H, I = 8, 2, 512, 1024  # DeepGEMM from 768 tokens on
    torch.manual_seed(0)
    w1, w2 = ((torch.randn(E, *s, device="cuda") / 16).to(FP8) for s in ((2 * I, H), (H, I)))
    s1, s2 = (torch.rand(E, n // 128, k // 128, device="cuda") for n, k in ((2 * I, H), (H, I)))

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return moe_compile.deep_gemm_moe_fp8(x, w1, w2, s1, s2, weights, ids)

    def rows(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = torch.rand(tokens, E, device="cuda").softmax(-1).topk(K)
        return torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16), weights, ids

    with Recorder() as recorder:
        call(*rows(4))
    result = warm_layers(recorder.layers, 2048, WORKERS, True)
    out = {**told(result), "cubins": len(files(os.environ["DG_JIT_CACHE_DIR"]))}
    asked.clear()
    ran: list[int] = []
    follow = deepgemm_experts.follow_deepgemm

    def spy(provider: Any, align: int, x: Tensor, *rest: Any) -> Tensor:
        ran.append(x.shape[0])
        return follow(provider, align, x, *rest)

    deepgemm_experts.follow_deepgemm = spy  # type: ignore[assignment]
    inputs = {t: rows(t) for t in (1, 2, 5, 33, 300, 767, 768, 769, 800, 1000, 1023, 1024, 1337, 1999, 2048)}
    results = {t: captured(lambda t=t: call(*inputs[t])) for t in inputs}
    out["asked in captures"] = list(asked)
    out["deepgemm"] = list(ran)
    out["new cubins"] = len(files(os.environ["DG_JIT_CACHE_DIR"])) - out["cubins"]
    out["equal"] = all(torch.equal(results[t], call(*inputs[t])) for t in inputs)
    out["finite"] = all(bool(r.isfinite().all()) and bool(r.any()) for r in results.values())
    return out


if __name__ == "__main__":
    listen()
    print(json.dumps({"hf": hf, "naive": naive, "fp8": fp8}[sys.argv[1]]()))
