"""Where the rows of the CPU ops lie: pairs sorted by expert, rows that only fill, and blocks that stay in cache.

Shape legend: see ``spec.py``; ``S`` rows, which are the pairs that have an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu_gemm import MISSING_ROWS, Routing, Segment, blas

BLOCK_BYTES = 1 << 20  # intermediate rows of one block: stays in cache, few calls of the activation
FEW_PAIRS = 128  # up to here Python lists win: PyTorch does the same in five to ten calls, whose code is in no cache
SPLIT_ROWS = 256  # one expert is split only into runs that still make an efficient GEMM


def sort(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Expert of every pair in sorted order (E when out of range), and the pair numbers in that order."""
    key = topk_ids.reshape(-1).clamp(-1, experts).remainder_(experts + 1)  # -1 becomes E, as E does
    return torch.sort(key, stable=True)  # [P], [P]


def invert(order: Tensor, pairs: int) -> Tensor:
    """Row of every pair; ``pairs`` for all rows from there on."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).clamp_(max=pairs))


def ordered(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, list[Segment]]:
    """The pair of every row [S], the row of every pair [P], and each expert's rows."""
    if topk_ids.numel() <= FEW_PAIRS:
        return _ordered_few(topk_ids.reshape(-1).tolist(), experts)
    key, order = sort(topk_ids, experts)
    ends = torch.searchsorted(key, torch.arange(experts, dtype=key.dtype), right=True)
    segments, pairs = segments_of(ends.tolist())
    return order[:pairs], invert(order, pairs), segments


def _ordered_few(expert_of: list[int], experts: int) -> tuple[Tensor, Tensor, list[Segment]]:
    """The same from the expert of every pair."""
    order = [pair for pair, expert in enumerate(expert_of) if 0 <= expert < experts]
    order.sort(key=expert_of.__getitem__)
    position, segments, start = [len(order)] * len(expert_of), list[Segment](), 0
    for row, pair in enumerate(order):
        position[pair] = row
        if row + 1 == len(order) or expert_of[order[row + 1]] != expert_of[pair]:
            segments.append((expert_of[pair], start, row + 1))
            start = row + 1
    return torch.tensor(order, dtype=torch.int64), torch.tensor(position, dtype=torch.int64), segments


def segments_of(ends: list[int]) -> tuple[list[Segment], int]:
    """The rows of each expert that has some, and how many there are, from where each expert's end."""
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    return [(expert, start, end) for expert, (start, end) in enumerate(bounds) if start < end], ends[-1]


def routing_of(segments: list[Segment], pairs: int, experts: int) -> Routing:
    return Routing(pairs, experts, len(segments), max((end - start for _, start, end in segments), default=0))


def evened(
    order: Tensor, position: Tensor, segments: list[Segment], routing: Routing
) -> tuple[Tensor, Tensor, list[Segment]]:
    """The same with as many rows for every expert as the fullest has: rows that nobody reads.

    They repeat the first token (in ``_grouped_linear`` the first row).
    """
    experts, most = routing.experts, routing.most
    if len(position) <= FEW_PAIRS:
        return _evened_few(order.tolist(), len(position), segments, routing)
    moves = torch.tensor([expert * most - start for expert, start, _ in segments])
    counts = torch.tensor([end - start for _, start, end in segments])
    rows = experts * most
    moved = torch.arange(len(order) + 1)  # where a row goes, and the row that stands for those that are not read
    moved[:-1] += moves.repeat_interleave(counts, output_size=len(order))
    moved[-1] = rows
    spread = order.new_zeros(rows).scatter_(0, moved[:-1], order)
    return spread, moved[position], [(e, e * most, (e + 1) * most) for e in range(experts)]


def _evened_few(
    order: list[int], pairs: int, segments: list[Segment], routing: Routing
) -> tuple[Tensor, Tensor, list[Segment]]:
    """The same from the pair of every row."""
    experts, most = routing.experts, routing.most
    rows = experts * most
    spread, position = [0] * rows, [rows] * pairs
    for expert, start, end in segments:
        for row, pair in enumerate(order[start:end], expert * most):
            spread[row], position[pair] = pair, row
    even = [(e, e * most, (e + 1) * most) for e in range(experts)]
    return torch.tensor(spread), torch.tensor(position), even


def filled(order: Tensor, position: Tensor, segments: list[Segment]) -> tuple[Tensor, Tensor, list[Segment]]:
    """The same with experts whose rows almost fill their last vector given what it lacks: rows that nobody reads.

    They repeat the expert's last row, so they hold nothing that is not in a row that counts.
    """
    vector, filled = blas().vector, list[Segment]()
    repeats = [1] * len(order)
    more = 0
    for expert, start, end in segments:
        missing = (start - end) % vector
        missing = missing if missing <= MISSING_ROWS else 0
        repeats[end - 1] += missing
        filled.append((expert, start + more, end + more + missing))
        more += missing
    if not more:
        return order, position, segments
    times = torch.tensor(repeats)
    moved = torch.cat([times.cumsum(0) - times, torch.tensor([len(order) + more])])  # where a row went, and the last
    return order.repeat_interleave(times, output_size=len(order) + more), moved[position], filled


def blocks(segments: list[Segment], row_bytes: int) -> Iterator[tuple[int, int, list[Segment]]]:
    """Cut segments into ``(start, end, runs)``, where runs count rows from ``start``."""
    limit = BLOCK_BYTES // row_bytes  # rows of several experts together
    step = max(SPLIT_ROWS, limit)  # rows of one expert
    runs: list[Segment] = []
    start = 0
    for expert, first, last in segments:
        for begin in range(first, last, step):
            end = min(last, begin + step)
            if runs and end - start > limit:
                yield start, begin, runs
                runs = []
            start = start if runs else begin
            runs.append((expert, begin - start, end - start))
    if runs:
        yield start, start + runs[-1][2], runs
