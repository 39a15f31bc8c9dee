"""Look-alikes: each differs from a form in one fact: left alone with that fact as the reason, or equal."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import relative, rewritten
from torch import nn
from torch.nn import functional as F


class Dense(Layer):
    """The masked dense loop with every step as a method to override."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def start(self, x):
        return torch.zeros_like(x)

    def order(self):
        return list(enumerate(self.mlps))

    def expert(self, e, mlp, x, out):
        return mlp(x)

    def weight(self, w, ids, e):
        return (w * (ids == e)).sum(-1, keepdim=True)

    def add(self, out, y):
        return out + y

    def finish(self, out, x):
        return out

    def forward(self, x):
        w, ids = self.router(x)
        out = self.start(x)
        for e, mlp in self.order():
            out = self.add(out, self.weight(w, ids, e) * self.expert(e, mlp, x, out))
        return self.finish(out, x)


class Loop(Layer):
    """The index_add loop with every step as a method to override."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def start(self, x):
        return torch.zeros_like(x)

    def mask(self, ids, e):
        return ids == e

    def source(self, x, out):
        return x

    def weight(self, w, token, slot):
        return w[token, slot, None]

    def put(self, out, token, y):
        return out.index_add_(0, token, y)

    def forward(self, x):
        w, ids = self.router(x)
        out = self.start(x)
        for e, mlp in enumerate(self.mlps):
            token, slot = torch.where(self.mask(ids, e))
            self.put(out, token, mlp(self.source(x, out)[token]) * self.weight(w, token, slot))
        return out


class WeightedTwice(Dense):
    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            g = self.weight(w, ids, e)
            out = out + g * (g * mlp(x))
        return out


def other_activation(base):
    class Odd(base):
        def expert(self, e, mlp, x, out):
            return mlp(x) if e != 1 else mlp.w2(F.gelu(mlp.w1(x)) * mlp.w3(x))

    return Odd


def mutate(base, **methods):
    return type("Mutant", (base,), methods)


def with_parts(base, change):
    """A layer whose modules are changed after construction."""

    class Changed(base):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            change(self)

    return Changed


def share_weight(layer):
    layer.mlps[2].w1 = layer.mlps[0].w1


def add_bias(layer):
    layer.mlps[1].w1 = nn.Linear(layer.hidden, layer.inter)


def other_size(layer):
    layer.mlps[1] = GatedMLP(layer.hidden, layer.inter + 8)


def wide(layer):
    layer.mlps[1].double()


REFUSED = {
    # experts not uniform
    "one expert has another activation": (other_activation(Dense), "MC201"),
    "one expert has a bias": (with_parts(Dense, add_bias), "MC201"),
    "one expert has another inner size": (with_parts(Dense, other_size), "MC201"),
    "two experts share a weight": (with_parts(Dense, share_weight), "MC202"),
    # ids and loop bounds
    "one expert is visited twice": (
        mutate(Dense, order=lambda s: [*enumerate(s.mlps), (1, s.mlps[1])]), "MC208"),
    "ids are off by one": (
        mutate(Dense, weight=lambda s, w, ids, e: (w * (ids == e + 1)).sum(-1, keepdim=True)), "MC208"),
    "one id is missing in the middle": (
        mutate(Dense, order=lambda s: [(e, m) for e, m in enumerate(s.mlps) if e != 1]), "MC208"),
    # routing weights
    "weights of another token, per expert": (
        mutate(Dense, weight=lambda s, w, ids, e: (w.roll(e, 0) * (ids == e)).sum(-1, keepdim=True)), "MC207"),
    "weights from another mask": (
        mutate(Loop, weight=lambda s, w, token, slot: w[slot, token, None] if w.shape[0] == w.shape[1] else
               w.t().contiguous()[slot, token, None]), "MC207"),
    # accumulation
    "the sum starts from ones": (mutate(Loop, start=lambda s, x: torch.ones_like(x)), "MC210"),
    "the sum starts from the input": (mutate(Loop, start=lambda s, x: x.clone()), "MC210"),
    "alpha is not one": (
        mutate(Loop, put=lambda s, out, token, y: out.index_add_(0, token, y, alpha=2)), "MC304"),
    "rows are assigned, not added": (
        mutate(Loop, put=lambda s, out, token, y: out.__setitem__(token, y)), "MC304"),
    # inside the expert
    "an expert reads the running sum": (mutate(Loop, source=lambda s, x, out: x + out), None),
    "dropout inside an expert": (
        mutate(Dense, expert=lambda s, e, m, x, out: m.w2(F.dropout(F.silu(m.w1(x)) * m.w3(x), 0.5, True))), "MC205"),
    "the output is normalised per expert": (
        mutate(Dense, expert=lambda s, e, m, x, out: F.normalize(m(x), dim=-1)), "MC303"),
    "a mean over tokens inside an expert": (
        mutate(Dense, expert=lambda s, e, m, x, out: m.w2(F.silu(m.w1(x)) * m.w3(x).mean(0, keepdim=True))), "MC303"),
    "the input bypasses the first linear": (
        mutate(Dense, expert=lambda s, e, m, x, out: m(x) + x), None),
    "each expert reads another input": (
        mutate(Dense, expert=lambda s, e, m, x, out: m(x.roll(e, 0))), "MC207"),
    "weighted twice": (WeightedTwice, "MC304"),
    # combine
    "combined by maximum": (mutate(Dense, add=lambda s, out, y: torch.maximum(out, y)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_left_alone_with_the_reason(name):
    torch.manual_seed(0)
    layer_class, code = REFUSED[name]
    layer = layer_class().eval()
    x = torch.randn(6, layer.hidden)
    torch.manual_seed(1)
    outcome = rewritten(layer, x)
    assert outcome.ops == []
    (site,) = outcome.sites
    assert site.status == "refused" and site.reason and site.location
    assert code is None or site.code == code, site
    assert site.form == ("index_add_loop" if issubclass(layer_class, Loop) else "dense_loop"), site
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(outcome.out, layer(x))


EQUAL = {
    "experts in reverse order": mutate(Dense, order=lambda s: list(reversed(list(enumerate(s.mlps))))),
    "the last expert is skipped": mutate(Dense, order=lambda s: list(enumerate(s.mlps))[:-1]),
    "squared weights": mutate(Dense, weight=lambda s, w, ids, e: (w * w * (ids == e)).sum(-1, keepdim=True)),
    "a residual around": mutate(Dense, finish=lambda s, out, x: out + x),
    "the sum starts from a residual, out of place": mutate(Dense, start=lambda s, x: x * 2),
    "commuted product": mutate(Dense, weight=lambda s, w, ids, e: ((ids == e) * w).sum(-1, keepdim=True)),
    "manual silu": mutate(
        Dense, expert=lambda s, e, m, x, out: m.w2((m.w1(x) * torch.sigmoid(m.w1(x))) * m.w3(x))),
    "gate and up swapped": mutate(Dense, expert=lambda s, e, m, x, out: m.w2(m.w1(x) * F.silu(m.w3(x)))),
    "an unknown activation": mutate(
        Dense, expert=lambda s, e, m, x, out: m.w2(torch.tanh(m.w1(x)) * m.w3(x).exp())),
    "matmul instead of linear": mutate(
        Dense, expert=lambda s, e, m, x, out: (F.silu(x @ m.w1.weight.t()) * (x @ m.w3.weight.t())) @ m.w2.weight.t()),
    "a threshold on the router weights": mutate(
        Dense, weight=lambda s, w, ids, e: (torch.where(w > 0.5, w, 0.0) * (ids == e)).sum(-1, keepdim=True)),
    "dropout at p = 0": mutate(Dense, expert=lambda s, e, m, x, out: F.dropout(m(x), 0.0, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_is_rewritten_because_it_is_equal(name):
    torch.manual_seed(0)
    layer = EQUAL[name]().eval()
    x = torch.randn(6, layer.hidden)
    outcome = rewritten(layer, x)
    assert "experts.default" in outcome.ops or "combine.default" in outcome.ops, outcome.sites
    with torch.no_grad():
        assert relative(outcome.out, layer(x)) < 1e-6


def test_an_unknown_activation_runs_between_two_grouped_gemms():
    layer = EQUAL["an unknown activation"]().eval()
    outcome = rewritten(layer, torch.randn(6, layer.hidden))
    assert outcome.ops == [
        "sort_pairs.default", "grouped_linear.default", "grouped_linear.default", "grouped_linear.default",
        "combine.default",
    ]  # fmt: skip


def test_an_inner_value_that_is_returned_keeps_the_original():
    class Returns(Dense):
        def forward(self, x):
            w, ids = self.router(x)
            kept, out = [], torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                kept.append(mlp(x))
                out = out + (w * (ids == e)).sum(-1, keepdim=True) * kept[-1]
            return out, kept[1]

    outcome = rewritten(Returns().eval(), torch.randn(6, 32))
    assert outcome.ops == [] and outcome.codes == ["MC203"]


def test_router_logits_may_be_returned():
    class Returns(Dense):
        def forward(self, x):
            return super().forward(x), self.router.gate(x)

    outcome = rewritten(Returns().eval(), torch.randn(6, 32))
    assert outcome.ops == ["experts.default"]


def test_a_write_to_the_input_inside_the_layer_keeps_the_original():
    class Writes(Loop):
        def forward(self, x):
            x = x.clone()
            w, ids = self.router(x)
            out = torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                token, slot = torch.where(ids == e)
                out.index_add_(0, token, mlp(x[token]) * w[token, slot, None])
                if e == 1:
                    x.mul_(2)
            return out

    layer = Writes().eval()
    x = torch.randn(6, 32)
    outcome = rewritten(layer, x)
    assert outcome.ops == [] and set(outcome.codes) <= {"MC204", "MC207"}
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))


def test_gradients_keep_the_original():
    layer, x = Dense().train(), torch.randn(6, 32)
    outcome = rewritten(layer, x)  # without gradients: rewritten
    assert outcome.ops == ["experts.default"]
    outcome.sites.clear()
    out = outcome.call(x)
    out.sum().backward()
    assert outcome.codes == ["MC507"]
    assert all(p.grad is not None for p in layer.parameters())


def test_autocast_keeps_the_original():
    layer, x = Dense().eval(), torch.randn(6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = rewritten(layer, x)
    assert outcome.ops == [] and outcome.codes == ["MC211"]


def test_ids_that_may_repeat_an_expert_are_not_taken_for_a_scatter():
    """``scatter`` keeps one weight per expert, a sum over slots keeps all: equal for distinct ids only."""

    class External(Layer):
        def __init__(self):
            super().__init__()
            self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

        def forward(self, x, w, ids):
            dense = torch.zeros(x.shape[0], self.experts).scatter(1, ids, w)
            out = torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                out = out + dense[:, e, None] * mlp(x)
            return out

    outcome = rewritten(External().eval(), torch.randn(6, 32), torch.rand(6, 2), torch.randint(4, (6, 2)))
    assert outcome.ops == [] and outcome.codes == ["MC207"]


def test_ids_that_may_repeat_an_expert_are_not_weighted_by_their_sum_once_per_slot():
    class External(Loop):
        def forward(self, x, w, ids):
            out = torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                token, _ = torch.where(ids == e)
                total = (w * (ids == e)).sum(-1)  # both weights of a repeated expert, and the token stands twice
                out.index_add_(0, token, mlp(x[token]) * total[token, None])
            return out

    layer, x, w, ids = External().eval(), torch.randn(6, 32), torch.rand(6, 2), torch.randint(4, (6, 1)).expand(6, 2)
    outcome = rewritten(layer, x, w, ids)
    with torch.no_grad():
        assert relative(outcome.out, layer(x, w, ids)) < 1e-6
    assert outcome.ops == [] and outcome.codes == ["MC207"]


def test_ids_of_unknown_range_do_not_index_weights():
    class External(Layer):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = self.stack(self.inter, self.hidden), self.stack(self.hidden, self.inter)

        def forward(self, x, w, ids):
            h = F.relu(torch.einsum("th,tkih->tki", x, self.w1[ids]))
            return torch.einsum("tkh,tk->th", torch.einsum("tki,tkhi->tkh", h, self.w2[ids]), w)

    outcome = rewritten(External().eval(), torch.randn(6, 32), torch.rand(6, 2), torch.randint(4, (6, 2)))
    assert outcome.ops == [] and outcome.codes == ["MC207"]


def test_mixed_dtypes_keep_the_original():
    class Mixed(Dense):
        def expert(self, e, mlp, x, out):
            return F.linear(F.silu(F.linear(x, mlp.w1.weight)).double(), mlp.w2.weight.double()).float()

    outcome = rewritten(Mixed().eval(), torch.randn(6, 32))
    assert outcome.ops == [] and outcome.codes == ["MC401"]


def square(layer, tokens):
    """As many tokens as slots: shapes alone no longer tell them apart."""
    return layer(top_k=tokens, experts=6).eval(), torch.randn(tokens, 32)


def test_router_weights_the_wrong_way_round_when_tokens_equal_slots():
    class Transposed(Dense):
        def forward(self, x):
            w, ids = self.router(x)
            out = torch.zeros_like(x)
            for e, mlp in enumerate(self.mlps):
                out = out + (w * (ids == e).t()).sum(0)[:, None] * mlp(x)
            return out

    layer, x = square(Transposed, 3)
    outcome = rewritten(layer, x)
    with torch.no_grad():
        assert relative(outcome.out, layer(x)) < 1e-6
    assert outcome.ops == []


class Sorted(Layer):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.w1, self.w2 = self.stack(self.inter, self.hidden), self.stack(self.hidden, self.inter)

    def tokens(self, x, order):
        return order // self.top_k

    def counts(self, ids):
        return torch.bincount(ids.view(-1), minlength=self.experts)

    def forward(self, x):
        w, ids = self.router(x)
        order = ids.view(-1).argsort(stable=True)
        token = self.tokens(x, order)
        offs = self.counts(ids).cumsum(0).to(torch.int32)
        h = F.relu(torch._grouped_mm(x[token], self.w1.transpose(1, 2), offs))
        y = torch._grouped_mm(h, self.w2.transpose(1, 2), offs) * w.view(-1)[order, None]
        return torch.zeros_like(x).index_add_(0, token, y)


def sorted_case(layer_class, tokens=3):
    layer, x = square(layer_class, tokens)
    outcome = rewritten(layer.bfloat16(), x.bfloat16())
    with torch.no_grad():
        assert relative(outcome.out, layer(x.bfloat16())) < 2e-2
    return outcome


def test_each_token_repeated_is_the_token_of_a_pair():
    interleaved = mutate(
        Sorted, tokens=lambda s, x, order: torch.arange(x.shape[0]).repeat_interleave(s.top_k)[order])
    assert sorted_case(interleaved).ops == ["experts.default"]  # fmt: skip


@pytest.mark.parametrize(
    "tokens",
    [
        lambda s, x, order: torch.arange(x.shape[0]).repeat(s.top_k)[order],
        lambda s, x, order: order % s.top_k,
        lambda s, x, order: (order + 1) // s.top_k % x.shape[0],
    ],
    ids=["tokens in rounds", "slots", "shifted"],
)
def test_rows_of_other_tokens_keep_the_original(tokens):
    assert sorted_case(mutate(Sorted, tokens=tokens)).ops == []


def test_offsets_of_other_ids_keep_the_original():
    other = mutate(Sorted, counts=lambda s, ids: torch.bincount((ids.view(-1) + 1) % s.experts, minlength=s.experts))
    assert sorted_case(other).ops == []


def test_outputs_gathered_by_slots_of_another_token_keep_the_original():
    class Gathers(Layer):
        def __init__(self, **sizes):
            super().__init__(**sizes)
            self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

        def forward(self, x):
            w, ids = self.router(x)
            ys = torch.stack([mlp(x) for mlp in self.mlps], dim=1)
            chosen = ys[torch.arange(x.shape[0]).unsqueeze(0), ids]  # [1, T] against [T, K]: another token's output
            return (chosen * w.unsqueeze(-1)).sum(dim=1)

    layer, x = square(Gathers, 3)
    outcome = rewritten(layer, x)
    assert outcome.ops == []
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))
