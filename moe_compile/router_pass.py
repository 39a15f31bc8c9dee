"""The second pass of the backend, on Inductor's graph of ATen operations: common routers become one launch, and our
ops their forms below autograd.

There decompositions have made one program of the many ways to write a softmax, nothing writes in place any more, and
the routers of Hugging Face models, whose experts are found while Dynamo traces, look like those of naive layers.
"""

from __future__ import annotations

import logging

from torch import fx

from . import lower, routers
from .identity import source_hash
from .torch_compat import CustomGraphPass

log = logging.getLogger("moe_compile.match")
DEVICES = ("cuda",)  # on a CPU Inductor's own code for a router is as fast


class RouterPass(CustomGraphPass):  # type: ignore[misc]
    """An Inductor graph pass that fuses the proved routers of our experts' calls and leaves autograd."""

    def __call__(self, graph: fx.Graph) -> None:
        for op in routers.EXPERTS:
            for node in graph.find_nodes(op="call_function", target=op):
                chain = routers.read(node) if node.meta["val"].device.type in DEVICES else None
                if chain is not None:
                    lower.fuse_router(chain)
                    log.debug("router of %s: %s", node.name, chain.router)
        lower.leave_autograd(graph)

    def uuid(self) -> str:
        """Identity of the pass for Inductor's caches."""
        return f"moe_compile-router-{source_hash()}-{DEVICES}"
