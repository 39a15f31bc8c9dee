"""Tiles that the fp32 plans do not use (swapped operands, short last tiles), and the choice of plans."""

from __future__ import annotations

import pytest
import torch
from layers import Layer, relative_error

from moe_compile.kernels import config, experts
from moe_compile.kernels.config import Plan, Tiles
from moe_compile.spec import Activation

LAYERS = {"qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "gpt-oss": (32, 4, 2880, 2880)}


@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate", "single"])
@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize(("path", "tail"), [("sorted", 2), ("sorted", 1), ("decode", 0)])
def test_forced_plans(monkeypatch: pytest.MonkeyPatch, layout: str, swap: bool, path: str, tail: int) -> None:
    bm = 64 if tail else 16  # so the decode case needs two passes over an expert's rows
    plan = Plan(path, Tiles(bm, 64, 16, 4, 2, swap, tail, 2), Tiles(bm, 32, 16, 4, 2, swap, tail, 2))
    monkeypatch.setattr(experts, "select", lambda *args: plan)
    form = {"bias": True, "routing": "random" if path == "decode" else "sentinels"}
    layer = Layer(21, 2, 2, 17, 34, Activation(gated=layout != "single"), layout, **form)
    assert path != "decode" or int((layer.ids == 0).sum()) > bm
    up, down = layer.projections()
    ours = experts.run(layer.x, layer.weights, layer.ids, 2, up, down, path=path)
    assert relative_error(ours, layer.truth()) < 2e-6


@pytest.mark.parametrize("tail", [0, 1, 2])
def test_heights_without_a_sort(monkeypatch: pytest.MonkeyPatch, tail: int) -> None:
    """Experts with every height of a tile, one with two tiles, one with none."""
    tiles = Tiles(64, 32, 16, 4, 2, swap=True, tail=tail)
    monkeypatch.setattr(experts, "select", lambda *args: Plan("decode", tiles, tiles))
    layer = Layer(188, 9, 1, 17, 20)
    rows = [1, 16, 17, 0, 32, 33, 64, 25]
    layer.ids = torch.repeat_interleave(torch.arange(8), torch.tensor(rows))[:, None].flip(0)
    one = torch.cat([layer.ids[:100] * 0 + 8, layer.ids[100:]])  # more rows than one tile has
    for ids in (layer.ids, one):
        layer.ids = ids
        ours = experts.run(layer.x, layer.weights, layer.ids, 9, *layer.projections(), path="decode")
        assert relative_error(ours, layer.truth()) < 2e-6


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("elements", [2, 4])
@pytest.mark.parametrize("shared", [config.H200.shared, 99 * 1024])
def test_plans_fit(name: str, elements: int, shared: int) -> None:
    E, K, H, I = LAYERS[name]
    for tokens in (1, 2, 3, 16, 64, 65, 128, 129, 512, 1024, 4096, 16384):
        path = config.choose_path(tokens, K, E, H, I)
        device = config.H200._replace(shared=shared)
        plan = config.select(path, tokens, K, E, H, I, elements, device, (True, True))
        assert (plan.up.bm, plan.up.rest) == (plan.down.bm, plan.down.rest)
        for tiles in (plan.up, plan.down):
            assert tiles.stages >= 1
            assert tiles.stages * (tiles.bm + tiles.rest + tiles.wn) * tiles.bk * elements <= shared


@pytest.mark.parametrize(("hidden", "inter"), [(320, 176), (2048, 768), (4096, 14336), (192, 96)])
def test_descriptors_change_no_sum(hidden: int, inter: int) -> None:
    """Steps of equal depth, so that stacked and separate weights give the same bits (``tests/gpu`` checks it)."""
    described = 0
    for mean in (1, 13, 41, 100, 255, 256, 1024, 1025, 5000):
        shape = ("sorted", 8 * mean, 1, 8, hidden, inter, 2, config.H200)
        plain, tma = config.select(*shape, (False, False)), config.select(*shape, (True, True))
        for a, b in ((plain.up, tma.up), (plain.down, tma.down)):
            assert a.bk == b.bk
            described += b.tma and not a.tma
    assert described == 2 * 7


def test_shared_memory_is_measured_on_hopper_only() -> None:
    def stages(device: config.Device) -> int:
        return config.select("sorted", 4096, 8, 128, 2048, 768, 2, device, (True, True)).down.stages

    assert (stages(config.H200), stages(config.H200._replace(hopper=False))) == (4, 3)


def test_paths() -> None:
    qwen3, gpt_oss = (8, 128, 2048, 768), (4, 32, 2880, 2880)
    for tokens, layer, path in [
        (1, qwen3, "gemv"),
        (2, qwen3, "gemv"),
        (3, qwen3, "decode"),
        (64, qwen3, "decode"),
        (65, qwen3, "sorted"),
        (2, gpt_oss, "gemv"),
        (1, (2, 4, 2880, 2880), "gemv"),  # one token has no two rows for an expert
        (2, (2, 8, 2048, 768), "decode"),  # two tokens: two may well choose the same of eight
        (1, (8, 64, 7168, 2048), "gemv"),
        (2, (8, 64, 7168, 2048), "decode"),  # so many weights keep the tensor cores' loads busy
        (64, (128, 256, 64, 64), "sorted"),  # more ids than one program should hold
    ]:
        assert config.choose_path(tokens, *layer) == path, (tokens, layer)
    assert config.choose_path(1, *qwen3, dense=False) == "decode"


def test_uneven_rows_have_tall_tiles() -> None:
    """From 60 rows per expert on: where one expert has a thousand, low tiles read its weights over and over."""
    heights = [
        config.select("sorted", tokens, 8, 128, 2048, 768, 2, tma=(True, True)).up.bm for tokens in (960, 976, 1024)
    ]
    assert heights == [64, 128, 128]


@pytest.mark.parametrize("tokens", [3, 16, 17, 32, 33, 64])
def test_one_expert_reads_its_weights_once(tokens: int) -> None:
    """Without a sort nobody knows the routing before: the tile must hold all tokens."""
    plan = config.select("decode", tokens, 2, 8, 4096, 14336, 2)
    assert plan.up.bm >= tokens and plan.down.bm >= tokens
