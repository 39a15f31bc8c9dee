"""The normal form of activations: where it must not see more than there is."""

from __future__ import annotations

import math

import pytest

from moe_compile.match.polynomial import (
    MAX_POWER,
    Unsupported,
    add,
    at_least,
    at_most,
    atom,
    constant,
    multiply,
    polynomial_of,
    power,
    reciprocal,
    scale,
    single_atom,
    value_of,
)

GATE, UP = atom("gate"), atom("up")
EXP = atom("exp", scale(GATE, -1.0))


def test_a_number_is_a_single_constant():
    assert value_of(constant(2.0)) == 2.0 and value_of(()) == 0.0
    assert value_of(add(constant(2.0), GATE)) is None


def test_a_single_atom_has_no_company_and_no_factor():
    assert single_atom(GATE) == ("gate",)
    for poly in (add(GATE, UP), scale(GATE, 2.0), multiply(GATE, UP), constant(1.0)):
        assert single_atom(poly) is None


@pytest.mark.parametrize("exponent", [0.5, -1, MAX_POWER + 1])
def test_powers_are_small_whole_numbers(exponent):
    with pytest.raises(Unsupported, match="power"):
        power(GATE, exponent)


def test_only_one_plus_exp_is_a_sigmoid():
    one = constant(1.0)
    assert reciprocal(add(one, EXP)) == atom("sigmoid", GATE)
    for poly in (add(one, multiply(EXP, UP)), add(one, atom("tanh", GATE)), add(one, scale(EXP, 2.0)), EXP):
        assert reciprocal(poly) == atom("reciprocal", poly)
    with pytest.raises(Unsupported, match="zero"):
        reciprocal(())


def test_limits_around_each_other():
    both = add(GATE, UP)
    assert at_least(both, 1.0) == atom("max", both, 1.0)
    assert at_most(both, 1.0) == atom("min", both, 1.0)
    assert at_least(at_most(GATE, 1.0), 2.0) == atom("max", at_most(GATE, 1.0), 2.0)  # the number 2
    assert at_least(at_most(GATE, 2.0), 1.0) == at_most(at_least(GATE, 1.0), 2.0)
    assert at_most(at_most(GATE, 2.0), 1.0) == at_most(GATE, 1.0)
    assert at_least(at_least(GATE, 1.0), 2.0) == at_least(GATE, 2.0)
    assert at_most(GATE, math.inf) == GATE == at_least(GATE, -math.inf)


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        (("silu",), "silu with 0 operands"),
        (("gate", ("up",)), "operator gate"),
        (("const", None), "constant None"),
        (("const", math.nan), "constant nan"),
        (("frobnicate", ("gate",)), "operator frobnicate"),
        (("clamp", ("gate",), ("up",), ("const", 1.0)), "a limit that is no number"),
        (("clamp_max", ("gate",), ("sub", ("const", math.inf), ("const", math.inf))), "a limit that is no number"),
        (("pow", ("gate",), ("up",)), "a power that is no number"),
        (("maximum", ("gate",), ("up",)), "maximum of two expressions"),
    ],
)
def test_what_has_no_normal_form(expr, message):
    with pytest.raises(Unsupported, match=message):
        polynomial_of(expr)
