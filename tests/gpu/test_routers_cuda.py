"""Fused routers on a real device: found in torch's graph there, and as accurate as the original."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import assert_accurate  # noqa: E402
from test_routers import FUSED, LEFT, Fp8Layer, H, Layer, watched  # noqa: E402

from moe_compile import routers  # noqa: E402
from moe_compile.kernels.route import route  # noqa: E402
from moe_compile.spec import Router  # noqa: E402


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[routers.Chain]]:
    with watched(monkeypatch) as found:
        yield found


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("name", FUSED)
def test_common_routers_are_one_launch(name: str, tokens: int, chains: list[routers.Chain]) -> None:
    source, expected = FUSED[name]
    layer = Layer(source).cuda().bfloat16().eval()
    x = torch.randn(tokens, H, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    with torch.no_grad():
        ours = torch.compile(layer, backend="moe_compile", fullgraph=True)(x)
        truth = Layer(source).bfloat16().double()(x.cpu().double())
        assert_accurate(ours.cpu(), layer(x).cpu(), truth)
    assert [c.router for c in chains] == [expected]


@pytest.mark.parametrize("name", FUSED)
def test_routers_of_fp8_experts_are_one_launch(name: str, chains: list[routers.Chain]) -> None:
    source, expected = FUSED[name]
    layer = Fp8Layer(source).cuda().eval()
    x = torch.randn(5, H, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():
        ours = torch.compile(layer, backend="moe_compile", fullgraph=True)(x)
        torch.testing.assert_close(ours, layer(x), rtol=2e-2, atol=2e-2)
    assert [c.router for c in chains] == [expected]


@pytest.mark.parametrize("name", [n for n in LEFT if n != "chosen_over_tokens"])
def test_other_routers_stay(name: str, chains: list[routers.Chain]) -> None:
    layer = Layer(LEFT[name]).cuda().eval()
    with torch.no_grad():
        torch.compile(layer, backend="moe_compile", fullgraph=True)(torch.randn(6, H, device="cuda"))
    assert chains == []


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 128, 8), (5, 8, 2), (4096, 160, 6), (300, 1024, 8)])
def test_kernel_equals_its_twin(score: str, tokens: int, experts: int, top_k: int) -> None:
    logits = torch.randn(tokens, experts, device="cuda", generator=torch.Generator("cuda").manual_seed(tokens))
    router = Router(score, scale=2.5)
    weights, ids = route(logits, top_k, router, torch.float32)
    expected, expected_ids = router.reference(logits.double(), top_k, torch.float64)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)


def test_ties_and_what_is_no_number() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, 2, 2, 2], [0, 0, 0, 0], [-1, -inf, -inf, -2], [nan, 1, nan, 0], [nan] * 4, [-inf] * 4])
    weights, ids = route(logits.cuda(), 3, Router(), torch.float32)
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2], [0, 3, 1], [0, 2, 1], [0, 1, 2], [0, 1, 2]]
    assert bool(weights[3:].isnan().all()) and bool(weights[:3].isfinite().all())
