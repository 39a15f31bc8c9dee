"""Which experts a sum of weighted outputs has: a known activation, the program's own steps, or none at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from tracing import E, H, I, K, T, chosen, engine_of, tokens

from moe_compile.match.layer import build
from moe_compile.spec import Experts, NoMatch

INPUTS = {
    "x": tokens(T, H), "w": tokens(T, K), "ids": chosen(T, K), "scores": tokens(T, E),
    "up_parameter": tokens(E, I, H), "gate_parameter": tokens(E, I, H), "third_parameter": tokens(E, I, H),
    "down_parameter": tokens(E, H, I), "square_parameter": tokens(E, H, H), "one_parameter": tokens(E, 1, H),
    "more_parameter": tokens(E, I + 1, H), "both_parameter": tokens(E, 2 * I, H),
    "large_parameter": tokens(E, 3 * I, H), "biases_parameter": tokens(E, 3 * I),
    "double_parameter": tokens(E, I).double(),
    "downs_parameter": tokens(E + 1, H, I), "wider_parameter": tokens(E, H + 4, I),
}  # fmt: skip


def outcome(program):
    """The experts of the layer that ``program`` ends with, or the refusal."""
    keys = [name.removesuffix("_parameter") for name in INPUTS]
    engine, _ = engine_of(lambda *tensors: program(SimpleNamespace(**dict(zip(keys, tensors, strict=True)))), **INPUTS)
    node, total = engine.sums[-1]
    try:
        return build(engine, node, total, "").moe.experts
    except NoMatch as error:
        return error


def layer(middle, down=lambda s, e: s.down[e], start=lambda s: 0):
    """A sum of every expert on every token."""

    def program(s):
        total = start(s)
        for e in range(E):
            gate = (s.w * (s.ids == e)).sum(-1, keepdim=True)
            total = total + F.linear(middle(s, e), down(s, e)) * gate
        return total

    return program


def picked(expert):
    """A sum over the rows of each expert."""

    def program(s):
        total = torch.zeros_like(s.x)
        for e in range(E):
            token, slot = torch.where(s.ids == e)
            total = total.index_add(0, token, expert(s, s.x[token], e) * s.w[token, slot, None])
        return total

    return program


def up(s, e):
    return F.linear(s.x, s.up[e])


def gate(s, e):
    return F.linear(s.x, s.gate[e])


def halves(of):
    """``of(first, second)``, the two halves of one map."""
    return lambda s, e: of(*F.linear(s.x, s.both[e]).chunk(2, -1))


def sliced(s):
    return slice(I // 2, I // 2 + 2 * I)


def gated(second_first, weight, bias=lambda s, e: None):
    def middle(s, e):
        first, second = F.linear(s.x, weight(s, e), bias(s, e)).chunk(2, -1)
        return F.silu(second) * first if second_first else F.silu(first) * second

    return middle


def counts(s):
    """Weights by the ids, of more experts in the second map."""
    w, ids = s.scores.topk(K)
    h = F.silu(torch.einsum("tkih,th->tki", s.up[ids], s.x))
    return (torch.einsum("tki,tkhi->tkh", h, s.downs[ids]) * w[..., None]).sum(1)


def with_last(s, e):
    h = F.linear(s.x, s.more[e])
    return F.silu(h[:, :I]) * h[:, I:]


KNOWN = {
    "one map": (lambda s, e: F.silu(up(s, e)), "silu", False),
    "two maps": (lambda s, e: F.silu(gate(s, e)) * up(s, e), "silu", True),
    "two halves": (halves(lambda a, b: F.silu(a) * b), "silu", True),
    "two halves, the second activated": (halves(lambda a, b: F.silu(b) * a), "silu", True),
    "a number is added": (lambda s, e: F.silu(gate(s, e)) * torch.add(up(s, e), 1.0), "silu", True),
    "limits": (lambda s, e: F.silu(gate(s, e).clamp(max=7.0)) * up(s, e).clamp(-7.0, 7.0), "silu", True),
    "a part of a weight": (gated(False, lambda s, e: s.large[e][sliced(s)]), "silu", True),
}
OWN = {
    "the second map cancels": (lambda s, e: F.silu(gate(s, e)) + 0 * up(s, e), 2),
    "one number of each row": (
        lambda s, e: F.silu(up(s, e)) * F.linear(s.x, s.one[e]).squeeze(-1).unsqueeze(-1), 2),
    "one number of each row, from the same map": (with_last, 1),
    "the first half only": (halves(lambda a, b: F.silu(a)), 1),
    "the second half only": (halves(lambda a, b: F.silu(b)), 1),
    "a part after the activation": (lambda s, e: F.silu(F.linear(s.x, s.both[e]))[:, :I], 1),
    "a limit that is a value": (lambda s, e: torch.clamp(gate(s, e), max=up(s, e)), 2),
    "a number is added twice": (lambda s, e: F.silu(gate(s, e)) * torch.add(up(s, e), 1.0, alpha=2), 2),
    "a quotient rounded down": (lambda s, e: torch.div(F.relu(up(s, e)), 1.0, rounding_mode="floor"), 1),
}  # fmt: skip
REFUSED = {
    "three maps": (
        layer(lambda s, e: F.silu(gate(s, e)) * up(s, e) * F.linear(s.x, s.third[e])),
        "MC301: an expert has 3 input projections"),
    "the input beside its map": (
        picked(lambda s, rows, e: F.linear(F.silu(F.linear(rows, s.square[e])) * rows, s.square[e])),
        "MC301: the expert's input bypasses"),
    "a single map": (
        picked(lambda s, rows, e: F.linear(rows, s.square[e])), "MC301: an expert is a single linear map"),
    "other features than the input's": (
        layer(lambda s, e: F.silu(up(s, e)), down=lambda s, e: s.wider[e]),
        f"MC201: experts map H={H} to {H + 4} features"),
    "weights of more experts": (counts, f"MC208: weights of {E} and of {E + 1} experts meet"),
    "a part of a part of a weight": (
        layer(gated(True, lambda s, e: s.large[e][sliced(s)])), "MC301: a slice of a sliced weight"),
    "a part of a part of a bias": (
        layer(gated(True, lambda s, e: s.both[e], lambda s, e: s.biases[e][sliced(s)])),
        "MC301: a slice of a sliced bias"),
    "a bias of another precision": (
        layer(lambda s, e: F.silu(up(s, e) + s.double[e]).to(torch.float32)),
        "MC401: weights are torch.float64, the hidden states torch.float32"),
    "a complex result": (
        layer(lambda s, e: F.silu(up(s, e)), start=lambda s: torch.zeros(T, H, dtype=torch.complex64)),
        "MC401: the result is torch.complex64"),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_activation(name):
    middle, activation, is_gated = KNOWN[name]
    found = outcome(layer(middle))
    assert isinstance(found, Experts), found
    assert (found.activation.name, found.activation.gated) == (activation, is_gated)
    assert (found.num_experts, found.hidden_size, found.intermediate_size) == (E, H, I)


@pytest.mark.parametrize("name", OWN)
def test_the_steps_of_the_program(name):
    """The rows between the two maps go through what the program wrote, on as many maps of the input."""
    middle, maps = OWN[name]
    found = outcome(layer(middle))
    assert isinstance(found, Experts), found
    assert found.activation is None and len(found.custom[1]) == maps == 1 + (found.w3 is not None)


@pytest.mark.parametrize("name", REFUSED)
def test_no_experts(name):
    program, reason = REFUSED[name]
    found = outcome(program)
    assert isinstance(found, NoMatch) and str(found).startswith(reason), found
