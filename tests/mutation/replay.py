"""``support.rewritten`` without Dynamo from the second time on: captures are kept per test and call, and replayed.

What Dynamo hands to the backend does not depend on the matcher. So its graph, its canonical copy and where the inputs
and outputs come from are recorded once; a replay only matches, lowers and runs the graph on the inputs of the new call.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import support
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

import moe_compile.rewriting as rewriting
from moe_compile import capture, torch_compat
from moe_compile.canonical import Canonical, canonicalise


@dataclass
class Capture:
    """One graph of one call, as it was before any rewrite."""

    module: fx.GraphModule
    copy: Canonical | None

    def rewritten(self) -> tuple[fx.GraphModule, list[Any]]:
        """A fresh module, rewritten, and its sites."""
        graph = torch_compat.copy_graph(self.module.graph)
        twin = fx.GraphModule(self.module, graph)
        new = dict(zip(self.module.graph.nodes, graph.nodes, strict=True))
        kept, rewriting.canonicalise = rewriting.canonicalise, lambda _: self._copy(new)  # type: ignore[assignment]
        try:
            return twin, rewriting.rewrite_graph(twin).sites
        finally:
            rewriting.canonicalise = kept

    def _copy(self, new: dict[fx.Node, fx.Node]) -> Canonical:
        if self.copy is None:
            raise RuntimeError("a graph that was not worth a look is looked at")
        origins = {n: [new[o] for o in found] for n, found in self.copy.origins.items()}
        first = {n: new[o] for n, o in self.copy.first_origin.items()}
        return replace(self.copy, origins=origins, first_origin=first)


@dataclass
class Call:
    """One recorded call of ``rewritten``: its captures, and how to run the only graph of it."""

    captures: list[Capture] = field(default_factory=list)
    runs: list[tuple[Any, ...]] = field(default_factory=list)  # of the graph: (graph, inputs, outputs)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    structure: Any = None
    replayable: bool = False


class Recorder:
    """Stands in for ``support.rewritten``: records while ``item`` is new, replays afterwards."""

    def __init__(self) -> None:
        self.item: str = ""
        self.at = 0
        self.calls: dict[tuple[str, int], Call] = {}
        self.slow: set[str] = set()  # tests that must run with Dynamo every time
        self.original = support.rewritten

    def start(self, item: str) -> None:
        self.item, self.at = item, 0

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        key, self.at = (self.item, self.at), self.at + 1
        if kwargs:  # not recorded
            self.slow.add(self.item)
        if self.item in self.slow:
            return self.original(model, *args, **kwargs)
        known = self.calls.get(key)
        if known is None:
            return self._record(key, model, args)
        return self._replay(known, model, args)

    def _record(self, key: tuple[str, int], model: Any, args: Any) -> Any:
        torch._dynamo.reset()
        call, outcome = Call(), support.Outcome()

        def run(gm: fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
            kept = fx.GraphModule(gm, torch_compat.copy_graph(gm.graph))
            seen = Capture(kept, canonicalise(kept) if rewriting._worth_a_look(kept) else None)
            call.captures.append(seen)
            twin, sites = seen.rewritten()
            outcome.sites += sites
            outcome.graphs.append(twin)

            def forward(*inputs: Any) -> Any:
                result = twin(*inputs)
                call.runs.append((inputs, result))
                return result

            return forward

        capture.install(run)
        compiled = torch.compile(model, backend=run)
        with torch.no_grad():
            outcome.out = compiled(*args)
        self._bind(call, model, args, outcome.out)
        self.calls[key] = call
        if not call.replayable:
            self.slow.add(self.item)

        def called(*_: Any, **__: Any) -> Any:
            self.slow.add(self.item)
            return compiled(*_, **__)

        outcome.call = called
        return outcome

    def _bind(self, call: Call, model: Any, args: Any, out: Any) -> None:
        """Say of every input and output of the graph where it comes from, if there is one graph and it can be said."""
        if len(call.runs) != 1:
            return
        inputs, results = call.runs.pop()
        sources = _sources(model, args)
        for value in inputs:
            if isinstance(value, Tensor) and id(value) not in sources:
                return
            call.inputs.append(sources[id(value)] if isinstance(value, Tensor) else ("value", value))
        made = {id(r): ("result", i) for i, r in enumerate(results) if isinstance(r, Tensor)}
        leaves, call.structure = tree_flatten(out)
        for leaf in leaves:
            source = made.get(id(leaf)) or sources.get(id(leaf))
            if source is None:
                return
            call.outputs.append(source)
        call.replayable = True

    def _replay(self, call: Call, model: Any, args: Any) -> Any:
        outcome = support.Outcome()
        with torch.no_grad():
            for seen in call.captures:
                twin, sites = seen.rewritten()
                outcome.sites += sites
                outcome.graphs.append(twin)
            given = {source: value for value, source in _tensors(model, args)}
            results = twin(*(given[s] if s[0] != "value" else s[1] for s in call.inputs))
        leaves = [results[s[1]] if s[0] == "result" else given[s] for s in call.outputs]
        outcome.out = tree_unflatten(leaves, call.structure)
        return outcome


def _tensors(model: Any, args: Any) -> list[tuple[Any, tuple[str, Any]]]:
    """The parameters, buffers and arguments of a call, each with a name for where it is."""
    found: list[tuple[Any, tuple[str, Any]]] = [(a, ("argument", i)) for i, a in enumerate(args)]
    if isinstance(model, torch.nn.Module):
        found += [(p, ("parameter", n)) for n, p in model.named_parameters(remove_duplicate=False)]
        found += [(b, ("buffer", n)) for n, b in model.named_buffers(remove_duplicate=False)]
    return found


def _sources(model: Any, args: Any) -> dict[int, tuple[str, Any]]:
    return {id(value): source for value, source in reversed(_tensors(model, args))}
