"""One case: the original in eager mode, the rewritten program and float64 against each other.

Verdicts: ``ok``; ``miss``, a layer that had to be rewritten was not; ``wrong``, a number, shape or write differs;
``crash``, the compiled call raised and eager mode did not; ``invalid``, the original itself raises.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moe_compile.comparing import Run, compare
from moe_compile.report import REWRITTEN

from .axes import Case, must_match
from .mutations import MUTATIONS
from .program import Program, program, recorded
from .tracing import Traced, traced

FLOOR = {torch.float32: 1e-7, torch.float64: 1e-15, torch.bfloat16: 1e-3, torch.float16: 1e-4}
COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.9999, torch.float16: 0.9999}
FACTOR = 2.0
POOL = 40  # inputs that tell both errors
SLACK = 10.0  # times the original's own error: up to here one output may be unlucky, and the pool decides
INPUTS = 6  # further inputs that tell the original's own error


@dataclass
class Verdict:
    """What became of one case."""

    case: Case
    kind: str
    detail: str = ""
    codes: list[str] = field(default_factory=list)
    sites: int = 0

    @property
    def failed(self) -> bool:
        return self.kind in ("miss", "wrong", "crash")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(case: Case) -> Verdict:
    """Run one case. Never raises for what the program or the compiler does."""
    try:
        with program(case) as p, torch.no_grad():
            return _judge(p)
    except SyntaxError as error:
        return Verdict(case, "invalid", f"the mutation does not fit: {error}")


def _judge(p: Program) -> Verdict:
    case = p.case
    result = traced(p.model, dynamic=True if case.mode == "dynamic" else None)
    problems: list[str] = []
    for turn in range(2):
        if turn:
            p.next_turn()
        args = p.inputs(turn)
        try:
            original, reference, writes = _original(p, args)
        except Exception as error:  # a program that fails as it is judges nobody
            return Verdict(case, "invalid", f"{type(error).__name__}: {error}")
        before = _state(p, args)
        torch.manual_seed(case.seed)
        try:
            ours = result.call(*args)
        except Exception:
            return _verdict(case, result, "crash", traceback.format_exc(limit=-6))
        found = differences(ours, original, reference)
        if found:  # a lucky rounding of the original is no limit: take the worst of a few inputs
            own = _own_errors(p)
            found = differences(ours, original, reference, own)
            if found and not differences(ours, original, reference, own, SLACK):
                found = _pooled(p, result)
        found += [f"{name}: {text}" for name, text in _other_writes(before, _state(p, args), writes)]
        problems += [f"call {turn}: {text}" for text in found]
    rewritten = sum(s.status == REWRITTEN for s in result.sites)
    random = case.mutation != "none" and MUTATIONS[case.mutation].refuse and case.around != "shared"
    if random and rewritten:
        problems.append("rewritten although the program draws random numbers inside an expert")
    elif case.mutation != "none" and not rewritten:
        problems = []  # the program stayed as it was
    if problems:
        return _verdict(case, result, "wrong", "; ".join(problems))
    wanted = len(result.graphs) * (2 if case.around == "two_layers" else 1)
    most = 2 if case.mode in ("dynamic", "recompile") else 1  # a size of one is a graph of its own
    if must_match(case) and (rewritten != wanted or len(result.graphs) > most):
        refusals = "; ".join(f"{s.code} {s.reason}" for s in result.sites if s.status != REWRITTEN)
        return _verdict(case, result, "miss", f"{rewritten} of {wanted} in {len(result.graphs)} graphs: {refusals}")
    return _verdict(case, result, "ok", "")


def _state(p: Program, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Everything that a program may write: its inputs and its weights."""
    inputs = {f"input {i}": a for i, a in enumerate(args)}
    return {name: t.clone() for name, t in (*inputs.items(), *p.model.state_dict().items())}


