"""fp8 weights that a program widens and multiplies: every form and way of writing the scales becomes one fp8 op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_compile.patterns._examples import Layer
from support import assert_accurate, double_reference, relative, rewritten
from torch import Tensor, nn
from torch.nn import functional as F

import moe_compile
from moe_compile import report
from moe_compile.match import fp8
from moe_compile.quantize import quantize_blocks
from moe_compile.spec import NoMatch

FP8 = torch.float8_e4m3fn


def blocks(w: Tensor, s: Tensor) -> Tensor:
    """``s`` for every element, with what lies past the end of ``w`` cut off."""
    return s.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : w.shape[-2], : w.shape[-1]]


def tiles(w: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """The other way round: the weight cut into blocks."""
    *lead, n, k = w.shape
    cut = w.to(dtype).view(*lead, n // 128, 128, k // 128, 128)
    return (cut * s[..., :, None, :, None].to(dtype)).view(*lead, n, k)


def copies(w: Tensor, s: Tensor) -> Tensor:
    """The scales copied by ``expand``."""
    *lead, rows, columns = s.shape
    return s[..., :, None, :, None].expand(*lead, rows, 128, columns, 128).reshape(*lead, rows * 128, columns * 128)


def lift(s: Tensor, w: Tensor) -> Tensor:
    """A scale per tensor (or per channel) against a matrix or a stack of them."""
    return s if w.dim() == 2 or not s.dim() else s.view(*s.shape, *[1] * (w.dim() - s.dim()))


# name -> (kind of scale, how it is multiplied in)
WAYS: dict[str, tuple[str, Any]] = {
    "tensor": ("tensor", lambda w, s, dtype: w.to(dtype) * lift(s, w)),
    "tensor-float": ("tensor", lambda w, s, dtype: (w.float() * lift(s, w)).to(dtype)),
    "tensor-first": ("tensor", lambda w, s, dtype: lift(s, w).to(dtype) * w.to(dtype)),
    "tensor-ones": ("tensor-ones", lambda w, s, dtype: w.to(dtype) * s),
    "shared": ("shared", lambda w, s, dtype: w.to(dtype) * s),
    "shared-one": ("shared-one", lambda w, s, dtype: (w.to(dtype) * s).to(dtype)),
    "channel": ("channel", lambda w, s, dtype: w.to(dtype) * s),
    "channel-flat": ("channel-flat", lambda w, s, dtype: w.to(dtype) * s[..., None]),
    "channel-float": ("channel-flat", lambda w, s, dtype: (w.float() * s.unsqueeze(-1)).to(dtype)),
    "channel-bf16": ("channel-bf16", lambda w, s, dtype: w.to(dtype) * s),
    "block": ("block", lambda w, s, dtype: w.to(dtype) * blocks(w, s)),
    "block-float": ("block", lambda w, s, dtype: (w.float() * blocks(w, s)).to(dtype)),
    "block-tiles": ("block", tiles),
    "block-copies": ("block", lambda w, s, dtype: w.to(dtype) * copies(w, s)),
    "rows": ("rows", lambda w, s, dtype: w.to(dtype) * s.repeat_interleave(128, -2)[..., : w.shape[-2], :]),
}  # fmt: skip
WHOLE = ("block-tiles", "block-copies")  # these need whole blocks
FEW = ("tensor", "shared", "channel-flat", "block", "block-tiles")


class Fp8(Layer):
    """Weights and scales; ``way`` says how they are multiplied. ``up`` of its own with ``separate``."""

    form = ""
    turned = False  # weights [E, in, out]

    def __init__(self, way: str = "tensor", separate: bool = False, **sizes: int) -> None:
        whole = {"hidden": 128, "inter": 256} if way in WHOLE else {"hidden": 160, "inter": 192}
        super().__init__(**{**whole, **sizes})
        kind, self.multiply = WAYS[way]
        self.separate = separate
        rows = self.inter if separate else 2 * self.inter
        self.w1, self.s1 = self.fp8(kind, rows, self.hidden)
        if separate:
            self.w3, self.s3 = self.fp8(kind, rows, self.hidden)
        self.w2, self.s2 = self.fp8(kind, self.hidden, self.inter)

    def fp8(self, kind: str, out: int, inner: int) -> tuple[nn.Parameter, nn.Parameter]:
        wide = torch.randn(self.experts, out, inner) / inner**0.5
        q, scale = quantize_blocks(wide)
        if kind != "block":
            e = self.experts
            shape = {
                "tensor": (e,), "tensor-ones": (e, 1, 1), "shared": (), "shared-one": (1,), "channel": (e, out, 1),
                "channel-flat": (e, out), "channel-bf16": (e, out, 1), "rows": (e, -(-out // 128), 1),
            }[kind]  # fmt: skip
            scale = (torch.rand(shape) + 0.5) / 448
            q = (wide * 448 / 4).to(FP8)
        scale = scale.bfloat16() if kind == "channel-bf16" else scale
        if self.turned:
            q = q.mT.contiguous()
            scale = scale.mT.contiguous() if scale.dim() == 3 else scale
        return nn.Parameter(q, requires_grad=False), nn.Parameter(scale)

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return self.multiply(w, s, x.dtype)

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        s = getattr(self, f"s{name}")
        return self.wide(getattr(self, f"w{name}")[e], s[e] if s.dim() and s.numel() > 1 else s, x)

    def whole(self, name: str, x: Tensor) -> Tensor:
        return self.wide(getattr(self, f"w{name}"), getattr(self, f"s{name}"), x)

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        if w3 is None:
            gate, up = F.linear(x, w1).chunk(2, dim=-1)
        else:
            gate, up = F.linear(x, w1), F.linear(x, w3)
        return F.linear(F.silu(gate) * up, w2)

    def expert(self, x: Tensor, e: int) -> Tensor:
        w3 = (self.row("3", e, x),) if self.separate else ()
        return self.mlp(x, self.row("1", e, x), self.row("2", e, x), *w3)


class Loop(Fp8):
    form = "index_add_loop"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, slot, None])
        return out


class Mask(Fp8):
    form = "bool_mask_loop"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            mask = (ids == e).any(-1)
            if mask.any():
                out[mask] += torch.where(ids == e, w, 0.0).sum(-1)[mask, None] * self.expert(x[mask], e)
        return out


class WidenedFirst(Fp8):
    """The whole stacks are widened before the loop."""

    form = "index_add_loop"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        every = [self.whole(name, x) for name in (("1", "2", "3") if self.separate else ("1", "2"))]
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlp(x[token], *(stack[e] for stack in every)) * w[token, slot, None])
        return out


class Gather(Fp8):
    """gpt-fast: each pair's own weights, widened after they were gathered."""

    form = "gathered_weights"

    def picked(self, name: str, ids: Tensor, x: Tensor) -> Tensor:
        s = getattr(self, f"s{name}")
        s = s[ids] if s.dim() and s.numel() > 1 else s
        return self.wide(getattr(self, f"w{name}")[ids], s, x)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        h = torch.einsum("th,tkoh->tko", x, self.picked("1", ids, x))
        if self.separate:
            gate, up = h, torch.einsum("th,tkoh->tko", x, self.picked("3", ids, x))
        else:
            gate, up = h.chunk(2, -1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, self.picked("2", ids, x))
        return torch.einsum("tkh,tk->th", y, w)


