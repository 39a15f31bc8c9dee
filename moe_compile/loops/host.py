"""Numbers that a function fetches from the device: index lists, counts, offsets into rows in expert order."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from typing import Protocol

from . import syntax
from .emit import HELPERS, at_place, call, number, read


class Names(Protocol):
    """What is read and noted of the function around (``rewriting.Function``)."""

    tree: ast.FunctionDef
    origins: dict[str, list[ast.expr]]
    host: set[str]
    listed: set[str]
    changed: bool


def counted(iterated: ast.expr, host: set[str]) -> ast.expr | None:
    """``counts`` of ``enumerate(counts)`` when these are numbers fetched to the host."""
    if not isinstance(iterated, ast.Call) or getattr(iterated.func, "id", "") != "enumerate":
        return None
    counts = iterated.args[0] if len(iterated.args) == 1 else None
    return counts if isinstance(counts, ast.Name) and counts.id in host else None


class Host:
    """Names for numbers fetched from the device: index lists become tensors again, counts become ``Sizes``."""

    def __init__(self, function: Names) -> None:
        self.function = function
        self.tree = function.tree

    def run(self) -> None:
        _Single().visit(self.tree)
        _Iterated().visit(self.tree)
        self.parents = {c: p for p in ast.walk(self.tree) for c in ast.iter_child_nodes(p)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                inner, on_host = syntax.without_host(node.value)
                if on_host:
                    self._name(node, node.targets[0].id, inner)
        inline = _Inline(self._sizes)
        inline.visit(self.tree)
        self.function.changed |= inline.changed
        if self.function.host or inline.changed:
            self._offsets()
            _Grouped(self.function).visit(self.tree)

    def _sizes(self, counts: ast.expr) -> ast.Call:
        """``counts`` where the original has Python numbers."""
        experts = self._counted_experts(counts) or ast.Constant(None)
        return call("Sizes", counts, ast.Constant(self._is_running(counts)), experts)

    def _name(self, node: ast.Assign, name: str, inner: ast.expr) -> None:
        position = (node.lineno, node.col_offset)
        later = [n for n in syntax.loaded(self.tree) if n.id == name and (n.lineno, n.col_offset) > position]
        later = [n for n in later if n not in set(ast.walk(node))]
        names = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name]
        stores = [n for n in names if n is not node.targets[0]]
        if any((s.lineno, s.col_offset) > position and isinstance(s.ctx, ast.Store) for s in stores):
            return
        inside = set(ast.walk(node))
        earlier = [n for n in syntax.loaded(self.tree) if n.id == name and n not in later and n not in inside]
        if earlier and self._repeats(node):
            return
        uses = {self._use(n) for n in later}
        if uses == {"loop"}:
            self.function.listed.add(name)
        if uses == {"index"} or (uses == {"loop"} and syntax.is_hit_list(inner, self.function.origins)):
            node.value = call("listed", inner)
            at_place(node.value, node)
        elif uses and uses <= {"entry", "enumerate", "split", "len"}:
            node.value = self._sizes(inner)
            at_place(node.value, node)
            self.function.host.add(name)
        else:
            return
        self.function.changed = True

    def _use(self, load: ast.Name) -> str:
        parent = self.parents[load]
        if isinstance(parent, ast.For) and parent.iter is load:
            return "loop"
        if isinstance(parent, ast.Subscript):
            return "entry" if parent.value is load else "index"
        if isinstance(parent, ast.Tuple) and isinstance(self.parents[parent], ast.Subscript):
            return "index"
        if isinstance(parent, ast.Call) and load in parent.args:
            name, _ = syntax.called(parent)
            if name in ("enumerate", "len"):
                return name
            if name in ("split", "split_with_sizes"):
                return "split"
        return "other"

    def _repeats(self, node: ast.AST) -> bool:
        """Whether a statement stands in a loop."""
        while node in self.parents and not isinstance(node, (ast.For, ast.While)):
            node = self.parents[node]
        return isinstance(node, (ast.For, ast.While))

    def _counted_experts(self, expr: ast.expr, depth: int = 2) -> ast.expr | None:
        """``E`` of ``bincount(ids, minlength=E)``, whose length only the device knows."""
        for node in ast.walk(expr):
            if isinstance(node, ast.Call) and syntax.called(node)[0] == "bincount":
                return next((copy.deepcopy(k.value) for k in node.keywords if k.arg == "minlength"), None)
            found = self.function.origins.get(node.id, []) if isinstance(node, ast.Name) and depth else []
            counted = self._counted_experts(found[0], depth - 1) if len(found) == 1 else None
            if counted is not None:
                return counted
        return None

    def _is_running(self, expr: ast.expr, depth: int = 2) -> bool:
        """Whether numbers are a running sum."""
        if isinstance(expr, ast.Call):
            name, on = syntax.called(expr)
            if name == "cumsum":
                return True
            return on is not None and name in ("to", "int", "long", "astype") and self._is_running(on, depth)
        if isinstance(expr, ast.Name) and depth:
            found = self.function.origins.get(expr.id, [])
            return len(found) == 1 and self._is_running(found[0], depth - 1)
        return False

    def _offsets(self) -> None:
        """Names computed from counts: ``end = start + n``, ``start = end``, ``n`` of ``enumerate(counts)``."""
        host = self.function.host
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.For) or counted(node.iter, host) is None:
                continue
            if isinstance(node.target, ast.Tuple) and len(node.target.elts) == 2:
                host |= {e.id for e in node.target.elts[1:] if isinstance(e, ast.Name)}
        for _ in range(3):
            for name, values in self.function.origins.items():
                if any(self._is_offset(v) for v in values):
                    host.add(name)

    def _is_offset(self, value: ast.expr) -> bool:
        plain = (
            ast.Call, ast.Name, ast.BinOp, ast.Add, ast.Sub, ast.IfExp, ast.Compare, ast.Eq, ast.Constant, ast.Load,
            ast.Subscript,
        )  # fmt: skip
        if not all(isinstance(n, plain) for n in ast.walk(value)):
            return False
        calls = [n for n in ast.walk(value) if isinstance(n, ast.Call)]
        if any(syntax.called(c)[0] != "int" for c in calls):
            return False
        return any(n.id in self.function.host for n in syntax.loaded(value))


class _Single(ast.NodeTransformer):
    """``a, b = x.tolist(), y.tolist()`` as two statements; only where nothing on the right reads a name on the left."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list[ast.Assign]:
        target, value = node.targets[0], node.value
        if len(node.targets) != 1 or not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
            return node
        if len(target.elts) != len(value.elts) or not all(isinstance(t, ast.Name) for t in target.elts):
            return node
        if set(syntax.stored(target)) & {n.id for n in syntax.loaded(value)}:
            return node
        if not any(syntax.without_host(v)[1] for v in value.elts):
            return node
        return [ast.copy_location(ast.Assign([t], v), node) for t, v in zip(target.elts, value.elts, strict=True)]


