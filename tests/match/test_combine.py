"""Sums of weighted outputs, products with router weights, and buffers of one row per pair, in a few lines each."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, said, tokens

einsum = torch.einsum
# As many tokens as features, so that no size tells one from the other.
SQUARE = {"x": tokens(H, H), "w": tokens(H, K), "ids": chosen(H, K), "parameter": tokens(H, H)}


def gate(ids, w, e=0):
    """The weight of an expert for every token, [T, 1]."""
    return ((ids == e) * w).sum(1, keepdim=True)


def gates(ids, w):
    return torch.zeros(T, E).scatter(1, ids, w)


def term(x, ids, w, parameter, e=0):
    """A weighted output, [T, I]."""
    return F.linear(x, parameter) * gate(ids, w, e)


def outputs(x, stack_parameter):
    """Every expert on every token, [T, E, I]."""
    return einsum("th,eih->tei", x, stack_parameter)


def chosen_outputs(x, ids, stack_parameter):
    """One output per pair, [T, K, I]."""
    return einsum("th,tkih->tki", x, stack_parameter[ids])


def onehot(ids):
    return F.one_hot(ids, E).float()


def per_slot(x, ids, w, parameter):
    """An expert on its input weighted by one slot at a time, [T, K, I]."""
    return F.linear(x[:, None] * ((ids == 1) * w)[..., None], parameter)


def read(x, ids, parameter):
    """Rows of a buffer, and the output that belongs to them."""
    token = torch.where(ids == 1)[0]
    return torch.zeros(T, I)[token], F.linear(x[token], parameter)


ADDED = {
    "two terms": (lambda x, ids, w, parameter: term(x, ids, w, parameter) + term(x, ids, w, parameter, 1), "Sum"),
    "a term and zero": (lambda x, ids, w, parameter: term(x, ids, w, parameter) + 0, "Sum"),
    "a term and False": (
        lambda x, ids, w, parameter: torch.ops.aten.add.Tensor(term(x, ids, w, parameter), False), "Sum"),
    "a term and True": (
        lambda x, ids, w, parameter: torch.ops.aten.add.Tensor(term(x, ids, w, parameter), True), "MC302"),
    "a term and another, scaled": (
        lambda x, ids, w, parameter:
            torch.add(term(x, ids, w, parameter), term(x, ids, w, parameter, 1), alpha=2), "MC304"),
    "a term and zeros": (lambda x, ids, w, parameter: term(x, ids, w, parameter) + torch.zeros(T, I), "Sum"),
    "a term and ones": (lambda x, ids, w, parameter: term(x, ids, w, parameter) + torch.full((T, I), 1.0), "MC210"),
    "a term and zeros of more dimensions": (
        lambda x, ids, w, parameter: term(x, ids, w, parameter) + torch.zeros(2, T, I), "MC210"),
    "weighted inputs": (lambda x, ids, w: x * gate(ids, w) + x * gate(ids, w, 1), "MC302"),
    "outputs of all experts and zeros": (
        lambda x, ids, w, stack_parameter:
            outputs(x, stack_parameter) * gates(ids, w)[..., None] + torch.zeros(T, E, I), None),
    "one expert, slot by slot, and zeros": (
        lambda x, ids, w, parameter: per_slot(x, ids, w, parameter).sum(1) + torch.zeros(T, I), None),
    "two values of one weighted input": (
        lambda x, ids, w, parameter:
            F.linear(x * gate(ids, w), parameter) + F.linear(x * gate(ids, w), parameter * 2), "Val"),
    "tokens and features exchanged in one": (
        lambda x, ids, w, parameter: term(x, ids, w, parameter) + term(x, ids, w, parameter, 1).t(), None, SQUARE),
    "a base": (lambda x, ids, w, parameter, base: base + term(x, ids, w, parameter), "Sum"),
    "a base on either side": (
        lambda x, ids, w, parameter, base:
            (base + term(x, ids, w, parameter)) + (base * 2 + term(x, ids, w, parameter, 1)), None),
    "two bases": (lambda x, ids, w, parameter, base: base + term(x, ids, w, parameter) + base * 2, None),
    "a base of integers": (lambda x, ids, w, parameter, base: base.long() + term(x, ids, w, parameter), None),
    "a base of one row": (lambda x, ids, w, parameter, base: base[:1] + term(x, ids, w, parameter), None),
    "a base of fewer dimensions": (
        lambda x, ids, w, parameter: x[0] + term(x, ids, w, parameter), None, SQUARE),
    "rows and their output": (
        lambda x, ids, parameter: torch.add(*read(x, ids, parameter)), "Picked"),
    "rows and their output, twice": (
        lambda x, ids, parameter: (lambda rows, y: rows + y + y)(*read(x, ids, parameter)), None),
    "rows and their output, scaled": (
        lambda x, ids, parameter: torch.add(*read(x, ids, parameter), alpha=2), "MC304"),
    "rows and the output of others": (
        lambda x, ids, parameter: torch.zeros(T, I)[torch.where(ids == 2)[0]] + read(x, ids, parameter)[1], "MC207"),
}  # fmt: skip
SUMMED = {
    "over the slots": (
        lambda x, ids, w, parameter: (F.linear(x, parameter)[:, None] * ((ids == 1) * w)[..., None]).sum(1), "Val"),
    "over the experts": (
        lambda x, ids, w, stack_parameter: (outputs(x, stack_parameter) * gates(ids, w)[..., None]).sum(1), "Sum"),
    "over the tokens": (lambda x, ids, w, parameter: term(x, ids, w, parameter).sum(0), None),
    "of masks as truth values": (lambda ids: (ids == 1).sum(1, dtype=torch.bool), None),
    "over all experts with the weight of one": (
        lambda x, ids, w, stack_parameter: (outputs(x, stack_parameter) * gate(ids, w)[..., None]).sum(1), None),
    "over all experts without weights": (lambda x, stack_parameter: outputs(x, stack_parameter).sum(1), "MC304"),
    "of weighted inputs": (lambda x, ids, w: (x[:, None] * gates(ids, w)[..., None]).sum(1), None),
    "of everything, as no dimension": (lambda x, ids, w, parameter: term(x, ids, w, parameter).sum([]), None),
    "of everything": (
        lambda x, ids, w, parameter: torch.ops.aten.sum.dim_IntList(term(x, ids, w, parameter), None), None),
}  # fmt: skip
WEIGHTED = {
    "pairs": (
        lambda x, ids, w, stack_parameter: einsum("tki,tk->ti", chosen_outputs(x, ids, stack_parameter), w), "Sum"),
    "pairs, not summed": (
        lambda x, ids, w, stack_parameter: einsum("tki,tk->tki", chosen_outputs(x, ids, stack_parameter), w), "Val"),
    "pairs, by integers": (
        lambda x, ids, stack_parameter: einsum("tki,tk->tki", chosen_outputs(x, ids, stack_parameter), ids), None),
    "pairs, a weight for every feature": (
        lambda x, ids, stack_parameter, v: einsum("tki,tki->ti", chosen_outputs(x, ids, stack_parameter), v), None),
    "pairs, the weights of one token": (
        lambda x, ids, w, stack_parameter: einsum("tki,tk->ti", chosen_outputs(x, ids, stack_parameter), w[:1]), None),
    "pairs, a weight for every token": (
        lambda x, ids, w, stack_parameter: einsum("tki,t->ti", chosen_outputs(x, ids, stack_parameter), w[:, 0]), None),
    "an expert, a weight for every token": (
        lambda x, w, parameter: einsum("ti,t->ti", F.linear(x, parameter), w[:, 0]), None),
    "the combine matrix": (lambda ids, w: einsum("tke,tk->te", onehot(ids), w), "Gate"),
    "the combine matrix, weighted twice": (
        lambda ids, w: einsum("tke,tk->te", onehot(ids) * w[..., None], w), None),
    "the combine matrix, weights of the first slot": (
        lambda ids, w: einsum("tke,tk->te", onehot(ids), w[:, :1]), None),
    "the combine matrix, slots before tokens": (
        lambda ids, w: einsum("kte,kt->te", onehot(ids).transpose(0, 1), w.t()), None),
    "the combine matrix, slots before tokens in the mask": (
        lambda ids, w: einsum("kte,tk->te", onehot(ids).transpose(0, 1), w), "Gate"),
    "the combine matrix, slots before tokens in the weights": (
        lambda ids, w: einsum("tke,kt->te", onehot(ids), w.t()), None),
    "the combine matrix, weights of the experts": (
        lambda ids, scores: einsum("tke,te->te", onehot(ids), scores), None),
    "the combine matrix, times a weight": (
        lambda ids, parameter: einsum("te,ie->ti", onehot(ids)[:, 0], parameter), None, {"parameter": tokens(I, E)}),
    "the combine matrix, summed over the tokens": (lambda ids, w: einsum("tke,tk->ke", onehot(ids), w), None),
    "the mask of expert 0, weights of the experts": (
        lambda ids, scores: einsum(
            "tke,te->te", (ids[..., None] == torch.arange(1)).float(), scores[:, :1]), None),
    "another dimension": (lambda ids, w: einsum("t,tk->tk", (ids == 1).sum(1).float(), w), None),
}  # fmt: skip


def assign(target, where, value):
    target[where] = value
    return target


def pair_rows(x, ids, parameter, e):
    """The flat mask of an expert, and its output on those pairs."""
    mask = ids.flatten() == e
    return mask, F.linear(x.repeat_interleave(K, 0)[mask], parameter)


def fill(x, ids, parameter, other_ids=None, other_x=None, out=None, second=lambda out: out):
    """Rows of the experts 0 and 1 assigned to ``out``; those of expert 1 by other ids or from another input."""
    out = torch.empty(T * K, I) if out is None else out
    out = assign(out, *pair_rows(x, ids, parameter, 0))
    e_ids, e_x = ids if other_ids is None else other_ids, x if other_x is None else other_x
    return assign(second(out), *pair_rows(e_x, e_ids, parameter * 2, 1))


def weighted(x, ids, parameter, weight):
    """Rows of the experts 0 and 1, each times ``weight(token, slot, e)``, at ``[token, slot]``."""
    out = torch.empty(T, K, I)
    for e in (0, 1):
        token, slot = torch.where(ids == e)
        out[token, slot] = F.linear(x[token], parameter * (e + 1)) * weight(token, slot, e)[:, None]
    return out


def slots_first(x, ids, parameter):
    mask = (ids == 0).t()
    return assign(torch.empty(K, T, I), mask, F.linear(x[torch.where(mask)[1]], parameter))


def once(x, ids, parameter):
    """A mask of tokens where every token has one slot."""
    mask = onehot(ids)[:, 0, 0].bool()
    return assign(torch.empty(T, I), mask, F.linear(x[mask], parameter))


def by_number(rows):
    def program(x, ids, parameter):
        mask, y = pair_rows(x, ids, parameter, 0)
        return assign(torch.empty(rows, I), torch.where(mask)[0], y)

    return program


ASSIGNED = {
    "one expert": (lambda x, ids, parameter: assign(torch.empty(T * K, I), *pair_rows(x, ids, parameter, 0)),
                   "Unfinished"),
    "two experts": (lambda x, ids, parameter: fill(x, ids, parameter), "Val"),
    "into a buffer from outside": (lambda x, ids, parameter, v: fill(x, ids, parameter, out=v), None,
                                   {"v": tokens(T * K, I)}),
    "into the buffer and its transpose": (
        lambda x, ids, parameter: fill(x, ids, parameter, out=torch.empty(T * K, T * K), second=torch.t), None,
        {"parameter": tokens(T * K, H)}),
    "into three copies": (
        lambda x, ids, parameter: (lambda mask, y: assign(torch.empty(T * K, 3, I), mask, y[:, None]))(
            *pair_rows(x, ids, parameter, 0)), None),
    "into three copies of rows": (
        lambda x, ids, parameter: assign(torch.empty(T * K, 3, I), *pair_rows(x, ids, parameter, 0)), None),
    "features for rows": (lambda x, ids, parameter: (lambda mask, y: assign(torch.empty(T * K, I), mask, y.t()))(
        *pair_rows(x, ids, parameter, 0)), None),
    "slots before tokens": (slots_first, None),
    "by number": (by_number(T * K), "Unfinished"),
    "by number, with a row more": (by_number(T * K + 1), None),
    "by a mask of tokens": (once, None, {"ids": chosen(T, 1)}),
    "the output of another expert": (
        lambda x, ids, parameter: assign(
            torch.empty(T * K, I), pair_rows(x, ids, parameter, 0)[0], pair_rows(x, ids, parameter, 1)[1]), None),
    "the input": (lambda x, ids: (lambda m: assign(torch.empty(T * K, H), m, x.repeat_interleave(K, 0)[m]))(
        ids.flatten() == 0), None),
    "by other ids": (lambda x, ids, parameter: fill(x, ids, parameter, other_ids=ids.flip(0)), "MC207"),
    "from another input": (lambda x, ids, parameter: fill(x, ids, parameter, other_x=x.relu()), "MC207"),
    "weighted": (lambda x, ids, w, parameter: weighted(x, ids, parameter, lambda t, k, e: w[t, k]), "Val"),
    "weighted by two tensors": (
        lambda x, ids, w, parameter: weighted(x, ids, parameter, lambda t, k, e: (w * (e + 1))[t, k]), "MC207"),
    "weighted for the other expert": (
        lambda x, ids, w, parameter: weighted(x, ids, parameter, lambda t, k, e: gate(ids, w, 1 - e)[t][:, 0]),
        "MC208"),
    "weighted by one slot": (
        lambda x, ids, w, parameter: weighted(
            x, ids, parameter, lambda t, k, e: ((ids == e)[:, 0] * w[:, 0])[t]), "MC208"),
}  # fmt: skip
OTHERS = {"base": tokens(T, I), "v": tokens(T, K, I)}
TABLES = {f"{title}, {name}": case for title, table in (("added", ADDED), ("summed", SUMMED), ("weighted", WEIGHTED),
          ("assigned", ASSIGNED)) for name, case in table.items()}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_combine(name):
    program, expected, *others = TABLES[name]
    assert said(program, **{**OTHERS, **(others[0] if others else {})}) == expected
