"""The op calls of a model's MoE layers, written down once and repeated for any number of tokens.

A recorded call keeps the layer's own weights, and of what depends on the tokens only the form. Shape legend: see
``spec.py``; ``P`` rows of a call are a multiple of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import torch_breaks
from ..backend import attempt, moe_compile
from ..config import Options
from ..explaining import unchanged, unwrap
from ..huggingface import is_optimized
from ..ops import schema as schema  # the ops must exist
from ..ops.calls import role_traits, traits
from ..quantize import BLOCK, FP8
from ..router_pass import RouterPass
from ..spec import Activation
from ..torch_compat import run_after_pass

# Which arguments have a row per token, or per pair; and which else are made by other ops, all of one size.
ROWS: dict[str, tuple[int, ...]] = {
    "experts": (0, 1, 2),
    "experts_fp8": (0, 1, 2),
    "sort_pairs": (0,),
    "grouped_linear": (0,),
    "combine": (0, 1, 3),
    "route": (0,),
}
MADE: dict[str, tuple[int, ...]] = {"grouped_linear": (3,), "combine": (2,)}
BY_PAIRS = ("grouped_linear", "combine")  # their rows are pairs, or both


@dataclass(frozen=True)
class Rows:
    """The form of an argument that is not a weight: zeros of it are valid ids, offsets and positions.

    Args:
        per_token: its first size by the number of tokens; 0 for ``size`` whatever the number.
        size: its first size where that is fixed.
        rest: its other sizes.
        pitch: from one row to the next, if its rows are dense.
    """

    per_token: int
    size: int
    rest: tuple[int, ...]
    pitch: int
    dtype: torch.dtype

    @staticmethod
    def of(t: Tensor, tokens: int) -> Rows:
        """The form of ``t`` in a call with so many tokens; 0 if its size does not follow them."""
        fits = tokens > 0 and t.shape[0] % tokens == 0
        dense = t.dim() == 2 and t.stride(1) == 1 and t.stride(0) > t.shape[1] and t.shape[0] > 1
        pitch = t.stride(0) if dense else 0
        per, size = (t.shape[0] // tokens, 0) if fits else (0, t.shape[0])
        return Rows(per, size, tuple(t.shape[1:]), pitch, t.dtype)

    def make(self, tokens: int, device: torch.device) -> Tensor:
        """Zeros of this form."""
        size = self.per_token * tokens if self.per_token else self.size
        if self.pitch:
            return torch.zeros(size, self.pitch, dtype=self.dtype, device=device)[:, : self.rest[0]]
        return torch.zeros(size, *self.rest, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Layer:
    """One op call; two are equal if the same kernels serve both."""

    op: str
    args: tuple[Any, ...] = field(compare=False, repr=False)
    kwargs: dict[str, Any] = field(compare=False, repr=False)
    device: torch.device
    key: tuple[Any, ...]

    def call(self, tokens: int) -> None:
        """The op with so many tokens, on the layer's own weights."""
        args = [a.make(tokens, self.device) if isinstance(a, Rows) else a for a in self.args]
        with torch.no_grad():
            getattr(torch.ops.moe_compile, self.op).default(*args, **self.kwargs)

    def __str__(self) -> str:
        if self.op not in ("experts", "experts_fp8"):
            return f"{self.op} {list(self.args[0].rest)} {_name(self.args[0].dtype)}"
        w2, name = (self.args[5][0], self.args[9]) if self.op == "experts" else (self.args[5], self.args[7])
        count = w2.shape[0] if w2.dim() == 3 else len(self.args[5])
        hidden, inter = w2.shape[-2:]
        return f"{self.op} E={count} K={self.args[2].rest[0]} H={hidden} I={inter} {_name(w2.dtype)} {name}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Recorder(TorchDispatchMode):
    """Writes down the calls of our ops and gives back zeros instead of running them."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.layers: dict[Layer, int] = {}  # with how often each was called
        self.tokens = 0  # of the last call that says so

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        space, _, name = str(func.name()).partition("::")
        name = name.partition(".")[0].removesuffix("_inner")
        if space != schema.NAMESPACE or name not in ROWS:
            return func(*args, **kwargs)
        if name not in BY_PAIRS:
            self.tokens = args[0].shape[0]
        layer = layer_of(name, args, kwargs, self.tokens)
        self.layers[layer] = self.layers.get(layer, 0) + 1
        return _zeros(func, args, kwargs)


def layer_of(op: str, args: Sequence[Any], kwargs: dict[str, Any], tokens: int) -> Layer:
    """The layer behind a call of ``op`` with so many tokens."""
    forms = list(args)
    for i in ROWS[op]:
        if isinstance(args[i], Tensor):
            forms[i] = Rows.of(args[i], tokens)
    for i in MADE.get(op, ()):
        forms[i] = Rows.of(args[i], 0)
    key = (*map(_trait, forms), *((name, _trait(value)) for name, value in sorted(kwargs.items())))
    return Layer(op, tuple(forms), kwargs, args[0].device, key)


def _trait(value: Any) -> Any:
    if isinstance(value, Tensor):
        return traits(value)
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], Tensor):
            return (*role_traits(value), all(t.data_ptr() % 16 == 0 for t in value))
        return tuple(value)
    return value


def _zeros(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    def meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return [meta(v) for v in value] if isinstance(value, list) else value

    out = func(*map(meta, args), **{name: meta(value) for name, value in kwargs.items()})
    device = args[0].device
    if isinstance(out, Tensor):
        return torch.zeros(out.shape, dtype=out.dtype, device=device)
    return tuple(torch.zeros(t.shape, dtype=t.dtype, device=device) for t in out)


# --- where calls come from ------------------------------------------------------------------------


class _Backend:
    """A Dynamo backend with the two passes of ours, which then runs each graph under a recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.__wrapped__ = moe_compile  # whatever is scoped to our backend holds for this one too
        self.recorder = recorder

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        attempt(gm, replace(Options.resolve(), strict=False, dryrun=False))

        compiled = run_after_pass(gm, example_inputs, RouterPass())

        def run(*args: Any) -> Any:
            with self.recorder:
                return compiled(*args)

        return run


