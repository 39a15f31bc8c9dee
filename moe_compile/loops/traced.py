"""What the changed loops call. Dynamo inlines these functions: they decide while tracing and leave marks in the graph.

Shape legend: see ``spec.py``; ``site`` numbers a loop or a test of the changed source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..torch_compat import comptime, guard_or_false
from . import effects
from .marks import blank as blank
from .marks import join, mark, segment, store
from .marks import listed as listed

LIMIT = 8  # loops over more experts are traced for two of them; tests change it


def hit_range(hits: Tensor, *containers: Any) -> range:
    """All experts instead of those that were hit: as many as the containers hold that the body indexes by expert."""
    return range(min([c.shape[0] if isinstance(c, Tensor) else len(c) for c in containers]))


def held(module: Any) -> range:
    """As many experts as a module holds itself; a guess, which the proof of the layer confirms or not."""
    stacks = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
    return range(min([*stacks, *[len(m) for m in module.children() if isinstance(m, nn.ModuleList)]]))


def hit(site: int, hits: Tensor, expert: int) -> None:
    """An iteration of a loop over ``hits`` begins."""
    mark([hits], "hit", [site, expert])


def at(container: Any, expert: int, hits: Tensor) -> Any:
    """``container[e]`` as it was when ``e`` was a row of ``hits``: a vector of one element keeps the dimension."""
    if isinstance(container, Tensor) and hits.dim() == 2:
        return container[expert : expert + 1]
    return container[expert]


def nonempty(site: int, evidence: Any, kind: str) -> bool:
    """Whether ``evidence`` has an element: as far as it is known while tracing, else assumed and marked."""
    if isinstance(evidence, Entry):
        mark([evidence.sizes], "count", [site, evidence.index])
        return True
    if not isinstance(evidence, Tensor):
        return bool(evidence) if kind == "true" else len(evidence) != 0
    if kind != "true":
        size = evidence.numel() if kind == "numel" else evidence.shape[0]
        if guard_or_false(size == 0):
            return False
        if guard_or_false(size > 0):
            return True
    mark([evidence], "nonempty", [site])
    return True


def differ(site: int, start: Any, end: Any) -> bool:
    """Whether ``start != end``, where both may be offsets into sorted rows."""
    if isinstance(end, Entry):
        mark([end.sizes], "count", [site, end.index])
        return True
    return bool(start != end)


def enter(site: int) -> None:
    """Remember the Python state of the caller, which a block that may be skipped must not change."""
    comptime(effects.remember)


def leave(site: int, *changed: Any) -> None:
    """The end of a block or loop; ``changed`` are its variables that are read elsewhere."""
    comptime(effects.compare)
    for value in changed:
        if not isinstance(value, (Tensor, Entry, list)):
            mark([], "veto", [site])
    mark([], "leave", [site])


# --- loops over many experts ------------------------------------------------------------------------


def shrunk(experts: range) -> bool:
    """Whether two iterations stand for the whole loop."""
    return isinstance(experts, range) and experts.start == 0 and experts.step == 1 and len(experts) > LIMIT


def iterations(site: int, experts: range) -> range:
    """The iterations that are traced."""
    if shrunk(experts):
        comptime(effects.remember)
        mark([], "loop", [site, len(experts)])
        return range(2)
    return experts


def watched(site: int, container: Any, experts: range) -> Any:
    """``container``, which must be one that means the same for every expert."""
    if shrunk(experts) and not isinstance(container, (Tensor, nn.ModuleList, nn.ParameterList, Sizes)):
        mark([], "veto", [site])
    return container


def pick(site: int, container: Any, expert: int, experts: range) -> Any:
    """``container[expert]`` of a container that means the same for every expert."""
    return watched(site, container, experts)[expert]


def equal(site: int, ids: Any, expert: int, experts: range) -> Any:
    """``ids == expert``; a plain number must be no expert's."""
    if shrunk(experts) and not isinstance(ids, Tensor) and ids in experts:
        mark([], "veto", [site])
    return ids == expert


def separate(container: Any) -> bool:
    """Whether every expert has a module or tensor of its own."""
    return isinstance(container, (nn.ModuleList, nn.ParameterList))


def probe(site: int, call: int, values: list[Any]) -> None:
    """What every expert computes in one call of the body."""
    mark(values, "probe", [site, call, 0])


def end(site: int, *changed: Any) -> None:
    """The end of a loop that was traced for two experts."""
    comptime(effects.compare)
    for value in changed:
        if not isinstance(value, Tensor):
            mark([], "veto", [site])
    mark([], "end", [site])


# --- counts on the host -----------------------------------------------------------------------------


class Entry:
    """A number that the original program fetched from the device: the size of group ``index``, or its end.

    ``running``: ``sizes`` is the running sum already, else an end is a sum that the program builds up itself.
    """

    def __init__(self, sizes: Tensor, index: int, ends: bool, running: bool) -> None:
        self.sizes, self.index, self.ends, self.running = sizes, index, ends, running

    def __add__(self, other: Any) -> Entry:
        return other.after(self) if self.ends else self.after(other)

    def __radd__(self, start: Any) -> Entry:
        return self.after(start)

    def after(self, start: Any) -> Entry:
        """``start + n``: the end of this group, whose rows begin at ``start``."""
        if self.ends or begin(start) != self.index:
            raise ValueError("this is not the running end of groups of rows")
        return Entry(self.sizes, self.index, True, False)


def begin(start: Any) -> int:
    """The number of the group that begins at ``start``, -1 if none is known to."""
    if isinstance(start, Entry):
        return start.index + 1 if start.ends else -1
    return 0 if start == 0 else -1


class Sizes:
    """Rows per expert ``[E]``, or their running sum, where the original program had Python numbers."""

    def __init__(self, sizes: Tensor, running: bool, experts: int | None = None) -> None:
        self.sizes, self.running = listed(sizes), running
        self.experts = sizes.shape[0] if experts is None else experts

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, index: int) -> Entry:
        return Entry(self.sizes, index, self.running, self.running)


def rows(source: Any, start: Any, stop: Any) -> Any:
    """``source[start:stop]``."""
    if isinstance(stop, Entry):
        if not stop.ends or begin(start) != stop.index:
            raise ValueError("this is not one group of rows")
        return segment(source, stop.sizes, stop.index, stop.running)
    return source[start:stop]


def place(target: Any, start: Any, stop: Any, value: Any) -> Any:
    """``target`` after ``target[start:stop] = value``."""
    if isinstance(stop, Entry):
        if not stop.ends or begin(start) != stop.index:
            raise ValueError("this is not one group of rows")
        return store(target, value, stop.sizes, stop.index, stop.running)
    target[start:stop] = value
    return target


def split(source: Any, sizes: Any, dim: int = 0) -> Any:
    """``source.split(sizes, dim)``."""
    if isinstance(sizes, Sizes):
        if dim != 0 or sizes.running:
            raise ValueError("rows are not split along their first dimension by their numbers")
        return [segment(source, sizes.sizes, i, False) for i in range(len(sizes))]
    return torch.split(source, sizes, dim)


def cat(parts: Any, like: Any, dim: int = 0) -> Tensor:
    """``torch.cat(parts, dim)``, where the parts may be groups of the rows of ``like``."""
    return join(parts, like) if dim == 0 else torch.cat(parts, dim)
