"""Stacks of single experts, and rows that are picked, picked again, or put back in their order."""

from __future__ import annotations

import pytest
import torch
from support import relative, rewritten
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, codes_of, engine_of, said, tokens

linear = F.linear


def gate(ids, w, e):
    return (w * (ids == e)).sum(-1, keepdim=True)


def tokens_of(ids, e=1):
    return torch.where(ids == e)[0]


def every(x, parameter):
    return torch.einsum("th,eih->tei", x, parameter)


def on_rows(x, ids, parameter, other_parameter):
    rows = x[tokens_of(ids)]
    return torch.stack([linear(rows, parameter), linear(rows, other_parameter)])


def weighted(x, ids, w, two_parameter, order):
    """Expert ``e`` of two under the weight of expert ``order[e]``."""
    return torch.stack([gate(ids, w, order[e]) * linear(x, two_parameter[e]) for e in range(2)])


def pair_weighted(x, ids, w, parameter, other_parameter):
    """Both experts under the weights of one, not summed over the slots yet."""
    ys = [linear(x, p)[:, None] for p in (parameter, other_parameter)]
    return torch.stack([y * ((ids == 1) * w)[:, :, None] for y in ys])


OTHERS = {"other_parameter": tokens(I, H), "two_parameter": tokens(2, I, H), "two_more_parameter": tokens(2, I, H)}
SQUARE = {"parameter": tokens(T, H), "other_parameter": tokens(T, H)}  # as many outputs as tokens
WIDE = {"parameter": tokens(H, H), "other_parameter": tokens(H, H)}

STACKS = {
    "two experts": (lambda x, parameter, other_parameter: torch.stack(
        [linear(x, parameter), linear(x, other_parameter)]), "Val"),
    "one expert": (lambda x, parameter: torch.stack([linear(x, parameter)]), None),
    "one expert, by cat": (lambda x, parameter: torch.cat([linear(x, parameter)[None]]), None),
    "two experts, by cat": (lambda x, parameter, other_parameter: torch.cat(
        [linear(x, parameter)[None], linear(x, other_parameter)[None]]), "Val"),
    "one mask": (lambda ids: torch.stack([ids == 0]), None),
    "masks": (lambda ids: torch.stack([ids == e for e in range(2)]), "Gate"),
    "weights": (lambda ids, w: torch.stack([(ids == e) * w for e in range(2)]), "Gate"),
    "weights of two routers": (lambda ids, w: torch.stack([(ids == e) * (w + e) for e in range(2)]), None),
    "masks of two ids": (lambda ids: torch.stack([ids == 0, ids.flip(0) == 1]), None),
    "weighted outputs": (lambda x, ids, w, two_parameter: weighted(x, ids, w, two_parameter, (0, 1)), "Val"),
    "weighted outputs, weights swapped": (
        lambda x, ids, w, two_parameter: weighted(x, ids, w, two_parameter, (1, 0)), "MC208"),
    "outputs under weights of pairs": (pair_weighted, "MC201"),
    "an output and a transposed one": (lambda x, parameter, other_parameter: torch.stack(
        [linear(x, parameter), linear(x, other_parameter).t()]), "MC201", SQUARE),
    "outputs on picked rows": (on_rows, "MC201"),
    "other outputs of the weights": (lambda x, parameter, other_parameter: torch.stack(
        [linear(x, parameter[:8]), linear(x, other_parameter[8:16])]), "MC201"),
    "rows in order": (lambda x, two_parameter: torch.stack([linear(x, two_parameter[e]) for e in (0, 1)]), "Val"),
    "rows out of order": (
        lambda x, two_parameter: torch.stack([linear(x, two_parameter[e]) for e in (1, 0)]), "MC208"),
    "rows of two stacks": (lambda x, two_parameter, two_more_parameter: torch.stack(
        [linear(x, two_parameter[0]), linear(x, two_more_parameter[1])]), "MC201"),
    "a weight of its own and a row": (lambda x, parameter, two_parameter: torch.stack(
        [linear(x, parameter), linear(x, two_parameter[1])]), "MC201"),
    "stacks of stacks": (lambda x, two_parameter, two_more_parameter: torch.stack(
        [every(x, two_parameter), every(x, two_more_parameter)]), "MC201"),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name):
    program, expected, *others = STACKS[name]
    assert said(program, **{**OTHERS, **(others[0] if others else {})}) == expected


