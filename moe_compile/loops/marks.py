"""Ops that exist between tracing and proof only: what a changed loop assumes, and rows cut by counts.

A graph with one of them is never run: either every assumption is proved and the ops go with the loop, or the
function is traced again as it was written.

``mark(evidence, kind, numbers)`` with ``numbers[0]`` the site:

========== ============================ ===========================================================
kind       numbers                      meaning
========== ============================ ===========================================================
hit        site, expert                 from here to the next mark of the site: one iteration of a loop over the
                                        experts that ``evidence`` lists
nonempty   site                         from here on: a block that ran only if ``evidence`` has an element
count      site, index                  the same, only if ``evidence[index]`` is not zero
leave      site                         end of such a block or loop
loop       site, number of experts      the loop body follows for experts 0 and 1 only
probe      site, call, expert           ``evidence`` is what the experts from number ``expert`` on compute in this call
                                        of the body
end        site                         end of such a loop: it stands for all experts
veto       site                         Python state changed in a way that no graph shows
========== ============================ ===========================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

library = torch.library.Library("moe_compile", "FRAGMENT")
library.define("mark(Tensor[] evidence, str kind, int[] numbers) -> ()")
# rows [S, ..] of group ``index``: the groups stand one after the other, ``sizes [E]`` long (or end there: ``ends``)
library.define("segment(Tensor rows, Tensor sizes, int index, bool ends) -> Tensor")
# the rows of all groups one after the other again, as many as ``like`` has
library.define("join(Tensor[] parts, Tensor like) -> Tensor")
# ``buffer`` with ``rows`` written over the rows of group ``index``
library.define("store(Tensor buffer, Tensor rows, Tensor sizes, int index, bool ends) -> Tensor")
# numbers that the original program fetched to the host here: later writes do not reach them
library.define("listed(Tensor values) -> Tensor")
# two rows of the kind of ``rows``: an input for a probe
library.define("blank(Tensor rows) -> Tensor")

mark = torch.ops.moe_compile.mark.default
segment = torch.ops.moe_compile.segment.default
join = torch.ops.moe_compile.join.default
store = torch.ops.moe_compile.store.default
listed = torch.ops.moe_compile.listed.default
blank = torch.ops.moe_compile.blank.default
OPS = (mark, segment, join, store, listed, blank)


@torch.library.register_fake("moe_compile::mark")
def _mark(evidence: Sequence[Tensor], kind: str, numbers: Sequence[int]) -> None:
    return None


@torch.library.register_fake("moe_compile::segment")
def _segment(rows: Tensor, sizes: Tensor, index: int, ends: bool) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(count, *rows.shape[1:])


@torch.library.register_fake("moe_compile::join")
def _join(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return parts[0].new_empty(like.shape[0], *parts[0].shape[1:])


@torch.library.register_fake("moe_compile::store")
def _store(buffer: Tensor, rows: Tensor, sizes: Tensor, index: int, ends: bool) -> Tensor:
    return torch.empty_like(buffer)


@torch.library.register_fake("moe_compile::listed")
def _listed(values: Tensor) -> Tensor:
    return torch.empty_like(values)


@torch.library.register_fake("moe_compile::blank")
def _blank(rows: Tensor) -> Tensor:
    return rows.new_empty(2, rows.shape[-1])


torch.fx.node.has_side_effect(mark)
