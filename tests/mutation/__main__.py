"""Mutation test of the matcher: switch each guard off in turn, and some test must fail.

    python -m tests.mutation [--only match.rows] [--tests tests/near_misses ..] [--json out.json]
                             [--after earlier.json] [--workers 2]

Run from the root of the repository. The score is killed / (all mutants less those of ``equivalent.py``); the
figures are in ``docs/testing.md``. ``--after`` takes the kills of an earlier run for granted and tries only what
survived it. Every worker takes a share of the tests and tries all mutants with it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import inspect
import io
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ.setdefault("MOE_COMPILE_NEAR_MISSES", "all")

from instrument import Finder, Mutant, Switch, is_matcher  # noqa: E402

SWITCH = Switch()
if any(is_matcher(name) for name in sys.modules):
    raise RuntimeError("the matcher was imported before its guards could be put behind a switch")
sys.meta_path.insert(0, Finder(SWITCH, is_matcher))

import pytest  # noqa: E402
import support  # noqa: E402
from equivalent import EQUIVALENT  # noqa: E402
from replay import Recorder  # noqa: E402

import moe_compile.backend  # noqa: E402, F401

RECORDER = Recorder()
support.rewritten = RECORDER  # type: ignore[assignment]  # before any test module takes its own name for it
TESTS = (
    "tests/near_misses",
    "tests/patterns",
    "tests/match",
    "tests/loops",
    "tests/test_wrong_meanings.py",
    "tests/test_wrong_rewrites.py",
)
FEW = 100  # a guard that speaks in more tests is not tried with those that need Dynamo every time
SECONDS = 60  # of this process: a replay that takes longer has lost its way, which a test would show


class Collector:
    """Keeps what pytest collects."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.items += items


def collect(paths: list[str]) -> dict[str, Any]:
    """The tests of ``paths`` that can be called again and again: no Inductor, no fixture but ``monkeypatch``.

    Fixtures of a module that only patch something are called before the test.
    """
    found = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *paths], plugins=[found])
    out = {}
    for item in found.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "inductor" in item.name:
            continue
        patches, fit = [], True
        for name in set(item.fixturenames) - set(params) - {"monkeypatch", "request"}:
            made = item._fixtureinfo.name2fixturedefs[name][-1]
            fit &= tuple(made.argnames) == ("monkeypatch",) and not inspect.isgeneratorfunction(made.func)
            patches.append(made.func)
        if fit:
            asks = "monkeypatch" in inspect.signature(item.obj).parameters
            out[item.nodeid] = (functools.partial(item.obj, **params), patches, asks)
    return out


class Suite:
    """The tests with their captures, how long each takes, and which guards speak in it."""

    def __init__(self, tests: dict[str, Any]) -> None:
        self.tests, self.recorder = tests, RECORDER
        self.hits: dict[str, set[int]] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str) -> BaseException | None:
        """What a test raises, or None."""
        function, patches, asks = self.tests[name]
        self.recorder.start(name)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with pytest.MonkeyPatch.context() as patch:
                for prepare in patches:
                    prepare(patch)
                function(**({"monkeypatch": patch} if asks else {}))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # pytest's outcomes among them
            return error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return None

    def baseline(self) -> list[str]:
        """Record every test, then replay it unchanged: what does not pass is of no use. Returns those."""
        unfit = []
        for name in self.tests:
            first = self.run(name)
            for again in (False, True):
                SWITCH.hits.clear()
                start = time.perf_counter()
                error = first or self.run(name)
                self.seconds[name] = time.perf_counter() - start
                self.hits[name] = set(SWITCH.hits)
                if error is None or again or first:
                    break
                self.recorder.slow.add(name)
            if error is not None:
                unfit.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
                self.hits[name] = set()
        return unfit

    def killer(self, mutant: Mutant, many: bool) -> tuple[str, int]:
        """The test that fails with ``mutant`` ("" when none does), and how many were run.

        ``many``: the guard speaks in many tests, those of other workers counted.
        """
        speaking = sorted((n for n, hits in self.hits.items() if mutant.number in hits), key=self.seconds.__getitem__)
        if many:
            speaking = [n for n in speaking if n not in self.recorder.slow]
        SWITCH.active = mutant.number
        try:
            for i, name in enumerate(speaking):
                if self.run(name) is not None:
                    return name, i + 1
        finally:
            SWITCH.active = -1
        return "", len(speaking)


