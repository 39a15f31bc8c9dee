"""Pointer tables for separate expert weights: built once per set of addresses, without a synchronisation.

The content of a table depends on nothing but the addresses, so a table found under its addresses is right
even after weights were replaced. Tables stay inside the ops. Three cases need care:

- another stream than the one that filled the table: it waits for the copy, on the device;
- a CUDA graph being captured reads the table at every replay: it is then kept for good;
- a table first needed during a capture is filled by a copy inside the graph, from pinned memory that is kept
  for good. It belongs to that graph (its content is there only after a replay), so nobody else gets it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..torch_compat import raw_stream

CAPACITY = 4096  # about 1 kB of device memory each for 128 experts; a large model needs a few hundred
VECTOR_BYTES = 16


@dataclass
class Table:
    """A filled table; ``streams`` are those that have waited for its copy."""

    tensor: Tensor  # int64 [E]
    aligned: bool
    ready: Any
    streams: dict[int, Any] = field(default_factory=dict)  # by handle


_tables: OrderedDict[tuple[Any, ...], Table] = OrderedDict()
_held: dict[tuple[Any, ...], Table] = {}
_sources: dict[tuple[Any, ...], Tensor] = {}
_side: dict[torch.device, Any] = {}


def pointer_table(parts: Sequence[Tensor], role: str) -> tuple[Tensor, bool]:
    """The table of ``parts`` and whether all addresses are aligned to a full vector.

    Raises:
        ValueError: the parts differ in shape, strides, dtype or device.
    """
    first = parts[0]
    pointers = tuple([p.data_ptr() for p in parts])
    key = (first.device, first.dtype, first.shape, first.stride(), pointers)
    capturing = torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None:
        check_alike(parts, role)
        if capturing:
            return _fill_in_capture(key, pointers, first.device), _aligned(pointers)
        table = _fill(pointers, first.device)
        _tables[key] = table
        if len(_tables) > CAPACITY:
            _evict()
    if capturing:
        _held[key] = table
        return table.tensor, table.aligned
    _tables.move_to_end(key)
    handle = raw_stream(first.get_device())
    if handle not in table.streams:
        stream = torch.cuda.current_stream(first.device)
        stream.wait_event(table.ready)
        table.streams[handle] = stream
    return table.tensor, table.aligned


def _evict() -> None:
    """Drop the table used least recently; its memory waits for the streams that may still read it."""
    _, table = _tables.popitem(last=False)
    for stream in table.streams.values():
        table.tensor.record_stream(stream)


def check_alike(parts: Sequence[Tensor], role: str) -> None:
    """Refuse separate tensors that one kernel could not address alike."""
    first = parts[0]
    for e, part in enumerate(parts):
        for what in ("dtype", "device", "shape"):
            theirs, ours = getattr(part, what), getattr(first, what)
            if theirs != ours:
                raise ValueError(
                    f"{role}: expert {e} has {what} {theirs}, expert 0 has {ours}; "
                    "separate weights of one role must be alike"
                )
        if part.stride() != first.stride():
            raise ValueError(
                f"{role}: expert {e} has strides {part.stride()}, expert 0 has {first.stride()}; "
                "separate weights of one role must be alike, make them all contiguous"
            )


def _fill(pointers: tuple[int, ...], device: torch.device) -> Table:
    """Allocate and copy in a thread and on a stream of our own.

    A table outlives the call, so it must not come from a graph's private pool: CUDA-graph trees run their warm-up
    with such a pool for the current thread (or stream).
    """
    return _filler().submit(_fill_here, pointers, device).result()


def _fill_here(pointers: tuple[int, ...], device: torch.device) -> Table:
    side = _side.get(device)
    if side is None:
        side = _side[device] = torch.cuda.Stream(device)
    source = torch.tensor(pointers, dtype=torch.int64, pin_memory=True)
    with torch.cuda.stream(side):
        tensor = source.to(device, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(side)
    return Table(tensor, _aligned(pointers), ready)


@lru_cache(maxsize=1)
def _filler() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="moe_compile_tables")


def _fill_in_capture(key: tuple[Any, ...], pointers: tuple[int, ...], device: torch.device) -> Tensor:
    source = _sources.get(key)
    if source is None:
        source = _sources[key] = torch.tensor(pointers, dtype=torch.int64, pin_memory=True)
    tensor = torch.empty(len(pointers), dtype=torch.int64, device=device)
    return tensor.copy_(source, non_blocking=True)


def _aligned(pointers: tuple[int, ...]) -> bool:
    return all(p % VECTOR_BYTES == 0 for p in pointers)
