"""The backend's calling convention: options, strictness, failures, switches, weights that change."""

from __future__ import annotations

import logging

import fp8_layers
import pytest
import torch
import torch._dynamo
from moe_compile.patterns.dense_loop import MaskedDense
from moe_compile.patterns.index_add_loop import HitModules, WhereIndexAdd
from support import relative
from torch._inductor.utils import run_and_get_code

import moe_compile
from moe_compile import backend, report, rewriting
from moe_compile.config import OptionError
from moe_compile.spec import NoMatch
from moe_compile.verify import VerificationError


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(layer, x, **options):
    chosen = {f"moe_compile.{k}": v for k, v in options.items()}
    with torch.no_grad(), report.collect() as found:
        out = torch.compile(layer, backend="moe_compile", options=chosen or None)(x)
    return out, found


def unproved(layer):
    """A layer of the dense form whose second expert differs: refused with MC201."""
    layer.mlps[1].forward = lambda x: layer.mlps[1].w2(torch.tanh(layer.mlps[1].w1(x)) * layer.mlps[1].w3(x))
    return layer


def test_listed_and_loaded_by_name():
    assert "moe_compile" in torch._dynamo.list_backends()


def test_strict_raises_for_a_refusal_and_names_it():
    with pytest.raises(Exception, match="MC201") as caught:
        compiled(unproved(MaskedDense().eval()), torch.randn(6, 32), strict=True)
    assert "RewriteError" in repr(caught.value) or "not rewritten" in str(caught.value)


def test_without_strict_a_refusal_keeps_the_original():
    layer, x = unproved(MaskedDense().eval()), torch.randn(6, 32)
    out, found = compiled(layer, x)
    assert [s.code for s in found.sites] == ["MC201"]
    with torch.no_grad():
        assert relative(out, layer(x)) < 1e-6


def test_unknown_and_wrong_options_are_typed_errors():
    layer, x = MaskedDense().eval(), torch.randn(6, 32)
    with pytest.raises(Exception, match="strict") as caught:
        compiled(layer, x, strct=True)
    assert OptionError.__name__ in repr(caught.value.__cause__ or caught.value)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="True or False"):
        compiled(layer, x, strict="yes")


def test_dryrun_of_a_loop_that_only_we_can_capture():
    layer, x = HitModules().eval(), torch.randn(6, 32)
    out, found = compiled(layer, x, dryrun=True)
    assert [s.status for s in found.sites] == ["rewritten"]
    with torch.no_grad():
        assert relative(out, layer(x)) < 1e-6


def test_dryrun_reports_and_changes_nothing():
    layer, x = MaskedDense().eval(), torch.randn(6, 32)
    out, found = compiled(layer, x, dryrun=True)
    assert [s.status for s in found.sites] == ["rewritten"]
    with torch.no_grad():
        assert relative(out, layer(x)) < 1e-6


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("MOE_COMPILE", "0")
    _, found = compiled(MaskedDense().eval(), torch.randn(6, 32))
    assert found.sites == []


def test_inductor_options_pass_through_and_are_checked():
    layer, x = MaskedDense().eval(), torch.randn(6, 32)
    with torch.no_grad():
        torch.compile(layer, backend="moe_compile", options={"max_autotune": False})(x)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Unexpected optimization option"):
            torch.compile(layer, backend="moe_compile", options={"max_autotun": False})(x)


