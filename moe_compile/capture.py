"""What must hold before Dynamo traces, for our backend only: dynamic-shape capture, and loops in a form it can trace.

``for e in range(E): idx, tok = torch.where(mask[e])`` is captured whole only under
``capture_dynamic_output_shape_ops``. Turned on globally it makes other programs crash instead of breaking the graph
(``bincount(...).tolist()``), so it is turned on per trace: for traces whose backend is ours, and off again for a
frame that cannot be traced with it.

Loops whose length or branches depend on the routing are traced in another form (``loops/``), which the proof of the
layer must cover.
"""

from __future__ import annotations

from typing import Any

from . import torch_compat
from .loops import substitution


def install(backend: Any) -> None:
    """Turn the capture on for compilations with ``backend``; idempotent."""
    torch_compat.add_backend(backend)
    torch_compat.scope_dynamic_capture(torch_compat.is_our_backend)
    torch_compat.substitute_code(
        torch_compat.is_our_backend, substitution.begin, substitution.choose, substitution.retreat
    )
