"""Marks of rewritten loops, placed by hand: which assumptions follow from a proved layer, and which do not."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from tracing import E, H, I, T, engine_of, tokens

from moe_compile import claims, rewriting
from moe_compile.loops import marks  # noqa: F401  (defines the ops)
from moe_compile.match.engine import Engine
from moe_compile.match.facts import Leaf
from moe_compile.match.marks import Pairs, pairs_of

mark, segment, join = (getattr(torch.ops.moe_compile, name) for name in ("mark", "segment", "join"))
store, listed, blank = (getattr(torch.ops.moe_compile, name) for name in ("store", "listed", "blank"))


def expert(rows, up, down):
    return F.linear(F.silu(F.linear(rows, up)), down)


class Program:
    """A loop over experts; ``open``, ``inside`` and ``after`` are steps to override."""

    site = 3

    def route(self, scores):
        return scores.topk(2)

    def open(self, e, s):
        mark([s["token"]], "nonempty", [self.site])

    def inside(self, e, s):
        pass

    def close(self, e, s):
        mark([], "leave", [self.site])

    def after(self, out, s):
        return out

    def __call__(self, x, scores, ups_parameter, downs_parameter):
        w, ids = self.route(scores)
        out = torch.zeros_like(x)
        s = {"x": x, "w": w, "ids": ids, "scores": scores, "buffer": torch.zeros(E), "kept": x}
        for e in range(E):
            s["token"], s["slot"] = torch.where(ids == e)
            self.open(e, s)
            y = expert(x[s["token"]], ups_parameter[e], downs_parameter[e])
            self.inside(e, s)
            out = out.index_add(0, s["token"], y * w[s["token"], s["slot"], None])
            self.close(e, s)
        return self.after(out, s)


def analysed(program, count=T):
    """What ``rewrite_graph`` finds before it changes anything."""
    inputs = (tokens(count, H), torch.rand(count, E), tokens(E, I, H), tokens(E, H, I))
    with torch.no_grad():
        graph = make_fx(lambda *a: program(*a), tracing_mode="fake", pre_dispatch=True)(*inputs)
        nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
        for node, name in zip(nodes, ("x", "scores", "ups_parameter", "downs_parameter"), strict=True):
            node.name = name
        return rewriting._analyse(graph)


def near(**steps):
    return type("Near", (Program,), steps)()


def hit(s, e, evidence):
    mark([evidence], "hit", [s.site, e])


def keep(name, value):
    return lambda self, e, s: s.__setitem__(name, value(s))


PROVED = {
    "rows": {},
    "a mask": dict(open=lambda p, e, s: mark([s["ids"] == e], "nonempty", [p.site])),
    "hit experts": dict(open=lambda p, e, s: hit(p, e, s["ids"].unique())),
    "hit experts by counts": dict(
        open=lambda p, e, s: hit(p, e, (s["ids"].flatten().bincount(minlength=E) > 0).nonzero())),
    "counts": dict(open=lambda p, e, s: mark([s["ids"].flatten().bincount(minlength=E)], "count", [p.site, e])),
    "a number of its own": dict(inside=lambda p, e, s: s["x"].sum()),
}  # fmt: skip
BROKEN = {
    "another tensor decides": dict(open=lambda p, e, s: mark([s["x"] > 1], "nonempty", [p.site])),
    "weights decide": dict(
        open=lambda p, e, s: mark([(s["w"] * (s["ids"] == e)).sum(1).nonzero()], "nonempty", [p.site])),
    "a weighted mask decides": dict(open=lambda p, e, s: mark([s["w"] * (s["ids"] == e)], "nonempty", [p.site])),
    "other counts decide": dict(open=lambda p, e, s: mark([s["buffer"].long()], "count", [p.site, e])),
    "a list of something else": dict(open=lambda p, e, s: hit(p, e, s["buffer"])),
    "counts as a list of experts": dict(
        open=lambda p, e, s: hit(p, e, s["ids"].flatten().bincount(minlength=E))),
    "the counts of another expert": dict(
        open=lambda p, e, s: mark([s["ids"].flatten().bincount(minlength=E)], "count", [p.site, (e + 1) % E])),
    "the hits of another expert": dict(open=lambda p, e, s: hit(p, (e + 1) % E, s["ids"].unique())),
    "other ids": dict(open=lambda p, e, s: hit(p, e, s["ids"].flip(0).unique())),
    "a veto": dict(inside=lambda p, e, s: mark([], "veto", [p.site])),
    "never closed": dict(open=lambda p, e, s: Program.open(p, e, s) if e == 0 else None, close=lambda p, e, s: None),
    "a write": dict(inside=lambda p, e, s: s["buffer"].add_(1), after=lambda p, out, s: (out, s["buffer"])),
    "a write to an input": dict(inside=lambda p, e, s: s["scores"].add_(1) if e == 0 else None),
    "random numbers": dict(inside=lambda p, e, s: torch.rand_like(s["x"])),
    "a value for later": dict(inside=keep("kept", lambda s: s["x"] * 2), after=lambda p, out, s: out + s["kept"]),
    "closed too late": dict(close=lambda p, e, s: mark([], "leave", [p.site]) if e else None),
    "no layer": dict(inside=lambda p, e, s: s.update(slot=s["slot"].flip(0))),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_follows_from_the_layer(name):
    result = analysed(near(**PROVED[name]))
    assert len(result.plans) == 1 and result.broken == []


@pytest.mark.parametrize("name", BROKEN)
def test_does_not_follow(name):
    result = analysed(near(**BROKEN[name]))
    assert result.broken and {b.site for b in result.broken} == {Program.site}, result.sites
    assert {b.error.code for b in result.broken} <= {"MC214", "MC207"}


def test_without_tokens_nothing_is_proved():
    (broken, *_) = analysed(near(), count=0).broken
    assert broken.error.code == "MC214" and "no tokens" in broken.error.reason


def test_hits_of_ids_of_unknown_range():
    """Every hit expert is one of the loop's only if all ids are."""

    class External(Program):
        def route(self, scores):
            return scores[:, :2], scores[:, :2].to(torch.int64)

        def open(self, e, s):
            hit(self, e, s["ids"].unique())

    assert {b.error.code for b in analysed(External()).broken} == {"MC207"}
    nonempty = type("Nonempty", (External,), {"open": Program.open})
    assert analysed(nonempty()).broken == []


