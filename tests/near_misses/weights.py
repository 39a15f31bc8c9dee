"""Near misses about the weight tensors: shared, written, wrapped, in other dtypes or on other devices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from bases import (
    BASES,
    LOOPS,
    MODULES,
    AllBmm,
    AllEinsum,
    BatchedMM,
    Dense,
    Gathered,
    Grouped,
    Stacked,
    StackGather,
    Where,
)
from mutators import EQUAL, Cases, both, each, override, parts, wrap
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

CASES = Cases()
near = CASES.near


def share(layer):
    layer.mlps[2].w1 = layer.mlps[0].w1


def same_row(step, s, mlp, x, e):
    mlp.e = 0 if e == 2 else e
    return step(mlp, x, e)


near(37, parts(share), each(MODULES, "MC202"))
near(37, wrap(expert=same_row), {Stacked: "MC208"})


def write_used(step, s, out, x, w, ids, e, mlp):
    """The first expert's weight changes after its use, before the layer ends."""
    out = step(out, x, w, ids, e, mlp)
    if e == 1:
        (s.mlps[0].w1.weight if hasattr(s, "mlps") else s.w13).mul_(2)
    return out


def write_next(step, s, out, x, w, ids, e, mlp):
    if e == 1:
        (s.mlps[1].w2.weight if hasattr(s, "mlps") else s.w2).mul_(2)
    return step(out, x, w, ids, e, mlp)


near(38, wrap(step=write_used), each(LOOPS, "MC204"))
near(38, wrap(step=write_next), each(LOOPS, EQUAL, Stacked="MC204"), "before its use")


def write_first(step, s, y, e):
    (s.w1 if s.separate else s.w13).mul_(2)
    return step(y, e)


near(38, wrap(output=write_first), each((Gathered, BatchedMM, AllEinsum, AllBmm, Grouped), "MC204"))


def normed(layer):
    for mlp in layer.mlps:
        parametrizations.weight_norm(mlp.w1)


near(41, parts(normed), each(MODULES, EQUAL))


def wrapped(layer):
    """Weights of a subclass that torch takes apart while it traces."""
    for module in layer.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if module is not layer.router.gate:
                setattr(module, name, nn.Parameter(TwoTensor(p.detach(), p.detach().clone()), requires_grad=False))


near(42, parts(wrapped), each((Dense, Where, StackGather, Gathered, AllEinsum), "MC402"))


def distributed(base):
    """Every parameter and the input are DTensors on a mesh of one device."""

    def build(s):
        if not dist.is_initialized():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        base.build(s)
        s.mesh = init_device_mesh("cpu", (1,))
        for module in s.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), s.mesh, [Replicate()])))

    def forward(s, x):
        return base.forward(s, DTensor.from_local(x, s.mesh, [Replicate()])).to_local()

    return type(f"Near{base.__name__}", (base,), {"build": build, "forward": forward})


near(43, distributed, each((Dense, StackGather, Gathered, AllEinsum), "MC402"))


def in_dtype(dtype):
    return parts(lambda layer: layer.to(dtype))


near(45, in_dtype(torch.float64), each([b for b in BASES if b is not Grouped], EQUAL))


def complex_weights(layer):
    gate = layer.router.gate.weight.detach().clone()
    layer.to(torch.complex64)
    layer.router.gate.weight = nn.Parameter(gate)


near(46, both(parts(complex_weights), override(
    route=lambda s, x: tuple(t.to(x.dtype) if i == 0 else t for i, t in enumerate(s.router(x.real))),
    activate=lambda s, gate, up, e: torch.sigmoid(gate) * gate * up,
)), each((Dense, Where, Stacked, StackGather, Gathered, AllEinsum, AllBmm), "MC401"))  # fmt: skip


class Int8Linear(nn.Module):
    """``[out, in]`` int8 with one scale."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.abs().max() / 127)
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised(layer):
    with torch.no_grad():
        for mlp in layer.mlps:
            mlp.w1, mlp.w2, mlp.w3 = Int8Linear(mlp.w1), Int8Linear(mlp.w2), Int8Linear(mlp.w3)


near(47, parts(quantised), each(MODULES, EQUAL))
