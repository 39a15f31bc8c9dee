"""fp8 weights that a program widens and multiplies: every form and way of writing the scales becomes one fp8 op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fp8_layers import (
    FEW,
    FORMS,
    FP8,
    WAYS,
    CutWeights,
    Every,
    Gather,
    Loop,
    ScaledOutputs,
    Turned,
    WidenedFirst,
    build,
    check,
    reference,
    tokens,
)
from moe_compile.patterns import FORMS as PATTERNS
from moe_compile.patterns import grouped_mm, name_of
from support import assert_accurate, double_reference, relative, rewritten
from torch import Tensor, nn
from torch.nn import functional as F

import moe_compile
from moe_compile import report
from moe_compile.match import fp8
from moe_compile.spec import NoMatch


@pytest.mark.parametrize(
    ("form", "way"),
    [pytest.param(form, way, id=f"{form.__name__}-{way}") for form in FORMS for way in (WAYS if form is Loop else FEW)],
)
def test_every_way_and_every_form(form: Any, way: str) -> None:
    layer = build(form, way=way)
    check(layer, tokens(layer))


@pytest.mark.parametrize("way", ["tensor-float", "channel", "block"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_gate_and_up_in_two_stacks_in_bfloat16(form: Any, way: str) -> None:
    layer = build(form, torch.bfloat16, way=way, separate=True)
    layer.s1.data, layer.s2.data, layer.s3.data = (s.bfloat16().to(s.dtype) for s in (layer.s1, layer.s2, layer.s3))
    x = tokens(layer, dtype=torch.bfloat16)
    if way != "tensor-float":  # a float32 scale widens the product
        layer.multiply = lambda w, s, dtype, inner=layer.multiply: inner(w, s.to(dtype), dtype)
    check(layer, x)


# ------------------------------------------------------------------------------------- other ways to the same


class UpFirst(Loop):
    """The first half of the fused rows is up, so both halves are cut out of weight and scales."""

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        up, gate = F.linear(x, w1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w2)


class Lanes(Loop):
    """Gate and up alternate."""

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        h = F.linear(x, w1)
        return F.linear(F.silu(h[..., ::2]) * h[..., 1::2], w2)


class NoGate(Loop):
    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        return F.linear(F.relu(F.linear(x, w1)), w2)

    def fp8(self, kind: str, out: int, inner: int) -> tuple[nn.Parameter, nn.Parameter]:
        return super().fp8(kind, self.inter if out == 2 * self.inter else out, inner)


class Zipped(Loop):
    """Stacks taken apart by iteration."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, (w1, s1, w2, s2) in enumerate(zip(self.w1, self.s1, self.w2, self.s2, strict=True)):
            token, slot = torch.where(ids == e)
            y = self.mlp(x[token], self.wide(w1, s1, x), self.wide(w2, s2, x))
            out.index_add_(0, token, y * w[token, slot, None])
        return out


class OnInput(Loop):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token] * w[token, slot, None], e))
        return out


class Buffers(Loop):
    """Weights and scales are no parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("w1", "s1", "w2", "s2"):
            tensor = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, tensor)


class ScaledEvery(Every):
    """The same for all experts at once, and for gathered weights (below)."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        s1, s2 = (s.view(self.experts, 1, -1) for s in (self.s1, self.s2))
        h = torch.einsum("th,eoh->eto", x, self.w1.to(x.dtype)) * s1
        gate, up = h.chunk(2, -1)
        y = s2 * torch.einsum("eti,ehi->eth", F.silu(gate) * up, self.w2.to(x.dtype))
        combine = torch.zeros(len(x), self.experts, dtype=w.dtype).scatter(1, ids, w)
        return (y * combine.t()[..., None]).sum(0)


class ScaledGather(Gather):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        s1, s2 = (s[ids].view(*ids.shape, -1) for s in (self.s1, self.s2))
        gate, up = (torch.einsum("th,tkoh->tko", x, self.w1[ids].to(x.dtype)) * s1).chunk(2, -1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, self.w2[ids].to(x.dtype)) * s2
        return torch.einsum("tkh,tk->th", y, w)


@pytest.mark.parametrize("way", ["tensor", "channel", "channel-flat"])
@pytest.mark.parametrize("form", [ScaledOutputs, ScaledEvery, ScaledGather], ids=lambda f: f.__name__)
def test_scales_of_the_outputs(form: Any, way: str) -> None:
    layer = build(form, way=way)
    check(layer, tokens(layer))


