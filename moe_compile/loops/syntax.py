"""Small readings of Python syntax: tests for emptiness, numbers fetched to the host, uses of a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

_TO_HOST = {"tolist", "cpu", "numpy", "item"}
_HIT_LISTS = {"nonzero", "unique", "argwhere", "unique_consecutive"}


class Test(NamedTuple):
    """``if`` on emptiness: ``kind`` is "numel", "len" (size of the first dimension), "true" or "differ"."""

    kind: str
    evidence: ast.expr
    nonempty: bool
    other: ast.expr | None = None


def emptiness(test: ast.expr, host: set[str]) -> Test | None:
    """A test that asks whether something has an element. ``host`` names numbers that were fetched to the host."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = emptiness(test.operand, host)
        return inner._replace(nonempty=not inner.nonempty) if inner is not None else None
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return _comparison(test.left, test.ops[0], test.comparators[0], host)
    found = _size(test, host)
    return Test(*found, True) if found is not None else None


def _comparison(left: ast.expr, op: ast.cmpop, right: ast.expr, host: set[str]) -> Test | None:
    number = right.value if isinstance(right, ast.Constant) else None
    if isinstance(number, int) and not isinstance(number, bool):
        found = _size(left, host)
        if found is None:
            return None
        if (isinstance(op, (ast.Eq, ast.LtE)) and number == 0) or (isinstance(op, ast.Lt) and number == 1):
            return Test(*found, False)
        if (isinstance(op, (ast.NotEq, ast.Gt)) and number == 0) or (isinstance(op, ast.GtE) and number == 1):
            return Test(*found, True)
        return None
    names = {n.id for n in (left, right) if isinstance(n, ast.Name)}
    if len(names) == 2 and names <= host and isinstance(op, (ast.Eq, ast.NotEq)):
        return Test("differ", left, isinstance(op, ast.NotEq), right)
    return None


def _size(expr: ast.expr, host: set[str]) -> tuple[str, ast.expr] | None:
    """What ``expr`` counts: ``x.numel()``, ``len(x)``, ``x.shape[0]``, ``x.any()``, ``x.sum()``, ``counts[i]``."""
    if isinstance(expr, ast.Name) and expr.id in host:
        return "true", expr
    if isinstance(expr, ast.Subscript):
        if isinstance(expr.value, ast.Name) and expr.value.id in host:
            return "true", expr
        if isinstance(expr.value, ast.Attribute) and expr.value.attr == "shape" and _is_zero(expr.slice):
            return "len", expr.value.value
        return None
    if not isinstance(expr, ast.Call):
        return None
    name, first = called(expr)
    if first is None:
        return None
    if name in ("int", "bool", "item") and len(expr.args) <= 1:
        return _size(first, host)
    if name in ("numel", "nelement"):
        return "numel", first
    if name == "len":
        return "len", first
    if name == "size" and len(expr.args) == 1 and _is_zero(expr.args[0]):
        return "len", first
    if name in ("any", "sum", "count_nonzero") and not expr.keywords and len(expr.args) == _is_function(expr):
        return "true", first
    return None


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 0


def _is_function(call: ast.Call) -> int:
    """1 for ``torch.any(x)`` and ``len(x)``, 0 for ``x.any()``."""
    func = call.func
    module = isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == "torch"
    return int(isinstance(func, ast.Name) or module)


def called(call: ast.Call) -> tuple[str, ast.expr | None]:
    """The name of a called function or method, and what it is called on (its first argument for functions)."""
    func = call.func
    if _is_function(call):
        name = func.id if isinstance(func, ast.Name) else func.attr  # type: ignore[attr-defined]
        return name, call.args[0] if call.args else None
    if isinstance(func, ast.Attribute):
        return func.attr, func.value
    return "", None


def without_host(expr: ast.expr) -> tuple[ast.expr, bool]:
    """``expr`` without its ``.cpu()``, ``.numpy()``, ``.tolist()`` steps, and whether it ended up on the host."""
    if not isinstance(expr, ast.Call):
        return expr, False
    if isinstance(expr.func, ast.Attribute) and not _is_function(expr):
        inner, was_host = without_host(expr.func.value)
        if expr.func.attr in _TO_HOST and not expr.args and not expr.keywords:
            return inner, was_host or expr.func.attr != "cpu"
        if was_host and expr.func.attr not in ("cumsum", "astype"):
            return expr, False
        if was_host or inner is not expr.func.value:
            func = ast.copy_location(ast.Attribute(inner, expr.func.attr, ast.Load()), expr.func)
            return ast.copy_location(ast.Call(func, expr.args, expr.keywords), expr), was_host
    return expr, False


def is_list(expr: ast.expr) -> bool:
    """``x.tolist()``, ``x.cpu().numpy()``: numbers of a tensor, fetched to the host."""
    return without_host(expr)[1] and isinstance(expr, ast.Call) and called(expr)[0] != "item"


def is_hit_list(expr: ast.expr, origins: dict[str, list[ast.expr]], depth: int = 3) -> bool:
    """Whether an expression is a list of the experts that were hit, as far as syntax can tell."""
    for node in ast.walk(expr):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _HIT_LISTS and not any(k.arg == "as_tuple" for k in node.keywords):
                return True
    if depth and isinstance(expr, (ast.Name, ast.Call, ast.Attribute)):
        root = root_name(expr)
        return any(is_hit_list(o, origins, depth - 1) for o in origins.get(root or "", []))
    return False


def is_flat(expr: ast.expr, origins: dict[str, list[ast.expr]]) -> bool:
    """Whether a hit list has one dimension: ``unique()``, or flattened."""
    found = origins.get(expr.id, []) if isinstance(expr, ast.Name) else [expr]
    names = {called(n)[0] for e in found for n in ast.walk(e) if isinstance(n, ast.Call)}
    return len(found) == 1 and bool(names & {"unique", "flatten", "squeeze"})


def root_name(expr: ast.expr) -> str | None:
    """``a`` of ``a.b[c].d(e)``."""
    while isinstance(expr, (ast.Attribute, ast.Subscript, ast.Call)):
        expr = expr.func if isinstance(expr, ast.Call) else expr.value
    return expr.id if isinstance(expr, ast.Name) else None


def declared(node: ast.AST) -> set[str]:
    """Names that are ``global`` or ``nonlocal``."""
    return {name for n in ast.walk(node) if isinstance(n, (ast.Global, ast.Nonlocal)) for name in n.names}


def stored(node: ast.AST) -> Iterator[str]:
    """Names that are bound anywhere inside."""
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            yield n.id


def loaded(node: ast.AST) -> Iterator[ast.Name]:
    """Names that are read anywhere inside."""
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
            yield n


def is_static(expr: ast.expr) -> bool:
    """``self.experts``, ``weights``: a chain of attributes on a name."""
    while isinstance(expr, ast.Attribute):
        expr = expr.value
    return isinstance(expr, ast.Name)


def same(a: ast.AST, b: ast.AST) -> bool:
    """Whether two expressions are spelt alike."""
    return ast.dump(a) == ast.dump(b)
