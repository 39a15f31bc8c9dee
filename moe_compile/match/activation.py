"""Which ``spec.Activation`` a piece of element-wise code computes.

``activation_of`` works on a small hashable expression tree, so that every matcher can use it:
``("gate",) | ("up",) | ("const", value) | (operator, argument, ...)``, operators named like ATen
overload packets (``silu mul add sub div clamp sigmoid gelu gelu_tanh ...``). A result is given only
where the expression is mathematically equal to it; constants that a formula needs (``sqrt(2/pi)``)
may differ by less than the rounding of float32.

``recognise`` traces a callable and reads the tree, the constants and the layout of the gate and up
columns from the trace: no configuration key and no function name is consulted.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..spec import INF, Activation
from .polynomial import (
    Atom,
    Expr,
    Poly,
    Unsupported,
    atom,
    build,
    mentions,
    polynomial_of,
    power,
    single_atom,
)

_GATE, _UP = atom("gate"), atom("up")
_TOLERANCE = 1e-7  # below half an ulp of float32


def activation_of(expr: Expr) -> Activation | None:
    """The activation that ``expr`` computes from its leaves ``gate`` and ``up``, or None."""
    try:
        poly = polynomial_of(expr)
    except Unsupported:
        return None
    ups = {a for monomial, _ in poly for a in monomial if mentions(a, "up")}
    if not ups:
        return _curve_with_limits(poly, gated=False)
    if len(ups) > 1:
        return None
    (up,) = ups
    up_limit = _up_limit(up)
    split = _split(poly, up)
    if up_limit is None or split is None:
        return None
    curve, offset = split
    return _curve_with_limits(curve, gated=True, up_limit=up_limit, up_offset=offset)


def _up_limit(up: Atom) -> float | None:
    """L of ``clamp(up, -L, L)``, infinity for plain ``up``, None for anything else."""
    if up == ("up",):
        return INF
    if up[0] == "min" and up[2] > 0 and up[1] == atom("max", _UP, -up[2]):
        return float(up[2])
    return None


def _split(poly: Poly, up: Atom) -> tuple[Poly, float] | None:
    """``(A, c)`` with ``poly == A * (up + c)``, or None."""
    factor: dict[tuple[Atom, ...], float] = {}
    rest: dict[tuple[Atom, ...], float] = {}
    for monomial, coefficient in poly:
        remaining = list(monomial)
        if up in monomial:  # what is left of more than one is no function of the gate alone
            remaining.remove(up)
        (factor if up in monomial else rest)[tuple(remaining)] = coefficient
    if not rest:
        return build(factor), 0.0
    if rest.keys() != factor.keys():
        return None
    ratios = [rest[m] / factor[m] for m in factor]
    if not all(math.isclose(r, ratios[0], rel_tol=1e-12) for r in ratios):
        return None
    return build(factor), ratios[0]


def _curve_with_limits(poly: Poly, gated: bool, up_limit: float = INF, up_offset: float = 0.0) -> Activation | None:
    found, act_limit = _curve(poly), INF
    outer = single_atom(poly)
    if found is None and outer is not None and outer[0] == "min":
        found, act_limit = _curve(outer[1]), outer[2]
    if found is None:
        return None
    name, alpha, gate_limit = found
    return Activation(name, gated, alpha, gate_limit, up_limit, act_limit, up_offset)


def _curve(poly: Poly) -> tuple[str, float, float] | None:
    """``(name, alpha, gate_limit)`` of a function of the gate alone, or None."""
    terms = dict(poly)
    for gate, gate_limit in _gates(poly):
        x = atom(*gate)
        relu = atom("max", x, 0.0)
        fixed = {
            "identity": x,
            "gelu": atom("gelu", x),
            "gelu_tanh": atom("gelu_tanh", x),
            "relu": relu,
            "relu2": power(relu, 2),
        }
        for name, shape in fixed.items():
            if poly == shape:
                return name, 1.0, gate_limit
        alpha = _swish_alpha(terms, gate)
        if alpha is not None:
            return "silu", alpha, gate_limit
        if _is_half_sum(terms, gate, "erf", {(gate,): math.sqrt(0.5)}):
            return "gelu", 1.0, gate_limit
        k = math.sqrt(2.0 / math.pi)
        if _is_half_sum(terms, gate, "tanh", {(gate,): k, (gate,) * 3: k * 0.044715}):
            return "gelu_tanh", 1.0, gate_limit
    return None


def _gates(poly: Any) -> Iterator[tuple[Atom, float]]:
    """The gate and every upper-limited gate inside ``poly``, as ``(atom, limit)``."""
    found: dict[Atom, float] = {("gate",): INF}

    def visit(part: Any) -> None:
        if isinstance(part, tuple):
            if len(part) == 3 and part[0] == "min" and part[1] == _GATE:
                found[part] = float(part[2])
            for inner in part:
                visit(inner)

    visit(poly)
    yield from found.items()


def _swish_alpha(terms: Mapping[tuple[Atom, ...], float], gate: Atom) -> float | None:
    """alpha when the terms are exactly ``gate * sigmoid(alpha * gate)``."""
    if len(terms) != 1:
        return None
    ((monomial, coefficient),) = terms.items()
    if not _near(coefficient, 1.0) or len(monomial) != 2 or gate not in monomial:
        return None
    other = monomial[1] if monomial[0] == gate else monomial[0]
    if other[0] != "sigmoid" or len(other[1]) != 1 or other[1][0][0] != (gate,):
        return None
    return float(other[1][0][1])


def _is_half_sum(
    terms: Mapping[tuple[Atom, ...], float],
    gate: Atom,
    function: str,
    argument: Mapping[tuple[Atom, ...], float],
) -> bool:
    """Whether the terms are ``0.5 * gate * (1 + function(argument))``."""
    if len(terms) != 2 or not all(_near(c, 0.5) for c in terms.values()) or (gate,) not in terms:
        return False
    (product,) = (m for m in terms if m != (gate,))
    if len(product) != 2 or gate not in product:
        return False
    other = product[1] if product[0] == gate else product[0]
    if other[0] != function:
        return False
    found = dict(other[1])
    return found.keys() == argument.keys() and all(_near(found[m], c) for m, c in argument.items())


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)


# --- from ATen graphs to expressions -------------------------------------------------------------

_UNARY = {"silu", "sigmoid", "exp", "tanh", "erf", "neg", "relu", "square", "reciprocal"}
_BINARY = {"add", "sub", "mul", "div", "pow", "minimum", "maximum", "clamp_min", "clamp_max"}
_COPIES = {"clone", "contiguous", "alias", "detach", "_to_copy", "to", "lift_fresh_copy"}
_MOVES = {
    "view", "reshape", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "chunk", "narrow",
    "unbind", "unsqueeze", "squeeze", "permute", "transpose", "t", "unflatten", "flatten",
    "clone", "contiguous", "alias", "detach",
}  # fmt: skip


def expr_of(node: Any, leaves: Mapping[fx.Node, Expr]) -> Expr | None:
    """The expression of a node in an ATen graph, down to ``leaves``; None outside the vocabulary.

    Numbers become constants and floating-point casts are dropped. A node that writes to a tensor has
    no expression.
    """
    memo: dict[fx.Node, Expr | None] = dict(leaves)

    def visit(value: Any) -> Expr | None:
        if isinstance(value, fx.Node):
            if value not in memo:
                memo[value] = _node_expr(value, visit)
            return memo[value]
        if value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool)):
            return ("const", None if value is None else float(value))
        return None

    return visit(node)


def _packet(node: fx.Node) -> str:
    """Name of the ATen operator, or "" for anything else and for operators that write."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return "" if target._schema.is_mutable else target.overloadpacket.__name__
    return ""


