"""Near misses in the layout of the weights: which half is the gate, which dimension is the output."""

from __future__ import annotations

import torch
from bases import (
    BASES,
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
from mutators import EQUAL, Cases, each, override, wrap
from torch.nn import functional as F

CASES = Cases()
near = CASES.near
FUSED = (Stacked, BatchedMM, AllBmm, Grouped)
SEPARATE = (Dense, Where, BoolMask, StackGather, Gathered, AllEinsum)

near(57, override(activate=lambda s, gate, up, e: gate * F.silu(up)), each(SEPARATE, EQUAL))
near(58, override(activate=lambda s, gate, up, e: gate * F.silu(up)), each(FUSED, EQUAL))
near(59, override(split=lambda s, h: (h[..., ::2], h[..., 1::2])), each(FUSED, EQUAL))
near(59, override(split=lambda s, h: (h[..., 1::2], h[..., ::2])), each(FUSED, EQUAL), "and the lanes swapped")
near(59, override(split=lambda s, h: (h[..., ::2], h[..., h.shape[-1] // 2 :])), each(FUSED, EQUAL), "and halved")
near(59, override(split=lambda s, h: h.unflatten(-1, (-1, 2)).unbind(-1)), each(FUSED, EQUAL), "by unflatten")
near(59, override(split=lambda s, h: h.unflatten(-1, (2, -1)).unbind(-2)), each(FUSED, EQUAL), "halves by unflatten")
SQUARE = {"hidden": 8, "inter": 8}


def transposed_modules(s, mlp, x, e):
    h = s.activate(x @ mlp.w1.weight, x @ mlp.w3.weight, e)
    return s.output(h @ mlp.w2.weight, e)


near(60, override(expert=transposed_modules), each((Dense, Where, BoolMask, StackGather), EQUAL), **SQUARE)
near(60, override(expert=lambda s, mlp, x, e: s.output(F.linear(s.activate(
    x @ mlp.w1.weight, F.linear(x, mlp.w3.weight), e), mlp.w2.weight), e)),
     each((Dense, Where, BoolMask, StackGather), EQUAL), "of one of the three", **SQUARE)  # fmt: skip
near(60, override(project=lambda s, x, w: torch.einsum("ti,taio->tao", x, w),
                  down=lambda s, h, w: torch.einsum("tao,taoi->tai", h, w)), {Gathered: EQUAL}, **SQUARE)  # fmt: skip


def one_transposed(step, s, mlp, x, e):
    return transposed_modules(s, mlp, x, e) if e == 1 else step(mlp, x, e)


near(60, wrap(expert=one_transposed), each((Dense, Where, BoolMask, StackGather), "MC201"), "of one expert", **SQUARE)

ALIKE = {"hidden": 8, "inter": 8, "experts": 8}
near(61, override(), each(BASES, EQUAL), count=8, top_k=8, **ALIKE)
near(61, override(), each(BASES, EQUAL), "with few slots", count=8, **ALIKE)
