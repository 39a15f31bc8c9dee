"""A proved layer -> one op call on the ORIGINAL graph. The only file that mutates a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import ops as ops  # the calls made here need the ops to be registered
from .canonical import shape_of, value
from .layout import is_row_major
from .legality import is_size_check
from .loops import marks
from .match.expert import Handle
from .match.facts import Leaf
from .match.fp8 import ScaleHandle
from .match.labels import same
from .ops.schema import BELOW_AUTOGRAD
from .planning import Plan, alike
from .quantize import BLOCK
from .routers import Chain
from .spec import Weight


def lower(p: Plan) -> fx.Node:
    """Insert the op after the layer's output, redirect its users and remove what is dead. Cannot refuse."""
    graph, found = p.output.graph, p.found
    before = {n: i for i, n in enumerate(graph.nodes)}
    end = before[p.output]
    with graph.inserting_after(p.output):
        cursor = _Cursor(graph, p.output)
        result = _call(cursor, p)
        if found.base is not None:
            result = cursor.call(torch.add, (p.leaves[found.base], result))
        if not is_row_major(p.order):
            rows = cursor.call(torch.Tensor.contiguous, (cursor.call(torch.permute, (result, p.order)),))
            result = cursor.call(torch.permute, (rows, tuple(p.order.index(d) for d in range(len(p.order)))))
    new = cursor.made
    for alias, shape in p.aliases.items():
        later = [user for user in alias.users if user not in new and before[user] > end]
        whole = alike(shape, shape_of(found.output))  # else the layer wrote through a flat view of this buffer
        value = result if whole or not later else _shaped(cursor, result, shape, p)
        for user in later:
            user.replace_input_with(alias, value)
    _erase(graph, p, new)
    return result


class _Cursor:
    """Appends nodes one after the other, with the provenance of the output they replace."""

    def __init__(self, graph: fx.Graph, after: fx.Node) -> None:
        self.graph, self.at, self.source = graph, after, after
        self.made: set[fx.Node] = set()

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        with self.graph.inserting_after(self.at):
            node = self.graph.call_function(target, args, kwargs or {})
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.source.meta:
                node.meta[key] = self.source.meta[key]
        self.at = node
        self.made.add(node)
        return node


def _call(c: _Cursor, p: Plan) -> fx.Node:
    """The op call (or the sequence around a custom activation), in the shape of the original output."""
    moe, namespace = p.found.moe, torch.ops.moe_compile
    ex, leaves = moe.experts, p.leaves
    x_shape, out_shape = shape_of(moe.hidden_states.node), shape_of(p.found.output)
    x = leaves[moe.hidden_states]
    flat = x if len(x_shape) == 2 else c.call(torch.reshape, (x, (-1, ex.hidden_size)))
    ids = leaves[moe.topk_ids]
    if len(shape_of(moe.topk_ids.node)) != 2:
        ids = c.call(torch.reshape, (ids, (-1, moe.top_k)))
    weights = _router(c, p, ids)
    w1, w3, w2, b1, b3, b2 = (_role(c, w, leaves) for w in (ex.w1, ex.w3, ex.w2, ex.b1, ex.b3, ex.b2))
    if ex.fp8 and ex.activation is not None:
        out = _fp8(c, p, flat, weights, ids, [*w1, *w3, *w2])
    elif ex.activation is not None:
        out = c.call(
            namespace.experts.default,
            (flat, weights, ids, w1, w3, w2, b1, b3, b2, ex.activation.name, ex.activation.args(), ex.activation.gated),
            {"interleaved": ex.interleaved, "weight_on_input": moe.weight_on_input, "out_dtype": moe.out_dtype},
        )
    else:
        out = _custom(c, p, flat, ids, weights, (w1, w3, w2, b1, b3, b2))
    return out if len(out_shape) == 2 else _shaped(c, out, out_shape, p)


