"""Sizes that agree: where shapes alone tell nothing apart, labels must."""

from __future__ import annotations

import pytest
import torch
from bases import BASES, AllBmm, AllEinsum, BatchedMM, Dense, Gathered, Grouped, StackGather, Where, tokens
from mutators import EQUAL, Case, check, override
from support import rewritten
from torch.nn import functional as F

SIZES = {
    "T = K": dict(count=2, top_k=2),
    "K = 1, T = E": dict(top_k=1, count=3),
    "T = K = 1": dict(count=1, top_k=1),
    "T = K = E": dict(count=3, top_k=3),
}
WIDTHS = {
    "H = E": dict(hidden=8, experts=8),
    "I = E": dict(inter=8, experts=8),
    "T = H": dict(count=8),
    "2I = H": dict(hidden=16, inter=8),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("base", [Dense, Where, *BASES[4:]])
def test_equal_numbers_of_tokens_slots_and_experts_confuse_nothing(base, name):
    sizes = dict(SIZES[name])
    check(Case(0, base, override(), EQUAL, sizes, sizes.pop("count", 5)))


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("base", BASES[5:])
def test_features_as_many_as_experts_or_tokens_confuse_nothing(base, name):
    sizes = dict(WIDTHS[name])
    check(Case(0, base, override(), EQUAL, sizes, sizes.pop("count", 5)))


@pytest.mark.parametrize("base", [Gathered, StackGather])
def test_weights_that_are_turned_before_they_are_read_are_other_weights(base):
    turned = override(combine=lambda s, y, w: (y * w.t().unsqueeze(-1)).sum(1))
    check(Case(0, base, turned, EQUAL, {"top_k": 3}, 3))


SWAPPED = {
    "dense: slots and tokens of the mask": (
        Dense, override(weight=lambda s, w, ids, e: (w * (ids == e).t()).sum(0)[:, None]), "MC200"),
    "dense: summed over the tokens": (
        Dense, override(weight=lambda s, w, ids, e: (w * (ids == e)).sum(0)[:, None]), "MC200"),
    "where: slot for token": (Where, override(pick=lambda s, ids, e: torch.where(ids == e)[::-1]), "MC207"),
    "gathered: ids turned": (Gathered, override(names=lambda s, ids: ids.t()), "MC207"),
    "batched: ids turned": (BatchedMM, override(names=lambda s, ids: ids.t()), "MC207"),
    "einsum: tokens for slots": (
        Gathered, override(combine=lambda s, y, w: torch.einsum("tai,at->ti", y, w)), "MC303"),
    "einsum: summed over the tokens": (
        Gathered, override(combine=lambda s, y, w: torch.einsum("tai,ta->ai", y, w)), "MC303"),
    "all experts: matrix turned": (AllEinsum, override(matrix=lambda s, w, ids: (
        F.one_hot(ids, s.experts).to(w.dtype) * w.unsqueeze(-1)).sum(1).t()), "MC303"),
    "all experts: batched, matrix turned": (AllBmm, override(
        combine=lambda s, y, m: (y * m.unsqueeze(-1)).sum(0)), "MC303"),
}  # fmt: skip


@pytest.mark.parametrize("name", SWAPPED)
def test_axes_that_are_swapped_where_the_sizes_agree(name):
    """T = K = E: shapes alone tell nothing apart."""
    base, change, code = SWAPPED[name]
    layer = change(base)(top_k=3).eval()
    x = torch.randn(3, 8)
    outcome = rewritten(layer, x)
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x)), outcome.sites
    assert outcome.ops == [] and outcome.codes == [code], outcome.sites


# --- grouped products ---------------------------------------------------------------------------------------


def test_each_token_repeated_is_the_token_of_a_pair():
    rounds = override(token=lambda s, order: torch.arange(2).repeat_interleave(s.top_k)[order])
    check(Case(0, Grouped, rounds, EQUAL, {}, 2))


@pytest.mark.parametrize(
    "token",
    [
        lambda s, order: torch.arange(2).repeat(s.top_k)[order],
        lambda s, order: order % s.top_k,
        lambda s, order: (order + 1) // s.top_k % 2,
    ],
    ids=["tokens in rounds", "slots", "shifted"],
)
def test_rows_of_other_tokens_keep_the_original(token):
    layer = override(token=token)(Grouped)().eval()
    x = tokens(layer, 2)
    outcome = rewritten(layer, x)
    assert outcome.ops == [] and len(outcome.sites) == 1
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))


def test_outputs_gathered_by_slots_of_another_token():
    def mix(s, x, w, ids):
        ys = torch.stack([mlp(x) for mlp in s.mlps], dim=1)
        chosen = ys[torch.arange(x.shape[0]).unsqueeze(0), ids]  # [1, T] against [T, K]: another token's output
        return (chosen * w.unsqueeze(-1)).sum(dim=1)

    layer = override(mix=mix)(StackGather)(top_k=3).eval()
    x = torch.randn(3, 8)
    outcome = rewritten(layer, x)
    assert outcome.ops == []
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))
