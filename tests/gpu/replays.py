"""Calls of the CUDA ops with and without the programs of ``kernels.replay``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moe_compile.kernels import replay
from moe_compile.ops import calls


@contextmanager
def long_way() -> Iterator[None]:
    """Calls leave no programs to others, so that what is patched on the way to the kernels is seen."""
    calls.kind_of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "LARGEST", -1)
        yield
    calls.kind_of.cache_clear()


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """What a call gives when a program runs it, in memory that was full of NaN."""
    ran: list[replay.Program] = []
    run = replay.Program.__call__
    calls.kind_of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "LARGEST", 1 << 40)
        call()
        patch.setattr(replay.Program, "__call__", lambda self, given: ran.append(self) or run(self, given))
        blocks = [torch.full((n,), float("nan"), device="cuda") for n in (64, 4096, 1 << 18, 1 << 22, 1 << 25)]
        del blocks
        out = call()
    calls.kind_of.cache_clear()
    assert len(ran) == 1, "no program"
    return out
