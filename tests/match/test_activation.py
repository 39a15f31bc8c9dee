"""Recognition of activations: what is given must be equal, what is not given must not be needed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.match.activation import activation_of, expr_of, recognise
from moe_compile.match.polynomial import Unsupported, polynomial_of
from moe_compile.spec import Activation

WIDTH = 10
Pair = Callable[[Tensor, Tensor], Tensor]
K = math.sqrt(2.0 / math.pi)


@torch.library.custom_op("moe_compile_tests::silu", mutates_args=())
def _other_silu(x: Tensor) -> Tensor:
    return 3 * x


@_other_silu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def written(x: Tensor) -> Tensor:
    """Twice ``x``, by a write to another view of the same memory."""
    h = x * 1.0
    view = h.view(h.shape)
    h.mul_(2.0)
    return view


def concatenated(fn: Pair) -> Callable[[Tensor], Tensor]:
    return lambda rows: fn(*rows.chunk(2, dim=-1))


GATED: dict[str, tuple[Pair, Activation]] = {
    "silu": (lambda g, u: F.silu(g) * u, Activation()),
    "silu, operands swapped": (lambda g, u: u * F.silu(g), Activation()),
    "silu by sigmoid": (lambda g, u: g * torch.sigmoid(g) * u, Activation()),
    "silu by sigmoid, associated otherwise": (lambda g, u: (u * torch.sigmoid(g)) * g, Activation()),
    "silu by exp": (lambda g, u: g / (1 + torch.exp(-g)) * u, Activation()),
    "silu by exp, product first": (lambda g, u: (g * u) / (torch.exp(-g) + 1.0), Activation()),
    "silu mirrored": (lambda g, u: g / (1 + torch.exp(g)) * u, Activation(alpha=-1.0)),
    "silu by reciprocal": (lambda g, u: g * torch.reciprocal(1 + (-g).exp()) * u, Activation()),
    "casts": (lambda g, u: (F.silu(g.double()) * u.double()).to(torch.bfloat16).float(), Activation()),
    "quick gelu": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, Activation(alpha=1.702)),
    "near miss of quick gelu": (lambda g, u: g * torch.sigmoid(1.7 * g) * u, Activation(alpha=1.7)),
    "sigmoid of g over a number": (lambda g, u: g * torch.sigmoid(g / 0.5) * u, Activation(alpha=2.0)),
    "clamped": (
        lambda g, u: F.silu(g.clamp(max=0.5)) * u.clamp(-0.5, 0.5),
        Activation(gate_limit=0.5, up_limit=0.5),
    ),
    "clamped twice": (lambda g, u: F.silu(g.clamp(max=2.0).clamp(max=0.5)) * u, Activation(gate_limit=0.5)),
    "clamped by hardtanh": (lambda g, u: F.silu(g) * F.hardtanh(u, -0.5, 0.5), Activation(up_limit=0.5)),
    "clamped in two steps": (
        lambda g, u: F.silu(g) * u.clamp(max=0.5).clamp(min=-0.5),
        Activation(up_limit=0.5),
    ),
    "limit of the activation": (
        lambda g, u: F.silu(g).clamp(max=0.25) * u.clamp(-0.25, 0.25),
        Activation(act_limit=0.25, up_limit=0.25),
    ),
    "infinite limits": (
        lambda g, u: F.silu(g.clamp(max=math.inf)) * u.clamp(-math.inf, math.inf),
        Activation(),
    ),
    "gpt-oss": (
        lambda g, u: (u.clamp(-0.5, 0.5) + 1) * (g.clamp(max=0.5) * torch.sigmoid(g.clamp(max=0.5) * 1.702)),
        Activation(alpha=1.702, gate_limit=0.5, up_limit=0.5, up_offset=1.0),
    ),
    "offset by distribution": (lambda g, u: F.silu(g) + F.silu(g) * u, Activation(up_offset=1.0)),
    "offset by alpha": (lambda g, u: torch.sub(u, 0.25, alpha=2) * F.silu(g), Activation(up_offset=-0.5)),
    "gelu": (lambda g, u: F.gelu(g) * u, Activation("gelu")),
    "gelu spelled out": (lambda g, u: 0.5 * g * (1 + torch.erf(g / math.sqrt(2))) * u, Activation("gelu")),
    "gelu spelled out otherwise": (
        lambda g, u: g * 0.5 * (torch.erf(g * 0.7071067811865476) + 1.0) * u,
        Activation("gelu"),
    ),
    "tanh gelu": (lambda g, u: F.gelu(g, approximate="tanh") * u, Activation("gelu_tanh")),
    "tanh gelu spelled out": (
        lambda g, u: 0.5 * g * (1 + torch.tanh(K * (g + 0.044715 * torch.pow(g, 3)))) * u,
        Activation("gelu_tanh"),
    ),
    "tanh gelu factored": (
        lambda g, u: 0.5 * g * (1 + torch.tanh(g * 0.7978845608 * (1 + 0.044715 * g * g))) * u,
        Activation("gelu_tanh"),
    ),
    "relu": (lambda g, u: F.relu(g) * u, Activation("relu")),
    "relu by clamp": (lambda g, u: g.clamp(min=0) * u, Activation("relu")),
    "relu with a limit": (lambda g, u: g.clamp(0, 0.5) * u, Activation("relu", act_limit=0.5)),
    "relu of what is below zero": (
        lambda g, u: F.relu(g.clamp(max=-1.0)) * u,
        Activation("relu", gate_limit=-1.0),
    ),
    "relu squared": (lambda g, u: F.relu(g).square() * u, Activation("relu2")),
    "relu to the power 2": (lambda g, u: F.relu(g) ** 2 * u, Activation("relu2")),
    "relu times relu": (lambda g, u: F.relu(g) * u * F.relu(g), Activation("relu2")),
    "rsub with a factor": (lambda g, u: F.silu(g) * -torch.rsub(u, u, alpha=2), Activation()),
    "bilinear": (lambda g, u: g * u, Activation("identity")),
    "views on the way": (lambda g, u: F.silu(g.clone().view(g.shape)) * u.reshape(u.shape), Activation()),
}

NOT_GATED: dict[str, tuple[Callable[[Tensor], Tensor], Activation]] = {
    "silu": (F.silu, Activation(gated=False)),
    "gelu": (F.gelu, Activation("gelu", gated=False)),
    "relu": (F.relu, Activation("relu", gated=False)),
    "relu squared": (lambda x: torch.square(F.relu(x)), Activation("relu2", gated=False)),
    "identity": (lambda x: x, Activation("identity", gated=False)),
}

REFUSED: dict[str, Pair] = {
    "the activation on the other half": lambda g, u: g * F.silu(u),
    "sigmoid of up": lambda g, u: g * torch.sigmoid(u),
    "a factor": lambda g, u: 2 * F.silu(g) * u,
    "a factor on up alone": lambda g, u: F.silu(g) * (2 * u + 1),
    "minus": lambda g, u: -F.silu(g) * u,
    "a sum": lambda g, u: F.silu(g) + u,
    "an offset outside": lambda g, u: F.silu(g) * u + 1,
    "sigmoid with an offset": lambda g, u: g * torch.sigmoid(g + 1) * u,
    "sigmoid alone": lambda g, u: torch.sigmoid(g) * u,
    "sigmoid of the gate, unclamped": lambda g, u: g.clamp(max=0.5) * torch.sigmoid(g) * u,
    "two limits": lambda g, u: g.clamp(max=0.5) * torch.sigmoid(g.clamp(max=0.25)) * u,
    "a lower limit of the gate": lambda g, u: F.silu(g.clamp(-0.5, 0.5)) * u,
    "an unsymmetric limit of up": lambda g, u: F.silu(g) * u.clamp(-0.5, 0.25),
    "an upper limit of up alone": lambda g, u: F.silu(g) * u.clamp(max=0.5),
    "a limit of the product": lambda g, u: (F.silu(g) * u).clamp(max=0.5),
    "an offset of one half only": lambda g, u: (
        0.5 * g * (1 + torch.erf(g / math.sqrt(2))) * u + 0.25 * g + 0.5 * g * torch.erf(g / math.sqrt(2))
    ),
    "silu times sigmoid": lambda g, u: F.silu(g) * torch.sigmoid(g) * u,
    "sigmoid squared": lambda g, u: torch.sigmoid(g) ** 2 * u,
    "up twice": lambda g, u: F.silu(g) * u * u,
    "up limited by the defaults of hardtanh": lambda g, u: F.silu(g) * torch.ops.aten.hardtanh(u),
    "rsub with alpha": lambda g, u: F.silu(g) * torch.rsub(u, 1.0, alpha=2.0),
    "a view that is written": lambda g, u: F.silu(written(g)) * u,
    "1 - exp": lambda g, u: g / (1 - torch.exp(-g)) * u,
    "exp of g plus a number": lambda g, u: g / (2 + torch.exp(-g)) * u,
    "erf with another constant": lambda g, u: 0.5 * g * (1 + torch.erf(g / 1.4)) * u,
    "tanh gelu with another constant": lambda g, u: (
        0.5 * g * (1 + torch.tanh(K * (g + 0.0447 * torch.pow(g, 3)))) * u
    ),
    "tanh gelu with a square": lambda g, u: 0.5 * g * (1 + torch.tanh(K * (g + 0.044715 * g**2))) * u,
    "tanh cap": lambda g, u: torch.tanh(g / 5) * 5 * torch.sigmoid(g) * u,
    "relu cubed": lambda g, u: F.relu(g) ** 3 * u,
    "the square without relu": lambda g, u: g**2 * u,
    "mish": lambda g, u: F.mish(g) * u,
    "leaky relu": lambda g, u: F.leaky_relu(g) * u,
    "up squared": lambda g, u: F.silu(g) * u * u,
    "an integer cast": lambda g, u: F.silu(g).to(torch.int32) * u,
    "rounding": lambda g, u: F.silu(g) * torch.div(u, 1.0, rounding_mode="floor"),
    "a write into a view": lambda g, u: F.silu(g.clamp_(max=0.5)) * u,
    "a write nobody returns": lambda g, u: (u.mul_(2), F.silu(g) * u)[1],
    "noise": lambda g, u: F.dropout(F.silu(g) * u, 0.5),
    "another row": lambda g, u: F.silu(g) * u.flip(0),
    "another column": lambda g, u: F.silu(g) * u.roll(1, dims=-1),
    "a constant tensor": lambda g, u: F.silu(g) * u * torch.full((1,), 2.0),
    "a sum over columns": lambda g, u: F.silu(g) * u.sum(dim=-1, keepdim=True),
    "another offset of up in each term": lambda g, u: 0.5 * g * (u + 1) + 0.5 * g * torch.erf(g * 0.5**0.5) * (u + 2),
    "sigmoid twice": lambda g, u: g * torch.sigmoid(g) * torch.sigmoid(g) * u,
    "sigmoid times tanh": lambda g, u: torch.sigmoid(g) * torch.tanh(g) * u,
    "hardtanh with its own limits": lambda g, u: F.silu(g) * torch.ops.aten.hardtanh(u),
    "rsub with a factor": lambda g, u: F.silu(g) * -torch.rsub(u, -1.0, alpha=2.0),
    "a limit, then an offset": lambda g, u: (F.silu(g).clamp(max=0.5) + 1) * u,
    "a factor on what is limited": lambda g, u: 2 * F.silu(g).clamp(max=0.5) * u,
    "a broken power": lambda g, u: F.relu(g) ** 2.5 * u,
    "a negative power": lambda g, u: F.silu(g) * u * g**-1,
    "an infinite power": lambda g, u: F.relu(g) ** math.inf * u,
    "1 + exp squared": lambda g, u: g / (1 + torch.exp(-g) * torch.exp(-g)) * u,
    "1 + tanh": lambda g, u: g / (1 + torch.tanh(-g)) * u,
    "a limit of a sum": lambda g, u: (g + 1).clamp(min=0) * u,
    "not a number": lambda g, u: F.silu(g) * u * math.nan,
    "an operator of another library": lambda g, u: _other_silu(g) * u,
    "the gate alone": lambda g, u: F.silu(g),
    "up alone": lambda g, u: u,
    "an exception": lambda g, u: g @ u,
}


def agree(fn: Callable[[Tensor], Tensor], activation: Activation, interleaved: bool) -> None:
    """The recognised activation equals the code in float64, where casts and constants do not count."""
    rows = torch.randn(200, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    if not activation.gated:
        gate, up = rows, None
    elif interleaved:
        gate, up = rows[:, 0::2], rows[:, 1::2]
    else:
        gate, up = rows.chunk(2, dim=-1)
    torch.testing.assert_close(activation(gate, up), fn(rows).double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", GATED)
def test_gated(name: str) -> None:
    pair, expected = GATED[name]
    found = recognise(concatenated(pair), WIDTH)
    assert found is not None and found.activation == expected and not found.interleaved
    if name != "casts":
        agree(concatenated(pair), found.activation, interleaved=False)


@pytest.mark.parametrize("name", NOT_GATED)
def test_not_gated(name: str) -> None:
    fn, expected = NOT_GATED[name]
    found = recognise(fn, WIDTH, gated=False)
    assert found is not None and found.activation == expected
    agree(fn, found.activation, interleaved=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert recognise(concatenated(REFUSED[name]), WIDTH) is None


SPLITS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "chunk": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], False),
    "slices": (lambda x: F.silu(x[..., :5]) * x[:, 5:], False),
    "split": (lambda x: F.silu(x.split([5, 5], 1)[0]) * x.split(5, 1)[1], False),
    "narrow": (lambda x: F.silu(x.narrow(1, 0, 5)) * x.narrow(-1, 5, 5), False),
    "two rows of a view": (lambda x: F.silu(x.view(2, 2, 5)[:, 0]) * x.view(2, 2, 5)[:, 1], False),
    "steps": (lambda x: F.silu(x[..., ::2]) * x[..., 1::2], True),
    "two columns of a view": (lambda x: F.silu(x.view(2, 5, 2)[..., 0]) * x.view(2, 5, 2)[..., 1], True),
    "unbind": (lambda x: F.silu(x.unflatten(-1, (5, 2)).unbind(-1)[0]) * x[:, 1::2], True),
}


@pytest.mark.parametrize("name", SPLITS)
def test_layout_is_read_from_the_trace(name: str) -> None:
    fn, interleaved = SPLITS[name]
    found = recognise(fn, WIDTH)
    assert found is not None and found == (Activation(), interleaved)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: F.silu(x[:, 5:]) * x[:, :5],
        lambda x: F.silu(x[..., 1::2]) * x[..., ::2],
        lambda x: F.silu(x[..., ::2]) * x[:, 5:],
        lambda x: F.silu(x[:, :4]) * x[:, 4:8],
        lambda x: F.silu(x[:, :5].t().contiguous().view(2, 5)) * x[:, 5:],
    ],
    ids=["up first", "up first, alternating", "mixed", "not all columns", "permuted"],
)
def test_other_layouts_are_refused(fn: Callable[[Tensor], Tensor]) -> None:
    assert recognise(fn, WIDTH) is None


def test_gated_is_a_fact_of_the_caller() -> None:
    assert recognise(F.silu, WIDTH, gated=True) is None
    assert recognise(concatenated(lambda g, u: F.silu(g) * u), WIDTH, gated=False) is None


def test_random_numbers_of_the_user_are_kept() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    recognise(lambda x: F.dropout(x, 0.5), WIDTH)
    assert torch.equal(torch.rand(3), expected)


G, U = ("gate",), ("up",)


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (("mul", ("silu", G), U), Activation()),
        (("mul", ("minimum", ("const", 7.0), ("silu", G)), U), Activation(act_limit=7.0)),
        (("mul", ("silu", ("minimum", G, ("const", 7.0))), U), Activation(gate_limit=7.0)),
        (("mul", ("maximum", G, ("const", 0)), U), Activation("relu")),
        (("clamp", ("silu", G), ("const", None), ("const", 2.0)), Activation(gated=False, act_limit=2.0)),
        (("mul", ("silu", G), ("clamp_max", ("clamp_min", U, ("const", -3)), ("const", 3))),
         Activation(up_limit=3.0)),
        (("div", ("mul", ("silu", G), U), ("const", 0.0)), None),
        (("mul", ("silu", G), ("minimum", U, G)), None),
        (("mul", ("silu", G), ("pow", U, G)), None),
        (("mul", ("silu", G), ("clamp", U, ("const", math.nan), ("const", 1.0))), None),
        (("mul", ("silu", G), ("clamp", U, ("const", 1.0), ("const", -1.0))), None),
        (("mul", ("silu", G, G), U), None),
        (("unknown", G), None),
        (("pow", ("add", G, U), ("const", 4)), None),
    ],
)  # fmt: skip
def test_expression_trees(expr: tuple[object, ...], expected: Activation | None) -> None:
    assert activation_of(expr) == expected


@pytest.mark.parametrize("value", [True, "x", [1.0]], ids=repr)
def test_only_numbers_are_constants(value: object) -> None:
    assert expr_of(value, {}) is None


def test_a_second_operand_by_name_is_not_overlooked() -> None:
    graph = torch.fx.Graph()
    g, u = graph.placeholder("g"), graph.placeholder("u")
    node = graph.call_function(torch.ops.aten.add.Tensor, (g,), {"other": u, "alpha": 2})
    assert expr_of(node, {g: G, u: U}) is None


def test_a_write_to_the_base_reaches_its_views() -> None:
    def late(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        x.mul_(2)
        return F.silu(gate) * up

    assert recognise(late, WIDTH) is None


INF = ("const", math.inf)


@pytest.mark.parametrize(
    "expr",
    [("x",), ("gate", G), ("add", G, ("const", None)), ("mul", G, ("const", math.nan)), ("clamp", U, G, INF),
     ("clamp", ("silu", G), ("const", None), ("sub", INF, INF))],
    ids=str,
)  # fmt: skip
def test_no_polynomial(expr: tuple[object, ...]) -> None:
    with pytest.raises(Unsupported):
        polynomial_of(expr)


def test_huge_expressions_end() -> None:
    expr: tuple[object, ...] = ("add", G, ("sigmoid", G))
    for _ in range(20):
        expr = ("pow", ("add", expr, ("tanh", expr)), ("const", 4))
        if len(repr(expr)) > 100_000:
            break
    assert activation_of(expr) is None
