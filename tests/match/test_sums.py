"""The ways in which terms are added up, and weights that are columns of dense probabilities."""

from __future__ import annotations

import copy
import functools
import operator

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import assert_accurate, double_reference, relative, rewritten
from torch import nn


class Base(Layer):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))
        self.gate = self.router.gate

    def terms(self, x, w, ids):
        return [(w * (ids == e)).sum(-1, keepdim=True) * mlp(x) for e, mlp in enumerate(self.mlps)]

    def forward(self, x):
        w, ids = self.router(x)
        return self.add(x, w, ids)


def layer(add):
    return type("Case", (Base,), {"add": add})


def from_none(s, x, w, ids):
    out = None
    for term in s.terms(x, w, ids):
        out = term if out is None else out + term
    return out


def scattered(start, back):
    """An ``index_add_`` loop into ``start(x)``, and ``back(out, x)``."""

    def add(s, x, w, ids):
        out = start(x)
        for e, mlp in enumerate(s.mlps):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, (mlp(x[token]) * w[token, slot, None]).to(out.dtype))
        return back(out, x)

    return add


def three_d(s, x, w, ids):
    """Masks over ``[B, S, K]``, sums into ``[B, S, H]``."""
    out = torch.zeros_like(x)
    for e, mlp in enumerate(s.mlps):
        mask = ids == e
        hit = mask.any(-1)
        out[hit] += mlp(x[hit]) * (w * mask).sum(-1)[hit].unsqueeze(-1)
    return out


def flat_rows(s, x, w, ids):
    """Flat rows, a result that keeps ``[B, S, H]``."""
    out, flat, weight = torch.zeros_like(x), x.view(-1, x.shape[-1]), w.view(-1, s.top_k)
    for e, mlp in enumerate(s.mlps):
        mask = ids.view(-1, s.top_k) == e
        hit = mask.any(-1)
        out[hit.view(x.shape[:-1])] += mlp(flat[hit]) * (weight * mask).sum(-1)[hit, None]
    return out


def columns(pick, probabilities=lambda s, x: s.gate(x).softmax(-1)):
    """``probs[.., e]`` where expert ``e`` was chosen."""

    def add(s, x, w, ids):
        probs, out = probabilities(s, x), torch.zeros_like(x)
        for e, mlp in enumerate(s.mlps):
            pick(s, x, ids, probs, out, e, mlp)
        return out

    return add


def by_mask(s, x, ids, probs, out, e, mlp):
    mask = (ids == e).any(-1)
    out[mask] += probs[mask, e, None] * mlp(x[mask])


def by_token(s, x, ids, probs, out, e, mlp):
    token, _ = torch.where(ids == e)
    out.index_add_(0, token, probs[token, e].unsqueeze(-1) * mlp(x[token]))


def by_product(s, x, ids, probs, out, e, mlp):
    out += ((ids == e).any(-1) * probs[:, e])[:, None] * mlp(x)


