"""Loops that look like loops over experts: each differs in one fact, and gives what the original gives.

``LIMIT`` is 3 for all of them, so that loops over four experts are traced for two where that can be proved.
"""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import relative, rewritten
from torch import nn
from torch.nn import functional as F

import moe_compile
from moe_compile.loops import traced


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
    monkeypatch.setattr(traced, "LIMIT", 3)


class Loop(Layer):
    """A loop with a test for emptiness; every step is a method to override."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))
        self.seen = 0

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class Threshold(Loop):
    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            mask = ids == e
            if mask.sum() > 2:
                token, slot = torch.where(mask)
                out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class OtherExpertsTest(Loop):
    """Expert e runs only if expert 0 has tokens."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if (ids == 0).any():
                out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class OtherTensorsTest(Loop):
    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if (x > 2.5).any():
                out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class Counter(Loop):
    """The number of experts with tokens divides the result."""

    def forward(self, x):
        w, ids = self.router(x)
        out, hit = torch.zeros_like(x), 0
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            hit += 1
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out / hit


class ModuleCounter(Loop):
    def note(self):
        self.seen += 1

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            self.note()
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class ElseBranch(Loop):
    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
            else:
                out = out + 1
        return out


class LoadUpdate(Loop):
    """A buffer counts the experts that were hit."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("load", torch.zeros(self.experts))

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            self.load[e] += 1
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class HitsOfOther(Loop):
    """The hit list is that of another routing decision."""

    def forward(self, x):
        w, ids = self.router(x)
        other = ids.flip(0).roll(1, 1).clamp(max=1)
        out = torch.zeros_like(x)
        for e in other.unique():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlps[e.item()](x[token]) * w[token, slot, None])
        return out


class HitsCut(Loop):
    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in ids.unique()[:2]:
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlps[e.item()](x[token]) * w[token, slot, None])
        return out


class Busy(Loop):
    """Only experts with more than two tokens are in the list."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.experts).permute(2, 1, 0)
        for row in torch.greater(mask.sum(dim=(-1, -2)), 2).nonzero():
            slot, token = torch.where(mask[row[0]])
            out.index_add_(0, token, self.mlps[row[0]](x[token]) * w[token, slot, None])
        return out


class NextExpert(Loop):
    """Tokens of e + 1 go through expert e: the same layer with its experts in another order."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == (e + 1) % self.experts)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class WrongCounts(Loop):
    """Rows are cut by the counts of the ids without their last row."""

    def forward(self, x):
        w, ids = self.router(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = flat.flip(0).roll(1).clamp(max=2).bincount(minlength=self.experts).tolist()
        parts = x[order // self.top_k].split(counts)
        y = torch.cat([mlp(p) for mlp, p in zip(self.mlps, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, order // self.top_k, y * w.flatten()[order, None])


class Joined(Loop):
    """The groups come back in reverse order."""

    def forward(self, x):
        w, ids = self.router(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=self.experts).tolist()
        parts = x[order // self.top_k].split(counts)
        y = torch.cat([mlp(p) for mlp, p in zip(self.mlps, parts, strict=True)][::-1])
        return torch.zeros_like(x).index_add(0, order // self.top_k, y * w.flatten()[order, None])


class Broken(Loop):
    """A graph break inside the loop."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            torch._dynamo.graph_break()
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class Before(Loop):
    """A graph break before the loop: the rest of the function must go on as it was written."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


# --- experts that are not alike: traced for two, wrong for the others ------------------------------------


class Plain(Loop):
    def one(self, e, rows):
        return self.mlps[e](rows)

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class OddActivation(Plain):
    def __init__(self, **sizes):
        super().__init__(**sizes)

        class Odd(GatedMLP):
            def forward(self, x):
                return self.w2(F.gelu(self.w1(x)) * self.w3(x))

        self.mlps[3] = Odd(self.hidden, self.inter)


class OddSize(Plain):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps[2] = GatedMLP(self.hidden, self.inter + 8)


class OddBias(Plain):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps[3].w2 = nn.Linear(self.inter, self.hidden)


class Shared(Plain):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps[3].w1 = self.mlps[2].w1


class Hooked(Plain):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps[3].register_forward_hook(lambda m, i, o: o * 2)


class Scales(Loop):
    """A Python number of its own for every expert."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.scales = [1.0, 1.0, 1.0, 3.0]

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None] * self.scales[e])
        return out


class Special(Loop):
    """Without the last expert: the same layer with one expert less."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            if e == 3:
                continue
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None])
        return out


class Growing(Loop):
    """Each expert's weight is scaled by a number that the loop carries."""

    def forward(self, x):
        w, ids = self.router(x)
        out, scale = torch.zeros_like(x), 1.0
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlps[e](x[token]) * w[token, slot, None] * scale)
            scale = scale + 1.0
        return out


class Carried(Loop):
    """The last expert's output is used after the loop."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            y = self.mlps[e](x) * (w * (ids == e)).sum(-1, keepdim=True)
            out = out + y
        return out + y


class Listed(Loop):
    def forward(self, x):
        w, ids = self.router(x)
        out, norms = torch.zeros_like(x), []
        for e in range(self.experts):
            y = self.mlps[e](x) * (w * (ids == e)).sum(-1, keepdim=True)
            norms.append(y.norm())
            out = out + y
        return out, torch.stack(norms)


class PerExpertScale(Loop):
    """A learnt number for every expert after its output."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.scale = nn.Parameter(torch.rand(self.experts) + 0.5)

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.mlps[e](x[token]) * self.scale[e] * w[token, slot, None])
        return out


