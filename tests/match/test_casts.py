"""Casts between the steps of a layer that make other numbers: once looked through, all of them left alone now."""

from __future__ import annotations

import math

import pytest
import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from support import relative, rewritten
from torch import nn
from torch.nn import functional as F
from tracing import E, K, T, chosen, engine_of, tokens


class Casts(Layer):
    """Every expert on every token; ``gates`` gives the weights ``[T, E]``."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))
        self.w13, self.w2 = self.stack(2 * self.inter, self.hidden), self.stack(self.hidden, self.inter)

    def gates(self, w, ids):
        return torch.zeros(len(ids), self.experts).scatter(1, ids, w)

    def forward(self, x):
        gates = self.gates(*self.router(x))
        return sum(gates[:, e, None] * mlp(x) for e, mlp in enumerate(self.mlps))


class Gathered(Casts):
    """The chosen outputs, summed over the slots."""

    def total(self, y):
        return y.sum(1)

    def forward(self, x):
        w, ids = self.router(x)
        ys = torch.stack([mlp(x) for mlp in self.mlps], 1)
        return self.total(ys.gather(1, ids[..., None].expand(-1, -1, x.shape[1])) * w[..., None])


class Sorted(Casts):
    """Pairs in expert order, each with its own weights."""

    def ids_of(self, rows):
        return rows

    def forward(self, x):
        w, ids = self.router(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        of, token = self.ids_of(flat[order]), order // self.top_k
        gate, up = torch.einsum("rh,rih->ri", x[token], self.w13[of]).chunk(2, -1)
        y = torch.einsum("ri,rhi->rh", F.silu(gate) * up, self.w2[of])
        return torch.zeros_like(x).index_add(0, token, y * w.flatten()[order, None])


class Counted(Casts):
    """Grouped GEMMs over sorted pairs."""

    def ends(self, flat):
        return torch.histc(flat.float(), self.experts, 0, self.experts - 1).cumsum(0)

    def forward(self, x):
        w, ids = self.router(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        token, ends = order // self.top_k, self.ends(flat).to(torch.int32)
        gate, up = torch._grouped_mm(x[token], self.w13.mT, ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w2.mT, ends)
        return torch.zeros_like(x).index_add(0, token, y * w.flatten()[order, None])


class Picked(Casts):
    """Rows are read, added to and written back."""

    def read(self, rows):
        return rows

    def forward(self, x):
        w, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, mlp in enumerate(self.mlps):
            token, slot = torch.where(ids == e)
            out[token] = self.read(out[token]) + mlp(x[token]) * w[token, slot, None]
        return out


def masked(ids, experts, dtype):
    return torch.full((len(ids), experts), -math.inf).to(dtype).float()


LEFT = {
    "masked scores as integers": (Casts, dict(
        gates=lambda s, w, ids: masked(ids, s.experts, torch.float32).scatter(1, ids, 4 * w).int().sigmoid())),
    "minus infinity as int8": (Casts, dict(
        gates=lambda s, w, ids: masked(ids, s.experts, torch.int8).scatter(1, ids, w).softmax(-1))),
    "the numbers of the experts as truth values": (Casts, dict(
        gates=lambda s, w, ids: ((ids[..., None] == torch.arange(s.experts).bool()) * w[..., None]).sum(1))),
    "weights summed as integers": (Casts, dict(
        gates=lambda s, w, ids: (F.one_hot(ids, s.experts) * w[..., None] * 3).sum(1, dtype=torch.int32))),
    "weights summed as truth values": (Casts, dict(
        gates=lambda s, w, ids: F.one_hot(ids, s.experts).sum(1, dtype=torch.bool) * w[:, :1])),
    "outputs summed as integers": (Gathered, dict(total=lambda s, y: y.sum(1, dtype=torch.int32).to(y.dtype))),
    "outputs summed in half precision": (Gathered, dict(total=lambda s, y: y.sum(1, dtype=torch.float16).to(y.dtype))),
    "sorted ids as truth values": (Sorted, dict(ids_of=lambda s, ids: ids.bool().long())),
    "sorted ids as int8": (Sorted, dict(ids_of=lambda s, ids: ids.to(torch.int8).long())),
    "ids counted as truth values": (Counted, dict(
        ends=lambda s, flat: torch.histc(flat.bool().float(), s.experts, 0, s.experts - 1).cumsum(0))),
    "counts as int8": (Counted, dict(ends=lambda s, f: f.bincount(minlength=s.experts).to(torch.int8).cumsum(0))),
    "ends as int8": (Counted, dict(ends=lambda s, f: f.bincount(minlength=s.experts).cumsum(0, dtype=torch.int8))),
    "one-hot rows summed as int8": (Counted, dict(
        ends=lambda s, f: F.one_hot(f, s.experts).sum(0, dtype=torch.int8).cumsum(0, dtype=torch.int32))),
    "rows read as integers": (Picked, dict(read=lambda s, rows: rows.to(torch.int32))),
    "rows read in half precision": (Picked, dict(read=lambda s, rows: rows.half())),
}  # fmt: skip
SAME = {
    "the combine matrix in float64": (Casts, dict(gates=lambda s, w, ids: Casts.gates(s, w, ids).double().float())),
    "sorted ids as int32": (Sorted, dict(ids_of=lambda s, ids: ids.to(torch.int32))),
    "histc": (Counted, {}),
    "counts as float64": (Counted, dict(ends=lambda s, f: f.bincount(minlength=s.experts).double().cumsum(0))),
    "one-hot rows summed as int32": (Counted, dict(
        ends=lambda s, f: F.one_hot(f, s.experts).sum(0, dtype=torch.int32).cumsum(0))),
    "rows read in double precision": (Picked, dict(read=lambda s, rows: rows.double().float())),
    "outputs summed in double precision": (
        Gathered, dict(total=lambda s, y: y.sum(1, dtype=torch.float64).to(y.dtype))),
}  # fmt: skip


def compared(base, changes):
    torch.manual_seed(0)
    layer = type("Near", (base,), changes)().eval()
    if base is Counted:
        layer = layer.bfloat16()
    x = torch.randn(9, layer.hidden, dtype=next(layer.parameters()).dtype) * 2
    outcome = rewritten(layer, x)
    with torch.no_grad():
        assert relative(outcome.out, layer(x)) < (2e-2 if base is Counted else 1e-6)
    return outcome


@pytest.mark.parametrize("name", LEFT)
def test_is_left_alone(name):
    assert compared(*LEFT[name]).ops == []


@pytest.mark.parametrize("name", SAME)
def test_is_rewritten(name):
    outcome = compared(*SAME[name])
    assert outcome.ops == ["experts.default"], outcome.sites


def test_a_count_as_a_truth_value_needs_distinct_ids():
    """An expert that a token names twice counts twice in the sum and once as a truth value."""
    for cast, distinct in ((torch.bool, True), (torch.float32, False)):
        engine, node = engine_of(lambda ids: (ids == 1).sum(1).to(cast), ids=chosen(T, K))  # noqa: B023
        assert engine.fact(node).distinct is distinct


def test_a_number_that_a_dtype_does_not_hold():
    def program(x):
        return [torch.full((T, E), number).to(dtype) for number in (0.0, 1.0, 0.5, -math.inf)
                for dtype in (torch.int32, torch.bool, torch.float16)]  # fmt: skip

    engine, nodes = engine_of(program, x=tokens())
    assert [engine.fact(n) is not None for n in nodes] == [True] * 6 + [False, False, True] * 2
