"""Near misses of the products of fp8 weights: scaled outputs, cut and turned weights, tensors of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp8_layers import Loop, ScaledOutputs, Turned, build, check, stays, tokens
from scaled import CHANNEL, SMALL, SQUARE, Near, row, wide
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from moe_compile import rewriting
from moe_compile.canonical import value
from moe_compile.match import fp8

NO_STEP = "mul.Tensor of an expert's value is not a row-wise step of an expert MLP"


def outputs(product: Any) -> dict[str, Any]:
    """Outputs of the widened weight of an expert and its scale, by ``product(x, w, s)``."""

    def method(self: Any, x: Tensor, name: str, e: int) -> Tensor:
        return product(x, getattr(self, f"w{name}")[e].to(x.dtype), getattr(self, f"s{name}")[e])

    return {"scaled": method}


def tied(self: Any, x: Tensor, e: int) -> Tensor:
    """One weight in both layers, of which only the second is scaled."""
    w = self.w2[e].to(x.dtype)
    return F.linear(F.silu(F.linear(x, w)), w) * self.s2[e]


def lanes_up_first(self: Any, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h = F.linear(x, w1)
    return F.linear(F.silu(h[..., 1::2]) * h[..., ::2], w2)


def every_second(self: Any, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1[::2])), w2)


def halves(self: Any, x: Tensor, e: int) -> Tensor:
    """Gate and up have a scale each, which is no scale per channel, block or tensor."""
    h = F.linear(x, self.w1[e].to(x.dtype)).unflatten(1, (2, -1)) * self.s1[e]
    return self.scaled(F.silu(h[:, 0]) * h[:, 1], "2", e)


def of_squares(self: Any, x: Tensor, name: str, e: int) -> Tensor:
    """Right for experts 0 and 1, of which a long loop is traced."""
    return F.linear(x, getattr(self, f"w{name}")[e].to(x.dtype)) * getattr(self, f"s{name}")[e * e % self.experts]


def written_weight(self: Any, name: str, e: int, x: Tensor) -> Tensor:
    """The weight changes between its widening and the product."""
    w = getattr(self, f"w{name}")
    one = w[e].to(x.dtype)
    w.copy_(w.flip(0))
    return one * getattr(self, f"s{name}")[e]


E5M2 = {"w1": torch.ones(4, 32, 24).to(torch.float8_e5m2), "w2": torch.ones(4, 24, 16).to(torch.float8_e5m2)}
OUTPUTS = {
    "of another fp8": Near(ScaledOutputs, NO_STEP, {}, E5M2, SMALL, "MC303"),
    "twice, the weight and its outputs": Near(
        ScaledOutputs, NO_STEP, outputs(lambda x, w, s: F.linear(x, w * s) * s), options=SMALL, code="MC303"
    ),
    "of a weight that is used twice": Near(
        Loop, NO_STEP, {"expert": tied}, options=SMALL | {"hidden": 16}, code="MC303"
    ),
    "by a number": Near(
        ScaledOutputs, "does not end in a linear map but in mul", outputs(lambda x, w, s: F.linear(x, w) * 0.5),
        options=SMALL, code="MC303",
    ),
    "by a number of the input": Near(
        ScaledOutputs, NO_STEP, outputs(lambda x, w, s: F.linear(x, w) * x.mean()), options=SMALL, code="MC303"
    ),
    "by a number with more dimensions": Near(
        ScaledOutputs, NO_STEP, outputs(lambda x, w, s: (F.linear(x, w) * s.view(1, 1, 1))[0]), options=SMALL,
        code="MC303",
    ),
    "through float16": Near(
        ScaledOutputs, "are rounded to float16 before a product in float32",
        outputs(lambda x, w, s: F.linear(x, w) * s.half()), options=CHANNEL | {"way": "channel-flat"},
    ),
    "of halves": Near(
        ScaledOutputs, "counted by something else than the weights", {"expert": halves}, {"s1": (4, 2, 1)}, SMALL
    ),
    "of another expert from the third on": Near(
        ScaledOutputs, "reads the sum of the experts so far",
        {"scaled": of_squares}, options=SMALL | {"experts": 16}, code="MC210",
    ),
}  # fmt: skip

WEIGHTS = {
    "half of a weight": Near(
        Loop, "a slice of fp8 weights is scaled",
        wide(lambda w, s, x: w.to(x.dtype)[: len(s)] * s)
        | {"mlp": lambda self, x, w1, w2: F.linear(F.silu(F.linear(x, w1)), w2)},
        {"s1": (4, 16, 1)}, CHANNEL,
    ),
    "every second row of blocks": Near(
        Loop, "fp8 weights are cut at 0:512, and 128 features share a scale", {"mlp": every_second}, options=SQUARE
    ),
    "half of a turned weight": Near(
        Turned, "a slice of fp8 weights is scaled",
        wide(lambda w, s, x: w.to(x.dtype)[:, : s.shape[-1]] * s)
        | {"mlp": lambda self, x, w1, w2: F.silu(x @ w1) @ w2},
        {"s1": (4, 1, 16)}, CHANNEL,
    ),
    "lanes cut out of blocks": Near(
        Loop, "fp8 weights are cut at 1:512, and 128 features share a scale", {"mlp": lanes_up_first}, options=SQUARE
    ),
    "inputs of turned weights": Near(
        Turned, "each input feature of fp8 weights has its scale", wide(lambda w, s, x: w.to(x.dtype) * s),
        {"s1": (4, 24, 1), "s2": (4, 16, 1)}, CHANNEL,
    ),
    "written before the product": Near(
        Loop, "are computed from an fp8 tensor", {"row": written_weight}, options=SMALL
    ),
}  # fmt: skip

NEAR = OUTPUTS | WEIGHTS


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_stay_as_they_are(name: str) -> None:
    NEAR[name].stays()


def test_tensors_of_their_own_with_one_scale() -> None:
    """No scale tells the experts apart, and yet the op has no stack to read."""
    layer = build(type("Separate", (Loop,), row(lambda self, s, e: s)), way="shared", hidden=24, inter=16)
    for name in ("w1", "w2"):
        parts = nn.ParameterList(nn.Parameter(p.clone(), False) for p in getattr(layer, name))
        delattr(layer, name)
        setattr(layer, name, parts)
    stays(layer, tokens(layer), "MC408", "the fp8 weight of each expert is its own tensor")


def test_scales_of_a_subclass() -> None:
    """Torch takes it apart while it traces: the op would get the whole of it."""
    layer = build(Loop, **SMALL)
    layer.s1 = nn.Parameter(TwoTensor(layer.s1.detach(), layer.s1.detach().clone()), requires_grad=False)
    stays(layer, tokens(layer), "MC402", "the scales of fp8 weights are a TwoTensor")


@pytest.mark.parametrize(
    ("dtype", "has", "code", "said"),
    [
        (torch.float64, (9, 0), "MC401", "the hidden states are float64"),
        (torch.float32, (8, 8), "MC504", "fp8 weights need compute capability 8.9, cuda:0 has 8.8"),
        (torch.float32, (8, 9), None, ""),
        (torch.float32, None, None, ""),
    ],
    ids=str,
)
def test_on_a_gpu(
    dtype: torch.dtype, has: tuple[int, int] | None, code: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one: the copy of the graph that is analysed says that all is there."""
    facts_of = rewriting.facts_of

    def moved(copy: Any) -> Any:
        for node in copy.graph.nodes:
            val = value(node)
            if isinstance(val, FakeTensor):
                meta = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
                node.meta["val"] = FakeTensor(val.fake_mode, meta, torch.device("cuda:0"))
        return facts_of(copy)

    monkeypatch.setattr(rewriting, "facts_of", moved)
    cuda = SimpleNamespace(is_available=lambda: has is not None, get_device_capability=lambda device: has)
    monkeypatch.setattr(fp8, "torch", SimpleNamespace(cuda=cuda, float64=torch.float64))
    layer = build(Loop, dtype, **SMALL)
    if dtype is torch.float64:
        layer.multiply = lambda w, s, dtype: w.to(dtype) * s.to(dtype)
    x = tokens(layer, dtype=dtype)
    if code is not None:
        stays(layer, x, code, said)
    else:
        check(layer, x)