LEFT = {
    Threshold: "MC101", OtherExpertsTest: "MC214", OtherTensorsTest: "MC214", Counter: "MC214", ModuleCounter: "MC214",
    ElseBranch: "MC101", LoadUpdate: "MC214", HitsOfOther: "MC214", HitsCut: "MC214", Busy: "MC214",
    WrongCounts: "MC207", Joined: "MC303", Broken: "MC101", OddActivation: "MC201", OddSize: "MC201", OddBias: "MC201",
    Shared: "MC202", Hooked: "MC201", Scales: "MC201", Growing: "MC201", Carried: "MC208", Listed: "MC203",
    PerExpertScale: "MC303",
}  # fmt: skip


def inputs(layer):
    torch.manual_seed(3)
    many, few = torch.randn(7, layer.hidden), torch.randn(2, layer.hidden)
    return many, few, many * 2


def flat(value):
    return torch.cat([v.reshape(-1) for v in (value if isinstance(value, tuple) else (value,))])


def compared(layer):
    """One compiled call after the other gives what the original gives; the outcome of the first."""
    expected = []
    with torch.no_grad():
        for x in inputs(layer):
            expected.append((flat(layer(x)), layer.seen))
    layer.seen = 0
    if hasattr(layer, "load"):
        load, layer.load = layer.load.clone(), torch.zeros_like(layer.load)
    first, *rest = inputs(layer)
    outcome = rewritten(layer, first)
    results = [(flat(outcome.out), layer.seen)]
    with torch.no_grad():
        results += [(flat(outcome.call(x)), layer.seen) for x in rest]
    for (ours, seen), (theirs, wanted) in zip(results, expected, strict=True):
        assert relative(ours, theirs) < 1e-6
        assert seen == wanted
    if hasattr(layer, "load"):
        assert torch.equal(layer.load, load)
    return outcome


@pytest.mark.parametrize("kind", LEFT)
def test_is_left_alone_and_right(kind):
    torch.manual_seed(0)
    outcome = compared(kind().eval())
    assert "experts.default" not in outcome.ops


@cache
def explained(kind):
    """What ``explain`` says; only ever called with short loops."""
    torch.manual_seed(0)
    layer = kind().eval()
    return moe_compile.explain(layer, inputs(layer)[0])


@pytest.mark.parametrize("kind", LEFT)
def test_explain_names_the_line_the_fact_and_the_edit(kind):
    report = explained(kind)
    (site,) = report.sites
    assert site.status != "rewritten" and site.code == LEFT[kind]
    path, _, line = site.location.rpartition(":")
    own = inspect.getsourcelines(kind.forward if "forward" in vars(kind) else Plain.forward)
    assert path == __file__ and own[1] <= int(line) < own[1] + len(own[0])
    shown = str(report)
    assert site.location in shown and site.code in shown and "fix: " in shown


@pytest.mark.parametrize("kind", [OddActivation, Shared])
def test_two_experts_do_not_stand_for_others_that_differ(kind, caplog):
    """MC215 is the reason to trace the loop in full, which then tells what differs."""
    torch.manual_seed(0)
    layer = kind().eval()
    with caplog.at_level("DEBUG", logger="moe_compile.match"):
        outcome = rewritten(layer, inputs(layer)[0])
    assert "MC215: a loop over experts does not end in the sum of a layer that was rewritten" in caplog.text
    assert outcome.codes == [LEFT[kind]]


@pytest.mark.parametrize("kind", [ElseBranch, OtherTensorsTest, ModuleCounter])
def test_no_advice_to_remove_a_test_that_matters(kind):
    assert "remove the test" not in str(explained(kind))


@pytest.mark.parametrize("kind", [Loop, Plain, Before, NextExpert, Special])
def test_is_rewritten(kind):
    torch.manual_seed(0)
    outcome = compared(kind().eval())
    assert set(outcome.ops) == {"experts.default"}, outcome.sites


def test_an_expert_that_changes_later_is_seen():
    """Two experts were traced in full, the others as probes: a guard must still hold for each."""
    torch.manual_seed(0)
    layer = Plain().eval()
    x = inputs(layer)[0]
    outcome = rewritten(layer, x)
    assert outcome.ops == ["experts.default"]
    for change in (lambda: OddActivation().mlps[3], lambda: GatedMLP(32, 48, bias=True), lambda: GatedMLP(32, 48)):
        layer.mlps[3] = change().eval()
        with torch.no_grad():
            assert relative(outcome.call(x), layer(x)) < 1e-6
    assert len(outcome.graphs) >= 3 and outcome.ops == ["experts.default"]  # the last one is the first layer again


def test_many_experts_are_traced_as_two():
    torch.manual_seed(0)
    layer = Plain(experts=40).eval()
    x = inputs(layer)[0]
    outcome = rewritten(layer, x)
    assert outcome.ops == ["experts.default"]
    (node,) = (n for n in outcome.graphs[0].graph.nodes if "moe_compile" in str(n.target))
    assert len(node.args[3]) == 40
    with torch.no_grad():
        assert relative(outcome.out, layer(x)) < 1e-6


def test_other_backends_trace_the_program_as_it_is():
    seen = []

    def other(gm, example_inputs):
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    layer = Loop().eval()
    with torch.no_grad():
        torch.compile(layer, backend=other)(inputs(layer)[0])
    assert len(seen) > 1 and not any("moe_compile" in str(n.target) for gm in seen for n in gm.graph.nodes)
