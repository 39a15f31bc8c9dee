"""Many cases: drawing, worker processes, and what the results add up to."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..torch_compat import LOGGERS
from .axes import AXES, Case, draw, valid
from .forms import FORMS
from .judge import Verdict, judge
from .mutations import applicable, sizes
from .source import source_of
from .writes import WRITES

QUIET = ("moe_compile", *LOGGERS)
SOME_WRITES = 0.4
RECYCLE = 150  # cases per worker process: Dynamo keeps some memory of every program


def case_of(seed: int, negative: bool = False, loops: bool = False) -> Case:
    """The case of a seed; with ``negative`` one of the mutations that fit its text."""
    case = draw(seed, loops)
    if not negative:
        return case
    source = source_of(case)
    rng = random.Random(seed)
    fitting = applicable(source)
    rng.shuffle(fitting)
    fitting.sort(key=lambda name: name in WRITES and rng.random() > SOME_WRITES)  # there are as many as of all others
    return next((c for name in fitting if (c := mutated_case(case, name)) is not None), case)


def mutated_case(case: Case, name: str) -> Case | None:
    """The case with a mutation and the sizes that it needs, or None where they do not go together."""
    case = replace(case, mutation=name, **sizes(case, name))
    slow = case.experts > 16 and FORMS[case.form].loop
    plain, text = source_of(replace(case, mutation="none")), source_of(case)
    return case if valid(case) and not slow and text != plain and _compiles(text) else None


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutated", "exec")
    except SyntaxError:
        return False
    return True


def quiet() -> None:
    """A worker of its own: one thread, and no log lines about programs that are meant to be odd."""
    torch.set_num_threads(1)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def quietly() -> Iterator[None]:
    """``quiet`` inside the ``with`` block only: whoever calls the command from Python keeps threads and log levels."""
    threads, levels = torch.get_num_threads(), [logging.getLogger(name).level for name in QUIET]
    quiet()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, level in zip(QUIET, levels, strict=True):
            logging.getLogger(name).setLevel(level)


def run(cases: Iterable[Case], workers: int = 1, total: int | None = None) -> Iterator[Verdict]:
    """Judge cases here (``workers`` 0) or in spawned processes; a line on stderr counts them."""
    start, done = time.monotonic(), Counter[str]()
    if workers:
        pool = multiprocessing.get_context("spawn").Pool(workers, quiet, maxtasksperchild=RECYCLE)
        verdicts: Iterator[Verdict] = pool.imap_unordered(judge, cases)
    else:
        pool, verdicts = None, map(judge, cases)
    try:
        for n, verdict in enumerate(verdicts, 1):
            done[verdict.kind] += 1
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(done.items()))
            sys.stderr.write(f"\r{n}/{total or '?'} programs in {time.monotonic() - start:.0f} s: {counts} ")
            yield verdict
        sys.stderr.write("\n")
        if pool is not None:
            pool.close()
            pool.join()
    finally:
        if pool is not None:
            pool.terminate()


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """Counts per axis value, pair coverage, match rate, and every failure with its seed."""
    kinds = Counter(v.kind for v in verdicts)
    values: dict[str, Counter[str]] = defaultdict(Counter)
    pairs: set[tuple[Any, ...]] = set()
    for v in verdicts:
        axes = v.case.axes()
        for axis, value in axes.items():
            values[axis][str(value)] += 1
        named = [(axis, axes[axis]) for axis in AXES if axis != "style"]
        pairs.update(itertools.combinations(named, 2))
    misses: dict[str, list[int]] = defaultdict(list)
    for v in verdicts:
        if v.kind == "miss":
            misses[f"{','.join(sorted(set(v.codes))) or 'none'} {v.case.form}"].append(v.case.seed)
    judged = [v for v in verdicts if v.kind in ("ok", "miss") and v.case.mutation == "none"]
    matched = [v for v in judged if v.kind == "ok"]
    return {
        "programs": len(verdicts),
        "verdicts": dict(kinds),
        "match_rate": len(matched) / len(judged) if judged else None,
        "values": {axis: dict(counts) for axis, counts in values.items()},
        "pair_coverage": _pair_coverage(pairs),
        "misses": dict(sorted(misses.items(), key=lambda item: -len(item[1]))),
        "failures": [v.to_dict() for v in verdicts if v.kind in ("wrong", "crash")],
        "invalid": [(v.case.seed, v.detail) for v in verdicts if v.kind == "invalid"],
    }


def _pair_coverage(seen: set[tuple[Any, ...]]) -> float:
    """Share of the pairs of axis values, of all that valid cases can reach, that were drawn."""
    reachable: set[tuple[Any, ...]] = set()
    for seed in range(4_000):
        axes = draw(seed).axes()
        reachable.update(itertools.combinations([(axis, axes[axis]) for axis in AXES if axis != "style"], 2))
    return len(seen & reachable) / len(reachable)
