"""The source of a code object as a syntax tree, and a changed tree back as a code object that can take its place.

A tree is trusted only if compiling it unchanged gives the very bytecode that runs: an edited file, a decorator that
rewrites code or a notebook cell that is gone make the answer None, never another program. The whole file is
compiled each time, since closures, private names and even instructions depend on what stands around a function.
"""

from __future__ import annotations
import __future__

import ast
import linecache
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

_FLAGS = 0
for _name in __future__.all_feature_names:
    _FLAGS |= getattr(__future__, _name).compiler_flag


@dataclass(frozen=True)
class Source:
    """A function definition, the module around it, and the code object that it was read for."""

    module: ast.Module
    tree: ast.FunctionDef
    code: types.CodeType

    def compile(self, body: list[ast.stmt]) -> types.CodeType | None:
        """The function with another body; None if it could not take the place of the original in a frame."""
        before, self.tree.body = self.tree.body, body
        try:
            new = _compiled(self.module, self.code)
        finally:
            self.tree.body = before
        return new if new is not None and _takes_the_place(new, self.code) else None


@lru_cache(maxsize=512)
def source_of(code: types.CodeType) -> Source | None:
    """The definition behind ``code``, or None when it is not known for certain."""
    lines = linecache.getlines(code.co_filename)
    if not lines or code.co_name == "<lambda>":
        return None
    try:
        module = ast.parse("".join(lines))
    except (SyntaxError, ValueError, RecursionError):
        return None
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name and _first_line(node) == code.co_firstlineno:
            same = _compiled(module, code)
            return Source(module, node, code) if same is not None and _equal(same, code) else None
    return None


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _compiled(module: ast.Module, like: types.CodeType) -> types.CodeType | None:
    """The code object of ``module`` that stands where ``like`` stands."""
    try:
        whole = compile(module, like.co_filename, "exec", flags=like.co_flags & _FLAGS, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
        return None
    where = (like.co_name, like.co_firstlineno)
    return next((c for c in _nested(whole) if (c.co_name, c.co_firstlineno) == where), None)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)


def _equal(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two code objects do the same: bytecode, names and constants."""
    names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    if any(getattr(a, n) != getattr(b, n) for n in names) or len(a.co_consts) != len(b.co_consts):
        return False
    return all(
        _equal(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else _same_constant(x, y)
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


def _same_constant(x: object, y: object) -> bool:
    return type(x) is type(y) and repr(x) == repr(y)


def _takes_the_place(new: types.CodeType, old: types.CodeType) -> bool:
    """Whether a frame of ``old`` can go on in ``new``: the same arguments and the same cells."""
    count = old.co_argcount + old.co_kwonlyargcount + bool(old.co_flags & 4) + bool(old.co_flags & 8)
    names = ("co_argcount", "co_kwonlyargcount", "co_posonlyargcount", "co_freevars", "co_cellvars", "co_flags")
    return all(getattr(new, n) == getattr(old, n) for n in names) and new.co_varnames[:count] == old.co_varnames[:count]
