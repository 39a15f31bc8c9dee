"""DeepGEMM's grouped bfloat16 GEMM as a peer, with our kernels around it: would it be worth sending calls there?

Sort into padded order, rows of the tokens put there, GEMM, activation, GEMM, weighted sum: the way of our fp8 calls
(``moe_compile.deepgemm.experts``). The package is the one of the vLLM wheel (``benchmarks/carry.py``), found through
``MOE_COMPILE_DEEP_GEMM``. Shapes: as in ``wheel_peers``; ``M`` rows of the padded order.
"""

from __future__ import annotations

import torch
import triton
from peers import Layer, Program, route
from torch import Tensor
from wheel_peers import silu_and_mul

from moe_compile.deepgemm.experts import alignment
from moe_compile.deepgemm.provider import Provider, find
from moe_compile.kernels.combine import combine_padded
from moe_compile.kernels.launch import Launch, dependent, once
from moe_compile.kernels.permute import permute_kernel
from moe_compile.kernels.sort import Sorted, sort_pairs


def build(layer: Layer, w1: Tensor, w2: Tensor) -> Program:
    """``dg_bf16``."""
    provider = find(torch.cuda.current_device())
    if not isinstance(provider, Provider):
        raise RuntimeError(f"no DeepGEMM: {provider.code} {provider.reason}")
    multiply = provider.module.m_grouped_bf16_gemm_nt_contiguous
    routed, laid_out = torch.compile(route, dynamic=False), torch.compile(experts_of_rows, dynamic=False)

    def program(x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = routed(logits, layer.K)
        align = alignment(x.shape[0], layer.K, layer.E, provider.alignments)
        pairs = sort_pairs(ids, layer.E, align, padded=True)
        rows = in_order(x, pairs, layer.K, align)  # [M, H]
        layout = laid_out(pairs.tiles, pairs.capacity, align)
        wide = x.new_empty(len(rows), 2 * layer.I)
        h, y = x.new_empty(len(rows), layer.I), x.new_empty(len(rows), layer.H)
        with provider.alignment(align):
            multiply(rows, w1, wide, layout)
            silu_and_mul[(len(rows), triton.cdiv(layer.I, 1024))](wide, h, layer.I, BLOCK=1024)
            multiply(h, w2, y, layout)
        return combine_padded(y, pairs.inverse, weights, layer.K, x.dtype)

    return program


def experts_of_rows(tiles: Tensor, capacity: int, align: int) -> Tensor:
    """int32 ``[M]``: the expert of every row, -1 in blocks of none."""
    blocks = torch.arange(capacity, device=tiles.device)
    experts = torch.where(blocks < tiles[0], tiles[1 : 1 + capacity], -1)
    return experts[:, None].expand(-1, align).reshape(-1)


def in_order(x: Tensor, pairs: Sorted, top_k: int, align: int) -> Tensor:
    """Tokens ``x [T, H]`` to their places in the padded order ``[M, H]``."""
    (tokens, hidden), rows = x.shape, pairs.capacity * align
    out = x.new_empty(rows, hidden)
    everywhere = torch.full((1,), rows, dtype=torch.int32, device=x.device)  # all pairs have an expert
    constants = {"K": top_k, "BM": 2, "BH": 1024, **dependent(x)}
    grid = (triton.cdiv(tokens, 2), triton.cdiv(hidden, 1024))
    once(
        lambda: Launch(permute_kernel, grid, constants),
        x, x.stride(0), pairs.inverse, everywhere, out, tokens, 0, hidden,
    )  # fmt: skip
    return out
