"""What an MoE layer means: frozen dataclasses, their invariants, and a plain PyTorch reference.

Shape legend, used in every file: ``T`` tokens, ``E`` experts, ``K`` experts chosen per token
(``top_k``), ``H`` hidden size, ``I`` intermediate size, ``P = T*K`` token-expert pairs.

The meaning, for every token ``t``::

    out[t] = sum_k  topk_weights[t, k] * expert[topk_ids[t, k]](hidden_states[t])
    expert[e](x) = w2[e] @ act(w1[e] @ x + b1[e], w3[e] @ x + b3[e]) + b2[e]

A pair whose id lies outside ``[0, E)`` contributes exactly zero and reads no weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

INF = math.inf
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
SCORES = ("softmax", "sigmoid")


class NoMatch(Exception):
    """A refusal as a value: why a candidate is not an MoE layer that can be replaced.

    Args:
        code: a key of ``moe_compile.codes.CODES`` such as ``"MC208"``.
        reason: one line that names the failing fact with its values.
        node: the graph node (or anything else with a source location) where the proof ended.
    """

    def __init__(self, code: str, reason: str, node: Any = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Activation:
    """A closed form of what happens between the two GEMMs.

    Gated:      ``min(f(min(g, gate_limit)), act_limit) * (clamp(u, -up_limit, up_limit) + up_offset)``
    Not gated:  ``min(f(min(g, gate_limit)), act_limit)``

    with ``f`` one of: ``silu`` ``g*sigmoid(alpha*g)``, ``gelu`` (erf), ``gelu_tanh``, ``relu``,
    ``relu2`` (``relu(g)**2``), ``identity``. ``alpha`` counts for ``silu`` only.
    gpt-oss is ``Activation("silu", alpha=1.702, gate_limit=7, up_limit=7, up_offset=1)``.
    """

    name: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    gate_limit: float = INF
    up_limit: float = INF
    act_limit: float = INF
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation {self.name!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.alpha != 1.0 and self.name != "silu":
            raise ValueError(f"alpha={self.alpha} belongs to silu only, not to {self.name!r}")
        for field in ("gate_limit", "up_limit", "act_limit"):
            if math.isnan(getattr(self, field)):
                raise ValueError(f"{field} is NaN")

    def args(self) -> list[float]:
        """The constants in the order of the op schema: alpha, gate_limit, up_limit, act_limit, up_offset."""
        return [self.alpha, self.gate_limit, self.up_limit, self.act_limit, self.up_offset]

    @staticmethod
    def from_args(name: str, gated: bool, args: Sequence[float]) -> Activation:
        """Inverse of ``args``; the op implementations call it."""
        return Activation(name, gated, *args)

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Reference value, in the dtype of ``gate``. ``up`` is None exactly when not ``gated``."""
        g = gate.clamp(max=self.gate_limit) if self.gate_limit < INF else gate
        a = _apply(self.name, g, self.alpha)
        if self.act_limit < INF:
            a = a.clamp(max=self.act_limit)
        if not self.gated:
            return a
        assert up is not None
        u = up.clamp(-self.up_limit, self.up_limit) if self.up_limit < INF else up
        return a * (u + self.up_offset if self.up_offset else u)


def _apply(name: str, g: Tensor, alpha: float) -> Tensor:
    if name == "silu":
        return g * torch.sigmoid(alpha * g)
    if name == "gelu":
        return torch.nn.functional.gelu(g)
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(g, approximate="tanh")
    if name == "relu":
        return torch.relu(g)
    if name == "relu2":
        return torch.relu(g).square()
    return g


