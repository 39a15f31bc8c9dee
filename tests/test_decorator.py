"""``@moe_compile.rewrite``: calls run our op, an outer compile sees the original, and nothing found is said."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import pickle
import warnings

import pytest
import torch
from support import assert_accurate, relative, rewritten
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import moe_compile
from moe_compile import bench, report, torch_compat
from moe_compile.config import OptionError
from moe_compile.decorator import NotRewritten, _nearest
from moe_compile.demo import Sample
from moe_compile.report import Site
from moe_compile.spec import NoMatch

H, I, E, K = 16, 24, 4, 2


class Plain(nn.Module):
    """Not decorated."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E))

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in torch.unique(ids).tolist():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return out


@moe_compile.rewrite
class Decorated(Plain):
    """``forward`` is inherited."""


class Child(Decorated):
    def forward(self, x, scale=2.0):
        return super().forward(x) * scale


@moe_compile.rewrite(strict=True)
class Nested(Decorated):
    """Decorated as its base is."""

    def forward(self, x):
        return -super().forward(x)


class Dense(Plain):
    """No operation whose shape depends on values: whole under every backend."""

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + self.experts[e](x) * (w * (ids == e)).sum(-1, keepdim=True)
        return out


def capacity(x, router, w1, w2):
    """Tokens past the third are dropped."""
    w, ids = F.linear(x, router).softmax(-1).topk(K, dim=-1)
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, slot = torch.where(ids == e)
        token, slot = token[:3], slot[:3]
        out.index_add_(0, token, F.relu(x[token] @ w1[e]) @ w2[e] * w[token, slot, None])
    return out


def layer(x, router, w1, w2):
    w, ids = F.linear(x, router).softmax(-1).topk(K, dim=-1)
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, F.relu(x[token] @ w1[e]) @ w2[e] * w[token, slot, None])
    return out


@moe_compile.rewrite
def hits(x, router, w1, w2):
    """The source that Dynamo traces begins at a decorator."""
    w, ids = F.linear(x, router).softmax(-1).topk(K, dim=-1)
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, F.relu(x[token] @ w1[e]) @ w2[e] * w[token, slot, None])
    return out


def dense(x, router, w1, w2):
    w, ids = F.linear(x, router).softmax(-1).topk(K, dim=-1)
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + F.relu(x @ w1[e]) @ w2[e] * (w * (ids == e)).sum(-1, keepdim=True)
    return out


def fresh_copy(function):
    """The same code, not compiled before: what Dynamo knows of a function hangs on its code object."""
    return type(function)(function.__code__.replace(), function.__globals__, function.__name__)


def graphs_of(decorated):
    return decorated._moe_compile_rewrite.graphs


def weights():
    torch.manual_seed(0)
    return torch.randn(6, H), torch.randn(E, H), torch.randn(E, H, I) * 0.2, torch.randn(E, I, H) * 0.2


@pytest.fixture(autouse=True)
def fresh(request, monkeypatch):
    """What is left of a program runs as it is, but for a few tests: C++ takes most of the time."""
    torch._dynamo.reset()
    if "codegen" not in request.keywords:
        monkeypatch.setattr(torch_compat, "inductor", lambda gm, *rest: gm.forward)
    with torch.no_grad():
        yield


@pytest.fixture
def ops(monkeypatch):
    """How often the CPU implementation of the op ran."""
    from moe_compile.ops import cpu

    calls = []
    activate = cpu._activate
    monkeypatch.setattr(cpu, "_activate", lambda *a: calls.append(1) or activate(*a))
    return calls


def plain_twin(module):
    twin = Plain()
    twin.load_state_dict(module.state_dict())
    return twin


@pytest.mark.codegen
def test_a_class_runs_the_op(ops):
    torch.manual_seed(0)
    module, x = Decorated(), torch.randn(6, H)
    out = module(x)
    assert len(ops) == 1
    twin = plain_twin(module)
    assert_accurate(out, twin(x), copy.deepcopy(twin).double()(x.double()))
    assert len(ops) == 1  # the twin is not decorated
    assert list(module.state_dict()) == list(Plain().state_dict())


