"""Buffers of one row per pair, assigned expert by expert: complete and by one decision, or left alone."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import relative, rewritten
from torch import nn


class Pairs(Layer):
    """Assignment by a mask of the flat ids, with every step as a method to override."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def order(self):
        return range(self.experts)

    def repeat(self, x):
        return x.repeat_interleave(self.top_k, 0)

    def flat(self, ids):
        return ids.view(-1)

    def buffer(self, x):
        return x.new_empty(x.shape[0] * self.top_k, self.hidden)

    def put(self, out, mask, y, e):
        out[mask] = y

    def route(self, x):
        return self.router(x)

    def finish(self, out, w, x, alias):
        return (out.view(-1, self.top_k, self.hidden) * w.unsqueeze(-1)).sum(1)

    def forward(self, x):
        w, ids = self.route(x)
        rows, flat, out = self.repeat(x), self.flat(ids), self.buffer(x)
        alias = out.view(-1)
        for e in self.order():
            mask = flat == e
            self.put(out, mask, self.mlps[e](rows[mask]), e)
        return self.finish(out, w, x, alias)


def mutate(**methods):
    return type("Mutant", (Pairs,), methods)


def zeros(layer, x):
    return x.new_zeros(x.shape[0] * layer.top_k, layer.hidden)


def run(layer_class, tokens=7, **sizes):
    torch.manual_seed(0)
    layer = layer_class(**sizes).eval()
    x = torch.randn(tokens, layer.hidden)
    outcome = rewritten(layer, x)
    with torch.no_grad():
        expected = layer(x)
    ours = outcome.out if isinstance(outcome.out, tuple) else (outcome.out,)
    for mine, theirs in zip(ours, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert relative(mine, theirs) < 1e-6
    return outcome


REFUSED = {
    "the last expert is never assigned": (mutate(order=lambda s: range(s.experts - 1), buffer=zeros), "MC207"),
    "an expert in the middle is never assigned": (mutate(order=lambda s: (0, 1, 3), buffer=zeros), "MC200"),
    "an expert is assigned twice": (mutate(order=lambda s: (0, 1, 2, 3, 1)), "MC208"),
    "added, not assigned, to a pair's row": (mutate(buffer=zeros, put=lambda s, o, m, y, e: o.__setitem__(m, o[m] + y)),
                                             None),
    "tokens repeated in rounds": (mutate(repeat=lambda s, x: x.repeat(s.top_k, 1)), None),
    "ids slot by slot": (mutate(flat=lambda s, ids: ids.t().reshape(-1)), None),
    "ids of other tokens": (mutate(flat=lambda s, ids: ids.view(-1).roll(1)), "MC207"),
    "slots summed as tokens": (
        mutate(finish=lambda s, o, w, x, a: (o.view(s.top_k, -1, s.hidden) * w.t().unsqueeze(-1)).sum(0)), None),
    "the buffer is returned too": (
        mutate(finish=lambda s, o, w, x, a: (Pairs.finish(s, o, w, x, a), o * 1)), "MC203"),
    "another view of the buffer is read at the end": (
        mutate(finish=lambda s, o, w, x, a: (Pairs.finish(s, o, w, x, a), a * 2)), "MC204"),
    "the buffer is scaled between two experts": (
        mutate(put=lambda s, o, m, y, e: (o.__setitem__(m, y), o.mul_(2) if e == 1 else None), buffer=zeros), None),
    "experts work on different inputs": (
        mutate(put=lambda s, o, m, y, e: o.__setitem__(m, y * 2 if e == 1 else y)), "MC201"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_left_alone_with_the_reason(name):
    layer_class, code = REFUSED[name]
    outcome = run(layer_class)
    assert outcome.ops == []
    assert outcome.sites and all(s.status == "refused" and s.location for s in outcome.sites)
    assert code is None or code in outcome.codes, outcome.sites


@pytest.mark.parametrize(
    "change",
    [dict(repeat=lambda s, x: x.repeat(s.top_k, 1)), dict(flat=lambda s, ids: ids.t().reshape(-1))],
    ids=["tokens in rounds", "ids slot by slot"],
)
def test_shapes_alone_do_not_tell_when_tokens_equal_slots(change):
    assert run(mutate(**change), tokens=3, top_k=3, experts=6).ops == []


EQUAL = {
    "experts in any order": mutate(order=lambda s: (1, 0, *range(2, s.experts))[::-1]),
    "weighted in place after the assignments": mutate(
        finish=lambda s, o, w, x, a: o.mul_(w.reshape(-1, 1)).view(-1, s.top_k, s.hidden).sum(1)),
    "weighted before the view": mutate(
        finish=lambda s, o, w, x, a: (o * w.view(-1, 1)).view(-1, s.top_k, s.hidden).sum(1)),
    "numbers of the pairs": mutate(put=lambda s, o, m, y, e: o.__setitem__(m.nonzero().flatten(), y)),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("sizes", [{}, dict(top_k=1), dict(top_k=3, experts=5)], ids=str)
def test_is_one_op(name, sizes):
    outcome = run(EQUAL[name], **sizes)
    assert outcome.ops == ["experts.default"], outcome.sites


def test_ids_of_unknown_range_leave_rows_unset():
    class External(Pairs):
        def forward(self, x, w, ids):
            self.route = lambda _: (w, ids)
            return super().forward(x)

    outcome = rewritten(External().eval(), torch.randn(6, 32), torch.rand(6, 2), torch.randint(4, (6, 2)))
    assert outcome.ops == [] and outcome.codes == ["MC207"]


def test_a_view_of_the_combine_matrix_that_is_read_later_keeps_the_original():
    class Looks(Pairs):
        def forward(self, x):
            w, ids = self.router(x)
            dense = torch.zeros(x.shape[0], self.experts)
            alias = dense.view(-1)
            dense.scatter_(1, ids, w)
            out = torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                out = out + dense[:, e, None] * mlp(x)
            return out, alias * 2

    outcome = run(Looks)
    assert outcome.ops == [] and outcome.codes == ["MC204"]
