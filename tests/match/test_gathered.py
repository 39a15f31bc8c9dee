"""What ids and the rows of one expert gather: weights, outputs of all experts, and the router weights of rows."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, fact_of, said, tokens, traces_take_along_dim

from moe_compile.canonical import canonicalise
from moe_compile.match.facts import Wt
from moe_compile.match.labels import names
from moe_compile.rewriting import facts_of


def sorted_ids(ids):
    return ids.flatten().sort()[0]


def sorted_tokens(ids):
    return ids.flatten().argsort(stable=True) // K


def picked(ids):
    return torch.where(ids == 1)[0]


def pairs(ids):
    return torch.where(ids.flatten() == 1)[0]


def outputs(x, stack_parameter):
    """Every expert on every token: ``[t, e, f]``."""
    return torch.einsum("th,eih->tei", x, stack_parameter)


def copies(ids, features=I):
    return ids[..., None].expand(*ids.shape, features)


def every(count=T):
    return torch.arange(count)[:, None]


WEIGHTS = {
    "weights": (lambda stack_parameter, ids: stack_parameter[ids], "Wt"),
    "weights of sorted pairs": (lambda stack_parameter, ids: stack_parameter[sorted_ids(ids)], "Wt"),
    "biases": (lambda biases_parameter, ids: biases_parameter[ids], "Wt"),
    "integers": (lambda biases_parameter, ids: biases_parameter.long()[ids], None),
    "a table of tables": (lambda stack_parameter, ids: stack_parameter[:, None][ids], None),
    "experts along another dimension": (lambda stack_parameter, ids: stack_parameter.transpose(0, 1)[ids], None),
    "experts along another dimension, sorted": (
        lambda stack_parameter, ids: stack_parameter.transpose(0, 1)[sorted_ids(ids)], None),
    "columns of biases": (lambda biases_parameter, ids: biases_parameter[:, ids], None),
    "columns of sorted pairs": (lambda stack_parameter, ids: stack_parameter[:, sorted_ids(ids)], None),
    "zeros of sorted pairs": (lambda ids: torch.zeros(E, I, H)[sorted_ids(ids)], None),
    "zeros in the form of a parameter": (lambda biases_parameter, ids: torch.zeros_like(biases_parameter)[ids], None),
    "by one number": (
        lambda biases_parameter, ids: biases_parameter.index_select(0, ids), None,
        {"ids": torch.zeros((), dtype=torch.int64)}),
}  # fmt: skip
OUTPUTS = {
    "by gather": (lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, copies(ids)), "Val"),
    "by index": (lambda x, stack_parameter, ids: outputs(x, stack_parameter)[every(), ids], "Val"),
    "by gather, of plain numbers": (lambda y, ids: y.gather(1, copies(ids, H)), None),
    "by index, of plain numbers": (lambda y, ids: y[every(), ids], None),
    "by index, of picked rows": (
        lambda x, stack_parameter, ids: outputs(x[sorted_tokens(ids)], stack_parameter)[every(), ids], None),
    "by index, of one expert": (lambda x, parameter, ids: F.linear(x, parameter)[every(), ids], None),
    "by index, of one expert on more rows": (
        lambda x, parameter, ids: F.linear(x, parameter)[every(), ids], None, {"x": tokens(T, E, H)}),
    "by index, of more tokens": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter)[every(), ids], None, {"x": tokens(T + 1, H)}),
    "by index, of one choice": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter)[torch.arange(T), ids], "Val", {"ids": chosen(T)}),
    "by index, one feature of one choice": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter)[..., 0][torch.arange(T), ids], None,
        {"ids": chosen(T)}),
    "by index, split features of one choice": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).view(T, E, 3, 8)[torch.arange(T), ids], None,
        {"ids": chosen(T)}),
    "by index, of the gates": (lambda ids: F.one_hot(ids[:, 0], E)[every(), ids], None),
    "by gather, weighted": (
        lambda x, stack_parameter, ids, w:
            (outputs(x, stack_parameter) * torch.zeros(T, E).scatter(1, ids, w)[..., None]).gather(1, copies(ids)),
        None),
    "by gather, of the gates": (lambda ids, w: (F.one_hot(ids[:, 0], E) * w[:, :1]).gather(1, ids), None),
    "by gather, of one expert on more rows": (
        lambda x, parameter, ids: F.linear(x, parameter).gather(1, copies(ids)), None, {"x": tokens(T, E, H)}),
    "by gather, some features": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, copies(ids, 8)), None),
    "by gather, some tokens": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, copies(ids)), None,
        {"ids": chosen(5, K)}),
    "by gather along the features": (lambda x, parameter, ids: F.linear(x, parameter).gather(1, ids), None),
    "by take_along_dim along the features": (
        lambda x, parameter, ids: torch.take_along_dim(F.linear(x, parameter), ids, 1), None),
    "by gather, by a mask": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, copies((ids == 1).long())), None),
    "by gather, twice the same": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, ids[:, :1, None].expand(T, K, I)), None),
    "by gather, twice the same of one choice": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, ids[:, None, None].expand(T, K, I)), None,
        {"ids": chosen(T)}),
    "by gather, the first feature": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, ids[..., None]), None),
    "by gather, the choice of one token for all": (
        lambda x, stack_parameter, ids: outputs(x, stack_parameter).gather(1, ids[..., None].expand(T, K, I)), None,
        {"ids": chosen(1, K)}),
}  # fmt: skip
TOKENS = {
    "rows": (lambda x, ids: x.gather(0, copies(picked(ids), H)), "Val"),
    "rows by take_along_dim": (lambda x, ids: torch.take_along_dim(x, copies(picked(ids), H), 0), "Val"),
    "rows by take_along_dim, spread": (lambda x, ids: torch.take_along_dim(x, picked(ids)[:, None], 0), None),
    "rows at plain numbers": (lambda x, flat: x.gather(0, copies(flat, H)), None),
    "features at the numbers of tokens": (lambda x, ids: x.gather(1, copies(picked(ids), H)), None),
    "copies of the first row": (lambda x, ids: x[:1].expand(T, -1).gather(0, copies(picked(ids), H)), None),
}  # fmt: skip
PLACES = {
    "every token at its ids": (lambda ids, w: torch.zeros(T, E).index_put((every(), ids), w), "Gate"),
    "the first token at all ids": (lambda ids, w: torch.zeros(T, E).index_put((every(1), ids), w), None),
    "numbers along the slots": (
        lambda ids, w: torch.zeros(K, E).index_put((torch.arange(K), ids), w), None,
        {"ids": chosen(K, K), "w": tokens(K, K)}),
}  # fmt: skip
ROWS = {
    "a weight by a mask of the only token, spread": (
        lambda x, ids: x[(ids == 1).flatten().expand(5)], None, {"x": tokens(5), "ids": chosen(1, 1)}),
    "a repeated row by pairs": (lambda x, ids: x.repeat_interleave(K, 0)[pairs(ids)], "Val"),
    "a repeated projection by pairs": (
        lambda x, ids, parameter: F.linear(x, parameter).repeat_interleave(K, 0)[pairs(ids)], None),
    "a repeated output by pairs": (
        lambda x, ids, w, parameter:
            (F.linear(x, parameter) * ((ids == 1) * w).sum(1)[:, None]).repeat_interleave(K, 0)[pairs(ids)], None),
    "the only row by pairs": (lambda x, ids: x[pairs(ids)], None, {"x": tokens(1, H), "ids": chosen(1, K)}),
    "a row of its own for every slot": (lambda x, ids: x[pairs(ids)], None, {"x": tokens(K, H), "ids": chosen(1, K)}),
    "copies of the first row, repeated": (
        lambda x, ids: x[:1].expand(T, -1).repeat_interleave(K, 0)[pairs(ids)], None),
    "pairs counted slot by slot": (lambda ids: torch.where((ids == 1).t().flatten())[0], None),
    "pairs of copies": (
        lambda ids: torch.where((ids == 1).expand(3, K).flatten())[0], None, {"ids": chosen(1, K)}),
}  # fmt: skip
TABLES = {f"{title}, {name}": case for title, table in (("weights", WEIGHTS), ("outputs", OUTPUTS), ("tokens", TOKENS),
          ("places", PLACES), ("rows", ROWS)) for name, case in table.items()}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[traces_take_along_dim] * ("rows by take_along_dim" in n)) for n in TABLES]
)
def test_gathered(name):
    program, expected, *others = TABLES[name]
    assert said(program, **(others[0] if others else {})) == expected


@pytest.mark.parametrize("shape, expected", [((T, K), (("t0",), ("k",), ("f",))), ((T,), (("t0",), ("f",)))])
def test_outputs_by_index_have_a_dimension_of_slots_if_the_ids_have(shape, expected):
    inputs = {"x": tokens(), "stack_parameter": tokens(E, I, H), "ids": chosen(*shape)}

    def program(x, stack_parameter, ids):
        return outputs(x, stack_parameter)[every().view(-1, *[1] * (ids.dim() - 1)), ids]

    fact = fact_of(program, **inputs)
    assert names(fact.dims) == expected


@pytest.mark.parametrize("shape", [(E, I), (E, I, H)])
def test_weights_of_unknown_size(shape):
    """The number of experts and the sizes of a weight must be known: nothing can be proved of them otherwise."""
    facts = {}
    for mode in ("fake", "symbolic"):
        graph = make_fx(lambda stack, ids: stack[ids], tracing_mode=mode, pre_dispatch=True)(tokens(*shape), chosen())
        next(iter(graph.graph.nodes)).name = "stack_parameter"
        engine = facts_of(canonicalise(graph))
        facts[mode] = engine.fact(next(n for n in engine.copy.graph.nodes if n.op == "output").args[0])
    assert isinstance(facts["fake"], Wt) and facts["symbolic"] is None
