"""``python -m moe_compile.fuzz``: judge random programs, replay one, or shrink a failure."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .axes import changed, from_dict
from .judge import Verdict, judge
from .runner import case_of, quietly, run, summary
from .shrink import shrink
from .source import source_of


def main(argv: Sequence[str] | None = None) -> int:
    """0 when no program was rewritten wrongly and none crashed, else 1."""
    a = _parser().parse_args(argv)
    with quietly():
        return _run(a)


def _run(a: argparse.Namespace) -> int:
    if a.case is not None or a.replay is not None:
        case = from_dict(json.loads(a.case)) if a.case is not None else case_of(a.replay, a.negative, a.loops)
        verdict = judge(case)
        _show(verdict, a.shrink and verdict.failed)
        return int(verdict.kind in ("wrong", "crash"))
    cases = (case_of(seed, a.negative, a.loops) for seed in range(a.seed, a.seed + a.count))
    verdicts = list(run(cases, a.workers, a.count))
    for verdict in verdicts:
        if verdict.kind in ("wrong", "crash"):
            _show(verdict, a.shrink)
    result = summary(verdicts)
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1, default=str) + "\n")
    shown = {key: result[key] for key in ("programs", "verdicts", "match_rate", "pair_coverage", "misses")}
    print(json.dumps(shown, indent=1))
    return int(bool(result["failures"]))


def _show(verdict: Verdict, smaller: bool) -> None:
    """A verdict with everything that is needed to see it again."""
    case = verdict.case
    print(f"\nseed {case.seed}: {verdict.kind}, {verdict.sites} rewritten {verdict.codes}\n{verdict.detail}")
    if smaller:
        case = shrink(case, verdict.kind)
        print(f"shrunk: {judge(case).detail}")
    print(source_of(case))
    print(f"python -m moe_compile.fuzz --case '{json.dumps(changed(case))}'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_compile.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=100, help="number of programs")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 runs here")
    parser.add_argument("--negative", action="store_true", help="near misses: refused, or numerically equal")
    parser.add_argument("--loops", action="store_true", help="with loops that Dynamo alone cannot capture")
    parser.add_argument("--json", metavar="FILE", help="write the whole result")
    parser.add_argument("--shrink", action="store_true", help="simplify every failure")
    parser.add_argument("--replay", type=int, metavar="SEED", help="judge the program of one seed")
    parser.add_argument("--case", metavar="JSON", help="judge the program of these axis values")
    return parser


if __name__ == "__main__":
    sys.exit(main())
