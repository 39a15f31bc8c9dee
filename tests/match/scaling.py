"""What is read of a product of fp8 weights and their scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tracing import engine_of

from moe_compile.match.facts import Scales, Wt

E, N, K = 4, 256, 384
FP8 = torch.float8_e4m3fn


def q(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (E, N, K))).to(FP8)


def read(fn: Any, scale: tuple[int, ...], weight: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Any:
    """The scales of what ``fn(w, s)`` returns, the code of a refusal, or None."""
    engine, node = engine_of(fn, w_parameter=q(*weight), s_parameter=torch.zeros(scale, dtype=dtype))
    fact = engine.fact(node)
    if isinstance(fact, Wt) and isinstance(fact.scales, Scales):
        assert [a.name for d in fact.dims for a in d if a.name[0] == "w"] in (["w0", "w1"], ["w1", "w0"])
        return fact.scales.axes, fact.scales.blocks
    codes = [miss.error.code for miss in engine.misses]
    return codes[0] if codes else None


def wide(w: Tensor) -> Tensor:
    return w.to(torch.bfloat16)
