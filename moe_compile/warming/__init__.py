"""``warmup``: compile the kernels of a model's MoE layers before they are needed, side by side and once for all.

For every distinct layer the op is asked, without a launch, which kernels it would start for 1, 2, 3, .. tokens; where
two numbers differ, the border between them is sought. So no second place has to know when kernels change. What
Triton's disk cache lacks is compiled by processes of their own (``kernels.workers``). Then each kernel runs once here,
on zeros and the layer's own weights, which loads it: a CUDA graph captured afterwards finds it.

DeepGEMM compiles in this process, at the first call with a number of rows that it has other tiles for. Nobody but
itself knows when that is, so its GEMMs run once for every number of rows that can occur.

Shape legend: see ``spec.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .calls import Layer, inputs_of, recorded
from .progress import Progress
from .tokens import regimes

if TYPE_CHECKING:
    from ..kernels.ahead import Needed
    from ..kernels.launch import Launch

MAX_TOKENS = 16384


@dataclass(frozen=True)
class Failure:
    """One thing that could not be compiled or run."""

    kernel: str
    layer: str
    tokens: int
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel} of {self.layer} at T={self.tokens}: {self.reason}"


@dataclass(frozen=True)
class WarmUp:
    """What ``warmup`` did.

    Args:
        layers: distinct layers; how often each occurs in the model does not matter.
        calls: layers of the model.
        kernels: distinct Triton kernels that they need.
        compiled: how many of them were compiled now.
        there: how many were there already, in the disk cache or in this process.
        gemms: DeepGEMM problems (numbers of rows) that ran now.
        seconds: how long it took.
        failures: what failed; ``warmup`` raises then.
    """

    layers: int
    calls: int
    kernels: int
    compiled: int
    there: int
    gemms: int
    seconds: float
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        layers = f"{self.layers} distinct layer{'s' * (self.layers != 1)} of {self.calls}"
        gemms = f", {self.gemms} DeepGEMM sizes run" if self.gemms else ""
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return (
            f"{layers}: {self.kernels} kernels, {self.compiled} compiled, {self.there} already there{gemms}{failed}; "
            f"{self.seconds:.1f} s"
        )


class WarmUpError(RuntimeError):
    """A warm-up that could not be done, or not whole; ``code`` is a key of ``codes.CODES``.

    ``result`` tells what was done; None where nothing was.
    """

    def __init__(self, code: str, reason: str, result: WarmUp | None = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.result = code, result


def warmup(
    model: Callable[..., Any],
    *args: Any,
    max_tokens: int = MAX_TOKENS,
    workers: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> WarmUp:
    """Compile and load the kernels that the MoE layers of ``model`` need for up to ``max_tokens`` tokens.

    Call it after ``optimize``, or before ``torch.compile(model, backend="moe_compile")`` runs. A second process finds
    the kernels in Triton's disk cache; several may warm up at once. Of a model that ``optimize`` has not rewritten,
    compiled code is forgotten, as by ``explain``.

    Args:
        model: a module with its weights on a CUDA device. It runs once, without its MoE layers.
        *args: its inputs, as for a call; a Hugging Face model needs none.
        max_tokens: the most tokens (batch times sequence) of one call.
        workers: processes that compile at once; by default one per processor and at most 16. With 0 this one does.
        progress: show a bar on stderr if that is a terminal.
        **kwargs: its keyword inputs.

    Raises:
        WarmUpError: there is no CUDA device (MC504), nothing to warm up (MC513), or something did not compile or run
            (MC512, with all of it in ``result.failures``; the rest is done).
    """
    begun = time.perf_counter()
    require_cuda()
    args, kwargs = inputs_of(model, args, kwargs)
    if not args and not kwargs:
        raise WarmUpError("MC513", "it is not known what to run the model with: pass inputs, warmup(model, *inputs)")
    layers = recorded(model, args, kwargs)
    if not layers:
        raise WarmUpError("MC513", "no layer ran one of our ops; moe_compile.explain(model, *inputs) tells why")
    places = {str(layer.device) for layer in layers if layer.device.type != "cuda"}
    if places:
        raise WarmUpError("MC504", f"layers are on {', '.join(sorted(places))}: move the model to the GPU first")
    return warm_layers(layers, max_tokens, workers, progress, begun)


def require_cuda() -> None:
    """Raise where no kernel could run."""
    if not torch.cuda.is_available():
        raise WarmUpError("MC504", "torch finds no CUDA device here, and kernels are compiled for the one they run on")


@dataclass
class _Work:
    """What is known on the way."""

    need: dict[str, Needed] = field(default_factory=dict)  # by key
    first: dict[str, tuple[Layer, int]] = field(default_factory=dict)  # where each kernel is needed first
    cases: dict[tuple[Layer, int], frozenset[str]] = field(default_factory=dict)
    gemms: dict[tuple[int, int, Any], tuple[Any, Any, Layer, int]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, kernel: str, layer: Layer, tokens: int, reason: str) -> None:
        self.failures.append(Failure(kernel, str(layer), tokens, reason))


def warm_layers(
    layers: Mapping[Layer, int], max_tokens: int, workers: int | None, progress: bool, begun: float | None = None
) -> WarmUp:
    """``warmup`` for layers that are known."""
    from ..kernels import ahead

    begun = time.perf_counter() if begun is None else begun
    if max_tokens < 1 or (workers is not None and workers < 0):
        raise ValueError(f"max_tokens={max_tokens} must be positive, and workers={workers} not negative")
    work = _Work()
    for layer in layers:
        _look(work, layer, max_tokens)
    missing = {key for key, need in work.need.items() if need.source and not ahead.is_cached(key, need.function)}
    broken = _compile(work, missing, workers, progress)
    _load(work, broken)
    gemms = _multiply(work, progress)
    torch.cuda.synchronize()
    compiled = sum(ahead.is_cached(key, work.need[key].function) for key in missing)
    seconds = time.perf_counter() - begun
    result = WarmUp(
        len(layers), sum(layers.values()), len(work.need), compiled, len(work.need) - len(missing), gemms, seconds,
        tuple(work.failures),
    )  # fmt: skip
    if work.failures:
        more = f" (and {len(work.failures) - 1} more)" if len(work.failures) > 1 else ""
        raise WarmUpError("MC512", f"{work.failures[0]}{more}; the rest is done: {result}", result)
    return result


def _look(work: _Work, layer: Layer, max_tokens: int) -> None:
    """Which kernels a layer needs for which number of tokens."""
    from ..kernels.ahead import needed
    from ..kernels.launch import noting
    from ..kernels.workers import described

    gemms: dict[int, Any] = {}

    def kernels(tokens: int) -> frozenset[str]:
        keys = set()

        def note(launch: Launch, args: tuple[Any, ...]) -> None:
            if isinstance(launch.kernel, str):  # DeepGEMM
                gemms.setdefault(tokens, []).append(args)
                return
            need = needed(launch, args)
            work.need.setdefault(need.key, need)
            keys.add(need.key)

        with noting(note):
            layer.call(tokens)
        return frozenset(keys)

    try:
        found = regimes(kernels, max_tokens)
    except torch.OutOfMemoryError as error:
        work.fail("the layer", layer, max_tokens, f"out of memory ({error}); give a smaller max_tokens")
        return
    except Exception as error:  # what the op says of such a call
        work.fail("the layer", layer, max_tokens, described(error))
        return
    for tokens, keys in sorted(found.items()):
        work.cases[layer, tokens] = keys
        for key in keys:
            work.first.setdefault(key, (layer, tokens))
    if gemms:
        _gemms_of(work, layer, gemms, max_tokens)


def _gemms_of(work: _Work, layer: Layer, gemms: Mapping[int, list[Any]], max_tokens: int) -> None:
    """Every number of rows that DeepGEMM can be given, from the first number of tokens that goes there."""
    from ..deepgemm.experts import blocks

    first = min(gemms)
    top_k = layer.args[2].rest[0]
    for provider, _, projection in gemms[first]:
        shape = projection.w.first.shape
        for tokens in range(first, max_tokens + 1):
            align, rows = blocks(provider, tokens, top_k, shape[0])
            place = (align, rows, (layer.device, *shape))
            work.gemms.setdefault(place, (provider, projection, layer, tokens))


def _compile(work: _Work, missing: Iterable[str], workers: int | None, progress: bool) -> set[str]:
    """Compile what is missing in other processes; the keys of what failed."""
    from ..kernels.workers import Answer, Job, compile_all, default_workers

    jobs = [Job(key, source) for key in missing if (source := work.need[key].source) is not None]
    count = default_workers() if workers is None else workers
    if not jobs or count == 0:
        return set()
    broken = set()
    with Progress(len(jobs), "kernels", progress) as bar:

        def step(answer: Answer) -> None:
            bar.step()
            if answer.error:
                key = answer.job.key
                broken.add(key)
                work.fail(work.need[key].function, *work.first[key], answer.error)

        compile_all(jobs, count, step)
    return broken


def _load(work: _Work, broken: set[str]) -> None:
    """Run the fewest tokens at which every kernel is needed: it is then loaded, and compiled if it was not."""
    loaded: set[tuple[torch.device, str]] = set()  # every device has its own
    for (layer, tokens), keys in sorted(work.cases.items(), key=lambda case: case[0][1]):
        new = {(layer.device, key) for key in keys} - loaded
        if not new or keys & broken:
            continue
        try:
            layer.call(tokens)
            torch.cuda.synchronize(layer.device)
        except Exception as error:  # the compiler, the driver or the memory; other cases may run
            from ..kernels.workers import described

            names = ", ".join(sorted({work.need[key].function for _, key in new}))
            work.fail(names, layer, tokens, described(error))
            continue
        loaded |= new


def _multiply(work: _Work, progress: bool) -> int:
    """Run DeepGEMM's part for every number of rows; how many were new."""
    if not work.gemms:
        return 0
    from ..deepgemm.experts import rehearse
    from ..kernels.workers import described

    new = 0
    with Progress(len(work.gemms), "DeepGEMM sizes", progress) as bar:
        for (align, rows, _), (provider, projection, layer, tokens) in work.gemms.items():
            try:
                new += rehearse(provider, align, rows, projection)
            except Exception as error:  # nvcc, the driver or the memory
                work.fail(f"DeepGEMM with {rows} rows", layer, tokens, described(error))
            bar.step()
    return new
