"""Loops over many experts, traced for two of them: the body must mean the same for every expert.

The expert's number may only index tensors and lists of modules, and be compared with expert ids. What the body does
with one expert's own modules and tensors is then traced for all experts (a *probe* each), outside of the loop and
without its routing. ``match/shrunk.py`` puts both together, or the loop is traced whole.
"""

from __future__ import annotations

import ast
import copy
from typing import NamedTuple

from . import syntax
from .emit import HELPERS, Unfit, at_place, call, do, number, read
from .rewriting import Function


class Probe(NamedTuple):
    """One use of an expert's own module or tensor: ``container[e].chain`` or a call of it on ``argument``."""

    container: ast.expr
    chain: tuple[str, ...]
    argument: str | None

    def statements(self, site: ast.Constant, number_: int, items: str) -> list[ast.stmt]:
        """``values = [container[e].chain(blank) for e in items]``, marked; a comprehension would be a function."""
        expert, values, blank = (f"{HELPERS}_{name}" for name in ("expert", "values", "blank"))
        value: ast.expr = ast.Subscript(copy.deepcopy(self.container), read(expert), ast.Load())
        for attribute in self.chain:
            value = ast.Attribute(value, attribute, ast.Load())
        before: list[ast.stmt] = [ast.Assign([ast.Name(values, ast.Store())], ast.List([], ast.Load()))]
        if self.argument is not None:
            before.append(ast.Assign([ast.Name(blank, ast.Store())], call("blank", read(self.argument))))
            value = ast.Call(value, [read(blank)], [])
        append = ast.Expr(ast.Call(ast.Attribute(read(values), "append", ast.Load()), [value], []))
        each = ast.For(ast.Name(expert, ast.Store()), read(items), [append], [])
        return [*before, each, do("probe", site, number(number_), read(values))]


def shrink(function: Function) -> bool:
    """Shrink every loop of a function that can be; whether there was one."""
    before = function.changed
    function.changed = False
    function.tree.body = _block(function, function.tree.body)
    shrunk, function.changed = function.changed, function.changed or before
    return shrunk


def _block(function: Function, statements: list[ast.stmt]) -> list[ast.stmt]:
    out: list[ast.stmt] = []
    for s in statements:
        if isinstance(s, ast.For) and not s.orelse:
            try:
                out += _loop(function, s)
                function.changed = True
                continue
            except Unfit:
                s.body = _block(function, s.body)
        elif isinstance(s, (ast.If, ast.With)):
            s.body = _block(function, s.body)
            if isinstance(s, ast.If):
                s.orelse = _block(function, s.orelse)
        out.append(s)
    return out


def _loop(function: Function, s: ast.For) -> list[ast.stmt]:
    expert, experts, elements = _header(s)
    body = s.body
    function.require_plain(body)
    carried = [n for n in function.escaping(body) if n != expert]
    if not all(_adds_up(body, n) for n in carried):
        raise Unfit("the loop carries something that is no sum")
    if any(n.id == expert or n.id in elements for n in function._outside([s])):
        raise Unfit("the expert is read after the loop")
    site, items = function.site(), f"{HELPERS}_experts{function.next}"
    uses = Elements(expert, elements, site, items, set(syntax.stored(ast.Module(body, []))))
    body = [uses.visit(x) for x in copy.deepcopy(body)]
    if not uses.routed:
        raise Unfit("the loop is not over experts")
    first: list[ast.stmt] = [
        ast.Assign([ast.Name(name, ast.Store())], call("pick", site, container, read(expert), read(items)))
        for name, container in elements.items()
    ]
    probes: list[ast.stmt] = []
    for n, p in enumerate(uses.probes):
        probes.append(ast.If(call("separate", copy.deepcopy(p.container)), p.statements(site, n, items), []))
    new: list[ast.stmt] = [
        ast.Assign([ast.Name(items, ast.Store())], experts),
        ast.For(ast.Name(expert, ast.Store()), call("iterations", site, read(items)), [*first, *body], []),
        ast.If(call("shrunk", read(items)), [*probes, do("end", site, *map(read, carried))], []),
    ]
    for node in new:
        at_place(node, s)
    return new