def test_other_sizes_and_instances(ops):
    torch.manual_seed(0)
    for module in (Decorated(), Decorated().eval()):
        for tokens in (6, 9, 1, 17):
            x = torch.randn(tokens, H)
            assert relative(module(x), plain_twin(module)(x)) < 1e-5
    assert len(ops) == 8


def test_instances_and_numbers_of_tokens_share_what_was_compiled(ops):
    shared = moe_compile.rewrite(type("Shared", (Dense,), {"forward": fresh_copy(Dense.forward)}))
    for tokens in range(5, 17):  # more than Dynamo's limit of 8 recompilations
        shared()(torch.randn(tokens, H))
    assert len(ops) == 12
    assert graphs_of(shared.forward) == 2  # one size, then any


def test_hooks_and_training_mode(ops):
    module, x, seen = Decorated(), torch.randn(6, H), []
    module.register_forward_hook(lambda m, args, out: seen.append(m.training) or out * 2)
    expected = 2 * plain_twin(module)(x)
    assert relative(module.train()(x), expected) < 1e-5
    assert relative(module.eval()(x), expected) < 1e-5
    assert seen == [True, False] and len(ops) == 2


def test_a_list_of_hit_experts_in_a_decorated_function(ops):
    args = weights()
    assert_accurate(hits(*args), layer(*args), layer(*[a.double() for a in args]))
    assert len(ops) == 1


def test_nothing_is_compiled_before_the_first_call(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled.append(k["options"]) or f)
    fast = moe_compile.rewrite(no_experts, experts="cpu", verify=True)
    assert compiled == []
    with pytest.warns(NotRewritten, match="MC106"):  # nobody compiles here
        fast(torch.ones(3))
    fast(torch.ones(3))
    assert compiled == [{"moe_compile.experts": "cpu", "moe_compile.verify": True}]


@pytest.mark.codegen
def test_a_function_with_options_runs_the_op(ops):
    fast = moe_compile.rewrite(strict=True)(layer)
    assert fast.__name__ == "layer" and fast.__wrapped__ is layer
    args = weights()
    assert_accurate(fast(*args), layer(*args), layer(*[a.double() for a in args]))
    assert len(ops) == 1


def test_copies_pickles_and_children(ops):
    torch.manual_seed(0)
    module, x = Decorated(), torch.randn(6, H)
    expected = plain_twin(module)(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is Decorated and relative(other(x), expected) < 1e-5
    child = Child()
    child.load_state_dict(module.state_dict())
    assert relative(child(x, scale=3.0), 3 * expected) < 1e-5
    assert len(ops) == 3
    nested = Nested()
    nested.load_state_dict(module.state_dict())
    before = graphs_of(Decorated.forward)
    assert relative(nested(x), -expected) < 1e-5
    assert len(ops) == 4 and graphs_of(Nested.forward) == 1 and graphs_of(Decorated.forward) == before


@pytest.mark.parametrize("backend", ["moe_compile", "eager", "inductor"])
def test_an_outer_compile_decides(backend, ops):
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = moe_compile.rewrite(type("Inner", (Plain,), {}))()

        def forward(self, x):
            return torch.tanh(self.moe(x))

    module, x = Model(), torch.randn(6, H)
    expected = torch.tanh(plain_twin(module.moe)(x))
    assert relative(torch.compile(module, backend=backend)(x), expected) < 1e-5
    assert len(ops) == (backend == "moe_compile")


def test_an_outer_compile_sees_one_graph(ops):
    inner = moe_compile.rewrite(type("Inner", (Dense,), {"forward": fresh_copy(Dense.forward)}))
    model, x = nn.Sequential(inner(), nn.Tanh()), torch.randn(6, H)
    outcome = rewritten(model, x)
    assert len(outcome.graphs) == 1 and len(outcome.ops) == 1 and len(ops) == 1
    torch._dynamo.reset()
    seen = []
    plain = torch.compile(model, backend=lambda gm, _: seen.append(gm) or gm.forward, fullgraph=True)
    assert relative(plain(x), outcome.out) < 1e-5
    assert len(seen) == 1 and len(ops) == 1 and graphs_of(inner.forward) == 0


def test_what_an_outer_compile_gave_up_is_left_alone(ops):
    fast, args = moe_compile.rewrite(fresh_copy(dense), strict=True), weights()
    outer = torch.compile(fast, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for tokens in (6, 7, 8):
            outer(torch.randn(tokens, H), *args[1:])
    assert graphs_of(fast) == 0 and not ops


def flops(f, args):
    with FlopCounterMode(display=False) as counter:
        f(*args)
    assert counter.get_total_flops() >= 2 * E * 6 * 2 * H * I


def no_compiler(f, args):
    with torch.compiler.set_stance("force_eager"):
        f(*args)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda f, args: make_fx(f)(*args), id="make_fx"),
        pytest.param(lambda f, args: torch.jit.trace(f, args, check_trace=False), id="jit.trace"),
        pytest.param(lambda f, args: torch.vmap(f, in_dims=(0, None, None, None))(args[0][None], *args[1:]), id="vmap"),
        pytest.param(flops, id="dispatch mode"),
        pytest.param(no_compiler, id="stance"),
    ],
)
def test_tracers_and_transforms_see_the_original(use, ops):
    fast, args = moe_compile.rewrite(fresh_copy(dense), strict=True), weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        use(fast, args)
    assert graphs_of(fast) == 0 and not ops
    fast(*args)
    assert graphs_of(fast) == 1 and len(ops) == 1


