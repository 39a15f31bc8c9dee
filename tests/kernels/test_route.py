"""The router kernel against its twin, ``spec.Router.reference``."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_compile.kernels.route import route
from moe_compile.spec import Router

ROUTERS = {
    "softmax": Router("softmax", renormalise=False),
    "renormalised": Router("softmax"),
    "sigmoid": Router("sigmoid", eps=1e-20, scale=2.5),
    "sigmoid as it is": Router("sigmoid", renormalise=False, scale=0.5),
}
SIZES = [(1, 1, 1), (1, 2, 8), (3, 8, 128), (4, 4, 32), (9, 3, 5), (6, 6, 160)]


def logits_of(tokens: int, experts: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens + experts)) * 3


@pytest.mark.parametrize(("router", "size"), list(itertools.product(ROUTERS, SIZES)))
def test_equals_its_twin(router: str, size: tuple[int, int, int]) -> None:
    tokens, top_k, experts = size
    logits = logits_of(tokens, experts)
    weights, ids = route(logits, top_k, ROUTERS[router], torch.float32)
    expected, expected_ids = ROUTERS[router].reference(logits, top_k, torch.float32)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


def test_logits_of_any_layout_and_dtype() -> None:
    wide = logits_of(6, 20).bfloat16()
    for logits in (wide[:, :12], wide[:, ::2], wide.t()):
        weights, ids = route(logits, 2, Router(), torch.bfloat16)
        expected, _ = Router().reference(logits, 2, torch.bfloat16)
        assert weights.dtype == torch.bfloat16
        torch.testing.assert_close(logits.gather(1, ids), torch.topk(logits, 2).values, rtol=0, atol=0)
        torch.testing.assert_close(weights, expected)


def test_equal_logits_go_to_the_lower_expert() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1.0, float("-inf"), float("-inf"), -2.0]])
    _, ids = route(logits, 3, Router(), torch.float32)
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2], [0, 3, 1]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
def test_what_is_no_number(value: float, score: str) -> None:
    """As torch does: NaN is the largest, makes its token NaN and no other; every id is one of an expert."""
    logits = logits_of(5, 5)
    logits[2, 3] = value
    logits[4] = value
    for renormalise in (False, True):
        router = Router(score, renormalise=renormalise)
        weights, ids = route(logits, 2, router, torch.float32)
        expected, expected_ids = router.reference(logits, 2, torch.float32)
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
        assert torch.equal(ids[:4], expected_ids[:4])
        assert ids[4].tolist() == [0, 1]


def test_no_tokens() -> None:
    weights, ids = route(torch.empty(0, 4), 2, Router(), torch.float16)
    assert weights.shape == ids.shape == (0, 2) and weights.dtype == torch.float16 and ids.dtype == torch.int64
