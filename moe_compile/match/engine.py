"""One forward pass over a canonical graph that gives every node its fact.

Rules are small functions in tables (``overload -> rule``): ``rule(engine, node) -> Fact | None``. ``None`` means "says
nothing"; ``NoMatch`` means "this was part of an MoE layer until here, and here is why it no longer is". In-place
operations are followed in program order: a write gives its buffer a new version and a new fact and forgets the facts of
every other view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..canonical import Canonical, shape_of, tensor_inputs, value
from ..spec import NoMatch
from ..torch_compat import storage_of
from .facts import Ids, Leaf, Sum, Val
from .labels import same
from .nodes import FLAT_VIEWS, VIEWS, aten, holds_ids, is_getitem_of_view, is_pure, mutated, writes, written

Rule = Callable[["Engine", fx.Node], Any]
Rules = Mapping[Any, Rule]


@dataclass(frozen=True)
class Miss:
    """A refused step: how far the proof came, and on which routing decision."""

    error: NoMatch
    node: fx.Node
    position: int
    ids: Leaf | None


class Engine:
    """Facts of one graph. ``fact(node)`` is the fact as of now (after the writes so far)."""

    def __init__(
        self, copy: Canonical, tables: Iterable[Rules], fallbacks: Callable[[Any], tuple[Rule, ...]] = lambda _: ()
    ) -> None:
        self.copy = copy
        self.fallbacks = fallbacks
        self.rules: dict[Any, list[Rule]] = {}
        for table in tables:
            for target, rule in table.items():
                self.rules.setdefault(target, []).append(rule)
        self.facts: dict[fx.Node, Any] = {}
        self.position: dict[fx.Node, int] = {}
        self.misses: list[Miss] = []
        self.sums: list[tuple[fx.Node, Sum]] = []
        self.made: dict[Any, fx.Node] = {}  # (input, weights, expression) -> the node that holds its value
        self.ids: dict[fx.Node, fx.Node] = {}  # leaf -> the first node that used it as expert ids
        self.loops: list[Any] = []  # loops that were traced for two experts (match.shrunk.Loop)
        self.marks: list[Any] = []  # what rewritten loops assumed: (mark, kind, numbers, evidence, its fact)
        self._base: dict[fx.Node, fx.Node] = {}
        self._storages: dict[int, fx.Node] = {}  # memory -> the node that owns it
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._versions: dict[fx.Node, int] = {}
        self._written: dict[fx.Node, list[int]] = {}
        self.first_facts: dict[fx.Node, Any] = {}
        self._param: dict[fx.Node, bool] = {}
        self._number: dict[fx.Node, fx.Node] = {}
        self.pieces: dict[tuple[fx.Node, int], dict[int, Val]] = {}  # (buffer, version) -> expert -> assigned rows
        self._values: dict[Any, fx.Node] = {}

    # -------------------------------------------------------------------------------------- running

    def run(self) -> Engine:
        """Give every node its fact, in program order."""
        for i, node in enumerate(self.copy.graph.nodes):
            self.position[node] = i
            if node.op == "placeholder" or node.op == "get_attr":
                self._own(node, None)
            elif node.op == "call_function":
                self._step(node)
        return self

    def _step(self, node: fx.Node) -> None:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        self._own(node, first)
        fact = self._apply(node)
        for target in mutated(node):
            if target is first and writes(node.target):
                self._write(target, node, fact)
            else:
                self._overwrite(target, node)
        self._set(node, fact)

    def _own(self, node: fx.Node, first: fx.Node | None) -> None:
        """Find the memory of a node: that of an earlier one with the same storage, or what its op may share."""
        base = node
        if first is not None and (node.target in VIEWS or is_getitem_of_view(node)):
            base = self.base(first)
        storage = storage_of(value(node))
        if storage is not None:
            base = self._storages.setdefault(storage, base)
        if base is not node:
            self._base[node] = base
            self._views.setdefault(base, []).append(node)

    def _apply(self, node: fx.Node) -> Any:
        for rule in (*self.rules.get(node.target, ()), *self.fallbacks(node.target)):
            try:
                fact = rule(self, node)
            except NoMatch as error:
                error.node = error.node if error.node is not None else node
                self.miss(error, node)
                continue
            if fact is not None:
                return fact
        return None

    def _set(self, node: fx.Node, fact: Any) -> None:
        if fact is None:
            self.facts.pop(node, None)
            return
        self.facts[node] = fact
        self.first_facts[node] = fact
        if isinstance(fact, Sum):
            self.sums.append((node, fact))
        elif isinstance(fact, Val) and _is_plain(fact):
            self.made.setdefault((fact.x, fact.slots, fact.expr), node)

    def _overwrite(self, target: fx.Node, write: fx.Node) -> None:
        """A new version of the memory of ``target``, of which nothing is known."""
        base = self.base(target)
        self._versions[base] = self._versions.get(base, 0) + 1
        self._written.setdefault(base, []).append(self.position[write])
        for other in [base, *self._views.get(base, [])]:
            self.facts.pop(other, None)

    def _write(self, target: fx.Node, write: fx.Node, fact: Any) -> None:
        self._overwrite(target, write)
        base = self.base(target)
        # The write's result, and any later read through the written node, have the new fact.
        self._base[write] = base
        self._views.setdefault(base, []).append(write)
        if fact is not None and (target is base or self.same_view(target, base)):
            self.facts[target] = fact

    def same_view(self, node: fx.Node, base: fx.Node) -> bool:
        """Whether ``node`` is ``base`` after writes to the whole of it."""
        return written(node) is base

    # -------------------------------------------------------------------------------------- reading

    def base(self, node: fx.Node) -> fx.Node:
        """The node that owns the memory of ``node``."""
        return self._base.get(node, node)

    def fact(self, node: Any) -> Any:
        """The fact of a node as of now, or None."""
        return self.facts.get(node) if isinstance(node, fx.Node) else None

    def leaf(self, node: fx.Node) -> Leaf:
        """A node as a border value: its buffer must not be written after this read.

        Equal computations (``w * w`` once per expert) are one border value.
        """
        node = self.representative(node)
        return Leaf(node, self._versions.get(self.base(node), 0))

    def representative(self, node: fx.Node) -> fx.Node:
        """The first node that computes the same from the same values, as long as neither was written."""
        if node not in self._number:
            self._number[node] = node
            if node.op == "call_function" and is_pure(node.target):
                at = self.position[node]
                key = (node.target, self._key(node.args, at), self._key(node.kwargs, at))
                self._number[node] = self._values.setdefault(key, node)
        first = self._number[node]
        return first if first is node or not (self.version(first) or self.version(node)) else node

    def _key(self, args: Any, at: int) -> Any:
        """Arguments as they were at a position: the same node holds something else once it was written."""
        if isinstance(args, fx.Node):
            return self.representative(args), self.writes_before(args, at)
        if isinstance(args, (list, tuple)):
            return tuple(self._key(a, at) for a in args)
        if isinstance(args, dict):
            return tuple((k, self._key(v, at)) for k, v in sorted(args.items()))
        return args if not isinstance(args, slice) else repr(args)

    def leaf_at(self, node: fx.Node) -> Leaf:
        """``node`` as a border value as it was when it was computed."""
        return Leaf(node, self.writes_before(node, self.position[node] + 1))

    def writes_before(self, node: fx.Node, position: int) -> int:
        """Number of writes to the memory of ``node`` before a position."""
        return sum(at < position for at in self._written.get(self.base(node), ()))

    def views(self, base: fx.Node) -> list[fx.Node]:
        """Every node that shares the memory of ``base``."""
        return self._views.get(base, [])

    def version(self, node: fx.Node) -> int:
        """Number of writes so far to the memory of ``node``."""
        return self._versions.get(self.base(node), 0)

    def ids_leaf(self, node: fx.Node, user: fx.Node) -> Leaf:
        """``node`` as the expert ids that ``user`` reads: a candidate for a layer starts here."""
        node = self.strip(node)
        self.ids.setdefault(node, user)
        return self.leaf(node)

    def flat_leaf(self, node: fx.Node) -> Leaf:
        """``leaf`` of what lies under views that keep the row-major order: the lowering reshapes anyway."""
        while isinstance(source := node.args[0] if node.args else None, fx.Node):
            whole = node.target is aten.slice.Tensor and shape_of(node) == shape_of(source)
            if node.target is aten.select.int:  # the only index of a dimension
                whole = same(shape_of(source)[int(node.args[1])], 1)  # type: ignore[arg-type]
            if (node.target not in FLAT_VIEWS and not whole) or not self.unchanged(node):
                break
            node = source
        return self.leaf(node)

    def unchanged(self, node: fx.Node) -> bool:
        """Whether a (possibly copying) view still holds the elements of its source as the source is now."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if self.base(node) is not self.base(source) and self.version(node):
            return False
        return self.writes_before(source, self.position[node]) == self.version(source)

    def strip(self, node: fx.Node) -> fx.Node:
        """Through integer casts and copies, which change no id."""
        while (
            node.target
            in (
                aten.to.dtype,
                aten.clone.default,
                aten.contiguous.default,
                aten.detach.default,
                aten.alias.default,
                aten.to.dtype_layout,
                aten.to.device,
            )
            and isinstance(node.args[0], fx.Node)
            and holds_ids(node.args[0])
            and holds_ids(node)
            and self.unchanged(node)
        ):
            node = node.args[0]
        return node

    def is_param(self, node: fx.Node) -> bool:
        """Whether a node depends on nothing but module parameters and buffers (through any operations)."""
        known = self._param.get(node)
        if known is None:
            if node.op == "placeholder":
                known = _is_parameter(self.copy, node)
            elif node.op == "get_attr":
                known = True
            else:
                inputs = tensor_inputs(node)
                known = bool(inputs) and all(self.is_param(i) for i in inputs)
            self._param[node] = known
        return known

    def miss(self, error: NoMatch, node: fx.Node) -> None:
        """Remember a refusal for the report."""
        self.misses.append(Miss(error, node, self.position[node], self._routing_of(node)))

    def _routing_of(self, node: fx.Node) -> Leaf | None:
        for arg in tensor_inputs(node):
            found = ids_of(self.fact(arg))
            if found is not None:
                return found
        return None


