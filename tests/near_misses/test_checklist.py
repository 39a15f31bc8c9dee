"""The points of docs/legality.md that no near miss of a single line shows: modes, ranges of ids, sizes that agree."""

from __future__ import annotations

import pytest
import torch
from bases import BASES, LOOPS, MODULES, BoolMask, Dense, Gathered, StackGather, Where, tokens
from moe_compile.patterns._examples import GatedMLP, Layer
from mutators import EQUAL, Case, check, override, wrap
from support import assert_accurate, relative, rewritten
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moe_compile.rewriting as rewriting
from moe_compile.canonical import value


def refused(layer, code, *args):
    """The outcome of a layer that is left as it was, with one refusal."""
    outcome = rewritten(layer.eval(), *args)
    assert outcome.ops == [] and outcome.codes == [code], outcome.sites
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(*args))
    return outcome.sites[0]


# --- modes (14) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_gradients_keep_the_original(base):
    layer = base().train()
    x = tokens(layer)
    outcome = rewritten(layer, x)  # without gradients: rewritten
    assert outcome.ops == ["experts.default"]
    outcome.sites.clear()
    outcome.call(x).sum().backward()
    assert outcome.codes == ["MC507"]
    assert all(p.grad is not None for p in layer.parameters())


def test_gradients_are_read_from_the_frozen_parameters():
    layer = Dense().train().requires_grad_(False)
    x = tokens(layer)
    outcome = rewritten(layer, x)
    outcome.sites.clear()
    assert relative(outcome.call(x), layer(x)) < 1e-6
    assert outcome.codes == [None]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_grad_mode_inside_the_graph_counts(enabled):
    def forward(step, s, x):
        with torch.set_grad_enabled(enabled):
            return step(x)

    layer = wrap(forward=forward)(Dense)().train()
    outcome = rewritten(layer, tokens(layer))
    assert outcome.codes == (["MC507"] if enabled else [None])


@pytest.mark.parametrize("base", LOOPS)
def test_autocast_around_the_layer_keeps_the_original(base):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = base()
        outcome = rewritten(layer.eval(), tokens(layer))
    assert outcome.ops == [] and outcome.codes == ["MC211"]