def _node_expr(node: fx.Node, visit: Callable[[Any], Expr | None]) -> Expr | None:
    name, args = _packet(node), list(node.args)
    if name in _COPIES:
        dtype = node.kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point and dtype.itemsize >= 2):
            return None
        return visit(args[0])
    if name in _UNARY:
        args = args[:1]
    elif name == "gelu":
        name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    elif name in ("clamp", "hardtanh"):
        low, high = [*args[1:], None, None][:2]
        if name == "hardtanh" and len(args) < 3:
            return None
        name, args = "clamp", [args[0], node.kwargs.get("min", low), node.kwargs.get("max", high)]
    elif name == "rsub":
        name, args = "sub", [args[1], args[0]]
        if len(node.args) > 2:  # a factor by position
            return None
    elif name in _BINARY:
        if node.kwargs.get("rounding_mode") is not None or len(args) != 2:
            return None
    else:
        return None
    operands = [visit(arg) for arg in args]
    if any(operand is None for operand in operands):
        return None
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        operands[1] = ("mul", ("const", float(alpha)), operands[1])  # type: ignore[arg-type]
    return (name, *operands)


class Recognised(NamedTuple):
    """An activation and whether its gate and up columns alternate in the input."""

    activation: Activation
    interleaved: bool


def recognise(fn: Callable[[Tensor], Tensor], width: int, gated: bool = True) -> Recognised | None:
    """Trace ``fn`` once on a float32 ``[2, width]`` CPU tensor and recognise what it computes.

    Args:
        fn: maps ``[S, width]`` to ``[S, I]``, with ``width == 2*I`` when gated, else ``I``.
        gated: whether the columns hold gate and up.

    Returns:
        None when the trace fails or is not provably one of ``spec.ACTIVATIONS`` with its limits.
    """
    columns = torch.arange(2 * width, dtype=torch.float32).reshape(2, width)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            graph = make_fx(lambda rows: fn(rows))(columns).graph  # one argument, whatever fn takes
    except Exception:  # arbitrary user code: what cannot be traced here runs as written
        return None
    leaves, layouts = _leaves(graph, columns, gated)
    (output,) = (node.args[0] for node in graph.nodes if node.op == "output")
    expr = None if _writes(graph) else expr_of(output, leaves)
    activation = None if expr is None else activation_of(expr)
    if activation is None or activation.gated != gated or len(layouts) != 1:
        return None
    return Recognised(activation, layouts.pop())