# --- loops that were traced for experts 0 and 1 ---------------------------------------------------------


class Shrunk:
    """``body(e)`` for two experts, probes for all, then the end."""

    count = E
    odd = None  # the expert of another size

    def route(self, scores):
        return scores.topk(2)

    def begin(self):
        mark([], "loop", [0, self.count])

    def body(self, e, s):
        token, slot = torch.where(s["ids"] == e)
        y = expert(s["x"][token], s["ups"][e], s["downs"][e]) * s["w"][token, slot, None]
        s["out"] = s["out"].index_add(0, token, y)

    def probe(self, e, s):
        mark([expert(blank(s["x"]), s["ups"][e], s["downs"][e])], "probe", [0, 0, e])

    def end(self):
        mark([], "end", [0])

    def after(self, s):
        return s["out"]

    def __call__(self, x, scores, **parameters):
        w, ids = self.route(scores)
        weights = list(parameters.values())
        s = {"x": x, "w": w, "ids": ids, "scores": scores, "out": torch.zeros_like(x)}
        s["ups"], s["downs"] = weights[:E], weights[E:]
        self.begin()
        for e in (0, 1):
            self.body(e, s)
        for e in range(self.count):
            self.probe(e, s)
        self.end()
        return self.after(s)


NAMES = [f"up{e}_parameter" for e in range(E)] + [f"down{e}_parameter" for e in range(E)]


def inputs_of(program):
    widths = [I if e != program.odd else I - 8 for e in range(E)]
    weights = [tokens(n, H) for n in widths] + [tokens(H, n) for n in widths]
    return {"x": tokens(), "scores": torch.rand(T, E), **dict(zip(NAMES, weights, strict=True))}


def by_position(program):
    return lambda *a: program(a[0], a[1], **dict(zip(NAMES, a[2:], strict=True)))


def shrunk(program) -> tuple[Engine, list[str]]:
    engine, _ = engine_of(by_position(program), **inputs_of(program))
    return engine, [m.error.reason for m in engine.misses]


def analysed_shrunk(program):
    inputs = inputs_of(program)
    with torch.no_grad():
        graph = make_fx(by_position(program), tracing_mode="fake", pre_dispatch=True)(*inputs.values())
        for node, name in zip([n for n in graph.graph.nodes if n.op == "placeholder"], inputs, strict=True):
            node.name = name
        return rewriting._analyse(graph)


