"""Near misses inside an expert: what it reads, and what it does beyond two linear maps and an activation."""

from __future__ import annotations

import torch
from bases import (
    BASES,
    LOOPS,
    AllBmm,
    BatchedMM,
    BoolMask,
    Dense,
    Gathered,
    Grouped,
    Stacked,
    StackGather,
    Where,
)
from mutators import EQUAL, Cases, both, each, override, parts, wrap
from torch import nn
from torch.nn import functional as F

CASES = Cases()
near = CASES.near
MAIN = (Dense, Where, StackGather, Gathered, AllBmm)


def activation(function):
    """``function(gate, up)`` instead of the activation."""
    return override(activate=lambda s, gate, up, e: function(gate, up))


def after(function):
    """``function(y)`` on every expert's output, before the router weight."""
    return wrap(output=lambda step, s, y, e: function(step(y, e)))


near(24, activation(lambda gate, up: F.dropout(F.silu(gate) * up, 0.5, True)), each(BASES, "MC205"))
near(24, activation(lambda gate, up: F.dropout(F.silu(gate) * up, 0.5, False)), each(MAIN, EQUAL), "switched off")
near(27, after(lambda y: y.detach()), each(BASES, EQUAL))


def scales(layer):
    layer.register_buffer("scale", torch.linspace(0.5, 2.0, layer.experts, dtype=layer.router.gate.weight.dtype))


def scaled(step, s, y, e):
    y = step(y, e)
    if e is not None:
        return y * s.scale[e]
    return y * sum(torch.where(s.chosen(n), s.scale[n], 0.0) for n in range(s.experts))


near(29, both(override(remembers=True), parts(scales), wrap(output=scaled)),
     each(BASES, "MC303", Gathered="MC304", BatchedMM="MC304"))  # fmt: skip
near(30, after(lambda y: F.layer_norm(y, y.shape[-1:])), each(BASES, "MC303"))


def norms(layer):
    layer.norms = nn.ModuleList(nn.BatchNorm1d(layer.inter) for _ in range(layer.experts))
    for e, norm in enumerate(layer.norms):
        norm.running_var.fill_(2.0 + e)


near(31, both(parts(norms), wrap(activate=lambda step, s, gate, up, e: s.norms[e](step(gate, up, e)))),
     each(LOOPS, "MC200", Dense="MC303"))  # fmt: skip

near(32, override(source=lambda s, x, e, out=None: x.roll(e, 0)), each((Dense, Where, Stacked, BoolMask), "MC207"),
     "its own rolled input")  # fmt: skip
near(32, override(source=lambda s, x, e, out=None: x + torch.arange(x.shape[0])[:, None].to(x.dtype)),
     each(BASES, EQUAL), "the same position for all")  # fmt: skip
near(32, wrap(expert=lambda step, s, mlp, x, e: step(mlp, x + e, e)), {Dense: "MC207", StackGather: "MC201"},
     "its number")  # fmt: skip
near(33, activation(lambda gate, up: F.silu(gate) * up.mean(0, keepdim=True)), each(BASES, "MC303"))
near(33, activation(lambda gate, up: F.silu(gate) * up / (1 + up.abs().amax())), each(MAIN, "MC303"), "a maximum")
near(34, override(source=lambda s, x, e, out=None: x + out), each(LOOPS, "MC210", Dense="MC207"))


def chained(step, s, mlp, x, e):
    s.last = step(mlp, x if e == 0 else s.last, e)
    return s.last


near(34, wrap(expert=chained), {Dense: "MC201", StackGather: "MC201"}, "reads the expert before it")
near(64, after(lambda y: torch.tanh(y) * 2.5), each(BASES, "MC303"), "on the outputs")
near(64, after(lambda y: y * 2.5), each(BASES, "MC303"), "without one")


class Nested(nn.Module):
    """An expert that is a dense MoE of two experts itself."""

    def __init__(self, hidden, inter):
        super().__init__()
        self.inner = Dense(hidden=hidden, inter=inter, experts=2, top_k=1)

    def forward(self, x):
        return self.inner(x)


def nested(layer):
    layer.mlps = nn.ModuleList(Nested(layer.hidden, layer.inter) for _ in range(layer.experts))


near(36, both(parts(nested), override(expert=lambda s, mlp, x, e: s.output(mlp(x), e))),
     each((Where, BoolMask), "MC303 MC200 MC200 MC200")
     | {Dense: "equal equal equal MC303", StackGather: "equal equal equal MC303"})  # fmt: skip


def masked_input(step, s, out, x, w, ids, e, mlp):
    """The mask multiplies the input, the weight the output."""
    hit = (ids == e).any(-1, keepdim=True).to(x.dtype)
    return out + s.weight(w, ids, e) * s.expert(mlp, x * hit, e)


def weighted_input(step, s, out, x, w, ids, e, mlp):
    if isinstance(s, Dense):
        return out + s.expert(mlp, x * s.weight(w, ids, e), e)
    if isinstance(s, Where):
        token, slot = s.pick(ids, e)
        return s.add(out, s.expert(mlp, x[token] * s.weight(w, token, slot), e), token)
    m = s.pick(ids, e)
    return s.add(out, s.expert(mlp, x[m] * s.weight(w, ids, e, m), e), m)


near(66, wrap(step=masked_input), {Dense: "MC302"})
near(66, wrap(step=weighted_input), each(LOOPS, EQUAL), "the weight too")

near(68, override(source=lambda s, x, e, out=None: F.relu_(x)), each(LOOPS, "MC207"), "on the input")
near(68, wrap(read=lambda step, s, x, token: F.relu_(step(x, token))), each((Where, Stacked, BoolMask), "MC301"),
     "on the picked rows")  # fmt: skip
near(68, activation(lambda gate, up: F.silu(gate, inplace=True) * up),
     each(BASES, EQUAL) | each((Stacked, BatchedMM, AllBmm, Grouped), "MC303"), "on the gate")  # fmt: skip
near(68, activation(lambda gate, up: F.silu(gate, inplace=True) * up + gate), each(MAIN, EQUAL, AllBmm="MC303"),
     "read again")  # fmt: skip


def through(dtype):
    return activation(lambda gate, up: (F.silu(gate) * up * 16).to(dtype).to(gate.dtype))


near(70, through(torch.float8_e4m3fn), each(MAIN, "MC303"), "fp8")
near(70, through(torch.int32), each(MAIN, "MC303"), "int")
