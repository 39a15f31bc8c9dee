"""Expert outputs written into a buffer: where each write is known to add or to set, and where it is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, engine_of, said, tokens

aten = torch.ops.aten
TOP1 = {"ids": chosen(T, 1)}
TWO = {"ids": chosen(K, K), "w": tokens(K, K)}  # as many tokens as slots
ONE = {"x": tokens(1, H), "ids": chosen(1, K), "flat": chosen(1)}  # a single token
# As many features as pairs, so that outputs can be laid across.
PAIRS = {"x": tokens(T, T * K), "parameter": tokens(I, T * K), "down_parameter": tokens(T * K, I)}


def pick(ids, e=1):
    return torch.where(ids == e)


def pairs(ids, e=1):
    return torch.where(ids.flatten() == e)[0]


def order_of(ids):
    return ids.flatten().argsort(stable=True)


def mlp(rows, parameter, down_parameter):
    return F.linear(F.silu(F.linear(rows, parameter)), down_parameter)


def expert(put, rows=lambda x, ids: x[pick(ids)[0]]):
    """``put(output of expert 1, ids, x)``."""

    def program(x, ids, parameter, down_parameter):
        return put(mlp(rows(x, ids), parameter, down_parameter), ids, x)

    return program


def by_expert(put):
    """``put(outputs in expert order, their pairs, ids, x)``."""

    def program(x, ids, parameter, down_parameter):
        order = order_of(ids)
        return put(mlp(x[order // K], parameter, down_parameter), order, ids, x)

    return program


def two_experts(put):
    """``put(out, outputs of both, tokens of both)`` of experts 1 and 2, on ``zeros``."""

    def program(x, ids, parameter, down_parameter):
        token = [pick(ids, e)[0] for e in (1, 2)]
        out = torch.zeros_like(x)
        y = [mlp(x[t], parameter, down_parameter) for t in token]
        found = put(out, y, token)
        return out if found is None else found

    return program


def zeros(*shape):
    return torch.zeros(*(shape or (T, H)))


def wide(token, width=H):
    return token[:, None].expand(-1, width)


def filled(put, *shape):
    """``put(buffer)`` in place, and the buffer."""
    buffer = torch.empty(shape)
    put(buffer)
    return buffer


def check(case):
    program, expected, *others = case
    assert said(program, **(others[0] if others else {})) == expected


# --- added to the tokens ----------------------------------------------------------------------------------

ADDED = {
    "index_add": (expert(lambda y, ids, x: zeros().index_add(0, pick(ids)[0], y)), "Sum"),
    "index_add of sorted rows": (by_expert(lambda y, order, ids, x: zeros().index_add(0, order // K, y)), "Sum"),
    "index_add beside the tokens": (
        expert(lambda y, ids, x: zeros(T + 1, H).index_add(0, pick(ids)[0] + 1, y)), "MC207"),
    "index_add at the slots": (expert(lambda y, ids, x: zeros().index_add(0, pick(ids)[1], y)), "MC207"),
    "index_add at the tokens of another order": (
        by_expert(lambda y, order, ids, x: zeros().index_add(0, order_of(ids.flip(0)) // K, y)), "MC207"),
    "index_add along the last dimension": (
        expert(lambda y, ids, x: zeros(H, T).index_add(1, pick(ids)[0], y.t())), None),
    "index_add of rows along the last dimension": (
        by_expert(lambda y, order, ids, x: zeros(T * K, T).index_add(1, order // K, y)), None, PAIRS),
    "index_add into three dimensions": (
        expert(lambda y, ids, x: zeros(T, H, 1).index_add(0, pick(ids)[0], y[..., None])), None),
    "index_add, scaled": (expert(lambda y, ids, x: zeros().index_add(0, pick(ids)[0], y, alpha=2)), "MC304"),
    "index_add into ones": (expert(lambda y, ids, x: (zeros() + 1).index_add(0, pick(ids)[0], y)), "MC210"),
    "index_add into a filled tensor": (
        expert(lambda y, ids, x: torch.full((T, H), 1.0).index_add(0, pick(ids)[0], y)), "MC210"),
    "scatter_add": (expert(lambda y, ids, x: zeros().scatter_add(0, wide(pick(ids)[0]), y)), "Sum"),
    "scatter_add of the first column": (
        expert(lambda y, ids, x: zeros().scatter_add(0, pick(ids)[0][:, None], y)), None),
    "scatter_add of each feature to its own token": (
        by_expert(lambda y, order, ids, x: zeros(T, T * K).scatter_add(0, (order // K)[None].expand(T * K, -1), y)),
        None, PAIRS),
    "scatter_add at plain numbers": (
        lambda x, flat, parameter, down_parameter: zeros().scatter_add(
            0, wide(flat[:T]), mlp(x, parameter, down_parameter)), None),
    "index_put": (
        expert(lambda y, ids, x: zeros().index_put((pick(ids)[0],), y, accumulate=True)), "Sum"),
    "index_put at the slots": (
        expert(lambda y, ids, x: zeros().index_put((pick(ids)[1],), y, accumulate=True)), None),
    "index_put into three dimensions": (
        expert(lambda y, ids, x: zeros(T, H, 1).index_put((pick(ids)[0],), y[..., None], accumulate=True)), None),
    "index_put into copies": (
        by_expert(lambda y, order, ids, x: zeros(T, T * K, H).index_put((order // K,), y, accumulate=True)), None),
    "index_put, each row thrice": (
        expert(lambda y, ids, x: zeros().index_put((pick(ids)[0].expand(3, -1),), y, accumulate=True)), None),
    "index_put at a plain number": (
        lambda x, ids, flat, parameter, down_parameter: zeros(5, H).index_put(
            (flat,), mlp(x, parameter, down_parameter), accumulate=True), None, ONE),
    "index_put at a mask as numbers": (
        expert(lambda y, ids, x: zeros().index_put(((ids == 1).any(1).long(),), y, accumulate=True),
               lambda x, ids: x[(ids == 1).any(1)]), None),
    "index_put at other numbers": (
        expert(lambda y, ids, x: zeros().index_put((ids[:, 0],), y, accumulate=True), lambda x, ids: x), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_added_to_the_tokens(name):
    check(ADDED[name])


def test_the_reason_names_the_number_that_the_sum_starts_from():
    program = expert(lambda y, ids, x: torch.full((T, H), 1.0).index_add(0, pick(ids)[0], y))
    inputs = {"x": tokens(), "ids": chosen(), "parameter": tokens(I, H), "down_parameter": tokens(H, I)}
    (miss,) = engine_of(program, **inputs)[0].misses
    assert "starts from 1.0" in miss.error.reason


# --- read, added to and written back ----------------------------------------------------------------------


def written_between(out, y, token):
    first, second = out[token[0]], out[token[1]]
    out[token[0]] = first + y[0]
    out[token[1]] = second + y[1]


def of_another_buffer(out, y, token):
    return torch.zeros_like(out).index_put((token[0],), out[token[0]] + y[0])


def across(x, ids, parameter, down_parameter):
    """Outputs laid across the rows of their tokens."""
    token, out = order_of(ids) // 1, torch.zeros(T * K, T * K)
    return out.index_put((token,), out[token] + mlp(x[token], parameter, down_parameter).t())


def one_after_the_other(out, y, token):
    out[token[0]] = out[token[0]] + y[0]
    out[token[1]] = out[token[1]] + y[1]


READ = {
    "one after the other": (two_experts(one_after_the_other), "Sum"),
    "both read before the first is written": (two_experts(written_between), "MC204"),
    "from another buffer": (two_experts(of_another_buffer), "MC204"),
    "at the tokens of another order": (
        by_expert(lambda y, order, ids, x: (out := zeros()).index_put(
            (order_of(ids.flip(0)) // K,), out[order // K] + y)), "MC204"),
    "features for rows": (across, None, {**PAIRS, "x": tokens(T * K, T * K), "ids": chosen(T * K, 1)}),
    "nothing added": (two_experts(lambda out, y, t: out.index_put((t[0],), out[t[0]])), None),
    "added to what is still there": (
        two_experts(lambda out, y, t: out.index_put((t[0],), out[t[0]] + y[0], accumulate=True)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_read_and_written_back(name):
    check(READ[name])


# --- assigned ---------------------------------------------------------------------------------------------


def overwritten(first, second, between=lambda out, x: out):
    """Rows of expert ``first`` of ``ids``, then those that ``second`` names, over what is there."""

    def program(x, ids, parameter, down_parameter):
        out = torch.zeros_like(x)
        for at, (i, e) in enumerate(((ids, first), second(ids))):
            token = torch.where(i == e)[0]
            out = out if at == 0 else between(out, x)
            out = out.index_put((token,), mlp(x[token], parameter, down_parameter))
        return out

    return program


ASSIGNED = {
    "rows of pairs": (
        expert(lambda y, ids, x: filled(lambda b: b.index_put_((pairs(ids),), y), T * K, H),
               lambda x, ids: x.repeat_interleave(K, 0)[pairs(ids)]), "Unfinished"),
    "rows of pairs, in a copy": (
        expert(lambda y, ids, x: torch.empty(T * K, H).index_put((pairs(ids),), y),
               lambda x, ids: x.repeat_interleave(K, 0)[pairs(ids)]), None),
    "rows of pairs, added": (
        expert(lambda y, ids, x: filled(lambda b: b.index_put_((pairs(ids),), y, accumulate=True), T * K, H),
               lambda x, ids: x.repeat_interleave(K, 0)[pairs(ids)]), None),
    "the numbers of the slots": (
        expert(lambda y, ids, x: filled(lambda b: b.index_put_((pick(ids)[1],), y), T * K, H)), None),
    "a mask of pairs": (
        expert(lambda y, ids, x: filled(lambda b: b.index_put_((ids == 1,), y), T, K, H)), "Unfinished"),
    "a mask of no one expert": (
        expert(lambda y, ids, x: filled(lambda b: b.index_put_((
            (ids[..., None] == torch.arange(1)).squeeze(-1),), y), T, K, H)), None),
    "the rows of the only slot": (
        expert(lambda y, ids, x: filled(lambda b: b.index_put_((pick(ids)[0],), y), T, H)), "Unfinished", TOP1),
    "the rows of the only slot, in a copy": (
        expert(lambda y, ids, x: torch.empty(T, H).index_put((pick(ids)[0],), y)), None, TOP1),
    "rows of an input": (expert(lambda y, ids, x: x.index_put((pick(ids)[0],), y)), "MC304", TOP1),
    "rows of two experts": (overwritten(1, lambda ids: (ids, 2)), "Sum", TOP1),
    "rows of one expert twice": (overwritten(1, lambda ids: (ids, 1)), "MC304", TOP1),
    "rows of other ids": (overwritten(1, lambda ids: (ids.flip(0), 2)), "MC304", TOP1),
    "rows of a sum with something else": (
        overwritten(1, lambda ids: (ids, 2), lambda out, x: out + x), "MC304", TOP1),
}  # fmt: skip


@pytest.mark.parametrize("name", ASSIGNED)
def test_assigned(name):
    check(ASSIGNED[name])


def by_pair(index, shape=(T, K, H), write=aten.index_put_, value=lambda y: y, **options):
    """``buffer[index(ids)] = y`` of expert 1."""

    def put(y, ids, x):
        return write(torch.empty(shape), index(ids), value(y), **options)

    return expert(put)


def of_two_orders(y, order, ids, x):
    token, slot = order // K, order_of(ids.flip(0)) % K
    return torch.empty(T, K, H).index_put_((token, slot), y)


FEATURES = {"x": tokens(T, K), "parameter": tokens(I, K), "down_parameter": tokens(K, I)}  # as many as slots
BY_PAIR = {
    "tokens and slots": (by_pair(pick), "Unfinished"),
    "in a copy": (by_pair(pick, write=aten.index_put), None),
    "added": (by_pair(pick, accumulate=True), None),
    "slots for tokens": (by_pair(lambda ids: (pick(ids)[1],) * 2), None),
    "tokens for slots": (by_pair(lambda ids: (pick(ids)[0],) * 2), None),
    "other numbers for tokens": (by_pair(lambda ids: (pick(ids)[0] * 0, pick(ids)[1])), None),
    "other numbers for slots": (by_pair(lambda ids: (pick(ids)[0], pick(ids)[1] * 0)), None),
    "another value": (by_pair(pick, value=lambda y: torch.zeros(())), None),
    "the features between": (
        by_pair(lambda ids: (pick(ids)[0], None, pick(ids)[1]), shape=(T, K, K)), None, FEATURES),
    "slots of another order": (by_expert(of_two_orders), "MC207"),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_PAIR)
def test_assigned_by_token_and_slot(name):
    check(BY_PAIR[name])


# --- the combine matrix, and rows back in the order of the pairs ------------------------------------------


def combine(index, weight=lambda w: w, target=lambda scores: zeros(T, E)):
    return lambda ids, w, scores: target(scores).index_put(index(ids), weight(w))


def before(ids):
    return torch.arange(len(ids))[:, None], ids


COMBINE = {
    "weights": (combine(before), "Gate"),
    "into scores": (combine(before, target=lambda scores: scores), None),
    "at other rows": (combine(lambda ids: (ids[:, :1], ids)), None),
    "with a copy for each slot": (
        combine(before, target=lambda scores: zeros(K, E, K)), None, TWO),
    "every token's weights for every token": (
        combine(lambda ids: (torch.arange(T)[:, None, None], ids[None]), lambda w: w[None]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", COMBINE)
def test_the_combine_matrix(name):
    check(COMBINE[name])


def numbers(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


UNSORTED = {
    "rows": (by_expert(lambda y, order, ids, x: zeros(T * K, H).index_put((order,), y)), "Val"),
    "rows, and one more": (by_expert(lambda y, order, ids, x: zeros(T * K + 1, H).index_put((order,), y)), None),
    "rows into columns": (
        by_expert(lambda y, order, ids, x: aten.index_put(zeros(T * K, T * K), (None, order), y)), None, PAIRS),
    "rows at other numbers, too": (
        by_expert(lambda y, order, ids, x: zeros(T * K, E, E, H).index_put((order, *[ids.flatten()] * 2), y)), None),
    "rows in another order": (
        by_expert(lambda y, order, ids, x: zeros(T * K, H).index_put((order_of(ids.flip(0)),), y)), None),
    "rows of three dimensions": (
        by_expert(lambda y, order, ids, x: zeros(T * K, 1, H).index_put((order,), y[:, None])), None),
    "the inverse": (lambda ids: numbers(T * K).index_put((order_of(ids),), torch.arange(T * K)), "Inverse"),
    "one number for all": (lambda ids: numbers(T * K).index_put((order_of(ids),), torch.arange(1)), None),
    "copies of one number": (
        lambda ids: numbers(T * K).index_put((order_of(ids),), torch.arange(1).expand(T * K)), None),
    "the inverse in every row": (
        lambda ids: numbers(T * K, T * K).index_put((order_of(ids),), torch.arange(T * K)), None),
    "the inverse in one column each": (
        lambda ids: aten.index_put(numbers(T * K, T * K), (None, order_of(ids)), torch.arange(T * K)), None),
    "the inverse at other numbers, too": (
        lambda ids: numbers(T * K, E, E).index_put((order_of(ids), *[ids.flatten()] * 2), torch.arange(T * K)), None),
    "numbers of the picked pairs": (
        lambda ids: numbers(T * K).index_put((pairs(ids),), torch.arange(pairs(ids).shape[0])), None),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSORTED)
def test_back_in_the_order_of_the_pairs(name):
    check(UNSORTED[name])