OTHERS = (Turned, UpFirst, CutWeights, Lanes, NoGate, Zipped, OnInput, Buffers)


@pytest.mark.parametrize("way", ["tensor", "channel-flat", "block", "block-tiles"])
@pytest.mark.parametrize("form", OTHERS, ids=lambda f: f.__name__)
def test_other_experts(form: Any, way: str) -> None:
    if form is Turned and way == "channel-flat":
        pytest.skip("written for weights [E, out, in]")
    sizes = {"hidden": 160, "inter": 256} if form in (UpFirst, CutWeights) and way == "block" else {}
    layer = build(form, way=way, **sizes)
    check(layer, tokens(layer))


@pytest.mark.parametrize("sizes", [dict(top_k=1), dict(top_k=4), dict(experts=2, top_k=1)], ids=str)
@pytest.mark.parametrize("form", [Loop, Gather], ids=lambda f: f.__name__)
def test_other_sizes(form: Any, sizes: dict[str, int]) -> None:
    layer = build(form, way="block", **sizes)
    check(layer, tokens(layer))


def test_a_computed_scale() -> None:
    """``1 / scale`` of a parameter is a scale like any other."""

    class Inverse(Loop):
        def row(self, name: str, e: int, x: Tensor) -> Tensor:
            return self.wide(getattr(self, f"w{name}")[e], (1 / getattr(self, f"s{name}"))[e], x)

    layer = build(Inverse)
    layer.s1.data, layer.s2.data = 1 / layer.s1.data, 1 / layer.s2.data
    check(layer, tokens(layer))


@pytest.mark.parametrize("count", [1, 2, 40])
def test_one_dynamic_graph_serves_every_size(count: int) -> None:
    layer = build(Loop, way="block")
    x = tokens(layer, 6)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    outcome = rewritten(layer, x)
    assert outcome.ops == ["experts_fp8.default"], outcome.sites
    y = tokens(layer, count)
    torch._dynamo.decorators.mark_unbacked(y, 0)
    with torch.no_grad():
        assert_accurate(outcome.call(y), layer(y), reference(layer, y))
    assert len(outcome.graphs) == 1


def test_many_experts_are_traced_as_two() -> None:
    """A loop that is shrunk to experts 0 and 1 (``loops/shrinking``) grows back with the scales of each."""
    layer = build(Loop, way="channel", experts=12, hidden=24, inter=16)
    check(layer, tokens(layer))


@pytest.mark.parametrize("way", ["tensor", "channel", "block"])
def test_through_inductor(way: str) -> None:
    torch._dynamo.reset()
    layer = build(Loop, way=way)
    x = tokens(layer)
    with torch.no_grad(), report.collect() as found:
        out = torch.compile(layer, backend="moe_compile")(x)
        assert_accurate(out, layer(x), reference(layer, x))
    assert [(s.status, s.code) for s in found.sites] == [("rewritten", None)]


def test_explain_says_fp8_and_check_judges_by_float64() -> None:
    layer = build(Loop, torch.bfloat16, way="tensor-float")
    x = tokens(layer, dtype=torch.bfloat16)
    (site,) = moe_compile.explain(layer, x).sites
    assert site.kernel == "cpu: GEMMs; fp8 weights, widened in the kernel"
    assert "fp8 weights" in site.spec.describe()
    result = moe_compile.check(layer, x)
    assert result.ok and result.rewritten == 1, str(result)
    assert result.reference == "float64" and result.error_ours < result.error_original


class SwappedScales(Loop):
    """w1's scales on w2, where sizes allow it: another layer, but one that can be told."""

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        return self.wide(getattr(self, f"w{name}")[e], self.s1[e], x)


class TurnedScales(Loop):
    """A square of blocks, the other way round."""

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return super().wide(w, s.t() if s.shape[0] == s.shape[1] else s, x)


@pytest.mark.parametrize(("form", "way"), [(SwappedScales, "tensor"), (TurnedScales, "block")])
def test_odd_scales_are_rewritten_as_they_are(form: Any, way: str) -> None:
    layer = build(form, way=way, hidden=256, inter=256)
    check(layer, tokens(layer))