@dataclass(frozen=True)
class Router:
    """How ``topk_weights`` and ``topk_ids`` come from the router's logits.

    The K largest logits of a token are chosen. Their weights are ``score(logits)`` over all experts (``softmax`` or
    ``sigmoid``), divided by their sum plus ``eps`` if ``renormalise``, times ``scale``.
    """

    score: str = "softmax"
    renormalise: bool = True
    eps: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score {self.score!r} is not one of {', '.join(SCORES)}")

    def reference(self, logits: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``logits [T, E]`` -> weights ``[T, K]`` in ``dtype`` and int64 ids ``[T, K]``, the largest first.

        Computed in float32, or in float64 where the logits are.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = torch.topk(wide, top_k, dim=-1).indices
        scores = torch.softmax(wide, dim=-1) if self.score == "softmax" else torch.sigmoid(wide)
        weights = scores.gather(-1, ids)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.eps)
        return (weights * self.scale).to(dtype), ids


@dataclass(frozen=True)
class Scale:
    """What an fp8 weight is multiplied by: the weight means ``w * scale``.

    ``part`` is a handle of ``[E, ceil(out / block[0]), ceil(in / block[1])]``, whatever the order in which the weight
    is stored: each ``block`` of output and input features shares a number. ``(1, in)`` is a scale per output channel,
    ``(out, in)`` one per matrix.
    """

    part: Any
    block: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(f"a scale is shared by a block of (out, in) features, got {self.block}")

    def times(self, w: Tensor, e: int) -> Tensor:
        """``w [out, in]`` of expert ``e``, scaled; in the wider dtype of the two."""
        (rows, columns), (out, inner) = self.block, w.shape
        every = self.part[e].repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inner]
        return w * every.to(torch.promote_types(w.dtype, every.dtype))