def test_fx_sees_the_original(ops):
    inner = moe_compile.rewrite(type("Inner", (Dense,), {"forward": fresh_copy(Dense.forward)}))
    traced = torch.fx.symbolic_trace(nn.Sequential(inner()))
    assert any(n.target == "topk" for n in traced.graph.nodes) and not ops


def test_export_sees_the_original(ops):
    module = moe_compile.rewrite(type("Inner", (Dense,), {"forward": fresh_copy(Dense.forward)}))()
    exported = torch.export.export(module, (torch.randn(6, H),))
    targets = [str(n.target) for n in exported.graph.nodes]
    assert any("linear" in t for t in targets) and not any("moe_compile" in t for t in targets)


def test_bench_times_the_original_as_eager(monkeypatch, ops):
    counts = []
    monkeypatch.setattr(bench, "median_ms", lambda call, device: counts.append((call(), len(ops))[1]) or 1.0)
    bench.speed(Sample("decorated", Decorated(), (torch.randn(6, H),), {}))
    assert counts == [0, 0, 1]


def test_check_and_explain_see_the_original(ops):
    torch.manual_seed(0)
    module, x = Decorated(), torch.randn(6, H)
    sites = moe_compile.explain(module, x).sites
    assert [s.status for s in sites] == ["rewritten"] and str(__file__) in sites[0].location
    ops.clear()
    result = moe_compile.check(module, x)
    assert result.ok and len(ops) == 1  # of its three runs, one is ours


def test_nothing_found_warns_once_and_the_original_runs(ops):
    slow = moe_compile.rewrite(capacity)
    args = weights()
    with pytest.warns(NotRewritten, match=r"capacity \(.*test_decorator.py:\d+\).*MC209.*fix: remove the limit"):
        out = slow(*args)
    assert relative(out, capacity(*args)) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slow(*args)
    assert not ops


def test_a_miss_is_one_line_at_the_definition(caplog):
    slow = moe_compile.rewrite(fresh_copy(capacity))
    with caplog.at_level(logging.WARNING, "moe_compile"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        slow(*weights())
    (warning,) = [w for w in told if w.category is NotRewritten]
    assert (warning.filename, warning.lineno) == (__file__, inspect.getsourcelines(capacity)[1])
    assert "\n" not in str(warning.message) and not caplog.records


def test_a_warning_that_is_an_error_is_raised_once():
    slow = moe_compile.rewrite(fresh_copy(capacity))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotRewritten)
        with pytest.raises(NotRewritten, match="MC209"):
            slow(*weights())
        slow(*weights())