def _header(s: ast.For) -> tuple[str, ast.expr, dict[str, ast.expr]]:
    """The name of the expert's number, all numbers, and names of its own modules or tensors with their lists."""
    if not isinstance(s.iter, ast.Call):
        raise Unfit("not a loop over numbers")
    func = s.iter.func
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    if isinstance(s.target, ast.Name) and name in ("range", "hit_range"):
        return s.target.id, s.iter, {}
    if name == "enumerate" and isinstance(s.target, ast.Tuple) and len(s.target.elts) == 2 and len(s.iter.args) == 1:
        index, element = s.target.elts
        lists = [s.iter.args[0]]
        if isinstance(lists[0], ast.Call) and getattr(lists[0].func, "id", "") == "zip" and not lists[0].keywords:
            lists = lists[0].args
        names = element.elts if isinstance(element, ast.Tuple) else [element]
        if isinstance(index, ast.Name) and len(names) == len(lists) and all(isinstance(n, ast.Name) for n in names):
            elements = {n.id: c for n, c in zip(names, lists, strict=True) if isinstance(n, ast.Name)}
            if all(syntax.is_static(c) for c in lists):
                length = ast.Call(read("len"), [copy.deepcopy(lists[0])], [])
                return index.id, ast.Call(read("range"), [length], []), elements
    raise Unfit("not a loop over numbers")


_ADDING = {"index_add_", "scatter_add_", "scatter_reduce_", "index_put_", "add_"}


def _adds_up(body: list[ast.stmt], name: str) -> bool:
    """Whether every statement that binds or writes ``name`` adds to it, as far as syntax can tell."""
    for node in (n for s in body for n in ast.walk(s)):
        if isinstance(node, ast.Assign) and any(name in set(syntax.stored(t)) for t in node.targets):
            if name not in {n.id for n in syntax.loaded(node.value)}:
                return False
            if isinstance(node.value, ast.Call) and syntax.called(node.value)[0] not in _ADDING | {
                a.rstrip("_") for a in _ADDING
            }:
                return False
        mine = isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") == name
        if mine and not isinstance(node.op, ast.Add):  # type: ignore[attr-defined]
            return False
        if isinstance(node, ast.For) and name in set(syntax.stored(node.target)):
            return False
    return True


def _is_helper(node: ast.AST, name: str = "") -> bool:
    """Whether a node calls the function ``name`` of ``traced`` (any, by default)."""
    func = node.func if isinstance(node, ast.Call) else None
    helper = isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == HELPERS
    return helper and (not name or func.attr == name)  # type: ignore[union-attr]


