"""Sort, tile table, permutation, grouped linear and combine against their twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_compile.kernels import combine, grouped, launch
from moe_compile.kernels import sort as sorting
from moe_compile.kernels.config import Tiles
from moe_compile.kernels.operand import make_operand
from moe_compile.kernels.permute import permute, permute_twin
from moe_compile.kernels.tile import Projection


def make_ids(tokens: int, top_k: int, experts: int, kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(tokens * 31 + top_k)
    if kind == "one":
        return torch.full((tokens, top_k), experts - 1)
    low, high = (-2, experts + 2) if kind == "sentinels" else (0, experts)
    return torch.randint(low, high, (tokens, top_k), generator=g)


def check_table(ours: torch.Tensor, capacity: int, twin: torch.Tensor) -> None:
    n = int(ours[0])
    assert n == int(twin[0]) and n <= capacity
    assert torch.equal(ours[1 : 1 + n], twin[1 : 1 + n])
    assert torch.equal(ours[1 + capacity : 1 + capacity + n], twin[1 + n :])


@pytest.mark.parametrize("kind", ["random", "one", "sentinels"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (7, 3, 5), (33, 4, 17), (90, 4, 8), (64, 2, 1100)]
)
def test_sort(kind: str, tokens: int, top_k: int, experts: int) -> None:
    ids = make_ids(tokens, top_k, experts, kind).to(torch.int32 if kind == "one" else torch.int64)
    ours, twin = sorting.sort_pairs(ids, experts, 16), sorting.sort_pairs_twin(ids, experts, 16)
    assert torch.equal(ours.order, twin.order)
    assert torch.equal(ours.inverse, twin.inverse)
    assert torch.equal(ours.offsets, twin.offsets)
    check_table(ours.tiles, ours.capacity, twin.tiles)
    table, capacity = sorting.tile_table(ours.offsets, ids.numel(), 16)
    check_table(table, capacity, twin.tiles)
    assert torch.equal(combine.invert(ours.order), twin.inverse)


def test_sort_with_several_blocks_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "MAX_CHUNKS", 2)
    ids = make_ids(200, 3, 6, "sentinels")
    ours, twin = sorting.sort_pairs(ids, 6, 32), sorting.sort_pairs_twin(ids, 6, 32)
    assert torch.equal(ours.order, twin.order) and torch.equal(ours.offsets, twin.offsets)
    check_table(ours.tiles, ours.capacity, twin.tiles)


@pytest.mark.parametrize("experts", [5, 40])
def test_sort_of_many_chunks(monkeypatch: pytest.MonkeyPatch, experts: int) -> None:
    """Their counts are added up by a launch of its own."""
    launched: list[str] = []

    class Spy(launch.Start):
        def __call__(self, make: Callable[[], launch.Launch], *args: Any) -> None:
            launched.append(make().kernel.__name__)
            super().__call__(make, *args)

    monkeypatch.setattr(sorting, "MANY_CHUNKS", 3)
    ids = make_ids(300, 3, experts, "sentinels")
    ours, twin = sorting.sort_pairs(ids, experts, 16, start=Spy()), sorting.sort_pairs_twin(ids, experts, 16)
    assert launched == ["count_kernel", "scan_kernel", "place_kernel"]
    assert torch.equal(ours.order, twin.order) and torch.equal(ours.inverse, twin.inverse)
    assert torch.equal(ours.offsets, twin.offsets)
    check_table(ours.tiles, ours.capacity, twin.tiles)


def test_sort_nothing() -> None:
    ours = sorting.sort_pairs(torch.empty(0, 4, dtype=torch.int64), 3, 16)
    assert ours.order.numel() == 0 and ours.offsets.tolist() == [0, 0, 0, 0] and ours.capacity == 0


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 8), (1, 1, 5), (7, 3, 19), (9, 17, 20)])
def test_permute(tokens: int, top_k: int, hidden: int) -> None:
    pairs = sorting.sort_pairs_twin(make_ids(tokens, top_k, 4, "sentinels"), 4)
    wide = torch.randn(tokens, hidden + 3, generator=torch.Generator().manual_seed(3))
    ours = permute(wide[:, :hidden], pairs.inverse, pairs.offsets, top_k)
    twin, valid = permute_twin(wide[:, :hidden], pairs.order, top_k), int(pairs.offsets[4])
    assert ours.shape == twin.shape and torch.equal(ours[:valid], twin[:valid])


@pytest.mark.parametrize(("swap", "tail"), [(False, 0), (True, 0), (True, 2), (False, 1)])
@pytest.mark.parametrize("kind", ["random", "one", "sentinels"])
@pytest.mark.parametrize("separate", [False, True])
def test_grouped_linear(swap: bool, tail: int, kind: str, separate: bool) -> None:
    pairs = sorting.sort_pairs_twin(make_ids(37, 3, 4, kind), 4)
    g = torch.Generator().manual_seed(1)
    rows, w, b = (torch.randn(*s, generator=g) for s in ((111, 21), (4, 35, 21), (4, 35)))
    w_parts, b_parts = (list(w), list(b)) if separate else ([w], [b])
    projection = Projection(make_operand(w_parts, 2), 35, b=make_operand(b_parts, 1))
    plan = Tiles(64 if tail else 16, 32, 16, 4, 2, swap=swap, tail=tail, group=3)
    ours = grouped.grouped_linear(rows, pairs.offsets, projection, plan)
    place = torch.arange(111)
    expert = torch.searchsorted(pairs.offsets.long(), place, right=True) - 1
    twin = grouped.projection_twin(rows, torch.where(place < pairs.offsets[4], expert, -1), projection, None)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)
    assert not ours[int(pairs.offsets[4]) :].any()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 8), (1, 1, 5), (7, 3, 19), (9, 17, 20)])
def test_combine(weighted: bool, tokens: int, top_k: int, hidden: int) -> None:
    ids = make_ids(tokens, top_k, 4, "sentinels")
    pairs = sorting.sort_pairs_twin(ids, 4)
    g = torch.Generator().manual_seed(2)
    rows = torch.randn(tokens * top_k, hidden, generator=g)
    rows[int(pairs.offsets[4]) :] = float("nan")  # rows that nobody owns must not be read
    weights = torch.rand(tokens, top_k, generator=g) if weighted else None
    ours = combine.combine_sorted(rows, pairs.inverse, pairs.offsets, weights, top_k, torch.float32)
    flat = ids.reshape(-1)
    valid = (flat >= 0) & (flat < 4)
    twin = combine.combine_twin(rows, pairs.inverse, valid, weights, top_k, torch.float32)
    torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6)
    by_pair = combine.combine_pairs(rows[pairs.inverse.long()], ids, weights, 4, torch.float32)
    assert torch.equal(by_pair, ours)
