"""What a kind of Hugging Face MoE module declares, and the op calls that follow from it.

A ``Family`` is stateless. ``check`` and ``describe`` look at a real module, outside Dynamo; ``gate``,
``tensors``, ``probe`` and ``run`` may be traced, so they read the module's flags in plain Python and
Dynamo guards on what they read. Shape legend: see ``spec.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .hf_fp8 import SCALE, check_fp8, describe_fp8, is_fp8, run_fp8
from .spec import Activation, Experts, MoE, NoMatch, Weight
from .torch_compat import is_fake

How = tuple[Any, ...]  # () = run the gate as written, else (name, args, gated, interleaved, kernels)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Family:
    """One kind of module; ``run`` replaces its ``forward``."""

    def check(self, module: Any) -> None:
        """Raise ``NoMatch`` when the module does not hold what the family declares."""
        raise NotImplementedError

    def describe(self, module: Any, top_k: int, activation: Activation | None, interleaved: bool) -> MoE:
        """The meaning, with attribute paths as handles so that a report keeps no tensor alive."""
        raise NotImplementedError

    def fits(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a call has the declared form ``([T, H], [T, K], [T, K])``."""
        return len(args) == 3 and not kwargs and args[0].dim() == 2 and args[1].dim() == 2

    def top_k(self, module: Any, args: Sequence[Any]) -> int:
        """K of a call, for reports."""
        return int(args[1].shape[-1])

    def gated(self, module: Any) -> bool:
        return True

    def width(self, module: Any) -> int:
        """Columns that ``gate`` takes: 2*I when gated, else I."""
        raise NotImplementedError

    def weight(self, module: Any) -> Tensor:
        """A weight whose dtype and device the experts compute in."""
        raise NotImplementedError

    def needs_closed_form(self, module: Any) -> bool:
        """Whether only a known activation can be run, and a module with another one is refused."""
        return False

    def op(self, module: Any, top_k: int | None, kernels: str) -> str:
        """The op that runs the experts if the activation is known, and by which kernels, for reports."""
        return "moe_compile::experts"

    def tensors(self, module: Any) -> list[Tensor]:
        """Everything differentiable that ``run`` gives to the ops."""
        return list(module.parameters())

    def gate(self, module: Any, rows: Tensor) -> Tensor:
        """What the module computes between its GEMMs: ``[S, width] -> [S, I]``, row by row."""
        raise NotImplementedError

    def run(self, module: Any, how: How, *args: Any) -> Any:
        """The replacement of ``module.forward(*args)``."""
        raise NotImplementedError