class _Iterated(ast.NodeTransformer):
    """A name for the numbers of ``for i, n in enumerate(counts.tolist())``, which are fetched once before the loop."""

    def __init__(self) -> None:
        self.names = 0

    def visit_For(self, node: ast.For) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        found = node.iter
        if not isinstance(found, ast.Call) or not isinstance(found.func, ast.Name) or found.func.id != "enumerate":
            return node
        if len(found.args) != 1 or not syntax.is_list(found.args[0]):
            return node
        self.names += 1
        name = f"{HELPERS}_counts{self.names}"
        fetched = ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], found.args[0]), node)
        found.args[0] = ast.copy_location(read(name), found.args[0])
        at_place(fetched, node)
        return [fetched, node]


class _Inline(ast.NodeTransformer):
    """Numbers without a name: ``x[index.tolist()]``, ``x.split(counts.tolist())``."""

    def __init__(self, sizes: Callable[[ast.expr], ast.Call]) -> None:
        self.sizes, self.changed = sizes, False

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.slice, ast.Tuple):
            node.slice.elts = [self._listed(e) for e in node.slice.elts]
        else:
            node.slice = self._listed(node.slice)
        return node

    def _listed(self, index: ast.expr) -> ast.expr:
        return self._instead(index, call("listed", syntax.without_host(index)[0])) if syntax.is_list(index) else index

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if syntax.called(node)[0] in ("split", "split_with_sizes"):
            for i, a in enumerate(node.args):
                if syntax.is_list(a):
                    node.args[i] = self._instead(a, self.sizes(syntax.without_host(a)[0]))
        return node

    def _instead(self, old: ast.expr, new: ast.Call) -> ast.Call:
        at_place(new, old)
        self.changed = True
        return new


