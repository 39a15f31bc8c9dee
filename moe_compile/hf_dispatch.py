"""The decision about one Hugging Face module, while Dynamo traces and in eager runs.

Shared by every door in ``huggingface.py``: check the module, read its activation, record a
``report.Site``, and run its family's op calls or the original.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import hf_trace, report, torch_compat
from .config import OptionError, Options, split_options
from .hf_classes import FAMILIES
from .hf_family import Family, How, form_of
from .match.activation import Recognised, recognise
from .ops import schema as schema  # the ops must exist before anything is traced
from .report import REFUSED, REWRITTEN
from .spec import NoMatch
from .torch_compat import comptime

_FIXES = {
    "MC104": "remove the hook, or move it to the MoE module itself",
    "MC205": "call model.eval()",
    "MC402": "load the model without quantising its experts",
    "MC507": "run under torch.no_grad() or torch.inference_mode()",
}


# --- one verdict per module -----------------------------------------------------------------------


class Verdict(NamedTuple):
    """What happens to one module: ``how`` to run it, or the refusal."""

    how: How = ()
    refusal: NoMatch | None = None


def check(name: str, module: nn.Module) -> NoMatch | None:
    """The refusal of a module, None when it holds what its family declares."""
    try:
        FAMILIES[name].check(module)
    except NoMatch as refusal:
        return refusal
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        return NoMatch("MC206", f"{type(module).__name__} does not hold what its class declares: {error}")
    return None


def _how(found: Recognised | None, kernels: str) -> How:
    if found is None:
        return ()
    activation = found.activation
    return activation.name, tuple(activation.args()), activation.gated, found.interleaved, kernels


def _kernels(given: str | None) -> str:
    """What the op for fp8 weights is told: by ``optimize``, else by ``torch.compile``, else by the environment."""
    try:
        return given or Options.resolve(split_options(torch_compat.current_options())[0]).kernels
    except OptionError:  # the backend raises it, outside of the trace
        return "auto"


_last_site: weakref.WeakKeyDictionary[nn.Module, report.Site] = weakref.WeakKeyDictionary()


def _record(module: nn.Module, site: report.Site) -> None:
    """Record once per module and report: Dynamo may trace the same module again after a graph break."""
    last = _last_site.get(module)
    known = last is not None and (last.status, last.code) == (site.status, site.code)
    if known and report._collectors and all(any(s is last for s in r.sites) for r in report._collectors):
        return
    _last_site[module] = site
    report.record(site)


def record_refused(module: nn.Module, refusal: NoMatch) -> None:
    fix = _FIXES.get(refusal.code, "")
    where = _location(module)
    _record(module, report.Site(REFUSED, form_of(module), refusal.code, refusal.reason, where, fix))


def _record_rewritten(
    name: str, module: nn.Module, found: Recognised | None, top_k: int | None, kernels: str
) -> None:
    activation, interleaved = found if found is not None else (None, False)
    spec = None if top_k is None else FAMILIES[name].describe(module, top_k, activation, interleaved)
    fused = found is not None and not getattr(module, "has_post_expert_norm", False)
    around = "two moe_compile::grouped_linear around the module's code"
    kernel = FAMILIES[name].op(module, top_k, kernels) if fused else around
    _record(
        module,
        report.Site(REWRITTEN, form_of(module), location=_location(module), spec=spec, kernel=kernel),
    )


def _location(module: nn.Module) -> str:
    try:
        cls = type(module)
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):  # a class without a source file
        return ""


def _call_refusal(family: Family, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Why this call of a provable module keeps the original: a key of ``_CALLS``, "" when it does not."""
    if not family.fits(module, args, kwargs):
        return "MC207"
    if not torch.is_grad_enabled():
        return ""
    for value in args:
        if isinstance(value, Tensor) and value.requires_grad:
            return "MC507"
    for tensor in family.tensors(module):
        if tensor.requires_grad:
            return "MC507"
    return ""


_UNKNOWN = NoMatch("MC301", "what lies between the two fp8 GEMMs is no known activation")
_CALLS = {
    "MC207": "the call does not have the declared arguments",
    "MC507": "gradients are needed, and the fused op has no backward yet",
}


# --- while Dynamo traces --------------------------------------------------------------------------
#
# The module cannot be handed to ordinary code at trace time without a guard on its identity, which
# would recompile for every layer. ``comptime`` sees it without a guard. Its activation is read from a
# probe: Dynamo traces the module's own code on an empty tensor, so every attribute that this code
# reads is guarded, and the probe's nodes are taken out of the graph again.


class _Trace(threading.local):
    """What the callbacks of one trace hand to each other."""

    verdict = Verdict()