EQUAL = {
    "python's sum": lambda s, x, w, ids: sum(s.terms(x, w, ids)),
    "reduce": lambda s, x, w, ids: functools.reduce(operator.add, s.terms(x, w, ids)),
    "from None": from_none,
    "a stack summed": lambda s, x, w, ids: torch.stack(s.terms(x, w, ids)).sum(0),
    "a stack summed along its last but one": lambda s, x, w, ids: torch.stack(s.terms(x, w, ids), 1).sum(1),
    "in fp64, and back": scattered(lambda x: torch.zeros_like(x, dtype=torch.float64), lambda o, x: o.to(x.dtype)),
    "columns under a mask": columns(by_mask),
    "columns at tokens": columns(by_token),
    "columns in a product": columns(by_product),
    "columns of sigmoids": columns(by_mask, lambda s, x: s.gate(x).sigmoid()),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_is_one_op(name):
    torch.manual_seed(0)
    case, x = layer(EQUAL[name])().eval(), torch.randn(7, 32)
    outcome = rewritten(case, x)
    assert outcome.ops == ["experts.default"], outcome.sites
    with torch.no_grad():
        assert_accurate(outcome.out, case(x), double_reference(case, x))


def through_a_view(s, x, w, ids):
    """Sums into a flat view of the result."""
    out, rows, weight = torch.zeros_like(x), x.view(-1, x.shape[-1]), w.view(-1, s.top_k)
    flat = out.view(-1, x.shape[-1])
    for e, mlp in enumerate(s.mlps):
        token, slot = torch.where(ids.view(-1, s.top_k) == e)
        flat.index_add_(0, token, mlp(rows[token]) * weight[token, slot, None])
    return out


@pytest.mark.parametrize("add", [three_d, flat_rows, through_a_view])
def test_three_dimensions(add):
    torch.manual_seed(0)
    case = layer(add)().eval()
    for batch, length in ((2, 5), (1, 3), (4, 1)):
        x = torch.randn(batch, length, 32)
        outcome = rewritten(case, x)
        assert outcome.ops == ["experts.default"], outcome.sites
        with torch.no_grad():
            assert relative(outcome.out, case(x)) < 1e-6


def other_column(s, x, ids, probs, out, e, mlp):
    by_mask(s, x, ids, probs.roll(1, 1) if e == 2 else probs, out, e, mlp)


def wrong_column(s, x, ids, probs, out, e, mlp):
    mask = (ids == e).any(-1)
    out[mask] += probs[mask, (e + 1) % s.experts, None] * mlp(x[mask])


REFUSED = {
    "a term is left out of the sum": (lambda s, x, w, ids: sum(t for e, t in enumerate(s.terms(x, w, ids)) if e != 1),
                                      "MC208"),
    "a term is added twice": (lambda s, x, w, ids: sum([*s.terms(x, w, ids), s.terms(x, w, ids)[0]]), "MC208"),
    "a stack averaged": (lambda s, x, w, ids: torch.stack(s.terms(x, w, ids)).mean(0), None),
    "a stack of experts out of order": (
        lambda s, x, w, ids: torch.stack([s.terms(x, w, ids)[e] for e in (0, 2, 1, 3)]).sum(0), None),
    "a stack summed over the tokens": (lambda s, x, w, ids: torch.stack(s.terms(x, w, ids)).sum(1), None),
    "the column of another expert": (columns(wrong_column), None),
    "one column of another tensor": (columns(other_column), "MC207"),
    "the sum starts from one": (lambda s, x, w, ids: sum(s.terms(x, w, ids), 1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_left_alone(name):
    torch.manual_seed(0)
    add, code = REFUSED[name]
    case, x = layer(add)().eval(), torch.randn(7, 32)
    outcome = rewritten(case, x)
    with torch.no_grad():
        assert relative(outcome.out, case(x)) < 1e-6
    if name != "the sum starts from one":  # the sum itself is a layer, one is added to it
        assert outcome.ops == [] and outcome.sites
        assert code is None or code in outcome.codes, outcome.sites


@pytest.mark.parametrize("pick", [by_mask, by_product, by_token])
def test_columns_for_ids_that_may_repeat_or_exceed(pick):
    """A mask counts a token once however often it names the expert; ids past the scores would have no column."""

    class External(layer(columns(pick))):
        def forward(self, x, ids):
            return self.add(x, None, ids)

    case, x, ids = External().eval(), torch.randn(7, 32), torch.randint(6, (7, 1)).expand(7, 2)
    outcome = rewritten(case, x, ids)
    assert outcome.ops == [] and outcome.codes == ["MC207"]
    with torch.no_grad():
        assert torch.equal(outcome.out, case(x, ids))


class Flat(Base):
    """Sums into a flat view of ``[B, S, H]``."""

    def finish(self, out, flat):
        return out

    def between(self, out, flat, e):
        pass

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        w, ids = self.router(rows)
        out = torch.zeros_like(x)
        flat = out.view(-1, x.shape[-1])
        for e, mlp in enumerate(self.mlps):
            token, slot = torch.where(ids == e)
            flat.index_add_(0, token, mlp(rows[token]) * w[token, slot, None])
            self.between(out, flat, e)
        return self.finish(out, flat)


def run_flat(**methods):
    torch.manual_seed(0)
    case, x = type("Case", (Flat,), methods)().eval(), torch.randn(2, 5, 32)
    outcome = rewritten(case, x)
    with torch.no_grad():
        ours, original = outcome.out, case(x)
    for mine, theirs in zip(*[(o if isinstance(o, tuple) else (o,)) for o in (ours, original)], strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and relative(mine, theirs) < 1e-6
    return outcome


def test_the_buffer_under_the_view_is_replaced_too():
    assert run_flat().ops == ["experts.default"]
    assert run_flat(finish=lambda s, out, flat: (out * 2, flat + 1)).ops == ["experts.default"]


@pytest.mark.parametrize(
    "methods",
    [
        dict(finish=lambda s, out, flat: (flat.to(torch.float64), out * 1)),
        dict(between=lambda s, out, flat, e: setattr(s, "seen", out.sum()) if e == 1 else None,
             finish=lambda s, out, flat: (out, s.seen)),
        dict(between=lambda s, out, flat, e: out.mul_(2) if e == 1 else None),
    ],
    ids=["cast beside the buffer", "read half-way", "scaled half-way"],
)  # fmt: skip
def test_what_else_sees_the_buffer(methods):
    assert run_flat(**methods).ops in ([], ["experts.default"])


class Buffered(Base):
    """Scratch memory that is part of the module's state."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("scratch", torch.zeros(7, self.hidden))
        self.register_buffer("dense", torch.zeros(7, self.experts))


def into_state(s, x, w, ids):
    out = s.scratch.zero_()
    for e, mlp in enumerate(s.mlps):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, mlp(x[token]) * w[token, slot, None])
    return out * 2


def dense_state(s, x, w, ids):
    s.dense.zero_().scatter_(1, ids, w)
    return sum(s.dense[:, e, None] * mlp(x) for e, mlp in enumerate(s.mlps))


@pytest.mark.parametrize("add", [into_state, dense_state])
def test_state_is_written_as_before(add):
    torch.manual_seed(0)
    case, x = type("Case", (Buffered,), {"add": add})().eval(), torch.randn(7, 32)
    twin = copy.deepcopy(case)
    outcome = rewritten(case, x)
    assert outcome.ops == [] and outcome.codes == ["MC204"]
    with torch.no_grad():
        assert torch.equal(outcome.out, twin(x))
    assert all(torch.equal(a, b) for a, b in zip(case.buffers(), twin.buffers(), strict=True))
