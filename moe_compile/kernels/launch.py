"""Programmatic dependent launch: the next kernel comes up while the last one ends (CUDA programming guide, 7.x).

Every kernel of this package calls ``follow`` before it touches anything that an earlier kernel wrote, or writes
anything. All programs wait, those without work too: then "the kernel before me has ended" means that all kernels
before it have. What lies before the wait may read only what the kernel before last had finished: that one had
ended before this one could be launched, because every kernel waits before it lets the next one come up.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CAPABILITY = 9  # the first major version of devices that have it
DEPENDENT: dict[str, Any] = {"PDL": True, "launch_pdl": True}
PLAIN: dict[str, Any] = {"PDL": False}


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait for everything that was launched before, then let the next kernel come up."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def dependent(tensor: Tensor) -> dict[str, Any]:
    """The launch arguments for kernels on the device of ``tensor``."""
    return _of_device(tensor.get_device()) if tensor.is_cuda else PLAIN


@lru_cache(maxsize=64)
def _of_device(index: int) -> dict[str, Any]:
    ours = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= CAPABILITY
    return DEPENDENT if ours else PLAIN
