"""``@moe_compile.rewrite``: the author of a layer vouches for it, and is told when nothing in it was rewritten."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import nn

from moe_compile import breaks, torch_breaks
from moe_compile.backend import moe_compile
from moe_compile.config import AS_WRITTEN, PREFIX, Options, enabled
from moe_compile.report import Report, Site, collect
from moe_compile.spec import NoMatch

_T = TypeVar("_T")
_MARK = "_moe_compile_rewrite"


class NotRewritten(UserWarning):
    """Nothing in a decorated class or function was rewritten; the message names the nearest miss."""


@overload
def rewrite(target: _T, /) -> _T: ...
@overload
def rewrite(**options: Any) -> Callable[[_T], _T]: ...
def rewrite(target: Any = None, /, **options: Any) -> Any:
    """Run the MoE layers of a module class, or of a function, by our ops: bare, or with options.

        @moe_compile.rewrite
        class MoE(nn.Module): ...

        @moe_compile.rewrite(strict=True)
        def moe(hidden_states, router, w13, w2): ...

    Its calls are compiled with ``backend="moe_compile"``, the first time that it is called. Inside of an outer
    ``torch.compile`` it is traced as it was written, so the outer backend decides. Nothing is taken on trust: what
    cannot be proved stays as it is. If the first call rewrites nothing, that is a ``NotRewritten`` warning with the
    nearest miss, once, or with ``strict`` an error.

    Args:
        target: an ``nn.Module`` class (its ``forward`` is replaced, in place) or a Python function.
        **options: those of ``moe_compile.config.Options``.

    Returns:
        The same class, or a function of the same signature.

    Raises:
        OptionError: an unknown option, or a wrong value.
        TypeError: ``target`` is neither a module class with a ``forward`` nor a Python function.
        NoMatch: from the first call, with ``strict``: nothing in it was rewritten.
        RewriteError: from a call that compiles, with ``strict``, inside Dynamo's own error: a candidate was refused.
    """
    Options.resolve(options)
    if target is None:
        return functools.partial(_decorated, options=options)
    return _decorated(target, options)


def _decorated(target: Any, options: dict[str, Any]) -> Any:
    if isinstance(target, (staticmethod, classmethod)):
        return type(target)(_decorated(target.__func__, options))
    if isinstance(target, type) and issubclass(target, nn.Module):
        forward = target.forward
        if not isinstance(forward, types.FunctionType) or forward is nn.Module.forward:
            raise TypeError(f"moe_compile.rewrite: {target.__qualname__} defines no forward; decorate one that does")
        target.forward = _compiled(forward, target.__qualname__, options)
        return target
    if not isinstance(target, types.FunctionType):
        raise TypeError(f"moe_compile.rewrite takes an nn.Module class or a Python function, got {_described(target)}")
    if inspect.iscoroutinefunction(target) or inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise TypeError(f"moe_compile.rewrite: {target.__qualname__} is a generator or coroutine: decorate a function")
    return _compiled(target, target.__qualname__, options)


def _described(target: Any) -> str:
    if isinstance(target, nn.Module):
        return (
            f"an instance of {type(target).__name__}; decorate its class, or call "
            'torch.compile(module, backend="moe_compile")'
        )
    if isinstance(target, type):
        return f"the class {target.__qualname__}, which is no nn.Module; decorate the method that computes the layer"
    return f"{target!r} ({type(target).__name__})"


def _compiled(function: types.FunctionType, name: str, options: dict[str, Any]) -> types.FunctionType:
    """``function`` with the backend around it; decorated anew, it takes the new options."""
    function = getattr(function, _MARK, function)
    watched = _Watched(function, name, options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or AS_WRITTEN.get() or not enabled():
            return function(*args, **kwargs)
        return (watched.compiled if watched.done else watched)(*args, **kwargs)

    setattr(call, _MARK, function)
    return call  # type: ignore[return-value]


class _Watched:
    """The compiled function; until a call was compiled, calls also ask what came of the rewrite."""

    def __init__(self, function: types.FunctionType, name: str, options: dict[str, Any]) -> None:
        code = function.__code__
        self.name, self.location = name, f"{code.co_filename}:{code.co_firstlineno}"
        self.strict = Options.resolve(options).strict
        self.graphs = 0
        self.done = False
        self.error: NoMatch | None = None
        prefixed: dict[str, Any] = {PREFIX + key: value for key, value in options.items()}
        self.compiled = torch.compile(function, backend=self.backend, options=prefixed or None)

    def backend(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        self.graphs += 1
        return moe_compile(gm, example_inputs, **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.graphs
        with collect() as report, torch_breaks.collect_breaks() as found:
            out = self.compiled(*args, **kwargs)
        tried = self.graphs > before or bool(found)
        self.done = bool(report.rewritten) or (tried and not self.strict)
        if tried and not report.rewritten:
            self._tell(_nearest(report, breaks.sites(found)))
        elif self.error is not None and not self.done:
            raise self.error
        return out

    def _tell(self, site: Site) -> None:
        where = f" at {site.location}" if site.location else ""
        message = (
            f"{self.name} ({self.location}) is decorated with moe_compile.rewrite, but nothing in it was rewritten: "
            f"{site.why()}{where}; fix: {site.advice() or 'none known'}"
        )
        if self.strict:
            self.error = NoMatch(site.code or "MC200", message)
            raise self.error
        warnings.warn(f"{message}. The original runs.", NotRewritten, stacklevel=4)


def _nearest(report: Report, broken: list[Site]) -> Site:
    """The row that says most about why nothing was rewritten."""
    nothing = Site("refused", code="MC200", reason="nothing in it looks like a sum over experts")
    # Of a function that breaks, the refusals are those of its fragments.
    return next(iter([*broken, *report.not_captured, *report.refused]), nothing)


# Whatever is scoped to our backend (capture settings, the Hugging Face hook) holds for this one too.
_Watched.backend.__wrapped__ = moe_compile  # type: ignore[attr-defined]
