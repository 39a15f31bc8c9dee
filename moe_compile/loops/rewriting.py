"""Loops that Dynamo cannot capture, rewritten as loops that it can: over all experts, without tests for emptiness.

Nothing here proves anything: every step leaves a mark in the graph that says what it assumed (``marks.py``), and
``claims.py`` proves the marks or the function is traced again as it was written.

* ``for e in hits`` -> ``for e in range(E)``: an expert without tokens adds nothing.
* ``if idx.numel() == 0: continue``, ``if mask.any():`` -> the block always runs: without rows it adds nothing.
* ``x[idx.tolist()]`` -> ``x[idx]``: a list of numbers indexes like the tensor that it came from.
* counts fetched to the host, ``x[start:end]``, ``x.split(counts)`` -> groups of rows whose number only the device knows.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable

from . import syntax
from .source import Source
from .syntax import Test

HELPERS = "_moe_compile"
_IN_PLACE = frozenset({"append"})
_MUTATORS = frozenset({"extend", "insert", "pop", "remove", "clear", "update", "setdefault", "add", "write", "sort"})
_PLAIN = (
    ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.If, ast.For, ast.Pass, ast.Continue,
)  # fmt: skip


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
        self.grouped: dict[str, ast.expr] = {}  # rows cut by counts: name of the list of results -> what was cut
        self.split: set[str] = set()

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
        hits, _ = syntax.without_host(s.iter)
        if isinstance(s.target, ast.Name) and syntax.is_hit_list(hits, self.origins):
            try:
                return self.hit_loop(s, hits)
            except Unfit:
                return [s]
        first: list[ast.stmt] = []
        counted = self._counted(s.iter)
        if counted is not None and isinstance(s.target, ast.Tuple) and len(s.target.elts) == 2:
            index, size = s.target.elts
            if isinstance(index, ast.Name) and isinstance(size, ast.Name):
                entry = ast.Subscript(counted, read(index.id), ast.Load())
                first = [ast.Assign([size], entry)]
                length = ast.Call(read("len"), [counted], [])
                s.target, s.iter = index, ast.Call(read("range"), [length], [])
                self.changed = True
        s.body = [*first, *self.block(s.body, True)]
        at_place(s, s)
        for new in first:
            at_place(new, s)
        return [s]

    def _counted(self, iterated: ast.expr) -> ast.expr | None:
        """``counts`` of ``enumerate(counts)`` when these are numbers fetched to the host."""
        if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.func.id == "enumerate":
            if len(iterated.args) == 1 and isinstance(iterated.args[0], ast.Name) and iterated.args[0].id in self.host:
                return iterated.args[0]
        return None

    def hit_loop(self, s: ast.For, hits: ast.expr) -> list[ast.stmt]:
        assert isinstance(s.target, ast.Name)
        self.require_plain(s.body)
        expert = s.target.id
        changed = [n for n in self.escaping(s.body) if n != expert]
        site, name = self.site(), f"{HELPERS}_hits{self.next}"
        uses = Uses(expert, name, set(syntax.stored(ast.Module(s.body, []))))
        body = [uses.visit(x) for x in s.body]
        if not uses.containers:
            raise Unfit("nothing is indexed by the expert")
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


class Uses(ast.NodeTransformer):
    """The uses of a loop variable over hit experts, rewritten for plain numbers.

    ``vector`` are names of a row of the hit list (a tensor), ``scalars`` names of the number itself.
    """

    def __init__(self, expert: str, hits: str, bound: set[str]) -> None:
        self.vector, self.scalars, self.hits, self.bound = {expert}, set[str](), hits, bound
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
            if syntax.is_static(node.value) and name not in self.bound and isinstance(node.ctx, ast.Load):
                if not any(syntax.same(c, node.value) for c in self.containers):
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


class Host:
    """Names for numbers fetched from the device: index lists become tensors again, counts become ``Sizes``."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.tree = function.tree
        self.parents = {c: p for p in ast.walk(self.tree) for c in ast.iter_child_nodes(p)}

    def run(self) -> None:
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
        stores = [s for s in ast.walk(self.tree) if isinstance(s, ast.Name) and s.id == name and s not in later]
        if any((s.lineno, s.col_offset) > position and isinstance(s.ctx, ast.Store) for s in stores):
            return
        uses = {self._use(n) for n in later}
        if uses == {"index"}:
            node.value = inner
        elif uses == {"loop"} and syntax.is_hit_list(inner, self.function.origins):
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
            counted = self.function._counted(node.iter) if isinstance(node, ast.For) else None
            if counted is not None and isinstance(node.target, ast.Tuple) and len(node.target.elts) == 2:  # type: ignore[union-attr]
                host |= {e.id for e in node.target.elts[1:] if isinstance(e, ast.Name)}  # type: ignore[union-attr]
        for _ in range(3):
            for name, values in self.function.origins.items():
                if any(self._is_offset(v) for v in values):
                    host.add(name)

    def _is_offset(self, value: ast.expr) -> bool:
        plain = (
            ast.Name, ast.BinOp, ast.Add, ast.Sub, ast.IfExp, ast.Compare, ast.Eq, ast.Constant, ast.Load, ast.Subscript,
        )  # fmt: skip
        if not all(isinstance(n, plain) for n in ast.walk(value)):
            return False
        return any(n.id in self.function.host for n in syntax.loaded(value))


class _Grouped(ast.NodeTransformer):
    """Slices, splits and joins of rows by counts."""

    def __init__(self, function: Function) -> None:
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
