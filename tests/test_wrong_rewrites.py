"""Programs that were once rewritten into something else, and their neighbours: each keeps its own meaning."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns._examples import Layer
from support import relative, rewritten
from torch.nn import functional as F


class Stacks(Layer):
    """Stacked weights; ``forward`` of the subclasses is what is tested."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.w13, self.b13 = self.stack(2 * self.inter, self.hidden), self.stack(2 * self.inter + 5)
        self.w1, self.w3 = self.stack(self.inter, self.hidden), self.stack(self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def routed(self, x):
        return self.router(x)

    def expert(self, e, x):
        return F.linear(F.relu(F.linear(x, self.w1[e])), self.w2[e])

    def gate(self, w, ids, e):
        return (w * (ids == e)).sum(-1, keepdim=True)

    def after(self, e, w, ids):
        """What happens behind expert e."""

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + self.gate(w, ids, e) * self.expert(e, x)
            self.after(e, w, ids)
        return out


class Scattered(Stacks):
    """The weights of ``routed`` scattered to ``[T, E]``."""

    def forward(self, x):
        w, ids = self.routed(x)
        dense = torch.zeros(x.shape[0], self.experts).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + dense[:, e, None] * self.expert(e, x)
        return out


class SliceOfABias(Stacks):
    """The bias is a slice, and its second half belongs to the gate."""

    def expert(self, e, x):
        h = F.linear(x, self.w13[e]) + self.b13[e][3 : 3 + 2 * self.inter]
        up, gate = h.chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.w2[e])


class WeightsWrittenThroughAView(Stacks):
    def routed(self, x):
        w, ids = self.router(x)
        w = w.clone()
        self.first = w[:, 0]
        return w, ids

    def after(self, e, w, ids):
        if e == 1:
            self.first.mul_(3)


class IdsWrittenThroughAView(Stacks):
    def routed(self, x):
        w, ids = self.router(x)
        ids = ids.clone()
        self.first = ids[:, 0]
        return w, ids

    def after(self, e, w, ids):
        if e == 1:
            self.first.sub_(2)


class IdsOverwritten(Scattered):
    """After the write a token names expert 0 twice: ``scatter`` keeps one weight."""

    def routed(self, x):
        w, ids = self.router(x)
        ids = ids.clone()
        ids[:, 0] = 0
        return w, ids


class TwoHeads(Scattered):
    """Two choices of one expert each, side by side: they may be the same expert."""

    def routed(self, x):
        scores = torch.cat([self.router.gate(x), self.router.gate(x.flip(-1))], -1).view(-1, self.experts)
        w, ids = scores.softmax(-1).topk(1, -1)
        return w.reshape(-1, 2), ids.reshape(-1, 2)


class IdsAsTruth(Stacks):
    def gate(self, w, ids, e):
        return (w * (ids.bool().long() == e)).sum(-1, keepdim=True)


class OverflowInside(Stacks):
    def expert(self, e, x):
        h = (F.linear(x, self.w1[e]) * 300).to(torch.float16) * 300
        return F.linear(h.to(x.dtype).clamp(-1e30, 1e30), self.w2[e])


class LimitThatIsATensor(Stacks):
    def expert(self, e, x):
        return F.linear(torch.clamp(F.linear(x, self.w1[e]), max=F.linear(x, self.w3[e])), self.w2[e])


class CopyBeforeAWrite(Stacks):
    """The experts read a copy; what it was copied from is written afterwards."""

    def forward(self, x):
        x = x * 1.0
        kept = x.clone()
        w, ids = self.router(x)
        x.mul_(2)
        y = torch.bmm(F.relu(torch.bmm(kept.unsqueeze(0).expand(self.experts, -1, -1), self.w1.mT)), self.w2.mT)
        dense = torch.zeros(x.shape[0], self.experts).scatter(1, ids, w)
        return (y * dense.t().unsqueeze(-1)).sum(0) + x


class CopyWritten(Stacks):
    def forward(self, x):
        kept = x.clone()
        kept[:, 0] = 5.0
        w, ids = self.router(x)
        y = torch.bmm(F.relu(torch.bmm(kept.unsqueeze(0).expand(self.experts, -1, -1), self.w1.mT)), self.w2.mT)
        dense = torch.zeros(x.shape[0], self.experts).scatter(1, ids, w)
        return (y * dense.t().unsqueeze(-1)).sum(0)


class SameTextOtherValue(Stacks):
    """``w * w`` twice, with a write in between: two values, although one expression."""

    def routed(self, x):
        w, ids = self.router(x)
        w = w.clone()
        first = w[:, 0]
        before = w * w
        first.mul_(2)
        return (before, w * w), ids

    def gate(self, w, ids, e):
        return (w[e % 2] * (ids == e)).sum(-1, keepdim=True)


class SameTextOtherInput(Stacks):
    def forward(self, x):
        w, ids = self.router(x)
        x = x.clone()
        first = x[:, 0]
        inputs = [x * 1.5]
        first.mul_(2)
        inputs.append(x * 1.5)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + self.gate(w, ids, e) * self.expert(e, inputs[e % 2])
        return out


