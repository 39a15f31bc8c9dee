"""Compile the launches of a few layers for sm_90a without a GPU: ``python compile_sm90.py [case ...]``.

Every launcher runs as it is, on tensors without memory; only the last step, the launch, is left out. Prints
one line per kernel: layer, kernel, shared memory in bytes, counts of tensor-core and of TMA instructions, of
fp32 multiply-adds and of fp32 subtractions.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))
from moe_compile.kernels import (
    combine,
    decode,
    experts,
    gemv,
    grouped,
    launch,
    permute,
    quantize,
    route,
    scaled_experts,
    scaled_gemv,
    sort,
)  # fmt: skip
from moe_compile.kernels.activation import Epilogue
from moe_compile.kernels.config import select
from moe_compile.kernels.operand import Operand
from moe_compile.kernels.tile import Projection
from moe_compile.spec import Router

INF = float("inf")
SILU, GPT_OSS = (1.0, INF, INF, INF, 0.0), (1.702, 7.0, 7.0, INF, 1.0)
CASES: dict[str, dict[str, Any]] = {
    "gemv": {"T": 1, "shape": (128, 8, 2048, 768)},
    "decode": {"T": 16, "shape": (8, 2, 4096, 14336)},
    "heights": {"T": 64, "shape": (128, 8, 2048, 768), "separate": True},
    "sorted": {"T": 512, "shape": (128, 8, 2048, 768), "separate": True},
    "prefill": {"T": 16384, "shape": (32, 4, 2880, 2880), "layout": "interleaved", "args": GPT_OSS},
    "ladder": {"T": 1024, "shape": (128, 8, 2048, 768)},
    "tall": {"T": 2048, "shape": (128, 8, 2048, 768)},
    "concat": {"T": 4096, "shape": (8, 2, 4096, 14336)},
    "many": {"T": 4096, "shape": (128, 8, 2048, 768)},
    "two": {"T": 16384, "shape": (32, 4, 2880, 2880), "layout": "separate"},
    "single": {"T": 16384, "shape": (32, 4, 2880, 2880), "layout": "single"},
    "one": {"T": 4, "shape": (3, 2, 1, 1)},
    "fp8-gemv": {"T": 1, "shape": (128, 8, 2048, 768), "fp8": "w8a8"},
    "fp8-one": {"T": 1, "shape": (8, 2, 4096, 14336), "fp8": "w8a8"},
    "fp8-decode": {"T": 16, "shape": (8, 2, 4096, 14336), "fp8": "w8a8"},
    "fp8-tails": {"T": 33, "shape": (32, 4, 2880, 2880), "layout": "interleaved", "args": GPT_OSS, "fp8": "w8a8"},
    "fp8-halves": {"T": 1024, "shape": (32, 4, 2880, 2880), "fp8": "w8a8"},  # the up half starts inside a block
    "fp8-prefill": {"T": 4096, "shape": (8, 2, 4096, 14336), "fp8": "w8a8"},
    "w8a16-decode": {"T": 64, "shape": (128, 8, 2048, 768), "fp8": "w8a16"},
    "w8a16-channel": {"T": 2, "shape": (128, 8, 2048, 768), "fp8": "w8a16", "scales": "channel"},
    "w8a16-channel-sorted": {"T": 4096, "shape": (8, 2, 4096, 14336), "fp8": "w8a16", "scales": "channel"},
    "w8a16-tensor": {"T": 1, "shape": (128, 8, 2048, 768), "layout": "separate", "fp8": "w8a16", "scales": "tensor"},
    "w8a16-apart": {"T": 4096, "shape": (8, 2, 4096, 14336), "layout": "separate", "fp8": "w8a16"},
    "fp32-gemv": {"T": 1, "shape": (8, 2, 1024, 2048), "args": GPT_OSS, "dtype": torch.float32},
    "fp32-decode": {"T": 16, "shape": (8, 2, 1024, 2048), "dtype": torch.float32},
    "fp32-sorted": {"T": 300, "shape": (8, 2, 1024, 2048), "dtype": torch.float32},
}
TURNED = ("prefill", "ladder", "concat", "two")
CASES |= {f"turned-{name}": {**CASES[name], "transposed": True} for name in TURNED}


class Driver:
    """As much of a CUDA driver as compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(label: str) -> None:
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = kernel.asm["ptx"]
        tensor_core = ptx.count("wgmma.mma_async") + ptx.count("mma.sync.aligned.m16")
        descriptors = ptx.count("cp.async.bulk.tensor")
        fma, sub = (len(re.findall(rf"\b{name}(?:\.rn)?\.f32", ptx)) for name in ("fma", "sub"))
        print(label, self.__name__, kernel.metadata.shared, tensor_core, descriptors, fma, sub, flush=True)

    JITFunction.run = run


