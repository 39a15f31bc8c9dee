"""Near misses of the scales of fp8 weights: taken at another place, rounded on the way, or counted otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fp8_layers import FP8, Gather, Loop, WidenedFirst, blocks, stays, tokens
from scaled import CHANNEL, SMALL, SQUARE, Near, picked, row, wide
from torch import Tensor, nn

NOT_READ = "which is not read as their scales"
COUNTED = "the scales of fp8 weights are counted by something else than the weights"


def interleaved(w: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """Rows of gate and up alternate, and each of the two has a scale: neighbours do not share one."""
    if s.dim() == 1:
        return w.to(x.dtype) * s[:, None, None]
    pairs = w.to(x.dtype).unflatten(1, (-1, 2)).transpose(1, 2)
    return (pairs * s[:, :, None, None]).transpose(1, 2).flatten(1, 2)


def flat_repeat(w: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """``repeat_interleave`` without a dimension flattens first."""
    return w.to(x.dtype) * s.repeat_interleave(128).view(-1, s.shape[1]).repeat_interleave(128, 1)


def uneven_copies(w: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """Copies of 15 scales viewed as rows of 128, which end inside of copies."""
    every = s.expand(s.shape[0], 128)
    return w.to(x.dtype) * (every.reshape(128, -1).t().reshape(-1, 1) if len(s) == 15 else s)


PLACES = {
    "of the first slot": Near(Gather, COUNTED, picked(lambda s, ids: s[ids][:, :1, None, None]), options=SMALL),
    "of the first slot, copied": Near(
        Gather, COUNTED, picked(lambda s, ids: s[ids][:, :1].expand(ids.shape)[..., None, None]), options=SMALL
    ),
    "of the first token": Near(Gather, COUNTED, picked(lambda s, ids: s[ids][:1, :, None, None]), options=SMALL),
    "of another token": Near(
        Gather, COUNTED, picked(lambda s, ids: s[ids].repeat_interleave(2, 0)[: len(ids), :, None, None]),
        options=SMALL,
    ),
    "of the first expert, copied": Near(
        Gather, NOT_READ, picked(lambda s, ids: s[:1].expand(4)[ids][..., None, None]), options=SMALL
    ),
    "gathered, of pairs of experts": Near(
        Gather, NOT_READ, picked(lambda s, ids: s.repeat_interleave(2)[ids][..., None, None]), options=SMALL
    ),
    "gathered, of one expert": Near(
        Gather, "fp8 weights of all experts are multiplied by row 2 of the scales", picked(lambda s, ids: s[2]),
        options=SMALL,
    ),
    "a row, of pairs of experts": Near(
        Loop, NOT_READ, row(lambda self, s, e: s.repeat_interleave(2)[e]), options=SMALL
    ),
    "of experts in another order": Near(
        Loop, "are gathered by different ids", row(lambda self, s, e: s[self.order][e]),
        {"order": torch.tensor([1, 0, 3, 2])}, SMALL,
    ),
    "of those experts that a mask keeps": Near(
        Loop, NOT_READ, row(lambda self, s, e: s[self.keep][e]),
        {"keep": torch.tensor([False, True, True, True, True]), "s1": (5,), "s2": (5,)}, SMALL,
    ),
    "of those experts that are kept": Near(
        Loop, NOT_READ, row(lambda self, s, e: s.masked_select(self.keep)[e]),
        {"keep": torch.tensor([False, True, True, True, True]), "s1": (5,), "s2": (5,)}, SMALL,
    ),
}  # fmt: skip

NUMBERS = {
    "a channel's, through float16": Near(
        Loop, "are rounded to float16 before a product in float32", wide(lambda w, s, x: w.to(x.dtype) * s.half()),
        options=CHANNEL,
    ),
    "through bfloat16": Near(
        Loop, "are rounded to bfloat16 before a product in float32",
        wide(lambda w, s, x: w.to(x.dtype) * s.bfloat16()), options=CHANNEL,
    ),
    "through bfloat16 and float16": Near(
        Loop, NOT_READ, wide(lambda w, s, x: w.to(x.dtype) * s.bfloat16().half()), options=CHANNEL,
        dtype=torch.float16,
    ),
    "through fp8": Near(
        Loop, NOT_READ, wide(lambda w, s, x: w.to(x.dtype) * s.to(FP8).to(x.dtype)), options=CHANNEL
    ),
    "weights through bfloat16": Near(
        Loop, "scaled fp8 weights are rounded to bfloat16 and widened again",
        wide(lambda w, s, x: (w.to(x.dtype) * s).bfloat16().to(x.dtype)), options=CHANNEL,
    ),
    "weights through another fp8": Near(
        Loop, "weights are torch.float8_e5m2, the op takes torch.float8_e4m3fn",
        wide(lambda w, s, x: w.to(torch.float8_e5m2).to(x.dtype) * s), options=CHANNEL,
    ),
    "weights through integers": Near(
        Loop, "the weights of each expert are computed from an fp8 tensor",
        wide(lambda w, s, x: w.to(torch.int32).to(x.dtype) * s), options=CHANNEL,
    ),
    "powers of two in 8 bits": Near(
        Loop, NOT_READ, row(lambda self, s, e: getattr(self, "e1" if s is self.s1 else "e2")[e].to(s.dtype)),
        {n: torch.full((4,), 0.25).to(torch.float8_e8m0fnu) for n in ("e1", "e2")}, SMALL,
    ),
}  # fmt: skip

BLOCKS = {
    "of alternating rows": Near(
        WidenedFirst, "do not run along blocks of neighbours", wide(interleaved), {"s1": (4, 2)},
        {"way": "tensor", "hidden": 128, "inter": 128},
    ),
    "repeated without a dimension": Near(Loop, NOT_READ, wide(flat_repeat), options=SQUARE),
    "uneven copies": Near(
        Loop, NOT_READ, wide(uneven_copies), {"s1": (4, 15, 1), "s2": (4, 1, 1)},
        {"way": "block", "hidden": 128, "inter": 960},
    ),
    "64 rows": Near(
        Loop, "64 x all features of fp8 weights share a scale",
        wide(lambda w, s, x: w.to(x.dtype) * s.repeat_interleave(64, -2)), {"s1": (4, 8, 1), "s2": (4, 4, 1)}, SQUARE,
    ),
    "of inputs that are cut": Near(
        Loop, "fp8 weights are cut at 0:256, and 128 features share a scale",
        wide(lambda w, s, x: (w.to(x.dtype) * blocks(w, s))[:, :256]),
        {"w2": torch.ones(4, 256, 512).to(FP8), "s2": (4, 2, 4)}, SQUARE,
    ),
}  # fmt: skip

NEAR = PLACES | NUMBERS | BLOCKS


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_stay_as_they_are(name: str) -> None:
    NEAR[name].stays()


def test_a_number_of_the_parameters() -> None:
    """``item()`` in the graph is a number that depends on parameters alone, and no tensor."""
    layer = Near(Loop, NOT_READ, wide(lambda w, s, x: w.to(x.dtype) * s.item()), options=SMALL).layer()
    layer.s1, layer.s2 = (nn.Parameter(torch.tensor(0.5)) for _ in range(2))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        stays(layer, tokens(layer), "MC408", NOT_READ)


@pytest.mark.parametrize(
    "scale",
    [
        lambda self, s, e: s[self.count % 4],
        lambda self, s, e: s[e].view(1).repeat_interleave(self.count)[:1],
    ],
    ids=["row", "copies"],
)
def test_by_the_number_of_tokens(scale: Any) -> None:
    """A number that differs from call to call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.count = x.shape[0]
        return Loop.forward(self, x)

    layer = Near(Loop, NOT_READ, row(scale) | {"forward": forward}, options=SMALL).layer()
    stays(layer, tokens(layer), "MC408", NOT_READ, dynamic=True)
