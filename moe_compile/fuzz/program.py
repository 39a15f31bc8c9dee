"""A case as a running program: its module executed from registered text, its weights, inputs and float64 twin."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .axes import Case
from .source import source_of

_BIG = 200.0  # exp(-200) is zero in float32: the other experts' weights vanish


@dataclass
class Program:
    """A model, its inputs, and the text it came from."""

    case: Case
    source: str
    model: Any
    double: Any  # the class ``Model`` of the float64 twin

    def inputs(self, turn: int) -> tuple[Tensor, ...]:
        """Tokens (and external ids and weights) of the first or a later call; a later one may have other sizes."""
        c = self.case
        tokens = c.tokens
        if turn and c.mode in ("dynamic", "recompile"):
            tokens = {7: 12, 2: 5, 33: 6}.get(tokens, tokens + 3)
        g = torch.Generator().manual_seed(1000 * c.seed + turn)
        outer = next((n for n in (2, 3, 5, 7) if tokens % n == 0 and tokens > n), 1)
        shape = (tokens,) if c.rank == "2d" else (outer, tokens // outer)
        x = torch.randn(*shape, c.hidden, generator=g).to(getattr(torch, c.dtype))
        if c.router != "external":
            return (x,)
        weights = torch.rand(tokens, c.top_k, generator=g).to(torch.float32 if c.weight == "fp32" else x.dtype)
        ids = torch.randint(c.experts, (tokens, c.top_k), generator=g)
        if c.style % 2 == 0:  # distinct experts per token
            ids = torch.rand(tokens, c.experts, generator=g).argsort(dim=-1)[:, : c.top_k].contiguous()
        return x, weights, ids

    def next_turn(self) -> None:
        """Change every parameter in place: weights are inputs, and the routing moves to other experts."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(p.roll(1, 0) if name.endswith("gate.bias") else p * 1.25)

    def reference(self, args: tuple[Tensor, ...], routing: list[Any]) -> Any:
        """The program in float64 on ``args``, with the routing of an earlier run of the original."""
        twin = self.double().double()
        twin.load_state_dict({k: v.double() for k, v in self.model.state_dict().items()})
        for (_, router), made in zip(routers(twin), routing, strict=True):
            router.forward = _replay(made)
        return twin(*(a.double() if a.is_floating_point() else a for a in args))


def routers(model: nn.Module) -> list[tuple[str, Any]]:
    """The router modules of a program in the order of their calls."""
    return [(name, m) for name, m in model.named_modules() if type(m).__name__ == "Router"]


def recorded(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, list[Any]]:
    """The result of a call, and what each router returned in it."""
    made: list[Any] = []
    hooks = [r.register_forward_hook(lambda _, __, out: made.append(out)) for _, r in routers(model)]
    try:
        return model(*args), made
    finally:
        for hook in hooks:
            hook.remove()


def _replay(made: Any) -> Any:
    wide = tuple(t.double() if t.is_floating_point() else t for t in made)
    return lambda x: wide


def _grouped_mm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """``torch._grouped_mm`` in float64: ``[S, in] x [E, in, out]``, rows of expert e end at ``offs[e]``."""
    starts = [0, *offs.tolist()[:-1]]
    return torch.cat([rows[a:b] @ w for a, b, w in zip(starts, offs.tolist(), weight, strict=True)])


def _in_double(source: str) -> str:
    """The same program without casts to float32, and with a grouped product that takes float64."""
    for narrow, wide in (
        (".float()", ".double()"),
        ("torch.float32", "torch.float64"),
        ("torch._grouped_mm(", "_grouped_mm("),
    ):
        source = source.replace(narrow, wide)
    return source


def _execute(name: str, source: str) -> types.ModuleType:
    """The text as a module that ``inspect``, tracebacks and Dynamo can read lines of."""
    module = types.ModuleType(name)
    module.__file__ = f"{name}.py"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(True), module.__file__)
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


@contextmanager
def program(case: Case) -> Iterator[Program]:
    """The case's program, removed from ``sys.modules`` at the end.

    Raises:
        SyntaxError: a mutation does not fit the text.
    """
    source = source_of(case)
    names = [f"moe_fuzz_{case.seed}", f"moe_fuzz_{case.seed}_double"]
    try:
        module = _execute(names[0], source)
        double = _execute(names[1], _in_double(source))
        double.__dict__["_grouped_mm"] = _grouped_mm
        torch.manual_seed(case.seed)
        model = module.Model().to(getattr(torch, case.dtype))
        model.train(case.mode == "train")
        _route(model, case)
        yield Program(case, source, model, double.Model)
    finally:
        for name in names:
            sys.modules.pop(name, None)
            linecache.cache.pop(f"{name}.py", None)


def _route(model: nn.Module, case: Case) -> None:
    """Send the tokens where the case wants them."""
    for _, router in routers(model):
        with torch.no_grad():
            weight, bias = router.gate.weight, router.gate.bias
            if case.routing == "random":
                weight.mul_(2)
            elif case.routing == "ties":
                weight.zero_()
                bias.zero_()
            elif case.routing == "one":
                bias[0] += 30
            elif case.routing == "zero":
                bias[1:] -= _BIG
            else:  # only the first K experts (of a group, too) are ever chosen
                bias[max(case.top_k, 1) :] -= 20