class GatherWidened(Gather):
    """Each pair's own weights out of stacks that were widened first."""

    def picked(self, name: str, ids: Tensor, x: Tensor) -> Tensor:
        return self.whole(name, x)[ids]


class Every(Fp8):
    """All experts on all tokens, ``bmm`` over [E, in, out] weights."""

    form = "all_experts"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        states = x.expand(self.experts, *x.shape)
        h = torch.bmm(states, self.whole("1", x).mT)
        gate, up = (h, torch.bmm(states, self.whole("3", x).mT)) if self.separate else h.chunk(2, -1)
        y = torch.einsum("eti,ehi->eth", F.silu(gate) * up, self.whole("2", x))
        combine = torch.zeros(len(x), self.experts, dtype=w.dtype).scatter(1, ids, w)
        return (y * combine.t()[..., None]).sum(0)


FORMS = (Loop, Mask, WidenedFirst, Gather, GatherWidened, Every)


def build(form: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = form(**options).eval()
    layer.router.to(dtype)
    return layer


def tokens(layer: Any, count: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(count)
    return torch.randn(count, layer.hidden, dtype=dtype)


def reference(layer: Any, x: Tensor) -> Tensor:
    """In float64, from the fp8 numbers as they are; the choice of experts stays."""
    return double_reference(layer, x)


def check(layer: Any, x: Tensor) -> Any:
    outcome = rewritten(layer, x)
    assert outcome.ops == ["experts_fp8.default"], outcome.sites
    (site,) = outcome.sites
    assert (site.status, site.form, site.code) == ("rewritten", layer.form, None)
    assert "fp8" in site.kernel and "fp8" in site.spec.describe()
    with torch.no_grad():
        assert_accurate(outcome.out, layer(x), reference(layer, x))
    return outcome


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


class Turned(Loop):
    """Weights stored ``[E, in, out]``; the scales run along with them."""

    turned = True

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        gate, up = (x @ w1).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ w2


class UpFirst(Loop):
    """The first half of the fused rows is up, so both halves are cut out of weight and scales."""

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        up, gate = F.linear(x, w1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w2)


class CutWeights(Loop):
    """The widened weight is cut, not its product."""

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        return F.linear(F.silu(F.linear(x, w1[: self.inter])) * F.linear(x, w1[self.inter :]), w2)


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


class Sliced(Loop):
    """The row is taken with the dimension kept."""

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        s = getattr(self, f"s{name}")
        return self.wide(getattr(self, f"w{name}")[e : e + 1], s[e : e + 1], x)[0]


class ScaledOutputs(Loop):
    """The scales multiply what the linear maps give."""

    def scaled(self, x: Tensor, name: str, e: int) -> Tensor:
        s = getattr(self, f"s{name}")[e]
        return F.linear(x, getattr(self, f"w{name}")[e].to(x.dtype)) * (s.squeeze(-1) if s.dim() == 2 else s)

    def expert(self, x: Tensor, e: int) -> Tensor:
        gate, up = self.scaled(x, "1", e).chunk(2, dim=-1)
        return self.scaled(F.silu(gate) * up, "2", e)


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


OTHERS = (Turned, UpFirst, CutWeights, Lanes, NoGate, Zipped, OnInput)


@pytest.mark.parametrize("way", ["tensor", "channel-flat", "block", "block-tiles"])
@pytest.mark.parametrize("form", OTHERS, ids=lambda f: f.__name__)
def test_other_experts(form: Any, way: str) -> None:
    if form is Turned and way == "channel-flat":
        pytest.skip("written for weights [E, out, in]")
    sizes = {"hidden": 160, "inter": 256} if form in (UpFirst, CutWeights) and way == "block" else {}
    layer = build(form, way=way, **sizes)
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
    layer = build(Loop, way="channel", experts=40, hidden=24, inter=16)
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


# ------------------------------------------------------------------------------------- near misses


class Near(Loop):
    """One of the two ways in which a row is made is wrong for expert 1 (or for all)."""

    code = "MC408"
    said = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"way": "block", "hidden": 256, "inter": 256, **options})


