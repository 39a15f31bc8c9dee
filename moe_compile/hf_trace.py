"""What the Hugging Face way in needs while Dynamo traces.

Checked on torch 2.11 and 2.13. Two things happen here that no public API offers: asking which backend
the current trace is for, and *probing*: tracing a piece of user code for its operations and its guards
without leaving it in the graph.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx

from .torch_compat import current_backend, is_our_backend


@torch.compiler.assume_constant_result
def is_ours() -> bool:
    """Whether the running Dynamo trace is for one of our backends; False outside a trace."""
    return is_our_backend(current_backend())


def local(ctx: Any, name: str) -> Any:
    """The Python object behind a local of the frame that called ``comptime``."""
    variable = ctx.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    if hasattr(variable, "realize"):
        variable = variable.realize()
    if hasattr(variable, "module_key"):  # inline_inbuilt_nn_modules=False
        return ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.get_submodule(variable.module_key)
    return variable.value if hasattr(variable, "value") else variable.as_python_constant()


def local_tensors(ctx: Any, name: str) -> list[Any]:
    """Fake tensors of a local tuple of tensors; None for entries that are no tensors."""
    proxies = ctx.get_local(name).as_proxy()
    return [p.node.meta.get("example_value") if isinstance(p, fx.Proxy) else None for p in proxies]


class Probe(threading.local):
    """The part of the graph that was traced since ``begin``; one probe at a time per thread."""

    last: fx.Node | None = None

    def begin(self, ctx: Any) -> None:
        """Call before the probed code."""
        nodes = list(ctx.graph().nodes)
        self.last = nodes[-1] if nodes else None

    def take(self, ctx: Any, result: str) -> fx.GraphModule | None:
        """Remove what the probed code left in the graph, and return it as a function of its input.

        The input is the first ``new_empty`` after ``begin``, the output the tensor in the local
        ``result``. Only nodes that depend on the input are removed: other new nodes belong to lifted
        attributes, which Dynamo may use again.

        Returns:
            None when the code needs another tensor, or is more than calls.
        """
        nodes = list(ctx.graph().nodes)
        new = nodes if self.last is None else nodes[nodes.index(self.last) + 1 :]
        self.last = None
        root = next((n for n in new if n.op == "call_method" and n.target == "new_empty"), None)
        if root is None:
            return None
        inside = {root}
        for node in new:
            if any(argument in inside for argument in node.all_input_nodes):
                inside.add(node)
        body = [node for node in new if node in inside]
        function = _as_function(body, ctx.get_local(result).as_proxy())
        output = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
        for node in reversed(body):
            output.remove_node(node)
        return function


def _as_function(body: Sequence[fx.Node], result: Any) -> fx.GraphModule | None:
    """``body``, whose first node becomes the input, up to the proxy ``result``."""
    if any(node.op not in ("call_function", "call_method") for node in body):
        return None
    copy = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {body[0]: copy.placeholder("rows")}
    for node in body[1:]:
        if any(argument not in copied for argument in node.all_input_nodes):
            return None
        copied[node] = copy.node_copy(node, copied.__getitem__)
    if not isinstance(result, fx.Proxy) or result.node not in copied:
        return None
    copy.output(copied[result.node])
    return fx.GraphModule({}, copy)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs actions right after named modules were imported, without importing them."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        action = self.actions.get(fullname)
        if action is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ActingLoader(spec.loader, lambda module: self._loaded(fullname, module))
                return spec
        return None

    def _loaded(self, fullname: str, module: ModuleType) -> None:
        action = self.actions.pop(fullname, None)
        if action is not None:
            action(module)


class _ActingLoader(importlib.abc.Loader):
    """Loads like ``loader``, then acts; the module keeps its own loader for inspection."""

    def __init__(self, loader: Any, action: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action(module)


_after_import = _AfterImport()


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Run ``action(module)`` now if the module is loaded, else right after somebody imports it."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
        return
    _after_import.actions[name] = action
    if _after_import not in sys.meta_path:
        sys.meta_path.insert(0, _after_import)
