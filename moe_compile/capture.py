"""What must hold before Dynamo traces, for our backend only: dynamic-shape capture of range loops.

``for e in range(E): idx, tok = torch.where(mask[e])`` is captured whole only under
``capture_dynamic_output_shape_ops``. Turned on globally it makes other programs crash instead of breaking the graph
(``bincount(...).tolist()``), so it is turned on per trace: for traces whose backend is ours, and off again for a
frame that cannot be traced with it.
"""

from __future__ import annotations

from typing import Any

from . import torch_compat

_backends: list[Any] = []


def install(backend: Any) -> None:
    """Turn the capture on for compilations with ``backend``; idempotent."""
    if not any(b is backend for b in _backends):
        _backends.append(backend)
    torch_compat.scope_dynamic_capture(is_ours)


def is_ours(compiler_fn: Any) -> bool:
    """Whether a Dynamo compiler function is (a wrapper around) one of our backends."""
    pending, seen = [compiler_fn], set()
    while pending:
        candidate = pending.pop()
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        if any(candidate is b for b in _backends):
            return True
        pending += [getattr(candidate, name, None) for name in torch_compat.BACKEND_WRAPPER_ATTRIBUTES]
    return False