def _original(p: Program, args: tuple[Tensor, ...]) -> tuple[Any, Any, dict[str, Tensor]]:
    """The original's result, float64 with the same routing, and what the original wrote."""
    state = {k: v.clone() for k, v in p.model.state_dict().items()}
    kept = tuple(a.clone() for a in args)
    before = _state(p, kept)
    torch.manual_seed(p.case.seed)
    mine = tuple(a.clone() for a in args)
    original, routing = recorded(p.model, mine)
    after = _state(p, mine)
    p.model.load_state_dict(state)
    writes = {name: t for name, t in after.items() if not torch.equal(t, before[name])}
    return original, p.reference(kept, routing), writes


def _other_writes(
    before: dict[str, Tensor], after: dict[str, Tensor], writes: dict[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Tensors that are written otherwise than the original writes them."""
    for name, t in after.items():
        written = not torch.equal(t, before[name])
        if written != (name in writes):
            yield name, "written" if written else "not written, though the original writes it"
        elif written and not torch.allclose(t, writes[name], rtol=2e-2, atol=1e-3):
            yield name, "other values written"


def _own_errors(p: Program) -> list[tuple[Any, Any]]:
    """The original's results for other tokens, with their float64 references."""
    return [_original(p, p.inputs(turn))[:2] for turn in range(2, 2 + INPUTS)]


def _pooled(p: Program, result: Traced) -> list[str]:
    """Outputs whose error, root mean square over many inputs, is too large: one small output says little."""
    errors: list[list[tuple[float, float]]] = []
    floors: list[float] = []
    for turn in range(2, 2 + POOL):
        args = p.inputs(turn)
        original, reference, _ = _original(p, args)
        state = {k: v.clone() for k, v in p.model.state_dict().items()}
        torch.manual_seed(p.case.seed)
        ours = result.call(*args)
        p.model.load_state_dict(state)
        outs = [tree_leaves(out) for out in (ours, original, reference)]
        errors.append([(_relative(u, r), _relative(o, r)) for u, o, r in zip(*outs, strict=True)])
        floors = [FLOOR[o.dtype] for o in outs[1]]
    problems = []
    for i, pairs in enumerate(zip(*errors, strict=True)):
        mine, own = (math.sqrt(sum(e * e for e in column) / POOL) for column in zip(*pairs, strict=True))
        if mine > FACTOR * own + floors[i]:
            problems.append(f"output {i}: over {POOL} inputs error {mine:.2e} > {FACTOR} * {own:.2e} + {floors[i]:.0e}")
    return problems


def differences(
    ours: Any, original: Any, reference: Any, others: Sequence[tuple[Any, Any]] = (), factor: float = FACTOR
) -> list[str]:
    """What is wrong with the rewritten result, in words; ``others`` widen what the original's own error is."""
    runs = [Run(tree_leaves(out)) for out in (ours, original, reference)]
    problems = []
    for i, (u, o, r) in enumerate(zip(*(run.tensors for run in runs), strict=True)):
        own = [_relative(tree_leaves(a)[i], tree_leaves(b)[i]) for a, b in others]
        floor = FLOOR[o.dtype] + max([0.0, *(factor * (error - _relative(o, r)) for error in own)])
        errors = compare(Run([u]), Run([o]), Run([r]), floor, factor)
        problems += errors.problems
        if errors.ok and cosine(u, r) < COSINE[o.dtype] <= cosine(o, r):
            problems.append(f"cosine {cosine(u, r):.6f}")
        if u.shape == o.shape and u.numel() and _strides(u) != _strides(o):
            problems.append(f"strides {u.stride()}, original {o.stride()}")
    return problems


def _strides(t: Tensor) -> list[int]:
    """Those that mean something: the address of an element never depends on the stride of a size of one."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of ``a`` to ``b``; 0 where either is not finite: such a run says nothing of rounding."""
    distance = float((a.double() - b).norm() / b.norm().clamp_min(1e-300))
    return distance if math.isfinite(distance) else 0.0


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors, 1 where both are zero."""
    x, y = a.double().flatten(), b.double().flatten()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else float(torch.equal(x, y))


def _verdict(case: Case, result: Traced, kind: str, detail: str) -> Verdict:
    codes: Sequence[str | None] = [s.code for s in result.sites if s.status != REWRITTEN]
    return Verdict(case, kind, detail, [c or "none" for c in codes], sum(s.status == REWRITTEN for s in result.sites))
