"""``@moe_compile.rewrite``: calls run our op, an outer compile sees the original, and nothing found is said."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from support import assert_accurate, relative
from torch import nn
from torch.nn import functional as F

import moe_compile
from moe_compile.config import OptionError
from moe_compile.decorator import NotRewritten
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


def weights():
    torch.manual_seed(0)
    return torch.randn(6, H), torch.randn(E, H), torch.randn(E, H, I) * 0.2, torch.randn(E, I, H) * 0.2


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
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


@pytest.mark.parametrize("backend", ["moe_compile", "eager"])
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


def test_check_and_explain_see_the_original(ops):
    torch.manual_seed(0)
    module, x = Decorated(), torch.randn(6, H)
    report = moe_compile.explain(module, x)
    assert [s.status for s in report.sites] == ["rewritten"] and str(__file__) in report.sites[0].location
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


def test_nothing_that_looks_like_experts():
    with pytest.warns(NotRewritten, match="MC200.*nothing in it looks like a sum over experts"):
        assert torch.equal(moe_compile.rewrite(lambda_free)(torch.ones(3)), torch.full((3,), 2.0))


def lambda_free(x):
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


def test_strict_raises_every_time_until_it_is_rewritten(ops):
    strict = moe_compile.rewrite(strict=True)(lambda_free)
    for _ in range(2):
        with pytest.raises(NoMatch, match=r"lambda_free .* nothing in it was rewritten: MC200"):
            strict(torch.ones(3))
    refused = moe_compile.rewrite(strict=True)(capacity)
    with pytest.raises(Exception, match="MC209"):
        refused(*weights())


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


def test_methods_and_static_methods(ops):
    class Holder:
        @moe_compile.rewrite
        @staticmethod
        def static(x, router, w1, w2):
            return layer(x, router, w1, w2)

        @moe_compile.rewrite
        def method(self, x, router, w1, w2):
            return layer(x, router, w1, w2)

    args = weights()
    assert relative(Holder.static(*args), layer(*args)) < 1e-5
    assert relative(Holder().method(*args), layer(*args)) < 1e-5
    assert len(ops) == 2


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
