"""Laws of the matcher's small algebras, on random input: what a normal form or a label says is what tensors do."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compile.match.activation import activation_of
from moe_compile.match.labels import Atom, names, regroup, size_of, unify
from moe_compile.match.polynomial import Unsupported, polynomial_of
from moe_compile.spec import ACTIVATIONS, Activation, Experts, MoE, Weight

repeatable = settings(derandomize=True, deadline=None, max_examples=150, database=None)

# ------------------------------------------------------------------------- labels of dimensions


@st.composite
def labelled(draw):
    """Labels as the rules make them: up to four atoms, grouped into dimensions, with dimensions of size one."""
    order = draw(st.permutations(["t0", "k", "e", "r"]))[: draw(st.integers(1, 4))]
    atoms = [Atom(name, draw(st.integers(2, 4))) for name in order]
    return group(draw, atoms)


def group(draw, atoms):
    dims, at = [], 0
    while at < len(atoms):
        if draw(st.booleans()):
            dims.append(())
        take = draw(st.integers(1, len(atoms) - at))
        dims.append(tuple(atoms[at : at + take]))
        at += take
    return tuple(dims)


def coordinates(dims):
    """For every atom a tensor of the labelled shape that holds each element's place along that atom."""
    atoms = [a for d in dims for a in d]
    shape = [size_of(d) for d in dims]
    flat = [a.size for a in atoms]
    return {
        a.name: torch.arange(a.size).view([-1 if i == n else 1 for n in range(len(atoms))]).expand(flat).reshape(shape)
        for i, a in enumerate(atoms)
    }


@repeatable
@given(st.data())
def test_labels_after_a_view_tell_where_every_element_is(data):
    dims = data.draw(labelled())
    shape = [size_of(d) for d in group(data.draw, [a for d in dims for a in d])]
    after = regroup(dims, shape)
    assert after is not None and [size_of(d) for d in after] == shape
    before, expected = coordinates(dims), coordinates(after)
    for name, place in before.items():
        assert torch.equal(place.reshape(shape), expected[name])


@repeatable
@given(labelled(), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_view_that_cuts_an_atom_has_no_labels(dims, shape):
    total = math.prod(size_of(d) for d in dims)
    if math.prod(shape) != total:
        assert regroup(dims, shape) is None
        return
    after = regroup(dims, shape)
    ends = {math.prod(a.size for a in [a for d in dims for a in d][i:]) for i in range(5)}
    cuts = {math.prod(shape[i:]) for i in range(len(shape) + 1)}
    assert (after is not None) == (cuts <= ends | {1})


@repeatable
@given(labelled())
def test_a_feature_dimension_is_the_only_one_that_may_be_cut(dims):
    features = (*dims, (Atom("f", 12),))
    after = regroup(features, [*(size_of(d) for d in dims), 3, 4])
    assert after is not None and names(after)[-2:] == (("fo",), ("fi",))
    assert regroup((*dims, (Atom("w0", 12),)), [*(size_of(d) for d in dims), 3, 4]) is None


@repeatable
@given(st.data())
def test_unify_is_broadcasting(data):
    whole = data.draw(labelled())

    def partial(dims):
        kept = tuple(() if data.draw(st.booleans()) else d for d in dims)
        return kept[data.draw(st.integers(0, len(kept) - 1)) :] if kept else kept

    a, b = partial(whole), partial(whole)
    found = unify(a, b)
    assert found is not None and found == unify(b, a) and unify(found, a) == found
    sizes = [[size_of(d) for d in dims] for dims in (a, b)]
    assert tuple(size_of(d) for d in found) == torch.broadcast_shapes(*sizes)


@repeatable
@given(st.integers(2, 5), st.sampled_from(["t0", "k", "e", "r", "f"]), st.sampled_from(["t0", "k", "e", "r", "f"]))
def test_unify_refuses_other_labels_of_the_same_size(size, a, b):
    found = unify(((Atom(a, size),),), ((Atom(b, size),),))
    assert (found is not None) == (a == b)
    assert unify(((Atom(a, size),),), ((Atom(a, size + 1),),)) is None


# ------------------------------------------------------------------------- expressions between the products

CONSTANTS = st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, 1.702, 0.044715])
LEAVES = st.sampled_from([("gate",), ("up",)]) | CONSTANTS.map(lambda v: ("const", v))


def deeper(inner):
    limits = st.tuples(st.sampled_from([None, -1.0, 0.0]), st.sampled_from([None, 0.5, 2.0]))
    return (
        st.tuples(st.sampled_from(["add", "sub", "mul"]), inner, inner)
        | st.tuples(st.sampled_from(["neg", "square", "relu", "silu", "sigmoid", "tanh", "erf"]), inner)
        | st.tuples(st.just("pow"), inner, st.just(("const", 2.0)))
        | st.builds(lambda x, ends: ("clamp", x, ("const", ends[0]), ("const", ends[1])), inner, limits)
        | st.builds(lambda x, c: ("minimum", x, ("const", c)), inner, st.sampled_from([0.25, 1.0]))
        | st.builds(lambda x: ("div", x, ("add", ("const", 1.0), ("exp", ("neg", x)))), inner)
    )


EXPRESSIONS = st.recursive(LEAVES, deeper, max_leaves=8)
POINTS = torch.linspace(-2, 2, 9, dtype=torch.float64)
GATE, UP = torch.meshgrid(POINTS, POINTS + 0.1, indexing="ij")
UNARY = {
    "neg": torch.neg, "square": torch.square, "relu": torch.relu, "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "erf": torch.erf, "exp": torch.exp, "reciprocal": torch.reciprocal,
}  # fmt: skip
BINARY = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow}


