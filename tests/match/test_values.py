"""Linear maps, biases and row-wise steps on a few lines of code: what is known of them, and what stays unknown."""

from __future__ import annotations

import pytest
import torch
from support import rewritten
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, codes_of, engine_of, fact_of, said, tokens

from moe_compile.match import values
from moe_compile.match.labels import names
from moe_compile.match.nodes import writes

aten = torch.ops.aten


def rows(x, ids):
    return x[torch.where(ids == 1)[0]]


def weighted(y, ids):
    return y * (ids == 1).any(1, keepdim=True)


def every(x, stack, out="tei"):
    return torch.einsum(f"th,eih->{out}", x, stack)


def whole(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# --- what can be an input, a weight or a bias -----------------------------------------------------------

BORDERS = {
    "rows of numbers": (lambda x, ids: rows(x, ids), {}, "Val"),
    "one vector": (lambda x, parameter: F.linear(x, parameter), {"x": tokens(H)}, None),
    "rows of one feature": (lambda x, ids: rows(x, ids), {"x": tokens(T, 1)}, None),
    "a vector times a matrix": (lambda x, parameter: x @ parameter.t(), {"x": tokens(H)}, None),
    "zeros through a linear map": (lambda parameter: F.linear(torch.zeros(T, H), parameter), {}, None),
    "a weight of one output": (lambda x, parameter: F.linear(x, parameter), {"parameter": tokens(H)}, None),
    "a vector as weight": (lambda x, parameter: x @ parameter, {"parameter": tokens(H)}, None),
    "a weight of four dimensions": (
        lambda x, parameter: x @ parameter, {"x": tokens(2, 3, T, H), "parameter": tokens(2, 3, H, I)}, None),
    "complex numbers": (
        lambda x, ids, parameter: F.linear(rows(x, ids) * 1j, parameter),
        {"parameter": whole(I, H, dtype=torch.complex64)}, None),
    "a bias": (lambda x, parameter, bias_parameter: F.linear(x, parameter) + bias_parameter, {}, "Val"),
    "a bias on the left": (lambda x, parameter, bias_parameter: bias_parameter + F.linear(x, parameter), {}, "Val"),
    "a bias of integers": (
        lambda x, parameter, bias_parameter: F.linear(x, parameter) + bias_parameter,
        {"bias_parameter": whole(I, dtype=torch.int64)}, None),
    "a scaled bias": (
        lambda x, parameter, bias_parameter: torch.add(F.linear(x, parameter), bias_parameter, alpha=2), {}, None),
    "a bias and a scaled value": (
        lambda x, parameter, bias_parameter: torch.add(bias_parameter, F.linear(x, parameter), alpha=2), {}, None),
    "a vector of the input as bias": (
        lambda x, parameter, v: F.linear(x, parameter) + v, {"v": tokens(I)}, None),
    "biases of all experts": (
        lambda x, stack_parameter, biases_parameter: every(x, stack_parameter) + biases_parameter, {}, "Val"),
    "a number for all experts": (
        lambda x, stack_parameter, bias_parameter: every(x, stack_parameter) + bias_parameter,
        {"bias_parameter": whole()}, None),
    "biases of each expert and feature for each token": (
        lambda x, stack_parameter, bias_parameter: every(x, stack_parameter) + bias_parameter,
        {"x": tokens(E, H), "stack_parameter": tokens(E, E, H), "bias_parameter": tokens(E, E, E)}, None),
    "biases of the input": (
        lambda x, stack_parameter, down_parameter, v:
            torch.addmm(v, every(x, stack_parameter).squeeze(0), down_parameter.t()),
        {"x": tokens(1, H), "v": tokens(E, H)}, None),
    "zeros as bias": (lambda x, parameter: F.linear(x, parameter, torch.zeros(I)), {}, None),
    "a value as bias": (
        lambda x, y, parameter: F.linear(x, parameter, F.linear(y, parameter).squeeze(0)), {"y": tokens(1, H)}, None),
    "one bias of a stack": (
        lambda x, parameter, biases_parameter: F.linear(x, parameter) + biases_parameter[1], {}, "Val"),
    "one number of a stack": (
        lambda x, parameter, biases_parameter: F.linear(x, parameter) + biases_parameter[1, 0], {}, None),
    "one number for each expert": (
        lambda x, stack_parameter, biases_parameter: every(x, stack_parameter, "tie") + biases_parameter[:, 0],
        {}, None),
    "biases of each pair": (
        lambda x, parameter, biases_parameter, ids:
            F.linear(x[:, None].expand(T, K, H), parameter) + biases_parameter[ids], {}, None),
    "biases of each pair on values of tokens": (
        lambda x, parameter, biases_parameter, ids: F.linear(x, parameter)[:, None] + biases_parameter[ids], {}, None),
    "a bias after the router weight": (
        lambda x, ids, parameter, bias_parameter: weighted(F.linear(x, parameter), ids) + bias_parameter,
        {}, "MC302"),
}  # fmt: skip


@pytest.mark.parametrize("name", BORDERS)
def test_borders(name):
    program, others, expected = BORDERS[name]
    assert said(program, **others) == expected


def test_the_bias_of_one_expert_as_a_row():
    """A matrix of one row is no stack of biases where there are no experts yet."""
    fact = fact_of(lambda x, parameter, bias_parameter: F.linear(x, parameter) + bias_parameter.squeeze(0),
                   x=tokens(T, H), parameter=tokens(I, H), bias_parameter=tokens(1, I))  # fmt: skip
    assert fact.expr[0] == "bias" and fact.slots[1].weight.source == "one"


def unknown(*shape, at):
    """A tensor with one size that is not known."""
    sizes = [DimDynamic.DYNAMIC if d == at else DimDynamic.STATIC for d in range(len(shape))]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(tokens(*shape), symbolic_context=context)


def test_sizes_that_are_not_known():
    """Features of input, weight and bias are numbers; only tokens may be a symbol."""
    for at in (0, 1):
        engine, node = engine_of(lambda x: x.clone(), x=unknown(T, H, at=at))
        assert (values.x_leaf(engine, node) is None) == (at == 1)
        assert values.weight_leaf(engine, node) is None
        assert values.bias_leaf(engine, node, batched=True) is None
    engine, node = engine_of(lambda v: v.clone(), v=unknown(I, at=0))
    assert values.bias_leaf(engine, node, batched=False) is None


def test_a_bias_belongs_to_the_last_linear_map():
    def program(x, parameter, bias_parameter):
        y = F.linear(x, parameter)
        return y, F.silu(y), bias_parameter.clone()

    engine, (y, activated, bias) = engine_of(program, x=tokens(T, H), parameter=tokens(I, H), bias_parameter=tokens(I))
    assert values.add_bias(engine, engine.fact(y), bias, y).expr[0] == "bias"
    assert values.add_bias(engine, engine.fact(activated), bias, activated) is None


@pytest.mark.parametrize("out", ["ti", "it"])
def test_which_of_two_tensors_is_the_weight(out):
    engine, node = engine_of(
        lambda parameter, x: torch.einsum(f"ih,th->{out}", parameter, x), parameter=tokens(I, H), x=tokens(T, H)
    )
    weight, x = (n for n in engine.copy.graph.nodes if n.op == "placeholder")
    fact = engine.fact(node)
    assert fact.x.node is x and fact.slots[0].weight.leaf.node is weight
    assert names(fact.dims) == tuple(("t0",) if label == "t" else ("f",) for label in out)


# --- linear maps ----------------------------------------------------------------------------------------


def einsum(equation):
    return lambda x, parameter: torch.einsum(equation, x, parameter)


MAPS = {
    "all experts": (lambda x, stack_parameter: every(x, stack_parameter), {}, "Val"),
    "weights on the left": (
        lambda x, parameter, down_parameter: down_parameter @ F.linear(x, parameter).t(), {}, "Val"),
    "nothing in common": (einsum("th,io->thio"), {}, None),
    "everything in common": (einsum("th,th->t"), {"parameter": tokens(T, H)}, None),
    "the diagonal of the tokens": (einsum("tth,ih->ti"), {"x": tokens(T, T, H)}, None),
    "the diagonal of the weights": (einsum("th,iih->ti"), {"parameter": tokens(I, I, H)}, None),
    "over a dimension of size one": (
        lambda x, parameter, w_parameter: torch.einsum("tuh,iu->thi", F.linear(x, parameter)[:, None], w_parameter),
        {"w_parameter": tokens(I, 1)}, None),
    "over a dimension of size one of the weights": (
        lambda x, parameter, w_parameter: torch.einsum("tu,oiu->toi", F.linear(x, parameter), w_parameter[:, :, None]),
        {"parameter": tokens(1, H), "w_parameter": tokens(H, I)}, None),
    "over the tokens": (
        lambda x, parameter, mix_parameter: F.linear(F.linear(x, parameter).t(), mix_parameter),
        {"mix_parameter": tokens(5, T)}, None),
    "over the experts": (
        lambda scores, stack_parameter: torch.einsum("te,eh->th", scores, stack_parameter[:, 0]), {}, None),
    "one weight for all features": (einsum("th,ih->ti"), {"parameter": tokens(I, 1)}, None),
    "one output": (
        lambda x, stack_parameter: torch.einsum("th,eh->te", x, stack_parameter[:, 0]), {}, None),
    "a row of the weights": (lambda x, stack_parameter: x @ stack_parameter[1, 0], {}, None),
    "a bias in place of a matrix": (
        lambda y, biases_parameter, ids: torch.einsum("ti,tki->tk", y, biases_parameter[ids]),
        {"y": tokens(T, I)}, None),
    "summed over the experts": (
        lambda x, stack_parameter: torch.einsum("th,eih->ti", x, stack_parameter), {}, None),
    "summed over the tokens": (einsum("th,ih->i"), {}, None),
    "a row as weight": (
        lambda x, stack_parameter: F.linear(x, stack_parameter[1, 0]), {}, None),
    "any number of dimensions": (
        lambda x, parameter, ids: torch.einsum(
            "...f,...->...f", F.linear(x, parameter), (ids == 1).any(-1).to(torch.float32)),
        {"x": tokens(2, 3, 5, H), "ids": chosen(2, 3, 5, K)}, None),
    "three tensors": (
        lambda x, parameter, bias_parameter: torch.einsum("th,ih,i->ti", x, parameter, bias_parameter), {}, None),
    "one tensor": (lambda x: torch.einsum("th->ht", x), {}, None),
    "rows of five dimensions": (
        lambda x, parameter, down_parameter: F.linear(x, parameter) @ down_parameter.t(),
        {"x": tokens(2, 3, 2, T, H)}, None),
    "columns of five dimensions": (
        lambda x, parameter, down_parameter: down_parameter @ F.linear(x, parameter).mT,
        {"x": tokens(2, 3, 2, T, H)}, None),
    "addmm": (
        lambda x, parameter, bias_parameter: torch.addmm(bias_parameter, x, parameter.t()), {}, "Val"),
    "addmm of a scaled bias": (
        lambda x, parameter, bias_parameter: torch.addmm(bias_parameter, x, parameter.t(), beta=2), {}, None),
    "addmm of a scaled product": (
        lambda x, parameter, bias_parameter: torch.addmm(bias_parameter, x, parameter.t(), alpha=2), {}, None),
    "addmm of an unknown product": (
        lambda x, parameter, bias_parameter, mix_parameter:
            torch.addmm(bias_parameter, F.linear(x, parameter).t(), mix_parameter),
        {"mix_parameter": tokens(T, 5), "bias_parameter": tokens(5)}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_maps(name):
    program, others, expected = MAPS[name]
    assert said(program, **others) == expected


# --- row-wise steps -------------------------------------------------------------------------------------


def two(step):
    return lambda x, y, parameter: step(F.linear(x, parameter), F.linear(y, parameter))


def step(function):
    return lambda x, parameter: function(F.linear(x, parameter))


@pytest.mark.parametrize("function", [lambda y: y.mul_(2.0), lambda y: y.neg_(), lambda y: F.silu(y, inplace=True)])
def test_steps_in_place_are_written_out_of_place(function):
    """Other steps may read the same value: nothing may be written over it."""
    fact = fact_of(step(function), x=tokens(T, H), parameter=tokens(I, H))
    assert fact.expr[0] == "op" and not fact.expr[1].overloadpacket.__name__.endswith("_")


LIBRARY = torch.library.Library("moe_compile_tests", "FRAGMENT")
for schema in ("blend(Tensor x, Tensor[] others) -> Tensor", "ramp(int n, *, Device? device=None) -> Tensor"):
    LIBRARY.define(schema, tags=(torch.Tag.pointwise,))
LIBRARY.impl("blend", lambda x, others: torch.empty_like(x), "CompositeExplicitAutograd")
LIBRARY.impl("ramp", lambda n, device=None: torch.zeros(n, device=device), "CompositeExplicitAutograd")
LIBRARY.define("double_all(Tensor[](a!) xs) -> Tensor[](a!)")


STEPS = {
    "a function": (step(F.silu), {}, "Val"),
    "random numbers": (step(lambda y: F.rrelu(y, training=True)), {}, None),
    "into another tensor": (step(lambda y: torch.mul(y, 2.0, out=torch.empty_like(y))), {}, None),
    "a value and its transpose": (
        step(lambda y: y * y.t()), {"x": tokens(I, H)}, None),
    "values of two inputs": (two(torch.mul), {"y": tokens(T, H)}, "MC207"),
    "a step of its own with a list of values": (
        two(lambda y, z: torch.ops.moe_compile_tests.blend(y, [z])), {"y": tokens(T, H)}, None),
    "a step of its own without values": (lambda x: torch.ops.moe_compile_tests.ramp(x.shape[0]), {}, None),
    "the router weight before a function": (
        lambda x, parameter, ids: F.silu(weighted(F.linear(x, parameter), ids)), {}, "MC302"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    program, others, expected = STEPS[name]
    assert said(program, **others) == expected


def test_writes_in_place():
    ops = torch.ops.moe_compile_tests
    assert writes(aten.add_.Tensor) and not writes(ops.blend.default) and not writes(ops.double_all.default)


# --- rows of values -------------------------------------------------------------------------------------


def test_rows_of_a_shared_value_start_at_it():
    """What all experts share is computed before them: its rows are an input like any other."""
    fact = fact_of(lambda x, ids, parameter: rows(F.linear(x, parameter), ids),
                   x=tokens(T, H), ids=chosen(T, K), parameter=tokens(I, H))  # fmt: skip
    assert fact.expr == ("x",) and fact.slots == () and fact.x.node.target is aten.linear.default


def test_rows_of_a_weighted_value_are_unknown():
    def program(x, ids, parameter):
        return rows(weighted(F.linear(x, parameter), ids), ids)

    inputs = dict(x=tokens(T, H), ids=chosen(T, K), parameter=tokens(I, H))
    assert fact_of(program, **inputs) is None and codes_of(program, **inputs) == []


# --- whole layers and their numbers ---------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.scores, self.biases = nn.Parameter(torch.randn(E, H)), nn.Parameter(torch.randn(E, I))
        self.up, self.down = (nn.Parameter(torch.randn(E, *shape) / 4) for shape in ((I, H), (H, I)))

    def forward(self, x):
        return self.program(self, x, *F.linear(x, self.scores).softmax(-1).topk(K))

    def loop(self, x, w, ids, middle):
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            inner = middle(F.linear(x[token], self.up[e]), e)
            out.index_add_(0, token, F.linear(inner, self.down[e]) * w[token, slot, None])
        return out


def doubled_in_place(y, e):
    before = y.clone()
    return F.silu(y.mul_(2.0)) * before


def of_some_tokens(m, x, w, ids):
    w, ids = w[1:5], ids[1:5]
    inner = F.silu(torch.einsum("tkih,th->tki", m.up[ids], x[1:5]))
    return (torch.einsum("tki,tkhi->tkh", inner, m.down[ids]) * w[..., None]).sum(1)


LAYERS = {
    "a step in place beside the value before it": lambda m, *routed: m.loop(*routed, doubled_in_place),
    "biases as rows": lambda m, *routed: m.loop(*routed, lambda y, e: F.silu(y + m.biases[e : e + 1].squeeze(0))),
    "some tokens of a top-k": of_some_tokens,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    model, x = Layer(LAYERS[name]), torch.randn(T, H)
    outcome = rewritten(model, x)
    assert outcome.codes == [None] and outcome.ops
    with torch.no_grad():
        torch.testing.assert_close(outcome.out, model(x))