def layer(
    T: int,
    shape: tuple[int, int, int, int],
    separate: bool = False,
    transposed: bool = False,
    layout: str = "concat",
    args: tuple[float, float, float, float, float] = SILU,
    dtype: torch.dtype = torch.bfloat16,
    fp8: str = "",
    scales: str = "block",
) -> None:
    E, K, H, I = shape

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def weight(*size: int) -> Operand:
        turned = transposed and len(size) == 2
        w = empty(E, *size[::-1]).mT if turned else empty(E, *size)
        return Operand([w[0]] * E, empty(E, dtype=torch.int64), True) if separate else Operand([w])

    rows = 2 * I if layout in ("concat", "interleaved") else I
    w3, b3 = (weight(I, H), weight(I)) if layout == "separate" else (None, None)
    up = Projection(weight(rows, H), I, Epilogue("silu", args, layout), w3, weight(rows), b3)
    down = Projection(weight(H, I), H, b=weight(H))
    ids, weights = empty(T, K, dtype=torch.int64), empty(T, K, dtype=torch.float32)
    if not fp8:
        experts.run(empty(T, H), weights, ids, E, up, down)
        return

    def scaled(*size: int, apart: bool = False, **rest: Any) -> Projection:
        many = [size[0], 1] if scales == "channel" else [-(-n // 128) for n in size]
        scale = empty(E, *many, dtype=torch.float32)
        if scales == "tensor":
            scale = empty(E, 1, 1, dtype=torch.float32).expand(E, *many)
        w = Operand([empty(E, *size, dtype=torch.float8_e4m3fn)])
        if apart:
            rest |= {"up": w, "up_scale": scale}
        return Projection(w, scale=scale, **rest)

    up = scaled(rows, H, apart=layout == "separate", columns=I, epilogue=Epilogue("silu", args, layout))
    down = scaled(H, I, columns=H)
    plan = scaled_experts.plan_scaled(ids, E, up, down, fp8 == "w8a8", 2)
    scaled_experts.follow_scaled(plan, empty(T, H), weights, ids, E, up, down, fp8 == "w8a8", False, None)


def pieces() -> None:
    """The public ops that a whole layer does not launch."""
    rows = torch.empty(500, 64, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(9, dtype=torch.int32, device="meta")
    weight = Operand([torch.empty(8, 96, 64, dtype=torch.bfloat16, device="meta")])
    plan = select("sorted", 500, 1, 8, 96, 64, 2).down
    grouped.grouped_linear(rows, offsets, Projection(weight, 96), plan)
    combine.invert(torch.empty(500, dtype=torch.int32, device="meta"))
    pairs = sort.sort_pairs(torch.empty(250, 2, dtype=torch.int64, device="meta"), 8, 64, padded=True)
    quantize.quantize_permute(rows[:250], pairs, 2, 64)
    wide = torch.empty(pairs.capacity * 64, 256, dtype=torch.bfloat16, device="meta")
    quantize.activate_quantize(wide, pairs, 128, Epilogue("silu", SILU, "concat"), 64)
    combine.combine_padded(wide, pairs.inverse, None, 2, torch.bfloat16)
    for tokens in (1, 500):
        logits = torch.empty(tokens, 128, dtype=torch.bfloat16, device="meta")
        route.route(logits, 8, Router(), torch.bfloat16)


if __name__ == "__main__":
    driver.set_active(Driver())
    for module in (combine, decode, gemv, grouped, permute, quantize, route, scaled_gemv, sort):
        module.dependent = lambda _: launch.DEPENDENT
    print("triton", triton.__version__)
    for name in sys.argv[1:] or CASES:
        original_run = JITFunction.run
        compile_only(name)
        layer(**CASES[name])
        JITFunction.run = original_run
    compile_only("pieces")
    pieces()
