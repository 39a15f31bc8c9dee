"""Near misses of layers with fp8 weights: each is refused with its fact, and keeps its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fp8_layers import CutWeights, Loop, blocks, build, stays, tokens
from torch import Tensor, nn
from torch.nn import functional as F


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


class FirstChannel(Near):
    """The scale of the first channel serves all of them."""

    said = "fp8 weights are multiplied by some of (4, 512, 1) scales"

    def __init__(self) -> None:
        super().__init__(way="channel")
        self.s2 = nn.Parameter(torch.rand(self.experts))

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype) * (s[:1] if s.dim() else s)


class SquaredRow(Near):
    """Right for experts 0 and 1, of which a long loop is traced."""

    said = "are multiplied by row 1 of the scales"

    def __init__(self) -> None:
        super().__init__(way="tensor", experts=16, hidden=24, inter=16)

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        return self.wide(getattr(self, f"w{name}")[e], getattr(self, f"s{name}")[e * e % self.experts], x)


class InPlace(Near):
    """The product is written into the widened copy, which a version of the weights may share."""

    said = "the weights of each expert are computed from an fp8 tensor"

    def wide(self, w: Tensor, s: Tensor, x: Tensor) -> Tensor:
        return w.to(x.dtype).mul_(blocks(w, s))


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
    stays(layer, tokens(layer, dtype=dtype), form.code, form.said)
