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