def recorded(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Layer, int]:
    """The distinct layers of ``model(*args, **kwargs)``, each with its number of calls.

    The model runs once without its MoE layers. One that ``optimize`` has rewritten runs as it is, any other is traced
    as ``explain`` does.
    """
    model, recorder = unwrap(model), Recorder()
    if isinstance(model, nn.Module) and any(map(is_optimized, model.modules())):
        with torch.no_grad(), recorder:
            model(*args, **kwargs)
    else:
        with torch.no_grad(), unchanged(model), _compiled_code_forgotten():
            torch.compile(model, backend=_Backend(recorder))(*args, **kwargs)
    return recorder.layers


@contextmanager
def _compiled_code_forgotten() -> Iterator[None]:
    torch_breaks.reset()
    try:
        yield
    finally:
        torch_breaks.reset()


def inputs_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The given inputs, or those that a Hugging Face model names itself; nothing if there are none."""
    if args or kwargs:
        return args, kwargs
    made = getattr(unwrap(model), "dummy_inputs", None)
    if not isinstance(made, dict):
        return (), {}
    device = getattr(unwrap(model), "device", None)
    return (), {name: t.to(device) if isinstance(t, Tensor) and device is not None else t for name, t in made.items()}


def layers_of_size(
    sizes: Sequence[int], dtype: torch.dtype, fp8: bool, activation: str, device: torch.device
) -> dict[Layer, int]:
    """Layers without a model: gated, stacked weights ``[E, 2I, H]``, gate first, for both dtypes of router weights."""
    experts, top_k, hidden, inter = sizes
    act, tokens = Activation(activation), 2
    x = torch.zeros(tokens, hidden, dtype=dtype, device=device)
    ids = torch.zeros(tokens, top_k, dtype=torch.int64, device=device)
    shapes = ((experts, 2 * inter, hidden), (experts, hidden, inter))
    stored = torch.uint8 if fp8 else dtype
    w1, w2 = (torch.zeros(s, dtype=stored, device=device).view(FP8 if fp8 else dtype) for s in shapes)
    meaning = (act.name, act.args(), act.gated, False)
    out = {}
    for weights_dtype in dict.fromkeys((torch.float32, dtype)):
        rows = (x, ids.to(weights_dtype), ids)
        if fp8:
            s1, s2 = (
                torch.zeros(e, -(-n // BLOCK[0]), -(-k // BLOCK[1]), device=device) for e, n, k in shapes
            )
            out[layer_of("experts_fp8", (*rows, w1, s1, w2, s2, *meaning), {}, tokens)] = 1
        else:
            out[layer_of("experts", (*rows, [w1], [], [w2], [], [], [], *meaning), {}, tokens)] = 1
    return out
