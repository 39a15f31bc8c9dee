"""Polynomials over opaque atoms: the normal form in which activations are compared.

Writing an expression as a polynomial makes operand order, distribution (``(u + 1) * a`` against
``u * a + a``), subtraction, negation, small integer powers and clamps equal where mathematics says
so, with no rewrite rules. Everything is hashable: a monomial is a sorted tuple of atoms, a ``Poly`` a
sorted tuple of ``(monomial, coefficient)``, an atom ``("gate",)``, ``("up",)`` or
``(name, Poly, *constants)`` such as ``("min", poly, 7.0)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Atom = tuple[Any, ...]
Monomial = tuple[Atom, ...]
Poly = tuple[tuple[Monomial, float], ...]
Expr = tuple[Any, ...]

MAX_TERMS = 32  # activations have a handful; a bound keeps repeated squaring from exploding
MAX_POWER = 4
_FUNCTIONS = ("sigmoid", "tanh", "erf", "exp", "gelu", "gelu_tanh")


class Unsupported(Exception):
    """The expression leaves the vocabulary; it has no activation."""


def constant(value: float) -> Poly:
    return (((), float(value)),) if value != 0 else ()


def atom(*parts: Any) -> Poly:
    return (((parts,), 1.0),)


def value_of(poly: Poly) -> float | None:
    """The number that ``poly`` is, or None when it has atoms."""
    if not poly:
        return 0.0
    return poly[0][1] if len(poly) == 1 and poly[0][0] == () else None


def single_atom(poly: Poly) -> Atom | None:
    """The atom that ``poly`` is, or None when it is anything more."""
    if len(poly) == 1 and poly[0][1] == 1.0 and len(poly[0][0]) == 1:
        return poly[0][0][0]
    return None


def build(terms: dict[Monomial, float]) -> Poly:
    """The canonical tuple of a term dictionary."""
    if len(terms) > MAX_TERMS:
        raise Unsupported(f"more than {MAX_TERMS} terms")
    return tuple(sorted(((m, c) for m, c in terms.items() if c != 0), key=lambda term: repr(term[0])))


def add(a: Poly, b: Poly) -> Poly:
    terms = dict(a)
    for monomial, coefficient in b:
        terms[monomial] = terms.get(monomial, 0.0) + coefficient
    return build(terms)


def multiply(a: Poly, b: Poly) -> Poly:
    terms: dict[Monomial, float] = {}
    for left, c in a:
        for right, d in b:
            monomial = tuple(sorted(left + right, key=repr))
            terms[monomial] = terms.get(monomial, 0.0) + c * d
    return build(terms)


def scale(poly: Poly, factor: float) -> Poly:
    return multiply(poly, constant(factor))


def power(poly: Poly, exponent: float) -> Poly:
    if not 0 <= exponent <= MAX_POWER or exponent != int(exponent):
        raise Unsupported(f"power {exponent}")
    result = constant(1.0)
    for _ in range(int(exponent)):
        result = multiply(result, poly)
    return result


def reciprocal(poly: Poly) -> Poly:
    """``1/poly``; ``1/(1 + exp(-y))`` is recognised as ``sigmoid(y)``."""
    number = value_of(poly)
    if number is not None:
        if number == 0:
            raise Unsupported("division by zero")
        return constant(1.0 / number)
    terms = dict(poly)
    if len(terms) == 2 and terms.pop((), None) == 1.0:
        ((monomial, coefficient),) = terms.items()
        if coefficient == 1.0 and len(monomial) == 1 and monomial[0][0] == "exp":
            return atom("sigmoid", scale(monomial[0][1], -1.0))
    return atom("reciprocal", poly)


def at_most(poly: Poly, limit: float) -> Poly:
    """``min(poly, limit)``."""
    if limit == math.inf:
        return poly
    inner = single_atom(poly)
    if inner is not None and inner[0] == "min":
        return atom("min", inner[1], min(inner[2], limit))
    return atom("min", poly, limit)


def at_least(poly: Poly, limit: float) -> Poly:
    """``max(poly, limit)``; an upper limit inside moves outside, so both orders of a clamp are equal."""
    if limit == -math.inf:
        return poly
    inner = single_atom(poly)
    if inner is not None and inner[0] == "max":
        return atom("max", inner[1], max(inner[2], limit))
    if inner is not None and inner[0] == "min" and inner[2] >= limit:
        return atom("min", at_least(inner[1], limit), inner[2])
    return atom("max", poly, limit)


def mentions(atom_or_poly: Any, leaf: str) -> bool:
    """Whether the leaf occurs anywhere inside."""
    if not isinstance(atom_or_poly, tuple):
        return False
    return atom_or_poly == (leaf,) or any(mentions(part, leaf) for part in atom_or_poly)


def polynomial_of(expr: Expr) -> Poly:
    """The normal form of an expression tree.

    Raises:
        Unsupported: an operator outside the vocabulary, or an expression that grows too large.
    """
    name, args = expr[0], expr[1:]
    if name in ("gate", "up") and not args:
        return atom(name)
    if name == "const":
        if args[0] is None or math.isnan(args[0]):
            raise Unsupported(f"constant {args[0]}")
        return constant(args[0])
    if name in ("clamp", "clamp_min", "clamp_max", "minimum", "maximum"):
        return _clamp(name, args)
    build = _OPERATORS.get(name)
    if build is None:
        raise Unsupported(f"operator {name}")
    operands = [polynomial_of(arg) for arg in args]
    try:
        return build(*operands)
    except TypeError as error:  # wrong number of operands
        raise Unsupported(f"{name} with {len(operands)} operands") from error


def _clamp(name: str, args: tuple[Any, ...]) -> Poly:
    if name in ("minimum", "maximum"):
        left, right = (polynomial_of(arg) for arg in args)
        if value_of(left) is not None:
            left, right = right, left
        limit = value_of(right)
        if limit is None:
            raise Unsupported(f"{name} of two expressions")
        return at_most(left, limit) if name == "minimum" else at_least(left, limit)
    poly = polynomial_of(args[0])
    limits: list[float | None] = [_limit(arg) for arg in args[1:]]
    if name == "clamp_max":
        limits.insert(0, None)
    low, high = [*limits, None, None][:2]
    if low is not None:
        poly = at_least(poly, low)
    return poly if high is None else at_most(poly, high)


def _limit(arg: Expr) -> float | None:
    if arg == ("const", None):
        return None
    number = value_of(polynomial_of(arg))
    if number is None or math.isnan(number):
        raise Unsupported("a limit that is no number")
    return number


def _pow(base: Poly, exponent: Poly) -> Poly:
    number = value_of(exponent)
    if number is None:
        raise Unsupported("a power that is no number")
    return power(base, number)


def _function(name: str) -> Callable[[Poly], Poly]:
    return lambda poly: atom(name, poly)


_OPERATORS: dict[str, Callable[..., Poly]] = {
    "add": add,
    "sub": lambda a, b: add(a, scale(b, -1.0)),
    "mul": multiply,
    "div": lambda a, b: multiply(a, reciprocal(b)),
    "neg": lambda a: scale(a, -1.0),
    "square": lambda a: power(a, 2),
    "pow": _pow,
    "reciprocal": reciprocal,
    "relu": lambda a: at_least(a, 0.0),
    "silu": lambda a: multiply(a, atom("sigmoid", a)),
    **{name: _function(name) for name in _FUNCTIONS},
}
