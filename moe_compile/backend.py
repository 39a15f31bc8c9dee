"""``torch.compile(model, backend="moe_compile")``: rewrite Dynamo's graph, then hand it to Inductor.

Imported inside ``torch.compile(...)`` through the entry-point group ``torch_dynamo_backends``, before anything is
traced; that is when the capture settings (``capture.py``) and the Hugging Face hook (``huggingface.py``) are placed,
both only for compilations of this backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import capture, huggingface, torch_compat
from .config import OptionError, Options, enabled, split_options
from .report import REFUSED, Site, record
from .rewriting import Result, analyse_graph, rewrite_graph
from .router_pass import RouterPass
from .verify import compare_first_call

log = logging.getLogger("moe_compile.backend")


class RewriteError(RuntimeError):
    """A refused candidate or a failed rewrite under ``strict``; the message names each, ``sites`` holds them."""

    def __init__(self, message: str, sites: Sequence[Site] = ()) -> None:
        super().__init__(message)
        self.sites = list(sites)


def moe_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """The backend function. ``mode`` and every option without the prefix ``moe_compile.`` go to Inductor.

    Raises:
        OptionError: an unknown or wrong ``moe_compile.*`` option.
        RewriteError: with ``strict``, when a candidate was refused or the rewrite failed.
    """
    ours, theirs = split_options(options)
    chosen = Options.resolve(ours)
    original: fx.GraphModule | None = None
    if enabled():
        _require_kernels(chosen.experts, example_inputs)
        result = attempt(gm, chosen)
        if chosen.experts == "deepgemm":
            _require_scales(gm)
        if chosen.verify and result.original is not None:
            original = fx.GraphModule(gm, result.original)
    compiled = torch_compat.inductor(gm, example_inputs, mode, theirs, RouterPass())
    return compare_first_call(original, compiled) if original is not None else compiled


def _require_kernels(experts: str, example_inputs: Sequence[Any]) -> None:
    """Refuse kernels that were named but cannot run on the devices of the inputs."""
    wanted = {"triton": "cuda", "deepgemm": "cuda", "cpu": "cpu"}.get(experts)
    for value in example_inputs:
        if wanted is not None and isinstance(value, torch.Tensor) and value.device.type != wanted:
            raise OptionError(
                f"option experts={experts!r} runs on {wanted}, but an input {list(value.shape)} is on {value.device}; "
                "move the model and its inputs, or use experts='auto'"
            )


def _require_scales(gm: fx.GraphModule) -> None:
    """Refuse DeepGEMM by name for experts that it would not run."""
    ops = torch.ops.moe_compile
    for node in gm.graph.nodes:
        rows = node.target is ops.experts_fp8.default and not node.kwargs.get("quantise", True)
        if rows or node.target in (ops.experts.default, ops.grouped_linear.default):
            raise OptionError(
                "option experts='deepgemm' runs experts whose weights are fp8 and whose rows are rounded to fp8, and "
                f"the {'rows' if rows else 'weights'} of {torch_compat.user_frame(node) or 'this model'} are not; use "
                "experts='auto'"
            )


def attempt(gm: fx.GraphModule, options: Options) -> Result:
    """Rewrite ``gm`` in place; whatever goes wrong leaves it as it was and becomes a report row."""
    try:
        result = analyse_graph(gm) if options.dryrun else rewrite_graph(gm)
    except torch_compat.TraceAgain:
        raise
    except Exception as error:  # a bug of ours must not fail the user's compile
        log.warning("rewrite failed, the original program runs: %s: %s", type(error).__name__, error)
        log.debug("details", exc_info=True)
        reason = f"the rewrite failed with {type(error).__name__}: {error}"
        result = Result([Site(REFUSED, code="MC508", reason=reason)])
        if options.strict:
            raise RewriteError(reason, result.sites) from error
    for site in result.sites:
        record(site)
    refused = [s for s in result.sites if s.status == REFUSED]
    if options.strict and refused:
        lines = "; ".join(f"{s.code} {s.location}: {s.reason}" for s in refused)
        raise RewriteError(f"{len(refused)} MoE candidate(s) were not rewritten: {lines}", refused)
    return result


def reset() -> None:
    """What ``torch.compiler.reset()`` calls: nothing is cached between compilations."""


moe_compile.reset = reset  # type: ignore[attr-defined]
capture.install(moe_compile)
huggingface.install_hook(moe_compile)
