"""The arithmetic of ``check``: runs, their tensors and discrete choices, and errors between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SEED = 20_240_117
FAR = 4.0  # rows this many limits away have another expert, not another rounding
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


@dataclass
class Run:
    """One call: its output tensors in pytree order, leaves that are not compared, and its top-k choices."""

    tensors: list[Tensor]
    skipped: list[str] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Errors:
    """The worst output tensor of a comparison; ``structural`` when shapes, NaN or dtypes already disagree."""

    ok: bool
    ours: float
    original: float
    limit: float
    max_abs: float
    problems: list[str]
    structural: bool


class _Choices(TorchDispatchMode):
    """Keep the indices of every top-k, as sorted sets: the discrete choices of a run."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            self.seen.append(out[1].sort(dim=-1).values.cpu())
        return out


class Widened(TorchFunctionMode):
    """Takes every request for float32 as one for float64: code that says ``.float()`` then runs in float64, too.

    Without it such code would compute its own reference in float32 and have no error, or less than it has.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def recorded(
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dtype: torch.dtype | None = None,
    record: bool = True,
) -> Run:
    """Call with cloned inputs (floating ones in ``dtype``) and a fixed seed."""

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, _PLAIN) else _own(leaf)
        copied = leaf.detach().clone()
        return copied.to(dtype) if dtype is not None and copied.is_floating_point() else copied

    own_args, own_kwargs = tree_map(clone, (tuple(args), kwargs))
    torch.manual_seed(SEED)
    mode = _Choices() if record else None  # Dynamo does not trace under a dispatch mode
    with mode or nullcontext():
        out = call(*own_args, **own_kwargs)
    leaves = tree_leaves(out)
    skipped = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))})
    tensors = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
    return Run(tensors, skipped, mode.seen if mode is not None else [])


def _own(leaf: Any) -> Any:
    """A copy of an input that is no tensor, such as a cache that the call would fill."""
    try:
        return copy.deepcopy(leaf)
    except Exception:
        return leaf  # an object that cannot be copied is shared by the runs, as by two calls of the user


def usable(run: Run, original: Run) -> bool:
    """Whether a run can judge another: the same shapes, and finite wherever the original is."""
    if len(run.tensors) != len(original.tensors):
        return False
    return all(
        r.shape == o.shape and bool((torch.isfinite(r) | ~torch.isfinite(o)).all())
        for r, o in zip(run.tensors, original.tensors, strict=True)
    )


def all_tensors(args: Sequence[Any], kwargs: dict[str, Any], model: Any) -> Iterator[Tensor]:
    """Every tensor that goes into a call: inputs and parameters."""
    yield from (leaf for leaf in tree_leaves((tuple(args), kwargs)) if isinstance(leaf, Tensor))
    if isinstance(model, nn.Module):
        yield from model.parameters()


def flips(a: Run, b: Run) -> float:
    """Share of top-k rows whose chosen sets differ; 0.0 if the runs cannot be compared row by row."""
    pairs = [(x, y) for x, y in zip(a.choices, b.choices, strict=False) if x.shape == y.shape and x.dim() > 0]
    rows = sum(x[..., 0].numel() for x, _ in pairs)
    moved = sum(int((x != y).any(dim=-1).sum()) for x, y in pairs)
    return moved / rows if rows else 0.0


def wobble(model: nn.Module, number: int) -> None:
    """Move every floating parameter by at most one rounding error of its own dtype, in place."""
    generator = torch.Generator().manual_seed(SEED + number)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.element_size() > 1:  # fp8 numbers are what they are: a code, not a rounding
                noise = torch.rand(p.shape, generator=generator).to(p.device) * 2 - 1
                p.copy_((p.double() * (1 + torch.finfo(p.dtype).eps * noise)).to(p.dtype))


def compare(
    ours: Run, original: Run, reference: Run, floor: float, factor: float, others: Sequence[Run] = ()
) -> Errors:
    """The worst output tensor; ``others`` are further runs of the original that widen its own error."""
    if len(ours.tensors) != len(original.tensors):
        counts = len(ours.tensors), len(original.tensors)
        problem = f"the rewritten program returned {counts[0]} tensors, the original {counts[1]}"
        return Errors(False, float("inf"), 0.0, floor, float("inf"), [problem], True)
    worst = (0.0, 0.0, floor)
    problems: list[str] = []
    ok, structural, max_abs = True, False, 0.0
    for i, (u, o, r) in enumerate(zip(ours.tensors, original.tensors, reference.tensors, strict=True)):
        problem = _shape_problem(i, u, o)
        if problem:
            problems.append(problem)
            ok, structural, worst = False, True, (float("inf"), 0.0, floor)
            continue
        finite = torch.isfinite(o) if o.is_floating_point() else torch.ones_like(o, dtype=torch.bool)
        tensors = [t.tensors[i] for t in others]
        error_ours = _error(u, r, finite)
        error_original = max(_error(t, r, finite) for t in (o, *tensors))
        limit = factor * error_original + (floor if o.is_floating_point() else 0.0)
        good = error_ours <= limit
        if good and tensors:
            problem = _few_rows_off(i, u, (o, *tensors), r, floor, factor)
            good = not problem
            problems += [problem] if problem else []
        elif not good:
            problems.append(f"output {i} {list(o.shape)} {o.dtype}: error {error_ours:.2e} > limit {limit:.2e}")
        ok = ok and good
        difference = (u.double() - o.double())[finite]
        max_abs = max(max_abs, float(difference.abs().max()) if difference.numel() else 0.0)
        if error_ours * worst[2] >= worst[0] * limit:  # by error over limit
            worst = (error_ours, error_original, limit)
    return Errors(ok, *worst, max_abs, problems, structural)


def _shape_problem(i: int, ours: Tensor, original: Tensor) -> str:
    if ours.shape != original.shape or ours.dtype != original.dtype:
        got, wanted = (f"{list(t.shape)} {t.dtype}" for t in (ours, original))
        return f"output {i}: rewritten {got}, original {wanted}"
    if original.is_floating_point():
        odd_ours = torch.where(torch.isfinite(ours), 0, ours)  # NaN and infinities, at their places
        odd_original = torch.where(torch.isfinite(original), 0, original)
        if not torch.equal(torch.nan_to_num(odd_ours, nan=1.0), torch.nan_to_num(odd_original, nan=1.0)) or not (
            torch.equal(torch.isnan(ours), torch.isnan(original))
        ):
            count = int((~torch.isfinite(ours)).sum())
            return f"output {i}: {count} values are NaN or infinite where the original's are not, or the reverse"
    return ""


def _error(t: Tensor, reference: Tensor, finite: Tensor) -> float:
    """Relative L2 error over the finite places; for integers the share of values that differ."""
    if not t.is_floating_point():
        return float((t != reference).double().mean()) if t.numel() else 0.0
    a, b = t.double()[finite], reference.double()[finite]
    norm = float(b.norm())
    distance = float((a - b).norm())
    return distance / norm if norm > 0 else distance


def _row_errors(t: Tensor, reference: Tensor) -> Tensor:
    """Distance of each last-dimension row, relative to the typical row of the reference."""
    a, b = t.double().flatten(0, -2), reference.double().flatten(0, -2)
    return (a - b).norm(dim=-1) / b.norm(dim=-1).median().clamp_min(1e-300)


def _few_rows_off(
    i: int, ours: Tensor, originals: Sequence[Tensor], reference: Tensor, floor: float, factor: float
) -> str:
    """What is wrong, or "": changed routing moves few rows, a wrong rewrite moves more.

    The typical row must keep the plain rule, and no more rows may be off than in the original's own runs.
    """
    if ours.dim() < 2 or not ours.is_floating_point() or not ours.numel():
        return ""
    rows = _row_errors(ours, reference)
    own = [_row_errors(t, reference) for t in originals]
    limit = factor * float(own[0].median()) + floor
    if float(rows.median()) > limit:
        return f"output {i}: the typical row is off by {float(rows.median()):.2e} > {limit:.2e}"
    allowed = factor * max(int((r > FAR * limit).sum()) for r in own) + 1
    off = int((rows > FAR * limit).sum())
    if off > allowed:
        return f"output {i}: {off} rows are far off, the original's own runs allow {allowed:.0f}"
    return ""
