"""What rewritten loops assumed must follow from proved layers: programs for each claim, then claims by hand."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import relative, rewritten
from torch import nn

from moe_compile.loops import traced


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
    monkeypatch.setattr(traced, "LIMIT", 3)


class Plain(Layer):
    """A loop over four experts that is traced for two; ``inside`` happens in every round."""

    guarded = False

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))
        self.register_buffer("rounds", torch.zeros(()))

    def inside(self, x, e):
        return x

    def after(self, out, last):
        return out

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        last = x
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            last = self.inside(x, e)
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return self.after(out, last)


class Hit(Plain):
    """The same for the experts that have tokens, in a loop that is traced as a whole."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        last = x
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            last = self.inside(x, e)
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return self.after(out, last)


def draws(self, x, e):
    return x + torch.rand_like(x)


def counts(self, x, e):
    self.rounds += 1
    return x


STEPS = {
    "random numbers": dict(inside=draws, after=lambda s, out, last: out + torch.rand_like(out)),
    "a buffer counts the rounds": dict(inside=counts, after=lambda s, out, last: out + s.rounds),
    "what the last round made": dict(inside=lambda s, x, e: x * (e + 1.0), after=lambda s, out, last: out + last),
    "what the last expert made": dict(
        inside=lambda s, x, e: s.mlps[e].w1(x), after=lambda s, out, last: out + last.sum()),
}  # fmt: skip


def compared(kind, few):
    """The result and the random numbers after it; ``few``: one token, so that most experts have none."""
    torch.manual_seed(0)
    layer = kind().eval()
    x = torch.randn(1 if few else 9, layer.hidden)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = layer(x)
        layer.rounds.zero_()
    torch.manual_seed(1)
    outcome = rewritten(layer, x)
    assert relative(outcome.out, expected) < 1e-6
    return outcome


@pytest.mark.parametrize("few", [False, True], ids=["9 tokens", "1 token"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("base", [Plain, Hit])
def test_what_happens_in_every_round_happens_as_often_as_written(base, name, few):
    compared(type("Near", (base,), STEPS[name]), few)


@pytest.mark.parametrize("base", [Plain, Hit])
def test_nothing_more_in_a_round_is_rewritten(base):
    assert compared(base, False).ops == ["experts.default"]
