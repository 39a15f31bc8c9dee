"""Routers become one launch where every step is proved, and stay what they are everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_accurate
from torch import Tensor, nn

import moe_compile
from moe_compile import lower, router_pass, routers
from moe_compile.quantize import quantize_blocks
from moe_compile.spec import Router

T, E, K, H, I = 6, 8, 2, 16, 24
Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [T, E] and bias [E] -> weights, ids [T, K]


class Layer(nn.Module):
    """``[T, H]`` -> ``[T, H]``: a router of any kind before stacked experts."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.route = route
        self.gate = nn.Parameter(torch.randn(E, H, generator=g))
        self.bias = nn.Parameter(torch.randn(E, generator=g))
        self.w1 = nn.Parameter(torch.randn(E, 2 * I, H, generator=g) * H**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, H, I, generator=g) * I**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(F.linear(x, self.gate), self.bias)
        return moe_compile.fused_experts(x, self.w1, self.w2, weights, ids)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[routers.Chain]]:
    """The routers that are fused inside; graphs in Inductor's cache would be found there and meet no pass."""
    found: list[routers.Chain] = []
    fuse = lower.fuse_router

    def spy(chain: routers.Chain) -> None:
        found.append(chain)
        fuse(chain)

    monkeypatch.setattr(lower, "fuse_router", spy)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield found


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[routers.Chain]]:
    monkeypatch.setattr(router_pass, "DEVICES", ("cpu",))
    with watched(monkeypatch) as found:
        yield found