@dataclass(frozen=True)
class Weight:
    """One role (for example "down projection") of all experts.

    ``parts`` holds handles (graph nodes while matching, tensors in the ops): either one stacked
    ``[E, out, in]`` (biases ``[E, out]``), or E separate ``[out, in]`` (``[out]``) in the order of
    the expert ids. ``transposed`` says that the handles are stored ``[.., in, out]``; lowering
    inserts a view, so kernels always see ``[.., out, in]`` with any strides. ``scale`` is there when the handle is
    fp8: the weight means ``part * scale``.
    """

    parts: tuple[Any, ...]
    stacked: bool
    transposed: bool = False
    scale: Scale | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a Weight needs at least one tensor")
        if self.stacked and len(self.parts) != 1:
            raise ValueError(f"a stacked Weight is one tensor, got {len(self.parts)}")
        if self.scale is not None and not self.stacked:
            raise ValueError(f"a Weight with a scale is one stacked tensor, got {len(self.parts)} separate ones")


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    ``w1`` is the gate projection, or gate and up fused along ``out`` when ``w3`` is None and the
    activation is gated (``[gate; up]``, or alternating rows when ``interleaved``), or the only
    input projection when the activation is not gated. ``activation`` is None when the rows between
    the GEMMs go through the user's own row-wise subgraph (``custom`` then holds it).
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    w1: Weight
    w2: Weight
    w3: Weight | None = None
    b1: Weight | None = None
    b2: Weight | None = None
    b3: Weight | None = None
    activation: Activation | None = Activation()
    interleaved: bool = False
    custom: Any = None

    def __post_init__(self) -> None:
        if min(self.num_experts, self.hidden_size, self.intermediate_size) < 1:
            raise ValueError(
                f"experts need positive sizes, got E={self.num_experts}, H={self.hidden_size}, "
                f"I={self.intermediate_size}"
            )
        if (self.activation is None) == (self.custom is None):
            raise ValueError("experts have either a known activation or a custom subgraph")
        if self.interleaved and self.w3 is not None:
            raise ValueError("interleaved gate/up rows need one fused w1, got a separate w3")
        if self.b3 is not None and self.w3 is None:
            raise ValueError("b3 belongs to w3, which is absent")
        matrices = [w for w in (self.w1, self.w3, self.w2) if w is not None]
        scaled = [w for w in matrices if w.scale is not None]
        if scaled and len(scaled) < len(matrices):
            raise ValueError(f"{len(scaled)} of {len(matrices)} projections have a scale: all are fp8, or none")
        if scaled and (self.activation is None or any(b is not None for b in (self.b1, self.b2, self.b3))):
            raise ValueError("fp8 experts have a known activation and no biases")

    @property
    def fp8(self) -> bool:
        """Whether the weights are fp8 with scales."""
        return self.w1.scale is not None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Every role that is present."""
        roles = (self.w1, self.w3, self.w2, self.b1, self.b3, self.b2)
        return tuple(w for w in roles if w is not None)


@dataclass(frozen=True)
class MoE:
    """The routed part of one layer, between ``(hidden_states, topk_ids, topk_weights)`` and its output.

    ``weight_on_input`` multiplies the router weight into the expert's input instead of its output.
    ``out_dtype`` is the dtype that the original region returns.
    """

    hidden_states: Any  # [T, H]
    topk_ids: Any  # [T, K]
    topk_weights: Any  # [T, K]
    top_k: int
    experts: Experts
    weight_on_input: bool = False
    out_dtype: torch.dtype | None = None
    form: str = ""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be positive, got {self.top_k}")

    def describe(self) -> str:
        """One short phrase for reports: ``8 experts, top-2, silu-gated, H=64 I=128``."""
        e = self.experts
        act = "custom activation" if e.activation is None else e.activation.name
        gated = "-gated" if e.activation is not None and e.activation.gated else ""
        bias = ", biases" if any(b is not None for b in (e.b1, e.b2, e.b3)) else ""
        fp8 = ", fp8 weights" if e.fp8 else ""
        sizes = f"H={e.hidden_size} I={e.intermediate_size}"
        return f"{e.num_experts} experts, top-{self.top_k}, {act}{gated}{bias}{fp8}, {sizes}"

    def reference(self, dtype: torch.dtype | None = None) -> Tensor:
        """The meaning in plain PyTorch, one expert after the other; handles must be tensors.

        Args:
            dtype: compute in this dtype (``torch.float64`` for tests); default the input's own.
        """
        if self.experts.activation is None:
            raise ValueError("a custom activation has no reference of its own")
        x = self.hidden_states if dtype is None else self.hidden_states.to(dtype)
        w = self.topk_weights if dtype is None else self.topk_weights.to(dtype)
        out = torch.zeros(
            x.shape[0], self.experts.hidden_size, dtype=torch.promote_types(x.dtype, w.dtype), device=x.device
        )  # [T, H]
        for e in range(self.experts.num_experts):
            token, slot = torch.where(self.topk_ids == e)
            weight = w[token, slot, None]
            rows = x[token]  # [n_e, H]
            if self.weight_on_input:
                y = self._expert(e, rows * weight, dtype)
            else:
                y = self._expert(e, rows, dtype) * weight
            out.index_add_(0, token, y.to(out.dtype))
        return out if dtype is not None or self.out_dtype is None else out.to(self.out_dtype)

    def _expert(self, e: int, rows: Tensor, dtype: torch.dtype | None) -> Tensor:
        ex, act = self.experts, self.experts.activation
        assert act is not None
        h = _linear(rows, ex.w1, ex.b1, e, dtype)
        up: Tensor | None = None
        if ex.w3 is not None:
            up = _linear(rows, ex.w3, ex.b3, e, dtype)
        elif act.gated:
            h, up = (h[:, 0::2], h[:, 1::2]) if ex.interleaved else h.chunk(2, dim=-1)
        return _linear(act(h, up), ex.w2, ex.b2, e, dtype)

    def with_tensors(self, **changes: Any) -> MoE:
        """A copy with other handles; ``dataclasses.replace`` under a name that says why."""
        return replace(self, **changes)


def _linear(x: Tensor, weight: Weight, bias: Weight | None, e: int, dtype: torch.dtype | None) -> Tensor:
    def part(w: Weight) -> Tensor:
        t = w.parts[0][e] if w.stacked else w.parts[e]
        if w.scale is not None:
            t = t.to(dtype or x.dtype)  # fp8 multiplies nothing
        return t if dtype is None else t.to(dtype)

    w = part(weight)
    w = w.t() if weight.transposed else w  # [out, in]
    if weight.scale is not None:
        w = weight.scale.times(w, e).to(x.dtype)
    y = x @ w.t()
    return y if bias is None else y + part(bias)
