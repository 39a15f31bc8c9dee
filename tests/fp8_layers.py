"""Layers as users write them with fp8 weights: forms, and ways of multiplying the scales in."""

from __future__ import annotations

from typing import Any

import torch
from moe_compile.patterns._examples import Layer
from support import assert_accurate, double_reference, rewritten
from torch import Tensor, nn
from torch.nn import functional as F

from moe_compile.quantize import quantize_blocks

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


class CutWeights(Loop):
    """The widened weight is cut, not its product."""

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        return F.linear(F.silu(F.linear(x, w1[: self.inter])) * F.linear(x, w1[self.inter :]), w2)


class Turned(Loop):
    """Weights stored ``[E, in, out]``; the scales run along with them."""

    turned = True

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        gate, up = (x @ w1).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ w2


class ScaledOutputs(Loop):
    """The scales multiply what the linear maps give."""

    def scaled(self, x: Tensor, name: str, e: int) -> Tensor:
        s = getattr(self, f"s{name}")[e]
        return F.linear(x, getattr(self, f"w{name}")[e].to(x.dtype)) * (s.squeeze(-1) if s.dim() == 2 else s)

    def expert(self, x: Tensor, e: int) -> Tensor:
        gate, up = self.scaled(x, "1", e).chunk(2, dim=-1)
        return self.scaled(F.silu(gate) * up, "2", e)


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


def stays(layer: Any, x: Tensor, code: str, said: str, **how: Any) -> None:
    """One refusal with this code and reason, and the original's numbers."""
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    outcome = rewritten(layer, x, **how)
    assert outcome.ops == []
    (site,) = outcome.sites
    assert site.code == code and said in site.reason, (site.code, site.reason)
    layer.load_state_dict(before, strict=False)
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))
