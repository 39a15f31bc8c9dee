"""Mutation test of the matcher: switch each guard off in turn, and some test must fail.

    python -m tests.mutation [--only match.rows] [--tests tests/near_misses ..] [--json out.json]
                             [--after earlier.json]

Run from the root of the repository. The score is killed / (all mutants less those of ``equivalent.py``); the
figures are in ``docs/mutation.md``. ``--after`` takes the kills of an earlier run for granted and tries only what
survived it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import inspect
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

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
TESTS = ("tests/near_misses", "tests/patterns", "tests/match", "tests/loops")
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

    def killer(self, mutant: Mutant) -> tuple[str, int]:
        """The test that fails with ``mutant`` ("" when none does), and how many were run."""
        speaking = sorted((n for n, hits in self.hits.items() if mutant.number in hits), key=self.seconds.__getitem__)
        if len(speaking) > FEW:
            speaking = [n for n in speaking if n not in self.recorder.slow]
        SWITCH.active = mutant.number
        try:
            for i, name in enumerate(speaking):
                if self.run(name) is not None:
                    return name, i + 1
        finally:
            SWITCH.active = -1
        return "", len(speaking)


def earlier(path: str | None) -> dict[tuple[str, int], str]:
    """Killers of an earlier run, by key and by which of the mutants with that key it is."""
    seen: collections.Counter[str] = collections.Counter()
    out = {}
    for row in json.loads(Path(path).read_text()) if path else []:
        seen[row["key"]] += 1
        out[row["key"], seen[row["key"]]] = row["killer"]
    return out


def _timeout(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only guards of modules whose name contains this")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="test files or directories")
    parser.add_argument("--json", help="write every mutant and its killer here")
    parser.add_argument("--after", help="what an earlier run wrote: what it killed is not tried again")
    options = parser.parse_args()
    signal.signal(signal.SIGPROF, _timeout)
    os.chdir(ROOT)
    suite = Suite(collect(list(options.tests)))
    start = time.perf_counter()
    unfit = suite.baseline()
    mutants = [m for m in SWITCH.mutants if options.only in m.module]
    print(f"{len(suite.tests)} tests, {len(suite.recorder.slow)} of them with Dynamo every time, "
          f"{len(unfit)} unfit, {len(mutants)} mutants, {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    for line in unfit:
        print(f"unfit: {line}")
    rows: list[dict[str, Any]] = []
    killed = excused = 0
    known = earlier(options.after)
    seen: collections.Counter[str] = collections.Counter()
    for mutant in mutants:
        seen[mutant.key] += 1
        test, tries = known.get((mutant.key, seen[mutant.key]), ""), 0
        if not test:
            test, tries = suite.killer(mutant)
        rows.append({"at": f"{mutant.module}:{mutant.line}", "key": mutant.key, "killer": test, "tries": tries})
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1))
        killed += bool(test)
        if not test:
            reason = EQUIVALENT.get(mutant.key)
            excused += reason is not None
            fate = "equivalent" if reason else "survived"
            print(f"{fate} after {tries}: {rows[-1]['at']}: {mutant.kind}: {mutant.text}", flush=True)
    score = killed / max(1, len(mutants) - excused)
    print(f"killed {killed} of {len(mutants)} mutants, {excused} equivalent: score {score:.1%}, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    return 0 if score >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