def computed(expr):
    """An expression with tensors, operator by operator."""
    name, *args = expr
    if name in ("gate", "up"):
        return GATE if name == "gate" else UP
    if name == "const":
        return torch.full_like(GATE, args[0])
    if name == "clamp":
        low, high = args[1][1], args[2][1]
        return computed(args[0]) if low is None and high is None else computed(args[0]).clamp(low, high)
    if name == "minimum":
        return torch.minimum(computed(args[0]), computed(args[1]))
    if name in UNARY:
        return UNARY[name](computed(args[0]))
    return BINARY[name](*(computed(a) for a in args))


def evaluated(poly):
    """A polynomial with tensors, term by term."""
    total = torch.zeros_like(GATE)
    for monomial, coefficient in poly:
        term = torch.full_like(GATE, coefficient)
        for atom in monomial:
            term = term * of_atom(atom)
        total = total + term
    return total


def of_atom(atom):
    if atom in (("gate",), ("up",)):
        return GATE if atom == ("gate",) else UP
    inner = evaluated(atom[1])
    if atom[0] in ("min", "max"):
        return inner.clamp(max=atom[2]) if atom[0] == "min" else inner.clamp(min=atom[2])
    return UNARY[atom[0]](inner)


def agree(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(b.abs().max())))


@settings(repeatable, max_examples=400)
@given(EXPRESSIONS)
def test_the_normal_form_has_the_value_of_the_expression(expr):
    try:
        poly = polynomial_of(expr)
    except Unsupported:
        return
    agree(evaluated(poly), computed(expr))


@settings(repeatable, max_examples=400)
@given(EXPRESSIONS)
def test_an_activation_that_is_recognised_is_the_expression(expr):
    found = activation_of(expr)
    if found is not None:
        agree(found(GATE, UP if found.gated else None), computed(expr))


LIMITS = st.sampled_from([math.inf, 0.5, 1.5])
KNOWN = st.builds(
    Activation, name=st.sampled_from(ACTIVATIONS), gated=st.just(True), gate_limit=LIMITS, up_limit=LIMITS,
    up_offset=st.sampled_from([0.0, 1.0]),
)  # fmt: skip


@repeatable
@given(KNOWN, st.booleans(), st.booleans())
def test_every_known_activation_is_recognised_in_any_order(act, swapped, distributed):
    gate = ("gate",) if act.gate_limit == math.inf else ("minimum", ("gate",), ("const", act.gate_limit))
    up = ("up",)
    if act.up_limit < math.inf:
        up = ("clamp", up, ("const", -act.up_limit), ("const", act.up_limit))
    curve = {"relu2": ("square", ("relu", gate)), "identity": gate}.get(act.name, (act.name, gate))
    offset = ("const", act.up_offset)
    expr = ("add", ("mul", curve, up), ("mul", offset, curve)) if distributed else ("mul", curve, ("add", up, offset))
    if swapped:
        expr = (expr[0], expr[2], expr[1])
    found = activation_of(expr)
    if act.name == "relu2" and act.gate_limit < math.inf:
        assert found is None  # min(max(g, 0), L) squared has no form of its own: it runs as written
        return
    assert found is not None and (found == act or act.name == "relu")  # a limit of relu's gate is one of its value
    agree(found(GATE, UP), act(GATE, UP))


# ------------------------------------------------------------------------- the meaning


@st.composite
def layers(draw):
    seed = draw(st.integers(0, 10_000))
    experts, tokens = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    top_k = draw(st.integers(1, experts))
    g = torch.Generator().manual_seed(seed)

    def stack(*shape):
        return Weight((torch.randn(experts, *shape, generator=g, dtype=torch.float64),), True)

    ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, 6, generator=g, dtype=torch.float64)
    gated = draw(st.booleans())
    inner = Experts(
        experts, 6, 5, stack(10 if gated else 5, 6), stack(6, 5), b2=stack(6),
        activation=Activation("silu", gated), interleaved=gated and draw(st.booleans()),
    )  # fmt: skip
    return MoE(x, ids, weights, top_k, inner, weight_on_input=draw(st.booleans()))


@settings(repeatable, max_examples=60)
@given(layers(), st.randoms(use_true_random=False))
def test_the_order_of_slots_and_tokens_does_not_matter(moe, random):
    slots, tokens = list(range(moe.top_k)), list(range(moe.hidden_states.shape[0]))
    random.shuffle(slots)
    random.shuffle(tokens)
    turned = moe.with_tensors(topk_ids=moe.topk_ids[:, slots], topk_weights=moe.topk_weights[:, slots])
    agree_tensors(turned.reference(), moe.reference())
    moved = moe.with_tensors(
        hidden_states=moe.hidden_states[tokens], topk_ids=moe.topk_ids[tokens], topk_weights=moe.topk_weights[tokens]
    )
    agree_tensors(moved.reference(), moe.reference()[tokens])


@settings(repeatable, max_examples=60)
@given(layers())
def test_a_slot_outside_the_range_adds_nothing_and_slots_add_up(moe):
    none = moe.with_tensors(topk_ids=torch.full_like(moe.topk_ids, moe.experts.num_experts))
    assert torch.equal(none.reference(), torch.zeros_like(moe.hidden_states))
    total = torch.zeros_like(moe.hidden_states)
    for k in range(moe.top_k):
        one = torch.full_like(moe.topk_ids, -1)
        one[:, k] = moe.topk_ids[:, k]
        total = total + moe.with_tensors(topk_ids=one).reference()
    agree_tensors(total, moe.reference())


def agree_tensors(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