def _is_plain(val: Val) -> bool:
    """Whether a value stands once for every token, in their order, and nothing was weighted."""
    order = [a.name for d in val.dims for a in d]
    once = order == [*sorted(n for n in order if n.startswith("t")), "f"]
    return once and val.rows is None and val.gate is None and val.gate_in is None


def ids_of(fact: Any) -> Leaf | None:
    """The routing decision that a fact speaks of."""
    if isinstance(fact, Ids):
        return fact.leaf
    found = getattr(fact, "ids", None)
    if isinstance(found, Leaf):
        return found
    rows = getattr(fact, "rows", None)
    if rows is not None:
        return rows.ids
    if isinstance(fact, Sum):
        for part in fact.parts:
            if part.gate is not None:
                return part.gate.ids
            return ids_of(part.val)
    for name in ("gate", "gate_in"):
        if getattr(fact, name, None) is not None:
            return getattr(fact, name).ids
    for slot in getattr(fact, "slots", ()):
        if slot.weight.ids is not None:
            return slot.weight.ids
    return None


def _is_parameter(copy: Canonical, node: fx.Node) -> bool:
    origin = copy.origin(node)
    if origin is None:
        return False
    if (
        "parameter" in origin.name
        or "buffer" in origin.name
        or (isinstance(origin.type, type) and issubclass(origin.type, torch.nn.Parameter))
    ):
        return True
    val = value(node)
    return isinstance(val, torch.nn.Parameter)
