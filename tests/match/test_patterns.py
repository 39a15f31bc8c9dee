"""Rules that only one form needs, and which form a sum belongs to: no other may take it, not even to refuse it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from moe_compile.patterns import all_experts, gathered_weights, grouped_mm, pair_assign, stack_gather
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, engine_of, said, tokens

from moe_compile.loops import marks
from moe_compile.spec import NoMatch

S = 3  # tokens in a second dimension


def order_of(ids):
    return ids.flatten().argsort(stable=True)


def ends_of(ids, experts=E):
    return ids.flatten().bincount(minlength=experts).cumsum(0).to(torch.int32)


def onehot(ids):
    return F.one_hot(ids, E)


def half(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


CUBE = {"ids": chosen(2, S, K)}
TOP1 = {"ids": chosen(T, 1)}
SORTED = {
    "order of ids in three dimensions": (lambda ids: order_of(ids), None, CUBE),
    "order of ids in two dimensions": (lambda ids: order_of(ids), "Index"),
    "argsort of the order": (lambda ids: order_of(ids).argsort(), "Inverse"),
    "argsort of each number of the order": (lambda ids: order_of(ids)[:, None].argsort(), None),
    "sorted ids": (lambda ids: ids.flatten()[order_of(ids)], "SortedIds"),
    "sorted rows of ids": (lambda ids: ids[order_of(ids)], None, TOP1),
    "tokens of one expert in order": (lambda ids: torch.where(ids == 1)[0].argsort(), None),
    "ids by the tokens of pairs": (lambda ids: ids.flatten()[order_of(ids) // K], None),
    "tokens by the order": (lambda ids: torch.arange(T).repeat_interleave(K)[order_of(ids)], "Index"),
    "tokens by the tokens of pairs": (lambda ids: torch.arange(T).repeat_interleave(K)[order_of(ids) // K], None),
    "numbers by the order and another index": (
        lambda ids, flat: torch.arange(T)[:, None].expand(T, K)[order_of(ids), flat], None),
    "tokens as a column by the order": (
        lambda ids: torch.arange(T).repeat_interleave(K)[:, None][order_of(ids)], None),
    "every other count": (lambda ids: ids.flatten().bincount(minlength=E)[::2], None),
    "all counts but the last": (lambda ids: ids.flatten().bincount(minlength=E)[:-1], None),
    "the first counts": (lambda ids: ids.flatten().bincount(minlength=E)[:E], "Counts"),
    "one-hot sums": (lambda ids: onehot(ids).sum((0, 1)), "Counts"),
    "one-hot sums of one slot": (lambda ids: onehot(ids)[:, 0].sum(0), None),
    "one-hot sums of copies": (lambda ids: onehot(ids)[:, None].expand(T, S, K, E).sum((0, 1, 2)), None),
    "one-hot sums of picked rows": (lambda ids: onehot(ids)[order_of(ids) // K].sum((0, 1)), None),
    "one-hot sums over no named dimension": (lambda ids: onehot(ids).sum(dim=None), None),
}  # fmt: skip


@pytest.mark.parametrize("name", SORTED)
def test_sorted(name):
    program, expected, *others = SORTED[name]
    assert said(program, **(others[0] if others else {})) == expected


def test_a_flat_copy_of_ids_that_are_written_later():
    """``flatten`` of transposed ids copies them: what it holds is not what the ids hold after a write."""

    def program(ids):
        turned = ids.t().contiguous().t()
        flat = turned.flatten()
        turned.t().mul_(2)
        return flat.bincount(minlength=E), turned == 1, turned.flatten().bincount(minlength=E)

    engine, nodes = engine_of(program, ids=chosen())
    counts, mask, new = (engine.fact(node) for node in nodes)
    assert counts.ids != mask.ids == new.ids


BFLOAT16 = {
    "x": half(T, H), "square_parameter": half(H, H), "flat_parameter": half(H, I), "stack_parameter": half(E, H, I),
    "pairs_parameter": half(E // 2, 2, H),
}  # fmt: skip
GROUPED = {
    "rows in order": (lambda x, ids, s: torch._grouped_mm(x[order_of(ids) // K], s, ends_of(ids)), "Val"),
    "rows in another order": (
        lambda x, ids, s: torch._grouped_mm(x[order_of(ids) // K], s, ends_of(ids.flip(0))), "MC207"),
    "rows that were not routed": (
        lambda x, ids, s, square_parameter: torch._grouped_mm(F.linear(x, square_parameter), s, ends_of(ids)), "MC207"),
    "rows of nothing": (lambda x, ids, s: torch._grouped_mm(x, s, ends_of(ids)), None),
    "rows of one expert": (
        lambda x, ids, s: torch._grouped_mm(x[torch.where(ids == 1)[0]], s, ends_of(ids)), None),
    "counts instead of ends": (
        lambda x, ids, s: torch._grouped_mm(x[order_of(ids) // K], s,
                                            ids.flatten().bincount(minlength=E).to(torch.int32)), "MC207"),
    "ends of fewer experts": (
        lambda x, ids, s: torch._grouped_mm(x[order_of(ids) // K], s, ends_of(ids, E - 1)), "MC208"),
    "weights that are zeros": (
        lambda x, ids: torch._grouped_mm(x[order_of(ids) // K], torch.zeros(E, H, I, dtype=torch.bfloat16),
                                         ends_of(ids)), None),
    "weights of one expert for its share of the features": (
        lambda x, ids, flat_parameter: torch._grouped_mm(x[order_of(ids) // K], flat_parameter, ends_of(ids)), None),
    "weights whose experts are two dimensions": (
        lambda x, ids, pairs_parameter: torch._grouped_mm(x[order_of(ids) // K], pairs_parameter.view(E, 1, H).mT,
                                                          ends_of(ids)), None),
    "the weights of one expert for all rows": (
        lambda x, ids, s: torch._grouped_mm(x[order_of(ids) // K], s[1:2], ends_of(ids, 1)[:1]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_mm(name):
    program, expected = GROUPED[name]
    names = program.__code__.co_varnames[: program.__code__.co_argcount]
    given = {**BFLOAT16, "ids": chosen(), "s": BFLOAT16["stack_parameter"]}
    inputs = {"stack_parameter" if n == "s" else n: given[n] for n in names}
    engine, node = engine_of(program, **inputs)
    codes = [miss.error.code for miss in engine.misses if miss.node is node]
    fact = engine.fact(node)
    assert (type(fact).__name__ if fact is not None else codes[0] if codes else None) == expected


def test_grouped_mm_with_a_bias():
    """torch has the argument but refuses to take one yet, so the bias is put into a traced graph."""
    program = GROUPED["rows in order"][0]
    engine, node = engine_of(program, x=half(T, H), ids=chosen(), stack_parameter=half(E, H, I))
    assert len(node.args) == 3
    node.args = (*node.args, node.args[1])
    with pytest.raises(NoMatch, match="MC301"):
        grouped_mm.RULES[torch.ops.aten._grouped_mm.default](engine, node)


# ------------------------------------------------------------------------------------------- forms


def mlp(rows, up, down):
    return F.linear(F.relu(F.linear(rows, up)), down)


def batched(s):
    """All experts in one product, weighted by the combine matrix."""
    combine = torch.zeros(T, E).scatter(1, s.ids, s.w)
    return (torch.matmul(torch.matmul(s.x[None], s.up.mT).relu(), s.down.mT) * combine.t()[:, :, None]).sum(0)


def gathered(s):
    hidden = torch.einsum("th,tkih->tki", s.x, s.up[s.ids]).relu()
    return (torch.einsum("tki,tkhi->tkh", hidden, s.down[s.ids]) * s.w[..., None]).sum(1)


def stacked(s):
    outputs = torch.stack([mlp(s.x, up, down) for up, down in s.experts], 1)
    return (outputs[torch.arange(T)[:, None], s.ids] * s.w[..., None]).sum(1)


def added(s, order, y):
    return torch.zeros_like(s.x).index_add(0, order // K, y * s.w.flatten()[order, None])


def in_order(s):
    """Sorted pairs, each with the weights of its expert."""
    order = order_of(s.ids)
    of = s.ids.flatten()[order]
    hidden = torch.einsum("rh,rih->ri", s.x[order // K], s.up[of]).relu()
    return added(s, order, torch.einsum("ri,rhi->rh", hidden, s.down[of]))


def in_groups(s):
    """Sorted pairs cut into the group of each expert, and joined again."""
    order, counts = order_of(s.ids), s.ids.flatten().bincount(minlength=E)
    rows = s.x[order // K]
    groups = [mlp(marks.segment(rows, counts, e, False), *expert) for e, expert in enumerate(s.experts)]
    return added(s, order, marks.join(groups, rows))


def assigned(s):
    """A buffer of all pairs, filled expert by expert."""
    rows, out = s.x.repeat_interleave(K, 0), s.x.new_empty(T * K, H)
    for e, expert in enumerate(s.experts):
        mask = s.ids.view(-1) == e
        out[mask] = mlp(rows[mask], *expert)
    return (out.view(T, K, H) * s.w[..., None]).sum(1)


def assigned_beside(s):
    assigned(s)
    return in_order(s)


def twice(program):
    return lambda s: program(s) + program(s)


FORMS = {
    "all experts": (batched, all_experts, None),
    "all experts, twice": (twice(batched), all_experts, "MC200"),
    "weights by ids, among all experts": (gathered, all_experts, "MC200"),
    "weights by ids": (gathered, gathered_weights, None),
    "weights by ids, twice": (twice(gathered), gathered_weights, "MC200"),
    "weights by sorted ids": (in_order, gathered_weights, "MC200"),
    "outputs by ids": (stacked, stack_gather, None),
    "outputs by ids, twice": (twice(stacked), stack_gather, "MC200"),
    "groups of sorted ids": (in_groups, stack_gather, "MC200"),
    "sorted pairs": (in_order, grouped_mm, None),
    "sorted pairs, twice": (twice(in_order), grouped_mm, "MC200"),
    "a buffer of pairs": (assigned, pair_assign, None),
    "sorted pairs beside a buffer of pairs": (assigned_beside, pair_assign, "MC200"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form(name):
    program, form, code = FORMS[name]

    def chooses(x, scores, up, down, *matrices):
        w, ids = scores.topk(K)
        experts = list(zip(matrices[:E], matrices[E:], strict=True))
        return program(SimpleNamespace(x=x, w=w, ids=ids, up=up, down=down, experts=experts))

    inputs = {"x": tokens(), "scores": tokens(T, E), "up_parameter": tokens(E, I, H), "down_parameter": tokens(E, H, I)}
    inputs |= {f"up_parameter_{e}": tokens(I, H) for e in range(E)}
    inputs |= {f"down_parameter_{e}": tokens(H, I) for e in range(E)}
    engine, node = engine_of(chooses, **inputs)
    total = engine.fact(node)
    try:
        found = form.match(engine, node, total)
    except NoMatch as error:
        assert error.code == code
    else:
        assert code is None and found.moe.top_k == K
