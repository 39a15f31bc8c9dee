"""Near misses in how expert outputs become one tensor, and in who else sees them."""

from __future__ import annotations

import torch
from bases import (
    BASES,
    LOOPS,
    MODULES,
    AllBmm,
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
from torch.utils.checkpoint import checkpoint

CASES = Cases()
near = CASES.near
SCATTERED = (Where, Stacked)
MAIN = (Dense, Where, StackGather, Gathered, AllBmm)


def adding(function):
    """``function(out, y, token)`` instead of the addition; it may write ``out``."""
    return override(add=lambda s, out, y, token=None: function(out, y, token))


def assigned(out, y, token):
    out[token] = y
    return out


near(11, adding(lambda out, y, token: out.index_copy_(0, token, y)), each((Where, Stacked, Grouped), "MC303"))
near(11, adding(lambda out, y, token: out.masked_scatter(token[:, None], y)), {BoolMask: "MC303"}, "masked")
near(12, adding(assigned), each((Where, Stacked, BoolMask), "MC304") | {Grouped: "MC304"})
near(13, override(start=lambda s, x: x), each((Where, Stacked, BoolMask, Grouped), "MC210", BoolMask="MC302"))
near(13, both(override(start=lambda s, x: x), adding(lambda out, y, token: out.add_(y))), {Dense: "MC210"})
near(14, override(start=lambda s, x: x.clone()), each((Where, Stacked, BoolMask, Grouped), "MC210", BoolMask="MC303"))
near(14, override(start=lambda s, x: x * 2), {Dense: EQUAL}, "out of place")
near(15, override(start=lambda s, x: torch.ones_like(x)), each((*LOOPS, Grouped), "MC210", Dense=EQUAL,
                                                                   BoolMask="MC303"))  # fmt: skip
near(72, adding(lambda out, y, token: out.index_add_(0, token, y, alpha=2)), each((*SCATTERED, Grouped), "MC304"),
     "alpha")  # fmt: skip
near(72, adding(lambda out, y, token: torch.add(out, y, alpha=2)), {Dense: "MC304"}, "alpha")
near(72, adding(lambda out, y, token: out.scatter_reduce(0, token[:, None].expand_as(y), y, "amax")),
     each((*SCATTERED, Grouped), "MC303"), "amax")  # fmt: skip

near(52, adding(lambda out, y, token: torch.maximum(out, y)), {Dense: "MC303"})
near(52, override(combine=lambda s, y, w: (y * w.unsqueeze(-1)).amax(1)), each((StackGather, Gathered), "MC303"))
near(52, override(combine=lambda s, y, m: (y * m.t().unsqueeze(-1)).amax(0)), {AllBmm: "MC303"})
near(53, override(combine=lambda s, y, w: (y * w.unsqueeze(-1)).mean(1)), each((StackGather, Gathered), "MC303"))
near(53, override(combine=lambda s, y, m: (y * m.t().unsqueeze(-1)).mean(0)), {AllBmm: "MC303"})
near(53, adding(lambda out, y, token: (out + y) / 2), {Dense: "MC210"}, "running")
near(53, wrap(finish=lambda step, s, out, x: out / s.experts), each(LOOPS, EQUAL), "after the sum")
near(54, override(combine=lambda s, y, w: (y * w.unsqueeze(-1)).flatten(1)), each((StackGather, Gathered), "MC200"))
near(54, override(combine=lambda s, y, m: (y * m.t().unsqueeze(-1)).transpose(0, 1).flatten(1)), {AllBmm: "MC200"})
near(54, both(override(start=lambda s, x: x.new_zeros(x.shape[0], 0)),
              adding(lambda out, y, token: torch.cat([out, y], 1))), {Dense: "MC303"})  # fmt: skip


def out_bias(layer):
    layer.bias = nn.Parameter(torch.randn(layer.hidden, dtype=layer.router.gate.weight.dtype))


near(65, both(parts(out_bias), wrap(finish=lambda step, s, out, x: out + s.bias)), each(BASES, EQUAL))
near(67, wrap(finish=lambda step, s, out, x: out * (torch.arange(out.shape[0]) < 3)[:, None]), each(BASES, EQUAL))

# ---------------------------------------------------------------------------------- observers


def hooked(layer):
    layer.mlps[1].w2.register_forward_hook(lambda module, args, y: y * 2)


def prehooked(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


near(39, parts(hooked), each(MODULES, "MC201"))
near(40, parts(prehooked), each(BASES, EQUAL))


def keep(step, s, y, e):
    y = step(y, e)
    if e in (1, None):
        s.kept = y
    return y


def keep_all(step, s, y, e):
    s.kept = [*getattr(s, "kept", []), step(y, e)]
    return s.kept[-1]


near(49, wrap(output=keep, finish=lambda step, s, out, x: (out, s.kept)), each(BASES, "MC203"))
near(50, wrap(output=keep_all, finish=lambda step, s, out, x: (out, *s.kept)), each((*LOOPS, StackGather), "MC203"))


def write_view(step, s, out, x):
    out[0].mul_(2)
    return out


def early_view(step, s, x):
    out = step(x)
    s.view = out[0]
    return out


def write_early_view(step, s, out, x):
    s.view.mul_(2)
    return out


near(69, wrap(finish=write_view), each(BASES, EQUAL), "taken after the layer")
near(69, wrap(start=early_view, finish=write_early_view), each((Where, BoolMask, Grouped), "MC204", Stacked=EQUAL),
     "taken before")  # fmt: skip


def autocast_first(step, s, out, x, w, ids, e, mlp):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=e == 0):
        return step(out, x, w, ids, e, mlp).float()


def checkpointed(step, s, mlp, x, e):
    return checkpoint(lambda rows: step(mlp, rows, e), x, use_reentrant=False)


near(0, wrap(expert=checkpointed), each((*LOOPS, StackGather), "MC216"), "checkpoint inside an expert")


near(71, wrap(step=autocast_first), each(LOOPS, "MC211"))
