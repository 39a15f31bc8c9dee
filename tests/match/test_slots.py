"""Loops over the slots of the top-k: merged when each (slot, expert) comes once, left alone when one fact differs."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import relative, rewritten
from torch import nn


class SlotLoop(Layer):
    """``for k: for e:`` with every step as a method to override."""

    def __init__(self, **sizes):
        super().__init__(**{"top_k": 3, "experts": 4, **sizes})
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def order(self):
        return [(k, e) for k in range(self.top_k) for e in range(self.experts)]

    def route(self, x):
        return self.router(x)

    def column(self, ids, k):
        return ids[:, k]

    def expert(self, k, e):
        return self.mlps[e]

    def weight(self, w, ids, mask, k, e):
        return w[mask, k, None]

    def put(self, out, mask, y):
        out[mask] += y

    def between(self, x, w, ids, k, e):
        pass

    def forward(self, x):
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for k, e in self.order():
            mask = self.column(ids, k) == e
            self.put(out, mask, self.expert(k, e)(x[mask]) * self.weight(w, ids, mask, k, e))
            self.between(x, w, ids, k, e)
        return out


def mutate(**methods):
    return type("Mutant", (SlotLoop,), methods)


def swap_expert(layer, k, e):
    return layer.mlps[(e + 1) % layer.experts if k == 1 else e]


REFUSED = {
    "the last slot is missing": (mutate(order=lambda s: [(k, e) for k in (0, 1) for e in range(4)]), "MC213"),
    "a slot comes twice": (mutate(order=lambda s: [(k, e) for k in (0, 1, 1, 2) for e in range(4)]), "MC213"),
    "one slot misses an expert": (
        mutate(order=lambda s: [(k, e) for k in range(3) for e in range(4) if (k, e) != (1, 2)]), "MC213"),
    "one pair comes twice, another never": (
        mutate(order=lambda s: [(k, e) if (k, e) != (1, 2) else (0, 2) for k in range(3) for e in range(4)]), "MC213"),
    "one slot runs other experts": (mutate(expert=swap_expert), "MC213"),
    "an expert is missing in every slot": (
        mutate(order=lambda s: [(k, e) for k in range(3) for e in range(4) if e != 2]), "MC208"),
    "weights of another slot": (mutate(weight=lambda s, w, ids, m, k, e: w[m, 2 - k, None]), "MC207"),
    "weights of one slot for all": (mutate(weight=lambda s, w, ids, m, k, e: w[m, 0, None]), "MC207"),
    "weights of another tensor in one slot": (
        mutate(weight=lambda s, w, ids, m, k, e: (w * w if k == 1 else w)[m, k, None]), "MC213"),
    "weights of all slots on the rows of one": (
        mutate(weight=lambda s, w, ids, m, k, e: (w * (ids == e)).sum(-1)[m, None]), "MC208"),
    "one slot is that of other ids": (
        mutate(column=lambda s, ids, k: (ids if k != 1 else ids.flip(0))[:, k]), "MC212"),
    "rows are assigned, not added": (mutate(put=lambda s, out, m, y: out.__setitem__(m, y)), "MC212"),
    "the weights are written between two slots": (
        mutate(between=lambda s, x, w, ids, k, e: w.mul_(2) if (k, e) == (1, 3) else None), "MC213"),
}  # fmt: skip


def run(layer_class, **sizes):
    torch.manual_seed(0)
    layer = layer_class(**sizes).eval()
    x = torch.randn(7, layer.hidden)
    outcome = rewritten(layer, x)
    with torch.no_grad():
        assert relative(outcome.out, layer(x)) < 1e-6
    return outcome


@pytest.mark.parametrize("name", REFUSED)
def test_is_left_alone_with_the_reason(name):
    layer_class, code = REFUSED[name]
    outcome = run(layer_class)
    assert outcome.ops == []
    assert code in outcome.codes, outcome.sites
    assert all(s.status == "refused" and s.location for s in outcome.sites)


EQUAL = {
    "experts outside, slots inside": mutate(order=lambda s: [(k, e) for e in range(4) for k in range(3)]),
    "any order of slots": mutate(order=lambda s: [(k, e) for k in (2, 0, 1) for e in (3, 1, 0, 2)]),
    "columns by unbind": mutate(column=lambda s, ids, k: ids.unbind(-1)[k]),
    "columns by split": mutate(column=lambda s, ids, k: ids.split(1, dim=1)[k].squeeze(1)),
    "columns as rows of the transposed ids": mutate(column=lambda s, ids, k: ids.t()[k]),
    "columns counted from the end": mutate(column=lambda s, ids, k: ids[:, k - 3]),
    "columns of the weights, cast": mutate(
        weight=lambda s, w, ids, m, k, e: w[:, k].to(torch.float64)[m].to(w.dtype).unsqueeze(1)),
    "weights picked by a slice": mutate(weight=lambda s, w, ids, m, k, e: w[:, k : k + 1][m]),
    "rows by nonzero": mutate(
        put=lambda s, out, m, y: out.index_add_(0, m.nonzero().squeeze(-1), y)),
    "one expert runs nowhere at the end": mutate(order=lambda s: [(k, e) for k in range(3) for e in range(3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_is_one_op(name):
    outcome = run(EQUAL[name])
    assert outcome.ops == ["experts.default"], outcome.sites
    (site,) = outcome.sites
    assert (site.form, site.spec.top_k) == ("slot_loop", 3)


def test_the_first_slot_alone_is_a_top_1_layer():
    first = mutate(
        order=lambda s: [(0, e) for e in range(4)],
        weight=lambda s, w, ids, m, k, e: s.column(w, k)[m].unsqueeze(1),
    )
    outcome = run(first)
    assert outcome.ops == ["experts.default"] and outcome.sites[0].spec.top_k == 1


@pytest.mark.parametrize(
    "change",
    [
        dict(put=lambda s, out, m, y: out.__setitem__(m, y)),
        dict(column=lambda s, ids, k: (ids if k != 1 else ids.flip(0))[:, k]),
    ],
    ids=["assigned over", "other ids"],
)
def test_the_first_slot_may_be_a_layer_of_its_own_before_what_follows(change):
    """Then only that slot is replaced; what comes after it works on its result."""
    first = mutate(weight=lambda s, w, ids, m, k, e: s.router(torch.ones(7, 32))[0][:, k][m].unsqueeze(1), **change)
    outcome = run(first)
    assert outcome.ops.count("experts.default") <= 1


def test_columns_of_a_mask_need_every_slot():
    class Masked(SlotLoop):
        def forward(self, x):
            w, ids = self.router(x)
            out = torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                mask = (ids == e)[:, 0]
                out[mask] += mlp(x[mask]) * w[mask, 0, None]
            return out

    outcome = run(Masked)
    assert outcome.ops == [] and outcome.codes == ["MC213"]


def test_rows_of_one_slot_weighted_for_all_slots_of_the_same_mask():
    class Mixed(SlotLoop):
        def forward(self, x):
            w, ids = self.router(x)
            out = torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                hit = ids == e
                weight = (w * hit).sum(-1)
                for k in range(self.top_k):
                    token = torch.where(hit[:, k])[0]
                    out.index_add_(0, token, mlp(x[token]) * weight[token, None])
            return out

    outcome = run(Mixed)
    assert outcome.ops == []


def test_rows_of_ids_are_no_slots_when_tokens_equal_slots():
    """``ids[k]`` holds the experts of token k; only the shapes say that it could be a slot."""
    rows = mutate(column=lambda s, ids, k: ids[k], weight=lambda s, w, ids, m, k, e: w.t()[m, k, None])
    layer = rows(top_k=4, experts=5).eval()
    x = torch.randn(4, layer.hidden)
    outcome = rewritten(layer, x)
    assert outcome.ops == []
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))


def test_ids_that_repeat_an_expert_are_added_once_per_slot():
    class External(SlotLoop):
        def forward(self, x, w, ids):
            self.route = lambda _: (w, ids)
            return super().forward(x)

    layer, x = External().eval(), torch.randn(7, 32)
    w, ids = torch.rand(7, 3), torch.randint(4, (7, 1)).expand(7, 3).contiguous()
    outcome = rewritten(layer, x, w, ids)
    assert outcome.ops == ["experts.default"], outcome.sites
    with torch.no_grad():
        assert relative(outcome.out, layer(x, w, ids)) < 1e-6


def test_one_dynamic_graph_serves_every_number_of_tokens():
    layer, x = SlotLoop().eval(), torch.randn(6, 32)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    outcome = rewritten(layer, x)
    for count in (1, 3, 9):
        y = torch.randn(count, 32)
        torch._dynamo.decorators.mark_unbacked(y, 0)
        with torch.no_grad():
            assert relative(outcome.call(y), layer(y)) < 1e-6
    assert len(outcome.graphs) == 1 and outcome.ops == ["experts.default"]
