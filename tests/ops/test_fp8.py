"""``experts_fp8`` and ``deep_gemm_moe_fp8`` on the CPU: against float64 of the same roundings, schema, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moe_compile
import moe_compile.ops
from moe_compile.functional import ArgumentError
from moe_compile.ops.fp8 import KernelUnavailable
from moe_compile.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from moe_compile.spec import Activation

E, K, H, I = 5, 2, 320, 192


def draw(tokens: int = 9, dtype: torch.dtype = torch.float32, gated: bool = True, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    w1, w1_scale = quantize_blocks(torch.randn(E, (2 if gated else 1) * I, H, generator=g) / H**0.5)
    w2, w2_scale = quantize_blocks(torch.randn(E, H, I, generator=g) / I**0.5)
    return {
        "hidden_states": torch.randn(tokens, H, generator=g).to(dtype),
        "topk_weights": torch.rand(tokens, K, generator=g) + 0.1,
        "topk_ids": torch.randint(-1, E + 1, (tokens, K), generator=g),
        "w1": w1, "w1_scale": w1_scale, "w2": w2, "w2_scale": w2_scale,
    }  # fmt: skip


def rounded(rows: Tensor, quantise: bool) -> Tensor:
    """In float64, but with the scales that float32 gives."""
    return dequantize_rows(*quantize_rows(rows.float()), dtype=torch.float64) if quantise else rows


def truth(a: dict[str, Any], act: Activation, interleaved: bool, on_input: bool, quantise: bool) -> Tensor:
    w1 = dequantize_blocks(a["w1"], a["w1_scale"], dtype=torch.float64)
    w2 = dequantize_blocks(a["w2"], a["w2_scale"], dtype=torch.float64)
    x, out = rounded(a["hidden_states"].double(), quantise), torch.zeros(len(a["hidden_states"]), H).double()
    for t in range(len(x)):
        for k in range(K):
            e, weight = int(a["topk_ids"][t, k]), a["topk_weights"][t, k].double()
            if 0 <= e < E:
                h = w1[e] @ (x[t] * weight if on_input else x[t])
                gate, up = h, None
                if act.gated:
                    gate, up = (h[0::2], h[1::2]) if interleaved else h.chunk(2)
                y = w2[e] @ rounded(act(gate, up)[None], quantise)[0]
                out[t] += y if on_input else y * weight
    return out


def error(ours: Tensor, expected: Tensor) -> float:
    assert bool(ours.isfinite().all())
    return float((ours.double() - expected).norm() / expected.norm())


def call(a: dict[str, Any], act: Activation = Activation(), **options: Any) -> Tensor:  # noqa: B008  (frozen)
    out: Tensor = torch.ops.moe_compile.experts_fp8(*a.values(), act.name, act.args(), act.gated, **options)
    return out


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("form", ["concat", "interleaved", "single"])
@pytest.mark.parametrize("on_input", [False, True])
def test_against_float64(form: str, on_input: bool, quantise: bool) -> None:
    act = Activation("gelu", gated=form != "single")
    a = draw(gated=act.gated)
    ours = call(a, act, interleaved=form == "interleaved", weight_on_input=on_input, quantise=quantise)
    # one value that rounds to the other neighbour is all that float32 and float64 may differ by
    assert error(ours, truth(a, act, form == "interleaved", on_input, quantise)) < (2e-3 if quantise else 1e-6)
    nobody = ((a["topk_ids"] < 0) | (a["topk_ids"] >= E)).all(1)
    assert bool((ours[nobody] == 0).all())


def scaled_otherwise(a: dict[str, Any], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments with other scales, and those of blocks that mean the same."""
    other, same = dict(a), dict(a)
    for name in ("w1", "w2"):
        w, g = a[name], torch.Generator().manual_seed(7)
        blocks = a[f"{name}_scale"].shape
        if kind == "tensor":
            scale = (torch.rand(E, 1, 1, generator=g) + 0.5) / 448
            other[f"{name}_scale"], same[f"{name}_scale"] = scale.expand(blocks), scale.expand(blocks).contiguous()
        else:  # powers of two, which fp8 holds: the same numbers in blocks of scale one
            scale = torch.exp2(torch.randint(-3, 1, (E, w.shape[1], 1), generator=g).float())
            small = (w.float() / 8).to(w.dtype)
            other[name], other[f"{name}_scale"] = small, scale
            same[name] = dequantize_blocks(small, scale, (1, w.shape[2]))
            same[f"{name}_scale"] = torch.ones(blocks)
    return other, same


