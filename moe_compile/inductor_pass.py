"""``MoEPass``: the same rewrite in Inductor's own pass slot, for people who keep ``backend="inductor"``.

    torch._inductor.config.pre_grad_custom_pass = moe_compile.MoEPass()

The pre-grad slot sees Dynamo's graph, the vocabulary that the canonical copy is made from. ``uuid()`` covers every
source file of the package and the options, so Inductor's and AOTAutograd's caches still hit; on torch 2.12 and later
the pass is then not even called on a warm start, and so reports nothing. ``moe_compile.explain`` looks without them.
"""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from .backend import attempt
from .config import Options, enabled
from .identity import source_hash
from .torch_compat import CustomGraphPass


class MoEPass(CustomGraphPass):  # type: ignore[misc]
    """An Inductor graph pass that replaces every proved MoE layer of an inference graph.

    Args:
        **options: the fields of ``moe_compile.config.Options``, such as ``strict=True``.

    Raises:
        OptionError: an unknown option or a wrong value.
    """

    def __init__(self, **options: Any) -> None:
        self.options = Options.resolve(options)

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place; without anything to rewrite it stays as it is."""
        if enabled():
            attempt(cast(fx.GraphModule, graph.owning_module), self.options)

    def uuid(self) -> str:
        """Identity of the rewrite for Inductor's caches."""
        return f"moe_compile-{source_hash()}-{self.options}-{enabled()}"
