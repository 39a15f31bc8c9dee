"""Numbers that a function fetches from the device: index lists, counts, offsets into rows in expert order."""

from __future__ import annotations

import ast
import copy
from typing import Protocol

from . import syntax
from .emit import at_place, call, number


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
        self.parents = {c: p for p in ast.walk(self.tree) for c in ast.iter_child_nodes(p)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                inner, on_host = syntax.without_host(node.value)
                if on_host:
                    self._name(node, node.targets[0].id, inner)
        if self.function.host:
            self._offsets()
            _Grouped(self.function).visit(self.tree)

    def _name(self, node: ast.Assign, name: str, inner: ast.expr) -> None:
        position = (node.lineno, node.col_offset)
        later = [n for n in syntax.loaded(self.tree) if n.id == name and (n.lineno, n.col_offset) > position]
        later = [n for n in later if n not in set(ast.walk(node))]
        names = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name]
        stores = [n for n in names if n is not node.targets[0]]
        if any((s.lineno, s.col_offset) > position and isinstance(s.ctx, ast.Store) for s in stores):
            return
        uses = {self._use(n) for n in later}
        if uses == {"loop"}:
            self.function.listed.add(name)
        if uses == {"index"} or (uses == {"loop"} and syntax.is_hit_list(inner, self.function.origins)):
            node.value = inner
        elif uses and uses <= {"entry", "enumerate", "split", "len"}:
            experts = self._counted_experts(inner) or ast.Constant(None)
            node.value = call("Sizes", inner, ast.Constant(self._is_running(inner)), experts)
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


class _Grouped(ast.NodeTransformer):
    """Slices, splits and joins of rows by counts."""

    def __init__(self, function: Names) -> None:
        self.host = function.host
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
        name, _ = syntax.called(node)
        return name in ("split", "split_with_sizes") and any(
            isinstance(a, ast.Name) and a.id in self.host for a in node.args
        )

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
            sizes = next(a for a in node.args if isinstance(a, ast.Name) and a.id in self.host)
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