class SameTextOtherIds(Stacks):
    def routed(self, x):
        w, ids = self.router(x)
        ids = ids.clone()
        first = ids[:, 0]
        before = ids + 0
        first.copy_(ids[:, 1])
        return w, (before, ids + 0)

    def gate(self, w, ids, e):
        return (w * (ids[e % 2] == e)).sum(-1, keepdim=True)


class CombineMatrixWritten(Stacks):
    def forward(self, x):
        w, ids = self.router(x)
        dense = torch.zeros(x.shape[0], self.experts).scatter(1, ids, w)
        dense[:, 1].mul_(2)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + dense[:, e, None] * self.expert(e, x)
        return out


REWRITTEN = (LimitThatIsATensor, CopyBeforeAWrite, CopyWritten, IdsAsTruth)
REFUSED = (
    SliceOfABias, WeightsWrittenThroughAView, IdsWrittenThroughAView, IdsOverwritten, TwoHeads, OverflowInside,
    CombineMatrixWritten, SameTextOtherValue, SameTextOtherInput, SameTextOtherIds,
)  # fmt: skip


@pytest.mark.parametrize("layer_class", REWRITTEN + REFUSED)
@pytest.mark.parametrize("tokens", [6, 4])
def test_keeps_its_meaning(layer_class, tokens):
    torch.manual_seed(0)
    layer = layer_class(hidden=16, inter=16, experts=4, top_k=2).eval()
    x = torch.randn(tokens, 16)
    with torch.no_grad():
        original = layer(x)
    outcome = rewritten(layer, x)
    assert relative(outcome.out, original) < 1e-6
    ended = {"experts.default", "combine.default"} & set(outcome.ops)
    assert bool(ended) == (layer_class in REWRITTEN), outcome.sites


class Turned(Stacks):
    """``[B, S, H]`` in, ``[S, B, H]`` out."""

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros(x.shape[1], x.shape[0], x.shape[2])
        for e in range(self.experts):
            out = out + (self.gate(w, ids, e) * self.expert(e, x)).transpose(0, 1)
        return out


class CastToDevice(Stacks):
    """Whole numbers at the end, by a cast that names the device too."""

    def forward(self, x):
        return super().forward(x).to(x.device, torch.int32).to(x.dtype)


class CountsTruths(Stacks):
    def expert(self, e, x):
        h = F.linear(x, self.w1[e])
        return F.linear((h > 0).float() + (h > 0.2).float(), self.w2[e])