def _fp8(c: _Cursor, p: Plan, x: fx.Node, weights: fx.Node, ids: fx.Node, matrices: list[fx.Node]) -> fx.Node:
    """The op of fp8 weights; rows stay as they are, as in the program."""
    moe = p.found.moe
    ex, act = moe.experts, moe.experts.activation
    assert act is not None
    sizes = {"w1": ex.intermediate_size * (2 if act.gated and ex.w3 is None else 1), "w3": ex.intermediate_size}
    args: list[fx.Node] = []
    for name, role in (("w1", ex.w1), ("w3", ex.w3), ("w2", ex.w2)):
        if role is not None:
            out, inner = sizes.get(name, ex.hidden_size), ex.intermediate_size if name == "w2" else ex.hidden_size
            args += [matrices[len(args) // 2], _scale(c, role, p.leaves, (ex.num_experts, out, inner))]
    apart = {"w3": args[2], "w3_scale": args[3]} if ex.w3 is not None else {}
    return c.call(
        torch.ops.moe_compile.experts_fp8.default,
        (x, weights, ids, *args[:2], *args[-2:], act.name, act.args(), act.gated),
        {
            "interleaved": ex.interleaved, "weight_on_input": moe.weight_on_input, "quantise": False,
            "out_dtype": moe.out_dtype, **apart,
        },
    )  # fmt: skip


def _scale(c: _Cursor, weight: Weight, leaves: dict[Leaf, fx.Node], sizes: tuple[int, int, int]) -> fx.Node:
    """The scales of a role as the op takes them: one per block of 128 x 128 (copies without memory where fewer are
    stored), or one per output channel."""
    assert weight.scale is not None
    handle: ScaleHandle = weight.scale.part
    experts, out, inner = sizes
    stored = value(handle.leaf.node)
    node = leaves[handle.leaf]
    if stored.dtype != torch.float32:
        node = c.call(torch.Tensor.to, (node, torch.float32))
    counted = [d for d in handle.axes if d is not None]
    others = [d for d in range(stored.dim()) if d not in counted]  # each of one element
    if [*others, *counted] != list(range(stored.dim())):
        node = c.call(torch.permute, (node, (*others, *counted)))
    shape = tuple(1 if d is None else int(stored.shape[d]) for d in handle.axes)
    node = c.call(torch.reshape, (node, shape))
    if handle.cut is not None:
        node = c.call(operator.getitem, (node, (slice(None), slice(*handle.cut))))
    rows, columns = (-(-size // block) for size, block in zip((out, inner), BLOCK, strict=True))
    if weight.scale.block[0] == 1 < out:
        rows, columns = out, 1
    return c.call(torch.Tensor.expand, (node, (experts, rows, columns)))


def _shaped(c: _Cursor, result: fx.Node, shape: Any, p: Plan) -> fx.Node:
    """The result ``[T, H]`` in another shape of as many elements; ``shape_is_restorable`` was asked before."""
    hidden = p.found.moe.hidden_states
    if alike(shape, shape_of(hidden.node)):
        return c.call(torch.Tensor.view_as, (result, p.leaves[hidden]))
    return c.call(torch.reshape, (result, tuple(s if isinstance(s, int) else -1 for s in shape)))


def _router(c: _Cursor, p: Plan, ids: fx.Node) -> fx.Node:
    """The router weights ``[T, K]``; ones where the layer has none."""
    moe = p.found.moe
    if moe.topk_weights is None:
        return c.call(torch.ones_like, (ids,), {"dtype": value(moe.hidden_states.node).dtype})
    node, shape = p.leaves[moe.topk_weights.leaf], shape_of(moe.topk_weights.leaf.node)
    if moe.topk_weights.dense:
        wide = node if len(shape) == 2 else c.call(torch.reshape, (node, (-1, shape[-1])))
        node = c.call(torch.gather, (wide, 1, c.call(torch.Tensor.to, (ids, torch.int64))))
    elif len(shape) != 2 or not same(shape[1], moe.top_k):
        node = c.call(torch.reshape, (node, (-1, moe.top_k)))
    for target, *args in moe.topk_weights.steps:
        node = c.call(target, (node, *args))
    return node


def _role(c: _Cursor, weight: Weight | None, leaves: dict[Leaf, fx.Node]) -> list[fx.Node]:
    """The tensors of one role as ``[.., out, in]`` views."""
    if weight is None:
        return []
    out = []
    for handle in weight.parts:
        node = _cut(c, handle, leaves[handle.leaf], weight.stacked)
        if weight.transposed:
            node = c.call(torch.transpose, (node, -2, -1))
        out.append(node)
    return out


def _cut(c: _Cursor, handle: Handle, node: fx.Node, stacked: bool) -> fx.Node:
    if handle.cut is None:
        return node
    name, start, stop, step = handle.cut
    dim = int(stacked) + (name == "w1")
    index = (*[slice(None)] * dim, slice(start, stop, step))
    return c.call(operator.getitem, (node, index))


def _custom(c: _Cursor, p: Plan, x: fx.Node, ids: fx.Node, weights: fx.Node, roles: Any) -> fx.Node:
    """Sort, gather, GEMM, the user's own row-wise expression in fp32 or better, GEMM, combine."""
    moe, namespace = p.found.moe, torch.ops.moe_compile
    w1, w3, w2, b1, b3, b2 = roles
    dtype = value(moe.hidden_states.node).dtype
    wide = torch.promote_types(dtype, torch.float32)
    pairs = c.call(namespace.sort_pairs.default, (ids, moe.experts.num_experts))
    order = c.call(operator.getitem, (pairs, 0))
    offsets = c.call(operator.getitem, (pairs, 1))
    tokens = c.call(torch.floor_divide, (order, moe.top_k))
    rows = c.call(torch.index_select, (x, 0, tokens))
    if moe.weight_on_input:
        flat = c.call(torch.reshape, (weights, (-1, 1)))
        picked = c.call(torch.index_select, (flat, 0, order))
        rows = c.call(torch.Tensor.to, (c.call(torch.mul, (rows, picked)), dtype))
    middle, inner = moe.experts.custom
    made: dict[Any, fx.Node] = {}
    for expr, w, b in zip(inner, (w1, w3), (b1, b3), strict=False):
        h = c.call(namespace.grouped_linear.default, (rows, w, b, offsets))
        made[expr] = c.call(torch.Tensor.to, (h, wide))
    h = c.call(torch.Tensor.to, (_emit(c, middle, made), dtype))
    y = c.call(namespace.grouped_linear.default, (h, w2, b2, offsets))
    scale = None if moe.weight_on_input else weights
    return c.call(namespace.combine.default, (y, order, offsets, scale, moe.top_k), {"out_dtype": moe.out_dtype})


def _emit(c: _Cursor, expr: Any, made: dict[Any, fx.Node]) -> Any:
    if expr in made:
        return made[expr]
    if expr[0] == "const":
        return expr[1]
    if expr[0] == "cut":
        _, start, stop, step, inner = expr
        node = c.call(operator.getitem, (_emit(c, inner, made), (Ellipsis, slice(start, stop, step))))
    else:
        _, target, args, kwargs = expr
        node = c.call(target, tuple(_emit(c, a, made) for a in args), dict(kwargs))
    made[expr] = node
    return node


def fuse_router(chain: Chain) -> None:
    """Replace a proved router in Inductor's graph by one op; what else reads its scores keeps them."""
    graph, router = chain.topk.graph, chain.router
    weights, ids = chain.weights.meta["val"], chain.ids.meta["val"]
    arguments = (chain.logits, chain.top_k, router.score, router.renormalise, router.eps, router.scale, weights.dtype)
    with graph.inserting_before(chain.topk):
        both = graph.call_function(torch.ops.moe_compile.route.default, arguments)
        both.meta["val"] = (torch.empty_like(weights), torch.empty_like(ids))
        for i, old in enumerate((chain.weights, chain.ids)):
            new = graph.call_function(operator.getitem, (both, i))
            new.meta["val"] = both.meta["val"][i]
            old.replace_all_uses_with(new)
    todo = [chain.weights, chain.ids]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and not node.users and not node._erased:
            todo += node.all_input_nodes
            graph.erase_node(node)


def leave_autograd(graph: fx.Graph) -> None:
    """Call the inner form of our ops: in Inductor's graph nothing asks for gradients any more."""
    for op, inner in BELOW_AUTOGRAD.items():
        for node in graph.find_nodes(op="call_function", target=op):
            node.target = inner


def has_marks(gm: fx.GraphModule) -> bool:
    """Whether a graph holds what rewritten loops assumed (``loops.marks``): it cannot run like that."""
    return any(node.target in marks.OPS for node in gm.graph.nodes)


def erase_marks(graph: fx.Graph) -> None:
    """Remove proved assumptions, and what was computed for them alone."""
    todo: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.target is marks.mark:
            todo += node.all_input_nodes
            graph.erase_node(node)
    while todo:
        node = todo.pop()
        unused = all(is_size_check(user) for user in node.users)
        if node.op in ("call_function", "call_method") and unused and not _writes(node) and not node._erased:
            todo += node.all_input_nodes
            _erase_with_users(graph, node)


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph changes something in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith("__i") or name in ("setitem", "__setitem__", "iadd", "imul", "isub", "itruediv")


def _erase(graph: fx.Graph, p: Plan, new: set[fx.Node]) -> None:
    """Remove the inside of the layer, and the size assertions that hang on nothing else."""
    dead = set(p.dead)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if inputs and all(i in dead for i in inputs) and (node.target is operator.getitem or is_size_check(node)):
            dead.add(node)
    for node in reversed(graph.nodes):
        if node in dead and node not in new and not node.users:
            graph.erase_node(node)