class _Grouped(ast.NodeTransformer):
    """Slices, splits and joins of rows by counts."""

    def __init__(self, function: Names) -> None:
        self.host = function.host
        self.local = set(syntax.stored(function.tree)) - syntax.declared(function.tree)
        self.cut: ast.expr | None = None
        for node in ast.walk(function.tree):
            if isinstance(node, ast.Subscript) and self._is_group(node):
                self.cut = node.value
            elif isinstance(node, ast.Call) and self._is_split(node):
                self.cut = syntax.called(node)[1]

    def _is_group(self, node: ast.Subscript) -> bool:
        s = node.slice
        bounds = (s.lower, s.upper) if isinstance(s, ast.Slice) and s.step is None else ()
        return any(self._on_host(b) for b in bounds if b is not None)

    def _on_host(self, bound: ast.expr) -> bool:
        return any(n.id in self.host for n in syntax.loaded(bound))

    def _is_split(self, node: ast.Call) -> bool:
        return syntax.called(node)[0] in ("split", "split_with_sizes") and any(map(self._is_sizes, node.args))

    def _is_sizes(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return ast.unparse(node.func) == f"{HELPERS}.Sizes"
        return isinstance(node, ast.Name) and node.id in self.host

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        target = node.targets[0]
        if len(node.targets) != 1 or not isinstance(target, ast.Subscript) or not self._is_group(target):
            return node
        if not isinstance(target.value, ast.Name) or target.value.id not in self.local:
            return node
        assert isinstance(target.slice, ast.Slice)
        name, bounds = target.value.id, (target.slice.lower or number(0), target.slice.upper or ast.Constant(None))
        new = ast.Assign([ast.Name(name, ast.Store())], call("place", read(name), *bounds, node.value))
        at_place(new, node)
        return new

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if not self._is_group(node) or not isinstance(node.ctx, ast.Load):
            return node
        assert isinstance(node.slice, ast.Slice)
        new = call("rows", node.value, node.slice.lower or number(0), node.slice.upper or ast.Constant(None))
        at_place(new, node)
        return new

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name, on = syntax.called(node)
        if name == "int" and len(node.args) == 1 and not node.keywords and self._on_host(node.args[0]):
            return node.args[0]
        dim = [k.value for k in node.keywords if k.arg in ("dim", "axis")]
        if self._is_split(node) and on is not None and len(dim) == len(node.keywords):
            sizes = next(filter(self._is_sizes, node.args))
            rest = node.args[node.args.index(sizes) + 1 :]
            new = call("split", on, sizes, *(dim or rest or [number(0)]))
            at_place(new, node)
            return new
        many = node.args and isinstance(node.args[0], (ast.Name, ast.ListComp))
        if many and name in ("cat", "concat") and self.cut is not None and len(dim) == len(node.keywords):
            new = call("cat", node.args[0], copy.deepcopy(self.cut), *(dim or node.args[1:] or [number(0)]))
            at_place(new, node)
            return new
        return node