class OtherRow(Near):
    said = "fp8 weights of expert 1 are multiplied by row 0 of the scales"

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        return self.wide(getattr(self, f"w{name}")[e], getattr(self, f"s{name}")[0 if e == 1 else e], x)


class Block64(Near):
    said = "64 x 128 features of fp8 weights share a scale"

    def __init__(self) -> None:
        super().__init__()
        for name, out in (("s1", 512), ("s2", 256)):
            setattr(self, name, nn.Parameter(torch.rand(self.experts, out // 64, 2)))

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) * s.repeat_interleave(64, -2).repeat_interleave(128, -1)


class Tiled(Near):
    """``repeat`` puts copies of the whole side by side, not of each scale."""

    said = "1 x 1 features of fp8 weights share a scale"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) * s.repeat(128, 128)


class InputChannels(Near):
    said = "each input feature of fp8 weights has its scale"

    def __init__(self) -> None:
        super().__init__(way="channel-flat")
        self.s1, self.s2 = (nn.Parameter(torch.rand(self.experts, 256)) for _ in range(2))

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) * s


class E5m2(Near):
    said = "weights are torch.float8_e5m2, the op takes torch.float8_e4m3fn"

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(w.float().to(torch.float8_e5m2), False) for w in (self.w1, self.w2))


