"""Naive fp8 layers on a real device: every kind of scale on every path of Triton, by the float64 rule.

The layers are those of ``tests/fp8_layers.py``; which path ran is asserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import fp8_layers as forms  # noqa: E402
from replays import long_way  # noqa: E402
from support import assert_accurate, double_reference  # noqa: E402

from moe_compile import report  # noqa: E402
from moe_compile.kernels import scaled_experts  # noqa: E402
from moe_compile.ops import calls  # noqa: E402

KINDS = ("tensor-float", "channel-float", "block-float")


@pytest.fixture
def taken() -> Iterator[list[str]]:
    """The paths that calls took."""
    seen: list[str] = []
    scaled = scaled_experts.follow_scaled

    def spy(plan: Any, *args: Any) -> Any:
        seen.append(plan.path)
        return scaled(plan, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled_experts, "follow_scaled", spy)
        calls.kernel.cache_clear()
        with long_way():
            yield seen
    calls.kernel.cache_clear()


def path_of(tokens: int, way: str) -> str:
    """A scale per output channel has no matrix-vector kernel."""
    if tokens <= 2:
        return "decode" if way.startswith("channel") else "gemv"
    return "decode" if tokens <= 32 else "sorted"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("form", [forms.Loop, forms.WidenedFirst, forms.Gather], ids=lambda f: f.__name__)
@pytest.mark.parametrize("separate", [False, True])
def test_compiled(form: Any, way: str, separate: bool, dtype: torch.dtype, taken: list[str]) -> None:
    if form is not forms.Loop and dtype != torch.bfloat16:
        pytest.skip("one form is enough for the other dtypes")
    layer = forms.build(form, way=way, separate=separate, hidden=320, inter=192).cuda()
    layer.router.to(dtype)
    torch._dynamo.reset()
    with torch.no_grad(), report.collect() as found:
        compiled = torch.compile(layer, backend="moe_compile", dynamic=True)
        for tokens in (1, 2, 16, 33, 300):
            x = forms.tokens(layer, tokens).to("cuda", dtype)
            taken.clear()
            out = compiled(x)
            assert taken == [path_of(tokens, way)]
            assert_accurate(out, layer(x), double_reference(layer, x))
    assert {(s.status, s.kernel) for s in found.sites} == {
        ("rewritten", "cuda: Triton, by T; fp8 weights, widened in the kernel")
    }


@pytest.mark.parametrize("way", KINDS)
def test_sizes_of_real_layers(way: str, taken: list[str]) -> None:
    """Many columns and a deep sum: eight experts of 2048 x 1536."""
    layer = forms.build(forms.Loop, way=way, hidden=2048, inter=1536, experts=8).cuda()
    layer.router.to(torch.bfloat16)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="moe_compile", dynamic=True)
        for tokens in (1, 64, 700):
            x = forms.tokens(layer, tokens).to("cuda", torch.bfloat16)
            taken.clear()
            out = compiled(x)
            assert taken == [path_of(tokens, way)]
            assert_accurate(out, layer(x), double_reference(layer, x))
