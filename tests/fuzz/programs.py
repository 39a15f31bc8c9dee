"""What the fuzz test files share: a seed judged, and the failure with everything needed to see it again."""

from __future__ import annotations

import json

from moe_compile.fuzz.axes import changed
from moe_compile.fuzz.judge import judge
from moe_compile.fuzz.runner import case_of
from moe_compile.fuzz.source import source_of

PER_FILE = 63  # four files: 252 programs


def accepted(case):
    """Judge one case; a failure prints its source and the command that replays it.

    A mutation may leave a program that cannot run for some sizes: then there is nothing to compare.
    """
    verdict = judge(case)
    if case.mutation != "none" and verdict.kind == "invalid":
        return
    command = f"python -m moe_compile.fuzz --case '{json.dumps(changed(case))}'"
    assert verdict.kind == "ok", f"{verdict.kind} {verdict.detail}\n{source_of(case)}\n{command}"


def is_accepted(seed, negative=False):
    accepted(case_of(seed, negative))
