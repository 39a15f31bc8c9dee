"""What the package hangs into Dynamo's tracing: whose trace it is, with which settings, and of which source.

Private torch names like those of ``torch_compat``, and checked like them.
"""

from __future__ import annotations

import dis
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

from .torch_compat import dynamo_config

log = logging.getLogger("moe_compile.capture")

_backends: list[Any] = []  # compared by identity: backends need not be hashable
_WRAPPER_ATTRIBUTES = ("_torchdynamo_orig_backend", "compiler_fn", "__wrapped__", "func")


def add_backend(backend: Any) -> None:
    """Make ``is_our_backend`` true for ``backend`` and for whatever wraps it; idempotent."""
    if not any(known is backend for known in _backends):
        _backends.append(backend)


def current_backend() -> Any:
    """The backend of the running Dynamo trace, None outside a trace."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return None


def current_options() -> dict[str, Any]:
    """``options`` of the ``torch.compile`` call whose trace is running; empty where there is none."""
    for wrapper in _unwrapped(current_backend()):
        kwargs = getattr(wrapper, "kwargs", None)  # of torch._TorchCompileWrapper
        if isinstance(kwargs, dict) and kwargs.get("options"):
            return dict(kwargs["options"])
    return {}


def is_our_backend(compiler_fn: Any) -> bool:
    """Whether a Dynamo compiler function is (a wrapper around) one of our backends."""
    return any(candidate is backend for candidate in _unwrapped(compiler_fn) for backend in _backends)


def _unwrapped(compiler_fn: Any) -> Iterator[Any]:
    """A compiler function and what it wraps: torch.compile, the debug wrapper and functools.partial hide a backend."""
    pending, seen = [compiler_fn], set()
    while pending:
        candidate = pending.pop()
        if candidate is not None and id(candidate) not in seen:
            seen.add(id(candidate))
            yield candidate
            pending += [getattr(candidate, name, None) for name in _WRAPPER_ATTRIBUTES]


_without_capture: list[Any] = []  # code objects that cannot be traced with dynamic-shape capture


def scope_dynamic_capture(is_ours: Callable[[Any], bool]) -> None:
    """Turn ``capture_dynamic_output_shape_ops`` on for traces whose backend ``is_ours``; idempotent.

    The flag is read once, when Dynamo makes the shape environment of a frame. A frame that then fails on a
    data-dependent size (which without the flag would have been a graph break) is traced once more without it.
    """
    from torch._dynamo import exc
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    init, run = OutputGraph.__init__, InstructionTranslator.run
    if getattr(init, "_moe_compile", False):
        return

    def scoped_init(self: Any, code_options: Any, compiler_fn: Any, *args: Any, **kwargs: Any) -> None:
        code = kwargs.get("f_code")
        if is_ours(compiler_fn) and not any(c is code for c in _without_capture):
            with dynamo_config(capture_dynamic_output_shape_ops=True):
                init(self, code_options, compiler_fn, *args, **kwargs)
        else:
            init(self, code_options, compiler_fn, *args, **kwargs)

    def restarting_run(self: Any) -> None:
        try:
            run(self)
        except GuardOnDataDependentSymNode as error:
            if self.one_graph or not is_ours(self.output.compiler_fn):
                raise
            if any(c is self.f_code for c in _without_capture):
                raise
            _without_capture.append(self.f_code)
            raise exc.UnspecializeRestartAnalysis(restart_reason="data-dependent size") from error

    scoped_init._moe_compile = True  # type: ignore[attr-defined]
    OutputGraph.__init__ = scoped_init  # type: ignore[method-assign]
    InstructionTranslator.run = restarting_run  # type: ignore[method-assign]


# --- tracing another source than the one that runs ------------------------------------------------------


def has_loop(code: types.CodeType) -> bool:
    """Whether a code object contains a ``for`` loop, those of its comprehensions included."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return dis.opmap["FOR_ITER"] in code.co_code[::2] or any(has_loop(c) for c in inner)


class TraceAgain(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """From inside a backend: let Dynamo trace the frame once more.

    The first base passes through Dynamo's call of a backend, the second clears its log of the attempt.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(restart_reason=reason)


def substitute_code(
    is_ours: Callable[[Any], bool],
    begin: Callable[[Any], None],
    choose: Callable[[types.CodeType], types.CodeType | None],
    retreat: Callable[[], bool],
) -> None:
    """Trace ``choose(code)`` instead of ``code`` in compilations whose backend ``is_ours``; idempotent.

    ``begin(attempts)`` is called before each attempt to trace a frame with an object that lives as long as all of
    them. When an attempt breaks the graph or fails, ``retreat()`` says whether chosen code was part of it; then the
    frame is traced again (the rest of a broken graph would go on in the chosen code).
    """
    from torch._dynamo import convert_frame, exc
    from torch._dynamo.bytecode_transformation import cleaned_instructions, get_code_keys
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.variables.functions import UserFunctionVariable

    trace_frame, get_code = convert_frame.trace_frame, UserFunctionVariable.get_code
    compile_subgraph = OutputGraph.compile_subgraph
    if getattr(trace_frame, "_moe_compile", False):
        return
    active = threading.local()

    def scoped_trace_frame(code: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(active, "root", None)
        compiler_fn, attempts, instructions, options = args[4], args[7], args[8], args[9]
        active.root = code if is_ours(compiler_fn) else None
        try:
            if active.root is not None:
                begin(attempts)
                new = choose(code)
                if new is not None:
                    code = new
                    instructions[:] = cleaned_instructions(new)
                    options.clear()
                    options.update({key: getattr(new, key) for key in get_code_keys()})
            return trace_frame(code, *args, **kwargs)
        except (exc.RestartAnalysis, exc.BackendCompilerFailed):
            raise
        except Exception as error:
            if active.root is not None and retreat():
                log.debug("not traced with rewritten loops: %s: %s", type(error).__name__, error)
                attempts.clear()
                raise TraceAgain("a function with a rewritten loop could not be traced") from None
            raise
        finally:
            active.root = before

    def scoped_get_code(self: Any) -> Any:
        code = get_code(self)
        return code if getattr(active, "root", None) is None else choose(code) or code

    def scoped_compile_subgraph(self: Any, tx: Any, reason: Any, *args: Any, **kwargs: Any) -> Any:
        if reason.graph_break and getattr(active, "root", None) is not None and retreat():
            log.debug("a graph break with rewritten loops: %s", reason.reason)
            raise TraceAgain("a graph break in a function with a rewritten loop")
        return compile_subgraph(self, tx, reason, *args, **kwargs)

    scoped_trace_frame._moe_compile = True  # type: ignore[attr-defined]
    convert_frame.trace_frame = scoped_trace_frame
    UserFunctionVariable.get_code = scoped_get_code  # type: ignore[method-assign]
    OutputGraph.compile_subgraph = scoped_compile_subgraph  # type: ignore[method-assign]


def python_mutations(ctx: Any) -> Any:
    """What the trace so far did to Python objects that exist outside of it, as something to compare."""
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    effects = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
    attributes = {
        (id(item), name): id(value)
        for item, values in effects.store_attr_mutations.items()
        for name, value in values.items()
        if isinstance(item.mutation_type, AttributeMutationExisting)
    }
    values = {
        id(v): len(v.items) if hasattr(v, "items") and not callable(v.items) else 0
        for v in effects.id_to_variable.values()
        if isinstance(v.mutation_type, ValueMutationExisting) and effects.is_modified(v)
    }
    return attributes, values
