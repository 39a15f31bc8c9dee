"""The declared way in for Hugging Face models, on tiny random modules and models."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hf_models
import hf_table as table
import pytest
import torch
from support import relative
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

import moe_compile
from moe_compile import huggingface, report
from moe_compile.comparing import Widened
from moe_compile.config import OptionError
from moe_compile.ops import cpu as cpu  # the kernels that the comparisons run
from moe_compile.report import REFUSED, REWRITTEN, Report
from moe_compile.rewriting import analyse_graph
from moe_compile.spec import Activation, NoMatch

GRAPHS: list[torch.fx.GraphModule] = []
FUSED = ["moe_compile.experts.default"]
GENERIC = [
    "moe_compile.sort_pairs.default",
    "moe_compile.grouped_linear.default",
    "moe_compile.grouped_linear.default",
    "moe_compile.combine.default",
]


def ours(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """A backend of this package as far as the hook can tell; like ``dryrun`` it rewrites nothing itself."""
    analyse_graph(gm)
    GRAPHS.append(gm)
    return gm


def others(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """A backend that has nothing to do with this package."""
    GRAPHS.append(gm)
    return gm


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    huggingface.install_hook(ours)
    torch._dynamo.reset()
    GRAPHS.clear()
    with torch.no_grad():
        yield


def ops() -> list[str]:
    """Our ops in every graph since the test began, in order."""
    nodes = [node for graph in GRAPHS for node in graph.graph.nodes]
    return [str(node.target) for node in nodes if str(node.target).startswith("moe_compile.")]


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def assert_as_good(module: nn.Module, args: tuple[Tensor, ...], actual: Any, expected: Any) -> None:
    """Our relative L2 error against float64 is at most twice that of the original, whatever the precision."""
    wide = [a.double() if a.is_floating_point() else a for a in args]
    with Widened():
        exact = first(copy.deepcopy(module).double()(*wide))
    assert first(actual).dtype == first(expected).dtype and first(actual).shape == first(expected).shape
    theirs, mine = relative(first(expected), exact), relative(first(actual), exact)
    assert exact.abs().max() > 0.1  # a comparison of zeros would say nothing
    assert mine <= 2 * theirs + 1e-7, f"error {mine:.2e}, the original has {theirs:.2e}"


def compile_and_compare(module: nn.Module, args: tuple[Tensor, ...]) -> Report:
    expected = module(*args)
    with report.collect() as found:
        actual = torch.compile(module, backend=ours, fullgraph=True)(*args)
    assert len(GRAPHS) == 1
    assert_as_good(module, args, actual, expected)
    return found


def optimize_and_compare(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    actual = huggingface.optimize(copy.deepcopy(module), strict=True)(*args)
    assert_as_good(module, args, actual, module(*args))


def shown(activation: Activation, interleaved: bool) -> str:
    """The way the table writes it."""
    plain = Activation(activation.name, activation.gated)
    changed = [
        f"{field}={getattr(activation, field):g}"
        for field in ("alpha", "gate_limit", "up_limit", "act_limit", "up_offset")
        if getattr(activation, field) != getattr(plain, field)
    ]
    return " ".join([activation.name, *changed, *["interleaved"] * interleaved])


def mixtral(**changes: Any) -> nn.Module:
    return table.build("mixtral.modeling_mixtral", "MixtralExperts", table.config(**changes))


# --- every class ----------------------------------------------------------------------------------


def test_the_walk_finds_every_decorated_class() -> None:
    names = [name for _, name in table.decorated()]
    assert len(names) >= 55 and {"MixtralExperts", "GptOssExperts", "NemotronHExperts"} <= set(names)


@pytest.mark.parametrize(("module", "name"), table.decorated())
def test_decorated_class(module: str, name: str) -> None:
    experts = table.build(module, name)
    found = compile_and_compare(experts, table.routing())
    optimize_and_compare(experts, table.routing(tokens=64))
    (site,) = found.sites
    expected = table.SPECIAL.get(name, table.SILU)
    assert site.status == REWRITTEN and site.form == f"hf:{name}"
    assert f"{module.replace('.', '/')}.py:" in site.location
    assert site.spec.top_k == table.TOP_K
    if expected is None:
        assert ops() == GENERIC and site.spec.experts.activation is None
    else:
        assert ops() == FUSED
        assert shown(site.spec.experts.activation, site.spec.experts.interleaved) == expected


def _undecorated(tokens: int = table.TOKENS) -> dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]]:
    hidden, ids, weights = table.routing(tokens=tokens)
    block = torch.randn(1, tokens, table.HIDDEN, generator=torch.Generator().manual_seed(0))
    with_identity = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(0)).topk(2).indices
    one_hot = nn.functional.one_hot(ids[:, :1], table.EXPERTS)  # [T, 1, E]
    one_hot[::5] = 0  # tokens dropped by the capacity
    build, config = table.build, table.config()
    return {
        "Llama4TextMoe": lambda: (build("llama4.modeling_llama4", "Llama4TextMoe", config), (block,)),
        "DbrxExperts": lambda: (build("dbrx.modeling_dbrx", "DbrxExperts"), (hidden, ids, weights)),
        "JetMoeMoE": lambda: (build("jetmoe.modeling_jetmoe", "JetMoeMoE"), (block,)),
        "LongcatFlashExperts": lambda: (
            build("longcat_flash.modeling_longcat_flash", "LongcatFlashExperts"),
            (hidden, with_identity, weights),
        ),
        "Step3p7Experts": lambda: (
            build("step3p7.modeling_step3p7", "Step3p7Experts", config, 3.0),
            (hidden, ids, weights),
        ),
        "SwitchTransformersExperts": lambda: (
            build("switch_transformers.modeling_switch_transformers", "SwitchTransformersExperts"),
            (hidden, one_hot, weights[:, :1]),
        ),
    }


ACTIVATIONS = {
    "Step3p7Experts": Activation(up_limit=3.0, act_limit=3.0),
    "SwitchTransformersExperts": Activation("relu", gated=False),
}


@pytest.mark.parametrize("name", _undecorated())
def test_undecorated_class(name: str) -> None:
    module, args = _undecorated()[name]()
    found = compile_and_compare(module, args)
    (site,) = found.sites
    assert ops() == FUSED and site.status == REWRITTEN and site.form == f"hf:{name}"
    assert site.spec.experts.activation == ACTIVATIONS.get(name, Activation())
    assert site.spec.weight_on_input == (name == "Llama4TextMoe")


@pytest.mark.parametrize("name", _undecorated())
def test_undecorated_class_with_an_unknown_activation(name: str) -> None:
    module, args = _undecorated()[name]()
    for part in module.modules():
        for attribute in ("act_fn", "activation", "activation_fn", "act"):
            if isinstance(getattr(part, attribute, None), nn.Module):
                setattr(part, attribute, nn.Mish())
    found = compile_and_compare(module, args)
    assert found.sites[0].spec.experts.activation is None
    assert sorted(set(ops())) == sorted(set(GENERIC))


@pytest.mark.parametrize("name", _undecorated())
def test_undecorated_class_optimized(name: str) -> None:
    for tokens in (table.TOKENS, 64):
        optimize_and_compare(*_undecorated(tokens)[name]())


def test_switch_transformers_drops_what_its_router_drops() -> None:
    """The router of torch 2.11 cannot be traced, so the block runs eagerly; its mask is what counts."""
    block = table.build("switch_transformers.modeling_switch_transformers", "SwitchTransformersSparseMLP")
    args = (torch.randn(2, 32, table.HIDDEN, generator=torch.Generator().manual_seed(0)),)
    optimized = huggingface.optimize(copy.deepcopy(block), strict=True)
    assert_as_good(block, args, optimized(*args), block(*args))


@pytest.mark.parametrize(
    ("name", "break_it", "code"),
    [
        ("Llama4TextMoe", lambda m: setattr(m, "router", nn.Linear(16, 4)), "MC206"),
        ("DbrxExperts", lambda m: m.mlp.register_forward_hook(lambda *_: None), "MC104"),
        ("SwitchTransformersExperts", lambda m: setattr(m["expert_1"], "act", nn.GELU()), "MC206"),
        ("SwitchTransformersExperts", lambda m: m["expert_1"].half(), "MC401"),
        ("LongcatFlashExperts", lambda m: setattr(m, "identity_expert", nn.ReLU()), "MC206"),
        ("JetMoeMoE", lambda m: m.router.register_forward_hook(lambda *_: None), "MC104"),
    ],
)
def test_changed_modules_are_refused(name: str, break_it: Callable[[Any], Any], code: str) -> None:
    module, _ = _undecorated()[name]()
    break_it(module)
    with report.collect() as found:
        huggingface.optimize(module)
    (site,) = found.sites
    assert (site.status, site.code) == (REFUSED, code) and site.reason and site.spec is None


# --- the hook -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moe_compile"])
def test_any_configured_implementation(implementation: str) -> None:
    experts = mixtral(_experts_implementation=implementation)
    args = table.routing()
    expected = mixtral()(*args)
    actual = torch.compile(experts, backend=ours, fullgraph=True)(*args)
    assert ops() == FUSED
    assert_as_good(mixtral(), args, actual, expected)


def test_the_graph_holds_the_op_and_nothing_of_the_probe() -> None:
    torch.compile(mixtral(), backend=ours, fullgraph=True)(*table.routing())
    (graph,) = GRAPHS
    called = [n.target for n in graph.graph.nodes if n.op.startswith("call")]
    assert called == [torch.ops.moe_compile.experts.default]
    assert len([n for n in graph.graph.nodes if n.op == "placeholder"]) == 5


def test_other_backends_see_nothing() -> None:
    experts = mixtral(_experts_implementation="grouped_mm")
    torch.compile(experts, backend=others, fullgraph=True)(*table.routing())
    assert ops() == [] and any("grouped_mm" in str(n.target) for n in GRAPHS[0].graph.nodes)
    GRAPHS.clear()
    torch.compile(experts, backend=ours, fullgraph=True)(*table.routing())
    assert ops() == FUSED


def test_undecorated_classes_are_untouched_for_other_backends() -> None:
    module, args = _undecorated()["Llama4TextMoe"]()
    torch.compile(module, backend=others, fullgraph=True)(*args)
    assert ops() == [] and any("bmm" in str(n.target) for n in GRAPHS[0].graph.nodes)


def test_a_setting_that_changes_is_seen() -> None:
    """The probe leaves guards: a new limit, a new activation or other flags compile again."""
    experts: Any = table.build("deepseek_v4.modeling_deepseek_v4", "DeepseekV4Experts")
    args = table.routing()
    compiled = torch.compile(experts, backend=ours, fullgraph=True)
    compiled(*args)
    for change in ({"limit": 0.5}, {"limit": 0.25}, {"act_fn": nn.Tanh()}):
        for name, value in change.items():
            setattr(experts, name, value)
        assert_as_good(experts, args, compiled(*args), experts(*args))


def test_layers_share_one_compilation() -> None:
    """No guard on a module's identity: compiling layer by layer must not hit the recompile limit."""
    layers = [mixtral() for _ in range(4)]
    run = torch.compile(lambda layer, *args: layer(*args), backend=ours, fullgraph=True)
    for seed, layer in enumerate(layers):
        table.fill(layer, seed)
        args = table.routing(seed=seed)
        assert_as_good(layer, args, run(layer, *args), layer(*args))
    assert len(GRAPHS) == 1


