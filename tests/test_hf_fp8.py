"""Hugging Face's fp8 experts: one op where the format is known, else the original with a reason.

The kernels of the original come from the hub, so its linear layer is replaced by one in plain PyTorch that rounds rows
and widens weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.integrations.finegrained_fp8 as fp8
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.integrations.moe import use_experts_implementation

import moe_compile
from moe_compile import hf_fp8, huggingface, report
from moe_compile.deepgemm import provider
from moe_compile.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from moe_compile.report import REFUSED, REWRITTEN
from moe_compile.rewriting import analyse_graph
from moe_compile.spec import NoMatch

E, K, H, I, T = 4, 2, 256, 192, 11
GRAPHS: list[torch.fx.GraphModule] = []
OP = "moe_compile.experts_fp8.default"


def ours(gm: torch.fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
    analyse_graph(gm)
    GRAPHS.append(gm)
    return gm


def linear(x: Tensor, weight: Tensor, scale: Tensor, *rest: Any, **more: Any) -> Tensor:
    wide = dequantize_blocks(weight, scale)
    return (dequantize_rows(*quantize_rows(x)) @ wide.t()).to(x.dtype)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fp8, "fp8_linear", linear)
    huggingface.install_hook(ours)
    torch._dynamo.reset()
    GRAPHS.clear()
    with torch.no_grad():
        yield


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    flags = {"has_gate": changes.get("has_gate", True), "has_bias": False}
    cls = type("Experts", (fp8.FP8Experts,), {})  # the decorator changes the class that it is given
    decorated = use_experts_implementation(
        experts_class=cls, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS, **flags
    )
    experts = decorated(config, **{"block_size": (128, 128), **changes})
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        weight = getattr(experts, name)
        if weight.dtype == torch.float8_e4m3fn and changes.get("block_size", 1) == 1:
            q, scale = quantize_blocks(torch.randn(weight.shape) / weight.shape[2] ** 0.5)
            setattr(experts, name, nn.Parameter(q, requires_grad=False))
            setattr(experts, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
    return experts


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    weights, ids = torch.randn(T, E, generator=g).softmax(-1).topk(K)
    return torch.randn(T, H, generator=g).to(dtype), ids, weights


def ops() -> list[str]:
    return [str(n.target) for gm in GRAPHS for n in gm.graph.nodes if "moe_compile" in str(n.target)]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """But for a few values that round to another fp8 neighbour; in bfloat16 the original rounds before fp8, too."""
    limit = 1e-2 if theirs.dtype == torch.float32 else 3e-2
    return bool(ours.isfinite().all()) and float((ours - theirs).float().norm() / theirs.float().norm()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_gate", [True, False])
def test_optimize_and_restore(has_gate: bool, dtype: torch.dtype) -> None:
    experts = make(has_gate=has_gate)
    args = inputs(dtype)
    expected = experts(*args)
    with report.collect() as found:
        moe_compile.optimize(experts)
        actual = experts(*args)
    assert close(actual, expected) and actual.dtype == dtype
    assert torch.equal(actual, op(experts, *args))
    assert {(s.status, s.kernel) for s in found.sites} == {(REWRITTEN, "moe_compile::experts_fp8 by PyTorch")}
    assert torch.equal(moe_compile.restore(experts)(*args), expected)


def op(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    down, down_scale, inf = experts.down_proj, experts.down_proj_scale_inv, float("inf")
    tensors = (getattr(experts, up), getattr(experts, f"{up}_scale_inv"), down, down_scale)
    out: Tensor = torch.ops.moe_compile.experts_fp8(
        x, weights, ids, *tensors, "silu", [1.0, inf, inf, inf, 0.0], experts.has_gate
    )
    return out


def test_one_graph_under_the_backend() -> None:
    experts = make()
    expected = experts(*inputs())
    with report.collect() as found:
        actual = torch.compile(experts, backend=ours, fullgraph=True)(*inputs())
    assert close(actual, expected)
    assert ops() == [OP]
    assert [s.status for s in found.sites] == [REWRITTEN]


def kernels() -> list[str]:
    return [n.kwargs.get("kernels", "auto") for gm in GRAPHS for n in gm.graph.nodes if str(n.target) == OP]


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, None, "auto"),
        ({}, "vllm", "vllm"),
        ({"moe_compile.deepgemm_rule": "vllm"}, None, "vllm"),
        ({"moe_compile.deepgemm_rule": "auto"}, "vllm", "auto"),
        ({"moe_compile.experts": "triton"}, "vllm", "triton"),
    ],
)
def test_the_options_reach_the_op(
    options: dict[str, Any], environment: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment:
        monkeypatch.setenv("MOE_COMPILE_DEEPGEMM_RULE", environment)
    torch.compile(make(), backend=ours, fullgraph=True, options=options)(*inputs())
    assert kernels() == [expected]


def test_optimize_takes_a_rule_and_hands_it_to_the_op_in_eager_and_compiled_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(hf_fp8.torch.ops.moe_compile, "experts_fp8", Spy(seen), raising=False)
    experts = moe_compile.optimize(make(), deepgemm_rule="vllm")
    experts(*inputs())
    assert seen == ["vllm"]
    monkeypatch.undo()
    torch.compile(experts, backend=ours, options={"moe_compile.deepgemm_rule": "auto"})(*inputs())
    assert kernels() == ["vllm"]


class Spy:
    """In place of the op."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def default(self, x: Tensor, *args: Any, kernels: str) -> Tensor:
        self.seen.append(kernels)
        return x