@pytest.mark.parametrize("kind", ["tensor", "channel"])
@pytest.mark.parametrize("gated", [False, True])
def test_scales_per_tensor_and_per_channel(kind: str, gated: bool) -> None:
    act = Activation("relu2", gated=False) if not gated else Activation()
    a, same = scaled_otherwise(draw(gated=gated), kind)
    ours = call(a, act, quantise=False)
    wide = {**same, **{n: same[n].float() for n in ("w1", "w2")}}
    w1, w2 = (dequantize_blocks(wide[n], wide[f"{n}_scale"], dtype=torch.float64) for n in ("w1", "w2"))
    plain = torch.ops.moe_compile.experts(
        a["hidden_states"].double(), a["topk_weights"], a["topk_ids"], [w1], [], [w2], [], [], [], act.name, act.args(),
        gated,
    )  # fmt: skip
    assert error(ours, plain) < 1e-6


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("kind", ["block", "channel"])
def test_up_in_a_tensor_of_its_own(kind: str, quantise: bool) -> None:
    if quantise and kind == "channel":
        pytest.skip("scales per channel are for rows that stay as they are")
    a = draw()
    fused, _ = (a, a) if kind == "block" else scaled_otherwise(a, "channel")
    half = 256 if kind == "block" else I  # a half that starts on a block
    g = torch.Generator().manual_seed(1)
    if kind == "block":
        w1, s1 = quantize_blocks(torch.randn(E, 2 * half, H, generator=g) / H**0.5)
        w2, s2 = quantize_blocks(torch.randn(E, H, half, generator=g) / half**0.5)
        fused = {**a, "w1": w1, "w1_scale": s1, "w2": w2, "w2_scale": s2}
    apart = dict(fused)
    apart["w1"], w3 = fused["w1"].chunk(2, 1)
    apart["w1_scale"], w3_scale = fused["w1_scale"].chunk(2, 1)
    ours = call(apart, quantise=quantise, w3=w3, w3_scale=w3_scale)
    assert torch.equal(ours, call(fused, quantise=quantise)) or error(ours, call(fused, quantise=quantise)) < 1e-6


def test_bad_scales() -> None:
    a, channel = draw(), scaled_otherwise(draw(), "channel")[0]
    with pytest.raises(ValueError, match=r"w1_scale is \[5, 384, 1\], expected \[5, 3, 3\]: one scale per block"):
        call(channel)
    with pytest.raises(ValueError, match=r"expected \[5, 3, 3\].*or \[5, 384, 1\]: one per output channel"):
        call({**channel, "w1_scale": channel["w1_scale"][:, :5]}, quantise=False)
    w3, s3 = a["w1"][:, :I], torch.ones(E, 2, 3)
    for rest in ({"w3": w3}, {"w3_scale": s3}, {"w3": w3, "w3_scale": s3, "interleaved": True}):
        with pytest.raises(ValueError, match="w3 and w3_scale go together"):
            call(a, **rest)
    with pytest.raises(ValueError, match="w3 and w3_scale go together"):
        call(draw(gated=False), Activation(gated=False), w3=w3, w3_scale=s3)
    half = {**a, "w1": a["w1"][:, :I], "w1_scale": torch.ones(E, 2, 3)}
    with pytest.raises(ValueError, match=r"w3 is \[5, 100, 320\], expected \[5, 192, 320\], as w1"):
        call(half, w3=w3[:, :100], w3_scale=torch.ones(E, 1, 3))
    with pytest.raises(ValueError, match="both per block or channel"):
        call(half, w3=w3, w3_scale=torch.ones(E, I, 1), quantise=False)


