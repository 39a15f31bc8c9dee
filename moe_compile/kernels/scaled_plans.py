"""Which kernel runs for which number of tokens with fp8 weights and block scales, and with which tiles.

``config.py`` for them: measured on one H100 and one H200, a step is always one block of the depth. Rows in fp8 are
best multiplied as they are from some 20 per expert on; below, and where weights are widened in registers, weights are
the left operand.
Shape legend: see ``spec.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .config import DECODE_IDS, H200, Device, Plan, Tiles, are_vectors, power_of_two

# Up to here weights for rows that are not quantised are best widened on the CUDA cores, pair by pair, though an expert
# chosen by several tokens is read for each (mean rows per expert): for the tensor cores they must be widened as well.
WIDENED_TOKENS = 8
WIDENED_ROWS = 1.5
FEW_TOKENS = 16  # as many rows as the lowest tile has
DECODE_TOKENS = 32  # from here on a sort pays
SMALL_ROWS = 20  # mean rows per expert up to which tiles of 32 rows win
TALL_ROWS = 64  # the same for tiles of 64, rows not quantised
DEEP = 4096  # depth from which on longer pipelines win


def choose_scaled_path(
    tokens: int, top_k: int, experts: int, hidden: int, inter: int, dense: bool, quantise: bool
) -> str:
    """The path for ``tokens`` rows; ``dense`` as in ``config.choose_path``, ``quantise`` as in ``select_scaled``."""
    widened = not quantise and tokens <= WIDENED_TOKENS and tokens * top_k <= WIDENED_ROWS * experts
    if dense and (widened or are_vectors(tokens, top_k, experts, hidden, inter)):
        return "gemv"
    ids = power_of_two(tokens) * power_of_two(top_k)
    return "decode" if tokens <= DECODE_TOKENS and ids <= DECODE_IDS else "sorted"


@lru_cache(maxsize=4096)
def select_scaled(
    path: str,
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inter: int,
    gated: bool,
    quantise: bool,
    elements: int,
    device: Device = H200,
) -> Plan:
    """Tiles of a path.

    Args:
        quantise: rows are fp8 too, and the first GEMM quantises its results, a block of columns at a time.
        elements: bytes of one element of rows that are not quantised.
    """
    mean = tokens * top_k / experts
    if path != "sorted":
        bm, tail, warps = (16, 0, 4) if tokens <= 16 else (32, 1, 4) if tokens <= 32 else (64, 2, 8)
        up = down = Tiles(bm, 128, 128, warps, 5, swap=True, tail=tail, evict="evict_first")
        if quantise and tokens <= FEW_TOKENS:
            hit, n = min(experts, tokens * top_k), device.processors
            if n < hit * -(-inter // 128) <= 2 * n:
                up = replace(up, stages=3)  # two programs share a processor, so that no tile waits for another
            if hit * -(-hidden // 128) * 2 <= n:
                down = replace(down, wn=64, stages=8)  # else half the processors have no tile
    elif quantise and mean > SMALL_ROWS:
        up = Tiles(64, 128, 128, 8, 4 if hidden >= DEEP else 3, swap=False, group=8)
        warps, stages = (4, 5) if inter >= DEEP else (8, 4)
        down = Tiles(64, 128, 128, warps, stages, swap=False, group=8)
    elif quantise:
        up = down = Tiles(32, 128, 128, 4, 4, swap=True, tail=1, group=8)
    else:
        bm, warps = (64, 4) if mean <= TALL_ROWS else (128, 8)
        up = down = Tiles(bm, 128, 128, warps, 4, swap=True, tail=2, group=8)
    if quantise and gated:
        up = replace(up, wn=256)
    rows = 1 if quantise else elements
    return Plan(path, _fit(up, rows, device), _fit(down, rows, device))


def _fit(tiles: Tiles, rows: int, device: Device) -> Tiles:
    """As many stages as fit the shared memory: weights take one byte, rows ``rows``."""
    stage = (tiles.bm * rows + tiles.wn) * tiles.bk
    return replace(tiles, stages=max(1, min(tiles.stages, (device.shared - 8 * 1024) // stage)))
