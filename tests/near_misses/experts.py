"""Near misses whose experts are not alike, or are not paired with their own ids."""

from __future__ import annotations

import torch
from bases import (
    BASES,
    LOOPS,
    MODULES,
    AllBmm,
    AllEinsum,
    BatchedMM,
    BoolMask,
    Dense,
    Gathered,
    Grouped,
    Stacked,
    StackGather,
    Where,
)
from moe_compile.patterns._examples import GatedMLP
from mutators import EQUAL, UNSEEN, Cases, both, each, override, parts, wrap
from torch import nn
from torch.nn import functional as F

CASES = Cases()
near = CASES.near


# ---------------------------------------------------------------------------------- experts not uniform


def other_activation(step, s, gate, up, e):
    if e is not None:
        return step(gate, up, e) if e != 1 else F.gelu(gate) * up
    return torch.where(s.chosen(1), F.gelu(gate), F.silu(gate)) * up


ALL = both(override(remembers=True), wrap(activate=other_activation))
BATCHED = (Gathered, BatchedMM, AllEinsum, AllBmm, Grouped)
near(1, ALL, each(BASES, "MC201") | each(BATCHED, "MC303"))


def add_bias(layer):
    layer.mlps[1].w1 = nn.Linear(layer.hidden, layer.inter)


def bias_of_one(step, s, gate, up, e):
    bias = s.extra if e == 1 else 0.0 if e is not None else torch.where(s.chosen(1), s.extra, 0.0)
    return step(gate + bias, up, e)


def extra(*shape):
    def change(layer):
        sizes = [getattr(layer, n) for n in shape]
        layer.extra = nn.Parameter(torch.randn(sizes, dtype=layer.router.gate.weight.dtype))

    return parts(change)


near(2, parts(add_bias), each(MODULES, "MC201"))
near(2, both(override(remembers=True), extra("inter"), wrap(activate=bias_of_one)),
     {Stacked: "MC210", Gathered: "MC303", AllEinsum: "MC303", Grouped: "MC303"}, "added to its rows")  # fmt: skip


def other_size(layer):
    layer.mlps[1] = GatedMLP(layer.hidden, layer.inter + 8)


near(3, parts(other_size), each(MODULES, "MC201"))


def double_one(layer):
    layer.mlps[1].double()


def in_double(step, s, mlp, x, e):
    return step(mlp, x.double(), e).float() if e == 1 else step(mlp, x, e)


near(44, both(parts(double_one), wrap(expert=in_double)), each(MODULES, "MC401", Dense="MC207", StackGather="MC201"))

# ---------------------------------------------------------------------------------- ids and loop bounds


def swapped(step, s):
    order = step()
    return [(0, order[1][1]), (1, order[0][1]), *order[2:]]


def permuted(step, s, ids):
    return step(torch.tensor([1, 0, 2])[ids])


near(4, wrap(order=swapped), {Dense: EQUAL, Where: EQUAL, BoolMask: EQUAL, Stacked: "MC208"})
near(4, wrap(names=permuted), each((StackGather, Gathered, BatchedMM), "MC207"), "ids through a table")

near(5, wrap(order=lambda step, s: step()[::-1]), each(LOOPS, EQUAL))
near(5, wrap(order=lambda step, s: step()[::-1], names=lambda step, s, ids: step(s.experts - 1 - ids)),
     {StackGather: "MC207"}, "ids turned with it")  # fmt: skip

near(6, wrap(order=lambda step, s: step()[:-1]),
     {Dense: EQUAL, Where: EQUAL, BoolMask: EQUAL, Stacked: "MC208"})  # fmt: skip
near(7, wrap(order=lambda step, s: [*step(), step()[1]]), each(LOOPS, "MC208"))
near(8, override(name=lambda s, e: e + 1), each(LOOPS, "MC208"))
near(8, wrap(names=lambda step, s, ids: step((ids + 1) % s.experts)),
     each((StackGather, Gathered, BatchedMM), "MC207"), "modulo E")  # fmt: skip
near(8, wrap(counts=lambda step, s, ids: step((ids + 1) % s.experts)), {Grouped: "MC207"}, "in the offsets")


def other_token(s, ids, e):
    token, _ = torch.where(ids.roll(1, 0) == e)
    _, slot = torch.where(ids == e)
    return token, slot


near(16, override(pick=other_token), each((Where, Stacked), "MC207 MC200"))
near(16, wrap(read=lambda step, s, x, m: step(x.roll(1, 0), m)), {BoolMask: EQUAL}, "rows of another token")
near(16, wrap(step=lambda step, s, out, x, w, ids, e, mlp: step(out, x, w, ids if e != 1 else ids.roll(1, 0), e, mlp)),
     each(LOOPS, "MC207 MC200", BoolMask="MC210 MC303"), "for one expert")  # fmt: skip
near(16, wrap(token=lambda step, s, order: step(order.roll(1, 0))), {Grouped: "MC200"})

near(17, wrap(weight=lambda step, s, w, token, slot: step(w, token, (slot + 1) % s.top_k)),
     each((Where, Stacked), "MC207"))  # fmt: skip
near(17, wrap(weight=lambda step, s, w, ids, e, *m: step(w.flip(-1) if e == 1 else w, ids, e, *m)),
     each((Dense, BoolMask), "MC207"), "for one expert")  # fmt: skip
near(17, wrap(combine=lambda step, s, y, w: step(y, w.flip(-1))), each((StackGather, Gathered, BatchedMM), EQUAL),
     "for all: other weights")  # fmt: skip
near(17, wrap(weight=lambda step, s, w, order: step(w, order ^ 1)), {Grouped: "MC303"})


def first_only(step, s):
    out = []
    for e, mlp in step():
        if e == 1:
            break
        out.append((e, mlp))
    return out


near(35, wrap(order=first_only), each(LOOPS, "MC208"))
near(62, override(), each(BASES, EQUAL), top_k=3)
near(63, override(), each(LOOPS, "MC208"), experts=1, top_k=1)
near(63, override(), {StackGather: UNSEEN, Gathered: EQUAL, AllEinsum: UNSEEN, AllBmm: UNSEEN, Grouped: EQUAL},
     experts=1, top_k=1)  # fmt: skip
