"""Layers with fp8 weights for the GPU tests, and what they mean in float32, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_compile.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from moe_compile.spec import Activation

DEVICE = "cuda"
BF16 = torch.bfloat16
SILU, GPT_OSS = Activation(), Activation("silu", alpha=1.702, gate_limit=1.0, up_limit=1.0, up_offset=1.0)


@dataclass
class Case:
    """The arguments of ``experts_fp8``."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    w1: Tensor
    w1_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    act: Activation = SILU
    interleaved: bool = False
    on_input: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.weights, self.ids, self.w1, self.w1_scale, self.w2, self.w2_scale

    def rows(self, which: slice) -> Case:
        return replace(self, x=self.x[which], weights=self.weights[which], ids=self.ids[which])


def random_weights(E: int, rows: int, depth: int, plain: bool, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unless ``plain``, the scales of neighbouring blocks are far apart: a wrong one shows."""
    std = 1 / 15 if plain else depth**-0.5
    w, scale = zip(
        *(quantize_blocks(std * torch.randn(rows, depth, device=DEVICE, generator=g)) for _ in range(E)), strict=True
    )
    scales = torch.stack(scale)
    if not plain:
        scales *= torch.exp2(torch.arange(scales.numel(), device=DEVICE) % 4 - 2.0).view_as(scales)
    return torch.stack([one.view(torch.uint8) for one in w]).view(torch.float8_e4m3fn), scales


def make(
    T: int, E: int = 8, K: int = 2, H: int = 512, I: int = 1024, act: Activation = SILU, dtype: torch.dtype = BF16,
    plain: bool = False, **form: Any,
) -> Case:  # fmt: skip
    """``plain``: numbers of the size of those in vLLM's tests."""
    g = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(T, H, device=DEVICE, generator=g) * (0.1 if plain else 1.0)
    weights, ids = torch.randn(T, E, device=DEVICE, generator=g).softmax(-1).topk(K)
    w1 = random_weights(E, 2 * I if act.gated else I, H, plain, g)
    return Case(x.to(dtype), weights, ids, *w1, *random_weights(E, H, I, plain, g), act, **form)


def hidden(case: Case, path: str, quantise: bool = True) -> Tensor:
    """What the second GEMM takes before it is rounded to fp8: float32 ``[P, I]``, with the roundings of the path.

    DeepGEMM's first GEMM writes bfloat16. The other paths round what they quantise from float32, but for few tokens
    (``gemv``) the result of the activation is first rounded to the dtype of the rows. An fp8 value in forty rounds to
    its other neighbour by that, which alone is an error of more than one per cent.
    """
    E, K, flat = case.w2.shape[0], case.ids.shape[1], case.ids.reshape(-1)
    x = rounded(case.x.float()) if quantise else case.x.float()
    out = torch.zeros(flat.numel(), case.w2.shape[2], device=DEVICE)
    for e in range(E):
        pair = torch.where(flat == e)[0]
        h = x[pair // K] @ dequantize_blocks(case.w1[e], case.w1_scale[e]).t()
        if case.on_input:
            h *= case.weights.float().reshape(-1, 1)[pair]
        if path == "deepgemm":
            h = h.bfloat16().float()
        up: Tensor | None = None
        if case.act.gated:
            h, up = (h[:, 0::2], h[:, 1::2]) if case.interleaved else h.chunk(2, -1)
        out[pair] = case.act(h, up)
    return out.to(case.x.dtype).float() if path == "gemv" or not quantise else out


def combined(case: Case, rows: Tensor) -> Tensor:
    """The rest of the layer in float32, from what the second GEMM takes: ``[P, I]`` -> ``[T, H]``."""
    flat, weights = case.ids.reshape(-1), case.weights.float().reshape(-1, 1)
    out = torch.zeros(case.x.shape, device=DEVICE)
    for e in range(case.w2.shape[0]):
        pair = torch.where(flat == e)[0]
        y = rows[pair] @ dequantize_blocks(case.w2[e], case.w2_scale[e]).t()
        out.index_add_(0, pair // case.ids.shape[1], y if case.on_input else weights[pair] * y)
    return out


def truth(case: Case, path: str, quantise: bool = True) -> Tensor:
    """In float32, expert by expert, with the roundings of the path but those of sums; ``[T, H]``."""
    h = hidden(case, path, quantise)
    return combined(case, rounded(h) if quantise else h)


def rounded(rows: Tensor) -> Tensor:
    return dequantize_rows(*quantize_rows(rows))


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def calc_diff(ours: Tensor, other: Tensor) -> float:
    """DeepGEMM's own measure."""
    x, y = ours.double(), other.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def op(case: Case, kernels: str = "auto", quantise: bool = True) -> Tensor:
    act, form = case.act, (case.interleaved, case.on_input, quantise, kernels)
    return torch.ops.moe_compile.experts_fp8(*case.tensors(), act.name, act.args(), act.gated, *form)