def odd(**steps):
    return type("Odd", (Shrunk,), steps)()


def other_weights(self, e, s):
    up = s["ups"][e] if e != 3 else s["downs"][e].t()
    mark([expert(blank(s["x"]), up, s["downs"][e])], "probe", [0, 0, e])


def other_activation(self, e, s):
    function = F.silu if e != 2 else F.gelu
    mark([F.linear(function(F.linear(blank(s["x"]), s["ups"][e])), s["downs"][e])], "probe", [0, 0, e])


def other_size(self, e, s):
    cut = I if e != 2 else I - 8
    mark([expert(blank(s["x"]), s["ups"][e][:cut], s["downs"][e][:, :cut])], "probe", [0, 0, e])


def one_layer(self, e, s):
    rows = blank(s["x"])
    mark([expert(rows, s["ups"][e], s["downs"][e]) if e != 2 else F.linear(rows, s["ups"][e])], "probe", [0, 0, e])


def unknown(self, e, s):
    mark([expert(blank(s["x"]), s["ups"][e], s["downs"][e]) if e != 2 else s["x"].cumsum(0)], "probe", [0, 0, e])


def twice(self, e, s):
    Shrunk.probe(self, e, s)
    mark([expert(blank(s["x"]), s["ups"][e], s["downs"][0 if e == 2 else e])], "probe", [0, 1, e])


def mixed(of):
    """A tensor where the other experts have a value, and the other way round."""

    def probe(self, e, s):
        mark([s["ups"][e] if (e == of) else expert(blank(s["x"]), s["ups"][e], s["downs"][e])], "probe", [0, 0, e])

    return probe


def all_experts(self, e, s):
    mark([torch.einsum("th,eih->tei", blank(s["x"]), torch.stack(s["ups"]))], "probe", [0, 0, e])