class Elements(ast.NodeTransformer):
    """The uses of an expert's number and of its own modules, checked and prepared for probing."""

    def __init__(
        self, expert: str, elements: dict[str, ast.expr], site: ast.Constant, items: str, bound: set[str]
    ) -> None:
        self.expert, self.elements, self.site, self.items = expert, dict(elements), site, items
        self.bound = bound - set(elements)
        self.probes: list[Probe] = []
        self.routed = False

    def _is_expert(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.expert

    def _element(self, node: ast.expr) -> tuple[ast.expr, tuple[str, ...]] | None:
        """``(container, chain)`` of ``container[e].chain`` or ``name.chain``."""
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in self.elements:
            return self.elements[node.id], tuple(chain)
        if isinstance(node, ast.Subscript) and self._is_expert(node.slice) and self._is_list(node.value):
            return node.value, tuple(chain)
        if _is_helper(node, "at") and self._is_list(node.args[0]):  # type: ignore[attr-defined]
            return node.args[0], tuple(chain)  # type: ignore[attr-defined]
        return None

    def _is_list(self, node: ast.expr) -> bool:
        return syntax.is_static(node) and syntax.root_name(node) not in self.bound

    def _probe(self, container: ast.expr, chain: tuple[str, ...], argument: str | None) -> None:
        self.probes.append(Probe(copy.deepcopy(container), chain, argument))

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        found = self._element(node.value)
        if found is not None and len(node.targets) == 1 and isinstance(target, ast.Name):
            if target.id in self.elements:
                raise Unfit(f"{target.id} is bound twice")
            if not found[1] or isinstance(node.value, ast.Attribute):
                node.value = self._picked(node.value)
                if not found[1]:
                    self.elements[target.id] = found[0]
                    return node
        return self.generic_visit(node)

    def _picked(self, node: ast.expr) -> ast.expr:
        """``node`` with its ``container[e]`` picked under watch."""
        if isinstance(node, ast.Attribute):
            return ast.Attribute(self._picked(node.value), node.attr, ast.Load())
        if isinstance(node, ast.Subscript) and self._is_expert(node.slice):
            return call("pick", self.site, node.value, node.slice, read(self.items))
        if _is_helper(node, "at"):
            container, expert, hits = node.args  # type: ignore[attr-defined]
            self.routed = True
            return call("at", call("watched", self.site, container, read(self.items)), expert, hits)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        func = node.func
        if _is_helper(node):
            return self._helper(node, func.attr)  # type: ignore[attr-defined]
        found = self._element(func)
        if found is not None and node.args:
            if len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
                raise Unfit("an expert is called with more than its rows")
            name = f"{HELPERS}_rows{len(self.probes)}"
            self._probe(*found, name)
            rows = self.visit(node.args[0])
            node.func = self._picked(func)
            node.args = [ast.NamedExpr(ast.Name(name, ast.Store()), rows)]
            return node
        return self.generic_visit(node)

    def _helper(self, node: ast.Call, name: str) -> ast.AST:
        if name == "hit":
            self.routed = True
            return node
        if name == "at":
            if self._is_list(node.args[0]):
                self._probe(node.args[0], (), None)
            else:
                node.args[0] = self.visit(node.args[0])
            return self._picked(node)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        found = self._element(node)
        if found is not None:
            self._probe(*found, None)
            return self._picked(node)
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if self._is_expert(node.slice):
            if not isinstance(node.ctx, ast.Load):
                raise Unfit("a row of its own for each expert is written")
            if self._is_list(node.value):
                self._probe(node.value, (), None)
            self.routed = self.routed or isinstance(node.value, ast.Name)
            return call("pick", self.site, self.visit(node.value), node.slice, read(self.items))
        if isinstance(node.slice, ast.Tuple) and any(self._names(x) for x in node.slice.elts):
            self.routed = True
            value = call("watched", self.site, self.visit(node.value), read(self.items))
            elements = [x if self._names(x) else self.visit(x) for x in node.slice.elts]
            return ast.Subscript(value, ast.Tuple(elements, ast.Load()), node.ctx)
        return self.generic_visit(node)

    def _names(self, node: ast.expr) -> bool:
        """``e`` or ``e : e + 1``."""
        if isinstance(node, ast.Slice) and node.lower is not None and self._is_expert(node.lower):
            return node.step is None and isinstance(node.upper, ast.BinOp) and ast.unparse(node.upper) in (
                f"{self.expert} + 1", f"1 + {self.expert}",
            )  # fmt: skip
        return self._is_expert(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
            left, right = node.left, node.comparators[0]
            if self._is_expert(left):
                left, right = right, left
            if self._is_expert(right):
                self.routed = True
                return call("equal", self.site, self.visit(left), right, read(self.items))
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Load) and node.id == self.expert:
            raise Unfit(f"the expert's number is used at line {node.lineno} otherwise than as an index")
        if isinstance(node.ctx, ast.Load) and node.id in self.elements:
            self._probe(self.elements[node.id], (), None)
        return node