def test_autocast_inside_the_graph_keeps_the_original():
    def mix(step, s, x, w, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(x, w, ids).float()

    outcome = rewritten(wrap(mix=mix)(Dense)().eval(), torch.randn(5, 8))
    assert outcome.ops == [] and outcome.codes == ["MC211"]


@pytest.mark.parametrize("base", [Dense, Where, Gathered])
def test_a_checkpoint_around_the_layer_keeps_the_original(base):
    layer = wrap(forward=lambda step, s, x: checkpoint(step, x, use_reentrant=False))(base)().eval()
    x = tokens(layer)
    outcome = rewritten(layer, x)
    assert outcome.ops == [] and len(outcome.graphs) == 1
    with torch.no_grad():
        assert torch.equal(outcome.out, layer(x))


# --- ids (1, 2, 4, 15) --------------------------------------------------------------------------------------


def external(base, **steps):
    """The router's results come as inputs, so nothing is known of the ids."""
    return override(forward=lambda s, x, w, ids: s.mix(x, w, ids), **steps)(base)()


def routed(experts=3):
    return torch.randn(5, 8), torch.rand(5, 2), torch.randint(experts, (5, 2))


def test_ids_that_may_repeat_an_expert_are_not_taken_for_a_scatter():
    """``scatter`` keeps one weight per expert, a sum over slots keeps all: equal for distinct ids only."""
    column = override(weight=lambda s, w, ids, e: torch.zeros(5, 3).scatter(1, ids, w)[:, e, None])(Dense)
    site = refused(external(column), "MC207", *routed())
    assert "one expert twice" in site.reason


@pytest.mark.parametrize("base", [Dense, Where])
def test_external_ids_that_may_repeat_are_no_hindrance_to_a_sum(base):
    layer, args = external(base), routed()
    outcome = rewritten(layer.eval(), *args)
    assert outcome.ops == ["experts.default"]
    with torch.no_grad():
        assert relative(outcome.out, layer(*args)) < 1e-6


@pytest.mark.parametrize("base", [Gathered, StackGather])
def test_ids_of_unknown_range_do_not_index_weights(base):
    assert "top-k" in refused(external(base), "MC207", *routed()).reason


def test_a_mask_of_tokens_that_name_an_expert_twice_is_no_sum():
    """``any`` runs a token once, a sum over the slots weighs it twice: equal, as the weights are summed too."""
    layer, args = external(BoolMask), routed()
    outcome = rewritten(layer.eval(), *args)
    with torch.no_grad():
        assert relative(outcome.out, layer(*args)) < 1e-6


def test_more_scores_than_weights_are_refused():
    def route(s, x):
        scores = F.softmax(torch.cat([s.router.gate(x), s.router.gate(x) - 9], -1), -1)  # [T, 2E]
        return torch.topk(scores, s.top_k, dim=-1)

    site = refused(override(route=route)(Gathered)(), "MC207", torch.randn(5, 8) * 0.1)
    assert "6 scores" in site.reason


def test_fewer_scores_than_weights_are_fine():
    two = override(route=lambda s, x: torch.topk(F.softmax(s.router.gate(x)[:, :2], -1), 2, dim=-1))
    layer = two(Gathered)().eval()
    x = tokens(layer)
    outcome = rewritten(layer, x)
    assert outcome.ops == ["experts.default"]
    with torch.no_grad():
        assert relative(outcome.out, layer(x)) < 1e-6


# --- devices and dtypes (13) --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", MODULES)
def test_an_expert_on_another_device(base, monkeypatch):
    """Mutator 48 without a second device: the weights of one expert say that they are elsewhere."""
    facts_of = rewriting.facts_of

    def moved(copy):
        for node in copy.graph.nodes:
            origin = copy.origin(node)
            if node.op == "placeholder" and origin is not None and "modules_1_modules_w1" in origin.name:
                val = value(node)
                meta = torch.empty(val.shape, dtype=val.dtype, device="meta")
                node.meta["val"] = FakeTensor(val.fake_mode, meta, torch.device("cuda:0"))
        return facts_of(copy)

    monkeypatch.setattr(rewriting, "facts_of", moved)
    layer = base()
    assert "cuda:0" in refused(layer, "MC401", tokens(layer)).reason


def test_mixed_dtypes_inside_an_expert():
    def expert(s, mlp, x, e):
        return F.linear(F.silu(F.linear(x, mlp.w1.weight)).double(), mlp.w2.weight.double()).float()

    refused(override(expert=expert)(Dense)(), "MC401", torch.randn(5, 8))


# --- writes and observers (7, 8) ----------------------------------------------------------------------------


@pytest.mark.parametrize("base", LOOPS)
def test_a_write_to_the_input_inside_the_layer(base):
    def step(step, s, out, x, w, ids, e, mlp):
        out = step(out, x, w, ids, e, mlp)
        if e == 1:
            x.mul_(2)
        return out

    layer = wrap(forward=lambda run, s, x: run(x.clone()), step=step)(base)()
    refused(layer, "MC207", tokens(layer))


@pytest.mark.parametrize("base", LOOPS)
def test_the_last_read_may_be_followed_by_a_write(base):
    """After the last expert has read the input, but before the sum is whole: the op would read it too late."""

    def read(step, s, mlp, x, e):
        y = step(mlp, x, e)
        if e == s.experts - 1:
            s.seen.mul_(2)
        return y

    def route(step, s, x):
        s.seen = x
        return step(x)

    layer = wrap(forward=lambda run, s, x: run(x.clone()), expert=read, route=route)(base)()
    refused(layer, "MC204", tokens(layer))


@pytest.mark.parametrize("base", BASES)
def test_router_values_may_be_returned(base):
    def mix(step, s, x, w, ids):
        return step(x, w, ids), w, ids

    check(Case(0, base, wrap(mix=mix), EQUAL))


def test_an_unknown_activation_runs_between_two_grouped_gemms():
    layer = override(activate=lambda s, gate, up, e: torch.tanh(gate) * up.exp())(Dense)().eval()
    x = tokens(layer)
    outcome = rewritten(layer, x)
    assert outcome.ops == [
        "sort_pairs.default", "grouped_linear.default", "grouped_linear.default", "grouped_linear.default",
        "combine.default",
    ]  # fmt: skip
    with torch.no_grad():
        assert_accurate(outcome.out, layer(x), layer.double()(x.double()))


def test_ids_that_may_repeat_an_expert_are_not_weighted_by_their_sum_once_per_slot():
    class External(Layer):
        def __init__(self):
            super().__init__()
            self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

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
