"""Dynamic-shape capture is on for our backend only, and never turns a graph break into a crash."""

from __future__ import annotations

import torch
import torch._dynamo
from moe_compile.patterns.index_add_loop import WhereIndexAdd
from support import rewritten
from torch import nn

from moe_compile import capture, torch_compat


def graphs_under(backend_name_or_fn, model, x):
    torch._dynamo.reset()
    seen = []

    def count(gm, inputs, **_):
        seen.append(gm)
        return gm.forward

    if backend_name_or_fn == "ours":
        capture.install(count)
    with torch.no_grad():
        torch.compile(model, backend=count)(x)
    return len(seen)


def test_a_range_loop_is_one_graph_for_us_and_several_for_others():
    layer, x = WhereIndexAdd().eval(), torch.randn(6, 32)
    assert graphs_under("ours", layer, x) == 1
    assert graphs_under("other", layer, x) > 1
    assert torch._dynamo.config.capture_dynamic_output_shape_ops is False


class Split(nn.Module):
    """Counts on the host: a graph break without the flag, a crash inside Dynamo with it."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, ids):
        order = ids.argsort()
        counts = torch.bincount(ids, minlength=4).tolist()
        parts = x[order].split(counts)
        return torch.cat([mlp(p) for mlp, p in zip(self.mlps, parts, strict=True)])


def test_counts_on_the_host_still_break_the_graph_instead_of_crashing():
    layer, x, ids = Split().eval(), torch.randn(12, 8), torch.arange(12) % 4
    outcome = rewritten(layer, x, ids)
    with torch.no_grad():
        torch.testing.assert_close(outcome.out, layer(x, ids))


def test_unique_on_the_host_still_works():
    def hit_experts(ids):
        return sum(ids.unique().tolist())

    ids = torch.tensor([3, 1, 3, 0])
    assert rewritten(hit_experts, ids).out == 4


def test_wrapped_backends_are_recognised():
    def inner(gm, inputs):
        return gm.forward

    class Wrapper:
        _torchdynamo_orig_backend = staticmethod(inner)

    assert not torch_compat.is_our_backend(Wrapper())
    capture.install(inner)
    assert torch_compat.is_our_backend(inner) and torch_compat.is_our_backend(Wrapper())
    assert not torch_compat.is_our_backend(None)
