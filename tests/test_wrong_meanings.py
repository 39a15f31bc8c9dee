"""More programs that were once rewritten wrongly: unseen writes, lists too short, turned tokens, lost digits."""

from __future__ import annotations

import pytest
import torch
from support import relative, rewritten
from test_wrong_rewrites import Stacks
from torch.nn import functional as F


@torch.library.custom_op("moe_compile_tests::triple", mutates_args=("values",))
def triple(source: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    values.mul_(3)
    return source + 1


@triple.register_fake
def _(source, values):
    return torch.empty_like(source)


# --- writes ---------------------------------------------------------------------------------------------------


class Written(Stacks):
    """The router weights change after expert 1."""

    def routed(self, x):
        w, ids = self.router(x)
        return w.clone(), ids

    def after(self, e, w, ids):
        if e == 1:
            self.write(w)


class WrittenThroughAList(Written):
    def write(self, w):
        torch._foreach_mul_([w], 2.0)


class WrittenAsOut(Written):
    def write(self, w):
        torch.mul(w, 2, out=w.view_as(w))


class WrittenByAnOp(Written):
    def write(self, w):
        triple(w, w)


class WrittenThroughADiagonal(Written):
    def write(self, w):
        w.diagonal().mul_(3)


# --- what experts share -----------------------------------------------------------------------------------------


class Shared(Stacks):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.project = torch.nn.Parameter(torch.randn(self.hidden, self.hidden) / self.hidden**0.5)


class InputBesideTheProjection(Shared):
    def expert(self, e, x):
        h = F.linear(x, self.project)
        return F.linear(F.silu(F.linear(h, self.w1[e])) * F.linear(x, self.w3[e]), self.w2[e])


class OneExpertReadsAnother(Shared):
    def expert(self, e, x):
        h = F.linear(x, self.project)
        return super().expert(e, F.silu(h) if e == 1 else h)


class WeightedBeforeTheProjection(Shared):
    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            h = F.silu(F.linear(x * self.gate(w, ids, e), self.project))
            out = out + F.linear(F.relu(F.linear(h, self.w1[e])), self.w2[e])
        return out


class ProjectionTurned(Shared):
    """As many tokens as features: the projection of the tokens, turned, has the shape of the hidden states."""

    def forward(self, x):
        w, ids = self.routed(x)
        h = torch.einsum("th,ph->pt", x, self.project)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            out = out + self.gate(w, ids, e) * self.expert(e, h.t())
        return out


# --- lists of experts ----------------------------------------------------------------------------------------------


class Listed(Stacks):
    """A loop over the experts that ``hit`` finds: the truth per expert."""

    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        hit = self.hit(ids).nonzero()
        for row in hit:
            e = row[0]
            token, slot = torch.where(ids == e)
            y = F.linear(F.relu(F.linear(x[token], self.w1[e])), self.w2[e])
            out.index_add_(0, token, y * w[token, slot, None])
        return out

    def hit(self, ids):
        return ids.flatten().bincount(minlength=self.experts) > 0


class FirstTwo(Listed):
    def hit(self, ids):
        return ids.flatten().bincount(minlength=self.experts)[:2] > 0


class FirstTwoBins(Listed):
    def hit(self, ids):
        return torch.histc(ids.flatten().float(), 2, 0, 1) > 0


class FirstTwoBinsCut(Listed):
    """A slice beyond the end of the counts makes them no longer."""

    def hit(self, ids):
        return torch.histc(ids.flatten().float(), 2, 0, 1)[:4] > 0


class FirstTwoTruths(Listed):
    def hit(self, ids):
        return F.one_hot(ids, self.experts)[..., :2].sum((0, 1)) > 0


class KeptDimension(Listed):
    """The first column of the list is that of a dimension of one, not of the experts."""

    def hit(self, ids):
        return F.one_hot(ids, self.experts).flatten(0, 1).bool().any(0, keepdim=True)


class HitInTheFirstSlot(Listed):
    """Experts that only stand in second places are left out."""

    def routed(self, x):
        w, ids = self.router(x)
        return w, ids.sort(-1).values * 0 + torch.tensor([0, 1])

    def hit(self, ids):
        return F.one_hot(ids, self.experts)[:, 0].bool().any(0)


class Dropped(Stacks):
    """Ids of -1 stand in front of the sorted ids, but the counts leave them out."""

    def forward(self, x):
        w, ids = self.routed(x)
        ids = torch.where(w > 0.45, ids, -1)
        order = ids.flatten().argsort(stable=True)
        ends = torch.histc(ids.flatten().float(), self.experts, 0, self.experts - 1).long().cumsum(0).tolist()
        token, out, start = order // ids.shape[1], torch.zeros_like(x), 0
        for e, end in enumerate(ends):
            rows = token[start:end]
            out.index_add_(0, rows, self.expert(e, x[rows]) * w.flatten()[order[start:end], None])
            start = end
        return out


# --- rows and tokens ------------------------------------------------------------------------------------------------


class TurnedMask(Stacks):
    """Tokens counted sequence first, read batch first."""

    def forward(self, x):
        w, ids = self.routed(x)
        flat, out = x.reshape(-1, self.hidden), torch.zeros_like(x).reshape(-1, self.hidden)
        weights = w.reshape(-1, self.top_k)
        for e in range(self.experts):
            token, slot = torch.where((ids == e).transpose(0, 1).reshape(-1, self.top_k))
            out = out.index_add(0, token, self.expert(e, flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class TurnedScores(Stacks):
    """Each token is weighted by the scores of its mirror image."""

    def forward(self, x):
        _, ids = self.routed(x)
        scores = self.router.gate(x).sigmoid()
        out = torch.zeros_like(x)
        for e in range(self.experts):
            chosen = (ids == e).any(-1).transpose(0, 1)
            out = out + (chosen * scores[..., e]).transpose(0, 1)[..., None] * self.expert(e, x)
        return out


class FeaturesByIds(Stacks):
    """The ids pick outputs for features, not for tokens; there are as many of both."""

    def forward(self, x):
        w, ids = self.routed(x)
        h = F.relu(torch.einsum("th,eih->tei", x, self.w1))
        y = torch.einsum("tei,ehi->teh", h, self.w2).permute(2, 1, 0)
        picked = y[torch.arange(self.hidden)[:, None], ids]  # [H, K, T]
        return (picked.permute(2, 1, 0) * w[..., None]).sum(1)


class Twice(Stacks):
    """Some tokens name an expert twice."""

    def routed(self, x):
        w, ids = self.router(x)
        return w, torch.where(torch.arange(x.shape[0])[:, None] % 2 == 0, ids[:, :1].expand(-1, 2), ids)


class SummedWeightPerPair(Twice):
    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            pair = torch.where((ids == e).flatten())[0]
            weighted = (x * self.gate(w, ids, e)).repeat_interleave(2, 0)
            out = out.index_add(0, pair // 2, self.expert(e, weighted[pair]))
        return out


class SummedWeightPerSlot(Twice):
    def forward(self, x):
        w, ids = self.routed(x)
        out = torch.zeros_like(x)
        for k in range(2):
            for e in range(self.experts):
                mask = ids[:, k] == e
                out[mask] += self.gate(w, ids, e)[mask] * self.expert(e, x[mask])
        return out


# --- digits -----------------------------------------------------------------------------------------------------------


class HalfNumbers(Stacks):
    """bfloat16 does not know 257: the ids are rounded when they are compared."""

    def __init__(self):
        super().__init__(hidden=16, inter=8, experts=280)

    def forward(self, x):
        w, ids = self.routed(x)
        mask = ids[..., None] == torch.arange(self.experts, dtype=torch.bfloat16)
        gates = (mask * w[..., None]).sum(1)
        h = F.relu(torch.einsum("th,eih->tei", x, self.w1))
        return (torch.einsum("tei,ehi->teh", h, self.w2) * gates[..., None]).sum(1)


class DoubleInside(Stacks):
    def expert(self, e, x):
        h = F.linear(x, self.w1[e]).double()
        return F.linear(((h + 1e9) - 1e9).relu().to(x.dtype), self.w2[e])


@torch._dynamo.allow_in_graph
def doubled(x, w, ids, w1, w2):
    """One node of Dynamo's graph; its last step comes after the sum."""
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        out += (w * (ids == e)).sum(-1, keepdim=True) * F.linear(F.relu(F.linear(x, w1[e])), w2[e])
    return out * 2


class InsideOneNode(Stacks):
    def forward(self, x):
        return doubled(x, *self.routed(x), self.w1, self.w2)


def test_the_whole_list_is_rewritten():
    layer = Listed().eval()
    assert rewritten(layer, torch.randn(32, layer.hidden)).ops == ["experts.default"]


PROGRAMS = [
    WrittenThroughAList, WrittenAsOut, WrittenByAnOp, WrittenThroughADiagonal,
    InputBesideTheProjection, OneExpertReadsAnother, WeightedBeforeTheProjection, ProjectionTurned,
    FirstTwo, FirstTwoBins, FirstTwoBinsCut, FirstTwoTruths, KeptDimension, HitInTheFirstSlot, Dropped,
    TurnedMask, TurnedScores, FeaturesByIds, SummedWeightPerPair, SummedWeightPerSlot,
    HalfNumbers, DoubleInside, InsideOneNode,
]  # fmt: skip


@pytest.mark.parametrize("kind", PROGRAMS)
def test_keeps_its_meaning(kind):
    torch.manual_seed(0)
    layer = kind().eval()
    shape = {TurnedMask: (2, 3), TurnedScores: (3, 3), HalfNumbers: (700,)}.get(kind, (32,))
    x = torch.randn(*shape, layer.hidden)
    with torch.no_grad():
        expected = layer(x)
        ours = rewritten(layer, x)
    assert relative(ours.out, expected) < 1e-5


class Asserted(Stacks):
    def expert(self, e, x):
        h = F.linear(x, self.w1[e])
        torch._assert_async((h < 0).all())
        return F.linear(F.relu(h), self.w2[e])


def test_a_users_assertion_still_fails():
    torch.manual_seed(0)
    layer = Asserted().eval()
    with pytest.raises(RuntimeError):
        rewritten(layer, torch.randn(5, layer.hidden))