def run(route: Route, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, the original and float64."""
    layer = Layer(route).to(dtype).eval()
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        ours = torch.compile(layer, backend="moe_compile", fullgraph=True)(x)
        return ours, layer(x), Layer(route).to(dtype).double()(x.double())


def mixtral(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(logits.float(), dim=-1), K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, ids


def qwen(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), K, dim=-1)
    return weights.to(logits.dtype), ids


def gpt_oss(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(logits, K, dim=-1)
    return F.softmax(values, dim=1, dtype=values.dtype), ids


def deepseek(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().sigmoid()
    ids = torch.topk(scores, K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, ids


def scaled(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.float().softmax(-1), K)
    return (weights * 16).to(logits.dtype), ids


FUSED: dict[str, tuple[Route, Router]] = {
    "softmax, renormalised in place": (mixtral, Router("softmax", True)),
    "softmax, cast": (qwen, Router("softmax", False)),
    "softmax of the chosen": (gpt_oss, Router("softmax", True)),
    "sigmoid, gathered, scaled": (deepseek, Router("sigmoid", True, 1e-20, 2.5)),
    "softmax, scaled": (scaled, Router("softmax", False, 0.0, 16.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_common_routers_are_one_call(name: str, dtype: torch.dtype, chains: list[routers.Chain]) -> None:
    route, expected = FUSED[name]
    assert_accurate(*run(route, dtype))
    assert [c.router for c in chains] == [expected]


class Fp8Layer(Layer):
    """The same before experts in fp8; rows are rounded too."""

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        for name, w in (("1", self.w1), ("2", self.w2)):
            for part, tensor in zip("qs", quantize_blocks(w.detach()), strict=True):
                self.register_buffer(part + name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(F.linear(x, self.gate), self.bias)
        return moe_compile.deep_gemm_moe_fp8(x, self.q1, self.q2, self.s1, self.s2, weights, ids)


@pytest.mark.parametrize("name", FUSED)
def test_routers_of_fp8_experts_are_one_call(name: str, chains: list[routers.Chain]) -> None:
    route, expected = FUSED[name]
    layer, x = Fp8Layer(route).eval(), torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = torch.compile(layer, backend="moe_compile", fullgraph=True)(x)
        torch.testing.assert_close(ours, layer(x), rtol=1e-5, atol=1e-5)
    assert [c.router for c in chains] == [expected]


def with_bias(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().sigmoid()
    ids = torch.topk(scores + bias, K)[1]
    return scores.gather(1, ids), ids


def smallest(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(logits.float().softmax(-1), K, largest=False)


def over_tokens(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(logits.float().softmax(0), K)


def chosen_over_tokens(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.float().softmax(-1)[:, :T], K, dim=0)
    return weights.t().repeat(1, 3)[:, :K].contiguous(), ids.t().repeat(1, 3)[:, :K].contiguous().new_zeros(T, K)


def sum_of_others(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().softmax(-1)
    weights, ids = torch.topk(scores, K)
    return weights / (scores * scores).sum(-1, keepdim=True), ids


def sum_over_tokens(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.float().softmax(-1), K)
    return weights / weights.sum(0, keepdim=True), ids


def two_decisions(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().softmax(-1)
    weights = torch.topk(scores, K)[0]
    return weights, torch.topk(scores + bias, K)[1]


def other_scores(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.topk(logits.float().softmax(-1), K)[1]
    return logits.float().sigmoid().gather(1, ids), ids


def ids_swapped(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().softmax(-1)
    ids = torch.topk(scores, K)[1]
    return scores.gather(1, ids.flip(-1)), ids


def temperature(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(logits, K)
    return F.softmax(values.float() * 0.5, dim=-1), ids


def rounded_between(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.float().softmax(-1), K)
    weights = weights.bfloat16()
    return weights / weights.sum(-1, keepdim=True), ids


def scale_of_tokens(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.float().softmax(-1), K)
    return weights * bias[ids], ids


def whole_numbers(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk((logits * 100).to(torch.int32).float().softmax(-1), K)
    return weights, ids


def shifted(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.float()
    powers = (z - z.amin(-1, keepdim=True)).exp()
    return torch.topk(powers / (powers.sum(-1, keepdim=True) + 1), K)


LEFT: dict[str, Route] = {
    f.__name__: f for f in (
        with_bias, smallest, over_tokens, sum_of_others, sum_over_tokens, two_decisions, other_scores, ids_swapped,
        temperature, rounded_between, scale_of_tokens, shifted, chosen_over_tokens,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_other_routers_stay(name: str, chains: list[routers.Chain]) -> None:
    run(LEFT[name])
    assert chains == []


def test_logits_before_a_cast_to_whole_numbers_are_not_the_logits(chains: list[routers.Chain]) -> None:
    assert_accurate(*run(whole_numbers))
    assert [c.logits.meta["val"].dtype for c in chains] == [torch.float32]


def test_other_uses_of_the_scores_keep_them(chains: list[routers.Chain]) -> None:
    class Returns(Layer):
        def forward(self, x: Tensor) -> Any:
            logits = F.linear(x, self.gate)
            scores = F.softmax(logits, dim=-1)
            weights, ids = torch.topk(scores, K)
            out = moe_compile.fused_experts(x, self.w1, self.w2, weights, ids)
            return out, scores.mean(0), ids, weights

    layer, x = Returns(qwen).eval(), torch.randn(T, H)
    with torch.no_grad():
        ours, expected = torch.compile(layer, backend="moe_compile", fullgraph=True)(x), layer(x)
    assert len(chains) == 1
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_pass_of_the_user_keeps_its_place(chains: list[routers.Chain]) -> None:
    seen: list[Any] = []
    with torch._inductor.config.patch(post_grad_custom_pre_pass=seen.append, force_disable_caches=True):
        run(qwen)
    assert seen and chains == []


def test_a_cpu_keeps_its_router(chains: list[routers.Chain], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_pass, "DEVICES", ("cuda",))
    run(qwen)
    assert chains == []


def test_op_refuses_what_it_cannot_take() -> None:
    route = torch.ops.moe_compile.route
    with pytest.raises(ValueError, match="top_k is 9"):
        route(torch.zeros(3, 8), 9, "softmax", True, 0.0, 1.0, torch.float32)
    with pytest.raises(ValueError, match="score 'relu'"):
        route(torch.zeros(3, 8), 2, "relu", True, 0.0, 1.0, torch.float32)
    with pytest.raises(ValueError, match=r"\[T, E\]"):
        route(torch.zeros(2, 3, 8), 2, "softmax", True, 0.0, 1.0, torch.float32)
    with pytest.raises(TypeError, match="int64"):
        route(torch.zeros(3, 8, dtype=torch.int64), 2, "softmax", True, 0.0, 1.0, torch.float32)


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.moe_compile.route.default, (torch.randn(3, 8), 2, "softmax", True, 0.0, 1.0, torch.bfloat16)
    )
