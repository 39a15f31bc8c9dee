"""Pieces of syntax that the changed loops are made of: calls of ``traced``, with the source line they stand for."""

from __future__ import annotations

import ast

HELPERS = "_moe_compile"


class Unfit(Exception):
    """A block that does more than a loop over experts does; it stays as it was written."""


def call(name: str, *args: ast.expr) -> ast.Call:
    """``_moe_compile.name(*args)``."""
    func = ast.Attribute(ast.Name(HELPERS, ast.Load()), name, ast.Load())
    return ast.Call(func, list(args), [])


def do(name: str, *args: ast.expr) -> ast.Expr:
    """The same as a statement."""
    return ast.Expr(call(name, *args))


def number(value: int) -> ast.Constant:
    return ast.Constant(value)


def read(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def at_place(new: ast.AST, old: ast.AST) -> None:
    """Give every new node inside ``new`` the source position of ``old``."""
    for node in ast.walk(new):
        if "lineno" in node._attributes and not hasattr(node, "lineno"):
            ast.copy_location(node, old)
