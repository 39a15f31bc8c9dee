"""8-bit floats with scales, in plain torch: activations by groups of a row, weights by blocks.

A group's scale is ``max(|x|, 1e-10) / 448`` in float32, so its largest value becomes 448, the largest number of
float8_e4m3fn, and ``x ~ q * scale``. A group with a NaN or an infinity in it is NaN as a whole: nothing hides it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn, whose cast makes NaN of anything larger
SMALLEST = 1e-10  # what counts as a group's largest value where all are zero: no division by zero
BLOCK = (128, 128)


def quantize_rows(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Quantise each row of ``x`` by groups of ``group`` neighbours.

    Args:
        x: ``[M, K]`` float16, bfloat16 or float32; the last group may be shorter than ``group``.
        group: values that share a scale.

    Returns:
        ``q`` float8_e4m3fn ``[M, K]`` and ``scales`` float32 ``[M, ceil(K / group)]``, both contiguous.
    """
    if x.dim() != 2:
        raise ValueError(f"rows are [M, K], got {list(x.shape)}")
    return _quantize(x, (1, group))


def quantize_blocks(w: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise a weight by blocks of ``bn`` rows and ``bk`` columns; blocks at the ends may be smaller.

    Args:
        w: ``[N, K]`` or ``[E, N, K]``, float16, bfloat16 or float32.
        block: ``(bn, bk)``.

    Returns:
        ``q`` float8_e4m3fn in the shape of ``w`` and ``scales`` float32 ``[.., ceil(N / bn), ceil(K / bk)]``.
    """
    if w.dim() not in (2, 3):
        raise ValueError(f"a weight is [N, K] or [E, N, K], got {list(w.shape)}")
    if w.dim() == 2:
        return _quantize(w, block)
    q = torch.empty(w.shape, dtype=FP8, device=w.device)
    scales = torch.empty(w.shape[0], *_count(w.shape, block), dtype=torch.float32, device=w.device)
    for e in range(w.shape[0]):  # one at a time: the float32 copies of all experts may not fit
        q[e], scales[e] = _quantize(w[e], block)
    return q, scales


def dequantize_rows(q: Tensor, scales: Tensor, group: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values ``[M, K]`` in ``dtype`` that ``quantize_rows`` gave as ``q [M, K]`` and ``scales [M, ceil(K/group)]``.

    Computed in float32, or in float64 if ``dtype`` is float64.
    """
    return dequantize_blocks(q, scales, (1, group), dtype)


def dequantize_blocks(
    q: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values ``[.., N, K]`` in ``dtype`` of ``q [.., N, K]`` with ``scales [.., ceil(N/bn), ceil(K/bk)]``.

    Computed in float32, or in float64 if ``dtype`` is float64.
    """
    expected = (*q.shape[:-2], *_count(q.shape, block))
    if tuple(scales.shape) != expected:
        raise ValueError(f"{list(q.shape)} in blocks of {block} has scales {list(expected)}, got {list(scales.shape)}")
    n, k = q.shape[-2:]
    wide = torch.promote_types(dtype, torch.float32)
    every = scales.to(wide).repeat_interleave(block[0], -2)[..., :n, :].repeat_interleave(block[1], -1)[..., :k]
    return (q.to(wide) * every).to(dtype)


def _count(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks cover the last two dimensions."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _quantize(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    (n, k), (rows, columns) = x.shape, _count(x.shape, block)
    # Zeros at the ends change no largest value.
    padded = torch.nn.functional.pad(x.float(), (0, columns * block[1] - k, 0, rows * block[0] - n))
    tiles = padded.view(rows, block[0], columns, block[1])
    largest = tiles.abs().amax((1, 3)).clamp(min=SMALLEST)  # amax and clamp keep NaN
    # By a tensor: CUDA multiplies by the reciprocal of a number, and its last bit would differ from the CPU's.
    scales = largest / torch.full_like(largest, LARGEST)
    q = (tiles / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(FP8)
    return q.view(padded.shape)[:n, :k].contiguous(), scales
