"""Weights by tensor descriptor against float64, and what decides for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import Layer, relative_error

from moe_compile.kernels import config, experts, grouped, launch
from moe_compile.kernels.config import Plan, Tiles
from moe_compile.spec import Activation

LAYOUTS = ["concat", "interleaved", "separate", "single"]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which descriptors the launches built."""
    seen: list[str] = []
    for name in ("describe", "describe_rows"):
        original = getattr(grouped, name)

        def spy(*args: Any, _original: Any = original, _name: str = name) -> Any:
            seen.append(_name)
            return _original(*args)

        monkeypatch.setattr(grouped, name, spy)
    return seen


def run(layer: Layer) -> torch.Tensor:
    up, down = layer.projections()
    assert up.describable and down.describable
    return experts.run(
        layer.x, layer.weights, layer.ids, layer.E, up, down, layer.weight_on_input, path="sorted"
    )


def force(monkeypatch: pytest.MonkeyPatch, up: Tiles, down: Tiles) -> None:
    monkeypatch.setattr(experts, "select", lambda *args: Plan("sorted", up, down))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize(
    ("tail", "programs", "rows"), [(0, 3, "down"), (0, 1000, "both"), (2, 0, "none"), (1, 2, "none"), (1, 0, "both")]
)
@pytest.mark.parametrize(("H", "I", "transposed"), [(20, 36, False), (32, 16, False), (20, 36, True)])
def test_layouts(
    monkeypatch: pytest.MonkeyPatch, described: list[str], layout: str, swap: bool, tail: int, programs: int,
    rows: str, H: int, I: int, transposed: bool,
) -> None:  # fmt: skip
    bm = 64 if tail else 16
    up = Tiles(bm, 64, 16, 4, 2, swap, tail, 2, tma=True, rows_tma=rows == "both", programs=programs)
    down = Tiles(bm, 32, 16, 4, 2, swap, tail, 2, tma=True, rows_tma=rows != "none", programs=programs)
    force(monkeypatch, up, down)
    activation = Activation(gated=layout != "single", gate_limit=0.7, up_limit=0.9, up_offset=1.0)
    layer = Layer(
        21, 3, 2, H, I, activation, layout, transposed=transposed, bias=True, routing="sentinels",
        weight_on_input=layout == "single",
    )  # fmt: skip
    # a descriptor that reached into the next expert, or a row that nobody wrote, would show
    ours = run(layer)
    heights = 2 if tail else 1
    assert described.count("describe") == 2
    assert described.count("describe_rows") == heights * {"none": 0, "down": 1, "both": 2}[rows]
    assert relative_error(ours, layer.truth()) < 2e-6
    assert torch.equal(ours, run(layer))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("H", "I", "transposed"), [(20, 36, False), (32, 16, False), (20, 36, True)])
def test_ladder(
    monkeypatch: pytest.MonkeyPatch, described: list[str], layout: str, H: int, I: int, transposed: bool
) -> None:
    tiles = Tiles(64, 32, 16, 4, 2, True, 0, 2, tma=True, ladder=True)
    force(monkeypatch, tiles, tiles)
    layer = Layer(560, 10, 1, H, I, Activation(gated=layout != "single"), layout, transposed=transposed, bias=True)
    # every height, exact and one more, one tile and several; the last expert gets nothing
    rows = [1, 16, 17, 33, 49, 65, 80, 81, 150]
    layer.ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    layer.ids = torch.nn.functional.pad(layer.ids, (0, 560 - len(layer.ids)), value=-1)[:, None].flip(0)
    ours = run(layer)
    assert described == ["describe", "describe"]
    assert relative_error(ours, layer.truth()) < 2e-6