def test_quantised_rows_differ_by_the_rounding_alone() -> None:
    a = draw(seed=3)
    plain, quantised = call(a, quantise=False), call(a)
    assert 5e-3 < error(quantised, plain.double()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    a = draw(dtype=dtype)
    out = call(a)
    assert out.dtype == dtype
    assert call(a, out_dtype=torch.float32).dtype == torch.float32
    assert error(out, truth(a, Activation(), False, False, True)) < 2e-2


def test_no_tokens() -> None:
    assert call(draw(0)).shape == (0, H)


def test_opcheck() -> None:
    a = draw(4)
    # not test_schema, which compares with torch.allclose, and that cannot compare fp8
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")
    args = (*a.values(), "silu", Activation().args(), True)
    torch.library.opcheck(torch.ops.moe_compile.experts_fp8, args, test_utils=tests)


def test_one_graph_across_the_border() -> None:
    """T = 2, 127, 128 and 129 in one graph with a dynamic T."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, backend=count, fullgraph=True)
    for tokens in (2, 127, 128, 129):
        a = draw(tokens)
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            torch._dynamo.mark_dynamic(a[name], 0)
        assert torch.equal(compiled(a), call(a))
    assert len(graphs) == 1


def deep(a: dict[str, Any], **options: Any) -> Tensor:
    names = ("hidden_states", "w1", "w2", "w1_scale", "w2_scale", "topk_weights", "topk_ids")
    return moe_compile.deep_gemm_moe_fp8(*(a[name] for name in names), **options)


def test_public_function() -> None:
    a = draw()
    assert torch.equal(deep(a), call(a))
    x = a["hidden_states"].clone()
    assert deep({**a, "hidden_states": x}, inplace=True) is x
    assert torch.equal(x, call(a))
    assert torch.equal(deep(a, apply_router_weight_on_input=True), call(a, weight_on_input=True))
    gelu = Activation("gelu")
    assert torch.equal(deep(a, activation="gelu"), call(a, gelu))


def test_expert_map() -> None:
    a = draw()
    expert_map = torch.tensor([3, -1, 0, 4, -1, 2, 1])
    mapped = torch.tensor([[3, 0]]).expand_as(a["topk_ids"])
    ours = deep({**a, "topk_ids": torch.tensor([[0, 2]]).expand_as(mapped)}, expert_map=expert_map)
    assert torch.equal(ours, call({**a, "topk_ids": mapped}))
    elsewhere = {**a, "topk_ids": torch.tensor([[1, 4]]).expand_as(mapped)}
    assert bool((deep(elsewhere, expert_map=expert_map, global_num_experts=7) == 0).all())
    with pytest.raises(ArgumentError, match="global_num_experts=9, but expert_map has 7"):
        deep(a, expert_map=expert_map, global_num_experts=9)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"w1": torch.zeros(E, 2 * I, H)}, TypeError, r"w1 is torch.float32.*quantize_blocks"),
        ({"w1_scale": torch.ones(E, 4, 3)}, ValueError, r"w1_scale is \[5, 4, 3\], expected \[5, 3, 3\]"),
        ({"w2_scale": torch.ones(E, 3, 2).half()}, TypeError, r"w2_scale is torch.float16"),
        ({"hidden_states": torch.zeros(9, 64)}, ValueError, r"do not fit hidden_states \[9, 64\]"),
        ({"hidden_states": torch.zeros(9, H).int()}, TypeError, "hidden_states is torch.int32"),
        ({"topk_ids": torch.zeros(9, 2)}, TypeError, "topk_ids is torch.float32"),
        ({"topk_weights": torch.zeros(9, 3)}, ValueError, "one weight for every chosen expert"),
        ({"w2": torch.zeros(H, I).to(torch.float8_e4m3fn)}, ValueError, r"w2 is \[320, 192\]"),
    ],
)
def test_bad_input(change: dict[str, Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call({**draw(), **change})


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="interleaved belongs to gated"):
        call(draw(gated=False), Activation(gated=False), interleaved=True)
    with pytest.raises(ValueError, match="kernels='cuda' is not one of 'auto', 'vllm', 'deepgemm', 'triton'"):
        call(draw(), kernels="cuda")
    with pytest.raises(KernelUnavailable, match="MC504: the tensors are on the CPU"):
        call(draw(), kernels="deepgemm")
    for name in ("a1_scale", "a2_scale"):
        with pytest.raises(ArgumentError, match=f"{name} must be None"):
            deep(draw(), **{name: torch.ones(1)})
    with pytest.raises(ArgumentError, match="did you mean 'silu'"):
        deep(draw(), activation="silo")


def test_gradients_are_refused() -> None:
    a = draw()
    a["hidden_states"].requires_grad_()
    with pytest.raises(RuntimeError, match="experts_fp8 has no backward"):
        call(a).sum().backward()
