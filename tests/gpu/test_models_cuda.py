"""The whole way on a GPU in bf16: naive forms and Hugging Face models under plain ``torch.compile``."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from moe_compile.patterns import FORMS, grouped_mm, index_add_loop, name_of
from support import FixedRouter, assert_accurate

import moe_compile
from moe_compile import report

pytestmark = pytest.mark.gpu
CASES = [pytest.param(form, e, id=f"{name_of(form)}-{e.__name__}") for form in FORMS for e in form.EXAMPLES]
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "minimax_m2", "glm4_moe",
    "nemotron_h", "olmoe", "flex_olmo", "dbrx", "llama4_text",
)  # fmt: skip


def reference(form, layer, x):
    """float64 on the CPU with the routing that the layer itself chose."""
    twin = copy.deepcopy(layer).cpu().double()
    if type(layer).__name__ == "Llama4":
        logits = layer.router.gate(x)
        top, ids = torch.topk(logits, layer.top_k, dim=1)
        scores = torch.sigmoid(top.double()).cpu()
        ids = ids.cpu()
        routed = x.cpu().double()[:, None] * scores[..., None]
        gate, up = torch.einsum("tkh,tkhi->tki", routed, twin.w13[ids]).chunk(2, -1)
        return torch.einsum("tki,tkih->th", up * torch.nn.functional.silu(gate), twin.w2[ids])
    router = FixedRouter(layer.router, x, torch.float64)
    w, ids = router.w.cpu(), router.ids.cpu()
    if form is not grouped_mm:
        router.w, router.ids = w, ids
        twin.router = router
        return twin(x.cpu().double())
    gate, up = torch.einsum("th,tkih->tki", x.cpu().double(), twin.w13[ids]).chunk(2, -1)
    y = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, twin.w2[ids])
    return torch.einsum("tkh,tk->th", y, w)


@pytest.mark.parametrize("form, example", CASES)
def test_form(form, example):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = example(hidden=64, inter=96, experts=8, top_k=2).cuda().bfloat16().eval()
    with torch.no_grad(), report.collect() as found:
        fast = torch.compile(layer, backend="moe_compile")
        for tokens in (33, 1, 200):
            x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
            assert_accurate(fast(x).cpu(), layer(x).cpu(), reference(form, layer, x))
    assert found.sites and {(s.status, s.form) for s in found.sites} == {("rewritten", name_of(form))}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    """One graph, every MoE layer one op, and ``check`` agrees."""
    transformers = pytest.importorskip("transformers")
    import hf_models

    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch._dynamo.reset()
    model = hf_models.build(family).cuda().bfloat16()
    ids = hf_models.tokens().cuda()
    result = moe_compile.check(model, ids)
    assert result.ok, str(result)
    assert result.rewritten >= 1 and not result.report.refused
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="moe_compile", fullgraph=True)(ids)


def test_cuda_graphs_follow_the_routing():
    """``mode="reduce-overhead"`` replays right for other inputs, and so for other experts."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = index_add_loop.WhereIndexAdd(hidden=64, inter=96, experts=8, top_k=2).cuda().bfloat16().eval()
    with torch.no_grad():
        fast = torch.compile(layer, backend="moe_compile", mode="reduce-overhead")
        for step in range(8):
            x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16) * (step + 1)
            assert_accurate(fast(x).clone().cpu(), layer(x).cpu(), reference(index_add_loop, layer, x))


def test_weights_are_not_copied():
    """A compiled ModuleList layer holds one copy of its weights, and sees them change in place."""
    torch._dynamo.reset()
    layer = index_add_loop.WhereIndexAdd(hidden=512, inter=1024, experts=16, top_k=2).cuda().bfloat16().eval()
    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    bytes_of_weights = sum(p.numel() * p.element_size() for p in layer.parameters())
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        fast = torch.compile(layer, backend="moe_compile")
        first = fast(x)
        assert torch.cuda.memory_allocated() - before < bytes_of_weights // 10
        for parameter in layer.mlps.parameters():
            parameter.mul_(0.5)
        second = fast(x)
        assert not torch.equal(first, second)
        assert_accurate(second.cpu(), layer(x).cpu(), reference(index_add_loop, layer, x))
