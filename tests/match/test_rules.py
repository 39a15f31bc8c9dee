"""Single rules on a few lines of code: what they say, and what they say nothing of when one fact differs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from tracing import E, K, T, said

aten = torch.ops.aten


def pick(ids, e=1):
    return torch.where(ids == e)


def lin(x, ids, parameter, e=1):
    return F.linear(x[pick(ids, e)[0]], parameter)


def onehot(ids):
    return F.one_hot(ids, E)


def sorted_rows(ids):
    order = ids.flatten().argsort(stable=True)
    return order, order // K


ROUTING = {
    "ids == e": (lambda ids: ids == 1, "Gate"),
    "ids == True": (lambda ids: ids == True, None),  # noqa: E712
    "ids == a tensor": (lambda ids, flat: ids == flat[:K], None),
    "ids == 1.5": (lambda ids: ids == 1.5, None),
    "w == e": (lambda w: w == 1, None),
    "int8 ids": (lambda ids: ids == 1, None, {"ids": torch.zeros(T, K, dtype=torch.int8)}),
    "int16 ids": (lambda ids: ids == 1, None, {"ids": torch.zeros(T, K, dtype=torch.int16)}),
    "one number": (lambda ids: ids == 1, None, {"ids": torch.zeros((), dtype=torch.int64)}),
    "ids == arange": (lambda ids: ids[:, :, None] == torch.arange(E), "Gate"),
    "arange == ids": (lambda ids: torch.arange(E) == ids[:, :, None], "Gate"),
    "ids == arange from one": (lambda ids: ids[:, :, None] == torch.arange(1, E), None),
    "ids == arange along the slots": (lambda ids: ids == torch.arange(K), None),
    "mask == e": (lambda ids: (ids == 1) == 1, None),
    "one_hot": (lambda ids: onehot(ids), "Gate"),
    "one_hot of a float's bits": (lambda w: F.one_hot(w.view(torch.int32).long(), E), "Gate"),
    "one_hot of one class": (lambda ids: F.one_hot(ids, 1), None),
    "weighted by w": (lambda ids, w: (ids == 1) * w, "Gate"),
    "weighted by another size": (lambda ids, w: (ids == 1) * w[:, :1], None),
    "weighted by more dimensions": (lambda ids, w: (ids == 1) * w[None], None),
    "weighted by w[0]": (lambda ids, w: (ids == 1) * w[0], None),
    "weighted twice": (lambda ids, w: (ids == 1) * w * w, None),
    "weighted by integers": (lambda ids: (ids == 1) * (ids + 1), None),
    "weighted and scaled": (lambda ids, w: (ids == 1) * w * 2.0, "Gate"),
    "scaled without a weight": (lambda ids: (ids == 1) * 2.0, None),
    "weighted after the sum over slots": (lambda ids, w: (ids == 1).sum(1) * w[:, 0], None),
    "weighted by scores": (lambda ids, scores: (ids == 1).any(1) * scores[:, 1], "Gate"),
    "weighted by scores of another": (lambda ids, scores: (ids == 1).any(1) * scores[:, 2], None),
        "weighted by integer scores": (lambda ids, scores: (ids == 1).any(1) * scores.long()[:, 1], None),
    "where": (lambda ids, w: torch.where(ids == 1, w, 0.0), "Gate"),
    "where, zeros": (lambda ids, w: torch.where(ids == 1, w, torch.zeros_like(w)), "Gate"),
    "where, ones": (lambda ids, w: torch.where(ids == 1, w, torch.ones_like(w) * 2), None),
    "where, one": (lambda ids, w: torch.where(ids == 1, w, 1.0), None),
    "where, a tensor": (lambda ids, w: torch.where(ids == 1, w, w), None),
    "where, a zero tensor": (lambda ids, w: torch.where(ids == 1, w, torch.tensor(0.0)), None),
    "where, another mask": (lambda w: torch.where(w > 1, w, 0.0), None),
    "any": (lambda ids: (ids == 1).any(1), "Gate"),
    "any of weights": (lambda ids, w: ((ids == 1) * w).any(1), None),
    "any over tokens": (lambda ids: (ids == 1).any(0), None),
    "any of numbers": (lambda w: w.any(1), None),
    "any of picked": (lambda ids: (ids == 1)[pick(ids)[0]].any(1), None),
    "sum over slots": (lambda ids, w: ((ids == 1) * w).sum(1), "Gate"),
    "sum over tokens": (lambda ids, w: ((ids == 1) * w).sum(0), None),
    "sum of everything": (lambda ids, w: ((ids == 1) * w).sum(), None),
    "scatter": (lambda ids, w: torch.zeros(T, E).scatter(1, ids, w), "Gate"),
    "scatter, one": (lambda ids: torch.zeros(T, E).scatter(1, ids, 1.0), "Gate"),
    "scatter, two": (lambda ids: torch.zeros(T, E).scatter(1, ids, 2.0), None),
    "scatter, ones": (lambda ids, w: torch.zeros(T, E).scatter(1, ids, torch.ones_like(w)), "Gate"),
    "scatter into ones": (lambda ids, w: torch.full((T, E), 1.0).scatter(1, ids, w), None),
    "scatter into scores": (lambda ids, w, scores: scores.scatter(1, ids, w), None),
    "scatter along tokens": (lambda ids, w: torch.zeros(T, E).scatter(0, ids, w), None),
    "scatter of fewer rows": (lambda ids, w: torch.zeros(T, E).scatter(1, ids[:5], w[:5]), None),
    "scatter of some weights": (lambda ids, scores: torch.zeros(T, E).scatter(1, ids, scores), None),
    "scatter into one expert": (lambda ids, w: torch.zeros(T, 1).scatter(1, ids, w), None),
    "scatter of masked ids": (lambda ids, w: torch.zeros(T, E).scatter(1, (ids == 1).long(), w), None),
    "scatter of integers": (lambda ids: torch.zeros(T, E).long().scatter(1, ids, ids + 1), None),
    "scatter of a gate": (lambda ids, w: torch.zeros(T, E).scatter(1, ids, (ids == 1) * w), None),
    "scatter of complex weights": (
        lambda ids, w: torch.zeros(T, E, dtype=torch.complex64).scatter(1, ids, w.to(torch.complex64)), "MC401"),
    "scatter of transposed ids": (lambda ids, w: torch.zeros(K, T).scatter(1, ids.t(), w.t()), "Gate"),
    "sigmoid of masked scores": (
        lambda ids, w: torch.full((T, E), -math.inf).scatter(1, ids, w).sigmoid(), "Gate"),
    "softmax of masked scores": (
        lambda ids, w: torch.full((T, E), -math.inf).scatter(1, ids, w).softmax(-1), "Gate"),
    "softmax of masked scores in float64": (
        lambda ids, w: torch.full((T, E), -math.inf).scatter(1, ids, w).softmax(-1, dtype=torch.float64), "Gate"),
    "softmax over tokens": (lambda ids, w: torch.full((T, E), -math.inf).scatter(1, ids, w).softmax(0), None),
    "softmax of masked ones": (lambda ids: torch.full((T, E), -math.inf).scatter(1, ids, 1.0).softmax(-1), None),
    "softmax of added scores": (
        lambda ids, w: torch.full((T, E), -math.inf).scatter_add(1, ids, w).softmax(-1), None),
    "masked scores, cast": (
        lambda ids, w: torch.full((T, E), -math.inf).scatter(1, ids, w).to(torch.float64), "Masked"),
    "masked scores as numbers": (lambda ids, w: torch.full((T, E), -math.inf).scatter(1, ids, w).to(torch.int32), None),
    "masked scores as truth": (lambda ids, w: torch.full((T, E), -math.inf).scatter(1, ids, w).to(torch.bool), None),
    "the combine matrix by indices": (
        lambda ids, w: torch.zeros(T, E).index_put((torch.arange(T)[:, None], ids), w), "Gate"),
    "the combine matrix, ones": (
        lambda ids, w: torch.full((T, E), 1.0).index_put((torch.arange(T)[:, None], ids), w), None),
    "the combine matrix, from token 1": (
        lambda ids, w: torch.zeros(T + 1, E).index_put((torch.arange(1, T + 1)[:, None], ids), w), None),
    "the combine matrix, columns first": (
        lambda ids, w: torch.zeros(E, T).index_put((ids, torch.arange(T)[:, None]), w), None),
    "the combine matrix in three dimensions": (
        lambda ids, w, x: torch.zeros(T, E, K).index_put((torch.arange(T)[:, None], ids), w[:, :, None]), None),
    "the combine matrix of integers": (
        lambda ids: torch.zeros(T, E).long().index_put((torch.arange(T)[:, None], ids), ids + 1), None),
    "the combine matrix of one weight each": (
        lambda ids, w: torch.zeros(T, E).index_put((torch.arange(T)[:, None], ids), w[:, :1]), None),
    "the combine matrix of a gate": (
        lambda ids, w: torch.zeros(T, E).index_put((torch.arange(T)[:, None], ids), (ids == 1) * w), None),
    "the combine matrix of masks": (
        lambda ids, w: torch.zeros(T, E).index_put((torch.arange(T)[:, None], (ids == 1).long()), w), None),
    "the combine matrix of tokens": (
        lambda ids, w: torch.zeros(T, E).index_put((ids[:, :1], torch.arange(K)[None]), w), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTING)
def test_routing(name):
    program, expected, *others = ROUTING[name]
    assert said(program, **(others[0] if others else {})) == expected


def mask_of(ids):
    return ids.flatten() == 1


def pairs(ids):
    return torch.where(mask_of(ids))[0]


def mlp(rows, parameter, down_parameter):
    return F.linear(F.silu(F.linear(rows, parameter)), down_parameter)


ROWS = {
    "tokens": (lambda ids: pick(ids)[0], "Index"),
    "slots": (lambda ids: pick(ids)[1], "Index"),
    "pairs": (lambda ids: pairs(ids), "Index"),
    "where a weight is": (lambda ids, w: torch.where((ids == 1) * w)[0], None),
    "where any expert is": (lambda ids: torch.where(onehot(ids))[0], None),
    "where something else is": (lambda w: torch.where(w > 0)[0], None),
    "where a picked mask is": (lambda ids: torch.where((ids == 1)[pick(ids, 2)[0]])[0], None),
    "a column of nonzero": (lambda ids: (ids == 1).nonzero()[:, 0], "Index"),
    "a row of nonzero": (lambda ids: (ids == 1).nonzero()[0], None),
    "columns of nonzero": (lambda ids: (ids == 1).nonzero().unbind(1)[1], "Index"),
    "the only column of nonzero": (lambda ids: mask_of(ids).nonzero().squeeze(-1), "Index"),
    "tokens of transposed ids": (lambda ids: torch.where(ids.t() == 1)[1], "Index"),
    "pairs slot by slot": (lambda ids: torch.where(ids.t().flatten() == 1)[0], "Index"),
    "x[tokens]": (lambda x, ids: x[pick(ids)[0]], "Val"),
    "x[slots]": (lambda x, ids: x[pick(ids)[1]], None),
    "x[pairs]": (lambda x, ids: x[pairs(ids)], None),
    "x[tokens] of fewer tokens": (lambda x, ids: x[:5][pick(ids)[0]], None),
    "x[:, tokens] of another layout": (lambda x, ids: x.t()[:, pick(ids)[0]], None),
    "integers[tokens]": (lambda x, ids: x.long()[pick(ids)[0]], None),
    "x.repeat_interleave[pairs]": (lambda x, ids: x.repeat_interleave(K, 0)[pairs(ids)], "Val"),
    "x.repeat_interleave(3)[pairs]": (lambda x, ids: x.repeat_interleave(3, 0)[pairs(ids)], None),
    "x.repeat[pairs]": (lambda x, ids: x.repeat(K, 1)[pairs(ids)], None),
    "x in three dimensions[pairs]": (lambda x, ids: x[:, None].expand(T, K, -1).reshape(T * K, -1)[pairs(ids)], "Val"),
    "x by mask": (lambda x, ids: x[(ids == 1).any(1)], "Val"),
    "x by the mask of one slot": (lambda x, ids: x[ids[:, 0] == 1], "Val"),
    "x by mask of all pairs": (lambda x, ids: x.repeat_interleave(K, 0)[mask_of(ids)], "Val"),
    "x by mask of pairs in rounds": (lambda x, ids: x.repeat(K, 1)[mask_of(ids)], "MC207"),
    "x by a mask of any expert": (lambda x, ids: x[onehot(ids)[:, 0, 0].bool()], "Val"),
    "x by something else": (lambda x: x[x[:, 0] > 0], None),
    "w by mask": (lambda w, ids: w[ids == 1], "Gate"),
    "w by a flat mask": (lambda w, ids: w.flatten()[mask_of(ids)], "Gate"),
    "integers by mask": (lambda ids: ids[ids == 1], None),
    "a gate by mask": (lambda w, ids: ((ids == 1) * w)[ids == 1], "Gate"),
    "a gate by the mask of another layout": (lambda w, ids: ((ids == 1) * w).sum(1)[ids[:, 0] == 1], "Gate"),
    "numbers of three dimensions by mask": (lambda w, ids: w[:, :, None].expand(T, K, 3)[ids == 1], "MC207"),
    "w[tokens, slots]": (lambda w, ids: w[pick(ids)], "Gate"),
    "w[slots, tokens]": (lambda w, ids: w.t()[pick(ids)[::-1]], "MC207"),
    "w[tokens, slots of another]": (lambda w, ids: w[pick(ids)[0], pick(ids, 2)[1][:1]], "MC207"),
    "w[tokens, numbers]": (lambda w, ids, flat: w[pick(ids)[0], flat[:1]], "MC207"),
    "ids[tokens, slots]": (lambda ids: ids[pick(ids)], None),
    "gates[tokens, slots]": (lambda w, ids: ((ids == 1) * w)[pick(ids)], None),
    "w[.., None][tokens, slots]": (lambda w, ids: w[:, :, None][pick(ids)], "Gate"),
    "w[.., 3][tokens, slots]": (lambda w, ids: w[:, :, None].expand(T, K, 3)[pick(ids)], None),
    "scores[tokens, slots]": (lambda scores, ids: scores[pick(ids)], None),
    "w of fewer tokens[tokens, slots]": (lambda w, ids: w[1:][pick(ids)], None),
    "w[0][tokens]": (lambda w, ids: w[:, 0][pick(ids)[0]], None),
    "w of one slot[tokens]": (lambda w, ids: w[:, 0][pick(ids[:, 0])[0]], "Gate"),
    "integers of one slot[tokens]": (lambda ids: (ids[:, 0] + 1)[pick(ids[:, 0])[0]], None),
    "gates of one slot[tokens]": (lambda w, ids: ((ids == 1) * w).sum(1)[pick(ids)[0]], "Gate"),
    "scores of the expert[tokens]": (lambda scores, ids: scores[:, 1][pick(ids)[0]], "Gate"),
    "scores of another[tokens]": (lambda scores, ids: scores[:, 2][pick(ids)[0]], None),
    "w.flatten[pairs]": (lambda w, ids: w.flatten()[pairs(ids)], "Gate"),
    "w.view(-1, 1)[pairs]": (lambda w, ids: w.view(-1, 1)[pairs(ids)], "Gate"),
    "w.view(-1, 1, 1)[pairs]": (lambda w, ids: w.view(-1, 1, 1)[pairs(ids)], None),
    "some of w[pairs]": (lambda w, ids: w[:, 0][pairs(ids)], None),
    "zeros[tokens]": (lambda ids: torch.zeros(T, 5)[pick(ids)[0]], "Picked"),
    "zeros[slots]": (lambda ids: torch.zeros(T, 5)[pick(ids)[1]], None),
    "zeros in three dimensions[tokens]": (lambda ids: torch.zeros(T, 5, 3)[pick(ids)[0]], None),
    "gather of tokens": (lambda x, ids: x.gather(0, pick(ids)[0][:, None].expand(-1, x.shape[1])), "Val"),
    "gather of slots": (lambda x, ids: x.gather(0, pick(ids)[1][:, None].expand(-1, x.shape[1])), None),
    "gather of some columns": (lambda x, ids: x.gather(0, pick(ids)[0][:, None].expand(-1, 3)), None),
    "gather of one column": (lambda x, ids: x.gather(0, pick(ids)[0][:, None]), None),
    "gather of integers": (lambda x, ids: x.long().gather(0, pick(ids)[0][:, None].expand(-1, x.shape[1])), None),
    "gather of fewer tokens": (lambda x, ids: x[:5].gather(0, pick(ids)[0][:, None].expand(-1, x.shape[1])), None),
}  # fmt: skip

SORTED = {
    "argsort": (lambda ids: ids.flatten().argsort(), "Index"),
    "argsort, descending": (lambda ids: ids.flatten().argsort(descending=True), None),
    "sort, descending": (lambda ids: ids.flatten().sort(0, True)[1], None),
    "argsort of rows": (lambda ids: ids.argsort(), None),
    "argsort of numbers": (lambda w: w.flatten().argsort(), None),
    "argsort of masks": (lambda ids: (ids == 1).flatten().argsort(), None),
    "argsort of int8": (lambda ids: ids.flatten().to(torch.int8).argsort(), None),
    "sort": (lambda ids: ids.flatten().sort()[0], "SortedIds"),
    "the inverse": (lambda ids: ids.flatten().argsort().argsort(), "Inverse"),
    "the inverse by sort": (lambda ids: ids.flatten().argsort().sort()[1], "Inverse"),
    "argsort of tokens": (lambda ids: sorted_rows(ids)[1].argsort(), None),
    "argsort of picked pairs": (lambda ids: pairs(ids).argsort(), None),
    "the inverse by index": (
        lambda ids: torch.empty(T * K, dtype=torch.int64).index_put((sorted_rows(ids)[0],), torch.arange(T * K)),
        "Inverse"),
    "the inverse from one": (
        lambda ids: torch.empty(T * K, dtype=torch.int64).index_put((sorted_rows(ids)[0],), torch.arange(1, T * K + 1)),
        None),
    "the inverse into more rows": (
        lambda ids: torch.empty(T * K + 1, dtype=torch.int64).index_put((sorted_rows(ids)[0],), torch.arange(T * K)),
        None),
    "the inverse, added": (
        lambda ids: torch.zeros(T * K, dtype=torch.int64).index_put(
            (sorted_rows(ids)[0],), torch.arange(T * K), accumulate=True), None),
    "the inverse into numbers": (
        lambda ids, flat: flat.index_put((sorted_rows(ids)[0],), torch.arange(T * K)), None),
    "something else by index": (
        lambda ids, flat: torch.empty(T * K, dtype=torch.int64).index_put((sorted_rows(ids)[0],), flat), None),
    "tokens": (lambda ids: sorted_rows(ids)[1], "Index"),
    "slots": (lambda ids: sorted_rows(ids)[0] % K, "Index"),
    "order // 3": (lambda ids: sorted_rows(ids)[0] // 3, "MC207"),
    "order / K": (lambda ids: torch.div(sorted_rows(ids)[0], K, rounding_mode="floor"), "Index"),
    "order / K, towards zero": (lambda ids: torch.div(sorted_rows(ids)[0], K, rounding_mode="trunc"), None),
    "tokens // K": (lambda ids: sorted_rows(ids)[1] // K, None),
    "numbers // K": (lambda flat: flat // K, None),
    "sorted ids": (lambda ids: ids.flatten()[sorted_rows(ids)[0]], "SortedIds"),
    "sorted ids of others": (lambda ids, flat: flat[sorted_rows(ids)[0]], None),
    "ids of picked pairs": (lambda ids: ids.flatten()[pairs(ids)], None),
    "ids by token": (lambda ids: ids[:, 0][sorted_rows(ids)[1]], None),
    "tokens by arange": (lambda ids: torch.arange(T).repeat_interleave(K)[sorted_rows(ids)[0]], "Index"),
    "tokens by arange from one": (lambda ids: torch.arange(1, T + 1).repeat_interleave(K)[sorted_rows(ids)[0]], None),
    "tokens by arange in rounds": (lambda ids: torch.arange(T).repeat(K)[sorted_rows(ids)[0]], None),
    "tokens by arange, thrice": (lambda ids: torch.arange(T).repeat_interleave(3)[sorted_rows(ids)[0]], None),
    "tokens by arange of pairs": (lambda ids: torch.arange(T * K)[sorted_rows(ids)[0]], None),
    "histc": (lambda ids: torch.histc(ids.flatten().float(), E, 0, E - 1), "Counts"),
    "histc over E": (lambda ids: torch.histc(ids.flatten().float(), E, 0, E), "MC207"),
    "histc from one": (lambda ids: torch.histc(ids.flatten().float(), E, 1, E), None),
    "histc of more": (lambda ids: torch.histc(ids.flatten().float(), E, 0, E + 3), None),
    "histc of numbers": (lambda w: torch.histc(w.flatten(), E, 0, E - 1), None),
    "bincount": (lambda ids: ids.flatten().bincount(minlength=E), "Counts"),
    "bincount of weights": (lambda ids, w: ids.flatten().bincount(w.flatten(), minlength=E), None),
    "bincount of masks": (lambda ids: (ids == 1).flatten().long().bincount(minlength=E), None),
    "bincount, cut": (lambda ids: ids.flatten().bincount(minlength=E)[:E], "Counts"),
    "bincount from one": (lambda ids: ids.flatten().bincount(minlength=E)[1:E], None),
    "one-hot sums": (lambda ids: onehot(ids.flatten()).sum(0), "Counts"),
    "one-hot sums over tokens and slots": (lambda ids: onehot(ids).sum((0, 1)), "Counts"),
    "one-hot sums over tokens": (lambda ids: onehot(ids).sum(0), None),
    "one-hot sums of everything": (lambda ids: onehot(ids).sum(), None),
    "weighted one-hot sums": (lambda ids, w: (onehot(ids) * w[..., None]).sum((0, 1)), None),
    "sums of masks": (lambda ids: (ids == 1).sum((0, 1)), None),
    "sums of truth values": (lambda ids: onehot(ids).any(1).sum(0), None),
    "running sums": (lambda ids: ids.flatten().bincount(minlength=E).cumsum(0), "Counts"),
    "running sums twice": (lambda ids: ids.flatten().bincount(minlength=E).cumsum(0).cumsum(0), None),
    "places in bins": (lambda ids: onehot(ids.flatten()).cumsum(0), "MC209"),
    "running sums of masks over slots": (lambda w: w.cumsum(0), None),
    "searchsorted": (
        lambda ids: torch.searchsorted(ids.flatten().sort()[0], torch.arange(E), right=True), "Counts"),
    "searchsorted from one": (
        lambda ids: torch.searchsorted(ids.flatten().sort()[0], torch.arange(1, E + 1)), "Counts"),
    "searchsorted for the starts": (lambda ids: torch.searchsorted(ids.flatten().sort()[0], torch.arange(E)), "MC207"),
    "searchsorted of others": (lambda ids, flat: torch.searchsorted(flat, torch.arange(E), right=True), None),
    "searchsorted of numbers": (
        lambda ids, flat: torch.searchsorted(ids.flatten().sort()[0], flat[:E], right=True), None),
    "hit experts": (lambda ids: (ids.flatten().bincount(minlength=E) > 0).nonzero(), "Hits"),
    "hit experts, at least one": (lambda ids: (ids.flatten().bincount(minlength=E) >= 1).nonzero(), "Hits"),
    "busy experts": (lambda ids: (ids.flatten().bincount(minlength=E) > 1).nonzero(), None),
    "experts with any number": (lambda ids: (ids.flatten().bincount(minlength=E) >= 0).nonzero(), None),
    "ends above zero": (lambda ids: (ids.flatten().bincount(minlength=E).cumsum(0) > 0).nonzero(), None),
    "nonzero ends": (lambda ids: ids.flatten().bincount(minlength=E).cumsum(0).nonzero(), None),
    "nonzero counts": (lambda ids: ids.flatten().bincount(minlength=E).nonzero(), "Hits"),
    "hit experts by where": (lambda ids: torch.where(ids.flatten().bincount(minlength=E) > 0)[0], "Hits"),
    "numbers above zero": (lambda flat: (flat > 0).nonzero(), None),
    "hit experts by any": (lambda ids: onehot(ids).bool().any((0, 1)).nonzero(), "Hits"),
    "any of a hit mask": (lambda ids: onehot(ids).bool().any((0, 1)).any(0), None),
    "any of picked masks": (lambda ids: (ids == 1)[pick(ids, 2)[0]].any((0, 1)), None),
    "any over experts": (lambda ids: onehot(ids).bool().any((0, 2)), None),
    "experts of any token": (lambda ids: onehot(ids).bool().any(0), None),
    "any of a mask": (lambda ids: (ids == 1).any(0), None),
    "any of weights": (lambda ids, w: (onehot(ids) * w[..., None]).any(0), None),
    "unique": (lambda ids: torch.ops.aten._unique2(ids)[0], "Hits"),
    "unique numbers": (lambda w: torch.ops.aten._unique2(w)[0], None),
    "unique masks": (lambda ids: torch.ops.aten._unique2((ids == 1).long())[0], None),
    "hits, flat": (lambda ids: torch.ops.aten._unique2(ids)[0].view(-1), "Hits"),
    "hits as int8": (lambda ids: torch.ops.aten._unique2(ids)[0].to(torch.int8), None),
    "hits as int32": (lambda ids: torch.ops.aten._unique2(ids)[0].to(torch.int32), "Hits"),
    "hit mask, folded": (lambda ids: (ids.flatten().bincount(minlength=E) > 0).view(2, 2), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    assert said(ROWS[name][0]) == ROWS[name][1]


@pytest.mark.parametrize("name", SORTED)
def test_sorted(name):
    assert said(SORTED[name][0]) == SORTED[name][1]
