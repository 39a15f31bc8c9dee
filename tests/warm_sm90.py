"""Compile two kernels for sm_90a by worker processes, without a GPU: ``python warm_sm90.py two | broken | interrupt``.

Prints JSON. ``hits`` is what Triton itself says of its disk cache when it is asked for the same kernels as a launch
would ask: true for a kernel that was found there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

sys.path.append(str(Path(__file__).with_name("kernels")))
from compile_sm90 import Driver

from moe_compile.kernels import ahead, combine, workers
from moe_compile.kernels.launch import DEPENDENT, Launch, noting


def launches() -> list[tuple[Launch, tuple[Any, ...]]]:
    """Of two kernels; several of the same."""
    out: list[tuple[Launch, tuple[Any, ...]]] = []
    with noting(lambda launch, args: out.append((launch, args))):
        for pairs in (500, 512, 1000):
            combine.invert(torch.empty(pairs, dtype=torch.int32, device="meta"))
        for tokens in (1, 5, 16):
            rows = torch.empty(2 * tokens, 64, dtype=torch.bfloat16, device="meta")
            position = torch.empty(2 * tokens, dtype=torch.int32, device="meta")
            combine.combine_padded(rows, position, None, 2, torch.bfloat16)
    return out


def hits(found: list[tuple[Launch, tuple[Any, ...]]]) -> list[bool]:
    """Of the distinct kernels."""
    seen: list[bool] = []
    knobs.compilation.listener = lambda **told: seen.append(told["cache_hit"])
    for launch, args in found:
        launch.kernel.warmup(*args, grid=launch.grid, **launch.constants)
    knobs.compilation.listener = None
    return seen


def run(mode: str) -> dict[str, Any]:
    driver.set_active(Driver())
    combine.dependent = lambda _: DEPENDENT
    found = launches()
    needs = {need.key: need for need in (ahead.needed(*each) for each in found)}
    missing = [n for n in needs.values() if not ahead.is_cached(n.key, n.function)]
    jobs = [workers.Job(n.key, n.source) for n in missing if n.source is not None]
    if mode == "broken":  # one that no compiler takes, one whose process dies, and two that are well
        bad = jobs[0].source.__class__(**{**jobs[0].source.__dict__, "constants": {}})
        dead = jobs[0].source.__class__(**{**jobs[0].source.__dict__, "module": "warm_dies"})
        jobs = [workers.Job("0" * 64, bad), workers.Job("1" * 64, dead), *jobs]
    answers: list[workers.Answer] = []

    def step(answer: workers.Answer) -> None:
        answers.append(answer)
        if mode == "interrupt":
            raise KeyboardInterrupt

    interrupted = False
    try:
        workers.compile_all(jobs, 2, step)
    except KeyboardInterrupt:
        interrupted = True
    out = {
        "launches": len(found),
        "needed": sorted(n.function for n in needs.values()),
        "missing": len(missing),
        "compiled": sum(answer.compiled for answer in answers),
        "errors": sorted(answer.error for answer in answers if answer.error),
        "interrupted": interrupted,
    }
    if mode != "interrupt":
        out["hits"] = hits(found)
        out["in memory"] = [ahead.needed(*each).source is None for each in found]
    return out


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
