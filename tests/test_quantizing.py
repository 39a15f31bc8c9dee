"""``optimize(model, quantize="fp8")``: what changes, what it costs, what undoes it, and what is left alone."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralForCausalLM

import moe_compile
from moe_compile import huggingface, quantizing, report
from moe_compile.config import OptionError
from moe_compile.hf_family import Stacked
from moe_compile.quantize import dequantize_blocks, quantize_blocks
from moe_compile.quantizing import QuantizedError
from moe_compile.report import REFUSED, REWRITTEN
from moe_compile.rewriting import analyse_graph
from moe_compile.spec import NoMatch

E, K, H, I, T = 4, 2, 160, 192, 9
SIZES = {"hidden_size": H, "intermediate_size": I, "num_local_experts": E, "num_experts_per_tok": K}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def filled(cls: Any, config: Any) -> Any:
    config._experts_implementation = "eager"
    experts = cls(config).eval()
    for parameter in experts.parameters():
        parameter.normal_(0, 0.08)
    return experts


def mixtral() -> Any:
    return filled(MixtralExperts, MixtralConfig(**SIZES, hidden_act="silu"))


def gpt_oss() -> Any:
    return filled(GptOssExperts, GptOssConfig(**SIZES))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    weights, ids = torch.randn(T, E, generator=g).softmax(-1).topk(K)
    return torch.randn(T, H, generator=g), ids, weights


def widened(experts: Any) -> Any:
    """The same layer with the numbers that the fp8 weights stand for, in float64."""
    twin = mixtral().double()
    for name in ("gate_up_proj", "down_proj"):
        wide = dequantize_blocks(*quantize_blocks(getattr(experts, name)), dtype=torch.float64)
        getattr(twin, name).copy_(wide)
    return twin


def test_the_layer_runs_in_fp8_and_its_memory_and_error_are_told(caplog: pytest.LogCaptureFixture) -> None:
    experts = mixtral()
    x, ids, weights = inputs()
    before, fp8 = experts(x, ids, weights), widened(experts)(x.double(), ids, weights.double())
    with report.collect() as found, caplog.at_level(logging.INFO, logger="moe_compile.quantizing"):
        assert moe_compile.optimize(experts, quantize="fp8") is experts
        out = experts(x, ids, weights)
    assert relative(out, fp8) < 0.05 < 2 * relative(fp8, before) < 0.2  # rows are rounded too
    assert {name: p.dtype for name, p in experts.named_parameters()} == {
        "gate_up_proj": torch.float8_e4m3fn, "gate_up_proj_scale_inv": torch.float32,
        "down_proj": torch.float8_e4m3fn, "down_proj_scale_inv": torch.float32,
    }  # fmt: skip
    (site,) = found.sites
    assert site.status == REWRITTEN and site.kernel.startswith("moe_compile::experts_fp8 by PyTorch; weights rounded")
    words = r"weights rounded to fp8 \(0.4 MiB instead of 1.4\), which changes the output by [4-9]\.\d%"
    assert re.search(words, site.kernel) and re.search(words, caplog.text)


def test_what_is_told_is_what_happens() -> None:
    experts = mixtral()
    old = copy.deepcopy(experts)
    found = quantizing.check_quantizable(huggingface.FAMILIES[huggingface.STACKED], experts)
    result = quantizing.quantize_module(experts, found, keep_originals=False)
    moe_compile.optimize(experts)
    assert result.before == sum(p.numel() * 4 for p in old.parameters())
    assert result.after == sum(p.numel() * p.element_size() for p in experts.parameters())
    assert 0.5 < relative(experts(*inputs()), old(*inputs())) / result.error < 2  # other rows, the same size of error


def test_one_op_under_the_backend() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def ours(gm: torch.fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        analyse_graph(gm)
        graphs.append(gm)
        return gm

    huggingface.install_hook(ours)
    experts = moe_compile.optimize(mixtral(), quantize="fp8")
    eager = experts(*inputs())
    compiled = torch.compile(experts, backend=ours, fullgraph=True)(*inputs())
    assert torch.equal(compiled, eager)
    targets = [str(n.target) for gm in graphs for n in gm.graph.nodes if "moe_compile" in str(n.target)]
    assert targets == ["moe_compile.experts_fp8.default"]


def test_an_optimised_layer_can_be_quantised_and_a_quantised_one_stays() -> None:
    experts = moe_compile.optimize(mixtral())
    moe_compile.optimize(experts, quantize="fp8")
    state = {name: t.clone() for name, t in experts.state_dict().items()}
    assert experts.down_proj.dtype == torch.float8_e4m3fn
    moe_compile.optimize(experts, quantize="fp8")
    same = (torch.equal(t.view(torch.uint8), state[name].view(torch.uint8)) for name, t in experts.state_dict().items())
    assert all(same)


def test_restore_brings_back_what_was_kept() -> None:
    experts = mixtral()
    experts.down_proj.requires_grad_(False)
    state = {name: t.clone() for name, t in experts.state_dict().items()}
    names, expected = set(experts.__dict__), experts(*inputs())
    twin = copy.deepcopy(moe_compile.optimize(experts, quantize="fp8", keep_originals=True))
    for restored in (moe_compile.restore(experts), moe_compile.restore(twin)):
        assert set(restored.state_dict()) == set(state)
        assert all(torch.equal(t, state[name]) for name, t in restored.state_dict().items())
        assert restored.gate_up_proj.requires_grad and not restored.down_proj.requires_grad
        assert torch.equal(restored(*inputs()), expected)
        assert set(restored.__dict__) == names


def test_a_quantised_model_is_not_saved_as_a_float_one(tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 128, "vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1)).eval()
    tokens, names = torch.arange(6)[None], set(model.__dict__)
    before = model(tokens).logits
    moe_compile.optimize(model).save_pretrained(tmp_path / "float")
    moe_compile.optimize(model, quantize="fp8", keep_originals=True)
    expected = model(tokens).logits
    torch.save(model, tmp_path / "whole")
    whole = torch.load(tmp_path / "whole", weights_only=False)
    for guarded in (model, model.model, copy.deepcopy(model), whole):
        with pytest.raises(QuantizedError, match=r"read what save_pretrained writes as float weights"):
            guarded.save_pretrained(tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()
    # what the error advises: quantise after loading, then weights go from one to the other
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "float").eval()
    moe_compile.optimize(loaded, quantize="fp8")
    assert torch.equal(loaded(tokens).logits, expected)
    for weight in loaded.parameters():
        weight.zero_()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(tokens).logits, expected)
    moe_compile.restore(model).save_pretrained(tmp_path / "restored")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "restored").eval()
    assert torch.equal(again(tokens).logits, before) and set(model.__dict__) == names


def test_a_save_of_ones_own_is_left_alone() -> None:
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    model.save_pretrained = print
    moe_compile.optimize(model, quantize="fp8", keep_originals=True)
    assert model.save_pretrained is print
    assert moe_compile.restore(model).save_pretrained is print


def test_restore_says_that_nothing_was_kept() -> None:
    model = nn.ModuleList([mixtral(), mixtral()])
    moe_compile.optimize(model[0])
    moe_compile.optimize(model[1], quantize="fp8")
    expected = model[1](*inputs())
    with pytest.raises(QuantizedError, match=r"1 modules .MixtralExperts. were rounded to fp8 and not kept"):
        moe_compile.restore(model)
    assert huggingface.is_optimized(model[0]) and torch.equal(model[1](*inputs()), expected)


def test_what_cannot_be_quantised_is_left_alone_and_told() -> None:
    model = nn.ModuleList([gpt_oss(), mixtral()])
    expected = model[0](*inputs())
    with report.collect() as found:
        moe_compile.optimize(model, quantize="fp8")
    assert [(s.status, s.code) for s in found.sites] == [(REFUSED, "MC403"), (REWRITTEN, None)]
    assert not huggingface.is_optimized(model[0]) and torch.equal(model[0](*inputs()), expected)
    fresh = nn.ModuleList([mixtral(), gpt_oss()])
    with pytest.raises(NoMatch, match="stored as"):
        moe_compile.optimize(fresh, quantize="fp8", strict=True)
    assert fresh[0].down_proj.dtype == torch.float32 and "forward" not in fresh[0].__dict__


def changed(**flags: Any) -> Any:
    experts = mixtral()
    for name, value in flags.items():
        setattr(experts, name, value)
    return experts


def on_meta() -> Any:
    return mixtral().to("meta")


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: changed(has_bias=True), "MC506"),
        (lambda: changed(has_post_expert_norm=True), "MC303"),
        (lambda: changed(act_fn=Odd()), "MC301"),
        (lambda: mixtral().double(), "MC402"),
        (on_meta, "MC402"),
    ],
)
def test_every_condition_has_its_code(make: Any, code: str) -> None:
    with pytest.raises(NoMatch) as refused:
        quantizing.check_quantizable(huggingface.FAMILIES[huggingface.STACKED], make())
    assert refused.value.code == code


def test_other_classes_are_not_quantised() -> None:
    family = next(f for f in huggingface.FAMILIES.values() if type(f) is not Stacked)
    with pytest.raises(NoMatch, match="two weights"):
        quantizing.check_quantizable(family, mixtral())


def test_a_failure_leaves_whole_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([mixtral(), mixtral(), mixtral()])
    real, calls = quantizing.quantize_blocks, []

    def failing(w: Tensor) -> Any:
        calls.append(w)
        if len(calls) == 4:  # the second weight of the second layer
            raise torch.OutOfMemoryError("no memory left")
        return real(w)

    monkeypatch.setattr(quantizing, "quantize_blocks", failing)
    state = {name: t.clone() for name, t in model[1].state_dict().items()}
    with pytest.raises(QuantizedError, match=r"layer 2 of 3 was not quantised .OutOfMemoryError: no memory left"):
        moe_compile.optimize(model, quantize="fp8")
    assert [m.down_proj.dtype for m in model] == [torch.float8_e4m3fn, torch.float32, torch.float32]
    assert [huggingface.is_optimized(m) for m in model] == [True, False, False]
    assert all(torch.equal(t, state[name]) for name, t in model[1].state_dict().items())
    assert all(m(*inputs()).isfinite().all() for m in model)


def test_weights_that_are_no_numbers_are_not_quantised() -> None:
    experts = mixtral()
    experts.down_proj[1, 3, 5] = float("nan")
    with pytest.raises(QuantizedError, match="off by nan"):
        moe_compile.optimize(experts, quantize="fp8")
    assert experts.down_proj.dtype == torch.float32


def test_gradients_and_other_calls_are_errors_and_not_wrong_numbers() -> None:
    experts = moe_compile.optimize(mixtral(), quantize="fp8")
    x, ids, weights = inputs()
    with torch.enable_grad(), pytest.raises(QuantizedError, match="without gradients"):
        experts(x.requires_grad_(), ids, weights)
    with pytest.raises(QuantizedError, match="runs only as"):
        experts(x[None], ids, weights)


def test_nothing_happens_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = mixtral()
    with report.collect() as found:
        moe_compile.optimize(experts, quantize="fp8", dryrun=True)
    assert [s.status for s in found.sites] == [REWRITTEN] and experts.down_proj.dtype == torch.float32
    monkeypatch.setenv("MOE_COMPILE", "0")
    moe_compile.optimize(experts, quantize="fp8")
    assert experts.down_proj.dtype == torch.float32
    with pytest.raises(OptionError, match="quantize takes None or 'fp8', got 'int8'"):
        moe_compile.optimize(experts, quantize="int8")
