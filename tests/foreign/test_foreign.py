"""MoE layers in the style of well-known repositories: what becomes of each today, and why."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import deepseek, deepseek_remote, dense, gathering, makemoe, mistral, nanomoe, pipelines, top1
from foreign import transformers_loops as hf
from foreign.parts import H
from support import assert_accurate, relative, rewritten

from moe_compile import torch_compat

REWRITTEN = "rewritten"

# layer: (outcome, or the code of the refusal, "-" where the graph breaks and only `explain` sees why; tokens; why)
TABLE = {
    mistral.MistralMoE: (REWRITTEN, (7,), ""),
    makemoe.MakeMoE: (REWRITTEN, (2, 5), ""),
    nanomoe.NanoMoE: ("MC209", (7,), "tokens past the capacity are dropped"),
    nanomoe.NanoMoEUnlimited: ("MC209", (7,), "that nothing is dropped follows from values of a running count"),
    deepseek.DeepSeekMoE: (REWRITTEN, (2, 5), ""),
    deepseek.DeepSeekFloat: (REWRITTEN, (7,), ""),
    deepseek_remote.DeepSeekRemote: (REWRITTEN, (7,), ""),
    deepseek_remote.DeepSeekGrouped: (REWRITTEN, (7,), ""),
    gathering.GptFastMoE: (REWRITTEN, (2, 5), ""),
    gathering.GptOssMLPBlock: (REWRITTEN, (7,), ""),
    hf.Mixtral: (REWRITTEN, (2, 5), ""),
    hf.MixtralLists: (REWRITTEN, (2, 5), ""),
    hf.MixtralHit: (REWRITTEN, (2, 5), ""),
    hf.Olmoe: (REWRITTEN, (2, 5), ""),
    hf.Qwen2Moe: (REWRITTEN, (2, 5), ""),
    hf.PhiMoE: (REWRITTEN, (2, 5), ""),
    hf.JetMoe: ("-", (7,), "the counts are fetched in one method and used in another"),
    top1.Switch: (REWRITTEN, (7,), ""),
    top1.StMoE: ("MC209", (7,), "tokens past the capacity are dropped"),
    dense.SoftDense: (REWRITTEN, (7,), ""),
    dense.SoftDenseSum: (REWRITTEN, (7,), ""),
    dense.Grok: (REWRITTEN, (7,), ""),
    dense.ProbabilityColumn: (REWRITTEN, (7,), ""),
    dense.ThreeLayers: ("MC301", (7,), "the op has two linear maps"),
    pipelines.Titan: (REWRITTEN, (2, 5), ""),
    pipelines.MegaBlocks: (REWRITTEN, (7,), ""),
    pipelines.VllmReference: (REWRITTEN, (7,), ""),
}
BF16 = {deepseek_remote.DeepSeekGrouped, pipelines.Titan}  # torch._grouped_mm takes nothing else


@pytest.mark.parametrize("layer_class", TABLE, ids=lambda c: c.__name__)
def test_what_becomes_of_it(layer_class, monkeypatch):
    monkeypatch.setattr(torch_compat, "_without_capture", [])  # some classes of the table share a forward
    expected, tokens, why = TABLE[layer_class]
    torch.manual_seed(0)
    layer, x = layer_class().eval(), torch.randn(*tokens, H)
    if layer_class in BF16:
        layer, x = layer.bfloat16(), x.bfloat16()
    outcome = rewritten(layer, x)
    with torch.no_grad():
        original = layer(x)
        if layer_class in BF16:  # no float64 twin: rounding at other places of two bf16 sums
            assert relative(outcome.out, original) < 1e-2
        else:
            assert_accurate(outcome.out, original, copy.deepcopy(layer).double()(x.double()))
    if expected == REWRITTEN:
        assert outcome.ops == ["experts.default"], outcome.sites
        assert outcome.codes == [None] and len(outcome.graphs) == 1
        return
    assert outcome.ops == [] and why
    if expected == "-":
        assert len(outcome.graphs) > 1
    else:
        assert outcome.codes == [expected], outcome.sites
