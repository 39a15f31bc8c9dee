"""Compiling with the rewrite and without Inductor: a program costs a second, and only our steps are tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_compile import capture
from moe_compile.report import Site
from moe_compile.rewriting import rewrite_graph


@dataclass
class Traced:
    """Every graph that reached the backend so far, rewritten, and the compiled callable."""

    sites: list[Site] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    call: Any = None
    out: Any = None

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


def traced(model: Any, dynamic: bool | None = None) -> Traced:
    """``model`` compiled with the rewrite; nothing runs before ``call`` is called."""
    torch.compiler.reset()
    result = Traced()

    def run(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        result.sites += rewrite_graph(gm).sites
        result.graphs.append(gm)
        return gm.forward

    capture.install(run)
    result.call = torch.compile(model, backend=run, dynamic=dynamic)
    return result
