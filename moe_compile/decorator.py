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

from moe_compile import breaks, torch_breaks, torch_compat
from moe_compile.backend import RewriteError, moe_compile
from moe_compile.config import AS_WRITTEN, PREFIX, OptionError, Options, enabled
from moe_compile.report import NOT_CAPTURED, REFUSED, REWRITTEN, Site, collect, tell
from moe_compile.spec import NoMatch

_T = TypeVar("_T")
_MARK = "_moe_compile_rewrite"


class NotRewritten(UserWarning):
    """Nothing in a decorated class or function was rewritten; the message names the nearest miss."""


@overload
def rewrite(target: _T, /, **options: Any) -> _T: ...
@overload
def rewrite(**options: Any) -> Callable[[_T], _T]: ...
def rewrite(target: Any = None, /, **options: Any) -> Any:
    """Run the MoE layers of a module class, or of a function, by our ops: bare, or with options.

        @moe_compile.rewrite
        class MoE(nn.Module): ...

        @moe_compile.rewrite(strict=True)
        def moe(hidden_states, router, w13, w2): ...

    Calls are compiled with ``backend="moe_compile"``, from the first one on, once for all instances of a class. Nothing
    is taken on trust: what cannot be proved stays as it was written. If the first call rewrites nothing, that is one
    ``NotRewritten`` warning with the nearest miss, or with ``strict`` an error.

    Inside an outer ``torch.compile`` or ``torch.export`` the code is traced as it was written, so the outer backend
    decides; tracers, dispatch modes and ``torch.func`` transforms see the code as it was written, too. A subclass that
    overrides ``forward`` is another layer: only its ``super().forward`` is compiled.

    Args:
        target: an ``nn.Module`` class (its ``forward`` is replaced, in place) or a Python function. Decorated again,
            it takes the new options.
        **options: those of ``moe_compile.config.Options``.

    Returns:
        The same class, or a function of the same signature.

    Raises:
        OptionError: an unknown option, or a wrong value; from the first call if it does not fit the inputs.
        TypeError: ``target`` is neither a module class with a ``forward`` nor a Python function.
        NoMatch: from a call, with ``strict``: nothing was rewritten, or a candidate was refused. A refusal raises
            before the program runs, a graph break only after it.
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
    return _compiled(target, target.__qualname__, options)


def _described(target: Any) -> str:
    if isinstance(target, nn.Module):
        return (
            f"an instance of {type(target).__name__}; decorate its class, or call "
            'torch.compile(module, backend="moe_compile")'
        )
    if isinstance(target, type):
        return f"the class {target.__qualname__}, which is no nn.Module; decorate the method that computes the layer"
    if inspect.ismethod(target):
        return f"the bound method {target.__qualname__}; decorate the function in its class"
    return f"{target!r} ({type(target).__name__})"


def _compiled(function: types.FunctionType, name: str, options: dict[str, Any]) -> types.FunctionType:
    """``function`` with the backend around it."""
    known = getattr(function, _MARK, None)
    if known is not None and known.call is function:  # functools.wraps of somebody else copies the mark
        function = known.function
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(kind(function) for kind in kinds):
        raise TypeError(f"moe_compile.rewrite: {name} is a generator or coroutine; decorate a plain function")
    declared = _Declared(function, name, options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # nothing else here is traced: no guard, no graph break
            return function(*args, **kwargs)
        return declared(*args, **kwargs)

    declared.call = call
    setattr(call, _MARK, declared)
    return call  # type: ignore[return-value]


class _Declared:
    """A function that is said to be an MoE layer; until something came of that, its calls are watched."""

    call: Callable[..., Any]

    def __init__(self, function: types.FunctionType, name: str, options: dict[str, Any]) -> None:
        self.function, self.name, self.options = function, name, options
        self.code = inspect.unwrap(function).__code__
        self.done = False
        self.graphs = 0
        self.sites: list[Site] = []  # of every call so far: one that raised may have compiled

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        prefixed: dict[str, Any] = {PREFIX + key: value for key, value in self.options.items()}
        return torch.compile(self.function, backend=self.backend, options=prefixed or None)

    def backend(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        self.graphs += 1
        return moe_compile(gm, example_inputs, **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if AS_WRITTEN.get() or not enabled() or torch_compat.must_run_as_written():
            return self.function(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs) if self.done else self.watched(*args, **kwargs)
        except Exception as error:  # Dynamo wraps what a backend raises; ours comes out bare, the rest as it was
            cause = torch_compat.backend_error(error)
            if isinstance(cause, RewriteError):
                raise self.miss(_nearest(cause.sites)) from None
            if isinstance(cause, OptionError):
                raise cause from None
            raise

    def watched(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with collect(quiet=True) as report, torch_breaks.collect_breaks() as found:
                out = self.compiled(*args, **kwargs)
        finally:
            self.sites += report.sites + breaks.sites(found, declared=True)
        if not self.sites and not self.graphs and not torch_compat.compiles_as_usual():
            return out  # nobody has looked yet
        missed = [s for s in self.sites if s.status != REWRITTEN]
        if len(missed) == len(self.sites):
            site = _nearest(missed, self.graphs)
            if Options.resolve(self.options).strict:
                raise self.miss(site)
            self.done = True  # before the warning, which may be an error by the user's choice
            message = f"{self.miss(site).reason}; the original runs"
            missed = [s for s in missed if s is not site]
            # The place to mend is the layer, not the line of torch that called it.
            place = self.code.co_filename, self.code.co_firstlineno
            warnings.warn_explicit(message, NotRewritten, *place, module=self.function.__module__)
        self.done = True
        for site in missed:
            tell(site)
        self.sites.clear()
        return out

    def miss(self, site: Site) -> NoMatch:
        where = f" at {site.location}" if site.location else ""
        return NoMatch(
            site.code or "MC200",
            f"{self.name} ({self.code.co_filename}:{self.code.co_firstlineno}) is decorated with moe_compile.rewrite, "
            f"but was not rewritten: {site.why()}{where}; fix: {site.advice() or 'none known'}",
        )


# Whatever is scoped to our backend (capture settings, the Hugging Face hook) holds for this one too.
_Declared.backend.__wrapped__ = moe_compile  # type: ignore[attr-defined]


def _nearest(sites: Sequence[Site], graphs: int = 1) -> Site:
    """The row that says most about why nothing was rewritten."""
    if not graphs:
        none = Site(NOT_CAPTURED, code="MC106", reason="no graph reached the backend")
    else:
        none = Site(REFUSED, code="MC200", reason="nothing in it looks like a sum over experts")
    # Of a function that breaks at its routing, the refusals are those of its fragments; other breaks cut anywhere.
    cut = [s for s in sites if s.status == NOT_CAPTURED and s.code not in ("MC104", "MC105")]
    refused = [s for s in sites if s.status == REFUSED]
    return next(iter([*cut, *refused, *sites]), none)
