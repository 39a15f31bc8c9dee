"""What several test files share: rewriting without Inductor (fast), and the float64 rule."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn

import moe_compile.backend as backend
from moe_compile import capture
from moe_compile.report import Site
from moe_compile.rewriting import rewrite_graph

FLOOR = {torch.float32: 1e-7, torch.float64: 1e-15, torch.bfloat16: 1e-3, torch.float16: 1e-4}


@dataclass
class Outcome:
    """One compiled call: its result, and every graph that reached the backend, rewritten."""

    out: Any = None
    sites: list[Site] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    call: Any = None

    @property
    def ops(self) -> list[str]:
        """Names of our ops in all graphs."""
        return [
            n.target.__name__
            for g in self.graphs
            for n in g.graph.nodes
            if n.op == "call_function" and "moe_compile" in str(getattr(n.target, "namespace", ""))
        ]

    @property
    def codes(self) -> list[str | None]:
        return [s.code for s in self.sites]


def rewritten(model: Any, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Outcome:
    """Compile with the rewrite and without Inductor, call once without gradients."""
    torch._dynamo.reset()
    outcome = Outcome()

    def run(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        outcome.sites += rewrite_graph(gm).sites
        outcome.graphs.append(gm)
        return gm.forward

    capture.install(run)
    outcome.call = torch.compile(model, backend=run, dynamic=dynamic)
    with torch.no_grad():
        outcome.out = outcome.call(*args, **kwargs)
    return outcome


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of ``a`` to ``b``, in float64; NaN never passes a comparison with it."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def assert_accurate(ours: Tensor, original: Tensor, reference: Tensor) -> None:
    """Error of ours <= 2x the original's own error plus a floor, both against float64."""
    assert ours.shape == original.shape and ours.dtype == original.dtype
    assert original.double().norm() > 0
    limit = 2 * relative(original, reference) + FLOOR[original.dtype]
    assert relative(ours, reference) <= limit


class FixedRouter(nn.Module):
    """Returns what another router returned: keeps the choice of experts when the precision changes."""

    def __init__(self, router: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        w, self.ids = router(x)
        self.w = w.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.w, self.ids


def double_reference(model: nn.Module, x: Tensor) -> Tensor:
    """The example layer in float64 with the routing of its own precision."""
    with torch.no_grad():
        twin = copy.deepcopy(model).double()
        if type(model).__name__ != "Llama4":
            twin.router = FixedRouter(model.router, x, torch.float64)
        return twin(x.double())


__all__ = ["FLOOR", "FixedRouter", "Outcome", "assert_accurate", "backend", "double_reference", "relative", "rewritten"]
