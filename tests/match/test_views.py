"""What views keep of a value's meaning, and the views that end it."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from tracing import INPUTS, E, H, I, K, T, chosen, fact_of, said

aten = torch.ops.aten


def tokens_of(ids, e):
    return torch.where(ids == e)[0]


def onehot(ids):
    return F.one_hot(ids, E)


def split_features(x, parameter):
    """Two feature dimensions ``[T, 3, 8]``."""
    return F.linear(x, parameter).view(T, 3, 8)


THREE = {"ids": chosen(T, 3)}

VIEWS = {
    "int32 ids with a dimension more": (lambda ids: ids[:, :, None].to(torch.int32) == torch.arange(E), "Gate"),
    "int8 ids with a dimension more": (lambda ids: ids[:, :, None].to(torch.int8) == torch.arange(E), None),
    "hits as int64": (lambda ids: aten._unique2(ids)[0].to(torch.int64), "Hits"),
    "hits as float": (lambda ids: aten._unique2(ids)[0].to(torch.float32), None),
    "an unknown tensor, permuted": (lambda x: x.permute(1, 0), None),
    "an unknown tensor, repeated": (lambda x: x.repeat(2, 1), None),
    "an unknown tensor, in halves": (lambda x: x.chunk(2, 1)[0], None),
    "a mask, permuted": (lambda ids: (ids == 1).permute(1, 0), "Gate"),
    "a mask, each element thrice": (lambda ids: (ids == 1).repeat_interleave(3), None),
    "a flat mask, each element thrice": (lambda ids: (ids == 1).flatten().repeat_interleave(3), "Gate"),
    "some of all pairs": (lambda ids: (ids == 1).flatten()[:T], None),
    "all of all tokens": (lambda ids: (ids == 1)[:T], "Gate"),
    "a range of one-hot columns": (lambda ids: onehot(ids)[..., :2], None),
    "one one-hot column": (lambda ids: onehot(ids)[..., 1:2], "Gate"),
    "one expert of one copy of one-hot rows": (
        lambda ids: (ids[:, :, None, None] == torch.arange(E)[:, None].expand(E, E))[..., 1, 2], None),
    "one slot of a mask": (lambda ids: (ids == 1)[:, :1], "Gate"),
    "one token of a mask": (lambda ids: (ids == 1)[:1], None),
    "two of three slots": (lambda ids: (ids == 1)[:, :2], None, THREE),
    "one slot of weights": (lambda ids, w: ((ids == 1) * w)[:, :1], None),
    "one slot of picked rows": (lambda ids: (ids == 1)[tokens_of(ids, 2)][:, :1], None),
    "some features of gathered weights": (lambda ids, stack_parameter: stack_parameter[ids][:, :, :8], None),
    "some features": (lambda x, parameter: F.linear(x, parameter)[:, :8], "Val"),
    "one lane of split features": (lambda x, parameter: split_features(x, parameter)[:, 1], "Val"),
    "two lanes of split features": (lambda x, parameter: split_features(x, parameter)[:, :2], None),
    "one token of split features": (lambda x, parameter: split_features(x, parameter)[:1], None),
    "a number of a parameter": (lambda bias_parameter: bias_parameter[0], None),
    "a row of a parameter in another precision": (lambda stack_parameter: stack_parameter[1].double(), None),
    "a row of a parameter in its own precision": (lambda stack_parameter: stack_parameter[1].to(torch.float32), "Wt"),
    "a row of a parameter": (lambda biases_parameter: biases_parameter[0], "Wt"),
    "a complex constant": (lambda ids: torch.full((T, E), 1j), None),
    "a complex fill": (lambda ids: torch.zeros(T, E, dtype=torch.complex64).fill_(1j), None),
    "a fill": (lambda x: torch.empty_like(x).fill_(2), "Filled"),
    "every other number": (lambda ids: torch.arange(0, 2 * E, 2), None),
    "numbers between the integers": (lambda ids: torch.arange(0.5, E), None),
    "numbers from one": (lambda ids: torch.arange(1, E), "Range"),
    "dropout": (lambda x, parameter: F.dropout(F.linear(x, parameter), 0.5), "MC205"),
    "dropout of nothing": (lambda x, parameter: F.dropout(F.linear(x, parameter), 0.0), "Val"),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    program, expected, *others = VIEWS[name]
    assert said(program, **(others[0] if others else {})) == expected


def test_one_output_of_a_stack_is_no_expert():
    fact = fact_of(lambda biases_parameter: biases_parameter[:, 0], biases_parameter=INPUTS["biases_parameter"])
    assert (fact.source, fact.expert, fact.cut) == ("axis", None, ("w0", 0, 1, 1))


# What the weight of the first linear map is: a tensor of its own (no cut), or some outputs of the tensor before.
WEIGHTS = {
    "some experts of a stack": (
        lambda x, stack_parameter: torch.einsum("th,eih->tei", x, stack_parameter[1:3]), ("axis", None, (2, I, H))),
    "some outputs": (lambda x, parameter: F.linear(x, parameter[2:]), ("one", ("w0", 2, I, 1), (I, H))),
    "some of some outputs": (lambda x, parameter: F.linear(x, parameter[:8][2:]), ("one", None, (6, H))),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_slices_of_weights(name):
    program, expected = WEIGHTS[name]
    fact = fact_of(program, **{n: INPUTS[n] for n in inspect.signature(program).parameters})
    (weight,) = [s.weight for s in fact.slots]
    assert (weight.source, weight.cut, tuple(weight.leaf.node.meta["val"].shape)) == expected


# --- sizes and places that are not known while compiling ------------------------------------------------

# (program, the dimension of each input whose size is unknown)
UNKNOWN = {
    "an unknown slot": (lambda ids, x: torch.select(ids == 1, 1, x.shape[0] - T), {"x": 0}),
    "the first of unknown slots": (lambda ids: (ids == 1)[:, 0], {"ids": 1}),
    "the first of unknown experts": (
        lambda ids, scores: (ids[:, :, None] == torch.arange(scores.shape[1]))[..., 0], {"scores": 1}),
    "the first of experts of unknown width": (lambda stack_parameter: stack_parameter[0], {"stack_parameter": 1}),
    "halves of unknown tokens": (lambda ids: (ids == 1).chunk(2, 0)[0], {"ids": 0}),
    "a part of unknown width": (
        lambda x, parameter, ids: F.linear(x, parameter).split([ids.shape[0], I - ids.shape[0]], -1)[0], {"ids": 0}),
    "the counts of unknown experts": (
        lambda ids, x: ids.flatten().bincount(minlength=E)[: x.shape[0] - T], {"x": 0}),
    "an unknown column of coordinates": (
        lambda ids, x: torch.select((ids == 1).nonzero(), 1, x.shape[0] - T), {"x": 0}),
}  # fmt: skip
KNOWN = {
    "a known slot": (lambda ids: torch.select(ids == 1, 1, K - 1), {"ids": 0}),
    "the first of known experts": (lambda stack_parameter: stack_parameter[0], {}),
    "a part of known width": (lambda x, parameter: F.linear(x, parameter).split([7, I - 7], -1)[0], {"x": 0}),
}  # fmt: skip


def said_of_unknown(program, unknown):
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(name):
        sizes = [DimDynamic.DUCK if unknown.get(name) == d else DimDynamic.STATIC for d in range(INPUTS[name].dim())]
        return mode.from_tensor(INPUTS[name], symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    return said(program, **{name: fake(name) for name in inspect.signature(program).parameters})


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_unknown_has_no_meaning(name):
    assert said_of_unknown(*UNKNOWN[name]) is None


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_beside_it_has(name):
    assert said_of_unknown(*KNOWN[name]) is not None