class OfTokens(Near):
    """A scale computed from the input."""

    said = "is not read as their scales"

    def forward(self, x: Tensor) -> Tensor:
        self.factor = x.abs().mean()
        return super().forward(x)

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) * self.factor


class Twice(Near):
    said = "fp8 weights are multiplied twice"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return super().wide(w, s, x) * s.mean()


class GateOnly(Near):
    said = "one projection is fp8 and another is torch.float32"

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        wide = super().row(name, e, x)
        return wide if name == "2" else torch.cat([wide[: self.inter], self.w1[e].to(x.dtype)[self.inter :]])


class OneProjection(Near):
    said = "one projection is fp8 and another is torch.float32"

    def __init__(self) -> None:
        super().__init__()
        self.plain = self.stack(self.hidden, self.inter)

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        return self.plain[e] if name == "2" else super().row(name, e, x)


class NoScale(Near):
    said = "multiplied as they are, without a scale"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype)


class Divided(Near):
    said = "the weights of each expert are computed from an fp8 tensor"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) / blocks(w, 1 / s)


class GateAndUpApart(Near):
    said = "gate and up are scaled per block and per channel"

    def __init__(self) -> None:
        super().__init__(separate=True)
        self.s3 = nn.Parameter(torch.rand(self.experts, self.inter, 1))

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) * s if s.shape[-1] == 1 else super().wide(w, s, x)


class Wide64(Near):
    """Scales in float64 are rounded by the op."""

    said = "the scales of fp8 weights are torch.float64"

    def __init__(self) -> None:
        super().__init__(way="tensor")
        self.s1, self.s2 = (nn.Parameter(s.double()) for s in (self.s1, self.s2))

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) * s.to(x.dtype)


class Half(Near):
    """The scaled weight goes through float16, where it may overflow."""

    said = "rounded to float16 and widened again"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return super().wide(w, s, x).half().to(x.dtype)


class HalfScale(Near):
    said = "is not read as their scales"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return super().wide(w, s.half().to(x.dtype), x)


class CutInside(Near):
    said = "fp8 weights are cut at 192:384, and 128 features share a scale"

    def __init__(self) -> None:
        super().__init__(inter=192)

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        return CutWeights.mlp(self, x, w1, w2)  # type: ignore[arg-type]


class CutBefore(Near):
    """The scales are those of one half of the weight, which is cut before they meet."""

    said = "a slice of fp8 weights is scaled"

    def __init__(self) -> None:
        super().__init__(separate=True)
        self.w1, _ = self.fp8("block", 2 * self.inter, self.hidden)

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        if name != "1":
            return super().row(name, e, x)
        return self.wide(self.w1[e, : self.inter], self.s1[e], x)


class LeftOver(Near):
    """More scales than blocks: the last ones belong to nothing."""

    said = "3 scales for 256 features in blocks of 128"

    def __init__(self) -> None:
        super().__init__()
        self.s2 = nn.Parameter(torch.rand(self.experts, 3, 3))


class MoreRows(Near):
    said = "5 rows of scales belong to fp8 weights of 4 experts"

    def __init__(self) -> None:
        super().__init__()
        self.s2 = nn.Parameter(torch.rand(self.experts + 1, 2, 2))


class Custom(Near):
    code, said = "MC301", "fp8 experts have an activation that the op does not know"

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        gate, up = F.linear(x, w1).chunk(2, dim=-1)
        return F.linear(torch.cos(gate) * up, w2)