class Report(NamedTuple):
    """What one worker found: (killer, tests run) by mutant, tests that do not pass, number of slow tests."""

    found: dict[int, tuple[str, int]]
    unfit: list[str]
    slow: int


class Shared(NamedTuple):
    """What the workers know of each other."""

    killed: Any  # [mutants] 1 once some worker has killed it
    speaks: Any  # [mutants] in how many tests the guard speaks
    together: Any  # barrier between the baseline and the mutants


def worker(tests: dict[str, Any], mutants: list[Mutant], shared: Shared, reports: Any) -> None:
    """Try ``mutants`` with one share of the tests."""
    signal.signal(signal.SIGPROF, _timeout)
    suite = Suite(tests)
    unfit = suite.baseline()
    with shared.speaks.get_lock():
        for hits in suite.hits.values():
            for number in hits:
                shared.speaks[number] += 1
    shared.together.wait()
    found = {}
    for mutant in mutants:
        if not shared.killed[mutant.number]:
            test, tries = suite.killer(mutant, shared.speaks[mutant.number] > FEW)
            found[mutant.number] = test, tries
            if test:
                shared.killed[mutant.number] = 1
    reports.put(Report(found, unfit, len(suite.recorder.slow)))


def received(reports: Any, workers: list[Any]) -> Iterator[Report]:
    """The report of every worker; one that died would be waited for in vain."""
    for _ in workers:
        while True:
            try:
                yield reports.get(timeout=10)
                break
            except queue.Empty:
                dead = [process for process in workers if process.exitcode]
                if dead:
                    raise RuntimeError(f"{dead[0].name} died with exit code {dead[0].exitcode}") from None


def earlier(path: str | None, mutants: list[Mutant]) -> dict[int, str]:
    """Killers of an earlier run by mutant: those with one key are told apart by their order."""
    rows: dict[tuple[str, int], str] = {}
    seen: collections.Counter[str] = collections.Counter()
    for row in json.loads(Path(path).read_text()) if path else []:
        seen[row["key"]] += 1
        rows[row["key"], seen[row["key"]]] = row["killer"]
    seen.clear()
    out = {}
    for mutant in mutants:
        seen[mutant.key] += 1
        out[mutant.number] = rows.get((mutant.key, seen[mutant.key]), "")
    return {number: test for number, test in out.items() if test}


def _timeout(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only guards of modules whose name contains this")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="test files or directories")
    parser.add_argument("--json", help="write every mutant and its killer here")
    parser.add_argument("--after", help="what an earlier run wrote: what it killed is not tried again")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    os.chdir(ROOT)
    start = time.perf_counter()
    tests = collect(list(options.tests))
    killers = earlier(options.after, SWITCH.mutants)
    mutants = [m for m in SWITCH.mutants if options.only in m.module]
    tries = collections.Counter[int]()
    unfit, slow = [], 0
    fork = multiprocessing.get_context("fork")
    shared = Shared(*(fork.Array("i", len(SWITCH.mutants)) for _ in range(2)), fork.Barrier(options.workers))
    reports = fork.Queue()
    names = sorted(tests)
    todo = [m for m in mutants if m.number not in killers]
    workers = [
        fork.Process(
            target=worker, args=({n: tests[n] for n in names[i :: options.workers]}, todo, shared, reports), daemon=True
        )
        for i in range(options.workers)
    ]
    for process in workers:
        process.start()
    for report in received(reports, workers):
        unfit += report.unfit
        slow += report.slow
        for number, (test, run) in report.found.items():
            tries[number] += run
            if test:
                killers.setdefault(number, test)
    print(f"{len(tests)} tests, {slow} of them with Dynamo every time, {len(unfit)} unfit, {len(mutants)} mutants")
    for line in sorted(unfit):
        print(f"unfit: {line}")
    rows: list[dict[str, Any]] = []
    killed = excused = 0
    for mutant in mutants:
        test, run = killers.get(mutant.number, ""), tries[mutant.number]
        rows.append({"at": f"{mutant.module}:{mutant.line}", "key": mutant.key, "killer": test, "tries": run})
        killed += bool(test)
        if not test:
            reason = EQUIVALENT.get(mutant.key)
            excused += reason is not None
            fate = "equivalent" if reason else "survived"
            print(f"{fate} after {run}: {rows[-1]['at']}: {mutant.kind}: {mutant.text}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    score = killed / max(1, len(mutants) - excused)
    print(f"killed {killed} of {len(mutants)} mutants, {excused} equivalent: score {score:.1%}, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    return 0 if score >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
