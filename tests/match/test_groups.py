"""Rows in expert order cut into groups, joined or stored again, and lists of the experts that were hit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, engine_of, said, tokens

from moe_compile.loops import marks  # noqa: F401  (defines the ops)
from moe_compile.match.facts import Gate

segment, join, store, listed = (getattr(torch.ops.moe_compile, name) for name in ("segment", "join", "store", "listed"))
ONE = {"ids": chosen(1, K), "x": tokens(1, H), "w": tokens(1, K)}  # a single token


def onehot(ids):
    return F.one_hot(ids, E)


def counts(ids):
    return ids.flatten().bincount(minlength=E)[:E]


def ends(ids):
    return counts(ids).cumsum(0)


def order_of(ids):
    return ids.flatten().argsort(stable=True)


def by_expert(x, ids):
    return x[order_of(ids) // K]


def mlp(rows, parameter, down_parameter):
    return F.linear(F.silu(F.linear(rows, parameter)), down_parameter)


def group(rows, ids, e, sizes=counts, running=False):
    return segment(rows, sizes(ids), e, running)


def zeros(rows=T * K, width=H):
    return torch.zeros(rows, width)


# --- what counts as the numbers of rows -------------------------------------------------------------------

COUNTS = {
    "one-hot rows": (lambda ids: onehot(ids) > 0, None),
    "one-hot rows of two tokens": (
        lambda x, ids: group(by_expert(x, ids), ids, 1, lambda i: onehot(i).sum(1)), "MC207",
        {"ids": chosen(2, K), "x": tokens(2, H)}),
    "one-hot sums of one token": (lambda ids: onehot(ids).sum((0, 1)) > 0, "HitMask"),
    "weights of one token": (lambda ids, w: (onehot(ids) * w[..., None]).sum((0, 1)) > 0, None),
    "truth values of one token that may name an expert twice": (
        lambda x, ids: group(by_expert(x, ids), ids, 1, lambda i: torch.zeros(1, E).scatter(1, i, 1.0)[0]), "MC207"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_the_gates_of_one_token_as_counts(name):
    program, expected, *others = COUNTS[name]
    assert said(program, **(others[0] if others else ONE)) == expected


def test_the_combine_matrix_of_one_token_and_its_top_k():
    """A top-k names no expert twice: of one token a truth value is the number of rows."""

    def program(x, scores):
        ids = scores.topk(K)[1]
        return segment(x[order_of(ids) // K], torch.zeros(1, E).scatter(1, ids, 1.0)[0], 1, False)

    assert said(program, x=tokens(1, H), scores=tokens(1, E)) == "Val"


def test_the_gates_of_one_row_are_no_counts():
    """The experts of the only token of expert 1 are not those of all tokens."""

    def program(scores):
        ids = scores.topk(K)[1]
        rows = onehot(ids).sum(1)[torch.where(ids == 1)[0]]
        return rows.view(1, E), rows.squeeze(0), rows.squeeze(0) > 0

    engine, nodes = engine_of(program, scores=tokens(T, E))
    gate = engine.fact(nodes[1])
    assert isinstance(gate, Gate) and gate.rows is not None and len(gate.dims) == 1
    assert engine.fact(nodes[2]) is None


# --- one group --------------------------------------------------------------------------------------------

SEGMENTS = {
    "rows": (lambda x, ids: group(by_expert(x, ids), ids, 1), "Val"),
    "the last rows": (lambda x, ids: group(by_expert(x, ids), ids, E - 1), "Val"),
    "rows past the last": (lambda x, ids: group(by_expert(x, ids), ids, E), "MC208"),
    "rows from the end": (lambda x, ids: group(by_expert(x, ids), ids, -1), "MC208"),
    "rows by ends": (lambda x, ids: group(by_expert(x, ids), ids, 1, ends, True), "Val"),
    "rows by ends as if they were numbers": (lambda x, ids: group(by_expert(x, ids), ids, 1, ends), "MC207"),
    "rows by numbers as if they were ends": (lambda x, ids: group(by_expert(x, ids), ids, 1, counts, True), "MC207"),
    "rows by the numbers of other ids": (
        lambda x, ids: group(by_expert(x, ids), ids, 1, lambda i: counts(i.flip(0))), "MC207"),
    "rows by other numbers": (lambda x, ids, flat: segment(by_expert(x, ids), flat[:E], 1, False), "MC207"),
    "rows by an unknown number of numbers": (
        lambda x, ids: segment(by_expert(x, ids), torch.searchsorted(
            ids.flatten().sort()[0], torch.arange(torch.where(ids == 1)[0].shape[0]), right=True), 0, True), "MC208"),
    "tokens": (lambda ids: group(order_of(ids) // K, ids, 1), "Index"),
    "weights": (lambda w, ids: group(w.flatten()[order_of(ids)], ids, 1), "Gate"),
    "sorted ids": (lambda ids: group(ids.flatten().sort()[0], ids, 1), None),
    "all tokens": (lambda x, ids, parameter: group(F.linear(x, parameter), ids, 1), None),
    "the rows of one expert": (lambda x, ids: group(x[torch.where(ids == 1)[0]], ids, 1), None),
    "rows of every expert": (
        lambda x, ids, stack_parameter: group(torch.einsum("rh,eih->rei", by_expert(x, ids), stack_parameter), ids, 1),
        None),
    "features": (lambda x, ids: group(by_expert(x, ids).t(), ids, 1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", SEGMENTS)
def test_one_group(name):
    program, expected = SEGMENTS[name]
    assert said(program) == expected


def test_a_group_and_its_weights_are_those_of_one_expert():
    def program(x, w, ids, parameter, down_parameter):
        order = order_of(ids)
        rows, weight = x[order // K], w.flatten()[order, None]
        found = (mlp(rows, parameter, down_parameter) * weight, F.linear(rows * weight, parameter), weight, rows)
        return [group(f, ids, 2) for f in found]

    inputs = {"x": tokens(), "w": tokens(T, K), "ids": chosen(), "parameter": tokens(I, H)}
    engine, nodes = engine_of(program, **inputs, down_parameter=tokens(H, I))
    output, inner, weight, rows = (engine.fact(n) for n in nodes)
    assert rows.gate is None and rows.gate_in is None
    assert (rows.rows.kind, rows.rows.expert, rows.rows.grouped) == ("hit", 2, True)
    for gate, of in ((output.gate, output.rows), (inner.gate_in, inner.rows), (weight, weight.rows)):
        assert (gate.expert, gate.rows) == (2, rows.rows) and of == rows.rows


# --- all groups, one after the other ----------------------------------------------------------------------


def joined(like=None, expert=None, take=lambda e: e, after=None, source=None):
    """``cat`` of what every expert makes of its group of rows; steps to override."""

    def program(x, y, w, ids, parameter, down_parameter):
        order = order_of(ids)
        rows = [r[order // K] for r in (x, y[:, 0])]
        run = expert or (lambda e, r, *weights: mlp(r, *weights))
        parts = [group((source or (lambda e, a, b, w: a))(e, *rows, w.flatten()[order, None]), ids, take(e))
                 for e in range(E)]  # fmt: skip
        parts = [run(e, p, parameter[e], down_parameter[e]) for e, p in enumerate(parts)]
        if after is not None:
            parts = [after(p, group(w.flatten()[order, None], ids, e)) for e, p in enumerate(parts)]
        return join(parts, rows[0] if like is None else like(rows[0], parts, x, ids))

    return program


def transposed_in_one(e, rows, up, down):
    return F.linear(F.silu(F.linear(rows, up) if e != 1 else rows @ up), down)


JOINS = {
    "all groups": (joined(), "Val"),
    "groups out of order": (joined(take=lambda e: (0, 2, 1, 3)[e]), "MC208"),
    "one group for all": (joined(take=lambda e: 0), "MC208"),
    "as many as something else": (joined(like=lambda rows, parts, x, ids: x), None),
    "as many as the first group": (joined(like=lambda rows, parts, x, ids: parts[0]), None),
    "as many as the rows of one expert": (joined(like=lambda r, parts, x, ids: x[torch.where(ids == 1)[0]]), None),
    "groups of two inputs": (joined(source=lambda e, a, b, w: b if e == 2 else a), "MC201"),
    "another activation in one": (
        joined(expert=lambda e, r, up, down: F.linear((F.gelu if e == 1 else F.silu)(F.linear(r, up)), down)), "MC201"),
    "transposed weights in one": (joined(expert=transposed_in_one), "MC201"),
    "groups as they are": (joined(expert=lambda e, rows, up, down: rows), None),
    "all tokens": (joined(expert=lambda e, rows, up, down: mlp(rows.new_zeros(3, H), up, down)), None),
    "groups twice over": (joined(after=lambda part, weight: part.repeat_interleave(2, 0)), None),
    "groups with a dimension more": (joined(after=lambda part, weight: part[:, None]), None),
    "weighted groups": (joined(after=lambda part, weight: part * weight), None),
    "groups of weighted rows": (joined(source=lambda e, a, b, w: a * w), None),
}  # fmt: skip
STACKS = {"parameter": tokens(E, H, H), "down_parameter": tokens(E, H, H)}


@pytest.mark.parametrize("name", JOINS)
def test_all_groups(name):
    program, expected = JOINS[name]
    assert said(program, **STACKS) == expected


# --- groups stored into a buffer --------------------------------------------------------------------------


def stored(buffer=lambda x: zeros(), sizes=counts, running=False, of=lambda e: e, at=lambda e: e, last=0, made=None):
    """``y[start:end] = expert(rows[start:end])`` for the experts up to ``last``."""

    def program(x, w, ids, parameter, down_parameter):
        order = order_of(ids)
        rows, y = x[order // K], buffer(x)
        for e in range(last + 1):
            part = mlp(group(rows, ids, of(e)), parameter[e], down_parameter[e])
            part = part if made is None else made(part, rows, order, ids, x, parameter[e])
            y = store(y, part, sizes(ids), at(e), running)
        return y

    return program


STORES = {
    "the first group": (stored(), "Stored"),
    "all but the last": (stored(last=E - 2), "Stored"),
    "all groups": (stored(last=E - 1), "Val"),
    "by ends": (stored(sizes=ends, running=True), "Stored"),
    "by ends as if they were numbers": (stored(sizes=ends), "MC207"),
    "by numbers as if they were ends": (stored(running=True), "MC207"),
    "by the numbers of other ids": (stored(sizes=lambda ids: counts(ids.flip(0))), "MC207"),
    "by other numbers": (stored(sizes=lambda ids: ids[:E, 0]), "MC207"),
    "two groups that change places": (
        stored(last=E - 1, of=lambda e: (1, 0, 2, 3)[e], at=lambda e: (1, 0, 2, 3)[e]), None),
    "the first group in the second place": (stored(at=lambda e: 1), "MC207"),
    "the second group in the first place": (stored(last=E - 1, of=lambda e: (1, 0, 2, 3)[e]), "MC208"),
    "into an input": (stored(buffer=lambda x: x), None),
    "into a value": (stored(buffer=lambda x: x * 2), None),
    "into wider rows": (stored(buffer=lambda x: zeros(width=H + 1)), "MC302"),
    "into more rows than pairs": (stored(buffer=lambda x: zeros(T * K + 1)), "MC207"),
    "into fewer rows than pairs": (stored(buffer=lambda x: zeros(T)), "MC207"),
    "into rows of another precision": (stored(buffer=lambda x: zeros().double()), "MC302"),
    "one column over all": (stored(made=lambda part, *_: part[:, :1]), "MC302"),
    "numbers of rows": (stored(buffer=lambda x: zeros().long(), made=lambda p, r, order, ids, *_: group(
        order // K, ids, 0)[:, None].expand(-1, H)), None),
    "plain numbers": (stored(made=lambda part, *_: part.cumsum(0)), None),
    "rows as they are": (stored(made=lambda p, rows, o, ids, *_: group(rows, ids, 0)), None),
    "all tokens": (stored(made=lambda p, r, o, ids, x, parameter: F.linear(x, parameter)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", STORES)
def test_groups_in_a_buffer(name):
    program, expected = STORES[name]
    assert said(program, **STACKS) == expected


# --- numbers on the host, and experts that were hit -------------------------------------------------------

LISTS = {
    "tokens": (lambda ids: listed(torch.where(ids == 1)[0]), "Index"),
    "tokens as a column": (lambda ids: listed(torch.where(ids == 1)[0][:, None]), None),
    "a mask of one slot": (lambda ids: listed(ids[:, 0] == 1), "Gate"),
    "a mask": (lambda ids: listed(ids == 1), None),
    "counts": (lambda ids: listed(counts(ids)), "Counts"),
    "sorted ids": (lambda ids: listed(ids.flatten().sort()[0]), None),
    "places in sorted order": (lambda ids: listed(order_of(ids).argsort()), None),
    "rows": (lambda x, ids: listed(by_expert(x, ids)), None),
}  # fmt: skip
HITS = {
    "any pair": (lambda ids: onehot(ids).bool().any(1).any(0), "HitMask"),
    "any pair at once": (lambda ids: onehot(ids).bool().any((0, 1)), "HitMask"),
    "any weight": (lambda ids, w: (onehot(ids) * w[..., None]).any((0, 1)), None),
    "any pair of picked tokens": (lambda ids: onehot(ids)[torch.where(ids == 2)[0]].any((0, 1)), None),
    "the mask as numbers": (lambda ids: (counts(ids) > 0).to(torch.int64), "HitMask"),
    "a row of the mask as numbers": (lambda ids: (counts(ids)[None] > 0).to(torch.int64), None),
    "places in a row of the mask": (lambda ids: (counts(ids)[None] > 0).nonzero(), None),
    "places in a column of the mask": (lambda ids: (counts(ids)[:, None] > 0).nonzero(), None),
    "unique numbers of a column of ids": (lambda ids: torch.ops.aten._unique2(ids[:, 0])[0], "Hits"),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_numbers_on_the_host(name):
    program, expected = LISTS[name]
    assert said(program) == expected


@pytest.mark.parametrize("name", HITS)
def test_experts_that_were_hit(name):
    program, expected = HITS[name]
    assert said(program) == expected


# --- scatter_reduce ---------------------------------------------------------------------------------------


def reduced(*args, **kwargs):
    def program(x, ids, parameter, down_parameter):
        token = torch.where(ids == 1)[0]
        y = mlp(x[token], parameter, down_parameter)
        return torch.zeros(T, H).scatter_reduce(0, token[:, None].expand(-1, H), y, *args, **kwargs)

    return program


REDUCED = {
    "added": (reduced("sum"), "Sum"),
    "the largest": (reduced("amax"), None),
    "added, but what was there is dropped": (reduced("sum", include_self=False), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCED)
def test_scatter_reduce(name):
    program, expected = REDUCED[name]
    assert said(program) == expected