def test_layers_with_different_limits_do_not() -> None:
    args = table.routing()
    run = torch.compile(lambda layer, *args: layer(*args), backend=ours, fullgraph=True)
    for limit in (0.25, 5.0, None):
        layer = table.build("step3p7.modeling_step3p7", "Step3p7Experts", table.config(), limit)
        assert_as_good(layer, args, run(layer, *args), layer(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    experts = mixtral().to(dtype)
    hidden, ids, weights = table.routing()
    args = (hidden.to(dtype), ids, weights)  # fp32 router weights, as mixtral has
    compile_and_compare(experts, args)


def test_expert_parallel_sentinels_count_zero() -> None:
    """Whatever their weight; the original may rely on a weight of zero, or not take the id at all."""
    experts: Any = mixtral()
    experts._is_expert_parallel = True
    hidden, ids, weights = table.routing()
    sentinel = torch.zeros_like(ids, dtype=torch.bool)
    sentinel[::3, 0] = True
    plain = (hidden, ids, weights.masked_fill(sentinel, 0.0))
    actual = torch.compile(experts, backend=ours, fullgraph=True)(
        hidden, ids.masked_fill(sentinel, table.EXPERTS), weights
    )
    assert ops() == FUSED
    assert_as_good(experts, plain, actual, experts(*plain))


def test_gradients_keep_the_original() -> None:
    experts = mixtral(_experts_implementation="grouped_mm")
    with torch.enable_grad(), report.collect() as found:
        out = torch.compile(experts, backend=ours, fullgraph=True)(*table.routing())
        out.sum().backward()
    (site,) = found.sites
    assert ops() == [] and (site.status, site.code) == (REFUSED, "MC507") and "no_grad" in site.fix
    assert experts.gate_up_proj.grad is not None  # type: ignore[union-attr]


def test_frozen_weights_need_no_gradient() -> None:
    experts = mixtral().requires_grad_(False)
    with torch.enable_grad():
        torch.compile(experts, backend=ours, fullgraph=True)(*table.routing())
    assert ops() == FUSED


def test_a_refused_module_compiles_as_before_and_is_recorded_once() -> None:
    experts: Any = mixtral()  # eager: its loop breaks the graph, so Dynamo traces it several times
    experts.num_experts = 3
    args = (table.routing()[0], table.routing()[1].clamp(max=2), table.routing()[2])
    expected = experts(*args)
    with report.collect() as found:
        actual = torch.compile(experts, backend=ours)(*args)
    torch.testing.assert_close(actual, expected)
    assert ops() == [] and [site.code for site in found.sites] == ["MC208"]


def test_weights_of_another_kind_are_refused() -> None:
    class Odd(Tensor):
        pass

    experts: Any = mixtral()
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Odd))
    with report.collect() as found:
        huggingface.optimize(experts)
    assert [site.code for site in found.sites] == ["MC402"]