def test_the_break_at_the_routing_comes_before_the_refusals_of_fragments():
    fragment = Site("refused", code="MC200", reason="of a fragment")
    cut, other = Site("not captured", code="MC101"), Site("not captured", code="MC105")
    assert _nearest([fragment, cut]) is cut
    assert _nearest([other, fragment]) is fragment
    assert _nearest([other]) is other


def test_another_refusal_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(report, "_logged", set())

    def two(x, router, w1, w2):
        return layer(x, router, w1, w2) + capacity(x, -router, w1, w2)

    two = moe_compile.rewrite(two)
    with caplog.at_level(logging.WARNING, "moe_compile"), warnings.catch_warnings():
        warnings.simplefilter("error", NotRewritten)
        two(*weights())
    assert [r.args[2].split()[0] for r in caplog.records] == ["MC209"]


def test_a_break_in_code_without_a_name_of_the_trade():
    def anything(a, b):
        print(end="")  # line: nothing here says what it is
        return a + b

    args = torch.ones(3), torch.ones(3)
    with pytest.warns(NotRewritten, match="MC105.*graph break at.*print.*fix: move the statement"):
        moe_compile.rewrite(anything)(*args)
    with pytest.warns(NotRewritten, match="MC106 nothing captured"):
        moe_compile.rewrite(lambda a: a)(*args[:1])


def test_a_first_call_that_fails_late_is_no_miss(monkeypatch, ops):
    from moe_compile.ops import cpu

    fast, args = moe_compile.rewrite(fresh_copy(dense), strict=True), weights()
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_activate", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fast(*args)
    assert relative(fast(*args), dense(*args)) < 1e-5
    assert len(ops) == 1 and fast._moe_compile_rewrite.done


def test_nothing_that_looks_like_experts():
    with pytest.warns(NotRewritten, match="MC200.*nothing in it looks like a sum over experts"):
        assert torch.equal(moe_compile.rewrite(no_experts)(torch.ones(3)), torch.full((3,), 2.0))


def no_experts(x):
    return x + 1


def test_a_graph_break_is_the_reason():
    def broken(x, router, w1, w2):
        w, ids = F.linear(x, router).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(w1.shape[0]):
            token, slot = torch.where(ids == e)
            if token.numel() > 2:
                out.index_add_(0, token, F.relu(x[token] @ w1[e]) @ w2[e] * w[token, slot, None])
        return out

    args = weights()
    with pytest.warns(NotRewritten, match="MC101.*numel.*fix: the branch at"):
        out = moe_compile.rewrite(broken)(*args)
    assert relative(out, broken(*args)) < 1e-6


def test_strict_raises_every_time():
    strict = moe_compile.rewrite(strict=True)(no_experts)
    for _ in range(2):
        with pytest.raises(NoMatch, match=r"no_experts \(.*test_decorator.py:\d+\) .*: MC200 .*; fix: write"):
            strict(torch.ones(3))


