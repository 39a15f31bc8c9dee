"""Calls of very many tokens, in parts of them: what lies between the kernels stays within a share of the GPU's memory.

Every part reads the weights again. A token's result does not depend on the others, but a part may be planned
differently than the whole, so the last bits may differ from those of a GPU with more memory. Shape legend: see
``spec.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

SHARE = 8  # an eighth of the GPU's memory is what one part may take for what lies between its kernels
LEAST = 1024  # tokens of a part, however small the GPU
STEP = 128

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def tokens_of_part(x: Tensor, topk_ids: Tensor, inter: int) -> int:
    """Tokens of every part but the last, which has no more; 0 where one part does.

    For every path the same bound: of each pair its row in order, both halves of its intermediate row and their
    product, and its output row, in the dtype of ``x``.

    Args:
        x: ``[T, H]``.
        topk_ids: ``[T, K]``.
        inter: I.
    """
    tokens, top_k = topk_ids.shape
    if tokens <= LEAST:
        return 0
    bytes_per_token = top_k * (2 * x.shape[1] + 3 * inter) * x.element_size()
    room = memory_of(x.device) // SHARE
    if tokens * bytes_per_token <= room:
        return 0
    most = max(LEAST, room // bytes_per_token // STEP * STEP)
    parts = -(-tokens // most)
    return min(most, -(-tokens // parts // STEP) * STEP)  # of about the same size


@lru_cache(maxsize=64)
def memory_of(device: torch.device) -> int:
    """Bytes of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def in_parts(
    run: Run, size: int, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """``run(x, topk_weights, topk_ids)`` of ``size`` tokens at a time: ``[T, H]`` in ``dtype``, by default that of
    ``x``."""
    out = x.new_empty(x.shape, dtype=dtype)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        out[part] = run(x[part], topk_weights[part], topk_ids[part])
    return out
