"""Stable sort of token-expert pairs by expert, without atomics and without a host synchronisation.

A counting sort in at most three launches (Knuth, TAOCP vol. 3, 5.2 D; on GPUs: Satish, Harris and Garland,
"Designing efficient sorting algorithms for manycore GPUs", IPDPS 2009): chunks are counted, the counts are
added up over the chunks, and every program places its own chunk. With few chunks every program adds up the
counts for itself, which spares the second launch. Within a block of pairs the rank is the number of equal
ids before: exact, hence stable and deterministic.

Shape legend: see ``spec.py``. Ids outside ``[0, E)`` form one more bucket, the last.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import power_of_two
from .launch import Launch, Start, dependent, follow, once

BLOCK = 128  # pairs whose ranks are found at once: BLOCK * BLOCK comparisons in registers
MAX_CHUNKS = 1024  # one program adds up the counts of all chunks for SCANNED experts
MANY_CHUNKS = 32  # from here on that is a launch of its own
SCANNED = 8


@dataclass(frozen=True)
class Sorted:
    """Pairs in expert order.

    Args:
        order: int32 ``[P]`` flat pair numbers by expert, out-of-range ids last.
        inverse: int32 ``[P]`` position of every pair in ``order``, or in the padded order (``sort_pairs``).
        offsets: int32 ``[E + 1]`` first position of every expert; the last is the number of valid pairs.
        tiles: int32 ``[1 + 2 * capacity]`` number of row tiles, then their experts, then their first rows.
        capacity: upper bound of the number of row tiles, known on the host.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    tiles: Tensor
    capacity: int


@triton.jit
def _buckets(ids, p, P, E):
    """Ids of the pairs ``p``; out of range is E, past the end is E too (mask those)."""
    v = tl.load(ids + p, mask=p < P, other=-1)
    return tl.where((v >= 0) & (v < E), v, E).to(tl.int32)


@triton.jit
def _count_chunk(ids, first, P, E, CHUNK: tl.constexpr, BLOCK: tl.constexpr, EP: tl.constexpr):
    count = tl.zeros((EP,), tl.int32)
    for b in range(0, CHUNK, BLOCK):
        p = first + b + tl.arange(0, BLOCK)
        count += tl.histogram(_buckets(ids, p, P, E), EP, mask=p < P)
    return count


@triton.jit(do_not_specialize=["P", "E"])
def count_kernel(ids, counts, P, E, CHUNK: tl.constexpr, BLOCK: tl.constexpr, EP: tl.constexpr, PDL: tl.constexpr):
    """counts[chunk, :] = how many pairs of the chunk go to each bucket."""
    chunk = tl.program_id(0)
    follow(PDL)
    count = _count_chunk(ids, chunk * CHUNK, P, E, CHUNK, BLOCK, EP)
    tl.store(counts + chunk * EP + tl.arange(0, EP), count)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(counts, chunks, EP: tl.constexpr, CP: tl.constexpr, SCANNED: tl.constexpr, PDL: tl.constexpr):
    """counts[chunk, :] becomes the sum of all chunks before; counts[chunks, :], the last row, that of all."""
    c = tl.arange(0, CP)
    e = tl.program_id(0) * SCANNED + tl.arange(0, SCANNED)
    at = counts + c[:, None] * EP + e[None, :]
    here = (c < chunks)[:, None]
    follow(PDL)
    n = tl.load(at, mask=here, other=0)
    tl.store(at, tl.cumsum(n, 0) - n, mask=here)
    tl.store(counts + chunks * EP + e, tl.sum(n, 0))


