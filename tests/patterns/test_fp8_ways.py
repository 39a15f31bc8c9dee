"""Ways of writing layers with fp8 weights that test_fp8_forms has not: turned weights, lanes, dynamic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fp8_layers import Gather, Loop, ScaledOutputs, Turned, build, check, tokens
from torch import Tensor
from torch.nn import functional as F


class LanesUpFirst(Loop):
    """Up, gate, up, gate, ..: each is cut out of weight and scales by steps of two."""

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        h = F.linear(x, w1)
        return F.linear(F.silu(h[..., 1::2]) * h[..., ::2], w2)


class TurnedUpFirst(Turned):
    """Weights stored ``[E, in, out]``, of which both halves are cut."""

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        up, gate = (x @ w1).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ w2


class TurnedOutputs(ScaledOutputs):
    turned = True

    def scaled(self, x: Tensor, name: str, e: int) -> Tensor:
        return (x @ getattr(self, f"w{name}")[e].to(x.dtype)) * getattr(self, f"s{name}")[e].view(-1)


class HalfOfAStack(Loop):
    """Half of the stored rows belongs to the layer, scaled per tensor."""

    def row(self, name: str, e: int, x: Tensor) -> Tensor:
        w = getattr(self, f"w{name}")[e]
        return self.wide(w[: len(w) // 2] if name == "1" else w, getattr(self, f"s{name}")[e], x)

    def mlp(self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
        return F.linear(F.silu(F.linear(x, w1)), w2)


class EveryPair(Gather):
    """One scale for all, copied for every pair of a number that only the run knows."""

    def picked(self, name: str, ids: Tensor, x: Tensor) -> Tensor:
        s = getattr(self, f"s{name}").expand(*ids.shape, 1, 1).reshape(-1, 1, 1)
        w = getattr(self, f"w{name}")[ids.view(-1)].to(x.dtype) * s
        return w.view(*ids.shape, *w.shape[1:])


@pytest.mark.parametrize(
    ("form", "way"),
    [
        (LanesUpFirst, "channel-flat"),
        (Turned, "channel"),
        (TurnedUpFirst, "channel"),
        (TurnedUpFirst, "block"),
        (TurnedOutputs, "tensor"),
        (TurnedOutputs, "channel"),
        (HalfOfAStack, "tensor"),
    ],
)
def test_is_rewritten(form: Any, way: str) -> None:
    layer = build(form, way=way, hidden=160, inter=256)
    check(layer, tokens(layer))


def test_in_float64() -> None:
    """Only the kernels of a GPU add in float32."""
    layer = build(Loop, torch.float64, way="block")
    layer.multiply = lambda w, s, dtype, inner=layer.multiply: inner(w, s.to(dtype), dtype)
    check(layer, tokens(layer, dtype=torch.float64))


def test_copies_for_every_pair() -> None:
    layer = build(EveryPair, way="shared", hidden=24, inter=16)
    x = tokens(layer)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    check(layer, x)
