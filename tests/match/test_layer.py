"""Whole sums as layers: what is proved of them, and the first fact that fails; labels of dimensions beneath."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, engine_of, said, tokens

from moe_compile.match.labels import Atom, unify_dim
from moe_compile.match.layer import build, chosen_from, rebased
from moe_compile.match.slots import merge_slots
from moe_compile.spec import NoMatch

aten = torch.ops.aten
INPUTS = {
    "x": tokens(), "w": tokens(T, K), "ids": chosen(), "scores": tokens(T, E),
    "up_parameter": tokens(E, I, H), "gate_parameter": tokens(E, I, H), "down_parameter": tokens(E, H, I),
    "up_bias_parameter": tokens(E, I), "down_bias_parameter": tokens(E, H),
    "shared_parameter": tokens(H, H), "other_parameter": tokens(H, H), "single_parameter": tokens(I, H),
    "square_parameter": tokens(E, H, H), "shared_bias_parameter": tokens(I),
}  # fmt: skip


def outcome(program, dynamic=None, by_slot=False, **others):
    """The layer that ``program`` ends with, or the refusal; ``dynamic``: which sizes of an input are unknown."""
    inputs = {**INPUTS, **others}
    if dynamic:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = {name: fake(mode, tensor, dynamic.get(name, ())) for name, tensor in inputs.items()}
    names = [name.removesuffix("_parameter") for name in inputs]
    engine, _ = engine_of(lambda *tensors: program(SimpleNamespace(**dict(zip(names, tensors, strict=True)))), **inputs)
    node, total = engine.sums[-1]
    total = merge_slots(engine, total, node) if by_slot else total
    try:
        return build(engine, node, rebased(engine, total, node), "")
    except NoMatch as error:
        return error


def fake(mode, tensor, dims):
    sizes = [DimDynamic.DUCK if d in dims else DimDynamic.STATIC for d in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


# --- the parts of programs: every step can be another one -----------------------------------------------


def expert(rows, up, down):
    return F.linear(F.silu(F.linear(rows, up)), down)


def own(s, rows, e):
    return expert(rows, s.up[e], s.down[e])


def with_bias(s, rows, e):
    return F.linear(F.silu(F.linear(rows, s.up[e], s.up_bias[e])), s.down[e], s.down_bias[e])


def not_zero_at_zero(s, rows, e):
    return F.linear(torch.cos(F.linear(rows, s.up[e])), s.down[e])


def gate(s, e):
    return (s.w * (s.ids == e)).sum(-1, keepdim=True)


def picked(run=own, of=range(E), weigh=lambda s, e, token, slot, y: y * s.w[token, slot, None], out=None):
    """A loop over the rows of each expert."""

    def program(s):
        total = torch.zeros_like(s.x) if out is None else out(s)
        for e in of:
            token, slot = torch.where(s.ids == e)
            total = total.index_add(0, token, weigh(s, e, token, slot, run(s, s.x[token], e)))
        return total

    return program


def scaled_rows(run):
    """The weight of a pair on the expert's input."""

    def scaled(s, e, token, slot, y):
        return run(s, s.x[token] * s.w[token, slot, None], e)

    return picked(weigh=scaled)


def dense(term=lambda s, e: own(s, s.x, e) * gate(s, e), of=range(E), before=lambda s: None):
    """A sum of every expert on every token."""

    def program(s):
        before(s)
        total = 0
        for e in of:
            total = total + term(s, e)
        return total

    return program


def routed(program, k=K):
    """The ids are those of a top-k."""

    def after(s):
        s.w, s.ids = s.scores.topk(k)
        return program(s)

    return after


def of_one_slot(program):
    def after(s):
        s.w, s.ids = s.w[:, :1], s.ids[:, :1]
        return program(s)

    return after


def combine(s):
    """Weights ``[T, E]``."""
    return torch.zeros_like(s.scores).scatter_add(1, s.ids, s.w)


