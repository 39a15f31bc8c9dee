"""The whole layer on every path against the twin and against float64."""

from __future__ import annotations

import pytest
import torch
from layers import Layer, relative_error

from moe_compile.kernels import config, experts
from moe_compile.kernels.config import Tiles, select
from moe_compile.spec import Activation

GPT_OSS = Activation("silu", alpha=1.702, gate_limit=0.7, up_limit=0.7, up_offset=1.0)
PATHS = ("gemv", "decode", "sorted")


def run(layer: Layer, path: str) -> torch.Tensor:
    up, down = layer.projections()
    return experts.run(layer.x, layer.weights, layer.ids, layer.E, up, down, layer.weight_on_input, path=path)


def check(layer: Layer, path: str) -> None:
    ours = run(layer, path)
    up, down = layer.projections()
    twin = experts.run_twin(layer.x, layer.weights, layer.ids, layer.E, up, down, layer.weight_on_input)
    assert ours.shape == (layer.T, layer.H)
    assert relative_error(twin, layer.truth()) < 2e-6
    assert relative_error(ours, layer.truth()) < 2e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("T", "E", "K"), [(0, 3, 2), (1, 1, 1), (1, 5, 3), (2, 17, 4), (7, 5, 5), (7, 2, 1), (33, 4, 2)]
)
def test_sizes(path: str, T: int, E: int, K: int) -> None:
    check(Layer(min(T, 5) if path == "gemv" else T, E, K, 19, 13), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("routing", ["distinct", "one", "sentinels", "nobody"])
def test_routing(path: str, routing: str) -> None:
    index = torch.int32 if routing == "sentinels" else torch.int64
    check(Layer(3, 6, 3, 17, 11, routing=routing, index=index, bias=True), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate"])
@pytest.mark.parametrize(("separate", "transposed", "bias"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)])
def test_storage(path: str, layout: str, separate: int, transposed: int, bias: int) -> None:
    layer = Layer(
        3, 4, 2, 19, 37, GPT_OSS, layout, bool(separate), bool(transposed), bool(bias), routing="sentinels"
    )
    if path == "gemv" and transposed:
        with pytest.raises(ValueError, match="stride one"):
            run(layer, path)
        return
    check(layer, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations(path: str, name: str, gated: bool) -> None:
    activation = Activation(name, gated, act_limit=0.5 if name == "gelu" else float("inf"))
    check(Layer(2, 3, 2, 9, 7, activation, bias=True), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate"])
def test_weight_on_input(path: str, layout: str) -> None:
    check(Layer(3, 4, 2, 12, 8, layout=layout, bias=True, weight_on_input=True), path)


@pytest.mark.parametrize("routing", ["distinct", "random", "one", "sentinels"])
def test_half_tiles_of_few_rows(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(32, 32, 32, 4, 2, swap=True, tail=1)
    monkeypatch.setattr(config, "_small", lambda path, elements: (tiles, tiles))
    select.cache_clear()
    try:
        check(Layer(37, 7, 4, 19, 13, routing=routing, bias=True), "decode")
    finally:
        select.cache_clear()


def test_out_dtype_and_strided_rows() -> None:
    layer = Layer(4, 3, 2, 16, 8)
    wide = torch.zeros(4, 40)
    wide[:, :16] = layer.x
    layer.x = wide[:, :16]
    up, down = layer.projections()
    for path in PATHS:
        out = experts.run(layer.x, layer.weights, layer.ids, 3, up, down, out_dtype=torch.float16, path=path)
        assert out.dtype == torch.float16
        assert relative_error(out, layer.truth()) < 1e-3


def test_nan_stays_in_its_token() -> None:
    layer = Layer(6, 3, 2, 12, 8, routing="sentinels")
    layer.x[2] = float("nan")
    layer.ids[2] = torch.tensor([0, -1])
    layer.ids[3] = torch.tensor([0, 1])
    for path in PATHS:
        out = run(layer, path)
        assert bool(out[2].isnan().all())
        assert bool(torch.isfinite(out[[0, 1, 3, 4, 5]]).all())


def test_unknown_path() -> None:
    with pytest.raises(ValueError, match="gemv, decode, sorted"):
        run(Layer(), "fast")


def test_repeats_are_bit_equal() -> None:
    layer = Layer(3, 4, 3, 19, 13, routing="sentinels")
    for path in PATHS:
        assert torch.equal(run(layer, path), run(layer, path))
