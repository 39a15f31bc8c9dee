"""A graph in any vocabulary -> a read-only pre-dispatch ATen copy with a map back to the real graph.

The copy has one small vocabulary (``linear``, ``softmax.int``, ``topk``, ``index_add_``, ``einsum`` ...) that is
the same for Dynamo graphs of torch 2.11 to 2.15 and for ``torch.export``. It is only read: rewriting happens on the
original graph (``lower.py``). In-place operations stay in place; ``match.facts`` follows them in program order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from . import torch_compat
from .spec import NoMatch

PLAIN_TENSORS = ("FakeTensor", "Tensor", "Parameter")


@dataclass
class Canonical:
    """``graph`` is the copy; ``origins[node]`` are the nodes of the original whose value ``node`` computes.

    ``refusal`` says why there is no copy (``graph`` is then empty).
    """

    module: fx.GraphModule
    origins: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    first_origin: dict[fx.Node, fx.Node] = field(default_factory=dict)
    refusal: NoMatch | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def origin(self, node: fx.Node) -> fx.Node | None:
        """The first original node that has exactly the value of ``node``, or None."""
        found = self.origins.get(node)
        return found[0] if found else None


def canonicalise(gm: fx.GraphModule) -> Canonical:
    """Trace ``gm`` (whose placeholders carry fake values) into its canonical copy.

    A graph with something that cannot be traced has no copy but a refusal. Raises whatever else tracing raises: the
    caller reports it and leaves the graph alone.
    """
    values = [placeholder_value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    pairs: list[tuple[fx.Node, Any]] = []
    try:
        module = torch_compat.trace_pre_dispatch(gm, values, lambda node, result: pairs.append((node, result)))
    except Exception:  # tracing runs user code, which may raise anything
        refusal = _untraceable(gm)
        if refusal is None:
            raise
        empty = fx.Graph()
        empty.output(None)
        return Canonical(fx.GraphModule({}, empty), refusal=refusal)
    copy = Canonical(module)
    by_name = {n.name: n for n in gm.graph.nodes}
    for original, result in pairs:
        if isinstance(result, fx.Node):
            copy.origins.setdefault(result, []).append(original)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    originals = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for new, old in zip(placeholders, originals, strict=True):
        copy.origins[new] = [old, *(n for n in copy.origins.get(new, []) if n is not old)]
    for node in module.graph.nodes:
        history = node.meta.get("from_node")
        if history and history[-1].name in by_name:
            copy.first_origin[node] = by_name[history[-1].name]
    return copy


def _untraceable(gm: fx.GraphModule) -> NoMatch | None:
    """What of a graph is known not to be traced a second time: checkpoint regions and tensor subclasses."""
    for node in gm.graph.nodes:
        if "checkpoint" in str(node.target) and isinstance(node.target, torch._ops.HigherOrderOperator):
            return NoMatch("MC216", "a region of the graph is checkpointed (torch.utils.checkpoint)", node)
    for node in gm.graph.nodes:
        kind = type(placeholder_value(node)) if node.op == "placeholder" else torch.Tensor
        if issubclass(kind, torch.Tensor) and kind.__name__ not in PLAIN_TENSORS:
            return NoMatch("MC402", f"{node.name} is a {kind.__name__}", next(iter(node.users), node))
    return None


def placeholder_value(node: fx.Node) -> Any:
    """The fake value of a placeholder in Dynamo's (``example_value``) or in an ATen graph (``val``)."""
    return node.meta["example_value"] if "example_value" in node.meta else node.meta.get("val")


def value(node: fx.Node) -> Any:
    """The fake value that a canonical node computes."""
    return node.meta.get("val")


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The (possibly symbolic) shape of a canonical node; () when it is no tensor."""
    val = value(node)
    return tuple(known_size(s) for s in val.shape) if isinstance(val, torch.Tensor) else ()


def known_size(size: Any) -> Any:
    """A size as an int where a guard has fixed its symbol (``dynamic=True`` makes every input size a symbol)."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """All nodes among the arguments of ``node``, lists and tuples included."""
    return [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
