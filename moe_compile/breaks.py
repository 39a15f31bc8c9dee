"""Graph breaks read as MoE problems: which code, which line, and the edit that mends it.

Only the source around the break is read. A break that depends on tensor values is always told; any other
one only where the code looks like an MoE layer.
"""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Iterable

from moe_compile.loops import substitution, syntax
from moe_compile.report import NOT_CAPTURED, Site
from moe_compile.torch_breaks import Break

_MOE = re.compile(r"topk|one_hot|expert|router|moe", re.IGNORECASE)
_DATA = re.compile(r"data.dependent|dynamic shape|unbacked|specialized integer|tensor\.item\(", re.IGNORECASE)
_DISABLED = re.compile(r"skip inlining|disable|marked as skipped|hook", re.IGNORECASE)
_HIT_LIST = re.compile(r"\.nonzero\(|\.unique\(|argwhere\(")
_PYTHON_LIST = re.compile(r"\.tolist\(|\.item\(|\.numpy\(|\bint\(")
_BRANCH = re.compile(r"^(if|elif|while|assert)\b|\.any\(|\.all\(|\.numel\(|\blen\(")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def sites(breaks: Iterable[Break], declared: bool = False) -> list[Site]:
    """One "not captured" site per code and function, in the order of the breaks.

    ``declared``: the user says that this is an MoE layer, whatever its code looks like.
    """
    out: dict[tuple[str, str, int], Site] = {}
    for found in breaks:
        function = _enclosing(found.file, found.line)
        code = _code(found, function, declared)
        if code is not None:
            start = function.lineno if function is not None else found.line
            out.setdefault((code, found.file, start), _site(found, code, function))
    return list(out.values())


def _site(found: Break, code: str, function: _Function | None) -> Site:
    where = f"{found.file}:{found.line}"
    source = linecache.getline(found.file, found.line).strip()
    shown = f" (`{source}`)" if source else ""
    if function is not None:
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        miss = substitution.miss(found.file, first)
        if miss is not None:  # without the break the layer would be refused all the same: that reason counts
            why = f"{miss.reason}; so the loop keeps its graph break at {where}{shown}"
            return Site(NOT_CAPTURED, "graph break", miss.code, why, miss.location or where)
    return Site(
        NOT_CAPTURED,
        form="graph break",
        code=code,
        reason=f"graph break at {where}{shown}: {found.reason}",
        location=where,
        fix=_fix(code, where, source, function),
    )


def _fix(code: str, where: str, source: str, function: _Function | None) -> str:
    if code == "MC101" and _PYTHON_LIST.search(source):
        return (
            f"replace the Python numbers at {where} by a loop over range(num_experts) with "
            "torch.where(ids == e), or call moe_compile.fused_experts with stacked weights"
        )
    if code == "MC101" and not _asks_for_emptiness(source, function):
        return (
            f"the branch at {where} depends on tensor values: compute both sides and choose with torch.where, "
            "or keep the original layer"
        )
    if code == "MC101":
        return f"remove the test at {where}: an expert without tokens adds nothing, so the result is the same"
    if code == "MC102":
        return (
            f"loop over range(num_experts) instead of the experts that were hit ({where}); "
            "for a Hugging Face model call moe_compile.optimize(model)"
        )
    return ""  # the table's advice says it


def _asks_for_emptiness(source: str, function: _Function | None) -> bool:
    """Whether a line is an ``if`` on whether something has an element, with nothing to do if it has none."""
    for node in ast.walk(function) if function is not None else ():
        if isinstance(node, ast.If) and ast.unparse(node.test) in source and source.startswith("if "):
            test = syntax.emptiness(node.test, set())
            if test is not None:
                other = node.orelse if test.nonempty else node.body
                return all(isinstance(s, (ast.Pass, ast.Continue)) for s in other)
    return False


def _code(found: Break, function: ast.AST | None, declared: bool) -> str | None:
    source = linecache.getline(found.file, found.line).strip()
    if not _DATA.search(found.reason):
        if not declared and not _looks_like_moe(found, function):
            return None
        return "MC104" if _DISABLED.search(found.reason) else "MC105"
    if _in_loop_over_hits(found, function):
        return "MC102"
    if _PYTHON_LIST.search(source) or _BRANCH.search(source):
        return "MC101"
    return "MC103" if "dynamic shape" in found.reason.lower() else "MC101"


def _in_loop_over_hits(found: Break, function: ast.AST | None) -> bool:
    """Whether the break is at, in, or at the source of a loop over a ``nonzero()`` or ``unique()`` result."""
    if function is None:
        return False
    origin: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    origin[target.id] = ast.unparse(node.value)
    for node in ast.walk(function):
        if isinstance(node, ast.For):
            text = ast.unparse(node.iter)
            names = [n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)]
            text += "".join(f"\n{origin.get(name, '')}" for name in names)
            if _HIT_LIST.search(text) and not _PYTHON_LIST.search(text):
                inside = node.lineno <= found.line <= (node.end_lineno or node.lineno)
                return inside or bool(_HIT_LIST.search(linecache.getline(found.file, found.line)))
    return False


def _looks_like_moe(found: Break, function: ast.AST | None) -> bool:
    if function is None:
        return bool(_MOE.search(linecache.getline(found.file, found.line)))
    return bool(_MOE.search(ast.unparse(function)))


def _enclosing(file: str, line: int) -> _Function | None:
    """The innermost function around a line, None when the source cannot be read."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None
    best: _Function | None = None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = node.lineno <= line <= (node.end_lineno or node.lineno)
            if inside and (best is None or node.lineno >= best.lineno):
                best = node
    return best
