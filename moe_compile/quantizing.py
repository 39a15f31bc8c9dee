"""``optimize(model, quantize="fp8")``: float experts of Hugging Face models become fp8 ones, layer by layer.

The weights are rounded to float8_e4m3fn with a float32 scale per block of 128 x 128 (``quantize.py``), and the module
is from then on what ``hf_fp8.py`` knows as fp8 experts, whose rows are rounded as they come. This changes numbers, so
it is done only when asked for, and the error of each layer is measured on random rows before its old weights are let
go. Shape legend: see ``spec.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .hf_family import Family, Stacked
from .hf_fp8 import NOTE, SCALE
from .match.activation import Recognised, recognise
from .quantize import BLOCK, quantize_blocks
from .spec import NoMatch

log = logging.getLogger("moe_compile.quantizing")

SAMPLE_TOKENS = 64
_KEPT = "_moe_compile_originals"  # on a quantised module: its old weights on the CPU, or None
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_REFUSED = (
    ("is_transposed", "MC403", "weights stored as [E, in, out]"),
    ("has_bias", "MC506", "biases"),
    ("has_post_expert_norm", "MC303", "a norm after each expert"),
)


class QuantizedError(RuntimeError):
    """A layer cannot be quantised after all, or a quantised one was asked for something that it cannot do."""


@dataclass(frozen=True)
class Quantized:
    """What became of one layer.

    Args:
        before: bytes of its two weights.
        after: the same in fp8, with the scales.
        error: relative L2 error of the output of the experts on ``SAMPLE_TOKENS`` random rows.
    """

    before: int
    after: int
    error: float

    def __str__(self) -> str:
        return (
            f"weights rounded to fp8 ({self.after / 2**20:.1f} MiB instead of {self.before / 2**20:.1f}), "
            f"which changes the output by {self.error:.1%}"
        )


def is_quantized(module: nn.Module) -> bool:
    """Whether ``quantize_module`` has changed this module."""
    return _KEPT in module.__dict__


def check_quantizable(family: Family, module: Any) -> Recognised:
    """The activation of a module that can be quantised, which its family has already accepted.

    Raises:
        NoMatch: the fp8 op cannot run it, with a code.
    """
    if type(family) is not Stacked:
        raise NoMatch("MC402", f"{type(module).__name__} does not hold its experts as two weights [E, out, in]")
    for flag, code, words in _REFUSED:
        if getattr(module, flag, False):
            raise NoMatch(code, f"{type(module).__name__} has {words}, and experts with fp8 weights run without")
    for name in _names(module):
        weight = getattr(module, name)
        if not isinstance(weight, nn.Parameter) or weight.dtype not in _FLOATS or weight.device.type == "meta":
            raise NoMatch("MC402", f"{name} is {weight.dtype} on {weight.device}, no parameter that can be rounded")
    found = recognise(lambda rows: family.gate(module, rows), family.width(module), family.gated(module))
    if found is None:
        raise NoMatch("MC301", "what lies between the two GEMMs is no known activation")
    return found


def quantize_module(module: Any, found: Recognised, keep_originals: bool) -> Quantized:
    """Replace the weights of a module that ``check_quantizable`` has accepted; if that fails it is as it was.

    Raises:
        QuantizedError: the output would be no output any more.
    """
    names = _names(module)
    old = {name: getattr(module, name) for name in names}
    new: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in names:
            new[name], new[name + SCALE] = quantize_blocks(old[name].detach())
        error = _error([old[name].detach() for name in names], list(new.values()), found)
        result = Quantized(_bytes(old.values()), _bytes(new.values()), error)
        kept = None
        if keep_originals:
            kept = {name: (w.detach().to("cpu", copy=True), w.requires_grad) for name, w in old.items()}
    if not error < 1:  # NaN too
        raise QuantizedError(f"{type(module).__name__}: rounded to fp8, its output is off by {error:.3g} of its norm")
    for name, tensor in new.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    module.activation_scheme, module.block_size = "dynamic", BLOCK
    module.__dict__[_KEPT], module.__dict__[NOTE] = kept, str(result)
    log.info("%s: %s", type(module).__name__, result)
    return result


def check_restorable(modules: Iterable[nn.Module]) -> None:
    """Raise ``QuantizedError`` if the old weights of a quantised module are gone."""
    gone = [type(m).__name__ for m in modules if is_quantized(m) and m.__dict__[_KEPT] is None]
    if gone:
        raise QuantizedError(
            f"the weights of {len(gone)} modules ({gone[0]}) were rounded to fp8 and not kept, so restore cannot bring "
            "them back, and nothing was changed; load the model again, or next time use "
            "optimize(model, quantize='fp8', keep_originals=True)"
        )


def unquantize_module(module: Any) -> None:
    """Undo ``quantize_module``: the old numbers as new parameters, on the device where the quantised ones are."""
    device = module.down_proj.device
    for name, (data, requires_grad) in module.__dict__.pop(_KEPT).items():
        setattr(module, name, nn.Parameter(data.to(device), requires_grad=requires_grad))
        delattr(module, name + SCALE)
    for name in ("activation_scheme", "block_size", NOTE):
        delattr(module, name)


def guard_saving(model: nn.Module) -> None:
    """Let ``save_pretrained`` of this model, and of those inside it, raise as long as they hold quantised modules.

    It would write fp8 numbers beside a configuration that says float; ``from_pretrained`` reads them as weights,
    leaves the scales out, and calls that unexpected keys.
    """
    for module in model.modules():
        if not hasattr(type(module), "save_pretrained"):
            continue
        guarded = module.__dict__.get("save_pretrained") is save_pretrained
        quantised = any(is_quantized(m) for m in module.modules())
        if quantised and "save_pretrained" not in module.__dict__:
            module.__dict__["save_pretrained"] = save_pretrained
        elif guarded and not quantised:
            del module.__dict__["save_pretrained"]


def save_pretrained(*args: Any, **kwargs: Any) -> Any:
    """In place of the class's own ``save_pretrained``.

    Raises:
        QuantizedError: always.
    """
    raise QuantizedError(
        "this model was quantised by moe_compile, and from_pretrained would read what save_pretrained writes as float "
        "weights, without their scales; keep the checkpoint it was loaded from and call optimize(model, "
        "quantize='fp8') after loading, or save model.state_dict(), which load_state_dict takes once the model is "
        "quantised again"
    )


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the class's own ``forward``, which would take fp8 numbers for weights.

    Raises:
        QuantizedError: always.
    """
    raise QuantizedError(
        f"{type(module).__name__} was quantised by moe_compile and runs only as (hidden_states, top_k_index, "
        "top_k_weights), without gradients: use torch.no_grad() or torch.inference_mode(); moe_compile.restore(model) "
        "brings back weights that were kept"
    )


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _error(old: list[Tensor], new: list[Tensor], found: Recognised) -> float:
    """Of the op on the new weights and scales against the op on the old weights."""
    w1, w2 = old
    experts, hidden = w2.shape[:2]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLE_TOKENS, hidden, generator=g).to(w1.device, w1.dtype)
    weights, ids = torch.randn(SAMPLE_TOKENS, experts, generator=g).softmax(-1).topk(min(2, experts))
    rows = (x, weights.to(w1.device), ids.to(w1.device))
    act = found.activation
    how = (act.name, list(act.args()), act.gated, found.interleaved)
    expected = torch.ops.moe_compile.experts.default(*rows, [w1], [], [w2], [], [], [], *how).double()
    ours = torch.ops.moe_compile.experts_fp8.default(*rows, *new, *how).double()
    return float((ours - expected).norm() / expected.norm())