class OnCuda:
    """An experts module's weight as a report sees it on a GPU."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda", 0)

    def is_contiguous(self) -> bool:
        return True

    def get_device(self) -> int:
        return 0


def on_cuda(inter: int = 1024) -> Any:
    scale = OnCuda(8, 4, 4, dtype=torch.float32)
    return SimpleNamespace(
        gate_up_proj=OnCuda(8, 2 * inter, 512), gate_up_proj_scale_inv=scale,
        down_proj=OnCuda(8, 512, inter), down_proj_scale_inv=scale,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "inter", "top_k", "found", "words"),
    [
        ("vllm", 1024, 2, "provider", "DeepGEMM for T >= 128, else Triton (rows that are not bfloat16: Triton)"),
        ("auto", 1024, 2, "provider", "DeepGEMM for T >= 768, else Triton (rows that are not bfloat16: Triton)"),
        ("vllm", 512, 2, "provider", "Triton: MC510 I=512 is not > 512"),
        ("vllm", 1024, 2, NoMatch("MC502", "no nvcc"), "Triton: MC502 no nvcc"),
        ("triton", 1024, 2, None, "Triton"),
        ("deepgemm", 1024, 2, None, "DeepGEMM"),
        ("auto", 1024, None, None, "DeepGEMM or Triton"),
    ],
)
def test_a_report_says_which_kernels_run_for_which_tokens(
    rule: str, inter: int, top_k: int | None, found: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(provider, "find", lambda device: asked.append(device) or found)
    text = hf_fp8.describe_fp8(on_cuda(inter), "gate_up_proj", top_k, rule)
    assert text == f"moe_compile::experts_fp8 by {words}"
    assert bool(asked) == (found is not None and inter > 512)  # a package is tried where it can be of use


def test_the_registered_implementation() -> None:
    experts = make()
    expected = experts(*inputs())
    experts.config._experts_implementation = "moe_compile"
    huggingface.register()
    assert close(experts(*inputs()), expected)


def test_expert_parallel_sentinels_count_zero() -> None:
    experts = moe_compile.optimize(make())
    x, ids, weights = inputs()
    ids[3] = E
    out = experts(x, ids, weights)
    assert bool((out[3] == 0).all()) and bool((out[2] != 0).any())


def clamped(experts: Any) -> None:
    experts.limit = 0.5


def test_the_activation_is_read_from_the_module() -> None:
    experts = make()
    plain = experts(*inputs())
    clamped(experts)
    expected = experts(*inputs())
    assert not close(expected, plain)
    assert close(moe_compile.optimize(experts)(*inputs()), expected)
    GRAPHS.clear()
    assert close(torch.compile(moe_compile.restore(experts), backend=ours, fullgraph=True)(*inputs()), expected)
    assert ops() == [OP]


def static(experts: Any) -> None:
    experts.activation_scheme = "static"


def blocks(experts: Any) -> None:
    experts.block_size = (64, 128)


def per_tensor(experts: Any) -> None:
    experts.block_size = None


def e8m0(experts: Any) -> None:
    experts.down_proj_scale_inv = nn.Parameter(experts.down_proj_scale_inv.double(), requires_grad=False)


def packed(experts: Any) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.view(torch.int8), requires_grad=False)


def missing_blocks(experts: Any) -> None:
    experts.down_proj_scale_inv = nn.Parameter(experts.down_proj_scale_inv[:, :1], requires_grad=False)


def bias(experts: Any) -> None:
    experts.down_proj_bias = nn.Parameter(torch.zeros(E, H), requires_grad=False)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def activation(experts: Any) -> None:
    experts.act_fn = Odd()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (static, "MC402", "activation_scheme is 'static'"),
        (blocks, "MC402", r"block_size is (64, 128), not (128, 128)"),
        (per_tensor, "MC402", "block_size is None"),
        (e8m0, "MC402", "down_proj_scale_inv is torch.float64, not torch.float32"),
        (packed, "MC402", "down_proj is torch.int8, not torch.float8_e4m3fn"),
        (missing_blocks, "MC201", "down_proj_scale_inv is [4, 1, 2], the blocks of down_proj are [4, 2, 2]"),
        (bias, "MC506", "biases"),
        (activation, "MC301", "no known activation"),
    ],
)
def test_another_format_keeps_the_original(change: Callable[[Any], None], code: str, words: str) -> None:
    experts = make()
    change(experts)
    with report.collect() as found:
        moe_compile.optimize(experts)
    (site,) = found.sites
    assert (site.status, site.code) == (REFUSED, code) and words in site.reason
    assert "forward" not in experts.__dict__


def test_an_unknown_activation_keeps_the_original_under_the_backend() -> None:
    experts = make()
    activation(experts)
    expected = experts(*inputs())
    with report.collect() as found:
        actual = torch.compile(experts, backend=ours)(*inputs())
    torch.testing.assert_close(actual, expected)
    assert ops() == [] and {s.code for s in found.sites} == {"MC301"}