def _writes(graph: fx.Graph) -> bool:
    """Whether an operator writes to a tensor: later reads of its views would see the new value."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.nodes
    )


def _leaves(graph: fx.Graph, columns: Tensor, gated: bool) -> tuple[dict[fx.Node, Expr], set[bool]]:
    """Which nodes hold exactly the gate or the up columns, found by moving the column numbers."""
    moved: dict[fx.Node, Any] = {}
    leaves: dict[fx.Node, Expr] = {}
    layouts: set[bool] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            moved[node] = columns
        elif node.args and node.args[0] in moved and _moves(node):
            operands = fx.node.map_arg(node.args, moved.__getitem__)
            moved[node] = node.target(*operands, **node.kwargs)
        role = _role(moved.get(node), columns, gated)
        if role is not None:
            leaves[node] = (role[0],)
            if any(not _moves(user) for user in node.users):
                layouts.add(role[1])
    return leaves, layouts


def _moves(node: fx.Node) -> bool:
    name = _packet(node)
    is_item = node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
    return is_item or name in _MOVES


def _role(value: Any, columns: Tensor, gated: bool) -> tuple[str, bool] | None:
    width = columns.shape[1]
    if not isinstance(value, Tensor):
        return None
    roles = [("gate", False, columns)]
    if gated:
        half = width // 2
        roles = [
            ("gate", False, columns[:, :half]),
            ("up", False, columns[:, half:]),
            ("gate", True, columns[:, 0::2]),
            ("up", True, columns[:, 1::2]),
        ]
    for name, interleaved, expected in roles:
        if torch.equal(value, expected):
            return name, interleaved
    return None
