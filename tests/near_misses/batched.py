"""Base programs that run all experts in one operation."""

from __future__ import annotations

import torch
from steps import Base
from torch.nn import functional as F


class Gathered(Base):
    """gpt-fast: einsum over the weights gathered by the ids; values are ``[T, K, features]``."""

    form = "gathered_weights"
    separate = True

    def build(self):
        self.w1, self.w3 = self.stack(self.inter, self.hidden), self.stack(self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def names(self, ids):
        return ids

    def project(self, x, w):
        return torch.einsum("ti,taoi->tao", x, w)

    def down(self, h, w):
        return torch.einsum("tao,taio->tai", h, w)

    def combine(self, y, w):
        return torch.einsum("tai,ta->ti", y, w)

    def chosen(self, e):
        return (self.ids == e).unsqueeze(-1)

    def mix(self, x, w, ids):
        ids = self.names(ids)
        if self.remembers:
            self.ids = ids
        gate = self.project(self.source(x, None), self.w1[ids])
        up = self.project(self.source(x, None), self.w3[ids])
        return self.combine(self.output(self.down(self.activate(gate, up, None), self.w2[ids]), None), w)


class BatchedMM(Base):
    """transformers' ``batched_mm``: flat pairs ``[P, features]``, ``bmm`` with the gathered weights."""

    form = "gathered_weights"

    def build(self):
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def names(self, ids):
        return ids

    def combine(self, y, w):
        return (y * w.reshape(-1, 1)).view(w.shape[0], self.top_k, -1).sum(dim=1)

    def chosen(self, e):
        return (self.flat == e).unsqueeze(-1)

    def mix(self, x, w, ids):
        flat = self.names(ids).reshape(-1)
        if self.remembers:
            self.flat = flat
        rows = self.source(x, None).repeat_interleave(self.top_k, dim=0)
        h = torch.bmm(self.w13[flat], rows.unsqueeze(-1)).squeeze(-1)
        h = self.activate(*self.split(h), None)
        return self.combine(self.output(torch.bmm(self.w2[flat], h.unsqueeze(-1)).squeeze(-1), None), w)


class AllEinsum(Base):
    """All experts on all tokens by einsum, ``[T, E, features]``, combined by one-hot weights."""

    form = "all_experts"
    separate = True

    def build(self):
        self.w1, self.w3 = self.stack(self.inter, self.hidden), self.stack(self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def matrix(self, w, ids):
        return (F.one_hot(ids, self.experts).to(w.dtype) * w.unsqueeze(-1)).sum(dim=1)

    def combine(self, y, matrix):
        return torch.einsum("teh,te->th", y, matrix)

    def chosen(self, e):
        return (torch.arange(self.experts) == e).view(1, -1, 1)

    def mix(self, x, w, ids):
        x = self.source(x, None)
        h = self.activate(torch.einsum("th,eih->tei", x, self.w1), torch.einsum("th,eih->tei", x, self.w3), None)
        return self.combine(self.output(torch.einsum("tei,ehi->teh", h, self.w2), None), self.matrix(w, ids))


class AllBmm(Base):
    """All experts by ``bmm`` over a repeated input, ``[E, T, features]``, transposed weights, gate and up fused."""

    form = "all_experts"

    def build(self):
        self.w13 = self.stack(self.hidden, 2 * self.inter)
        self.w2 = self.stack(self.inter, self.hidden)

    def matrix(self, w, ids):
        return torch.zeros(w.shape[0], self.experts, dtype=w.dtype).scatter_(1, ids, w)

    def combine(self, y, matrix):
        return (y * matrix.t().unsqueeze(-1)).sum(dim=0)

    def chosen(self, e):
        return (torch.arange(self.experts) == e).view(-1, 1, 1)

    def mix(self, x, w, ids):
        states = self.source(x, None).repeat(self.experts, 1).view(self.experts, -1, self.hidden)
        h = self.activate(*self.split(torch.bmm(states, self.w13)), None)
        return self.combine(self.output(torch.bmm(h, self.w2), None), self.matrix(w, ids))


class Grouped(Base):
    """Sorted pairs through ``torch._grouped_mm``, weighted rows added back; bf16."""

    form = "grouped_mm"

    def build(self):
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)
        self.bfloat16()

    def sort(self, ids):
        return ids.flatten().argsort(stable=True)

    def token(self, order):
        return order // self.top_k

    def counts(self, ids):
        return ids.flatten().bincount(minlength=self.experts)

    def product(self, rows, weight, offs):
        """``_grouped_mm`` (bf16 only), or the same product in float64 for the reference."""
        if rows.dtype is torch.bfloat16:
            return torch._grouped_mm(rows, weight.transpose(-2, -1), offs)
        group = torch.searchsorted(offs, torch.arange(rows.shape[0]), right=True).clamp(max=weight.shape[0] - 1)
        return torch.einsum("ri,roi->ro", rows, weight[group])

    def weight(self, w, order):
        return w.flatten()[order, None]

    def add(self, out, y, token):
        return out.index_add_(0, token, y)

    def chosen(self, e):
        return (self.ids.flatten()[self.order] == e).unsqueeze(-1)

    def mix(self, x, w, ids):
        order = self.sort(ids)
        if self.remembers:
            self.ids, self.order = ids, order
        token = self.token(order)
        offs = self.counts(ids).cumsum(0).to(torch.int32)
        h = self.activate(*self.split(self.product(self.source(x, None)[token], self.w13, offs)), None)
        y = self.output(self.product(h, self.w2, offs), None)
        return self.add(self.start(x), y * self.weight(w, order), token)
