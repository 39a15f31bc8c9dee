"""For all tests: what PyTorch does beside the work, and no result depends on, is done less often.

Dynamo makes many objects that live on, beside the millions of the imported libraries: every full collection looks at
all of them. What the imports made is set aside; what tests make is still collected, less often. Dynamo itself collects
after every graph, and empties the processor's caches to log how long its guards take: 1.3 of 17.7 s in one profile.

pytest listens to every logger that keeps to itself. Torch's structured trace is one, and nobody else listens to it:
stacks and symbols were written out for each step of Dynamo, 5 % of the time.

Remembering what an operation does to fake tensors costs more than it saves in programs that run once, a tenth of the
time: where the tests are of matching, and not of what users call, it is off.
"""

from __future__ import annotations

import atexit
import gc
import logging
from pathlib import Path

import pytest

MATCHING = {"foreign", "fuzz", "loops", "match", "near_misses", "patterns"}


def pytest_collection_finish() -> None:
    from torch._dynamo import config, guards

    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # what is left at the end is no leak
    gc.set_threshold(100_000, 50, 100)
    config.run_gc_after_compile = False
    guards.profile_guard_manager = lambda *_: 0.0
    logging.getLogger("torch.__trace").propagate = True


def pytest_runtest_setup(item: pytest.Item) -> None:
    from torch._dynamo import config

    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    config.fake_tensor_cache_enabled = folder not in MATCHING
