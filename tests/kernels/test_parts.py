"""Calls of many tokens in parts: their sizes, and the ops that follow them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import Layer, quantised, relative_error

from moe_compile.kernels import experts, scaled_experts
from moe_compile.ops import calls, cuda, fp8, parts
from moe_compile.ops.parts import LEAST, SHARE, STEP, tokens_of_part


def size(tokens: int, memory: int, top_k: int = 2, hidden: int = 24, inter: int = 16) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "memory_of", lambda device: memory)
        x = torch.empty(1, 1, dtype=torch.bfloat16).expand(tokens, hidden)
        return tokens_of_part(x, torch.empty(1, 1).expand(tokens, top_k), inter)


def test_sizes() -> None:
    room = 4096 * 384 * SHARE  # for 4096 tokens, of 2 * (2 * 24 + 3 * 16) * 2 bytes each
    assert size(4096, room) == 0
    assert size(4097, room) == 2176  # two parts of about the same size, in steps of 128
    assert size(8192, room) == 4096 and size(8193, room) == 2816
    assert size(4096, room - 1) == 2048
    assert size(LEAST, 0) == 0 and size(LEAST + 1, 0) == 640  # no smaller parts, however small the GPU
    assert size(10**6, 0) == LEAST
    assert size(4097, 2 * room, top_k=4) == size(4097, 2 * room, hidden=72) == size(4097, 2 * room, inter=48) == 2176


@given(st.integers(1, 10**7), st.integers(0, 1 << 40), st.integers(1, 16), st.integers(0, 8192), st.integers(0, 8192))
def test_parts_are_bounded(tokens: int, memory: int, top_k: int, hidden: int, inter: int) -> None:
    part = size(tokens, memory, top_k, hidden, inter)
    room, each = memory // SHARE, top_k * (2 * hidden + 3 * inter) * 2
    assert (part == 0) == (tokens <= LEAST or tokens * each <= room)
    if part:
        assert part < tokens and part % STEP == 0
        assert part * each <= room or part <= LEAST


@pytest.fixture
def small(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU so small that five tokens are two parts."""
    for name, value in (("LEAST", 3), ("STEP", 1), ("memory_of", lambda device: 0)):
        monkeypatch.setattr(parts, name, value)
    calls.kind_of.cache_clear()
    yield
    calls.kind_of.cache_clear()


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were computed at a time."""
    seen: list[int] = []
    for module, name in ((experts, "follow_plan"), (scaled_experts, "follow_scaled")):
        follow = getattr(module, name)
        monkeypatch.setattr(module, name, lambda plan, x, *a, f=follow: seen.append(len(x)) or f(plan, x, *a))
    calls.kernel.cache_clear()
    return seen


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_experts(on_input: bool, separate: bool, tokens: list[int]) -> None:
    layer = Layer(
        11, 4, 2, 12, 10, layout="separate", separate=separate, bias=True, weight_on_input=on_input,
        routing="sentinels",
    )  # fmt: skip
    layer.x = layer.x.t().contiguous().t()
    for again in (False, True):  # the second call is checked and planned already
        out = cuda.experts(*layer.op_args(), torch.float64)  # type: ignore[arg-type]
        assert out.is_contiguous() and out.dtype == torch.float64
        assert relative_error(out, layer.truth()) < 2e-6
        assert tokens == [3, 3, 3, 2] * (2 if again else 1)
    tokens.clear()
    cuda.experts(*layer.op_args(), path="sorted")  # type: ignore[arg-type]
    cuda.experts(*Layer(3, 4, 2, 12, 10).op_args())  # type: ignore[arg-type]
    assert tokens == [11, 3]


@pytest.mark.usefixtures("small")
def test_fp8(tokens: list[int]) -> None:
    layer = Layer(5, 3, 2, 256, 192, layout="separate", routing="sentinels")
    up, down = quantised(layer)
    assert up.up is not None
    args: list[Any] = [layer.x, layer.weights, layer.ids, up.w.first, up.scale, down.w.first, down.scale]
    more: dict[str, Any] = {"quantise": False, "w3": up.up.first, "w3_scale": up.up_scale}
    out = fp8.experts_fp8(*args, "silu", layer.activation.args(), True, **more)
    assert tokens == [3, 2]
    assert relative_error(out, layer.truth()) < 3e-6
    fp8.experts_fp8(*args, "silu", layer.activation.args(), True, **more, path="decode")
    assert tokens == [3, 2, 5]