def every(s, rows, up="up"):
    """All experts on all rows ``[T, E, H]``."""
    return torch.einsum("tei,ehi->teh", F.silu(torch.einsum("th,eih->tei", rows, getattr(s, up))), s.down)


def all_at_once(s, rows=None, up="up"):
    return torch.einsum("teh,te->th", every(s, s.x if rows is None else rows, up), combine(s))


def in_order(weigh=lambda s, y, order: y):
    """Pairs in the order of their experts, each with its own weights."""

    def program(s):
        flat = s.ids.flatten()
        order = flat.argsort(stable=True)
        h = torch.einsum("rh,rih->ri", s.x[order // K], s.up[flat[order]])
        y = torch.einsum("ri,rhi->rh", F.silu(h), s.down[flat[order]])
        return torch.zeros_like(s.x).index_add(0, order // K, weigh(s, y, order))

    return routed(program)


def put_back(s):
    """Tokens in the order of their experts, weighted on the input, with biases; then in their own order again."""
    flat = s.ids.flatten()
    order = flat.argsort(stable=True)
    of, rows = flat[order], s.x[order // s.ids.shape[1]] * s.w.flatten()[order, None]
    h = F.silu(torch.einsum("rh,rih->ri", rows, s.up[of]) + s.up_bias[of])
    return s.x + torch.einsum("ri,rhi->rh", h, s.down[of])[order.argsort()]


def gathered(s):
    """The weights of every pair's expert, gathered by the ids."""
    h = F.silu(torch.einsum("tkih,th->tki", s.up[s.ids], s.x))
    return (torch.einsum("tki,tkhi->tkh", h, s.down[s.ids]) * s.w[..., None]).sum(1)


def projected(s):
    s.h = F.linear(s.x, s.shared)


def on_projected(run=expert):
    return lambda s, e: run(s.h, s.up[e], s.down[e]) * gate(s, e)


def with_number(rows, up, down):
    return F.linear(F.silu(F.linear(rows, up).clamp(max=7.0)), down)


def mask_rows(s):
    """``out[mask] += ..`` where a token counts once."""
    total = torch.zeros_like(s.x)
    for e in range(E):
        mask = (s.ids == e).sum(-1).bool()
        total[mask] += own(s, s.x[mask], e)
    return total


def one_slot_of_a_mask(s):
    total = torch.zeros_like(s.x)
    for e in range(E):
        mask = (s.ids == e)[:, 0]
        total[mask] += own(s, s.x[mask], e)
    return total


def two_sources(s):
    """The first weights chosen by the ids, the second those of every expert."""
    h = F.silu(torch.einsum("tkih,th->tki", s.up[s.ids], s.x))
    return (torch.einsum("tki,ehi->tkeh", h, s.down) * combine(s)[:, None, :, None]).sum((1, 2))


# --- layers ---------------------------------------------------------------------------------------------

PROVED = {
    "rows": picked(),
    "rows, whatever the ids, without weights": picked(weigh=lambda s, e, token, slot, y: y),
    "rows, whatever the ids, weighted on the input": scaled_rows(own),
    "rows with biases, weighted on the input": scaled_rows(with_bias),
    "every expert on every token": dense(),
    "all experts at once": all_at_once,
    "pairs in order, without weights": in_order(),
    "tokens in order with biases, weighted on the input": routed(put_back, k=1),
    "every expert on every token, weighted on the input": routed(dense(lambda s, e: own(s, s.x * gate(s, e), e))),
    "the same with one slot, whatever the ids": of_one_slot(dense(lambda s, e: own(s, s.x * gate(s, e), e))),
    "gathered weights": routed(gathered),
}
REBASED = {
    "a shared projection": dense(on_projected(), before=projected),
    "a shared projection and numbers": dense(on_projected(with_number), before=projected),
    "a shared projection before all experts at once": lambda s: all_at_once(s, F.linear(s.x, s.shared)),
}
REFUSED = {
    "a shared projection and activation of the weighted input": (
        routed(dense(lambda s, e: expert(F.silu(F.linear(s.x * gate(s, e), s.shared)), s.up[e], s.down[e]),
                     before=lambda s: F.silu(F.linear(s.x, s.shared)))),
        "MC202: experts share a weight"),
    "two shared projections": (
        dense(lambda s, e: F.linear(
            F.silu(F.linear(F.linear(s.x, s.shared), s.gate[e])) * F.linear(F.linear(s.x, s.other), s.up[e]), s.down[e])
            * gate(s, e)),
        "MC202: experts share a weight"),
    "a shared bias": (
        dense(lambda s, e: F.linear(F.silu(F.linear(s.x, s.up[e], s.shared_bias)), s.down[e]) * gate(s, e)),
        "MC202: experts share a weight"),
    "a shared projection of each expert's rows": (
        picked(lambda s, rows, e: own(s, F.linear(rows, s.shared), e)), "MC202: experts share a weight"),
    "the shared projection comes last in one expert": (
        dense(lambda s, e: (expert(s.x, s.square[e], s.shared) if e == 1 else expert(s.h, s.square[e], s.other))
              * gate(s, e), before=projected),
        "MC202: experts share a weight"),
    "pairs in order weighted for one expert": (
        in_order(lambda s, y, order: y * ((s.ids == 1) * s.w).sum(1)[order // K, None]),
        "MC208: experts [1] are summed"),
    "one expert is weighted on the input": (
        dense(lambda s, e: own(s, s.x * gate(s, e), e) if e == 2 else own(s, s.x, e) * gate(s, e)), "MC302"),
    "two sums over all experts": (
        lambda s: all_at_once(s) + all_at_once(s, up="gate"), "MC208: 2 sums over all experts"),
    "one row of the weights for all experts": (
        lambda s: (expert(s.x, s.up[1], s.down[1])[:, None] * combine(s)[..., None]).sum(1), "MC201: some weights"),
    "no weight but what all share": (
        lambda s: (expert(s.x, s.single, s.single.t())[:, None] * combine(s)[..., None]).sum(1), "MC201: some weights"),
    "weights by the ids, then those of all experts": (routed(two_sources), "MC201: some weights"),
    "an expert and all of them": (
        lambda s: own(s, s.x, 0) * gate(s, 0) + all_at_once(s), "MC208: a sum over all experts is mixed"),
    "an expert is missing": (
        picked(lambda s, rows, e: expert(rows, s.up[e] * 1, s.down[e] * 1), of=(0, 1, 3),
               weigh=lambda s, e, token, slot, y: y),
        "MC208: experts [0, 1, 3] are summed"),
    "rows weighted for another expert": (
        routed(picked(weigh=lambda s, e, token, slot, y: y * gate(s, (e + 1) % E)[token])),
        "MC208: rows of expert 0 are weighted for expert 1"),
    "a tensor of its own, then another expert's row": (
        picked(lambda s, rows, e: expert(rows, s.up[2] if e else s.single, s.down[e])),
        "MC208: tokens of expert 1 go through row 2"),
    "one slot of a mask": (routed(one_slot_of_a_mask), "MC213"),
    "one token for all": (
        lambda s: dense(lambda s, e: own(s, s.x[:1].expand(T, H), e) * gate(s, e))(s),
        "MC207: hidden states and expert ids"),
    "more rows than tokens": (
        picked(out=lambda s: torch.zeros(T + 1, H)), "MC207: the result does not have one row per token"),
    "the result is transposed": (
        lambda s: torch.einsum("teh,te->ht", every(s, s.x), combine(s)), "MC207: the result does not have one row"),
    "biases on tokens of other experts": (dense(lambda s, e: with_bias(s, s.x * gate(s, e), e)), "MC302"),
    "ones on tokens of other experts": (
        dense(lambda s, e: not_zero_at_zero(s, s.x * gate(s, e), e)), "MC302"),
    "a token counts once": (mask_rows, "MC207: a token may name one expert twice"),
    "ids of unknown range": (gathered, "MC207: the ids are not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_is_a_layer(name):
    found = outcome(PROVED[name])
    assert not isinstance(found, NoMatch), found
    assert found.moe.experts.num_experts == E and found.routing.x.node.op == "placeholder"


@pytest.mark.parametrize("name", REBASED)
def test_what_all_experts_share_stays_before_the_layer(name):
    found = outcome(REBASED[name])
    assert not isinstance(found, NoMatch), found
    assert found.moe.experts.num_experts == E and found.routing.x.node.target is aten.linear.default


@pytest.mark.parametrize("name", REFUSED)
def test_is_no_layer(name):
    program, reason = REFUSED[name]
    found = outcome(program)
    assert isinstance(found, NoMatch) and str(found).startswith(reason), found


def test_no_tokens_beside_features():
    """Of no tokens any shape has as many: what all experts share must still have rows of their features."""

    def program(s):
        columns = torch.einsum("abh,ih->bia", s.x, s.shared)
        s.h = columns.reshape(3 * H, 0).t().view(0, 3, H)
        return dense(on_projected())(s)

    found = outcome(program, x=tokens(0, 3, H), ids=chosen(0, 3, K), w=tokens(0, 3, K))
    assert str(found) == "MC207: the input features are not the experts' hidden size"


def columns(s):
    """A loop over the slots."""
    total = torch.zeros_like(s.x)
    for k in range(K):
        for e in range(E):
            token = torch.where(s.ids[:, k] == e)[0]
            total = total.index_add(0, token, own(s, s.x[token], e) * s.w[:, k][token, None])
    return total


@pytest.mark.parametrize("count", [K, K + 1])
def test_columns_of_as_many_weights_as_slots(count):
    found = outcome(columns, by_slot=True, w=tokens(T, count))
    assert isinstance(found, NoMatch) == (count > K)
    assert count == K or str(found) == "MC207: router weights and expert ids have different sizes"


UNKNOWN = {
    "tokens": (picked(), {"x": [0], "w": [0], "ids": [0]}, None),
    "slots": (picked(weigh=lambda s, e, token, slot, y: y), {"ids": [1]}, "MC207: top-k is not a constant"),
    "scores": (routed(gathered), {"scores": [1]}, "MC207: the ids come from a top-k over s"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_sizes_that_are_not_known(name):
    program, dynamic, reason = UNKNOWN[name]
    found = outcome(program, dynamic)
    assert isinstance(found, NoMatch) == (reason is not None), found
    assert reason is None or str(found).startswith(reason)


def through_a_view(ids):
    copy = ids.clone()
    view = copy.view(-1)
    view.mul_(2)
    return copy


CHOSEN = {
    "topk": (lambda scores: scores.topk(K)[1], E),
    "one of the largest": (lambda scores: scores.max(1)[1], E),
    "the first of a sort": (lambda scores: scores.sort(-1)[1][:, :K], E),
    "as int32": (lambda scores: scores.topk(K)[1].to(torch.int32), E),
    "of some tokens": (lambda scores: scores.topk(K)[1][:3], E),
    "of two heads": (lambda y: y.topk(K)[1], H),
    "of two heads, side by side": (lambda y: y.topk(K)[1].view(T, E * K), None),
    "external": (lambda ids: ids, None),
    "written through a view": (lambda scores: through_a_view(scores.topk(K)[1]), None),
    "truth values": (lambda scores: scores.topk(K)[1].bool().long(), None),
    "a stack": (lambda ids: torch.stack([ids[:, 0], ids[:, 0]], 1), None),
    "the scores themselves": (lambda ids: ids.topk(K)[0], None),
    "running maxima": (lambda scores: scores.cummax(1)[1], None),
    "over the tokens": (lambda scores: scores.topk(K, 0)[1], None),
    "over everything": (lambda scores: scores.argmax(), None),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_ids_of_one_choice(name):
    program, expected = CHOSEN[name]
    names = inspect.signature(program).parameters
    engine, node = engine_of(program, **{n: {**INPUTS, "y": tokens(T, E, H)}[n] for n in names})
    assert chosen_from(engine, node, whole_rows=True) == expected


# --- labels of dimensions -------------------------------------------------------------------------------


LABELS = {
    "a mask with a leading dimension, weighted": (lambda ids, w: (ids[None] == 1) * w, {}, "Gate"),
    "a column beside a row": (lambda ids, scores: (ids == 1).any(1, keepdim=True) * scores[:, 1], {}, None),
    "features split in two": (lambda x, parameter: F.linear(x, parameter).view(T, 2, I // 2), {}, "Val"),
    "features split in three": (lambda x, parameter: F.linear(x, parameter).view(T, 2, 3, 4), {}, None),
    "no tokens, features dropped": (lambda x, parameter: F.linear(x, parameter).view(0), {"x": tokens(0, H)}, None),
    "no tokens, fewer features": (lambda x, parameter: F.linear(x, parameter).view(0, 5), {"x": tokens(0, H)}, None),
    "no tokens, features split in two other sizes": (
        lambda x, parameter: F.linear(x, parameter).view(0, 5, 3), {"x": tokens(0, H)}, None),
    "features split before the only row": (
        lambda x, ids: x[ids.flatten().argsort() // ids.shape[1]].t().view(2, H // 2),
        {"x": tokens(1, H), "ids": chosen(1, 1)}, None),
    "pairs beside copies of a range": (
        lambda flat: flat == torch.arange(T).repeat_interleave(K), {}, None),
    "tokens and slots beside a range": (lambda ids: ids.view(-1) == torch.arange(T * K), {}, None),
    "tokens of other rows": (
        lambda x, parameter, ids: F.linear(x, parameter).view(6, I) * (ids == 1).any(-1).view(6, 1),
        {"x": tokens(3, 2, H), "ids": chosen(2, 3, K)}, None),
    "tokens in two dimensions beside as many in one": (
        lambda x, parameter, ids: F.linear(x, parameter) * (ids == 1).any(-1).view(3, 2, 1),
        {"x": tokens(3, 2, H), "ids": chosen(6, K)}, None),
    "experts beside as many slots": (
        lambda x, stack_parameter, ids:
            torch.einsum("bsh,eih->bsei", x, stack_parameter).view(6 * E, I) * (ids == 1).view(6 * E, 1),
        {"x": tokens(2, 3, H), "ids": chosen(6, E)}, None),
    "pairs of other tokens and slots": (
        lambda x, stack_parameter, ids, flat:
            torch.einsum("th,tkih->tki", x, stack_parameter[ids]).view(12, I) * (flat == 1).view(12, 1),
        {"x": tokens(6, H), "ids": chosen(6, 2), "flat": chosen(2, 2, 3)}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels(name):
    program, others, expected = LABELS[name]
    assert said(program, **others) == expected


def test_the_two_results_of_a_topk_are_apart():
    """Weights that are normalised in place leave the ids as they were."""

    def program(scores):
        w, ids = scores.topk(K)
        return ids == 1, w.div_(2), ids == 2

    engine, (first, _, second) = engine_of(program, scores=tokens(T, E))
    assert engine.fact(first).ids == engine.fact(second).ids


def test_atoms():
    assert Atom("t0", 7) == Atom("t0", 7) != Atom("t1", 7)
    assert Atom("t0", 7) != Atom("t0", 8) and Atom("t0", 7) != "t0"


def dim(**sizes):
    return tuple(Atom(name if name != "copy" else "*", size) for name, size in sizes.items())


PAIRS = dim(t0=7, k=2)
UNIFIED = {
    "copies and pairs": (dim(copy=14), PAIRS, PAIRS),
    "copies and more pairs": (dim(copy=13), PAIRS, None),
    "no copies of tokens and none": (dim(copy=0, t0=7), dim(t0=0), None),
    "tokens in one dimension and in two": (dim(t0=6), dim(t0=2, t1=3), dim(t0=6)),
}


@pytest.mark.parametrize("name", UNIFIED)
def test_labels_that_meet(name):
    one, other, expected = UNIFIED[name]
    assert unify_dim(one, other) == expected == unify_dim(other, one)
