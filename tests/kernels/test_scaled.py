"""Layers with fp8 weights and block scales on every path, against the twin and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from layers import Layer, quantised, relative_error
from triton.runtime.errors import InterpreterError

from moe_compile.kernels import scaled_gemv
from moe_compile.kernels.config import Plan, Tiles
from moe_compile.kernels.quantize import (
    activate_quantize,
    activate_quantize_twin,
    quantize_permute,
    quantize_rows,
)
from moe_compile.kernels.scaled_experts import follow_scaled, plan_scaled, run_scaled_twin
from moe_compile.kernels.scaled_plans import choose_scaled_path, select_scaled
from moe_compile.kernels.sort import sort_pairs, sort_pairs_twin
from moe_compile.quantize import dequantize_rows
from moe_compile.quantize import quantize_rows as quantize_twin
from moe_compile.spec import Activation

GPT_OSS = Activation("silu", alpha=1.702, gate_limit=0.7, up_limit=0.7, up_offset=1.0)
PATHS = ("gemv", "decode", "sorted")


def check(path: str, quantise: bool, plan: Plan | None = None, scales: str = "block", **form: Any) -> None:
    layer = Layer(**{"T": 3, "E": 4, "K": 2, "H": 320, "I": 192, **form})
    up, down = quantised(layer, scales)
    chosen = plan or plan_scaled(layer.ids, layer.E, up, down, quantise, 4, path)
    assert chosen.path == path
    args = (layer.x, layer.weights, layer.ids, layer.E, up, down, quantise, layer.weight_on_input)
    ours = follow_scaled(chosen, *args, None)
    twin = run_scaled_twin(*args)
    assert ours.shape == (layer.T, layer.H)
    if not quantise:
        assert relative_error(ours, layer.truth()) < 3e-6
        assert relative_error(twin, layer.truth()) < 3e-6
        return
    # a sum that differs in its last bit can round to another fp8 neighbour
    assert relative_error(ours, twin) < 2e-3
    if path != "gemv" and layer.routing != "nobody" and layer.T:
        assert 1e-3 < relative_error(ours, layer.truth()) < 0.1  # the rows were rounded, no more


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 3, 2), (1, 1, 1), (2, 9, 4), (7, 5, 5), (20, 4, 2)])
def test_sizes(path: str, quantise: bool, T: int, E: int, K: int) -> None:
    check(path, quantise, T=min(T, 2) if path == "gemv" else T, E=E, K=K)


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate", "single"])
def test_layouts(path: str, quantise: bool, layout: str) -> None:
    act = Activation("relu2", gated=False) if layout == "single" else GPT_OSS
    check(path, quantise, activation=act, layout=layout, bias=True, weight_on_input=True, routing="sentinels")


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("H", "I"), [(128, 128), (256, 64), (136, 72), (64, 200), (40, 24)])
def test_odd_sizes(path: str, quantise: bool, H: int, I: int) -> None:
    check(path, quantise, H=H, I=I, T=2)


@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate", "single"])
@pytest.mark.parametrize(("scales", "path"), [("tensor", p) for p in PATHS] + [("channel", p) for p in PATHS[1:]])
def test_scales_per_tensor_and_per_channel(scales: str, path: str, layout: str) -> None:
    act = Activation("relu2", gated=False) if layout == "single" else GPT_OSS
    for H, I in ((320, 192), (256, 128), (136, 72)):
        check(path, False, scales=scales, activation=act, layout=layout, bias=True, H=H, I=I, T=2)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("scales", ["tensor", "channel"])
def test_tiles_with_other_scales(scales: str, swap: bool) -> None:
    tiles = Tiles(16, 64, 128, 4, 2, swap, 1)
    check("decode", False, Plan("decode", tiles, tiles), scales, T=30, E=3, transposed=True)
    check("sorted", False, Plan("sorted", tiles, tiles), scales, T=30, E=3)


def test_a_scale_per_channel_has_no_matrix_vector_kernel() -> None:
    layer = Layer(T=1, E=4, K=2, H=320, I=192)
    up, down = quantised(layer, "channel")
    assert plan_scaled(layer.ids, layer.E, up, down, False, 4).path == "decode"
    assert plan_scaled(layer.ids, layer.E, *quantised(layer, "tensor"), False, 4).path == "gemv"
    plan = plan_scaled(layer.ids, layer.E, up, down, False, 4, "gemv")
    with pytest.raises(ValueError, match="no matrix-vector kernel"):
        follow_scaled(plan, layer.x, layer.weights, layer.ids, layer.E, up, down, False, False, None)


@pytest.mark.parametrize(
    ("tokens", "shape", "path", "up_stages", "down"),
    [
        (1, (128, 8, 2048, 768), "gemv", 5, (128, 5)),
        (1, (64, 8, 7168, 2048), "gemv", 5, (128, 5)),  # 128 tiles on 132 processors
        (2, (64, 8, 7168, 2048), "decode", 3, (128, 5)),
        (4, (64, 8, 7168, 2048), "decode", 5, (128, 5)),  # 512: more than two to a processor
        (1, (8, 2, 4096, 14336), "gemv", 3, (64, 8)),
        (2, (8, 2, 4096, 14336), "decode", 5, (128, 5)),
        (1, (32, 4, 2880, 2880), "gemv", 5, (128, 5)),
        (2, (32, 4, 2880, 2880), "gemv", 3, (128, 5)),
    ],
)
def test_plans_for_few_tokens(
    tokens: int, shape: tuple[int, int, int, int], path: str, up_stages: int, down: tuple[int, int]
) -> None:
    """As an H200 was fastest: tiles and stages by how many programs there are for its 132 processors."""
    E, K, H, I = shape
    assert choose_scaled_path(tokens, K, E, H, I, dense=True, quantise=True) == path
    plan = select_scaled("decode", tokens, K, E, H, I, True, True, 2)
    assert (plan.up.wn, plan.up.stages, plan.down.wn, plan.down.stages) == (256, up_stages, *down)
    plain = select_scaled("decode", tokens, K, E, H, I, True, False, 2)
    assert (plain.up.wn, plain.up.stages, plain.down.wn, plain.down.stages) == (128, 5, 128, 5)


def test_unquantised_rows_stay_longer_with_matrix_vector_products() -> None:
    def paths(tokens: int, experts: int, top_k: int, dense: bool = True) -> tuple[str, str]:
        sizes = (tokens, top_k, experts, 2880, 2880)
        first, second = (choose_scaled_path(*sizes, dense=dense, quantise=quantise) for quantise in (False, True))
        return first, second

    assert paths(8, 32, 4) == ("gemv", "decode")
    assert paths(9, 32, 4) == ("decode", "decode")
    assert paths(6, 8, 2) == ("gemv", "decode")
    assert paths(7, 8, 2) == ("decode", "decode")  # nearly two rows per expert
    assert paths(1, 32, 4, dense=False) == ("decode", "decode")


@triton.jit
def _round_row(x, q, scale, BG: tl.constexpr):
    g = tl.arange(0, BG)
    at = scaled_gemv._depth(g)
    values, scales = scaled_gemv._rounded(tl.load(x + at), True)
    tl.store(q + at, values)
    tl.store(scale + g, scales)


@pytest.mark.parametrize("seed", range(5))
def test_vectors_are_rounded_to_the_bits_of_the_twin(seed: int) -> None:
    """Values of bfloat16 lie on ties of fp8: with ``a * (1 / scale)`` some round to the other neighbour."""
    x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    q, scale = torch.empty_like(x), torch.empty(1, 16)
    _round_row[(1,)](x, q, scale, BG=16)
    expected, scales = quantize_twin(x)
    assert torch.equal(q, expected.float()) and torch.equal(scale, scales)


def test_half_tiles_of_the_second_gemm() -> None:
    plan = Plan("decode", Tiles(16, 256, 128, 4, 3, True), Tiles(16, 64, 128, 4, 8, True))
    check("decode", True, plan, T=9)


def test_one_row_per_expert_is_one_block() -> None:
    """``[E, 1, 1]`` is a scale per channel and per block at once."""
    for path in PATHS:
        check(path, False, T=2, H=40, I=1, activation=Activation("relu2", gated=False), scales="tensor")


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("routing", ["one", "nobody", "distinct"])
@pytest.mark.parametrize("path", PATHS)
def test_routing(path: str, routing: str, quantise: bool) -> None:
    check(path, quantise, routing=routing, index=torch.int32, T=2 if path == "gemv" else 9)


@pytest.mark.parametrize("path", ["decode", "sorted"])
@pytest.mark.parametrize("tail", [0, 1, 2])
def test_tiles(path: str, tail: int) -> None:
    """Several tiles of one expert, and lower last tiles, swapped and not."""
    for swap in (False, True):
        down = Tiles(16, 64, 128, 4, 2, swap, tail)
        check(path, True, Plan(path, Tiles(16, 256, 128, 4, 2, swap, tail), down), T=30, E=3)
        check(path, False, Plan(path, down, down), T=30, E=3)


def test_without_a_column_block_no_results_are_quantised() -> None:
    narrow = Tiles(16, 128, 128, 4, 2, True)
    with pytest.raises(InterpreterError, match="AssertionError"):
        check("decode", True, Plan("decode", narrow, narrow))


@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (5, 300), (3, 64), (1030, 256)])
def test_rows(shape: tuple[int, int]) -> None:
    x = torch.randn(shape) * 3
    if shape[0] > 2:
        x[1] = 0
        x[2, 3] = 1e30
    q, scale = quantize_rows(x)
    expected, s = quantize_twin(x)
    assert torch.equal(scale, s)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert shape[0] <= 2 or bool((dequantize_rows(q, scale)[1] == 0).all())


def test_not_a_number_stays_one() -> None:
    x = torch.randn(2, 256)
    x[0, 5], x[1, 200] = float("nan"), float("inf")
    wide = dequantize_rows(*quantize_rows(x))
    assert bool(wide[0, 5].isnan())
    assert not bool(wide[1, 200].isfinite())
    assert bool(wide[0, 128:].isfinite().all())
    assert bool(wide[1, :128].isfinite().all())


@pytest.mark.parametrize("align", [32, 64, 128])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 3, 2), (70, 5, 3), (130, 2, 1), (40, 60, 2)])
def test_padded_order(T: int, E: int, K: int, align: int) -> None:
    """Every pair's row is where the table says, its block belongs to its expert, dead blocks to nobody."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, E + 1, (T, K), generator=g)
    x = torch.randn(T, 200, generator=g)
    pairs = sort_pairs(ids, E, align, padded=True)
    twin = sort_pairs_twin(ids, E, align, padded=True)
    assert torch.equal(pairs.inverse, twin.inverse)
    q, scale, layout = quantize_permute(x, pairs, K, align)
    assert scale.stride(0) == 1 and scale.stride(1) % 4 == 0
    live = int(pairs.tiles[0])
    assert layout.shape == (pairs.capacity * align,)
    expected = torch.full((pairs.capacity,), -1, dtype=torch.int32)
    expected[:live] = twin.tiles[1 : 1 + live]
    assert torch.equal(layout.view(-1, align), expected[:, None].expand(-1, align))
    flat, position = ids.reshape(-1), pairs.inverse.long()
    valid = (flat >= 0) & (flat < E)
    assert bool((position[~valid] == -1).all())
    assert position[valid].unique().numel() == int(valid.sum())
    assert torch.equal(layout[position[valid]].long(), flat[valid])
    rows = torch.arange(T).repeat_interleave(K)[valid]
    wanted, s = quantize_twin(x)
    assert torch.equal(q[position[valid]].view(torch.uint8), wanted[rows].view(torch.uint8))
    assert torch.equal(scale[position[valid]], s[rows])


@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
@pytest.mark.parametrize("columns", [128, 200])
def test_activation_to_fp8(layout: str, columns: int) -> None:
    """Rows that are pairs are activated; no other row is read or written."""
    from moe_compile.kernels.activation import Epilogue

    g = torch.Generator().manual_seed(2)
    ids = torch.randint(-1, 4, (25, 2), generator=g)
    pairs = sort_pairs(ids, 4, 32, padded=True)
    epilogue = Epilogue("silu", tuple(GPT_OSS.args()), layout)  # type: ignore[arg-type]
    rows = pairs.capacity * 32
    x = torch.full((rows, columns if layout == "single" else 2 * columns), float("nan"))
    position = pairs.inverse[pairs.inverse >= 0].long()
    x[position] = torch.randn(position.numel(), x.shape[1], generator=g)
    q, scale = activate_quantize(x, pairs, columns, epilogue, 32)
    wanted, s = activate_quantize_twin(x[position], columns, epilogue)
    assert relative_error(scale[position], s) < 1e-6
    assert relative_error(dequantize_rows(q[position], scale[position]), dequantize_rows(wanted, s)) < 2e-3