@triton.jit
def _write_tiles(tiles, capacity, start, count, chunk, chunks, BM: tl.constexpr, REST: tl.constexpr, EP: tl.constexpr):
    """The tile table; the programs take turns at the tiles of every expert."""
    e = tl.arange(0, EP)
    n = tl.cdiv(count, BM)
    if REST > 0:
        n = tl.where(count > BM, tl.cdiv(count - REST, BM), n)
    first = tl.cumsum(n, 0) - n
    if chunk == 0:
        tl.store(tiles, tl.sum(n, 0))
    for j in range(chunk, tl.max(n, 0), chunks):
        live = j < n
        tl.store(tiles + 1 + first + j, e, mask=live)
        tl.store(tiles + 1 + capacity + first + j, start + j * BM, mask=live)


@triton.jit(do_not_specialize=["P", "E", "chunks", "capacity"])
def place_kernel(
    ids,
    counts,
    order,
    inverse,
    offsets,
    tiles,
    P,
    E,
    chunks,
    capacity,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    REST: tl.constexpr,
    SINGLE: tl.constexpr,
    SUMMED: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Positions of the pairs of one chunk; program 0 writes the offsets, all share the tile table.

    ``PADDED``: ``inverse`` holds positions in the order in which every tile has BM rows, -1 for out-of-range ids.
    """
    chunk = tl.program_id(0)
    follow(PDL)
    e = tl.arange(0, EP)
    before = tl.zeros((EP,), tl.int32)
    if SINGLE:
        total = _count_chunk(ids, 0, P, E, CHUNK, BLOCK, EP)
    elif SUMMED:
        total = tl.load(counts + chunks * EP + e)
        before = tl.load(counts + chunk * EP + e)
    else:
        total = tl.zeros((EP,), tl.int32)
        for c0 in range(0, chunks, ROWS):
            c = c0 + tl.arange(0, ROWS)
            n = tl.load(counts + c[:, None] * EP + e[None, :], mask=(c < chunks)[:, None], other=0)
            total += tl.sum(n, 0)
            before += tl.sum(tl.where((c < chunk)[:, None], n, 0), 0)
    start = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(offsets + e, start, mask=e <= E)
    if BM > 0:
        _write_tiles(tiles, capacity, start, tl.where(e < E, total, 0), chunk, chunks, BM, REST, EP)
    free = start + before
    if PADDED:
        n_tiles = tl.cdiv(tl.where(e < E, total, 0), BM)
        shift = (tl.cumsum(n_tiles, 0) - n_tiles) * BM - start
    i = tl.arange(0, BLOCK)
    for b in range(0, CHUNK, BLOCK):
        p = chunk * CHUNK + b + i
        v = _buckets(ids, p, P, E)
        earlier = (v[None, :] == v[:, None]) & (i[None, :] < i[:, None])
        s = tl.gather(free, v, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(order + s, p, mask=p < P)
        if PADDED:
            s = tl.where(v < E, s + tl.gather(shift, v, 0), -1)
        tl.store(inverse + p, s, mask=p < P)
        free += tl.histogram(v, EP, mask=p < P)


@triton.jit(do_not_specialize=["E", "capacity"])
def tiles_kernel(
    offsets, tiles, E, capacity, EP: tl.constexpr, BM: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr
):
    """The tile table of given offsets."""
    follow(PDL)
    e = tl.arange(0, EP)
    start = tl.load(offsets + e, mask=e < E, other=0)
    count = tl.load(offsets + e + 1, mask=e < E, other=0) - start
    _write_tiles(tiles, capacity, start, count, tl.program_id(0), tl.num_programs(0), BM, REST, EP)


def tile_capacity(pairs: int, experts: int, bm: int) -> int:
    """Upper bound of the number of row tiles: full ones, and a rest for every expert that can be hit."""
    return pairs // bm + min(experts, pairs)


def sort_pairs(
    ids: Tensor, experts: int, bm: int = 0, rest: int = 0, start: Start = once, padded: bool = False
) -> Sorted:
    """Sort ``ids [T, K]`` (contiguous); ``bm`` > 0 also writes the table of row tiles of that height.

    Args:
        rest: so many rows left over belong to the tile before them (see ``config.Tiles.rest``).
        padded: ``inverse`` counts every tile as ``bm`` rows, and is -1 for ids out of range; wants ``bm``.
    """
    pairs = ids.numel()
    order = start.empty(ids, pairs, dtype=torch.int32)
    inverse = start.empty(ids, pairs, dtype=torch.int32)
    capacity = tile_capacity(pairs, experts, bm) if bm else 0
    tiles = start.empty(ids, 1 + 2 * capacity, dtype=torch.int32)
    if pairs == 0:
        return Sorted(order, inverse, ids.new_zeros(experts + 1, dtype=torch.int32), tiles.zero_(), 0)
    offsets = start.empty(ids, experts + 1, dtype=torch.int32)
    chunk = BLOCK * power_of_two(-(-pairs // (BLOCK * MAX_CHUNKS)))
    chunks = -(-pairs // chunk)
    ep = max(power_of_two(experts + 1), 32)
    counts = tiles  # a single chunk counts for itself
    if chunks > 1:
        counts = start.empty(ids, (chunks + 1) * ep, dtype=torch.int32)
        counting = {"CHUNK": chunk, "BLOCK": BLOCK, "EP": ep}
        start(
            lambda: Launch(count_kernel, (chunks,), {**counting, **dependent(ids)}), ids, counts, pairs, experts
        )
    scanned = chunks > MANY_CHUNKS
    if scanned:
        scanning = {"EP": ep, "CP": power_of_two(chunks), "SCANNED": SCANNED}
        grid = (ep // SCANNED,)
        start(lambda: Launch(scan_kernel, grid, {**scanning, "num_warps": 8, **dependent(ids)}), counts, chunks)

    def place() -> Launch:
        summing = {"ROWS": max(1, 4096 // ep), "SINGLE": chunks == 1, "SUMMED": scanned}
        table = {**summing, "BM": bm, "REST": rest, "PADDED": padded}
        constants = {"CHUNK": chunk, "BLOCK": BLOCK, "EP": ep, **table}
        return Launch(place_kernel, (chunks,), {**constants, "num_warps": 8, **dependent(ids)})

    start(place, ids, counts, order, inverse, offsets, tiles, pairs, experts, chunks, capacity)
    return Sorted(order, inverse, offsets, tiles, capacity)


def tile_table(offsets: Tensor, pairs: int, bm: int, rest: int = 0) -> tuple[Tensor, int]:
    """The tile table of ``offsets [E + 1]`` and its capacity; see ``Sorted``."""
    experts = offsets.shape[0] - 1
    capacity = tile_capacity(pairs, experts, bm)
    tiles = offsets.new_empty(1 + 2 * capacity, dtype=torch.int32)
    programs = max(1, min(64, pairs // (bm * 8)))
    ep = max(power_of_two(experts), 32)
    constants = {"EP": ep, "BM": bm, "REST": rest, **dependent(offsets)}
    once(lambda: Launch(tiles_kernel, (programs,), constants), offsets, tiles, experts, capacity)
    return tiles, capacity


def sort_pairs_twin(ids: Tensor, experts: int, bm: int = 0, padded: bool = False) -> Sorted:
    """Torch twin of ``sort_pairs``; synchronises, the table has no unused entries."""
    flat = ids.reshape(-1).long()
    bucket = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(bucket, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=ids.device))
    count = torch.bincount(bucket, minlength=experts + 1)[:experts]
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    ends = offsets.tolist()
    table = [(e, r) for e in range(experts) if bm for r in range(ends[e], ends[e + 1], bm)]
    if padded:
        n_tiles = -(-count // bm)
        shift = torch.cat([(n_tiles.cumsum(0) - n_tiles) * bm - offsets[:-1], count.new_zeros(1)])
        inverse = torch.where(bucket < experts, inverse + shift[bucket], -1)
    tiles = [len(table), *(e for e, _ in table), *(r for _, r in table)]
    return Sorted(
        order.int(),
        inverse.int(),
        offsets.int(),
        torch.tensor(tiles, dtype=torch.int32, device=ids.device),
        len(table),
    )