def test_the_hook_is_lazy() -> None:
    """Installing imports nothing; importing transformers later is enough."""
    code = """
import sys
from moe_compile import huggingface
huggingface.install_hook()
assert "transformers" not in sys.modules
import transformers.integrations.moe as moe, transformers.models.dbrx.modeling_dbrx as dbrx
assert moe.ExpertsInterface.get_interface._moe_compile and dbrx.DbrxExperts.forward._moe_compile
assert "moe_compile" in moe.ALL_EXPERTS_FUNCTIONS
assert type(dbrx.__spec__.loader).__name__ == "SourceFileLoader"
huggingface.install_hook()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# --- register, optimize, restore ------------------------------------------------------------------


def tiny_mixtral(**changes: Any) -> nn.Module:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, **changes)
    return model.eval()


IDS = torch.arange(3, 15).view(2, 6)


def test_experts_implementation_by_name() -> None:
    huggingface.register()
    reference = tiny_mixtral()(input_ids=IDS).logits
    with report.collect() as found:
        built = tiny_mixtral(experts_implementation="moe_compile")
        torch.testing.assert_close(built(input_ids=IDS).logits, reference)
        built(input_ids=IDS)
    assert [site.status for site in found.sites] == [REWRITTEN] * 2
    model: Any = tiny_mixtral()
    model.set_experts_implementation("moe_compile")
    torch.compile(model, backend=others, fullgraph=True)(input_ids=IDS)  # by name it is any backend's
    assert ops() == FUSED * 2


def test_by_name_training_runs_the_default() -> None:
    huggingface.register()
    model: Any = tiny_mixtral(experts_implementation="moe_compile")
    with torch.enable_grad(), report.collect() as found:
        model(input_ids=IDS).logits.sum().backward()
    assert {site.code for site in found.refused} == {"MC507"}
    assert model.model.layers[0].mlp.experts.down_proj.grad is not None


def test_optimize_and_restore() -> None:
    model: Any = tiny_mixtral()
    torch.compile(model, backend=others)(input_ids=IDS)  # transformers and Dynamo add attributes once
    before, config = model(input_ids=IDS).logits, model.config.to_dict()
    GRAPHS.clear()
    torch._dynamo.reset()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    attributes = [dict(m.__dict__) for m in model.modules()]
    with report.collect() as found:
        assert huggingface.optimize(model, strict=True) is model
        assert huggingface.optimize(model, strict=True) is model
    assert [(s.status, s.spec.top_k) for s in found.sites] == [(REWRITTEN, 2)] * 2
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    assert model.config.to_dict() == config
    during = model(input_ids=IDS).logits
    torch.testing.assert_close(during, before)
    torch.compile(model, backend=others, fullgraph=True)(input_ids=IDS)
    assert ops() == FUSED * 2
    assert huggingface.restore(model) is model
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert [dict(m.__dict__).keys() for m in model.modules()] == [a.keys() for a in attributes]


def test_optimize_leaves_a_model_that_shares_the_configuration_alone() -> None:
    model: Any = tiny_mixtral()
    other = type(model)(model.config).eval()
    huggingface.optimize(model)
    torch.compile(other, backend=others, fullgraph=True)(input_ids=IDS)
    assert ops() == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_optimized_and_independent(duplicate: Callable[[Any], Any]) -> None:
    model = huggingface.optimize(mixtral())
    args = table.routing()
    other = duplicate(model)
    other.down_proj.mul_(2)
    assert_as_good(mixtral(), args, model(*args), mixtral()(*args))
    torch.testing.assert_close(other(*args), 2 * model(*args))
    with report.collect() as found:
        other(*table.routing(tokens=3))
        torch.compile(other, backend=others, fullgraph=True)(*args)
    assert ops() == FUSED and found.refused == []
    huggingface.restore(other)
    assert "forward" not in other.__dict__ and "forward" in model.__dict__


def test_optimized_modules_see_changes() -> None:
    experts: Any = table.build("deepseek_v4.modeling_deepseek_v4", "DeepseekV4Experts")
    plain, args = copy.deepcopy(experts), table.routing()
    huggingface.optimize(experts)
    experts(*args)
    for change in ({"limit": 0.5}, {"act_fn": nn.Tanh()}):
        for name, value in change.items():
            setattr(experts, name, value)
            setattr(plain, name, value)
        assert_as_good(plain, args, experts(*args), plain(*args))


def test_optimized_modules_train_with_the_original() -> None:
    experts: Any = huggingface.optimize(mixtral())
    with torch.enable_grad(), report.collect() as found:
        experts(*table.routing()).sum().backward()
        experts(*table.routing())
    assert [site.code for site in found.sites] == ["MC507"] and experts.down_proj.grad is not None


def test_strict_changes_nothing_when_it_raises() -> None:
    model: Any = tiny_mixtral()
    model.model.layers[1].mlp.experts.forward = lambda *args: None  # as an offloading hook would
    with pytest.raises(NoMatch, match="MC104"):
        huggingface.optimize(model, strict=True)
    assert "forward" not in model.model.layers[0].mlp.experts.__dict__
    with pytest.raises(NoMatch, match="no known Hugging Face MoE module"):
        huggingface.optimize(nn.Linear(2, 2), strict=True)


def test_other_models_pass_through() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with report.collect() as found:
        assert huggingface.optimize(model) is model
    assert found.sites == []


@pytest.mark.parametrize(
    ("module", "name", "code"),
    [
        ("nllb_moe.modeling_nllb_moe", "NllbMoeExperts", "MC209"),
        ("doge.modeling_doge", "DogeCDMoE", "MC206"),
        ("vitpose_backbone.modeling_vitpose_backbone", "VitPoseNaiveMoe", "MC207"),
    ],
)
def test_known_classes_that_are_left_alone(module: str, name: str, code: str) -> None:
    import importlib

    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    instance = cls.__new__(cls)
    nn.Module.__init__(instance)
    with report.collect() as found:
        huggingface.optimize(instance)
    assert [(site.status, site.code) for site in found.sites] == [(REFUSED, code)]


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (huggingface.register, lambda: huggingface.optimize(nn.Linear(1, 1))):
        with pytest.raises(ImportError, match=r'pip install "moe-compile\[hf\]"'):
            call()


# --- whole models ---------------------------------------------------------------------------------


def _models() -> list[Any]:
    import hf_models

    known = [name for name in hf_models.MODELS if name in hf_models.CONFIG_MAPPING]
    return [pytest.param(name, marks=() if name in hf_models.QUICK else pytest.mark.slow) for name in known]


@pytest.mark.parametrize("model_type", _models())
def test_whole_model_is_one_graph(model_type: str) -> None:
    import hf_models

    model, ids = hf_models.build(model_type), hf_models.tokens()
    try:
        expected = model(input_ids=ids).logits
    except TypeError as error:  # doge of transformers 5.17 hands a tuple to dropout
        if model_type != "doge":
            raise
        pytest.skip(f"this transformers cannot run {model_type} itself: {error}")
    if model_type == "aria_text" and not any(huggingface.family_of(module) for module in model.modules()):
        pytest.skip(f"{model_type} of this transformers has no experts interface yet (aria of 5.17)")
    with report.collect() as found:
        actual = torch.compile(model, backend=ours, fullgraph=True)(input_ids=ids).logits
    assert len(GRAPHS) == 1
    if model_type == "doge":
        assert ops() == [] and {site.code for site in found.sites} == {"MC206"}
    else:
        assert ops() == FUSED * len(found.rewritten) and found.rewritten and not found.refused
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_optimize_takes_known_options_only() -> None:
    with pytest.raises(OptionError, match="strict"):
        moe_compile.optimize(nn.Linear(2, 2), stric=True)
    with pytest.raises(OptionError, match="verify"):
        moe_compile.optimize(nn.Linear(2, 2), verify=True)


def test_dryrun_changes_nothing() -> None:
    model = hf_models.build("mixtral")
    moe_compile.optimize(model, dryrun=True)
    assert not any("forward" in module.__dict__ for module in model.modules())
