"""Every example of every form: one graph, one op, the right form, and the float64 rule."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns import FORMS, grouped_mm, name_of
from support import assert_accurate, double_reference, rewritten

import moe_compile.backend
from moe_compile import report
from moe_compile.spec import Activation, Experts, MoE, Weight

CASES = [
    pytest.param(form, example, id=f"{name_of(form)}-{example.__name__}") for form in FORMS for example in form.EXAMPLES
]


def build(form, example, **sizes):
    torch.manual_seed(0)
    layer = example(**sizes).eval()
    # torch._grouped_mm takes nothing but bf16 on every supported torch.
    return layer.bfloat16() if form is grouped_mm else layer


def tokens(layer, count):
    torch.manual_seed(count)
    return torch.randn(count, layer.hidden, dtype=next(layer.parameters()).dtype)


def reference(form, layer, x):
    if form is not grouped_mm:
        return double_reference(layer, x)
    with torch.no_grad():
        w, ids = layer.router(x)
    experts = Experts(
        layer.experts, layer.hidden, layer.inter, Weight((layer.w13.detach(),), True),
        Weight((layer.w2.detach(),), True),
        activation=Activation("silu"),
    )  # fmt: skip
    return MoE(x, ids, w, layer.top_k, experts).reference(torch.float64)


@pytest.mark.parametrize("form, example", CASES)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_is_rewritten_whole_and_right(form, example, count):
    layer = build(form, example, experts=4 if count == 7 else 3)
    x = tokens(layer, count)
    outcome = rewritten(layer, x)
    assert len(outcome.graphs) == 1
    if count == 7:
        nothing_of_the_experts_is_left(outcome)
    assert outcome.ops == ["experts.default"]
    (site,) = outcome.sites
    assert (site.status, site.form, site.code) == ("rewritten", name_of(form), None)
    assert site.location.split(":")[0].endswith(f"{name_of(form)}.py")
    assert (site.spec.experts.num_experts, site.spec.top_k) == (layer.experts, layer.top_k)
    with torch.no_grad():
        assert_accurate(outcome.out, layer(x), reference(form, layer, x))


def nothing_of_the_experts_is_left(outcome):
    """Only the router stays: no expert linear, no loop remnant, no size assertion."""
    left = [str(n.target) for n in outcome.graphs[0].graph.nodes if n.op.startswith("call")]
    assert sum("linear" in t for t in left) == 1
    assert not any(
        part in t for t in left for part in ("silu", "gelu", "bmm", "index_add", "where", "nonzero", "_assert")
    )


@pytest.mark.parametrize("form, example", CASES)
def test_one_dynamic_graph_serves_every_size(form, example):
    layer = build(form, example)
    x = tokens(layer, 6)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    outcome = rewritten(layer, x)
    assert outcome.ops == ["experts.default"], outcome.sites
    for count in (9, 1, 2):
        y = tokens(layer, count)
        torch._dynamo.decorators.mark_unbacked(y, 0)
        with torch.no_grad():
            assert_accurate(outcome.call(y), layer(y), reference(form, layer, y))
    assert len(outcome.graphs) == 1


@pytest.mark.parametrize("form, example", CASES)
def test_other_sizes(form, example):
    """K = 1, K = E, and odd feature sizes; every expert of a loop costs time in Dynamo."""
    few = dict(experts=3)
    for sizes in (dict(top_k=1, **few), dict(top_k=3, **few), dict(hidden=24, inter=56, experts=5, top_k=3)):
        layer = build(form, example, **sizes)
        x = tokens(layer, 5)
        outcome = rewritten(layer, x)
        assert outcome.ops == ["experts.default"], (sizes, outcome.sites)
        with torch.no_grad():
            assert_accurate(outcome.out, layer(x), reference(form, layer, x))


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_through_inductor(form):
    """The public entry: plain ``torch.compile(model, backend="moe_compile")``, no flags."""
    torch._dynamo.reset()
    example = form.EXAMPLES[0]
    layer = build(form, example)
    x = tokens(layer, 6)
    with torch.no_grad(), report.collect() as found:
        out = torch.compile(layer, backend="moe_compile")(x)
        assert_accurate(out, layer(x), reference(form, layer, x))
    assert [(s.status, s.form) for s in found.sites] == [("rewritten", name_of(form))]


def test_registry_is_complete():
    """Every form file is listed once, and each has examples, anchors and a match."""
    assert len({name_of(f) for f in FORMS}) == len(FORMS)
    for form in FORMS:
        assert form.EXAMPLES and form.ANCHORS and callable(form.match)
    assert moe_compile.backend.moe_compile is not None
