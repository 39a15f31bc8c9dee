"""``python -m moe_compile tune``: measure plans for a layer on the GPU at hand, and keep those that win.

The search climbs: from the plan that ``kernels.config`` chooses, one field of one GEMM's tiles is changed at a time,
and a change that makes the whole layer faster stays. A candidate counts only when its result is as close to the torch
twin as that of the standard plan. What wins is measured again, in turn with the standard plan, before it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .kernels import config, tuned
from .kernels.activation import LAYOUTS, Epilogue
from .kernels.config import Device, Plan, Tiles
from .kernels.experts import follow_plan, is_dense, plan_of, run_twin
from .kernels.operand import Operand, make_operand
from .kernels.tile import Projection
from .spec import ACTIVATIONS

DTYPES = ("bfloat16", "float16")  # float32 runs by one fixed plan
GAIN = 0.98  # of the standard plan's time, above which a table entry is not worth having
FACTOR, FLOOR = 2.0, 1e-3  # a candidate's error: that often the standard plan's own, plus this
ACCUMULATORS = 160  # registers of one thread for sums, beyond which the compiler spills
ROUNDS = 5  # alternate measurements of the winner and the standard plan
VALUES: dict[str, tuple[Any, ...]] = {
    "bm": (16, 32, 64, 128),
    "wn": (64, 128, 256),
    "bk": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6),
    "swap": (False, True),
    "tail": (0, 1, 2),
    "group": (1, 2, 4, 8, 16, 32),
    "evict": ("", "evict_first"),
    "tma": (False, True),
    "rows_tma": (False, True),
    "ladder": (False, True),
    "chained": (False, True),
}
DECODE_FIELDS = ("bm", "wn", "bk", "warps", "stages", "swap", "tail", "evict")
SHARED_FIELDS = ("bm", "ladder")  # the two GEMMs have one tile table

Timer = Callable[[Callable[[], Any]], float]  # microseconds of one call


@dataclass(frozen=True)
class Result:
    """What became of one number of tokens; ``entry`` is None where the standard plan stays."""

    layer: tuned.Layer
    tokens: int
    entry: tuned.Entry | None
    default_us: float
    tried: int
    failed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        kept = None if self.entry is None else self.entry.to_dict()
        return {"layer": self.layer.name, "tokens": self.tokens, "default_us": self.default_us, "kept": kept,
                "tried": self.tried, "unfit": self.failed}  # fmt: skip

    def __str__(self) -> str:
        if self.entry is None:
            verdict = "the standard plan stays"
        else:
            verdict = f"{self.default_us:.1f} -> {self.entry.us:.1f} us, path {self.entry.plan.path}"
        return f"{self.layer.name}, T={self.tokens}: {verdict} ({self.tried} plans tried, {self.failed} unfit)"


class Problem:
    """One layer with random weights, tokens and routing on one device, and the plans it can follow."""

    def __init__(self, layer: tuned.Layer, tokens: int, activation: str, device: torch.device, limits: Device) -> None:
        dtype = getattr(torch, layer.dtype)
        generator = torch.Generator(device).manual_seed(tokens)

        def normal(scale: float, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)

        def weights(rows: int, depth: int) -> Operand:
            if layer.storage == "transposed":
                return Operand([normal(depth**-0.5, layer.experts, depth, rows).transpose(1, 2)])
            stacked = normal(depth**-0.5, layer.experts, rows, depth)
            return make_operand([w.clone() for w in stacked] if layer.storage == "separate" else [stacked], 2)

        gated, separate = layer.layout != "single", layer.layout == "separate"
        fused = 2 * layer.inter if gated and not separate else layer.inter
        args = (1.0, math.inf, math.inf, math.inf, 0.0)
        self.up = Projection(
            weights(fused, layer.hidden),
            layer.inter,
            Epilogue(activation, args, layer.layout),
            weights(layer.inter, layer.hidden) if separate else None,
        )
        self.down = Projection(weights(layer.hidden, layer.inter), layer.hidden)
        self.x = normal(1.0, tokens, layer.hidden)
        logits = torch.randn(tokens, layer.experts, device=device, generator=generator)
        self.weights, self.ids = logits.softmax(-1).topk(layer.top_k)
        self.layer, self.tokens, self.limits = layer, tokens, limits
        self.dense = is_dense(self.up, self.down)
        self.tma = (self.up.describable, self.down.describable)

    def run(self, plan: Plan) -> Tensor:
        """The layer by a plan, ``[T, H]``."""
        rows = (self.x, self.weights, self.ids, self.layer.experts)
        return follow_plan(plan, *rows, self.up, self.down, False, None)

    def truth(self) -> Tensor:
        """By the torch twin, in float32 throughout."""
        return run_twin(self.x.float(), self.weights, self.ids, self.layer.experts, self.up, self.down)

    def standard(self, path: str | None = None) -> Plan:
        """The plan of ``config``."""
        return plan_of(self.ids, self.layer.experts, self.up, self.down, path, self.limits)

    def starts(self) -> list[Plan]:
        """The standard plan, then those of the other paths that may win at this number of tokens."""
        first = self.standard()
        reach = {
            "gemv": self.dense and self.tokens <= 2 * config.GEMV_TOKENS,
            "decode": self.tokens <= 256,
            "sorted": self.tokens > 16,
        }
        others = [self.standard(path) for path, near in reach.items() if near and path != first.path]
        return [first, *(plan for plan in others if self.fits(plan))]

    def fits(self, plan: Plan) -> bool:
        """Whether the device and the layer allow a plan."""
        if not tuned.follows(plan, self.layer, self.tokens, self.limits, dense=self.dense, tma=self.tma):
            return False
        both = (plan.up, plan.down)
        held = [(tiles.bm + tiles.rest) * tiles.wn / (32 * tiles.warps) for tiles in both]
        return plan.path == "gemv" or (all(map(tuned.sound, both)) and max(held) <= ACCUMULATORS)

    def neighbours(self, plan: Plan) -> Iterator[Plan]:
        """Plans that differ from ``plan`` in one field."""
        if plan.path == "gemv":
            return
        values = {**VALUES, "programs": (0, self.limits.processors)}
        for name in DECODE_FIELDS if plan.path == "decode" else values:
            for value in values[name]:
                up, down = _changed(plan.up, name, value), _changed(plan.down, name, value)
                one_table = name in SHARED_FIELDS
                for near in [(up, down)] if one_table else [(up, plan.down), (plan.up, down)]:
                    found = Plan(plan.path, *near)
                    if found != plan and self.fits(found):
                        yield found


def _changed(tiles: Tiles, name: str, value: Any) -> Tiles:
    """Tiles with another value, and with what it cannot do without."""
    rest: dict[str, Any] = {}
    if name == "ladder" and value:
        rest = {"tail": 0, "tma": True, "swap": True, "rows_tma": False}
    elif name == "rows_tma" and value:
        rest = {"tail": 0, "tma": True}
    elif name == "tma" and not value:
        rest = {"rows_tma": False}
    return replace(tiles, **{**rest, name: value})


def tune(
    problem: Problem, budget: int, timer: Timer | None = None, step: Callable[[int, str], None] = lambda n, best: None
) -> Result:
    """Search within ``budget`` candidates.

    Args:
        timer: what measures; by default ``graph_time``.
        step: told the number of candidates so far and what was found; for a progress bar.

    Raises:
        RuntimeError: the standard plan itself does not run or gives NaN.
    """
    timer = timer or graph_time
    truth = problem.truth()
    first, *others = problem.starts()
    own = _error(problem.run(first), truth)
    if not math.isfinite(own):
        raise RuntimeError(f"the standard plan for {problem.layer.name}, T={problem.tokens} gives NaN: {first}")
    tried, failed = 0, 0
    best, best_us = first, timer(lambda: problem.run(first))
    seen = {first}

    def measure(plan: Plan) -> float:
        nonlocal tried, failed
        seen.add(plan)
        tried += 1
        try:
            good = _error(problem.run(plan), truth) <= FACTOR * own + FLOOR
            us = timer(lambda: problem.run(plan)) if good else math.inf
        except Exception:  # too many registers or bytes, or a compiler that gives up: not a plan for this device
            us = math.inf
        failed += us == math.inf
        step(tried, f"{min(us, best_us):.1f} us")
        return us

    def climb(plan: Plan, us: float) -> tuple[Plan, float]:
        moving = True
        while moving and tried < budget:
            moving = False
            for near in problem.neighbours(plan):
                if near in seen or tried >= budget:
                    continue
                found = measure(near)
                if found < us:
                    plan, us, moving = near, found, True
                    break
        return plan, us

    for start in others[:budget]:
        us = measure(start)
        if us < best_us:
            best, best_us = start, us
    best, best_us = climb(best, best_us)
    pairs = [(timer(lambda: problem.run(first)), timer(lambda: problem.run(best))) for _ in range(ROUNDS)]
    default_us, us = (median(column) for column in zip(*pairs, strict=True))
    entry = tuned.Entry(best, us, default_us) if best != first and us <= GAIN * default_us else None
    return Result(problem.layer, problem.tokens, entry, default_us, tried, failed)


def _error(out: Tensor, truth: Tensor) -> float:
    return float((out.float() - truth).norm() / truth.norm())


def graph_time(call: Callable[[], Any]) -> float:
    """By replays of a CUDA graph: launches from Python would drown the kernels."""
    from triton.testing import do_bench_cudagraph

    return 1e3 * float(do_bench_cudagraph(call, return_mode="median"))


def keep(path: Path, result: Result) -> None:
    """Put a result into the table of a file; where the standard plan stays, an older entry goes.

    Raises:
        tuned.TableError: the file is no table; it stays as it is.
    """
    tuned.merge(path, {result.layer.name: {result.tokens: result.entry}})


def layer_of(sizes: Sequence[int], dtype: str, layout: str, storage: str, activation: str) -> tuned.Layer:
    """The layer with ``sizes`` (E, K, H, I).

    Raises:
        ValueError: something here has another name, or there is nothing to choose for such a layer.
    """
    experts, top_k, hidden, inter = sizes
    names = {"dtype": (dtype, DTYPES), "layout": (layout, LAYOUTS), "storage": (storage, tuned.STORAGES)}
    for what, (name, known) in {**names, "activation": (activation, ACTIVATIONS)}.items():
        if name not in known:
            raise ValueError(f"{what} {name!r} is not one of {', '.join(known)}")
    if hidden % 8 or inter % 8:
        raise ValueError(f"H={hidden} and I={inter} must be multiples of 8: other layers run by one fixed plan")
    return tuned.Layer(experts, top_k, hidden, inter, dtype, layout, storage)
