"""Routing decisions and the columns of their tensors: what looks like one, and is another by a single fact."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from tracing import E, H, K, T, chosen, engine_of, said, tokens

from moe_compile.canonical import canonicalise, shape_of
from moe_compile.match.slots import column_of, merge_slots
from moe_compile.rewriting import facts_of
from moe_compile.spec import NoMatch

S = 3  # tokens in a second dimension


def hit(ids, e=1, **options):
    return (ids == e).any(-1, **options)


def sorted_rows(ids):
    order = ids.flatten().argsort(stable=True)
    return order, order // K


def in_order(x, w, parameter, order, other=None):
    return F.linear(x[order // K], parameter) * w.flatten()[order if other is None else other][:, None]


def some(numbers):
    """Indices whose number is known only at run time."""
    return torch.where(numbers.flatten()[:E] > 0)[0]


def pairs_of(x, ids, stack_parameter):
    """One product per pair, by the weights of its own expert."""
    return torch.einsum("tkoi,ti->tko", stack_parameter[ids], x)


BATCHED = {"ids": chosen(2, S, K), "cube": tokens(2, S, S)}
ONE = {"ids": chosen(1, K), "scores": tokens(E)}
ROUTING = {
    "numbers == arange": (lambda w: w[:, :, None] == torch.arange(E), None),
    "arange == 1.5": (lambda x: torch.arange(E) == 1.5, None),
    "ids == arange": (lambda ids: ids[:, :, None] == torch.arange(E), "Gate"),
    "ids == arange along the slots": (lambda ids: ids == torch.arange(K), None),
    "one_hot of sorted ids": (lambda ids: F.one_hot(ids.flatten()[sorted_rows(ids)[0]], E), None),
    "one_hot of an expert's value": (
        lambda x, parameter: F.one_hot((F.linear(x, parameter) > 0) * 1, E), None),
    "ids as floats on a device": (lambda ids: ids.to("cpu", torch.float32) == 1, None, {"ids": chosen(T, 1)}),
    "weighted by copies of the weights": (lambda ids, w: (ids == 1) * w.expand(K, T, K), None),
    "where, a gate": (lambda ids, w: torch.where(ids == 1, (ids == 2) * w, 0.0), None),
    "where, a complex zero": (lambda ids, w: torch.where(ids == 1, w, 0j), None),
    "where, a scalar tensor": (lambda ids, w: torch.where(ids == 1, w, torch.scalar_tensor(0.0)), "Gate"),
    "where, one in a scalar tensor": (lambda ids, w: torch.where(ids == 1, w, torch.scalar_tensor(1.0)), None),
    "where, zeros of more dimensions": (
        lambda ids, w: torch.where(ids == 1, w, torch.zeros(3, 3, 3)), None, {"ids": chosen(3, 3), "w": tokens(3, 3)}),
    "where, zeros of more slots": (
        lambda ids, w: torch.where(ids == 1, w, torch.zeros(T, 3)), None, {"ids": chosen(T, 1), "w": tokens(T, 1)}),
    "weighted, then by a truth value": (lambda ids, w: (ids == 1) * w * True, None),
    "scatter over the slots of the tokens": (
        lambda ids, w: torch.zeros(1, K, E).scatter(2, ids[None].transpose(1, 2), w[None].transpose(1, 2)), None),
    "scatter of slots before tokens": (
        lambda ids, w: torch.zeros(S, 2, 1, E).scatter(
            3, ids[:, :, None].permute(1, 0, 2, 3), w[:, :, None].permute(1, 0, 2, 3)),
        None, {"ids": chosen(2, S, K), "w": tokens(2, S, K)}),
    "scatter into unknown experts": (lambda ids, w, x: torch.zeros(T, some(x).shape[0]).scatter(1, ids, w), None),
    "scatter of a complex number": (
        lambda ids: torch.zeros(T, E, dtype=torch.complex64).scatter(1, ids, 1j), None),
    "scatter of one number without dimensions": (
        lambda flat, w: torch.zeros(E).scatter(0, flat[:1], w.sum()), None),
    "a column": (lambda ids, scores: hit(ids) * scores[:, 1], "Gate"),
    "a column, tokens against tokens": (lambda ids, scores: hit(ids, keepdim=True) * scores[:, 1], None),
    "a column, one for each pair of tokens": (lambda ids, scores: hit(ids) * scores[:, 1:2], None),
    "a column that stays one": (lambda ids, scores: hit(ids, keepdim=True) * scores[:, 1:2], "Gate"),
    "a column that is the only one": (
        lambda ids, w: hit(ids, 0, keepdim=True) * w.split(1, 1)[0], None, {"w": tokens(T, 1)}),
    "a column of one token for all": (lambda ids, scores: hit(ids) * scores[:1, 1], None),
    "a column of no matrix": (lambda ids, scores: hit(ids) * scores[1], None, ONE),
    "a column of unknown experts": (lambda ids, x: hit(ids) * x[:, some(x)][:, 1], None),
    "a row in the middle": (lambda ids, cube: hit(ids) * cube[:, 1], None, BATCHED),
    "a column at the end": (lambda ids, cube: hit(ids) * cube[:, :, 1], "Gate", BATCHED),
    "where, a column": (lambda ids, scores: torch.where(hit(ids), scores[:, 1], 0.0), "Gate"),
    "where, a column of a gate": (
        lambda ids, w: torch.where(hit(ids), torch.zeros(T, E).scatter(1, ids, w)[:, 1], 0.0), None),
    "outputs by the weights of another order": (
        lambda x, ids, w, parameter: in_order(x, w, parameter, sorted_rows(ids)[0], ids.flatten().sort()[1]), "MC207"),
    "outputs of pairs in order by one number": (
        lambda x, ids, stack_parameter, number: torch.einsum(
            "rh,rih->ri", x[sorted_rows(ids)[1]], stack_parameter[ids.flatten()[sorted_rows(ids)[0]]]) * number,
        None, {"number": tokens(1, 1)}),
    "outputs by numbers, without ids": (
        lambda x, parameter, number: F.linear(x, parameter) * number, None, {"number": tokens(T, 1)}),
    "outputs by the weights of their order": (
        lambda x, ids, w, parameter: in_order(x, w, parameter, sorted_rows(ids)[0]), "Val"),
    "outputs of pairs, behind a projection": (
        lambda x, ids, w, square_parameter, stack_parameter: pairs_of(F.linear(x, square_parameter), ids,
                                                                      stack_parameter) * w[..., None], "Val",
        {"square_parameter": tokens(H, H)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTING)
def test_routing(name):
    program, expected, *others = ROUTING[name]
    assert said(program, **(others[0] if others else {})) == expected


CUBE = {"ids": chosen(T, S, K)}
COLUMNS = {
    "select": (lambda ids: ids[:, 1], ((T, K), 1)),
    "select from the end": (lambda ids: ids[:, -1], ((T, K), 1)),
    "select a row": (lambda ids: ids[1], None),
    "select in the middle": (lambda ids: ids[:, 1], None, CUBE),
    "select in the middle by a slice": (lambda ids: ids[:, 1:2], None, CUBE),
    "a number of a vector": (lambda flat: flat[1], None),
    "slice": (lambda scores: scores[:, 2:3], ((T, E), 2)),
    "slice from the end": (lambda scores: scores[:, -1:], ((T, E), E - 1)),
    "slice of two": (lambda scores: scores[:, 1:3], None),
    "unbind of one column": (lambda w: w.unbind(1)[0], None, {"w": tokens(T, 1)}),
    "slice of unknown columns": (lambda x: x[:, some(x)][:, 1:2], None),
    "last of unknown columns": (lambda x: x[:, some(x)][:, -1:], None),
    "select of unknown columns": (lambda x: x[:, some(x)][:, 1], None),
    "select of a slice": (lambda scores: scores[:, 1:][:, 1], ((T, E - 1), 1)),
    "select of the first rows": (lambda scores: scores[:5][:, 1], ((5, E), 1)),
    "select of a whole slice": (lambda scores: scores[:, :E][:, 1], ((T, E), 1)),
    "unbind": (lambda scores: scores.unbind(1)[2], ((T, E), 2)),
    "split by one": (lambda scores: scores.split(1, 1)[2], ((T, E), 2)),
    "split by two": (lambda scores: scores.split(2, 1)[1], None),
    "chunks of two": (lambda scores: scores.chunk(2, 1)[1], None),
    "split of the tokens": (lambda scores: scores.split(1, 0)[1], None),
    "one of two results": (lambda scores: scores.sort(1)[1], None),
    "row of the transposed": (lambda scores: scores.t()[1], ((T, E), 1)),
}  # fmt: skip


def column(engine, node):
    found = column_of(node)
    return None if found is None else (shape_of(found[0]), found[1])


@pytest.mark.parametrize("name", COLUMNS)
def test_column(name):
    program, expected, *others = COLUMNS[name]
    given = {"ids": chosen(), "flat": chosen(T * K), "x": tokens(), "w": tokens(T, K), "scores": tokens(T, E)}
    given |= others[0] if others else {}
    names = program.__code__.co_varnames
    assert column(*engine_of(program, **{n: given[n] for n in names})) == expected


PLACES = {
    "select at": lambda x: torch.ones(T, E).select(1, x.shape[0] - T),
    "slice at": lambda x: torch.ones(T, E)[:, x.shape[0] - T : x.shape[0] - T + 1],
    "select of": lambda x: x[:, 1],
    "slice of": lambda x: x[:, 1:2],
    "slice from the end of": lambda x: x[:, -1:],
    "slice of the transposed": lambda x: x.t()[1:2],
}


@pytest.mark.parametrize("name", PLACES)
def test_a_column_of_unknown_place_or_size(name):
    graph = make_fx(PLACES[name], tracing_mode="symbolic", pre_dispatch=True)(tokens(T + 1, H))
    engine = facts_of(canonicalise(graph))
    assert column(engine, next(n for n in engine.copy.graph.nodes if n.op == "output").args[0]) is None


# ------------------------------------------------------------------------------------------- slots


def by_slot(x, square_parameter, columns, weights=None, experts=range(E)):
    """The sum over slots and experts, one after the other."""
    out = 0
    for k, ids in enumerate(columns):
        for e in experts:
            gate = ids == e if weights is None else (ids == e) * weights[k]
            out = out + F.linear(x, square_parameter[e]) * gate[:, None]
    return out


def merged(program):
    """The parts for all slots, None, or the code of the refusal."""
    inputs = {
        "x": tokens(),
        "ids": chosen(),
        "others": chosen(),
        "w": tokens(T, K),
        "square_parameter": tokens(E, H, H),
    }
    engine, node = engine_of(program, **inputs)
    try:
        return merge_slots(engine, engine.fact(node), node)
    except NoMatch as error:
        return error.code


def test_slots_without_weights():
    total = merged(lambda x, ids, others, w, p: by_slot(x, p, ids.unbind(1)))
    assert [part.gate.expert for part in total.parts] == list(range(E))
    assert all(part.gate.weight is None for part in total.parts)


def test_slots_with_weights():
    total = merged(lambda x, ids, others, w, p: by_slot(x, p, ids.unbind(1), w.unbind(1)))
    (leaf,) = {part.gate.weight.leaf for part in total.parts}
    assert shape_of(leaf.node) == (T, K)


def test_one_slot_alone_is_a_layer_of_its_own():
    assert merged(lambda x, ids, others, w, p: by_slot(x, p, [ids[:, 0]], [w[:, 0]])) is None


def test_columns_of_two_index_tensors():
    assert merged(lambda x, ids, others, w, p: by_slot(x, p, [ids[:, 0], others[:, 1]], w.unbind(1))) == "MC207"


@pytest.mark.parametrize("cast", [torch.float64, torch.float32])
def test_weights_that_are_written_after_their_columns_were_read(cast):
    """A cast copies the column, or does not: what the written tensor holds later is another weight."""

    def program(x, ids, others, w, p):
        columns = [w[:, k].to(cast) for k in range(K)]
        w.mul_(2)
        return by_slot(x, p, ids.unbind(1), columns)

    assert merged(program) == "MC204"