_trace = _Trace()
_probe = hf_trace.Probe()


def _look(ctx: Any) -> None:
    name, module = hf_trace.local(ctx, "name"), hf_trace.local(ctx, "module")
    _trace.verdict = Verdict(refusal=check(name, module))
    if _trace.verdict.refusal is not None:
        record_refused(module, _trace.verdict.refusal)


def _refuse_call(ctx: Any) -> None:
    code = hf_trace.local(ctx, "code")
    record_refused(hf_trace.local(ctx, "module"), NoMatch(code, _CALLS[code]))


def _begin(ctx: Any) -> None:
    _probe.begin(ctx)


def _conclude(ctx: Any) -> None:
    name, module = hf_trace.local(ctx, "name"), hf_trace.local(ctx, "module")
    family = FAMILIES[name]
    traced = _probe.take(ctx, "between")
    found = None if traced is None else recognise(traced, family.width(module), family.gated(module))
    if found is None and family.needs_closed_form(module):
        _trace.verdict = Verdict(refusal=_UNKNOWN)
        record_refused(module, _UNKNOWN)
        return
    kernels = _kernels(hf_trace.local(ctx, "kernels"))
    _trace.verdict = Verdict(_how(found, kernels))
    _record_rewritten(name, module, found, family.top_k(module, hf_trace.local_tensors(ctx, "args")), kernels)


@torch.compiler.assume_constant_result
def _is_refused() -> bool:
    return _trace.verdict.refusal is not None


@torch.compiler.assume_constant_result
def _found_how() -> How:
    return _trace.verdict.how


def run_traced(
    name: str, original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
    kernels: str | None = None,
) -> Any:  # fmt: skip
    if not torch.compiler.is_compiling():  # Dynamo gave up on this frame and Python runs it
        return original(module, *args, **kwargs)
    comptime(_look)
    if _is_refused():
        return original(module, *args, **kwargs)
    family = FAMILIES[name]
    code = _call_refusal(family, module, args, kwargs)
    if code:
        comptime(_refuse_call)
        return original(module, *args, **kwargs)
    comptime(_begin)
    between: Tensor | None = family.gate(module, family.weight(module).new_empty((2, family.width(module))))
    comptime(_conclude)
    between = None  # noqa: F841  its node is gone: nothing may keep it alive
    if _is_refused():
        return original(module, *args, **kwargs)
    return family.run(module, _found_how(), *args)


# --- in eager runs --------------------------------------------------------------------------------

_cache: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Verdict]] = weakref.WeakKeyDictionary()


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Everything plain that a verdict may depend on, of the module and its children."""
    found: list[Any] = [type(module)]
    for name, value in module.__dict__.items():
        if isinstance(value, (bool, int, float, str)) or (callable(value) and name != "forward"):
            found += (name, value)
    for parameter in module._parameters.values():
        if parameter is not None:
            found += (type(parameter), parameter.dtype)
    for child in module._modules.values():
        if child is not None:
            found += _settings(child)
    return tuple(found)


def eager_verdict(name: str, module: nn.Module, top_k: int | None, kernels: str | None = None) -> Verdict:
    settings = (*_settings(module), kernels)
    cached = _cache.get(module)
    if cached is not None and cached[0] == settings:
        return cached[1]
    family = FAMILIES[name]
    refusal, found = check(name, module), None
    if refusal is None:
        found = recognise(lambda rows: family.gate(module, rows), family.width(module), family.gated(module))
        if found is None and family.needs_closed_form(module):
            refusal = _UNKNOWN
    if refusal is None:
        chosen = _kernels(kernels)
        verdict = Verdict(_how(found, chosen))
        _record_rewritten(name, module, found, top_k, chosen)
    else:
        verdict = Verdict(refusal=refusal)
        record_refused(module, refusal)
    _cache[module] = settings, verdict
    return verdict


def run_eager(
    name: str, original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
    kernels: str | None = None,
) -> Any:  # fmt: skip
    family = FAMILIES[name]
    fits = family.fits(module, args, kwargs)
    verdict = eager_verdict(name, module, family.top_k(module, args) if fits else None, kernels)
    if verdict.refusal is not None:
        return original(module, *args, **kwargs)
    code = _call_refusal(family, module, args, kwargs)
    if code:
        record_refused(module, NoMatch(code, _CALLS[code]))
        return original(module, *args, **kwargs)
    return family.run(module, verdict.how, *args)


def dispatch(
    name: str, original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
    kernels: str | None = None,
) -> Any:  # fmt: skip
    if torch.compiler.is_compiling():
        return run_traced(name, original, module, args, kwargs, kernels)
    return run_eager(name, original, module, args, kwargs, kernels)