def unweighted(self, e, s):
    order = s["ids"].flatten().argsort(stable=True)
    of = s["ids"].flatten()[order]
    y = torch.einsum("rh,rih->ri", s["x"][order // 2], torch.stack(s["ups"])[of])
    s["out"] = s["out"].index_add(0, order // 2, torch.einsum("ri,rhi->rh", F.silu(y), torch.stack(s["downs"])[of]))


def tensors(self, e, s):
    mark([s["ups"][e]], "probe", [0, 0, e])
    mark([s["downs"][e]], "probe", [0, 1, e])


def odd_body(self, e, s):
    token, slot = torch.where(s["ids"] == e)
    y = expert(s["x"][token], s["ups"][e], s["downs"][e]) * s["w"][token, slot, None] * (e + 1)
    s["out"] = s["out"].index_add(0, token, y)


def dense(self, e, s):
    y = expert(s["x"], s["ups"][e], s["downs"][e]) * (s["w"] * (s["ids"] == e)).sum(-1, keepdim=True)
    s["out"] = s["out"] + y


def on_the_input(self, e, s):
    rows = s["x"] * (s["w"] * (s["ids"] == e)).sum(-1, keepdim=True)
    s["out"] = s["out"] + expert(rows, s["ups"][e], s["downs"][e])


ALIKE = {"rows": {}, "tensors": dict(probe=tensors), "gates": dict(body=dense), "gates on the input": dict(
    body=on_the_input)}  # fmt: skip
NOT_ALIKE = {
    "another form of weight": (dict(probe=other_weights), "another form"),
    "another activation": (dict(probe=other_activation), "computes something else"),
    "another slice": (dict(probe=other_size), "another form"),
    "another size": (dict(odd=2), "has weights of shape"),
    "a tensor for a value": (dict(probe=mixed(2)), "is not known"),
    "values for a tensor": (dict(probe=mixed(1)), "is not known"),
    "weights of all experts": (dict(probe=all_experts), "another form"),
    "one linear map": (dict(probe=one_layer), "computes something else"),
    "an unknown value": (dict(probe=unknown), "is not known"),
    "two tensors at one place": (dict(probe=twice), "stands for two"),
    "another body": (dict(body=odd_body), "expert 1 computes something else than expert 0"),
    "no beginning": (dict(begin=lambda self: None), "without its beginning"),
    "the beginning of another loop": (dict(begin=lambda self: mark([], "loop", [1, E])), "without its beginning"),
    "ended twice": (dict(end=lambda self: (mark([], "end", [0]), mark([], "end", [0]))), "without its beginning"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_sums_stand_for_all(name):
    engine, misses = shrunk(odd(**ALIKE[name]))
    (loop,) = engine.loops
    assert misses == [] and loop.end > 0 and len(loop.grown) == 1
    (node,) = loop.grown
    total = engine.fact(node)
    assert [claims_of(p) for p in total.parts] == list(range(E))
    weights = [tuple(s.weight.leaf for s in p.val.slots) for p in total.parts]
    assert len(set(weights)) == E
    assert claims.check(engine, []), "no layer was proved"


def claims_of(part):
    rows, gate = part.val.rows, part.gate or part.val.gate_in
    assert gate is None or gate.rows is None or gate.rows.expert == gate.expert
    return rows.expert if rows is not None else gate.expert


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_experts_that_are_not_alike(name):
    steps, reason = NOT_ALIKE[name]
    engine, misses = shrunk(odd(**steps))
    assert any(reason in m for m in misses), misses
    assert claims.check(engine, []) or not engine.loops


def test_a_sum_from_before_the_loop_does_not_grow():
    class Two(Shrunk):
        def begin(self):
            self.first = True
            super().begin()

        def after(self, s):
            mark([], "loop", [1, E])
            mark([], "end", [1])
            return s["out"]

    engine, misses = shrunk(Two())
    assert misses == [] and [len(loop.grown) for loop in engine.loops] == [1, 0]
    assert [b.error.code for b in claims.check(engine, [])] == ["MC215", "MC215"]


def test_a_sum_that_belongs_to_no_expert_does_not_grow():
    engine, misses = shrunk(odd(body=unweighted))
    assert misses == [] and [loop.grown for loop in engine.loops] == [set()]


def more(step, after=lambda self, s: s["out"]):
    def body(self, e, s):
        Shrunk.body(self, e, s)
        step(e, s)

    return dict(body=body, after=after)


FOLLOWS = {
    "the sums": {},
    "a value that nobody reads": more(lambda e, s: s["x"] + e),
    "a write after the loop": dict(after=lambda self, s: (s["out"], s["scores"].add_(1))[0]),
}  # fmt: skip
DOES_NOT = {
    "random numbers": more(lambda e, s: torch.rand_like(s["x"])),
    "a write": more(lambda e, s: s["scores"].add_(1)),
    "a value for later": more(lambda e, s: s.update(last=s["x"] + e), lambda self, s: (s["out"], s["last"])),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWS)
def test_a_loop_that_stands_for_all(name):
    result = analysed_shrunk(odd(**FOLLOWS[name]))
    assert len(result.plans) == 1 and result.broken == [], result.sites


@pytest.mark.parametrize("name", DOES_NOT)
def test_a_loop_with_more_in_it(name):
    result = analysed_shrunk(odd(**DOES_NOT[name]))
    assert len(result.plans) == 1 and [b.error.code for b in result.broken] == ["MC215"]


# --- whose pairs decide -----------------------------------------------------------------------------------


def test_no_pair_here_means_none_there():
    _, (ids, column, other) = engine_of(
        lambda ids: (ids.clone(), ids.clone()[:, 1], ids.flip(0)), ids=torch.zeros(T, 2, dtype=torch.int64))
    ids = column.args[0] if column.args[0].target is not torch.ops.aten.slice.Tensor else column.args[0].args[0]
    every, slot = Pairs(Leaf(ids, 0), 1), Pairs(Leaf(column, 0), 1)
    assert every.hold(every) and every.hold(slot) and slot.hold(slot)
    assert not slot.hold(every)
    assert not every.hold(every._replace(expert=2))
    assert not every.hold(Pairs(Leaf(other, 0), 1)) and not every.hold(Pairs(Leaf(column, 1), 1))
    first, second = every._replace(slot=0), every._replace(slot=1)
    assert every.hold(first) and not first.hold(every) and not first.hold(second) and first.hold(first)
    assert not first.hold(slot)


def test_whose_pairs():
    def program(ids):
        order = ids.flatten().argsort()
        return ids == 1, torch.where(ids == 1)[0], order, F.one_hot(ids, E), ids * 2

    engine, nodes = engine_of(program, ids=torch.zeros(T, 2, dtype=torch.int64))
    found = [pairs_of(engine.fact(n)) for n in nodes]
    assert [p.expert for p in found[:2] if p is not None] == [1, 1] and found[2:] == [None] * 3
