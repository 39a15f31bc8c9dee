"""Why Dynamo did not capture something: its graph breaks as values.

The source is the documented ``TORCH_LOGS="graph_breaks"`` log stream. Of the ways tried (torch 2.11 and 2.13)
it is the only one that sees every break: ``torch._dynamo.explain`` and ``counters["graph_break"]`` say
nothing about a break inside a ``for`` loop, where Dynamo gives up the whole frame; MoE code breaks there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .torch_compat import GRAPH_BREAKS

_PLACE = re.compile(r"in user code at (?P<file>.+?):(?P<line>\d+)\s*\n")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_NOISE = re.compile(r"^(Encountered graph break|Failed to handle graph break)")
_ADVICE = "Consider annotating your code using torch._check*(). "  # Dynamo's; ours stands in Site.fix


_collecting: list[list[Break]] = []


@dataclass(frozen=True)
class Break:
    """One graph break.

    Args:
        file: path of the user's source file.
        line: 1-based line in it.
        reason: Dynamo's one-line name of the break, such as ``"Data-dependent branching"``.
        detail: Dynamo's whole explanation.
    """

    file: str
    line: int
    reason: str
    detail: str


@contextmanager
def collect_breaks() -> Iterator[list[Break]]:
    """Collect the graph breaks of every compilation inside the ``with`` block."""
    found: list[Break] = []
    _collecting.append(found)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            parsed = parse(record.getMessage())
            if parsed is not None:
                found.append(parsed)

    logger = logging.getLogger(GRAPH_BREAKS)
    handler, level, propagate = Handler(logging.DEBUG), logger.level, logger.propagate
    if not logger.isEnabledFor(logging.DEBUG):
        logger.propagate = False  # the user did not ask for this log: it must not reach their handlers
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield found
    finally:
        _collecting[:] = [other for other in _collecting if other is not found]
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def count() -> int:
    """Number of breaks collected so far."""
    return len(_collecting[-1]) if _collecting else 0


def forget(since: int) -> None:
    """Drop the breaks of an attempt that is traced again in another form."""
    if _collecting:
        del _collecting[-1][since:]


def parse(message: str) -> Break | None:
    """A log message of Dynamo as a ``Break``, None if it is of another kind."""
    place = _PLACE.search(message)
    if place is None:
        return None
    file, line = place["file"], int(place["line"])
    head, _, trace = message.partition("User code traceback:")
    frames = [(f["file"], int(f["line"])) for f in _FRAME.finditer(trace) if not _is_torch(f["file"])]
    if _is_torch(file) and frames:
        file, line = frames[-1]
    return Break(file, line, _reason(head[place.end() :]), message)


def _reason(text: str) -> str:
    for raw in text.splitlines():
        row = raw.removeprefix("Graph Break Reason:").replace(_ADVICE, "").strip()
        if row and not _NOISE.match(row):
            return row
    return "unknown reason"


def _is_torch(path: str) -> bool:
    return "/torch/" in path.replace("\\", "/")


def reset() -> None:
    """Forget every compiled frame of the process, so that the next call is traced again."""
    import torch

    torch.compiler.reset()
