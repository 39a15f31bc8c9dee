"""Where a proved layer is left alone: what else sees its values, modes, and results that have no place in the graph."""

from __future__ import annotations

import operator

import pytest
import torch
from support import relative
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from tracing import E, H, I, K, T, traces_take_along_dim

from moe_compile import legality, rewriting


def random(*shape):
    return torch.randn(*shape) / shape[-1] ** 0.5


def inputs_of(*shape, **others):
    torch.manual_seed(0)
    shape = shape or (T,)
    inputs = {"x": random(*shape, H), "scores": torch.rand(*shape, E), "up_parameter": random(E, I, H),
              "down_parameter": random(E, H, I)}  # fmt: skip
    return {**inputs, **others}


def traced(program, inputs, **options):
    with torch.no_grad():
        module = make_fx(program, tracing_mode="fake", pre_dispatch=True, **options)(*inputs.values())
    for node, name in zip([n for n in module.graph.nodes if n.op == "placeholder"], inputs, strict=True):
        node.name = name
    return module


def refused(program, inputs=None):
    """Why the only layer of a program is left alone: "code: reason"."""
    return reasons(traced(program, inputs or inputs_of()))


def reasons(module):
    with torch.no_grad():
        result = rewriting._analyse(module)
    assert result.plans == [] and result.sites, result.sites
    return " ".join(f"{site.code}: {site.reason}" for site in result.sites)


def assert_replaced(module, program, inputs):
    """The layer becomes one op, with the same results."""
    with torch.no_grad():
        result = rewriting.rewrite_graph(module)
        assert len(result.plans) == 1, result.sites
        pairs = zip(flat(module(*inputs.values())), flat(program(*inputs.values())), strict=True)
        assert all(ours.shape == theirs.shape and relative(ours, theirs) < 1e-6 for ours, theirs in pairs)


def flat(results):
    return results if isinstance(results, (list, tuple)) else (results,)


# --- the parts of programs ------------------------------------------------------------------------------


def expert(rows, up, down):
    return F.linear(F.silu(F.linear(rows, up)), down)


def loop(between=lambda e, s: None, after=lambda s: s["out"], before=lambda s: s["x"]):
    """A loop over the rows of each expert, with other steps in it."""

    def program(x, scores, up, down, *others):
        s = {"x": x, "scores": scores, "out": torch.zeros_like(x), "others": others}
        s["w"], s["ids"] = scores.topk(K)
        s["rows"] = before(s)
        for e in range(E):
            s["token"], s["slot"] = torch.where(s["ids"] == e)
            s["y"] = expert(s["rows"][s["token"]], up[e], down[e])
            s["out"] = s["out"].index_add(0, s["token"], s["y"] * s["w"][s["token"], s["slot"], None])
            between(e, s)
        return after(s)

    return program


def in_place(between=lambda e, s: None, buffer=torch.zeros_like, view=lambda out: out, after=lambda s: s["buffer"]):
    """The same into a buffer, or into a view of it."""

    def program(x, scores, up, down):
        w, ids = scores.topk(K)
        s = {"x": x, "ids": ids, "buffer": buffer(x)}
        s["out"] = view(s["buffer"])
        for e in range(E):
            token, slot = torch.where(ids == e)
            s["out"].index_add_(0, token, expert(x[token], up[e], down[e]) * w[token, slot, None])
            between(e, s)
        return after(s)

    return program


def read_half_way(e, s):
    if e == 1:
        s["seen"] = s["out"] * 2


def turned_half_way(e, s):
    if e == 1:
        s["seen"] = s["out"].t()
        s["out"] = s["seen"].t()


