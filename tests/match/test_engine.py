"""What the engine says of nodes: their dtype, their memory, and which computations are the same."""

from __future__ import annotations

import pytest
import torch
from tracing import H, I, K, T, chosen, engine_of, fact_of, tokens

from moe_compile.match import nodes as rules
from moe_compile.match.engine import ids_of
from moe_compile.match.facts import Gate, Leaf, Slot, Val, Wt


@torch.library.custom_op("moe_compile_tests::nothing", mutates_args=())
def nothing() -> torch.Tensor:
    return torch.zeros(3)


@torch.library.custom_op("moe_compile_tests::tick", mutates_args=("state",))
def tick(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state += 1
    return x * state


@nothing.register_fake
def _() -> torch.Tensor:
    return torch.empty(3)


@tick.register_fake
def _(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


DTYPES = {
    torch.bool: set(), torch.int8: {"is_integer"}, torch.uint8: {"is_integer"},
    torch.int16: {"is_integer", "holds_ids"}, torch.int32: {"is_integer", "holds_ids", "is_ids"},
    torch.int64: {"is_integer", "holds_ids", "is_ids"}, torch.float32: {"is_float"}, torch.bfloat16: {"is_float"},
    torch.float64: {"is_float"}, torch.float8_e4m3fn: set(), torch.complex64: None,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    _, node = engine_of(lambda x: x.clone(), x=torch.zeros(3, dtype=dtype))
    said = {name for name in ("is_integer", "holds_ids", "is_ids", "is_float") if getattr(rules, name)(node)}
    assert said == (DTYPES[dtype] if DTYPES[dtype] is not None else {"is_integer"})


@pytest.mark.parametrize("name", ["is_integer", "holds_ids", "is_ids", "is_float"])
def test_what_is_no_tensor_has_no_dtype(name):
    _, pieces = engine_of(lambda x: x.unbind(0), x=tokens())
    assert getattr(rules, name)(pieces[0].args[0]) is False


def test_what_is_no_node_has_no_fact_and_is_no_float():
    engine, _ = engine_of(lambda x: x * 2, x=tokens())
    assert engine.fact([1]) is None and engine.fact(2.0) is None
    assert not rules.is_float(2.0) and not rules.is_float(None)


def test_an_op_without_arguments():
    assert fact_of(lambda ids: (nothing(), ids == 1)[1], ids=chosen()).expert == 1


def test_equal_computations_are_one_value():
    engine, (a, b, c) = engine_of(lambda w: (w * w, w * w, w * 2), w=tokens(T, K))
    assert engine.leaf(a) == engine.leaf(b) != engine.leaf(c)


@pytest.mark.parametrize(
    "twice",
    [lambda w, s: (torch.rand_like(w), torch.rand_like(w)), lambda w, s: (tick(w, s), tick(w, s))],
    ids=["random numbers", "an op that writes its second argument"],
)
def test_what_looks_equal_and_is_not(twice):
    engine, (a, b) = engine_of(twice, w=tokens(T, K), s=tokens(1))
    assert engine.leaf(a) != engine.leaf(b)


@pytest.mark.parametrize("again", [False, True])
def test_a_view_of_a_written_buffer_is_unchanged_until_the_next_write(again):
    def program(w):
        y = w.clone()
        y.mul_(2)
        view = y.view(-1)
        if again:
            y.add_(1)
        return view

    engine, view = engine_of(program, w=tokens(T, K))
    assert engine.unchanged(view) is not again


def test_the_ids_of_a_value_are_those_of_any_of_its_weights():
    _, node = engine_of(lambda x: x * 2, x=tokens())
    x, ids = Leaf(node, 0), Leaf(node, 1)
    own, gathered = Wt((), x, "one"), Wt((), x, "ids", ids=ids)
    assert ids_of(Val((), ("x",), x, (Slot(own), Slot(gathered)))) == ids
    assert ids_of(Val((), ("x",), x, (Slot(own),), gate=Gate((), ids))) == ids
    assert ids_of(Val((), ("x",), x, (Slot(own),))) is None


def test_parameters():
    def program(x, w_parameter):
        return x, w_parameter, w_parameter.t() * 2, x @ w_parameter, torch.zeros(3)

    engine, nodes = engine_of(program, x=tokens(), w_parameter=tokens(H, I))
    assert [engine.is_param(n) for n in nodes] == [False, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool], ids=str)
def test_casts_that_do_not_hold_ids_make_other_ids(dtype):
    fact = fact_of(lambda ids: ids.to(dtype).to(torch.int64) == 1, ids=chosen())
    assert "arg" not in fact.ids.node.name
    assert "arg" in fact_of(lambda ids: ids.to(torch.int32) == 1, ids=chosen()).ids.node.name