@pytest.mark.parametrize("routing", ["one", "nobody", "distinct"])
def test_routing(monkeypatch: pytest.MonkeyPatch, routing: str) -> None:
    tiles = Tiles(16, 32, 16, 4, 2, False, 0, 3, tma=True, rows_tma=True, programs=4)
    force(monkeypatch, Tiles(16, 32, 16, 4, 2, False, 0, 3, tma=True, programs=4), tiles)
    layer = Layer(33, 4, 2, 20, 12, routing=routing, index=torch.int32)
    assert relative_error(run(layer), layer.truth()) < 2e-6


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
def test_activations(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tiles = Tiles(16, 32, 16, 4, 2, False, 0, 3, tma=True)
    force(monkeypatch, tiles, tiles)
    layer = Layer(9, 3, 2, 20, 12, Activation(name), bias=True)
    assert relative_error(run(layer), layer.truth()) < 2e-6


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
def test_neighbouring_nan_stays_out(monkeypatch: pytest.MonkeyPatch, permuted: bool, transposed: bool) -> None:
    """NaN in an expert that nobody chose, after each row of x, and in the rows that nobody wrote."""
    tiles = Tiles(16, 32, 16, 4, 2, False, 0, 3, tma=True, rows_tma=True, programs=2)
    force(monkeypatch, tiles if permuted else Tiles(16, 64, 16, 4, 2, False, 1, 3, tma=True), tiles)
    layer = Layer(9, 3, 2, 20, 12, transposed=transposed, bias=True)
    layer.ids = layer.ids % 2 * 2
    layer.ids[0, 0] = -1
    truth = layer.truth()
    for parts in (layer.w1, layer.w2, layer.b1, layer.b2):
        parts[0][1] = float("nan")
    wide = torch.full((9, 24), float("nan"))
    wide[:, :20] = layer.x
    layer.x = wide[:, :20]
    assert relative_error(run(layer), truth) < 2e-6


def test_views_of_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up as halves of one tensor: the strides go into the descriptor."""
    tiles = Tiles(16, 32, 16, 4, 2, False, 0, 3, tma=True)
    force(monkeypatch, tiles, tiles)
    layer = Layer(9, 3, 2, 20, 12, layout="separate")
    both = torch.cat([layer.w1[0], layer.w3[0]], dim=1)
    layer.w1, layer.w3 = [both[:, :12]], [both[:, 12:]]
    assert relative_error(run(layer), layer.truth()) < 2e-6


@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_linear(described: list[str], transposed: bool) -> None:
    layer = Layer(40, 3, 1, 20, 12, transposed=transposed)
    _, down = layer.projections()
    rows = layer.x[:, :12].contiguous()
    offsets = torch.tensor([0, 7, 7, 30], dtype=torch.int32)
    plan = Tiles(16, 16, 16, 4, 2, False, 0, 4, tma=True, rows_tma=True, programs=3)
    ours = grouped.grouped_linear(rows, offsets, down, plan)
    assert described == ["describe"]
    for e, (a, b) in enumerate([(0, 7), (7, 7), (7, 30)]):
        torch.testing.assert_close(ours[a:b], rows[a:b] @ layer.w2[0][e].t(), rtol=1e-5, atol=1e-5)
    assert not ours[30:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turned_weights_are_described_as_they_lie(layout: str) -> None:
    layer = Layer(5, 3, 2, 20, 36, Activation(gated=layout != "single"), layout, transposed=True)
    tiles = Tiles(16, 32, 16, 4, 2, False, tma=True, rows_tma=True)
    launched: list[tuple[Any, ...]] = []

    class Spy(launch.Start):
        def __call__(self, make: Any, *args: Any) -> None:
            if (made := make()).kernel is grouped.grouped_kernel:
                named = dict(zip(made.kernel.arg_names, args, strict=False))
                launched.append((made.constants["M"].turned, named["wd"], named["ud"]))
            super().__call__(lambda: made, *args)

    up, down = layer.projections()
    arguments = (layer.x, layer.weights, layer.ids, layer.E, up, down, False, None)
    ours = experts.follow_plan(Plan("sorted", tiles, tiles), *arguments, start=Spy())
    assert relative_error(ours, layer.truth()) < 2e-6
    assert all(turned and w is not None for turned, w, _ in launched)
    assert [up is not None for *_, up in launched] == [layout == "separate", False]
    gate, rows = launched[0][1], {"concat": 72, "interleaved": 72}.get(layout, 36)
    assert (gate.shape, gate.strides) == ([3, 20, rows], [20 * rows, rows, 1])
    assert gate.block_shape == [1, 16, {"concat": 16, "separate": 16}.get(layout, 32)]
    assert (launched[1][1].shape, launched[1][1].block_shape) == ([3, 36, 20], [1, 16, 32])


def test_turned_weights_off_vectors_take_pointers() -> None:
    def described(off: str = "", **form: Any) -> tuple[bool, bool]:
        layer = Layer(600, 4, 2, 24, 16, dtype=torch.bfloat16, transposed=True, **form)
        flat = layer.w1[0].mT.reshape(-1)
        if off == "base":
            layer.w1 = [torch.cat([flat[:1], flat])[1:].view(4, 24, -1).mT]
        elif off == "rows":
            layer.w1 = [torch.nn.functional.pad(layer.w1[0].mT, (0, 4))[..., :-4].mT]
        elif off == "gate":
            layer.w1 = [layer.w1[0].contiguous()]
        up, down = layer.projections()
        plan = experts.plan_of(layer.ids, 4, up, down)
        assert plan.path == "sorted"
        return plan.up.tma, plan.down.tma

    for layout in LAYOUTS[:3]:
        assert described(layout=layout) == (True, True)
        assert described("base", layout=layout) == described("rows", layout=layout) == (False, True)
    assert described("gate", layout="separate") == (False, True)  # gate and value lie differently
    assert described("gate") == (True, True)  # the two GEMMs may


def test_what_can_be_described() -> None:
    def fits(**form: Any) -> tuple[bool, bool]:
        up, down = Layer(2, 3, 2, **{"H": 24, "I": 16, "dtype": torch.bfloat16, **form}).projections()
        return up.describable, down.describable

    assert all(fits(layout=layout) == (True, True) for layout in LAYOUTS[:3])
    assert fits(separate=True) == (False, False)
    assert all(fits(layout=layout, transposed=True) == (True, True) for layout in LAYOUTS[:3])
    assert fits(H=20) == fits(H=20, transposed=True)[::-1] == (False, True)  # 40 bytes per row
    layer = Layer(2, 3, 2, 24, 16, dtype=torch.bfloat16)
    shifted = torch.empty(layer.w1[0].numel() + 1, dtype=torch.bfloat16)[1:].view_as(layer.w1[0])
    layer.w1 = [shifted]
    assert not layer.projections()[0].describable
    layer.w1 = [torch.empty(3, 40, 24, dtype=torch.bfloat16)[:, :32]]  # a gap after every expert
    assert not layer.projections()[0].describable
    layer.w2 = [layer.w2[0][:1].expand(3, -1, -1)]
    assert not layer.projections()[1].describable


def test_plans() -> None:
    def tma(tokens: int, device: config.Device = config.H200, **other: Any) -> tuple[bool, bool]:
        sizes = {"top_k": 2, "experts": 8, "hidden": 4096, "inter": 14336, "elements": 2, **other}
        can = sizes.pop("tma", (True, True))
        plan = config.select("sorted", tokens, **sizes, device=device, tma=can)
        assert (plan.up.bm, plan.up.rest) == (plan.down.bm, plan.down.rest)
        return plan.up.tma, plan.down.tma

    assert tma(4096) == tma(16384) == (True, True)
    assert tma(64) == (False, False)
    assert config.select("sorted", 512, 2, 8, 4096, 14336, 2, tma=(True, True)).up.ladder
    wide, narrow = (config.select("sorted", 4096, 2, 8, 4096, inter, 2, tma=(True, True)) for inter in (2048, 2040))
    assert wide.up.rows_tma and not narrow.up.rows_tma  # putting rows in order has to repay
    assert tma(512, tma=(True, False)) == (False, False)
    assert tma(4096, tma=(False, True)) == (False, True)
    assert tma(4096, config.H200._replace(tma=False)) == (False, False)
    assert tma(4096, elements=4) == tma(4096, hidden=4100) == (False, False)
