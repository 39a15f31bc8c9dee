"""Near misses in the router, its weights, and in which tokens reach an expert."""

from __future__ import annotations

import torch
from bases import (
    BASES,
    LOOPS,
    AllBmm,
    AllEinsum,
    BoolMask,
    Dense,
    Gathered,
    Grouped,
    Stacked,
    Where,
)
from mutators import EQUAL, UNSEEN, Cases, each, override, wrap
from torch.nn import functional as F

CASES = Cases()
near = CASES.near
MAIN = (Dense, Where, BoolMask, Gathered, AllBmm)


def weights(function):
    """The router weights go through ``function`` before anything else."""

    def route(step, s, x):
        w, ids = step(x)
        return function(w), ids

    return wrap(route=route)


# ---------------------------------------------------------------------------------- weights that stay plain weights

near(9, weights(lambda w: w.roll(1, 0)), each(MAIN, EQUAL), "for all experts: other weights")
near(9, wrap(weight=lambda step, s, w, ids, e, *m: step(w.roll(e, 0), ids, e, *m)),
     each((Dense, BoolMask), "MC207"), "per expert")  # fmt: skip
near(9, wrap(weight=lambda step, s, w, token, slot: step(w.roll(1, 0), slot.new_zeros(slot.shape), slot)),
     each((Where, Stacked), "MC207"), "always of the first token")  # fmt: skip
near(9, wrap(weight=lambda step, s, w, token, slot: w.t().contiguous()[slot, token, None]),
     each((Where, Stacked), "MC207"), "transposed and indexed so")  # fmt: skip
near(10, weights(lambda w: w * w), each(MAIN, EQUAL))
near(28, weights(lambda w: w.detach()), each(MAIN, EQUAL))
near(56, weights(lambda w: torch.where(w > 0.4, w, 0.0)), each(MAIN, EQUAL))
near(64, weights(lambda w: torch.tanh(w) * 2.5), each(MAIN, EQUAL), "on the weights")


def router(function):
    """Another routing decision from the router's logits."""
    return override(route=lambda s, x: function(s, s.router.gate(x)))


def smallest(s, logits):
    return torch.topk(F.softmax(logits, -1), s.top_k, dim=-1, largest=False)


def of_another(s, logits):
    _, ids = torch.topk(logits, s.top_k, dim=-1)
    return F.softmax(logits * logits, -1).gather(-1, ids), ids


def renormalised(s, logits):
    w, ids = torch.topk(F.softmax(logits, -1), s.top_k, dim=-1)
    w = w / w.sum(-1, keepdim=True)
    return w * (w > 0.45), ids


def noisy(s, logits):
    return torch.topk(F.softmax(logits + torch.randn_like(logits), -1), s.top_k, dim=-1)


near(18, router(smallest), each(MAIN, EQUAL))
near(20, router(of_another), each(MAIN, EQUAL))
near(21, router(renormalised), each(MAIN, EQUAL))
near(25, router(noisy), each(MAIN, EQUAL))


def over_tokens(s, x):
    scores = F.softmax(s.router.gate(x), -1)
    return torch.topk(scores, 2, dim=0)  # [C, E]


def choose_rows(s, out, x, w, ids, e, mlp):
    token = ids[:, e]
    return out.index_add_(0, token, s.expert(mlp, x[token], e) * w[:, e, None])


def choose_column(s, out, x, w, ids, e, mlp):
    column = torch.zeros(x.shape[0], s.experts).scatter(0, ids, w)[:, e, None]
    return out + column * s.expert(mlp, x, e)


def choose_matrix(s, w, ids):
    return torch.zeros(5, s.experts).scatter(0, ids, w)


near(19, override(route=over_tokens, step=choose_rows), each((Where, Stacked), UNSEEN))
near(19, override(route=over_tokens, step=choose_column), {Dense: UNSEEN})
near(19, override(route=over_tokens, matrix=choose_matrix), each((AllEinsum, AllBmm), UNSEEN))


def all_scores(s, x):
    return F.softmax(s.router.gate(x), -1), None


