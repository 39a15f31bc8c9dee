"""Where the rows of the CPU ops lie: pairs sorted by expert, rows that only fill, and blocks that stay in cache.

Shape legend: see ``spec.py``; ``S`` rows, which are the pairs that have an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_gemm import MISSING_ROWS, Routing, Segment, blas

BLOCK_BYTES = 1 << 20  # intermediate rows of one block: stays in cache, few calls of the activation
FEW_PAIRS = 128  # up to here lists win
SPLIT_ROWS = 256  # one expert is split only into runs that still make an efficient GEMM


def sort(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Expert of every pair in sorted order (E when out of range), and the pair numbers in that order."""
    key = topk_ids.reshape(-1).clamp(-1, experts).remainder_(experts + 1)  # -1 becomes E, as E does
    return torch.sort(key, stable=True)  # [P], [P]


def invert(order: Tensor, pairs: int) -> Tensor:
    """Row of every pair; ``pairs`` for all rows from there on."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).clamp_(max=pairs))


class Rows(NamedTuple):
    """Where the rows of a call lie.

    Args:
        order: the pair of every row ``[S]``.
        position: the row of every pair ``[P]``; S for those that no expert has.
        segments: each expert's rows.
    """

    order: Tensor
    position: Tensor
    segments: list[Segment]


class Few:
    """Few pairs, by their experts: PyTorch does the same in ten calls, whose code is in no cache."""

    def __init__(self, expert_of: list[int], experts: int) -> None:
        self._of: list[list[int]] = [[] for _ in range(experts)]  # the pairs of each expert
        for pair, expert in enumerate(expert_of):
            if 0 <= expert < experts:
                self._of[expert].append(pair)
        counts = [len(pairs) for pairs in self._of]
        self.routing = Routing(sum(counts), experts, experts - counts.count(0), max(counts))
        self._total = len(expert_of)

    def sorted(self) -> Rows:
        """Rows by expert."""
        return self._rows([(e, len(pairs)) for e, pairs in enumerate(self._of) if pairs])

    def evened(self) -> Rows:
        """As many rows for every expert as the fullest has: those that it lacks repeat the first token, unread."""
        return self._rows([(e, self.routing.most) for e in range(self.routing.experts)])

    def _rows(self, sizes: list[tuple[int, int]]) -> Rows:
        rows = sum(size for _, size in sizes)
        order, position, segments, start = [0] * rows, [rows] * self._total, list[Segment](), 0
        for expert, size in sizes:
            pairs = self._of[expert]
            order[start : start + len(pairs)] = pairs
            for row, pair in enumerate(pairs, start):
                position[pair] = row
            segments.append((expert, start, start + size))
            start += size
        return Rows(torch.tensor(order, dtype=torch.int64), torch.tensor(position, dtype=torch.int64), segments)


class Many:
    """Sorted pairs ``order [P]``, those that have an expert first, and where each expert's end."""

    def __init__(self, order: Tensor, ends: list[int]) -> None:
        bounds = zip([0, *ends[:-1]], ends, strict=True)
        self._segments = [(expert, start, end) for expert, (start, end) in enumerate(bounds) if start < end]
        most = max((end - start for _, start, end in self._segments), default=0)
        self.routing = Routing(ends[-1], len(ends), len(self._segments), most)
        self._order = order

    def sorted(self) -> Rows:
        """Rows by expert."""
        pairs = self.routing.pairs
        return Rows(self._order[:pairs], invert(self._order, pairs), self._segments)

    def evened(self) -> Rows:
        """As many rows for every expert as the fullest has: those that it lacks repeat the first token, unread."""
        pairs, experts, _, most = self.routing
        order, rows = self._order[:pairs], experts * most
        moves = torch.tensor([expert * most - start for expert, start, _ in self._segments])
        counts = torch.tensor([end - start for _, start, end in self._segments])
        place = moves.repeat_interleave(counts, output_size=pairs) + torch.arange(pairs)
        position = order.new_full((len(self._order),), rows).scatter_(0, order, place)
        spread = order.new_zeros(rows).scatter_(0, place, order)
        return Rows(spread, position, [(e, e * most, (e + 1) * most) for e in range(experts)])


def grouped(topk_ids: Tensor, experts: int) -> Few | Many:
    """The pairs by expert."""
    if topk_ids.numel() <= FEW_PAIRS:
        return Few(topk_ids.reshape(-1).tolist(), experts)
    key, order = sort(topk_ids, experts)
    return Many(order, torch.searchsorted(key, torch.arange(experts, dtype=key.dtype), right=True).tolist())


def filled(rows: Rows) -> Rows:
    """The same with experts whose rows almost fill their last vector given what it lacks: rows that nobody reads.

    They repeat the expert's last row, so they hold nothing that is not in a row that counts.
    """
    order, position, segments = rows
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
        return rows
    times = torch.tensor(repeats)
    moved = torch.cat([times.cumsum(0) - times, torch.tensor([len(order) + more])])  # where a row went, and the last
    return Rows(order.repeat_interleave(times, output_size=len(order) + more), moved[position], filled)


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
