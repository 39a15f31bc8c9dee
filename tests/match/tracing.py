"""Facts of a few lines of code, without a whole layer around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile.canonical import canonicalise
from moe_compile.match.engine import Engine
from moe_compile.rewriting import facts_of

T, K, E, H, I = 7, 2, 4, 16, 24  # all different, so that no size passes for another

# There the code of such a layer breaks Dynamo's graph: it runs as it is, with MC101.
traces_take_along_dim = pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 cannot trace take_along_dim over a number of rows that depends on data",
)


def engine_of(fn: Callable[..., Any], **inputs: Any) -> tuple[Engine, fx.Node | Any]:
    """The engine after ``fn``, and the node (or nodes) that it returns; names with "parameter" are parameters."""
    graph = make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*inputs.values())
    for node, name in zip([n for n in graph.graph.nodes if n.op == "placeholder"], inputs, strict=True):
        node.name = name
    engine = facts_of(canonicalise(graph))
    return engine, next(n for n in engine.copy.graph.nodes if n.op == "output").args[0]


def fact_of(fn: Callable[..., Any], **inputs: Any) -> Any:
    """What is known about the value that ``fn`` returns, or the code of a refusal at that value."""
    engine, node = engine_of(fn, **inputs)
    return engine.fact(node)


def codes_of(fn: Callable[..., Any], **inputs: Any) -> list[str]:
    """The codes of the refusals on the way."""
    return [miss.error.code for miss in engine_of(fn, **inputs)[0].misses]


def said(fn: Callable[..., Any], **others: Any) -> Any:
    """The name of the fact of ``fn``'s result, the code of a refusal there, or None; ``INPUTS`` by name."""
    inputs = {name: others.get(name, INPUTS.get(name)) for name in inspect.signature(fn).parameters}
    engine, node = engine_of(fn, **inputs)
    codes = [miss.error.code for miss in engine.misses if miss.node is node]
    fact = engine.fact(node)
    return type(fact).__name__ if fact is not None else codes[0] if codes else None


def tokens(*shape: int) -> torch.Tensor:
    return torch.zeros(*(shape or (T, H)))


def chosen(*shape: int) -> torch.Tensor:
    return torch.zeros(*(shape or (T, K)), dtype=torch.int64)


INPUTS = {
    "x": tokens(T, H), "w": tokens(T, K), "ids": chosen(T, K), "scores": tokens(T, E), "flat": chosen(T * K),
    "parameter": tokens(I, H), "down_parameter": tokens(H, I), "stack_parameter": tokens(E, I, H),
    "bias_parameter": tokens(I), "biases_parameter": tokens(E, I), "y": tokens(T, E, H),
}  # fmt: skip