def test_weights_that_stand_in_another_order():
    """Both maps read the same dimension of their tensor, which comes first in one and second in the other."""
    engine, _ = engine_of(
        lambda x, parameter, other_parameter: torch.stack([linear(x, parameter.t()), x @ other_parameter]),
        x=tokens(), **WIDE)  # fmt: skip
    (miss,) = engine.misses
    assert miss.error.code == "MC201" and "another form" in miss.error.reason


# --- masks and their coordinates -------------------------------------------------------------------------

THREE_D = {"ids": chosen(2, 5, K)}


def any_of_copies(ids):
    """``[T, E, E]``: whether a token names an expert, in as many copies as there are experts."""
    return (ids[:, :, None, None] == torch.arange(E)[:, None].expand(E, E)).any(1)


MASKS = {
    "where the only expert of a range is": (
        lambda ids: torch.where((ids[..., None] == torch.arange(1)).squeeze(-1))[0], None),
    "the first token dimension of two": (lambda ids: torch.where(ids == 1)[0], None, THREE_D),
    "tokens of two dimensions in one": (lambda ids: torch.where((ids == 1).flatten(0, 1))[0], "Index", THREE_D),
    "pairs, slots within tokens": (lambda ids: torch.where((ids == 1).flatten())[0], "Index"),
    "pairs, tokens within slots": (lambda ids: torch.where((ids == 1).t().flatten())[0], None),
    "one copy of the masks of all experts": (lambda ids: torch.zeros(T, E, 5)[any_of_copies(ids)[..., 2]], None),
    "the only column": (lambda ids: (ids.flatten() == 1).nonzero().view(-1), "Index"),
    "both columns in one": (lambda ids: (ids == 1).nonzero().flatten(), None),
    "the only column as a row": (lambda ids: (ids.flatten() == 1).nonzero().view(1, -1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    program, expected, *others = MASKS[name]
    assert said(program, **(others[0] if others else {})) == expected


def test_the_first_pairs_of_two_are_no_columns():
    """``unbind(0)`` of ``[[t0, s0], [t1, s1]]``, where every expert is known to have two pairs."""

    def program(x, scores, up, down):
        w, ids = scores.topk(2)
        out = torch.zeros_like(x)
        for e in range(2):
            pairs = (ids == e).nonzero()
            torch._check(pairs.shape[0] == 2)
            token, slot = pairs.unbind(0)
            y = linear(F.silu(linear(x[token], up[e])), down[e])
            out = out.index_add(0, token, y * w[token, slot, None])
        return out

    torch.manual_seed(0)
    inputs = torch.randn(2, H), torch.rand(2, 2), torch.randn(2, I, H), torch.randn(2, H, I)
    outcome = rewritten(program, *inputs)
    assert outcome.ops == [] and relative(outcome.out, program(*inputs)) < 1e-6


# --- rows of masks -----------------------------------------------------------------------------------------


def twice(x, ids):
    """Rows of rows: the only token stands where all tokens stood."""
    token = tokens_of(ids)
    return x[token][:, None][:, token]


def gates_twice(ids, w):
    token = tokens_of(ids)
    return ((ids == 1) * w).sum(-1)[token][:, None][:, token]


def weights_twice(ids, w):
    return ((ids == 1) * w)[:, tokens_of(ids)][ids[:, 0] == 1]


def sum_by_other_ids(x, ids, w, more_ids, parameter):
    """The sum of one layer is the input of the next."""
    token, slot = torch.where(ids == 1)
    total = torch.zeros_like(x).index_add(0, token, linear(x[token], parameter) * w[token, slot, None])
    return total[tokens_of(more_ids)]


def sum_by_its_ids(x, ids, w, parameter):
    return sum_by_other_ids(x, ids, w, ids, parameter)


ONE_TOKEN = {"x": tokens(1, H), "w": tokens(1, K), "ids": chosen(1, K)}
ONE_PAIR = {"w": tokens(1, 1), "ids": chosen(1, 1)}

ROWS = {
    "rows of rows": (twice, None, ONE_TOKEN),
    "gates of gates": (gates_twice, None, ONE_TOKEN),
    "picked weights by mask": (weights_twice, None, ONE_PAIR),
    "inputs under the weights": (lambda x, ids, w: (x * gate(ids, w, 1))[tokens_of(ids)], "Val"),
    "inputs under the weights of each slot": (
        lambda x, ids, w: (x[:, None] * ((ids == 1) * w)[:, :, None])[tokens_of(ids)], None),
    "inputs under the weights of each expert": (
        lambda x, ids, w: (x[:, None] * torch.zeros(T, E).scatter(1, ids, w)[:, :, None])[tokens_of(ids)], None),
    "inputs by mask": (lambda x, ids: x[(ids == 1).any(1)], "Val"),
    "inputs by a mask as numbers": (lambda x, ids: x[(ids == 1).any(1).long()], None),
    "inputs by counts as numbers": (lambda x, ids: x[(ids == 1).sum(1)], None),
    "sums by a mask as numbers": (lambda ids: torch.zeros(T, 5)[(ids == 1).any(1).long()], None),
    "inputs by a column of tokens": (lambda x, ids: x[tokens_of(ids)[:, None]], None),
    "inputs by rows of tokens": (lambda x, ids: x[tokens_of(ids).expand(3, -1)], None),
    "a number by the only token": (
        lambda number, ids: number.index_select(0, ids.flatten().argsort(stable=True) // 1), None,
        {"number": torch.zeros(()), "ids": chosen(1, 1)}),
    "columns by mask": (lambda x, ids: x[:, (ids == 1).any(1)], None, {"x": tokens(T, T, H)}),
    "w[slots, slots]": (lambda w, ids: w[torch.where(ids == 1)[1], torch.where(ids == 1)[1]], "MC207"),
    "w[tokens, tokens]": (
        lambda w, ids: w[tokens_of(ids), tokens_of(ids)], "MC207", {"w": tokens(3, 4), "ids": chosen(3, 4)}),
    "columns of a sum": (lambda ids: torch.zeros(5, T)[:, tokens_of(ids)], None),
    "rows of the sum of other ids": (
        sum_by_other_ids, "Val", {"parameter": tokens(H, H), "more_ids": chosen()}),
    "rows of the sum of the same ids": (sum_by_its_ids, "Picked", {"parameter": tokens(H, H)}),
    "columns at pairs": (
        lambda x, ids: x.repeat_interleave(K, 0)[:, torch.where(ids.flatten() == 1)[0]], None),
    "columns of weights": (lambda w, ids: w[:, tokens_of(ids)], None, ONE_PAIR),
    "a sum by the masks of all experts": (
        lambda ids: torch.zeros(T, E, 5)[(ids[:, :, None] == torch.arange(E)).any(1)], None),
    "a sum by a mask of pairs": (lambda ids: torch.zeros(T, K, 5)[ids == 1], None),
    "a sum by a mask of tokens": (lambda ids: torch.zeros(T, 5)[(ids == 1).any(1)], "Picked"),
    "gates of experts by a mask of slots": (
        lambda ids, w: torch.zeros(T, K).scatter(1, ids, w)[ids == 1], None),
    "weights by a mask of two dimensions": (
        lambda ids, w: w[(ids == 1).any(-1)], None, {"ids": chosen(T, 1, 1), "w": tokens(T, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    program, expected, *others = ROWS[name]
    assert said(program, **(others[0] if others else {})) == expected


# --- back from sorted order --------------------------------------------------------------------------------


def unsorted(step):
    """``step(rows in sorted order, position of each pair)``."""

    def program(x, ids, more_ids):
        order = ids.flatten().argsort(stable=True)
        return step(x[order // K], order.argsort(), more_ids.flatten())

    return program


UNSORTED = {
    "rows": (lambda rows, inverse, flat: rows[inverse], "Val"),
    "rows by index_select": (lambda rows, inverse, flat: rows.index_select(0, inverse), "Val"),
    "columns": (lambda rows, inverse, flat: rows[:, inverse], None),
    "columns by index_select": (lambda rows, inverse, flat: rows.index_select(1, inverse), None),
    "rows with a dimension more": (lambda rows, inverse, flat: rows[:, None][inverse], None),
    "halves of rows": (lambda rows, inverse, flat: rows.view(-1, 2, H // 2).flatten(0, 1)[inverse][:, :1], None),
    "rows of another order": (lambda rows, inverse, flat: rows[flat.argsort().argsort()], None),
    "rows by numbers": (lambda rows, inverse, flat: rows.index_select(0, flat), None),
    "an unknown tensor": (lambda rows, inverse, flat: flat[inverse], None),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSORTED)
def test_unsorted(name):
    assert said(unsorted(UNSORTED[name][0]), x=tokens(), ids=chosen(), more_ids=chosen()) == UNSORTED[name][1]


def test_nothing_is_refused_where_rows_are_of_no_layer():
    """A mask of all experts picks no rows of one: nothing to say, so nothing to blame."""
    assert codes_of(
        lambda ids, scores: scores[(ids[:, :, None] == torch.arange(E)).any(1)],
        ids=chosen(), scores=tokens(T, E)) == []  # fmt: skip
