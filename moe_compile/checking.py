"""``check``: the original program against the rewritten one, both judged by a float64 run of the original.

Verdict per output tensor, with relative L2 errors to float64: ``error(ours) <= 2 * error(original) + floor``.
The float64 run reads ``float32`` in the model's own code as float64, else such code would be its own reference.
A model in a low precision may choose other experts than its float64 copy for a token whose two best scores
are nearly equal. When the plain rule fails and the model does choose (top-k), the original is run a few more
times with its weights moved by one rounding error; if its own choices move too, the largest error that the
original makes that way is the limit, and no more tokens may be off than in the original's own runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_compile import torch_breaks
from moe_compile.backend import moe_compile as backend
from moe_compile.comparing import Errors, Run, Widened, all_tensors, compare, flips, recorded, usable, wobble
from moe_compile.explaining import unchanged, unwrap
from moe_compile.report import Report, collect

FLOORS = {torch.float64: 1e-12, torch.float32: 1e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
FACTOR = 2.0
WOBBLES = 8


class CheckError(RuntimeError):
    """The check itself could not be made (no copy of the model fits, or its outputs are no tensors)."""


@dataclass(frozen=True)
class CheckResult:
    """The verdict; true exactly when ``ok``.

    Args:
        ok: whether every output tensor is within its limit.
        error_ours: largest relative L2 error of the rewritten program to ``reference``.
        error_original: the original's error for the same output tensor.
        limit: what ``error_ours`` was allowed to be.
        max_abs: largest absolute difference between rewritten and original.
        rewritten: how many MoE layers were rewritten; 0 means that nothing was tested.
        reference: ``"float64"``, or ``"float32"`` or ``"original"`` when the model does not run in more.
        problems: what is wrong, or worth knowing, in words.
        report: the compilation's own report.
    """

    ok: bool
    error_ours: float
    error_original: float
    limit: float
    max_abs: float
    rewritten: int
    reference: str
    problems: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [
            f"moe_compile check: {'ok' if self.ok else 'FAILED'}, MoE layers rewritten: {self.rewritten}",
            f"  error to {self.reference}: rewritten {self.error_ours:.2e}, original "
            f"{self.error_original:.2e}, limit {self.limit:.2e}",
            f"  largest difference between the two: {self.max_abs:.2e}",
        ]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])

    def raise_if_bad(self) -> CheckResult:
        """Itself when ok, else an ``AssertionError`` with the whole text."""
        if not self.ok:
            raise AssertionError(f"{self}\n{self.report}")
        return self


def check(model: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckResult:
    """Compare ``model(*args, **kwargs)`` with its rewritten form.

    Everything but the first run happens on copies of the model, one at a time, so ``model`` keeps its
    weights, buffers and flags, and the extra memory is one copy in float64. Gradients are off.

    Args:
        model: a module, a compiled module (its original is checked) or any function of tensors.
        *args: its inputs; tensors are cloned for each run.
        **kwargs: its keyword inputs.

    Raises:
        CheckError: the model cannot be copied, or returns no tensor.
        Exception: whatever the model itself raises for these inputs.
    """
    model = unwrap(model)
    with torch.no_grad(), unchanged(model):
        original = recorded(model, args, kwargs)
        if not original.tensors:
            raise CheckError("the model returned no tensor to compare; return logits or hidden states")
        reference, name = _reference(model, args, kwargs, original)
        with collect() as report:
            ours = _compiled(model, args, kwargs)
        errors = compare(ours, original, reference, _floor(model, original), FACTOR)
        notes = [f"output is not compared: {kind}" for kind in original.skipped]
        moved = flips(original, reference)
        if moved:
            notes.append(f"float64 chooses other experts for {moved:.2%} of the (token, layer) choices")
        if not errors.ok and original.choices and not errors.structural:
            errors = _with_routing_noise(model, args, kwargs, original, reference, ours, errors, notes)
    if not report.rewritten:
        notes.append("nothing was rewritten, so the two programs are the same; see the report")
    if name != "float64":
        notes.append(f"the model does not run in float64; judged by {name}")
    return CheckResult(
        ok=errors.ok,
        error_ours=errors.ours,
        error_original=errors.original,
        limit=errors.limit,
        max_abs=errors.max_abs,
        rewritten=len(report.rewritten),
        reference=name,
        problems=[*errors.problems, *notes],
        report=report,
    )


def _floor(model: Callable[..., Any], original: Run) -> float:
    """The floor of the lowest precision that took part (weights or outputs)."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    dtypes = {t.dtype for t in [*parameters, *original.tensors] if t.is_floating_point()}
    return max((FLOORS.get(dtype, 1e-3) for dtype in dtypes), default=0.0)


def _reference(
    model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], original: Run
) -> tuple[Run, str]:
    for dtype, mode in ((torch.float64, Widened()), (torch.float64, nullcontext()), (torch.float32, nullcontext())):
        if dtype == torch.float32 and all(t.dtype != torch.bfloat16 for t in all_tensors(args, kwargs, model)):
            break
        precise = _precise(model, dtype) if isinstance(model, nn.Module) else model
        try:
            with _default_dtype(dtype), mode:
                run = recorded(precise, args, kwargs, dtype)
        except torch.OutOfMemoryError as error:
            raise CheckError(
                f"a {dtype} copy of the model does not fit in memory; check fewer layers ({error})"
            ) from error
        except Exception:
            continue  # code with hard-wired dtypes does not run in this one; the next best judges
        if usable(run, original):
            return run, str(dtype).removeprefix("torch.")
    return original, "original"


def _precise(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    precise = _copy(model).to(dtype)
    # Hugging Face's default experts call a grouped product that has no float64; their loop has.
    choose = getattr(precise, "set_experts_implementation", None)
    if callable(choose):
        choose("eager")
    return precise


def _compiled(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Run:
    torch_breaks.reset()
    try:
        target = _copy(model) if isinstance(model, nn.Module) else model
        return recorded(torch.compile(target, backend=backend), args, kwargs, record=False)
    finally:
        torch_breaks.reset()


def _with_routing_noise(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    original: Run,
    reference: Run,
    ours: Run,
    errors: Errors,
    notes: list[str],
) -> Errors:
    if not isinstance(model, nn.Module):
        return errors
    runs = []
    for number in range(WOBBLES):
        moved = _copy(model)
        wobble(moved, number)
        runs.append(recorded(moved, args, kwargs))
    changed = [run for run in runs if flips(run, reference) and usable(run, original)]
    if not changed:
        return errors
    notes.append(
        f"one rounding error in the weights already changes the original's own choice of experts "
        f"({len(changed)} of {WOBBLES} runs): judged by the largest error of those runs"
    )
    return compare(ours, original, reference, _floor(model, original), FACTOR, others=changed)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except torch.OutOfMemoryError as error:
        raise CheckError(f"a copy of the model does not fit in memory ({error})") from error
    except Exception as error:  # deepcopy runs code of the model
        raise CheckError(f"the model cannot be copied with copy.deepcopy: {error}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
