"""Loops that Dynamo cannot capture, rewritten as loops that it can: over all experts, without tests for emptiness.

Nothing here proves anything: every step leaves a mark in the graph that says what it assumed (``marks.py``), and
``claims.py`` proves the marks or the function is traced again as it was written.

* ``for e in hits`` -> ``for e in range(E)``: an expert without tokens adds nothing.
* ``if idx.numel() == 0: continue``, ``if mask.any():`` -> the block always runs: without rows it adds nothing.
* ``x[idx.tolist()]`` -> ``x[idx]``: a list of numbers indexes like the tensor that it came from.
* counts fetched to the host, ``x[start:end]``, ``x.split(counts)`` -> groups of rows; only the device knows how many.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable

from . import syntax
from .emit import HELPERS, Unfit, at_place, call, do, number, read
from .hits import Uses
from .host import Host, counted
from .source import Source
from .syntax import Test

_IN_PLACE = frozenset({"append"})
_MUTATORS = frozenset({"extend", "insert", "pop", "remove", "clear", "update", "setdefault", "add", "write", "sort"})
_PLAIN = (
    ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.If, ast.For, ast.Pass, ast.Continue,
)  # fmt: skip


class Function:
    """One function while its loops are rewritten. ``first`` numbers its sites."""

    def __init__(self, source: Source, first: int) -> None:
        self.tree = copy.deepcopy(source.tree)
        self.next = first
        self.changed = False
        self.origins: dict[str, list[ast.expr]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.origins.setdefault(node.targets[0].id, []).append(node.value)
        self.host: set[str] = set()
        self.listed: set[str] = set()  # hit lists that were lists of Python numbers

    def site(self) -> ast.Constant:
        self.next += 1
        return number(self.next - 1)

    def body(self, shrink: Callable[[Function], bool] | None = None) -> list[ast.stmt] | None:
        """The new body, or None when there is nothing to rewrite; ``shrink`` traces loops for two experts only."""
        Host(self).run()
        self.tree.body = self.block(self.tree.body, False)
        if shrink is not None and not shrink(self):
            return None
        if not self.changed:
            return None
        imported = ast.Import([ast.alias("moe_compile.loops.traced", HELPERS)])
        body = self.tree.body
        at_place(imported, body[0])
        documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        return [*body[:documented], imported, *body[documented:]]

    # --- statements ---------------------------------------------------------------------------------

    def block(self, statements: list[ast.stmt], in_loop: bool) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for i, s in enumerate(statements):
            if isinstance(s, ast.For) and not s.orelse:
                out += self.loop(s)
                continue
            if isinstance(s, ast.If) and in_loop:
                test = syntax.emptiness(s.test, self.host)
                rest = statements[i + 1 :]
                if test is not None:
                    guarded = self._guarded(s, test, rest)
                    if guarded is not None:
                        inside, after = guarded
                        return [*out, self.guard(s, test, inside), *self.block(after, True)]
            if isinstance(s, ast.If):
                s.body, s.orelse = self.block(s.body, in_loop), self.block(s.orelse, in_loop)
            out.append(s)
        return out

    def _guarded(
        self, s: ast.If, test: Test, rest: list[ast.stmt]
    ) -> tuple[list[ast.stmt], list[ast.stmt]] | None:
        """The statements that run only if there is an element, and those that run after them anyway."""
        goes_on = [type(x) for x in s.body] == [ast.Continue]
        nothing = all(isinstance(x, ast.Pass) for x in s.orelse)
        if not test.nonempty:
            inside, after = (rest, []) if goes_on and not s.orelse else (s.orelse, rest)
            if not goes_on and not all(isinstance(x, ast.Pass) for x in s.body):
                return None
        elif [type(x) for x in s.orelse] == [ast.Continue]:
            inside, after = [*s.body, *rest], []
        elif nothing:
            inside, after = s.body, rest
        else:
            return None
        try:
            self.require_plain(inside)
        except Unfit:
            return None
        return (inside, after) if inside else None

    def guard(self, s: ast.If, test: Test, inside: list[ast.stmt]) -> ast.stmt:
        """``if nonempty: inside`` with the assumption marked."""
        self.changed = True
        site = self.site()
        changed = self.escaping(inside)
        body = self.block(inside, True)
        if test.kind == "differ":
            assert test.other is not None
            condition = call("differ", site, test.evidence, test.other)
        else:
            condition = call("nonempty", site, test.evidence, ast.Constant(test.kind))
        new = ast.If(condition, [do("enter", site), *body, do("leave", site, *map(read, changed))], [])
        at_place(new, s)
        return new

    # --- loops --------------------------------------------------------------------------------------

    def loop(self, s: ast.For) -> list[ast.stmt]:
        hits, listed = syntax.without_host(s.iter)
        listed = listed or (isinstance(hits, ast.Name) and hits.id in self.listed)
        if isinstance(s.target, ast.Name) and syntax.is_hit_list(hits, self.origins):
            try:
                return self.hit_loop(s, hits, listed and syntax.is_flat(hits, self.origins))
            except Unfit:
                return [s]
        first: list[ast.stmt] = []
        counts = counted(s.iter, self.host)
        if counts is not None and isinstance(s.target, ast.Tuple) and len(s.target.elts) == 2:
            index, size = s.target.elts
            if isinstance(index, ast.Name) and isinstance(size, ast.Name):
                entry = ast.Subscript(counts, read(index.id), ast.Load())
                first = [ast.Assign([size], entry)]
                length = ast.Call(read("len"), [counts], [])
                s.target, s.iter = index, ast.Call(read("range"), [length], [])
                self.changed = True
        s.body = [*first, *self.block(s.body, True)]
        at_place(s, s)
        for new in first:
            at_place(new, s)
        return [s]

    def hit_loop(self, s: ast.For, hits: ast.expr, plain: bool) -> list[ast.stmt]:
        """``plain``: the loop variable is a Python number already."""
        assert isinstance(s.target, ast.Name)
        self.require_plain(s.body)
        expert = s.target.id
        changed = [n for n in self.escaping(s.body) if n != expert]
        site, name = self.site(), f"{HELPERS}_hits{self.next}"
        uses = Uses(expert, name, set(syntax.stored(ast.Module(s.body, []))), plain)
        body = [uses.visit(x) for x in s.body]
        if not uses.containers and self.tree.args.args:
            uses.containers.append(call("held", read(self.tree.args.args[0].arg)))
        if any(n.id == expert or n.id in uses.scalars for n in self._outside(s.body) if n is not s.target):
            raise Unfit("the expert is read after the loop")
        self.changed = True
        body = self.block(body, True)
        new: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store())], hits),
            do("enter", site),
            ast.For(
                s.target,
                call("hit_range", read(name), *uses.containers),
                [do("hit", site, read(name), read(expert)), *body],
                [],
            ),
            do("leave", site, *map(read, changed)),
        ]
        for node in new:
            at_place(node, s)
        return new

    # --- what a block does ----------------------------------------------------------------------------

    def require_plain(self, statements: Iterable[ast.stmt]) -> None:
        """Raise ``Unfit`` unless the statements only bind names, write tensors and append to lists that are joined."""
        for s in statements:
            if not isinstance(s, _PLAIN):
                raise Unfit(f"{type(s).__name__} at line {s.lineno}")
            targets = s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AugAssign) else []
            for target in targets:
                for t in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                    if not isinstance(t, (ast.Name, ast.Subscript)):
                        raise Unfit(f"an attribute is set at line {s.lineno}")
            if isinstance(s, (ast.If, ast.For)):
                self.require_plain([*s.body, *s.orelse])
            for node in ast.walk(s):
                self._require_plain_expression(node)

    def _require_plain_expression(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await, ast.Lambda, ast.NamedExpr)):
            raise Unfit(f"{type(node).__name__} at line {node.lineno}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, on = node.func.attr, node.func.value
            if name in _MUTATORS and isinstance(on, ast.Name):
                raise Unfit(f"{name} at line {node.lineno}")
            if name in _IN_PLACE and not (isinstance(on, ast.Name) and self._only_joined(on.id)):
                raise Unfit(f"a list is filled at line {node.lineno} and read otherwise than by cat")

    def _only_joined(self, name: str) -> bool:
        """Whether a list is read by ``torch.cat(list)``, ``list.append`` and ``if len(list)`` alone."""
        parents = {child: parent for parent in ast.walk(self.tree) for child in ast.iter_child_nodes(parent)}
        for load in syntax.loaded(self.tree):
            if load.id != name:
                continue
            parent = parents[load]
            if isinstance(parent, ast.Attribute) and parent.attr == "append":
                continue
            if isinstance(parent, ast.Call) and load in parent.args:
                called = syntax.called(parent)[0]
                if called in ("cat", "concat"):
                    continue
                if called == "len" and isinstance(parents[parent], (ast.If, ast.IfExp)):
                    continue
            if isinstance(parent, (ast.If, ast.IfExp)) and parent.test is load:
                continue
            return False
        return True

    def escaping(self, statements: list[ast.stmt]) -> list[str]:
        """Names that the statements bind and that are read outside of them, or before they are bound inside."""
        block = ast.Module(statements, [])
        bound = set(syntax.stored(block))
        outside = {n.id for n in self._outside(statements)}
        before: set[str] = set()
        seen: set[str] = set()
        for s in statements:
            reads = {n.id for n in syntax.loaded(s)}
            reads |= {s.target.id} if isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name) else set()
            before |= reads - seen
            if isinstance(s, ast.Assign):
                seen |= set(syntax.stored(s))
        return sorted(bound & (outside | before))

    def _outside(self, statements: list[ast.stmt]) -> list[ast.Name]:
        inside = {n for s in statements for n in ast.walk(s)}
        return [n for n in syntax.loaded(self.tree) if n not in inside]