near(55, override(route=all_scores, weight=lambda s, w, ids, e: w[:, e, None]), {Dense: UNSEEN})
near(55, override(route=all_scores, matrix=lambda s, w, ids: w), each((AllEinsum, AllBmm), UNSEEN))
near(55, override(route=all_scores, pick=lambda s, ids, e: torch.ones(5, dtype=torch.bool),
                  weight=lambda s, w, ids, e, m: w[m][:, e, None]), {BoolMask: UNSEEN})  # fmt: skip


def write_logits(step, s, x):
    logits = s.router.gate(x)
    w, ids = torch.topk(F.softmax(logits, -1), s.top_k, dim=-1)
    logits.zero_()
    return w, ids


def write_weights_after(step, s, x, w, ids):
    out = step(x, w, ids)
    w.zero_()
    ids.zero_()
    return out


def write_weights_inside(name):
    def change(step, s, out, x, w, ids, e, mlp):
        out = step(out, x, w, ids, e, mlp)
        if e == 1:
            {"w": w, "ids": ids}[name].mul_(2)
        return out

    return wrap(step=change)


near(51, wrap(route=write_logits), each(MAIN, EQUAL), "logits")
near(51, wrap(mix=write_weights_after), each(MAIN, EQUAL, Gathered="MC207", AllBmm="MC207"),
     "weights and ids, after the layer")
near(51, write_weights_inside("w"), each(LOOPS, "MC207"), "weights, inside the loop")
near(51, write_weights_inside("ids"), each(LOOPS, "MC207 MC200", BoolMask="equal MC303"), "ids, inside the loop")

# ---------------------------------------------------------------------------------- dropped tokens

near(22, wrap(pick=lambda step, s, ids, e: tuple(i[:2] for i in step(ids, e))), each((Where, Stacked), "MC209"))


def first_two(step, s, ids, e):
    m = step(ids, e)
    return m & (m.long().cumsum(0) <= 2)


def first_two_dense(step, s, w, ids, e):
    m = (ids == e).any(-1, keepdim=True)
    return step(w, ids, e) * (m.long().cumsum(0) <= 2)


def capacity_weights(step, s, x):
    """Switch style: the position of a token in its expert's queue."""
    w, ids = step(x)
    place = (F.one_hot(ids, s.experts).cumsum(0) * F.one_hot(ids, s.experts)).sum(-1)
    return w * (place <= 2), ids


near(22, wrap(pick=first_two), {BoolMask: "MC209"})
near(22, wrap(weight=first_two_dense), {Dense: "MC209"})
near(22, wrap(sort=lambda step, s, ids: step(ids)[:8]), {Grouped: "MC209"})
near(22, wrap(route=capacity_weights), each(MAIN, EQUAL), "as zero weights")


def strong_pairs(step, s, out, x, w, ids, e, mlp):
    token, slot = s.pick(ids, e)
    keep = w[token, slot] > 0.4
    token, slot = token[keep], slot[keep]
    return s.add(out, s.expert(mlp, x[token], e) * s.weight(w, token, slot), token)


def strong_mask(step, s, out, x, w, ids, e, mlp):
    m = ((ids == e) & (w > 0.4)).any(-1)
    return s.add(out, s.expert(mlp, x[m], e) * s.weight(w, ids, e, m), m)


near(23, wrap(step=strong_pairs), each((Where, Stacked), "MC209"))
near(23, wrap(step=strong_mask), {BoolMask: "MC209"})
near(23, wrap(weight=lambda step, s, w, ids, e: step(w, ids, e) * (step(w, ids, e) > 0.4)), {Dense: "MC209"})
near(23, wrap(matrix=lambda step, s, w, ids: step(w, ids) * (step(w, ids) > 0.4)),
     each((AllEinsum, AllBmm), "MC209"))  # fmt: skip
near(26, wrap(output=lambda step, s, y, e: y * torch.bernoulli(torch.tensor(0.9)).to(y.dtype)),
     each(BASES, "MC205"))  # fmt: skip
