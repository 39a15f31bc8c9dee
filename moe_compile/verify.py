"""Option ``verify``: on the first call the original graph runs beside the compiled one and both are compared."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

log = logging.getLogger("moe_compile.verify")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class VerificationError(RuntimeError):
    """The rewritten graph returned something else than the original one."""


def compare_first_call(original: fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, checked against ``original`` on cloned inputs the first time it is called.

    Raises:
        VerificationError: at that call, if an output differs by more than ``TOLERANCE`` (relative L2) of its dtype.
    """
    pending = [original]

    def call(*args: Any) -> Any:
        if not pending:
            return compiled(*args)
        graph = pending.pop()
        copies = [a.detach().clone() if isinstance(a, Tensor) and not a.is_leaf else a for a in args]
        expected = graph(*copies)
        out = compiled(*args)
        for i, (ours, theirs) in enumerate(zip(tree_leaves(out), tree_leaves(expected), strict=True)):
            if isinstance(ours, Tensor) and ours.is_floating_point():
                error = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))
                limit = TOLERANCE.get(ours.dtype, 1e-4)
                if not error <= limit:
                    raise VerificationError(
                        f"output {i} {list(ours.shape)} {ours.dtype} of the rewritten graph differs from the original "
                        f"by {error:.2e} (limit {limit:.0e}); compile without moe_compile and please report it"
                    )
        log.info("the first call agrees with the original program")
        return out

    return call
