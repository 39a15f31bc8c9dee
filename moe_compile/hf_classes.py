"""Hugging Face MoE classes without ``@use_experts_implementation``: how each becomes op calls.

The table is keyed by the class that defines ``forward``; a subclass that overrides it is not ours.
Shape legend: see ``spec.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .hf_family import BORDER, Family, How, Stacked, call_experts, form_of, named, require_plain
from .spec import Activation, Experts, MoE, NoMatch, Weight

_MODELS = "transformers.models"


_CAPTURING = "transformers.utils.output_capturing"  # hooks that read outputs, inactive unless asked for


def _expect(module: Any, name: str, cls: str, bypassed: bool = True, observed: bool = False) -> Any:
    """The child ``name``, which must run the ``forward`` of the transformers class ``cls``.

    Args:
        bypassed: the replacement does not call the child, so nothing may hook it,
        observed: except the output recorders of transformers, which the replacement serves itself.
    """
    child = getattr(module, name, None)
    if child is None or defining_class(child) != f"{type(module).__module__}.{cls}":
        found = "nothing" if child is None else type(child).__name__
        raise NoMatch("MC206", f"{type(module).__name__}.{name} is {found}, not the {cls} of transformers")
    if bypassed:
        _require_unhooked(child, f"{type(module).__name__}.{name}", observed)
    return child


def _require_unhooked(child: Any, name: str, observed: bool = False) -> None:
    hooks = [h for h in child._forward_hooks.values() if not observed or h.__module__ != _CAPTURING]
    if "forward" in child.__dict__ or hooks or child._forward_pre_hooks:
        raise NoMatch("MC104", f"{name} has a hook that would not run")


def defining_class(module: Any) -> str:
    """``module.Class`` of the class whose ``forward`` the module runs."""
    for cls in type(module).__mro__:
        if "forward" in cls.__dict__:
            return f"{cls.__module__}.{cls.__qualname__}"
    return ""


def _experts(
    w1: Weight,
    w2: Weight,
    sizes: tuple[int, int, int],
    activation: Activation | None,
    custom: str,
    w3: Weight | None = None,
    interleaved: bool = False,
) -> Experts:
    custom_or_none = custom if activation is None else None
    return Experts(*sizes, w1=w1, w2=w2, w3=w3, activation=activation, interleaved=interleaved, custom=custom_or_none)


class Dbrx(Family):
    """Flat ``w1, v1, w2 [E*I, H]``; gate and up are separate and ``w2`` is stored transposed."""

    def check(self, module: Any) -> None:
        mlp = _expect(module, "mlp", "DbrxExpertGLU")
        require_plain(module, mlp.w1, mlp.v1, mlp.w2)

    def describe(self, module: Any, top_k: int, activation: Activation | None, interleaved: bool) -> MoE:
        sizes = (module.num_experts, module.hidden_size, module.ffn_hidden_size)
        experts = _experts(
            named("mlp.w1"), named("mlp.w2", True), sizes, activation, "mlp.activation_fn", named("mlp.v1")
        )
        return MoE(*BORDER, top_k, experts, form=form_of(module))

    def fits(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return len(args) == 3 and not kwargs and args[1].dim() == 2

    def width(self, module: Any) -> int:
        return 2 * int(module.ffn_hidden_size)

    def weight(self, module: Any) -> Tensor:
        return module.mlp.w1

    def gate(self, module: Any, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return module.mlp.activation_fn(gate) * up

    def run(self, module: Any, how: How, *args: Any) -> Tensor:
        hidden_states, top_k_index, top_k_weights = args
        shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
        w1, v1, w2 = module.mlp.w1.view(shape), module.mlp.v1.view(shape), module.mlp.w2.view(shape)
        out = call_experts(
            how, hidden_states.reshape(-1, module.hidden_size), top_k_index, top_k_weights,
            [w1], [v1], [w2.transpose(-1, -2)], [], [],
            gate=lambda rows: self.gate(module, rows),
        )  # fmt: skip
        return out.view(hidden_states.shape[0], -1, module.hidden_size)


class Llama4(Family):
    """All experts on all tokens, scores (zero where not chosen) multiplied into the input.

    Running only the chosen experts is exact: no bias, so a zero input gives a zero output. The chosen
    ones are the largest of the router's own scores, so the router is not reproduced here.
    """

    def check(self, module: Any) -> None:
        experts = _expect(module, "experts", "Llama4TextExperts")
        _expect(module, "router", "Llama4Router", bypassed=False)
        require_plain(module, experts.gate_up_proj, experts.down_proj)

    def describe(self, module: Any, top_k: int, activation: Activation | None, interleaved: bool) -> MoE:
        e = module.experts
        sizes = (e.num_experts, e.hidden_size, e.expert_dim)
        experts = _experts(
            named("experts.gate_up_proj", True), named("experts.down_proj", True), sizes, activation,
            "experts.act_fn", interleaved=interleaved,
        )  # fmt: skip
        return MoE(*BORDER, top_k, experts, weight_on_input=True, form=form_of(module))

    def fits(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return len(args) == 1 and not kwargs

    def top_k(self, module: Any, args: Sequence[Any]) -> int:
        return int(module.router.top_k)

    def width(self, module: Any) -> int:
        return int(module.experts.gate_up_proj.shape[-1])

    def weight(self, module: Any) -> Tensor:
        return module.experts.down_proj

    def gate(self, module: Any, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return up * module.experts.act_fn(gate)

    def run(self, module: Any, how: How, *args: Any) -> Any:
        hidden_states = args[0].reshape(-1, module.hidden_dim)
        router_scores, router_logits = module.router(hidden_states)
        top_k_weights, top_k_index = torch.topk(router_scores, module.router.top_k, dim=1)
        routed = call_experts(
            how, hidden_states, top_k_index, top_k_weights,
            [module.experts.gate_up_proj.transpose(-1, -2)], [],
            [module.experts.down_proj.transpose(-1, -2)], [], [],
            gate=lambda rows: self.gate(module, rows), weight_on_input=True,
        )  # fmt: skip
        return module.shared_expert(hidden_states) + routed, router_logits


class JetMoe(Family):
    """``ParallelExperts`` over ``split(counts.tolist())``, an output bias after the sum.

    The router hands out split sizes as Python numbers, which no graph can hold, so its top-k is
    repeated here; ``check`` makes sure that it is the router of transformers.
    """

    def check(self, module: Any) -> None:
        first = _expect(module, "input_linear", "JetMoeParallelExperts")
        second = _expect(module, "output_linear", "JetMoeParallelExperts")
        _expect(module, "router", "JetMoeTopKGating", observed=True)
        require_plain(module, first.weight, second.weight)

    def describe(self, module: Any, top_k: int, activation: Activation | None, interleaved: bool) -> MoE:
        sizes = (module.router.num_experts, module.input_size, module.hidden_size)
        w1, w2 = named("input_linear.weight"), named("output_linear.weight")
        experts = _experts(w1, w2, sizes, activation, "activation", interleaved=interleaved)
        return MoE(*BORDER, top_k, experts, form=form_of(module))

    def fits(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return len(args) == 1 and not kwargs and args[0].dim() == 3

    def top_k(self, module: Any, args: Sequence[Any]) -> int:
        return int(module.router.top_k)

    def width(self, module: Any) -> int:
        return int(module.input_linear.weight.shape[1])

    def weight(self, module: Any) -> Tensor:
        return module.output_linear.weight

    def gate(self, module: Any, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return module.activation(gate) * up

    def run(self, module: Any, how: How, *args: Any) -> Tensor:
        batch, length, size = args[0].shape
        hidden_states = args[0].reshape(-1, size)
        logits = module.router.layer(hidden_states).float()
        for recorder in module.router._forward_hooks.values():  # ``check`` admits no other hooks
            recorder(module.router, (hidden_states,), (None, None, None, None, logits))
        top_k_logits, top_k_index = logits.topk(module.router.top_k, dim=1)
        top_k_weights = torch.softmax(top_k_logits, dim=1).type_as(hidden_states)
        out = call_experts(
            how, hidden_states, top_k_index, top_k_weights,
            [module.input_linear.weight], [], [module.output_linear.weight], [], [],
            gate=lambda rows: self.gate(module, rows),
        )  # fmt: skip
        return out.view(batch, length, module.input_size) + module.bias


class LongcatFlash(Stacked):
    """Stacked experts, and identity experts with the ids from ``num_routed_experts`` on.

    The ops give zero for ids out of range, so the identity part is one multiply-add. ``gate_up_proj``
    holds unused rows for identity experts: they are cut off by a view.
    """

    def check(self, module: Any) -> None:
        if module.gate_up_proj is None:
            raise NoMatch("MC208", "the layer has identity experts only")
        if type(module.identity_expert) is not nn.Identity:
            raise NoMatch("MC206", f"identity_expert is {type(module.identity_expert).__name__}")
        require_plain(module, module.gate_up_proj, module.down_proj)

    def describe(self, module: Any, top_k: int, activation: Activation | None, interleaved: bool) -> MoE:
        sizes = (module.num_routed_experts, module.hidden_size, module.intermediate_size)
        w1, w2 = named("gate_up_proj"), named("down_proj")
        experts = _experts(w1, w2, sizes, activation, "act_fn", interleaved=interleaved)
        return MoE(*BORDER, top_k, experts, form=form_of(module))

    def gate(self, module: Any, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    def run(self, module: Any, how: How, *args: Any) -> Tensor:
        hidden_states, top_k_index, top_k_weights = args
        routed = module.num_routed_experts
        wide = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        out = call_experts(
            how, hidden_states, top_k_index, top_k_weights,
            [module.gate_up_proj[:routed]], [], [module.down_proj], [], [],
            gate=lambda rows: self.gate(module, rows), out_dtype=wide,
        )  # fmt: skip
        kept = torch.where(top_k_index >= routed, top_k_weights, 0.0).sum(dim=-1, keepdim=True)  # [T, 1]
        return (out + hidden_states * kept).to(hidden_states.dtype)


class SwitchTransformers(Family):
    """Top-1 with a capacity: the mask ``[T, 1, E]`` is one-hot, with an empty row for a dropped token.

    Such a token gets the id E, which contributes zero, so dropping needs no proof of absence.
    """

    def check(self, module: Any) -> None:
        for expert in module.values():
            self._check_expert(module, expert)
        if len({type(expert.act) for expert in module.values()}) > 1:
            raise NoMatch("MC206", "the experts differ in their activation")
        linears = [linear for expert in module.values() for linear in (expert.wi, expert.wo)]
        require_plain(module, *(linear.weight for linear in linears))

    def _check_expert(self, module: Any, expert: Any) -> None:
        cls = "SwitchTransformersDenseActDense"
        if defining_class(expert) != f"{type(module).__module__}.{cls}":
            raise NoMatch("MC206", f"an expert is {type(expert).__name__}, not {cls}")
        for child in (expert, expert.wi, expert.wo):
            _require_unhooked(child, "an expert")
        if any(type(linear) is not nn.Linear or linear.bias is not None for linear in (expert.wi, expert.wo)):
            raise NoMatch("MC206", "wi or wo of an expert is not an nn.Linear without bias")
        if expert.training and expert.dropout.p > 0:
            raise NoMatch("MC205", f"dropout p={expert.dropout.p} inside the experts while training")

    def describe(self, module: Any, top_k: int, activation: Activation | None, interleaved: bool) -> MoE:
        names = list(module)
        sizes = (len(names), module[names[0]].wi.in_features, module[names[0]].wi.out_features)
        w1, w2 = (Weight(tuple(f"{name}.{role}.weight" for name in names), False) for role in ("wi", "wo"))
        return MoE(*BORDER, top_k, _experts(w1, w2, sizes, activation, "act"), form=form_of(module))

    def fits(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        return len(args) == 3 and not kwargs and args[0].dim() == 2 and args[1].dim() == 3

    def top_k(self, module: Any, args: Sequence[Any]) -> int:
        return 1

    def gated(self, module: Any) -> bool:
        return False

    def width(self, module: Any) -> int:
        return int(module["expert_0"].wi.out_features)

    def weight(self, module: Any) -> Tensor:
        return module["expert_0"].wo.weight

    def gate(self, module: Any, rows: Tensor) -> Tensor:
        return module["expert_0"].act(rows)

    def run(self, module: Any, how: How, *args: Any) -> Tensor:
        hidden_states, mask, top_k_weights = args  # [T, H], [T, 1, E], [T, 1]
        experts = [module[f"expert_{e}"] for e in range(module.num_experts)]
        top_k_index = torch.where(mask.sum(dim=-1) > 0, mask.argmax(dim=-1), len(experts))  # [T, 1]
        return call_experts(
            how, hidden_states, top_k_index, top_k_weights,
            [e.wi.weight for e in experts], [], [e.wo.weight for e in experts], [], [],
            gate=lambda rows: self.gate(module, rows),
        )  # fmt: skip


class Refused(Family):
    """A class that is known and left alone."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason

    def check(self, module: Any) -> None:
        raise NoMatch(self.code, self.reason, type(module))


STACKED = "decorated"
FAMILIES: dict[str, Family] = {
    STACKED: Stacked(),
    f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts": Stacked(),
    f"{_MODELS}.dbrx.modeling_dbrx.DbrxExperts": Dbrx(),
    f"{_MODELS}.llama4.modeling_llama4.Llama4TextMoe": Llama4(),
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeMoE": JetMoe(),
    f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": LongcatFlash(),
    f"{_MODELS}.switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": (SwitchTransformers()),
    f"{_MODELS}.nllb_moe.modeling_nllb_moe.NllbMoeExperts": Refused(
        "MC209", "transformers applies one_hot to a one-hot mask here: a true top-2 sum would change results"
    ),
    f"{_MODELS}.doge.modeling_doge.DogeCDMoE": Refused(
        "MC206", "product-key retrieval: an expert is a row of two embeddings, not an MLP"
    ),
    f"{_MODELS}.vitpose_backbone.modeling_vitpose_backbone.VitPoseNaiveMoe": Refused(
        "MC207", "the expert is given by the data set's number, there is no router"
    ),
}