def call_experts(
    how: How,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    w1: list[Tensor],
    w3: list[Tensor],
    w2: list[Tensor],
    b1: list[Tensor],
    b2: list[Tensor],
    gate: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor] | None = None,
    weight_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``[T, H] -> [T, H]``: one op when the activation is known, else the two GEMMs around ``gate``."""
    out_dtype = out_dtype or hidden_states.dtype
    if hidden_states.dtype != w1[0].dtype:  # as transformers does under autocast
        hidden_states = hidden_states.to(w1[0].dtype)
    ops = torch.ops.moe_compile
    if how and norm is None:
        name, constants, gated, interleaved, _ = how
        return ops.experts.default(
            hidden_states, top_k_weights, top_k_index, w1, w3, w2, b1, [], b2,
            name, list(constants), gated, interleaved, weight_on_input, out_dtype,
        )  # fmt: skip
    top_k = top_k_index.shape[1]
    num_experts = w2[0].shape[0] if len(w2) == 1 and w2[0].dim() == 3 else len(w2)
    order, offsets = ops.sort_pairs.default(top_k_index, num_experts)
    rows = hidden_states.index_select(0, order // top_k)  # [P, H]
    combine_weights: Tensor | None = top_k_weights
    if weight_on_input:
        scale = top_k_weights.reshape(-1).index_select(0, order)  # [P]
        rows = (rows * scale[:, None]).to(rows.dtype)
        combine_weights = None
    hidden = ops.grouped_linear.default(rows, w1, b1, offsets)
    if w3:
        hidden = torch.cat([hidden, ops.grouped_linear.default(rows, w3, [], offsets)], dim=-1)
    hidden = gate(hidden).to(w2[0].dtype)  # [P, I]
    hidden = ops.grouped_linear.default(hidden, w2, b2, offsets)  # [P, H]
    if norm is not None:
        hidden = norm(hidden)
    return ops.combine.default(hidden, order, offsets, combine_weights, top_k, out_dtype)


def require_plain(module: nn.Module, *tensors: Any) -> None:
    """Raise ``NoMatch`` unless every tensor is dense, unwrapped, floating point and of one dtype."""
    for tensor in tensors:
        kind = type(tensor)
        if not issubclass(kind, Tensor):
            raise NoMatch("MC206", f"{type(module).__name__} holds {kind.__name__} where a weight belongs")
        data = tensor.data
        if kind not in (Tensor, nn.Parameter, nn.Buffer) or not _is_dense(data):
            raise NoMatch("MC402", f"weights are {type(data).__name__}, a tensor subclass")
        if tensor.dtype not in FLOATS:
            raise NoMatch("MC402", f"weights are {tensor.dtype}, a quantised format")
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(d) for d in dtypes))
        raise NoMatch("MC401", f"the experts mix the dtypes {names}")


def _is_dense(data: Tensor) -> bool:
    return type(data) in (Tensor, nn.Parameter) or is_fake(data)  # an export or explain works with fakes


def named(path: str, transposed: bool = False) -> Weight:
    """A stacked role whose handle is an attribute path."""
    return Weight((path,), True, transposed)


class Stacked(Family):
    """``@use_experts_implementation`` classes and their like: 3-D weights and the decorator's flags."""

    def check(self, module: Any) -> None:
        names = [self._up(module), "down_proj"]
        if self._flag(module, "has_bias"):
            names += [f"{name}_bias" for name in names]
        for name in names:
            if getattr(module, name, None) is None:
                raise NoMatch("MC206", f"{type(module).__name__} declares {name} but does not hold it")
        if is_fp8(module):
            check_fp8(module, names[0])
        else:
            require_plain(module, *(getattr(module, name) for name in names))
        if self._flag(module, "has_post_expert_norm") and not callable(getattr(module, "post_expert_norm", None)):
            raise NoMatch("MC303", f"{type(module).__name__} declares a post-expert norm but holds none")
        up, down = getattr(module, names[0]), module.down_proj
        if up.dim() != 3 or down.dim() != 3:
            raise NoMatch("MC201", f"weights are {list(up.shape)} and {list(down.shape)}, not 3-D")
        if not up.shape[0] == down.shape[0] == module.num_experts:
            raise NoMatch(
                "MC208",
                f"num_experts is {module.num_experts}, the weights hold {up.shape[0]} and {down.shape[0]}",
            )
        inner = down.shape[1 if self._flag(module, "is_transposed") else 2]
        if self.width(module) != (2 * inner if self.gated(module) else inner):
            raise NoMatch("MC201", f"weights {list(up.shape)} and {list(down.shape)} do not fit together")

    def describe(self, module: Any, top_k: int, activation: Activation | None, interleaved: bool) -> MoE:
        transposed, bias = self._flag(module, "is_transposed"), self._flag(module, "has_bias")
        up = self._up(module)
        inner = self.width(module) // (2 if self.gated(module) else 1)
        custom = "_apply_gate" if self.gated(module) else "act_fn"
        if self._flag(module, "has_post_expert_norm"):  # no closed form then, whatever the activation
            activation, interleaved, custom = None, False, f"{custom}, then post_expert_norm"
        experts = Experts(
            num_experts=module.num_experts,
            hidden_size=getattr(module, up).shape[1 if transposed else 2],
            intermediate_size=inner,
            w1=named(up, transposed),
            w2=named("down_proj", transposed),
            b1=named(f"{up}_bias") if bias else None,
            b2=named("down_proj_bias") if bias else None,
            activation=activation,
            interleaved=interleaved,
            custom=custom if activation is None else None,
        )
        return MoE(*BORDER, top_k, experts, form=form_of(module))

    def gated(self, module: Any) -> bool:
        return bool(getattr(module, "has_gate", True))

    def width(self, module: Any) -> int:
        return int(getattr(module, self._up(module)).shape[2 if self._flag(module, "is_transposed") else 1])

    def weight(self, module: Any) -> Tensor:
        # what lies between GEMMs of fp8 is no fp8
        return getattr(module, f"down_proj{SCALE}") if is_fp8(module) else module.down_proj

    def needs_closed_form(self, module: Any) -> bool:
        return is_fp8(module)

    def op(self, module: Any, top_k: int | None, kernels: str) -> str:
        if is_fp8(module):
            return describe_fp8(module, self._up(module), top_k, kernels)
        return super().op(module, top_k, kernels)

    def gate(self, module: Any, rows: Tensor) -> Tensor:
        return module._apply_gate(rows) if self.gated(module) else module.act_fn(rows)

    def run(self, module: Any, how: How, *args: Any) -> Tensor:
        hidden_states, top_k_index, top_k_weights = args
        if is_fp8(module):
            return run_fp8(module, self._up(module), how, hidden_states, top_k_index, top_k_weights)
        up, down = getattr(module, self._up(module)), module.down_proj
        b1, b2 = [], []
        if self._flag(module, "has_bias"):
            b1, b2 = [getattr(module, self._up(module) + "_bias")], [module.down_proj_bias]
        if self._flag(module, "is_transposed"):
            up, down = up.transpose(-1, -2), down.transpose(-1, -2)
        norm = module.post_expert_norm if self._flag(module, "has_post_expert_norm") else None
        return call_experts(
            how, hidden_states, top_k_index, top_k_weights, [up], [], [down], b1, b2,
            gate=lambda rows: self.gate(module, rows), norm=norm,
        )  # fmt: skip

    def _up(self, module: Any) -> str:
        return "gate_up_proj" if self.gated(module) else "up_proj"

    def _flag(self, module: Any, name: str) -> bool:
        # transformers 5.17 does not set every flag
        return bool(getattr(module, name, False))


BORDER = ("hidden_states", "top_k_index", "top_k_weights")


def form_of(module: Any) -> str:
    return f"hf:{type(module).__name__}"
