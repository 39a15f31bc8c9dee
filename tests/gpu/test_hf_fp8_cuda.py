"""Hugging Face's fp8 experts on a real device: which kernels run them, by which way in, and what the report says.

The original needs a kernel from the hub, so the results are judged by ``fp8_cases.truth``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import transformers.integrations.finegrained_fp8 as fp8  # noqa: E402
from fp8_cases import Case, error, make, truth  # noqa: E402
from torch import nn  # noqa: E402
from transformers import MixtralConfig  # noqa: E402
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

import moe_compile  # noqa: E402
from moe_compile import report  # noqa: E402
from moe_compile.deepgemm.provider import Provider, find  # noqa: E402
from moe_compile.ops import calls  # noqa: E402

E, K, H, I = 8, 2, 512, 1024
LIMIT = 0.02  # one token has few values: see test_fp8_cuda


def module_of(case: Case) -> Any:
    config = MixtralConfig(
        hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    decorated = use_experts_implementation(
        experts_class=type("Experts", (fp8.FP8Experts,), {}), experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS,
        has_gate=True, has_bias=False,
    )  # fmt: skip
    experts = decorated(config, block_size=(128, 128))
    for name, tensor in (
        ("gate_up_proj", case.w1), ("gate_up_proj_scale_inv", case.w1_scale),
        ("down_proj", case.w2), ("down_proj_scale_inv", case.w2_scale),
    ):  # fmt: skip
        setattr(experts, name, nn.Parameter(tensor, requires_grad=False))
    return experts.eval()


def path(T: int, rule: str) -> str:
    least = {"auto": 768, "vllm": 128}[rule]  # 192 rows per expert; vLLM's border
    return "deepgemm" if least <= T and isinstance(find(0), Provider) else "decode" if T <= 32 else "sorted"


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    calls.kind_of.cache_clear()
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        yield


@pytest.mark.parametrize("T", [1, 16, 128, 1024])
@pytest.mark.parametrize("rule", ["auto", "vllm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_both_ways_in(T: int, rule: str, compiled: bool) -> None:
    case = make(T, E, K, H, I)
    module = module_of(case)
    with report.collect() as found:
        if compiled:
            options: dict[str, Any] = {"moe_compile.deepgemm_rule": rule}
            run = torch.compile(module, backend="moe_compile", fullgraph=True, options=options)
        else:
            run = moe_compile.optimize(module, strict=True, deepgemm_rule=rule)
        out = run(case.x, case.ids, case.weights)
    took = "gemv" if T <= 2 else path(T, rule)
    assert error(out, truth(case, took)) <= LIMIT
    wanted = torch.ops.moe_compile.experts_fp8(
        *case.tensors(), "silu", case.act.args(), True, kernels="deepgemm" if took == "deepgemm" else "triton"
    )
    assert torch.equal(out, wanted), "the other kernels ran"
    words = {"auto": "DeepGEMM for T >= 768, else Triton", "vllm": "DeepGEMM for T >= 128, else Triton"}[rule]
    words = words if isinstance(find(0), Provider) else "Triton: MC50"
    assert found.sites and all(words in site.kernel for site in found.sites)
