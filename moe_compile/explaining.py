"""``explain``: which MoE layers of a model would be rewritten, which not, and why; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_compile import breaks, torch_breaks
from moe_compile.backend import attempt, moe_compile
from moe_compile.config import AS_WRITTEN, Options
from moe_compile.report import NOT_CAPTURED, Report, Site, collect, record
from moe_compile.torch_compat import TraceAgain


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Trace ``model(*args, **kwargs)`` and tell what a compilation would do with each MoE candidate.

    The model runs twice without gradients (once as it is, once traced); its buffers and the random state are
    put back afterwards. Compiled code of the process is forgotten, so the next compiled call compiles again.

    Args:
        model: a module, a compiled module or any function.
        *args: its inputs, as for a call.
        **kwargs: its keyword inputs.

    Returns:
        A ``Report`` with a row per candidate: rewritten, refused (code, reason, source line), or not captured
        (the graph break and the edit that mends it).

    Raises:
        Exception: whatever the model itself raises for these inputs.
    """
    model = unwrap(model)
    options = Options.resolve()
    with torch.no_grad(), unchanged(model), collect() as report:
        model(*args, **kwargs)  # the user's own error comes from here, untouched
        tracer = _Tracer(options)
        failure = _trace(tracer, model, args, kwargs)
        if tracer.error is not None:
            raise tracer.error
        if failure is not None:
            record(Site(NOT_CAPTURED, "graph break", "MC105", f"Dynamo failed: {_first_line(failure)}"))
        elif not report.sites and not tracer.graphs:
            record(Site(NOT_CAPTURED, "", "MC106", f"no graph of {_name(model)} reached the backend"))
    return report


class _Tracer:
    """A Dynamo backend that rewrites each graph and runs it without Inductor."""

    def __init__(self, options: Options) -> None:
        # Whatever is scoped to our backend (capture settings, the Hugging Face hook) holds for this one too.
        self.__wrapped__ = moe_compile
        self.options = options
        self.graphs = 0
        self.error: Exception | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self.graphs += 1
        try:
            attempt(gm, replace(self.options, strict=False, dryrun=False))
        except TraceAgain:
            raise
        except Exception as error:  # Dynamo would wrap it: explain raises it bare
            self.error = self.error or error
        forward: Callable[..., Any] = gm.forward
        return forward


def _trace(tracer: _Tracer, model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Exception | None:
    """Run under Dynamo and record its graph breaks; the exception if a program that runs eagerly fails."""
    torch_breaks.reset()
    failure: Exception | None = None
    try:
        with torch_breaks.collect_breaks() as found:
            torch.compile(model, backend=tracer)(*args, **kwargs)
    except Exception as error:  # the caller tells whether the program fails without Dynamo too
        failure = error
    finally:
        torch_breaks.reset()
    for site in breaks.sites(found):
        record(site)
    return failure


def unwrap(model: Callable[..., Any]) -> Callable[..., Any]:
    """The module behind ``torch.compile(module)``, anything else as it is."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def unchanged(model: Callable[..., Any]) -> Iterator[None]:
    """Put buffers, training flags and the random state back at the end of the ``with`` block.

    What is decorated with ``rewrite`` runs as it was written inside.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [m.training for m in modules]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = [
        (m, name, b, b.detach().clone())
        for m in modules
        for name, b in m._buffers.items()
        if b is not None and not b.is_meta
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        token = AS_WRITTEN.set(True)
        try:
            yield
        finally:
            AS_WRITTEN.reset(token)
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
            for module, flag in zip(modules, training, strict=True):
                module.training = flag


def _name(model: Callable[..., Any]) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", repr(model))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