def test_a_stack_widened_in_an_unknown_way_is_a_plain_weight() -> None:
    """The program holds the widened stack anyway, so nothing is lost by the op of plain weights."""

    class Square(WidenedFirst):
        def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
            return w.to(x.dtype) * s.repeat_interleave(64, -2).repeat_interleave(64, -1)

    class E5m2Stack(WidenedFirst):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.w1, self.w2 = (nn.Parameter(w.float().to(torch.float8_e5m2), False) for w in (self.w1, self.w2))

    square = build(Square, way="block", hidden=128, inter=128)
    square.s1, square.s2 = (nn.Parameter(torch.rand(4, n // 64, 2)) for n in (256, 128))
    for layer in (square, build(E5m2Stack, way="block")):
        x = tokens(layer)
        outcome = rewritten(layer, x)
        assert outcome.ops == ["experts.default"]
        with torch.no_grad():
            assert relative(outcome.out, reference(layer, x)) < 1e-6


@pytest.mark.parametrize("asks", ["x", "scale"])
def test_where_gradients_are_needed_the_original_stays(asks: str) -> None:
    layer = build(Loop, experts=2, top_k=1)
    for p in layer.parameters():
        p.requires_grad_(False)
    x = tokens(layer)
    (x if asks == "x" else layer.s2).requires_grad_()
    torch._dynamo.reset()
    with report.collect() as found:
        out = torch.compile(layer, backend="moe_compile")(x)
    assert [(s.status, s.code) for s in found.sites] == [("refused", "MC507")]
    out.sum().backward()
    assert (x if asks == "x" else layer.s2).grad is not None


def test_without_the_instructions_the_original_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(NoMatch, match=r"MC504: fp8 weights need compute capability 8.9, cuda has 8.0"):
        fp8._check_device(torch.device("cuda"), None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    fp8._check_device(torch.device("cuda"), None)


# ------------------------------------------------------------------------------------- the examples of every form


def in_fp8(example: Any) -> Any:
    """An example whose stacked weights are fp8: reading one widens it."""

    def __init__(self: Any) -> None:
        example.__init__(self)
        self.names = [name for name, p in self.named_parameters(recurse=False) if p.dim() == 3]
        for name in self.names:
            wide = self._parameters.pop(name).detach()
            scale = wide.abs().amax((1, 2)) / 448
            setattr(self, f"{name}_fp8", nn.Parameter((wide / scale[:, None, None]).to(FP8), False))
            setattr(self, f"{name}_scale", nn.Parameter(scale))

    def widened(name: str) -> property:
        def read(self: Any) -> Tensor:
            scale = getattr(self, f"{name}_scale")
            return getattr(self, f"{name}_fp8").to(scale.dtype) * scale[:, None, None]

        return property(read)

    names = [name for name, p in example().named_parameters(recurse=False) if p.dim() == 3]
    return type(example.__name__, (example,), {"__init__": __init__, **{name: widened(name) for name in names}})


def stacked(example: Any) -> bool:
    parameters = dict(example().named_parameters(recurse=False))
    return bool(parameters) and all(p.dim() == 3 for p in parameters.values())


STACKED = [(form, example) for form in PATTERNS for example in form.EXAMPLES if stacked(example)]


@pytest.mark.parametrize(
    ("form", "example"), [pytest.param(f, x, id=f"{name_of(f)}-{x.__name__}") for f, x in STACKED]
)
def test_examples_of_every_form(form: Any, example: Any) -> None:
    torch.manual_seed(0)
    layer = in_fp8(example)().eval()
    dtype = torch.bfloat16 if form is grouped_mm else torch.float32
    layer.router.to(dtype)
    if form is grouped_mm:
        for name in layer.names:
            scale = getattr(layer, f"{name}_scale")
            scale.data = scale.data.bfloat16()
    x = tokens(layer, dtype=dtype)
    outcome = rewritten(layer, x)
    assert outcome.ops == ["experts_fp8.default"], outcome.sites
    assert [(s.status, s.form) for s in outcome.sites] == [("rewritten", name_of(form))]
    with torch.no_grad():
        if form is grouped_mm:
            assert relative(outcome.out, layer(x)) < 2e-2
        else:
            assert_accurate(outcome.out, layer(x), double_reference(layer, x))
