"""fused_experts: values against spec.MoE.reference, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.functional import ArgumentError, fused_experts
from moe_compile.spec import Activation, Experts, MoE, Weight

T, E, K, H, I = 7, 5, 2, 12, 16


def arguments(gated: bool = True, split: bool = False, bias: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = 2 * I if gated and not split else I
    out: dict[str, Any] = {
        "hidden_states": torch.randn(T, H),
        "w1": torch.randn(E, rows, H) / H**0.5,
        "w2": torch.randn(E, H, I) / I**0.5,
        "topk_weights": torch.rand(T, K),
        "topk_ids": torch.stack([torch.randperm(E)[:K] for _ in range(T)]),
    }
    if split:
        out["w3"] = torch.randn(E, I, H) / H**0.5
    if bias:
        out.update(b1=torch.randn(E, rows), b2=torch.randn(E, H))
        if split:
            out["b3"] = torch.randn(E, I)
    return out


def reference(
    a: dict[str, Any], activation: Activation, interleaved: bool = False, on_input: bool = False
) -> Tensor:
    def role(name: str) -> Weight | None:
        return Weight((a[name],), stacked=True) if name in a else None

    w1, w2 = role("w1"), role("w2")
    assert w1 is not None and w2 is not None
    experts = Experts(
        E, H, I, w1, w2, role("w3"), role("b1"), role("b2"), role("b3"), activation, interleaved=interleaved
    )
    moe = MoE(a["hidden_states"], a["topk_ids"], a["topk_weights"], K, experts, on_input)
    return moe.reference(torch.float64)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
def test_values(name: str, bias: bool, gated: bool) -> None:
    a = arguments(gated, bias=bias)
    close(fused_experts(**a, activation=name, gated=gated), reference(a, Activation(name, gated)))


@pytest.mark.parametrize("bias", [False, True])
def test_separate_up_projection(bias: bool) -> None:
    a = arguments(split=True, bias=bias)
    close(fused_experts(**a), reference(a, Activation()))


def test_gpt_oss_activation_interleaved_with_biases() -> None:
    a = arguments(bias=True)
    act = Activation("silu", alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0)
    close(fused_experts(**a, activation=act, interleaved=True), reference(a, act, interleaved=True))


def test_router_weight_on_input() -> None:
    a = arguments()
    close(fused_experts(**a, apply_router_weight_on_input=True), reference(a, Activation(), on_input=True))


def test_ids_out_of_range_contribute_zero() -> None:
    a = arguments()
    a["topk_ids"][0] = torch.tensor([-1, E])
    a["topk_ids"][1, 0] = E + 100
    out = fused_experts(**a)
    assert torch.equal(out[0], torch.zeros(H))
    close(out, reference(a, Activation()))


def test_expert_map_means_global_to_local() -> None:
    a = arguments()
    whole = dict(a)
    held = torch.tensor([3, 1])
    expert_map = torch.full((E,), -1)
    expert_map[held] = torch.arange(2)
    a["w1"], a["w2"] = a["w1"][held], a["w2"][held]
    a["topk_ids"][0] = torch.tensor([-1, E])  # unknown to the map as well
    whole["topk_ids"] = torch.where(torch.isin(a["topk_ids"], held), a["topk_ids"], -1)
    close(fused_experts(**a, expert_map=expert_map), reference(whole, Activation()))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    a = arguments()
    for name in ("hidden_states", "topk_weights", "topk_ids"):
        a[name] = a[name][:tokens]
    out = fused_experts(**a)
    assert out.shape == (tokens, H)
    close(out, reference(a, Activation()))


def test_out_dtype_and_int32_ids() -> None:
    a = arguments()
    a["topk_ids"] = a["topk_ids"].int()
    out = fused_experts(**a, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16


def test_input_is_not_changed_and_output_is_fresh() -> None:
    a = arguments()
    before = {name: t.clone() for name, t in a.items()}
    first = fused_experts(**a)
    second = fused_experts(**a)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert all(torch.equal(t, before[name]) for name, t in a.items())


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"hidden_states": torch.randn(2, 3, H)},
        r"hidden_states must have shape \[T, H\], got \[2, 3, 12\] \(reshape",
    ),
    (
        {"w1": torch.randn(E, 2 * I, H + 1)},
        r"w1 must have shape \[E, 2I, H\], got \[5, 32, 13\]: dimension 2 is 13",
    ),
    ({"w1": torch.randn(E, I, H)}, r"w1 must .*dimension 1 is 16, but 2I=32"),
    ({"w2": torch.randn(E, I, H)}, r"w2 must have shape \[E, H, I\], got \[5, 16, 12\]"),
    ({"topk_ids": torch.zeros(T + 1, K, dtype=torch.int64)}, "topk_ids must have shape"),
    ({"topk_weights": torch.rand(T, K + 1)}, "topk_weights must have shape"),
    ({"topk_ids": torch.zeros(T, K)}, "topk_ids has dtype torch.float32, needed int32 or int64"),
    ({"topk_ids": torch.zeros(T, K, dtype=torch.uint8)}, "topk_ids has dtype torch.uint8"),
    ({"topk_weights": torch.ones(T, K, dtype=torch.int64)}, "topk_weights has dtype torch.int64"),
    (
        {"w2": torch.randn(E, H, I, dtype=torch.bfloat16)},
        "w2 has dtype torch.bfloat16, hidden_states torch.float32",
    ),
    ({"w1": torch.empty(E, 2 * I, H, device="meta")}, r"w1 is on meta, hidden_states on cpu; move it"),
    ({"b1": torch.randn(E, I)}, r"b1 must have shape \[E, 2I\]"),
    ({"b3": torch.randn(E, I)}, "b3 is the bias of w3, which is absent"),
    ({"w3": torch.randn(E, I, H), "gated": False}, "w3 is the up projection"),
    ({"interleaved": True, "gated": False}, "interleaved needs gate and up rows"),
    ({"activation": "swish"}, "activation 'swish' is not one of silu"),
    ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
    ({"activation": Activation(gated=False), "gated": True}, "gated=True contradicts"),
    ({"out_dtype": torch.int32}, "out_dtype torch.int32 is not one of"),
    ({"expert_map": torch.zeros(E)}, "expert_map has dtype torch.float32"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fused_experts(**{**arguments(), **change})


def test_more_experts_chosen_than_there_are() -> None:
    a = arguments()
    a["topk_ids"], a["topk_weights"] = torch.zeros(T, E + 1, dtype=torch.int64), torch.rand(T, E + 1)
    with pytest.raises(ArgumentError, match="chooses K=6 experts per token, but there are only 5"):
        fused_experts(**a)


def test_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"w1 must be a torch\.Tensor, got list"):
        fused_experts(**{**arguments(), "w1": [torch.randn(2 * I, H)] * E})