def test_a_bug_of_ours_never_fails_the_compile(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(rewriting, "facts_of", broken)
    layer, x = MaskedDense().eval(), torch.randn(6, 32)
    with caplog.at_level(logging.WARNING, logger="moe_compile"):
        out, found = compiled(layer, x)
    assert [s.code for s in found.sites] == ["MC508"] and "a bug" in found.sites[0].reason
    with torch.no_grad():
        assert relative(out, layer(x)) < 1e-6


def test_a_failure_while_lowering_restores_the_graph(monkeypatch):
    real = rewriting.lower.lower

    def half_way(plan):
        real(plan)
        raise ZeroDivisionError("after the change")

    monkeypatch.setattr(rewriting.lower, "lower", half_way)
    layer, x = WhereIndexAdd().eval(), torch.randn(6, 32)
    out, found = compiled(layer, x)
    assert "MC508" in [s.code for s in found.sites]
    assert "rewritten" not in [s.status for s in found.sites]
    with torch.no_grad():
        assert relative(out, layer(x)) < 1e-6


def test_verify_compares_the_first_call(monkeypatch):
    layer, x = MaskedDense().eval(), torch.randn(6, 32)
    out, _ = compiled(layer, x, verify=True)
    with torch.no_grad():
        assert relative(out, layer(x)) < 1e-6
    torch._dynamo.reset()
    real = rewriting.lower._router
    monkeypatch.setattr(rewriting.lower, "_router", lambda c, p, ids: c.call(torch.mul, (real(c, p, ids), 1.5)))
    with pytest.raises(VerificationError, match="differs from the original"):
        compiled(layer, x, verify=True)


def test_experts_option_must_fit_the_device():
    with pytest.raises(Exception, match="triton"):
        compiled(MaskedDense().eval(), torch.randn(6, 32), experts="triton")


def test_deepgemm_by_name_is_for_fp8_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_require_kernels", lambda *args: None)  # as on a GPU
    with pytest.raises(Exception, match=r"the weights of .*dense_loop.py:\d+ are not"):
        compiled(MaskedDense().eval(), torch.randn(6, 32), experts="deepgemm")
    layer = fp8_layers.Loop().eval()
    with pytest.raises(Exception, match=r"the rows of .*fp8_layers.py:\d+ are not"):
        compiled(layer, fp8_layers.tokens(layer), experts="deepgemm")


def test_weights_may_change_after_compiling():
    layer, x = WhereIndexAdd().eval(), torch.randn(6, 32)
    keys = {k: (v.shape, v.data_ptr()) for k, v in layer.state_dict().items()}
    owners = [id(p) for p in layer.parameters()]
    with torch.no_grad():
        fast = torch.compile(layer, backend="moe_compile")
        fast(x)
        assert {k: (v.shape, v.data_ptr()) for k, v in layer.state_dict().items()} == keys
        assert [id(p) for p in layer.parameters()] == owners
        for change in (in_place, load, step):
            change(layer)
            assert relative(fast(x), layer(x)) < 1e-6, change.__name__


def in_place(layer):
    layer.mlps[1].w2.weight.mul_(-3)


def load(layer):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})


def step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with torch.enable_grad():
        layer(torch.randn(6, 32)).sum().backward()
    optimizer.step()


def test_two_layers_in_one_graph():
    model, x = torch.nn.Sequential(MaskedDense(), WhereIndexAdd()).eval(), torch.randn(6, 32)
    out, found = compiled(model, x)
    assert sorted(s.form for s in found.rewritten) == ["dense_loop", "index_add_loop"]
    with torch.no_grad():
        assert relative(out, model(x)) < 1e-6


def test_empty_batch():
    layer = MaskedDense().eval()
    out, _ = compiled(layer, torch.randn(0, 32))
    assert out.shape == (0, 32)


def test_a_program_without_experts_is_left_to_inductor():
    out, found = compiled(torch.nn.Linear(32, 4).eval(), torch.randn(6, 32))
    assert found.sites == [] and out.shape == (6, 4)


def test_refusals_are_values():
    error = NoMatch("MC208", "why", None)
    assert (error.code, error.reason) == ("MC208", "why") and "MC208" in str(error)


def test_reset_is_offered_to_torch():
    torch.compiler.reset()
    assert callable(backend.moe_compile.reset)
    assert moe_compile.__version__


def test_inductor_runs_the_ops_below_autograd():
    """One Python function less for every call: what says that there is no backward is of no use in there."""
    layer, x = WhereIndexAdd().eval(), torch.randn(6, 32)
    with torch.no_grad():
        out, (code, *_) = run_and_get_code(torch.compile(layer, backend="moe_compile"), x)
    assert "torch.ops.moe_compile.experts_inner.default(" in code
    assert "torch.ops.moe_compile.experts.default(" not in code
    assert relative(out, layer(x)) < 1e-5