def test_strict_raises_for_a_refusal_before_anything_ran():
    class Counts(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            w = [torch.stack([self.experts[e][i].weight.t() for e in range(E)]) for i in (0, 2)]
            return capacity(x, self.router.weight, *w)

    module = moe_compile.rewrite(strict=True)(Counts)()
    with pytest.raises(NoMatch, match=r"Counts \(.*:\d+\) .*: MC209.* at .*:\d+; fix: remove the") as caught:
        module(torch.randn(6, H))
    assert caught.value.code == "MC209" and module.calls == 0


def test_strict_comes_from_the_environment_of_the_call(monkeypatch):
    plain = moe_compile.rewrite(fresh_copy(no_experts))
    monkeypatch.setenv("MOE_COMPILE_STRICT", "1")
    with pytest.raises(NoMatch, match="MC200"):
        plain(torch.ones(3))


def test_strict_refuses_training_and_rewrites_inference(ops):
    trained = moe_compile.rewrite(type("Trained", (Dense,), {"forward": fresh_copy(Dense.forward)}), strict=True)
    module, x = trained(), torch.randn(6, H)
    for _ in range(2):
        with torch.enable_grad(), pytest.raises(NoMatch, match=r"MC507.*fix: run inference under"):
            module(x)
    module(x)
    assert len(ops) == 1
    with torch.enable_grad(), pytest.raises(NoMatch, match="MC507"):  # compiled again, long after the first call
        module(x)


def test_gradients_keep_the_original(ops):
    module, x = Decorated(), torch.randn(6, H)
    with torch.enable_grad():
        with pytest.warns(NotRewritten, match="MC507"):
            moe_compile.rewrite(type("Trained", (Plain,), {}))()(x).sum().backward()
        module(x).sum().backward()
    assert module.router.weight.grad is not None and not ops


def test_decorated_twice_takes_the_new_options(ops):
    fast = moe_compile.rewrite(strict=True)(moe_compile.rewrite(layer))
    assert fast.__wrapped__ is layer
    args = weights()
    assert relative(fast(*args), layer(*args)) < 1e-5
    assert len(ops) == 1


def test_somebody_elses_wrapper_is_kept(ops):
    inner = moe_compile.rewrite(fresh_copy(dense))

    @functools.wraps(inner)  # copies our mark
    def doubled(*args):
        return 2 * inner(*args)

    args = weights()
    assert relative(moe_compile.rewrite(doubled)(*args), 2 * dense(*args)) < 1e-5
    assert len(ops) == 1


def test_methods_and_static_methods(ops):
    class Holder:
        @moe_compile.rewrite
        @staticmethod
        def static(x, router, w1, w2):
            return layer(x, router, w1, w2)

        @moe_compile.rewrite
        @classmethod
        def cls_method(cls, x, router, w1, w2):
            assert cls is Holder
            return layer(x, router, w1, w2)

        @moe_compile.rewrite
        def method(self, x, router, w1, w2):
            return layer(x, router, w1, w2)

    args = weights()
    assert relative(Holder.static(*args), layer(*args)) < 1e-5
    assert relative(Holder.cls_method(*args), layer(*args)) < 1e-5
    assert relative(Holder().method(*args), layer(*args)) < 1e-5
    assert len(ops) == 3


def test_switched_off_by_the_environment(monkeypatch, ops):
    monkeypatch.setenv("MOE_COMPILE", "0")
    args = weights()
    assert torch.equal(moe_compile.rewrite(layer)(*args), layer(*args))
    assert not ops


def generator(x):
    yield x


async def coroutine(x):
    return x


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Plain(), r"an instance of Plain; decorate its class, or call torch.compile\(module"),
        (Holder := type("Holder", (), {}), "the class Holder, which is no nn.Module; decorate the method"),
        (type("Empty", (nn.Module,), {}), "Empty defines no forward"),
        (torch.relu, "takes an nn.Module class or a Python function"),
        (3, r"3 \(int\)"),
        (generator, "generator or coroutine"),
        (coroutine, "generator or coroutine"),
        (type("Yields", (nn.Module,), {"forward": generator}), "Yields is a generator"),
        (Plain().forward, "the bound method Plain.forward; decorate the function in its class"),
    ],
)
def test_what_cannot_be_decorated(target, message):
    with pytest.raises(TypeError, match=message):
        moe_compile.rewrite(target)


def test_wrong_options_are_found_at_once():
    with pytest.raises(OptionError, match="did you mean 'strict'"):
        moe_compile.rewrite(strct=True)
    with pytest.raises(OptionError, match="True or False"):
        moe_compile.rewrite(strict="yes")


def test_an_option_that_does_not_fit_the_inputs_is_bare():
    with pytest.raises(OptionError, match="experts='triton' runs on cuda"):
        moe_compile.rewrite(fresh_copy(dense), experts="triton")(*weights())