class SomeColumns(Stacks):
    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            y = self.expert(e, x[token]) * w[token, slot, None]
            out.scatter_add_(0, token[:, None].expand(-1, self.hidden // 2), y)
        return out


class Rows(Stacks):
    """Rows of one expert at a time; ``add`` is what is tested."""

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out = self.add(out, token, self.expert(e, x[token]) * w[token, slot, None], ids, e)
        return out


class ShuffledColumns(Rows):
    def add(self, out, token, y, ids, e):
        y = y.view(-1, 4, self.hidden // 4).transpose(1, 2).reshape(-1, self.hidden)
        return out.index_add(0, token, y)


class ShuffledColumnsPut(Rows):
    def add(self, out, token, y, ids, e):
        y = y.view(-1, 4, self.hidden // 4).transpose(1, 2).reshape(-1, self.hidden)
        return out.index_put((token,), y, accumulate=True)


class AddedTwice(Rows):
    def add(self, out, token, y, ids, e):
        return out.index_put((token[:, None].expand(-1, 2),), y[:, None], accumulate=True)


class RepeatedRows(Stacks):
    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            token, slot = token.repeat(2), slot.repeat(2)
            out = out.index_add(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class FirstRow(Stacks):
    """The first token that chose the expert, not all."""

    def __init__(self):
        super().__init__(top_k=1)

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token = (ids[:, 0] == e).nonzero()[0]
            out = out.index_add(0, token, self.expert(e, x[token]) * w[token])
        return out


class LostTerms(Stacks):
    """``out[token] += y`` over all pairs in expert order: of a token's pairs one term stays."""

    def forward(self, x):
        w, ids = self.routed(x)
        order = ids.flatten().argsort(stable=True)
        token, of = order // ids.shape[1], ids.flatten()[order]
        y = F.relu(torch.einsum("rh,rih->ri", x[token], self.w1[of]))
        y = torch.einsum("ri,rhi->rh", y, self.w2[of]) * w.flatten()[order][:, None]
        out = torch.zeros_like(x)
        out[token] += y
        return out


class OverTokens(Stacks):
    """The weights of all tokens in one row: everybody's last choice weighs everybody."""

    def forward(self, x):
        w, ids = self.routed(x)
        gates = torch.zeros(self.experts).scatter_add(0, ids.flatten(), w.flatten())
        return sum(gates[e] * self.expert(e, x) for e in range(self.experts))


class ColumnAsBias(Stacks):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.wide = self.stack(self.inter, self.hidden + 1)

    def expert(self, e, x):
        return F.linear(F.relu(F.linear(x, self.wide[e][:, :-1], self.wide[e][:, -1])), self.w2[e])


class Outer(Stacks):
    def expert(self, e, x):
        h, u = F.linear(x, self.w1[e]), F.linear(x, self.w3[e])
        return F.linear((F.relu(h)[:, :, None] * u[:, None, :])[:, 0], self.w2[e])


class Exclusive(Stacks):
    def expert(self, e, x):
        h = F.linear(x, self.w1[e])
        return F.linear(((h > 0) ^ (h > 0.2)).float() * h, self.w2[e])


class MaskAsNumbers(Stacks):
    """Zeros and ones pick the first two rows, again and again."""

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            rows = (ids == e).any(-1).long()
            out[rows] += self.gate(w, ids, e)[rows] * self.expert(e, x[rows])
        return out


class WeightsWritten(Stacks):
    """What is read of the doubled weights is their shape, but another view of them is read, too."""

    def forward(self, x):
        w, ids = self.routed(x)
        copy = w.clone()
        view, out = copy.view(-1, self.top_k), torch.zeros_like(x)
        doubled = copy.mul_(2)
        for e in range(self.experts):
            token, slot = torch.where((ids == e).expand_as(doubled))
            out = out.index_add(0, token, self.expert(e, x[token]) * view[token, slot, None])
        return out


class ReadBeforeContiguous(Stacks):
    """``out[hit] = ..`` has no value; ``out.contiguous()`` has it, after ``out`` was read."""

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            hit = (ids == e).any(-1)
            out[hit] += self.gate(w, ids, e)[hit] * self.expert(e, x[hit])
        more = out + 1
        return torch.cat([out.contiguous(), more])


class SpreadWeightsReturned(Stacks):
    """The buffer is written in place, what is made of it is read inside the layer and behind it."""

    def forward(self, x):
        w, ids = self.routed(x)
        dense = torch.zeros(x.shape[0], self.experts)
        dense[torch.arange(x.shape[0])[:, None], ids] = w
        gates = dense * 2
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + gates[:, e, None] * self.expert(e, x)
        return torch.cat([out.flatten(), gates.sum(0)])


class ViewOfSpreadWeights(Stacks):
    """Likewise through a view that is older than the write."""

    def forward(self, x):
        w, ids = self.routed(x)
        dense = torch.zeros(x.shape[0], self.experts)
        turned = dense.t()
        dense.scatter_(1, ids, w)
        scaled = turned * 3
        gates = scaled.t()
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + gates[:, e, None] * self.expert(e, x)
        return torch.cat([out.flatten(), scaled.sum(1)])


class WrittenBeforeProjection(Stacks):
    """The border is the projection that the experts share; a write in front of it belongs to nobody's layer."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.project = torch.nn.Parameter(torch.randn(self.hidden, self.hidden) / 6)

    def forward(self, x):
        kept = torch.zeros_like(x)
        kept[torch.arange(x.shape[0])] = torch.sin(x)
        x = torch.cos(x + kept * 3)
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + self.gate(w, ids, e) * self.expert(e, F.linear(x, self.project))
        return out


class LayerBeforeProjection(WrittenBeforeProjection):
    """The same behind a layer that stays as it is: its experts look at other tokens."""

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            y = self.expert(e, x[token])
            out[token] += (y - y.mean(0)) * w[token, slot, None]
        return super().forward(x + out)


FOUND = [
    Turned, CastToDevice, CountsTruths, SomeColumns, ShuffledColumns, ShuffledColumnsPut, AddedTwice, RepeatedRows,
    FirstRow, LostTerms, OverTokens, ColumnAsBias, Outer, Exclusive, MaskAsNumbers, WeightsWritten,
    ReadBeforeContiguous, SpreadWeightsReturned, ViewOfSpreadWeights, WrittenBeforeProjection, LayerBeforeProjection,
]  # fmt: skip


@pytest.fixture
def one_thread():
    """Rows written to one place: with several threads the last of them differs from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", FOUND)
def test_found_by_unit_tests_of_the_guards(kind, one_thread):
    torch.manual_seed(0)
    layer = kind().eval()
    x = torch.randn(2, 3, layer.hidden) if kind is Turned else torch.randn(50, layer.hidden)  # each expert is chosen
    with torch.no_grad():
        expected = layer(x)
        ours = rewritten(layer, x)
    assert relative(ours.out, expected) < 1e-5


@pytest.mark.parametrize("kind", [SpreadWeightsReturned, WrittenBeforeProjection, LayerBeforeProjection])
def test_the_writes_that_something_else_needs_stay(kind):
    torch.manual_seed(0)
    layer = kind(experts=12).eval()  # loops over more than eight experts are traced for two of them
    x = torch.randn(50, layer.hidden)
    with torch.no_grad():
        ours = rewritten(layer, x)
        assert relative(ours.out, layer(x)) < 1e-5
    assert ours.ops == ["experts.default"]