@torch.library.custom_op("moe_compile_tests::counted", mutates_args=("state",))
def counted(w: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state += 1
    return w * state


@counted.register_fake
def _(w: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(w)


def in_shape_of(mould, after=lambda out, made: out):
    """``mould(w)``: the weights of the pairs, and a tensor of which the layer reads the shape alone."""

    def program(x, scores, up, down):
        w, ids = scores.topk(K)
        (w, shape, *made), out = mould(w), torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where((ids == e).expand_as(shape))
            out = out.index_add(0, token, expert(x[token], up[e], down[e]) * w[token, slot, None])
        return after(out, [shape, *made])

    return program


def doubled(w):
    """The weights as they are once the second tensor was computed."""
    copy = w.clone()
    return copy.view(-1, K), copy.mul_(2)


def counting(w):
    state = torch.zeros(1)
    return w, counted(w, state), state


def in_double(x, scores, up, down):
    w, ids = scores.topk(K)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        h = F.silu(F.linear(x[token], up[e]).double()).to(x.dtype)
        out = out.index_add(0, token, F.linear(h, down[e]) * w[token, slot, None])
    return out


LEFT = {
    "its weights are written by what has the right shape": (
        in_shape_of(doubled), "MC204: clone, which the layer reads, is written inside"),
    "what has the right shape is used elsewhere": (
        in_shape_of(counting, lambda out, made: (out, made[0] * 2)), "MC204: counted is written in place and used"),
    "what has the right shape changes a state": (
        in_shape_of(counting, lambda out, made: (out, made[1] * 2)), "MC204: zeros looks into a buffer"),
    "a step in float64": (in_double, "MC401: silu"),
    "the sum is read half-way": (in_place(read_half_way, after=lambda s: (s["out"], s["seen"])), "MC203"),
    "a transposed view from half-way is read later": (
        in_place(turned_half_way, after=lambda s: (s["out"], s["seen"] * 2)), "MC203"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_is_left_alone(name):
    program, reason = LEFT[name]
    assert refused(program).startswith(reason)


def test_a_product_inside_is_used_elsewhere():
    """Only its size matters to the layer; still it would be computed for nobody else."""

    def program(x, scores, up, down, square):
        w, ids = scores.topk(K)
        product, out = ids @ square, torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where((ids == e).expand_as(product))
            out = out.index_add(0, token, expert(x[token], up[e], down[e]) * w[token, slot, None])
        return out, product

    assert refused(program, inputs_of(square=torch.ones(K, K, dtype=torch.int64))).startswith("MC203: matmul")


def test_assertions_about_numbers_are_no_checks_of_sizes():
    module = traced(lambda x: torch._assert_async(x.sum() > 0), {"x": random(3)})
    (compared,) = (n for n in module.graph.nodes if n.target is torch.ops.aten.gt.Scalar)
    assert list(compared.users) and not legality.is_size_check(compared)


def test_numbers_whose_sizes_are_checked_are_no_checks_of_sizes():
    module = traced(lambda x: torch.ops.aten._assert_tensor_metadata(x + 1), {"x": random(3)})
    added, check = (n for n in module.graph.nodes if n.op == "call_function")
    assert legality.is_size_check(check) and not legality.is_size_check(added)


# --- a projection that all experts share -----------------------------------------------------------------


def copies(x):
    return x[:, None].expand(T, K, H)


def weighted_copies(x, scores, up, down, shared_parameter):
    """The projection of every slot, and its sum under the weights of expert 0: all of it has one expression."""
    w, ids = scores.topk(K)
    other = (F.linear(copies(x), shared_parameter) * ((ids == 0) * w)[..., None]).sum(1)
    h, out = F.linear(copies(x), shared_parameter), torch.zeros_like(x)
    for e in range(E):
        out = out + (expert(h, up[e], down[e]) * ((ids == e) * w)[..., None]).sum(1)
    return out, other


def weighted_projection(x, scores, up, down, shared_parameter):
    w, ids = scores.topk(K)
    other = F.linear(x * (w * (ids == 0)).sum(-1, keepdim=True), shared_parameter)
    h, out = F.linear(x, shared_parameter), torch.zeros_like(x)
    for e in range(E):
        out = out + expert(h, up[e], down[e]) * (w * (ids == e)).sum(-1, keepdim=True)
    return out, other


def test_the_projection_of_weighted_inputs_is_another_than_that_of_the_inputs():
    inputs = inputs_of(shared_parameter=random(H, H))
    assert_replaced(traced(weighted_projection, inputs), weighted_projection, inputs)


def test_a_weighted_sum_of_projections_is_no_projection():
    assert refused(weighted_copies, inputs_of(shared_parameter=random(H, H))).startswith("MC202")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast(device):
    module, before = traced(loop(), inputs_of()), torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        assert reasons(module).startswith("MC211")
    finally:
        torch.set_autocast_enabled(device, before)


# --- graphs of larger steps: the layer, or a part of it, inside one node ------------------------------------


class Steps:
    """A graph of calls of Python functions, which the canonical copy looks into."""

    def __init__(self, inputs, dynamic=()):
        self.graph, mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())
        self.inputs = {}
        for name, tensor in inputs.items():
            sizes = [DimDynamic.DUCK if (name, d) in dynamic else DimDynamic.STATIC for d in range(tensor.dim())]
            node = self.graph.placeholder(name)
            node.meta["val"] = mode.from_tensor(
                tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))  # fmt: skip
            self.inputs[name] = node

    def call(self, function, *args, results=1):
        node = self.graph.call_function(function, args)
        return node if results == 1 else [self.graph.call_function(operator.getitem, (node, i)) for i in range(results)]

    def done(self, *results, history=True):
        """The module; a node that says nothing of itself leaves no trace in the copy (``history``)."""
        self.graph.output(results if len(results) > 1 else results[0])
        for node in self.graph.nodes if history else ():
            node.meta["stack_trace"] = node.name
        return fx.GraphModule({}, self.graph)


def add_into(out, x, w, ids, up, down):
    for e in range(E):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, expert(x[token], up[e], down[e]) * w[token, slot, None])
    return out


def added(x, *others):
    return add_into(torch.zeros_like(x), x, *others)


def test_a_number_among_the_inputs_needs_no_gradient():
    steps = Steps(inputs_of(), {("x", 0), ("scores", 0)})
    x, scores, up, down = steps.inputs.values()
    with steps.graph.inserting_before(x):
        count = steps.graph.placeholder("count")
    count.meta["val"] = x.meta["val"].shape[0]
    w, ids = steps.call(torch.topk, scores, K, results=2)
    module = steps.done(steps.call(added, x, steps.call(torch.mul, w, count), ids, up, down))
    with torch.enable_grad():
        result = rewriting._analyse(module)
    assert len(result.plans) == 1, result.sites


def test_a_layer_and_its_routing_in_one_step():
    steps = Steps(inputs_of())
    x, scores, up, down = steps.inputs.values()

    def topk_and_layer(x, scores, up, down):
        w, ids = scores.topk(K)
        return added(x, w, ids, up, down), w, ids

    module = steps.done(*steps.call(topk_and_layer, x, scores, up, down, results=3))
    assert "comes after the layer's output" in reasons(module)


def in_steps(function, results=1, history=True):
    inputs = inputs_of()
    steps = Steps(inputs)
    x, scores, up, down = steps.inputs.values()
    w, ids = steps.call(torch.topk, scores, K, results=2)
    made = steps.call(function, x, w, ids, up, down, results=results)
    return steps.done(*(made if results > 1 else [made]), history=history), inputs


def test_a_layer_that_is_one_of_two_results():
    def both(x, w, ids, up, down):
        return added(x, w, ids, up, down), w.sum()

    module, inputs = in_steps(both, results=2)
    assert_replaced(module, lambda x, scores, up, down: both(x, *scores.topk(K), up, down), inputs)


def twice(x, w, ids, up, down):
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        out = out.index_add(0, token, expert(x[token], up[e], down[e]) * w[token, slot, None])
    return out * 2


@pytest.mark.parametrize("function, history", [(twice, True), (lambda *args: added(*args) * 2, False)])
def test_a_layer_whose_result_stays_inside(function, history):
    module, _ = in_steps(function, history=history)
    assert "exists only inside a composite operation" in reasons(module)


# --- shapes -------------------------------------------------------------------------------------------------


def flat_masks(buffer, view):
    """Tokens in two dimensions, sums into a buffer where they are in others."""

    def program(x, scores, up, down):
        w, ids = scores.topk(K)
        out = buffer(x)
        rows = view(out)
        for e in range(E):
            mask = ids == e
            hit = mask.any(-1)
            rows[hit.view(-1)] += expert(x[hit], up[e], down[e]) * (w * mask).sum(-1)[hit, None]
        return out

    return program


SHAPES = {
    "a last dimension of one": (in_place(
        buffer=lambda x: x.new_zeros(T, H, 1), view=lambda out: out.squeeze(-1)), (T,)),
    "tokens in other dimensions": (
        flat_masks(lambda x: x.new_zeros(3, 2, H), lambda out: out.view(6, H)), (2, 3)),
    "tokens in the same dimensions": (
        flat_masks(lambda x: x.new_zeros(2, 3, H), lambda out: out.view(6, H)), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_result_has_the_shape_of_its_buffer(name):
    program, shape = SHAPES[name]
    inputs = inputs_of(*shape)
    assert_replaced(traced(program, inputs), program, inputs)


@pytest.mark.parametrize("unknown", [1, 2])
def test_a_buffer_in_other_dimensions_than_the_rows_has_one_unknown_size(unknown):
    inputs = {**inputs_of(2, 3), "scores": random(E, H)}
    steps = Steps(inputs, {("x", d) for d in range(unknown)})
    x, router, up, down = steps.inputs.values()

    rows, out = steps.call(torch.reshape, x, (-1, H)), steps.call(torch.zeros_like, x)
    w, ids = steps.call(torch.topk, steps.call(F.linear, rows, router), K, results=2)
    steps.call(add_into, steps.call(torch.Tensor.view, out, -1, H), rows, w, ids, up, down)
    module = steps.done(out)

    def program(x, router, up, down):
        out, rows = torch.zeros_like(x), x.view(-1, H)
        add_into(out.view(-1, H), rows, *F.linear(rows, router).topk(K), up, down)
        return out

    if unknown == 1:
        assert_replaced(module, program, inputs)
    else:
        assert reasons(module).startswith("MC207: the result has shape")


def rows_by_take_along_dim(x, scores, up, down):
    w, ids = scores.topk(K)
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        wide = token[:, None].expand(-1, H)
        y = expert(torch.take_along_dim(x, wide, 0), up[e], down[e])
        out = out.scatter_add(0, wide, y * w[token, slot, None])
    return out


def mask_with_slots_first(x, scores, up, down):
    w, ids = scores.topk(K)
    mask, out = F.one_hot(ids, E).transpose(0, 1).float(), torch.zeros_like(x)
    combine = torch.einsum("kte,tk->te", mask, w)
    for e in range(E):
        out = out + expert(x, up[e], down[e]) * combine[:, e, None]
    return out


@pytest.mark.parametrize(
    "program", [pytest.param(rows_by_take_along_dim, marks=traces_take_along_dim), mask_with_slots_first]
)
def test_other_spellings(program):
    inputs = inputs_of()
    assert_replaced(traced(program, inputs), program, inputs)


def test_an_activation_of_its_own_between_weighted_inputs():
    """The router weight is applied once, before the experts."""

    def program(x, scores, up, down):
        w, ids = scores.topk(K)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            h = torch.cos(F.linear(x[token] * w[token, slot, None], up[e]))
            out = out.index_add(0, token, F.linear(h, down[e]))
        return out

    inputs = inputs_of()
    assert_replaced(traced(program, inputs), program, inputs)
