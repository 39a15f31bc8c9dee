"""The declared way in for Hugging Face models: an experts module's flags become op calls.

No graph is matched. Four doors lead to the same replacement of a module's ``forward``:

* ``install_hook(backend)``: while Dynamo traces for one of our backends, whatever implementation the
  model is configured with; other backends and eager runs see nothing;
* ``register()``: the name ``"moe_compile"`` for ``experts_implementation=`` of transformers;
* ``optimize(model)`` / ``restore(model)``: per module instance, for eager use or any backend;
* ``experts_forward``: the function itself.

What cannot be replaced runs the original, and a refused ``report.Site`` says why.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import hf_trace, quantizing, torch_compat
from .config import OptionError, Options, enabled
from .hf_classes import FAMILIES, STACKED, defining_class
from .hf_dispatch import check, dispatch, eager_verdict, record_refused, run_traced
from .hf_fp8 import is_fp8
from .match.activation import Recognised
from .spec import NoMatch

Model = TypeVar("Model", bound=nn.Module)
NAME = "moe_compile"
_INTERFACE = "transformers.integrations.moe"
_FP8 = "transformers.integrations.finegrained_fp8"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts implementation of transformers.

    Args:
        self: a module of a class decorated with ``use_experts_implementation``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``; ids from ``num_experts`` on are expert-parallel sentinels and count zero.
        top_k_weights: ``[T, K]``, any floating-point dtype.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``. A module or call that is refused runs the default
        implementation of transformers, ``grouped_mm``.
    """
    return dispatch(STACKED, _default_forward, self, (hidden_states, top_k_index, top_k_weights), {})


