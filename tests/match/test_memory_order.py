"""The result lies in memory as the original's: ``view`` and ``as_strided`` behind the layer may look."""

from __future__ import annotations

import pytest
import torch
from moe_compile.patterns._examples import Layer
from support import relative, rewritten
from torch import fx
from torch.nn import functional as F

from moe_compile.layout import memory_order, order_of_result
from moe_compile.spec import NoMatch


class Loop(Layer):
    """A dense loop over stacked experts into ``buffer(x)``."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.w1, self.w2 = self.stack(self.inter, self.hidden), self.stack(self.hidden, self.inter)

    def buffer(self, x):
        return torch.zeros_like(x)

    def fill(self, x, out):
        w, ids = self.router(x)
        for e in range(self.experts):
            y = F.linear(F.relu(F.linear(x, self.w1[e])), self.w2[e])
            out += (w * (ids == e)).sum(-1, keepdim=True) * y
        return out

    def forward(self, x):
        return self.fill(x, self.buffer(x))


class Viewed(Loop):
    def forward(self, x):
        return super().forward(x).t().view(-1)


class Strided(Loop):
    def forward(self, x):
        return super().forward(x).as_strided((8,), (1,))


class SequenceFirst(Loop):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1).view(-1, self.hidden)


class Residual(Loop):
    def forward(self, x):
        return (x + super().forward(x)).t().view(-1)


class IntoColumns(Loop):
    """The buffer is a part of a wider one, so its rows have gaps."""

    def buffer(self, x):
        return x.new_zeros(x.shape[0], 2 * self.hidden)[:, : self.hidden]


class Reordered(Loop):
    """What was allocated in columns is read as rows."""

    def forward(self, x):
        out = x.new_zeros(self.hidden, x.shape[0]).t()
        self.fill(x, out)
        return out.t().view(-1), out


COLUMNS = [Loop, Viewed, Strided, Residual, Reordered]


def compared(kind, x, dynamic=None):
    torch.manual_seed(0)
    layer = kind().eval()
    with torch.no_grad():
        expected = layer(x)
        ours = rewritten(layer, x, dynamic=dynamic)
    pairs = list(zip(ours.out, expected, strict=True)) if isinstance(expected, tuple) else [(ours.out, expected)]
    for mine, theirs in pairs:
        assert mine.stride() == theirs.stride()
        assert relative(mine, theirs) < 1e-5
    return ours


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", COLUMNS)
def test_tokens_in_columns(kind, dynamic):
    hidden = Layer().hidden
    ours = compared(kind, torch.randn(hidden, 6).t(), dynamic)
    if kind is not Reordered:
        assert ours.ops == ["experts.default"], ours.sites


def test_sequence_first():
    x = torch.randn(3, 4, Layer().hidden)
    assert compared(SequenceFirst, x).ops == ["experts.default"]


def test_rows_of_a_wider_input():
    """``zeros_like`` of rows with gaps has none."""
    x = torch.randn(6, 2 * Layer().hidden)[:, : Layer().hidden]
    assert compared(Loop, x).ops == ["experts.default"]


def test_a_buffer_with_gaps_stays():
    ours = compared(IntoColumns, torch.randn(6, Layer().hidden))
    assert ours.ops == [] and ours.sites


def node_of(*values):
    graph = fx.Graph()
    for i, v in enumerate(values):
        graph.placeholder(f"p{i}").meta["val"] = v
    return list(graph.nodes)


@pytest.mark.parametrize(
    ("value", "order"),
    [
        (torch.empty(2, 3, 4), (0, 1, 2)),
        (torch.empty(4, 3, 2).permute(2, 0, 1), (1, 2, 0)),
        (torch.empty(3, 1, 4).transpose(0, 2), (2, 1, 0)),
        (torch.empty_strided((1, 4), (1, 1)), (0, 1)),
        (torch.empty(0, 5).t(), (0, 1)),
        (torch.empty(()), ()),
    ],
)
def test_memory_order(value, order):
    found = memory_order(*node_of(value))
    assert found == order
    places = [found.index(d) for d in range(value.dim())]
    again = torch.empty(value.shape).permute(found).contiguous().permute(places)
    assert again.shape == value.shape
    real = [(a, b) for n, a, b in zip(value.shape, again.stride(), value.stride(), strict=True) if n > 1]
    assert value.numel() == 0 or all(a == b for a, b in real)


@pytest.mark.parametrize("value", [torch.empty(4, 6)[:, :3], torch.empty(1, 3).expand(4, 3), torch.empty(8)[::2]])
def test_gaps_and_overlaps(value):
    with pytest.raises(NoMatch, match="strides") as caught:
        memory_order(*node_of(value))
    assert caught.value.code == "MC407"


def test_a_buffer_in_two_orders():
    rows, columns, flat = node_of(torch.empty(4, 6), torch.empty(6, 4).t(), torch.empty(24))
    assert order_of_result(rows, [rows, flat]) == (0, 1)
    assert order_of_result(columns, [columns]) == (1, 0)
    for result, alias in ((rows, columns), (columns, rows), (columns, flat)):
        with pytest.raises(NoMatch, match="another") as caught:
            order_of_result(result, [alias])
        assert caught.value.code == "MC407"
