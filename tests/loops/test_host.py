"""Numbers that a loop fetches to the host: lists of indices, counts, borders of groups that are written in place."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import relative, rewritten
from torch import nn


class Base(Layer):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def sorted(self, x):
        """Weights, flat ids, their order by expert, and the rows in that order."""
        w, ids = self.router(x)
        order = ids.flatten().argsort(stable=True)
        return w, ids.flatten(), order, x[order // self.top_k]

    def back(self, x, w, order, y):
        """Rows in expert order added to their tokens."""
        return torch.zeros_like(x).index_add(0, order // self.top_k, (y * w.flatten()[order, None]).to(x.dtype))


class Lists(Base):
    """Indices as lists of numbers, without a name of their own."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            y = self.mlps[e](x[token.tolist()]) * w[token.tolist(), slot.cpu().numpy(), None]
            out.index_add_(0, token, y)
        return out


class WrittenAfterwards(Base):
    """A list is a copy: what is written to its tensor later does not reach it."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            token = token.clone()  # token and slot are columns of one tensor
            listed = token.tolist()
            index = token.clone()
            token.fill_(0)
            out.index_add_(0, index, self.mlps[e](x[listed]) * w[listed, slot, None])
        return out


class ReadBefore(Base):
    """The list of the round before is read before this round's is made."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        listed = [0]
        for e in range(self.experts):
            out = out + x[listed].sum() * 0.1 + len(listed)
            token, slot = torch.where(ids == e)
            listed = token.tolist()
            out.index_add_(0, token, self.mlps[e](x[listed]) * w[listed, slot, None])
        return out


class ListOfLists(Base):
    """A list of a matrix indexes otherwise than the matrix does."""

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            two = torch.stack([token[:1], slot[:1]])
            out.index_add_(0, token, self.mlps[e](x[token.tolist()]) * w[token, slot, None])
            out = out + x[two.tolist()].sum()
        return out


class Split(Base):
    """``split`` by counts without a name."""

    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        chunks = rows.split(ids.bincount(minlength=self.experts).tolist())
        ys = torch.cat([mlp(c) for mlp, c in zip(self.mlps, chunks, strict=True)])
        return self.back(x, w, order, ys)


class Stored(Base):
    """Groups written into a buffer; the steps are methods to override."""

    dtype = torch.float32

    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        counts = ids.bincount(minlength=self.experts)
        y, start = torch.zeros_like(rows, dtype=self.dtype), 0
        for e, count in enumerate(counts.tolist()):
            end = start + count
            y[start:end] = self.mlps[e](rows[start:end])
            start = end
        return self.back(x, w, order, y)


class StoredWide(Stored):
    """The buffer is wider than what is written into it."""

    dtype = torch.float64


class CountsWrittenAfterwards(Base):
    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        counts = ids.bincount(minlength=self.experts)
        y, start = torch.zeros_like(rows), 0
        numbers = counts.tolist()
        counts.copy_(counts.flip(0))
        for e, count in enumerate(numbers):
            end = start + count
            y[start:end] = self.mlps[e](rows[start:end])
            start = end
        return self.back(x, w, order, y)


class StoredSome(Base):
    """The rows of expert 1 stay zero."""

    missing = 1

    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        counts = ids.bincount(minlength=self.experts)
        y, start = torch.zeros_like(rows), 0
        for e, count in enumerate(counts.tolist()):
            end = start + count
            if e != self.missing:
                y[start:end] = self.mlps[e](rows[start:end])
            start = end
        return self.back(x, w, order, y)


class StoredAllButLast(StoredSome):
    missing = 3


class StoredTwice(Base):
    """Expert 1's rows replace those of expert 0."""

    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        counts = ids.bincount(minlength=self.experts)
        y, start = torch.zeros_like(rows), 0
        for e, count in enumerate(counts.tolist()):
            end = start + count
            y[start:end] = self.mlps[e](rows[start:end])
            y[start:end] = self.mlps[(e + 1) % 4](rows[start:end])
            start = end
        return self.back(x, w, order, y)


class StoredAndRead(Base):
    """The buffer is read while it is not yet full, by another name."""

    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        counts = ids.bincount(minlength=self.experts)
        y, start = torch.zeros_like(rows), 0
        same, total = y, 0.0
        for e, count in enumerate(counts.tolist()):
            end = start + count
            y[start:end] = self.mlps[e](rows[start:end])
            start = end
            total = total + same.sum()
        return self.back(x, w, order, y) + total


class StoredOverAll(Base):
    """One row is written again when all are there."""

    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        counts = ids.bincount(minlength=self.experts)
        y, start = torch.zeros_like(rows), 0
        for e, count in enumerate(counts.tolist()):
            end = start + count
            y[start:end] = self.mlps[e](rows[start:end])
            start = end
        y[0] = 1.0
        return self.back(x, w, order, y)


class StoredElsewhere(Base):
    """The groups of one routing decision are written at the places of another that counts alike."""

    def forward(self, x):
        w, ids, order, rows = self.sorted(x)
        counts = ids.bincount(minlength=self.experts)
        others = ids.flip(0).bincount(minlength=self.experts)
        y, start, begin = torch.zeros_like(rows), 0, 0
        places = others.tolist()
        for e, count in enumerate(counts.tolist()):
            end, last = start + count, begin + places[e]
            y[begin:last] = self.mlps[e](rows[start:end])
            start, begin = end, last
        return self.back(x, w, order, y)


def compared(kind):
    torch.manual_seed(0)
    layer = kind().eval()
    x = torch.randn(9, layer.hidden)
    outcome = rewritten(layer, x)
    with torch.no_grad():
        assert relative(outcome.out, layer(x)) < 1e-6
        other = torch.randn(9, layer.hidden)
        assert relative(outcome.call(other), layer(other)) < 1e-6
    return outcome


@pytest.mark.parametrize("kind", [Lists, WrittenAfterwards, Split, Stored, CountsWrittenAfterwards])
def test_is_rewritten(kind):
    outcome = compared(kind)
    assert outcome.ops == ["experts.default"] and len(outcome.graphs) == 1, outcome.sites


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "kind",
    [ReadBefore, ListOfLists, StoredWide, StoredSome, StoredAllButLast, StoredTwice,
     StoredAndRead, StoredOverAll, StoredElsewhere],
)
def test_is_left_alone_and_right(kind):
    assert compared(kind).ops == []


def test_a_list_outside_of_any_layer_keeps_its_numbers():
    """Once ``listed`` was the tensor itself, and saw what was written to it later."""

    def program(x, index):
        listed = index.tolist()
        index.add_(1)
        out = torch.zeros(x.shape[1])
        for e in range(2):
            out = out + x[listed].sum(0) * e
        return out

    x, index = torch.randn(6, 4), torch.tensor([0, 2, 3])
    expected = program(x, index.clone())
    assert torch.equal(torch.compile(program, backend="moe_compile")(x, index.clone()), expected)