class Biased(Near):
    code, said = "MC506", "fp8 experts with biases"

    def __init__(self) -> None:
        super().__init__()
        self.b2 = self.stack(self.hidden)

    def expert(self, x: Tensor, e: int) -> Tensor:
        return super().expert(x, e) + self.b2[e]


class Accumulated(Near):
    """Products in float32 of bfloat16 rows: more than the op gives between the GEMMs."""

    code, said = "MC401", "fp8 weights are widened to torch.float32, the hidden states are torch.bfloat16"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.float() * blocks(w, s)

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        return super().mlp(x.float(), w1, w2).to(x.dtype)


class Written(Near):
    """The scales change between two experts."""

    code, said = "MC408", "the fp8 weight of expert 2 is scaled otherwise than that of expert 0"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            if e == 2:
                self.s2.mul_(2)
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, slot, None])
        return out


class WrittenLate(Near):
    """The scales change after the last read, before the sum is complete."""

    code, said = "MC204", "is written in place inside the layer"

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            y = self.expert(x[token], e)
            if e == self.experts - 1:
                self.s2.mul_(2)
            out.index_add_(0, token, y * w[token, slot, None])
        return out


class WrittenBefore(Near):
    """A view of the scales is taken, then they change, then it is used."""

    code, said = "MC204", "is written after it was read"

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        s = getattr(self, f"s{name}")[e]
        every = blocks(self.w1[e] if name == "1" else self.w2[e], s)
        if name == "2" and e == 1:
            self.s2.mul_(2)
        return getattr(self, f"w{name}")[e].to(x.dtype) * every


class Separate(Near):
    """A tensor per expert, as modules have them."""

    said = "is its own tensor"

    def __init__(self) -> None:
        super().__init__()
        for name in ("w1", "s1", "w2", "s2"):
            parts = nn.ParameterList(nn.Parameter(p.clone(), False) for p in getattr(self, name))
            delattr(self, name)
            setattr(self, name, parts)

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        return self.wide(getattr(self, f"w{name}")[e], getattr(self, f"s{name}")[e], x)


class OutputsOfAnother(Near):
    """The outputs are multiplied by the scale of another expert, so the sum ends with expert 0."""

    code, said = "MC210", "reads the sum of the experts so far"

    def __init__(self) -> None:
        super().__init__(way="tensor")

    def expert(self, x: Tensor, e: int) -> Tensor:
        gate, up = (F.linear(x, self.w1[e].to(x.dtype)) * self.s1[0 if e == 1 else e]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.row("2", e, x))


class HalfOfTheOutputs(Near):
    """Only the gate is scaled: up has no scale."""

    code, said = "MC408", "multiplied as they are, without a scale"

    def __init__(self) -> None:
        super().__init__(way="tensor", separate=True)

    def expert(self, x: Tensor, e: int) -> Tensor:
        gate, up = (F.linear(x, w[e].to(x.dtype)) for w in (self.w1, self.w3))
        return F.linear(F.silu(gate * self.s1[e]) * up, self.row("2", e, x))


class GateTwice(Near):
    """One weight, scaled in one place and not in the other."""

    code, said = "MC408", "multiplied as they are, without a scale"

    def __init__(self) -> None:
        super().__init__(way="tensor", separate=True)

    def expert(self, x: Tensor, e: int) -> Tensor:
        gate = F.linear(x, self.w1[e].to(x.dtype))
        return F.linear(F.silu(gate * self.s1[e]) * gate, self.row("2", e, x))


NEAR = [c for c in Near.__subclasses__()]


@pytest.mark.parametrize("form", NEAR, ids=lambda f: f.__name__)
def test_near_misses_stay_as_they_are(form: Any) -> None:
    dtype = torch.bfloat16 if form is Accumulated else torch.float32
    layer = build(form, dtype)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    x = tokens(layer, dtype=dtype)
    outcome = rewritten(layer, x)
    assert outcome.ops == []
    (site,) = outcome.sites
    assert site.code == form.code and form.said in site.reason, (site.code, site.reason)
    layer.load_state_dict(before, strict=False)
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))


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
    layer = build(Loop)
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
