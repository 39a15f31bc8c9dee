"""Loops over the experts that were hit: what the loop variable, a row of the hit list, means as a plain number."""

from __future__ import annotations

import ast
import copy

from . import syntax
from .emit import Unfit, call, read


class Uses(ast.NodeTransformer):
    """The uses of a loop variable over hit experts, rewritten for plain numbers.

    ``vector`` are names of a row of the hit list (a tensor), ``scalars`` names of the number itself.
    """

    def __init__(self, expert: str, hits: str, bound: set[str], plain: bool) -> None:
        self.vector, self.scalars = (set[str](), {expert}) if plain else ({expert}, set[str]())
        self.hits, self.bound = hits, bound
        self.containers: list[ast.expr] = []

    def _is(self, node: ast.AST, names: set[str]) -> bool:
        return isinstance(node, ast.Name) and node.id in names

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        if len(node.targets) == 1 and isinstance(target, ast.Name):
            value = self._number(node.value)
            if value is not None:
                self.vector.discard(target.id)
                self.scalars.add(target.id)
                node.value = value
                return node
        return self.generic_visit(node)

    def _number(self, value: ast.expr) -> ast.expr | None:
        """``e`` of ``e[0]``, ``e.item()``, ``int(e)`` and ``e``."""
        names = self.vector | self.scalars
        if isinstance(value, ast.Subscript) and self._is(value.value, self.vector):
            return value.value if isinstance(value.slice, ast.Constant) and value.slice.value == 0 else None
        if isinstance(value, ast.Call):
            name, on = syntax.called(value)
            known = name in ("item", "int", "tolist", "squeeze", "__index__") and len(value.args) <= 1
            return on if known and on is not None and self._is(on, names) else None
        return value if self._is(value, self.scalars) else None

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        number = self._number(node)
        if number is not None:
            return number
        index = self._number(node.slice)
        if index is not None and isinstance(index, ast.Name):
            scalar = True
            node.slice = index
        else:
            scalar = self._is(node.slice, self.scalars)
        if self._is(node.slice, self.vector | self.scalars):
            node.value = self.visit(node.value)
            name = syntax.root_name(node.value)
            fixed = syntax.is_static(node.value) and name not in self.bound and isinstance(node.ctx, ast.Load)
            if fixed and not any(syntax.same(c, node.value) for c in self.containers):
                self.containers.append(copy.deepcopy(node.value))
            if scalar:
                return node
            if not isinstance(node.ctx, ast.Load):
                raise Unfit("a row of the hit list is written to")
            return call("at", node.value, node.slice, read(self.hits))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        number = self._number(node)
        return number if number is not None else self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        sides = [node.left, *node.comparators]
        if any(self._is(side, self.vector) for side in sides):
            if not all(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops):
                raise Unfit("experts are compared by size")
            for side in sides:
                if not self._is(side, self.vector):
                    self.visit(side)
            return node
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Load) and node.id in self.vector:
            raise Unfit(f"the expert is used at line {node.lineno} in a way that is not known")
        return node
