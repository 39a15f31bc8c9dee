"""Small layers in every storage form, as operands of the kernels and as ``spec.MoE`` for the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_compile.kernels.activation import Epilogue
from moe_compile.kernels.operand import Operand, make_operand
from moe_compile.kernels.scaled import GROUP
from moe_compile.kernels.tile import Projection
from moe_compile.quantize import BLOCK, dequantize_blocks, quantize_blocks
from moe_compile.spec import Activation, Experts, MoE, Weight


@dataclass
class Layer:
    """What one test runs; the defaults are the common case."""

    T: int = 7
    E: int = 5
    K: int = 2
    H: int = 19
    I: int = 13
    activation: Activation = field(default_factory=Activation)
    layout: str = "concat"
    separate: bool = False
    transposed: bool = False
    bias: bool = False
    weight_on_input: bool = False
    routing: str = "random"
    index: torch.dtype = torch.int64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        gated = self.activation.gated
        if not gated:
            self.layout = "single"

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(self.device)

        rows = 2 * self.I if self.layout in ("concat", "interleaved") else self.I
        self.x = draw(self.T, self.H).to(self.dtype)
        self.w1 = self._matrix(draw(self.E, rows, self.H) / self.H**0.5)
        w3, b3 = draw(self.E, self.I, self.H) / self.H**0.5, draw(self.E, self.I)
        self.w3 = self._matrix(w3) if self.layout == "separate" else []
        self.w2 = self._matrix(draw(self.E, self.H, self.I) / self.I**0.5)
        self.b1 = self._bias(draw(self.E, rows))
        self.b3 = self._bias(b3) if self.layout == "separate" else []
        self.b2 = self._bias(draw(self.E, self.H))
        self.weights = torch.rand(self.T, self.K, generator=g).to(self.device) + 0.1
        self.ids = self._ids(g).to(self.index).to(self.device)

    def _matrix(self, w: Tensor) -> list[Tensor]:
        w = w.to(self.dtype)
        if self.transposed:
            w = w.transpose(1, 2).contiguous().transpose(1, 2)
        return [m.clone() for m in w] if self.separate else [w]

    def _bias(self, b: Tensor) -> list[Tensor]:
        if not self.bias:
            return []
        b = b.to(self.dtype)
        return [v.clone() for v in b] if self.separate else [b]

    def _ids(self, g: torch.Generator) -> Tensor:
        shape = (self.T, self.K)
        if self.routing == "distinct":
            return torch.rand(self.T, self.E, generator=g).argsort(-1)[:, : self.K]
        if self.routing == "one":
            return torch.full(shape, self.E - 1)
        if self.routing == "sentinels":
            return torch.randint(-1, self.E + 1, shape, generator=g)
        if self.routing == "nobody":
            return torch.where(torch.rand(shape, generator=g) < 0.5, -1, self.E)
        return torch.randint(0, self.E, shape, generator=g)  # with repeats inside a token

    def projections(self) -> tuple[Projection, Projection]:
        def role(parts: list[Tensor], dims: int) -> Operand | None:
            return make_operand(parts, dims) if parts else None

        a = self.activation
        epilogue = Epilogue(a.name, tuple(a.args()), self.layout)  # type: ignore[arg-type]
        up = Projection(
            make_operand(self.w1, 2), self.I, epilogue, role(self.w3, 2), role(self.b1, 1), role(self.b3, 1)
        )
        return up, Projection(make_operand(self.w2, 2), self.H, b=role(self.b2, 1))

    def moe(self) -> MoE:
        def role(parts: list[Tensor]) -> Weight | None:
            return Weight(tuple(parts), not self.separate) if parts else None

        w1, w2 = role(self.w1), role(self.w2)
        assert w1 is not None and w2 is not None
        experts = Experts(
            self.E, self.H, self.I, w1, w2, role(self.w3), role(self.b1), role(self.b2), role(self.b3),
            self.activation, self.layout == "interleaved",
        )  # fmt: skip
        return MoE(self.x, self.ids, self.weights, self.K, experts, self.weight_on_input)

    def truth(self) -> Tensor:
        """``[T, H]`` in float64."""
        return self.moe().reference(torch.float64)

    def op_args(self) -> tuple[object, ...]:
        """Arguments of ``torch.ops.moe_compile.experts``."""
        a = self.activation
        return (
            self.x, self.weights, self.ids, self.w1, self.w3, self.w2, self.b1, self.b3, self.b2,
            a.name, a.args(), a.gated, self.layout == "interleaved", self.weight_on_input,
        )  # fmt: skip


def _blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w [E, rows, depth]`` as fp8 with a scale per block, neighbouring ones far apart: a wrong one shows."""
    e, rows, depth = w.shape
    up, across = -(-rows // GROUP), -(-depth // GROUP)
    factor = torch.exp2(torch.arange(e * up * across, device=w.device) % 5).view(e, up, across)
    return quantize_blocks(w * dequantize_blocks(torch.ones_like(w), factor))


def _cast(w: Tensor) -> Tensor:
    """The largest number of the format is as far as it goes: a cast makes NaN of what is beyond, but on CPUs."""
    return w.clamp(-448, 448).to(torch.float8_e4m3fn)


def _channels(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w [E, rows, depth]`` as fp8 with a scale ``[E, rows, 1]`` per output channel, far apart."""
    factor = torch.exp2(torch.arange(w.shape[0] * w.shape[1], device=w.device) % 5 - 10).view(w.shape[0], -1, 1)
    return _cast(w / 2**-10), factor


def _tensors(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w [E, rows, depth]`` as fp8 with a scale per expert, as blocks that all read one number."""
    e, rows, depth = w.shape
    factor = torch.exp2(torch.arange(e, device=w.device) % 5 - 10.0).view(e, 1, 1)
    return _cast(w / 2**-10), factor.expand(e, -(-rows // GROUP), -(-depth // GROUP))


SCALES = {"block": _blocks, "channel": _channels, "tensor": _tensors}


def quantised(layer: Layer, scales: str = "block") -> tuple[Projection, Projection]:
    """The operands of the layer in fp8; the layer itself gets the weights that they stand for."""
    up, down = layer.projections()
    out = []
    for projection, names in ((up, ("w1", "w3")), (down, ("w2",))):
        roles = []
        for name, role in zip(names, (projection.w, projection.up), strict=False):
            if role is None:
                roles.append((None, None))
                continue
            q, scale = SCALES[scales](role.first.float())
            block = (1, q.shape[2]) if scales == "channel" else BLOCK
            setattr(layer, name, [dequantize_blocks(q, scale, block)])
            roles.append((Operand((q,)), scale))
        (w, scale), (value, up_scale) = roles[0], roles[1] if len(roles) > 1 else (None, None)
        biases = projection.b, projection.b_up
        out.append(Projection(w, projection.columns, projection.epilogue, value, *biases, scale, up_scale))
    return out[0], out[1]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Relative L2 error; a NaN anywhere is infinite."""
    ours, truth = ours.double(), truth.double()
    if not bool(torch.isfinite(ours).all()):
        return float("inf")
    return float((ours - truth).norm() / truth.norm().clamp(min=1e-30))
