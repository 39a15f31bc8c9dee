"""Every guard of a module behind a switch: all mutants live in one compiled module, and one at a time is on.

A guard is a refusal (``raise``), a condition under which a function gives up (``if a or b: return None``: each operand
is one), and a condition that an acceptance needs (``if a and b: return fact``, ``return a and b``, ``x if a else
None``: each operand is one). Its mutant never refuses, never gives up, always accepts. The switch also notes which
guards spoke against a program, which are the only mutants that the program can tell from the original.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

SWITCH = "_mutation_switch"  # the name under which instrumented modules find the switch


@dataclass(frozen=True)
class Mutant:
    """One guard: where it is and what it says."""

    number: int
    module: str
    function: str
    line: int
    kind: str
    text: str

    @property
    def key(self) -> str:
        """Stable against moves of the code: function, kind and source text."""
        return f"{self.module.removeprefix('moe_compile.')}.{self.function}: {self.kind}: {self.text}"


@dataclass
class Switch:
    """Which mutant is on, and which guards spoke since ``hits`` was emptied."""

    mutants: list[Mutant] = field(default_factory=list)
    active: int = -1
    hits: set[int] = field(default_factory=set)

    def refuses(self, number: int) -> bool:
        self.hits.add(number)
        return self.active != number

    def gives_up(self, number: int, value: Any) -> Any:
        if value:
            self.hits.add(number)
            return value if self.active != number else False
        return value

    def allows(self, number: int, value: Any) -> Any:
        if not value:
            self.hits.add(number)
            return value if self.active != number else True
        return value


class Instrument(ast.NodeTransformer):
    """Puts the guards of one module behind ``switch``."""

    def __init__(self, module: str, switch: Switch, skip_classes: bool) -> None:
        self.module, self.switch, self.skip_classes = module, switch, skip_classes
        self.function = ""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outer, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = outer
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node if self.skip_classes else self.generic_visit(node)  # the examples of a form are users' code

    def visit_If(self, node: ast.If) -> ast.AST:
        last = node.body[-1]
        plain = len(node.body) == 1
        if plain and isinstance(last, ast.Raise) and isinstance(node.test, ast.BoolOp):
            self._operands(node, "gives_up", ast.Or)
            node.orelse = [self.visit(s) for s in node.orelse]
            return node
        if plain and isinstance(last, ast.Return) and _is_none(last.value):
            self._operands(node, "gives_up", ast.Or)
        elif isinstance(last, ast.Return) or (plain and isinstance(last, ast.Continue)):
            self._operands(node, "allows", ast.And)
        node.body = [self.visit(s) for s in node.body]
        node.orelse = [self.visit(s) for s in node.orelse]
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if node.exc is None or not isinstance(node.exc, ast.Call):
            return node
        test = self._call("refuses", node, ast.unparse(node.exc)[:90])
        return ast.copy_location(ast.If(test=test, body=[node], orelse=[]), node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        if _is_none(node.body):
            self._operands(node, "gives_up", ast.Or)
        elif _is_none(node.orelse):
            self._operands(node, "allows", ast.And)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if isinstance(node.value, ast.BoolOp) and isinstance(node.value.op, ast.And):
            node.value.values = [self._wrap("allows", v) for v in node.value.values]
            return node
        return self.generic_visit(node)

    def _operands(self, node: ast.If | ast.IfExp, kind: str, op: type[ast.boolop]) -> None:
        test = node.test
        if isinstance(test, ast.BoolOp) and isinstance(test.op, op):
            test.values = [self._wrap(kind, v) for v in test.values]
        else:
            node.test = self._wrap(kind, test)

    def _wrap(self, kind: str, value: ast.expr) -> ast.expr:
        return self._call(kind, value, ast.unparse(value), value)

    def _mutant(self, number: int, at: ast.AST, kind: str, text: str) -> Mutant:
        return Mutant(number, self.module, self.function, at.lineno, kind, text)  # type: ignore[attr-defined]

    def _call(self, kind: str, at: ast.AST, text: str, *args: ast.expr) -> ast.expr:
        number = len(self.switch.mutants)
        self.switch.mutants.append(self._mutant(number, at, kind, text))
        function = ast.Attribute(ast.Name(SWITCH, ast.Load()), kind, ast.Load())
        return ast.copy_location(ast.Call(function, [ast.Constant(number), *args], []), at)


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def instrumented(source: str, path: str, module: str, switch: Switch, skip_classes: bool = False) -> Any:
    """The code object of ``source`` with its guards behind ``switch``."""
    tree = Instrument(module, switch, skip_classes).visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), path, "exec")


class _Loader(importlib.machinery.SourceFileLoader):
    switch: Switch

    def get_code(self, fullname: str) -> Any:
        source = self.get_data(self.path).decode()
        return instrumented(source, self.path, fullname, self.switch, skip_classes=".patterns." in fullname)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[SWITCH] = self.switch
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    """Imports the modules that ``wanted`` names with their guards behind ``switch``."""

    def __init__(self, switch: Switch, wanted: Callable[[str], bool]) -> None:
        self.switch, self.wanted = switch, wanted

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not self.wanted(name):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.origin is not None and not spec.submodule_search_locations:
                spec.loader = _Loader(name, spec.origin)
                spec.loader.switch = self.switch
                return spec
        return None


def is_matcher(name: str) -> bool:
    """The modules whose guards decide what is rewritten."""
    return name in ("moe_compile.legality", "moe_compile.claims", "moe_compile.lower", "moe_compile.planning") or (
        name.startswith(("moe_compile.match.", "moe_compile.patterns.")) and not name.endswith("_examples")
    )