def fp8_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As ``experts_forward``, for the registry of fp8 experts; see ``hf_fp8`` for the formats that are not refused."""
    return dispatch(STACKED, _default_fp8_forward, self, (hidden_states, top_k_index, top_k_weights), {})


def _default_forward(module: Any, *args: Any) -> Any:
    return sys.modules[_INTERFACE].grouped_mm_experts_forward(module, *args)


def _default_fp8_forward(module: Any, *args: Any) -> Any:
    return sys.modules[_FP8].fp8_grouped_mm_experts_forward(module, *args)


# --- the trace-time hook --------------------------------------------------------------------------


def install_hook(*backends: Any) -> None:
    """Rewrite every known Hugging Face module while Dynamo traces for one of ``backends``.

    Idempotent, and lazy: transformers is not imported; its modules are hooked when somebody imports
    them. Other backends trace exactly what they traced before.

    Args:
        backends: backend callables as given to ``torch.compile`` or registered under a name.
    """
    for backend in backends:
        torch_compat.add_backend(backend)
    hf_trace.after_import(_INTERFACE, _hook_interface)
    hf_trace.after_import(_FP8, _register_fp8)
    for key in FAMILIES:
        if key != STACKED:
            hf_trace.after_import(key.rpartition(".")[0], functools.partial(_hook_class, key))


def _hook_interface(moe: ModuleType) -> None:
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    original_get = moe.ExpertsInterface.get_interface
    if getattr(original_get, "_moe_compile", False):
        return

    @functools.wraps(original_get)
    def get_interface(self: Any, experts_implementation: Any, default: Any) -> Any:
        chosen = original_get(self, experts_implementation, default)
        if not (torch.compiler.is_compiling() and hf_trace.is_ours()):
            return chosen

        def run(module: Any, *args: Any, **kwargs: Any) -> Any:
            return run_traced(STACKED, chosen, module, args, kwargs)

        return run

    get_interface._moe_compile = True  # type: ignore[attr-defined]
    moe.ExpertsInterface.get_interface = get_interface


def _hook_class(key: str, models: ModuleType) -> None:
    cls = getattr(models, key.rpartition(".")[2], None)
    if cls is None or getattr(cls.forward, "_moe_compile", False):
        return
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and hf_trace.is_ours():
            return run_traced(key, original, self, args, kwargs)
        return original(self, *args, **kwargs)

    forward._moe_compile = True  # type: ignore[attr-defined]
    cls.forward = forward


def _register_fp8(fp8: ModuleType) -> None:
    fp8.ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, fp8_experts_forward)


# --- the registry of transformers -----------------------------------------------------------------


def register() -> None:
    """Make ``experts_implementation="moe_compile"`` known to transformers.

    Raises:
        ImportError: transformers is not installed.
    """
    _require_transformers()
    import transformers.integrations.moe as moe

    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    hf_trace.after_import(_FP8, _register_fp8)


def _require_transformers() -> None:
    if "transformers" not in sys.modules and importlib.util.find_spec("transformers") is None:
        raise ImportError(
            'Hugging Face support needs transformers >= 5.17: pip install "moe-compile[hf]"',
            name="transformers",
        )


# --- per instance ---------------------------------------------------------------------------------


def optimize(model: Model, *, quantize: str | None = None, keep_originals: bool = False, **options: Any) -> Model:
    """Let the MoE modules inside ``model`` run our ops, in place, in eager mode and under any backend.

    Only the ``forward`` attribute of those module instances is set: parameters, state_dict keys,
    configurations and other models of the same class stay as they are. Copies and pickles of the model
    are optimised too. ``restore`` undoes it. Calling it again changes nothing.

    Args:
        model: any module; one without known MoE modules comes back unchanged.
        quantize: ``"fp8"`` also rounds the weights of the experts to float8_e4m3fn with a scale per 128 x 128, for
            inference, and changes what the model computes: the report and the log (``moe_compile.quantizing``) state
            each layer's memory and measured error. Layers are done one by one, and the memory of each is free before
            the next. A layer that cannot be quantised stays as it is, and the report says why. ``save_pretrained``
            raises from then on, as ``from_pretrained`` could not read the result.
        keep_originals: keep the old weights on the CPU, so that ``restore`` can bring them back.
        **options: ``strict`` (raise instead of leaving a module as it is), ``dryrun`` (report, change nothing) and
            ``deepgemm_rule`` of ``moe_compile.config.Options``; the other options belong to ``torch.compile``.

    Returns:
        The same object.

    Raises:
        ImportError: transformers is not installed.
        OptionError: an unknown option or value, or one that only ``torch.compile`` takes.
        QuantizedError: a layer could not be quantised after all, for lack of memory say. The layers before it are
            quantised and work; it and those after it are as they were.
        NoMatch: ``strict`` and a module is refused, or there is none to rewrite. Nothing was changed.
    """
    _require_transformers()
    settings = Options.resolve(options)
    foreign = sorted(set(options) - {"strict", "dryrun", "deepgemm_rule"})
    if foreign:
        raise OptionError(f"optimize takes the options strict, dryrun and deepgemm_rule, not {', '.join(foreign)}")
    if quantize not in (None, "fp8"):
        raise OptionError(f"quantize takes None or 'fp8', got {quantize!r}")
    strict, kernels = settings.strict, settings.kernels if "deepgemm_rule" in options else None
    chosen: list[tuple[Any, str, Recognised | None]] = []
    for module in model.modules():
        name = family_of(module)
        rounding = quantize is not None and not is_fp8(module)
        if name is None or (is_optimized(module) and not rounding):
            continue
        found: Recognised | None = None
        if "forward" in module.__dict__ and not is_optimized(module):
            refusal: NoMatch | None = NoMatch("MC104", "forward is replaced on this instance, by a hook say")
            record_refused(module, refusal)  # type: ignore[arg-type]
        elif rounding:
            refusal = check(name, module)
            try:
                found = quantizing.check_quantizable(FAMILIES[name], module) if refusal is None else None
            except NoMatch as other:
                refusal = other
            if refusal is not None:
                record_refused(module, refusal)
        else:
            refusal = eager_verdict(name, module, _declared_top_k(module), kernels).refusal
        if refusal is None:
            chosen.append((module, name, found))
        elif strict:
            raise refusal
    if strict and not chosen and not any(is_optimized(module) for module in model.modules()):
        raise NoMatch("MC206", f"{type(model).__name__} holds no known Hugging Face MoE module")
    if not enabled() or settings.dryrun:
        for module, name, found in chosen:
            if found is not None:  # nothing has been reported of it
                eager_verdict(name, module, _declared_top_k(module), kernels)
        return model
    for done, (module, name, found) in enumerate(chosen):
        if found is not None:
            try:
                quantizing.quantize_module(module, found, keep_originals)
                quantizing.guard_saving(model)
            except Exception as error:
                raise quantizing.QuantizedError(
                    f"layer {done + 1} of {len(chosen)} was not quantised ({type(error).__name__}: {error}); it and "
                    "those after it are as they were, those before it are quantised and work"
                ) from error
            eager_verdict(name, module, _declared_top_k(module), kernels)  # of what it is now, for the report
        # a partial rather than a closure: it survives deepcopy and pickle with the right module
        module.forward = functools.partial(_optimized_forward, module, name, _kernels=kernels)
    return model


def restore(model: Model) -> Model:
    """Undo ``optimize``: every module runs the ``forward`` of its class again. Returns the same object.

    Raises:
        QuantizedError: weights were quantised and the old ones not kept. Nothing was changed.
    """
    quantizing.check_restorable(model.modules())
    for module in model.modules():
        if quantizing.is_quantized(module):
            quantizing.unquantize_module(module)
        if is_optimized(module):
            del module.forward
    quantizing.guard_saving(model)
    return model


def _optimized_forward(module: Any, name: str, /, *args: Any, _kernels: str | None = None, **kwargs: Any) -> Any:
    original = quantizing.forward if quantizing.is_quantized(module) else type(module).forward
    return dispatch(name, original, module, args, kwargs, _kernels)


def is_optimized(module: nn.Module) -> bool:
    """Whether ``optimize`` has replaced this module's ``forward``."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _optimized_forward


def family_of(module: nn.Module) -> str | None:
    """The way in that a module offers: a class of the table, the decorated interface, or None."""
    key = defining_class(module)
    if key in FAMILIES:
        return key
    # the decorator puts these on the class and on the instance
    return STACKED if hasattr(type(module), "_apply_gate") and hasattr(module, "has_gate") else None


def _declared_top_k(module: nn.Module) -> int | None:
    """K as the configuration names it: for the report only, calls say what K is."""
    config = getattr(module, "config", None)
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
