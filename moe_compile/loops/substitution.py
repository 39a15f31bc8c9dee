"""Which source Dynamo traces for a function: rewritten as far as that was not yet found to be wrong in this trace.

Levels of one function within the trace of one frame: 2, its loops rewritten and traced for two experts only; 1, its
loops rewritten; 0, as written. Every trace begins at the top; a level whose assumptions cannot be proved is left for
the next lower one, and the frame is traced again.
"""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, NoReturn

from .. import torch_breaks, torch_compat
from . import effects
from .rewriting import Function
from .shrinking import shrink
from .source import source_of

log = logging.getLogger("moe_compile.loops")
TOP = 2
SITES = 1000  # of one function
_functions: list[types.CodeType] = []  # by number


class Miss(NamedTuple):
    """Why the rewritten loops of a function could not be proved to mean what was written."""

    code: str
    reason: str
    location: str


_misses: dict[int, Miss] = {}  # by number, of the latest compilation


@dataclass
class _Trace:
    """What is known about the functions of one frame, over all attempts to trace it."""

    levels: dict[int, int] = field(default_factory=dict)  # by number of the function
    breaks: int = field(default_factory=torch_breaks.count)  # graph breaks before it
    used: set[int] = field(default_factory=set)  # functions whose rewritten code this attempt has met


class _Current(threading.local):
    trace: _Trace | None = None


_current = _Current()


def begin(trace: object) -> None:
    """A frame is traced (again); ``trace`` is whatever lives as long as the attempts."""
    effects.reset()
    known = getattr(trace, "_moe_compile", None)
    if known is None:
        known = _Trace()
        trace._moe_compile = known  # type: ignore[attr-defined]
    known.used.clear()
    _current.trace = known


def choose(code: types.CodeType) -> types.CodeType | None:
    """The code to trace instead of ``code``, or None."""
    if _current.trace is None or not _may_loop(code):
        return None
    number = _number_of(code)
    if number not in _current.trace.levels:
        _misses.pop(number, None)
    level = _current.trace.levels.get(number, TOP)
    while level and _rewritten(number, level) is None:
        level -= 1
    _current.trace.levels[number] = level
    if level == 0:
        return None
    _current.trace.used.add(number)
    return _rewritten(number, level)


def retreat(sites: Iterable[int] | None = None, bottom: bool = False) -> bool:
    """Leave the level of the functions of ``sites`` (default: of every one met); whether there was one to leave.

    ``bottom``: the source as it was written comes next.

    The next attempt to trace the frame meets the next lower level: ``torch_compat.TraceAgain`` starts it.
    """
    trace = _current.trace
    if trace is None:
        return False
    numbers = trace.used & {site // SITES for site in sites} if sites is not None else set(trace.used)
    for number in numbers:
        trace.levels[number] = 0 if bottom else trace.levels[number] - 1
        if trace.levels[number] == 0 and number in _misses:
            code, why = _functions[number], _misses[number]
            log.info("the loops of %s (%s:%d) are traced as written: %s %s %s", code.co_name, code.co_filename,
                     code.co_firstlineno, why.code, why.reason, why.location)  # fmt: skip
    if numbers:
        torch_breaks.forget(trace.breaks)
    return bool(numbers)


def trace_again(sites: Iterable[int], why: Miss | None = None, bottom: bool = False) -> NoReturn:
    """From inside the backend: ``retreat`` for the functions of these sites, all that were met when there are none."""
    sites = set(sites)
    if why is not None and _current.trace is not None:
        numbers = {site // SITES for site in sites} & _current.trace.used or _current.trace.used
        _misses.update(dict.fromkeys(numbers, why))
    if not retreat(sites, bottom) and not retreat(None, bottom):
        raise AssertionError("a graph has marks of rewritten loops, but no function was rewritten")
    raise torch_compat.TraceAgain("a loop over experts is not what it looked like")


def miss(file: str, line: int) -> Miss | None:
    """Why the loops of the function that begins at ``line`` were not rewritten, if that was tried."""
    known = ((_functions[number], why) for number, why in _misses.items())
    return next((why for code, why in known if (code.co_filename, code.co_firstlineno) == (file, line)), None)


@lru_cache(maxsize=4096)
def _may_loop(code: types.CodeType) -> bool:
    return "/torch/" not in code.co_filename and torch_compat.has_loop(code)


def _number_of(code: types.CodeType) -> int:
    for number, known in enumerate(_functions):
        if known is code:
            return number
    _functions.append(code)
    return len(_functions) - 1


@lru_cache(maxsize=1024)
def _rewritten(number: int, level: int) -> types.CodeType | None:
    source = source_of(_functions[number])
    if source is None:
        return None
    function = Function(source, number * SITES)
    body = function.body(shrink if level == TOP else None)
    return source.compile(body) if body is not None else None
