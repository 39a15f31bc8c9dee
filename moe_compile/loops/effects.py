"""Python state around a block that may be skipped, or is traced for two experts only: it must not change there.

Whatever a block does to tensors is in the graph and is judged there; what it does to Python objects (a counter on a
module, a list) is not, so it is compared here while Dynamo traces.
"""

from __future__ import annotations

import threading
from typing import Any

from .. import torch_compat


class _State(threading.local):
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.changed = False


_state = _State()


def reset() -> None:
    """A new trace begins."""
    _state.stack.clear()
    _state.changed = False


def changed() -> bool:
    """Whether a block of this trace changed Python state."""
    return _state.changed


def remember(ctx: Any) -> None:
    """Called through ``comptime`` where a block begins."""
    _state.stack.append(torch_compat.python_mutations(ctx))


def compare(ctx: Any) -> None:
    """Called through ``comptime`` where it ends."""
    before = _state.stack.pop() if _state.stack else None
    if before != torch_compat.python_mutations(ctx):
        _state.changed = True
