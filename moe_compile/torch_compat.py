"""Every private torch name that the package touches, one function each.

Checked on torch 2.11.0 and 2.13.0; the hooks themselves were also read or run on 2.15 (see docs/compatibility.md).
"""

from __future__ import annotations

import copy
import dis
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.comptime import comptime as comptime
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch.fx.experimental.symbolic_shapes import guard_or_false as guard_or_false

log = logging.getLogger("moe_compile.capture")

GRAPH_BREAKS = "torch._dynamo.symbolic_convert.__graph_breaks"  # the logger behind TORCH_LOGS="graph_breaks"
LOGGERS = ("torch._dynamo", "torch._subclasses", "torch.fx")  # what speaks about odd programs while they are traced


def statically_true(condition: Any) -> bool:
    """Whether a (symbolic) condition is known to hold, without adding a guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def symbol_range(size: int | torch.SymInt) -> tuple[int, int | None]:
    """The smallest and largest value that a (symbolic) size can take, without adding a guard; None is unbounded.

    Read from the ranges of the shape environment, for backed and unbacked symbols alike. On 2.11 and 2.13 an unbounded
    end is an infinity or, for the sizes of data-dependent results, ``sys.maxsize - 1``.
    """
    if isinstance(size, int):
        return size, size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    low = int(bounds.lower) if bounds.lower > 0 else 0  # a size is never negative
    high = None if bounds.upper >= sys.maxsize - 1 else int(bounds.upper)
    return low, high


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a plain fake one, of no subclass."""
    from torch._subclasses.fake_tensor import FakeTensor

    return type(tensor) is FakeTensor


def storage_of(tensor: Any) -> int | None:
    """A number for the memory of a (fake) tensor, equal for all views of it as long as one of them lives."""
    if not isinstance(tensor, torch.Tensor) or not torch._C._has_storage(tensor):
        return None
    return int(tensor.untyped_storage()._cdata)


def raw_stream(device: int) -> int:
    """The handle of the current CUDA stream, without the object around it, which costs more than a launch."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The fake mode that Dynamo's example values belong to, or None when nothing is fake."""
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    return None


def trace_pre_dispatch(
    gm: fx.GraphModule, values: Sequence[Any], on_node: Callable[[fx.Node, Any], None]
) -> fx.GraphModule:
    """Trace ``gm`` once more into pre-dispatch ATen under the fake mode of ``values``.

    ``on_node(node, result)`` is called after each node of ``gm`` with its result, in which every
    traced tensor has been replaced by the node of the new graph that produced it.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import tracing
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
    from torch.fx.traceback import preserve_node_meta
    from torch.utils._pytree import tree_map_only

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            mode = get_proxy_mode()
            if mode is not None and n.op != "output":
                tracer = mode.tracer

                def node_of(t: torch.Tensor) -> Any:
                    return get_proxy_slot(t, tracer, None, lambda slot: slot.proxy.node)

                on_node(n, tree_map_only(torch.Tensor, node_of, result))
            return result

    fake = fake_mode_of(values)
    if fake is None:
        raise RuntimeError("the graph has no fake example values")
    with (
        tracing(None),
        fake,
        enable_python_dispatcher(),
        preserve_node_meta(),
        fake.shape_env.ignore_fresh_unbacked_symbols(),
    ):
        return make_fx(Recorder(gm).run, pre_dispatch=True, _allow_fake_constant=True)(*values)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that Inductor takes like the original: placeholders keep Dynamo's sources."""
    twin = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, twin.nodes, strict=True):
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return twin


def inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any], late: CustomGraphPass
) -> Any:
    """Compile with Inductor the way ``torch.compile(mode=, options=)`` does: names and types are validated.

    ``late`` runs on Inductor's graph of ATen operations, unless the user has put a pass of their own there.
    """
    from torch import _TorchCompileInductorWrapper
    from torch._inductor import config

    with config.patch(post_grad_custom_pre_pass=config.post_grad_custom_pre_pass or late):
        return _TorchCompileInductorWrapper(mode, options or None, None)(gm, example_inputs)


def run_after_pass(gm: fx.GraphModule, example_inputs: Sequence[Any], late: CustomGraphPass) -> Any:
    """What ``inductor`` would compile, after its decompositions and ``late``, to be run operation by operation.

    For programs without gradients.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def as_it_is(aten: fx.GraphModule, _: Sequence[Any]) -> Any:
        late(aten.graph)
        aten.recompile()
        return make_boxed_func(aten.forward)

    return aot_autograd(fw_compiler=as_it_is, inference_compiler=as_it_is, decompositions=select_decomp_table)(
        gm, example_inputs
    )


def matcher_pass() -> Any:
    """A fresh ``PatternMatcherPass``: Inductor's engine that finds anchors, last node first."""
    from torch._inductor.pattern_matcher import PatternMatcherPass

    return PatternMatcherPass(pass_name="moe_compile")


def register_anchor(
    passes: Any, targets: Sequence[Any], check: Callable[[Any], bool], handler: Callable[..., None]
) -> None:
    """Register one pattern for any of ``targets`` (any arguments, any number of users)."""
    from torch._inductor.pattern_matcher import MULTIPLE, CallFunctionVarArgs, register_graph_pattern

    register_graph_pattern(CallFunctionVarArgs(list(targets), users=MULTIPLE), extra_check=check, pass_dict=passes)(
        handler
    )


def placeholder_source(node: fx.Node) -> Any:
    """Dynamo's source of a placeholder (``None`` for graphs that Dynamo did not make)."""
    return getattr(node, "_dynamo_source", None)


@contextmanager
def dynamo_config(**changes: Any) -> Iterator[None]:
    """Patch ``torch._dynamo.config`` for the duration of a ``with`` block."""
    import torch._dynamo

    with torch._dynamo.config.patch(**changes):
        yield


def user_frame(node: fx.Node) -> str:
    """``file:line`` of the user's code that made a node, skipping torch's own files and ours; "" if unknown."""
    trace = node.meta.get("stack_trace") or ""
    found = ""
    for line in trace.splitlines():
        line = line.strip()
        if line.startswith('File "'):
            path, _, rest = line[6:].partition('"')
            if "/torch/" not in path and not path.startswith(_LOOPS):
                number = rest.split("line ", 1)[-1].split(",", 1)[0]
                found = f"{path}:{number}"
    return found


def must_run_as_written() -> bool:
    """Whether a call that would start a compilation belongs to somebody else, or could not be compiled.

    An outer compilation that gave up this frame, a tracer (``make_fx``, ``torch.jit.trace``), a dispatch mode (flop
    counter, fake tensors), or a ``torch.func`` transform.
    """
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    return (
        get_eval_frame_callback() is not None
        or is_in_torch_dispatch_mode()
        or is_fx_symbolic_tracing()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def compiles_as_usual() -> bool:
    """Whether a first call is compiled: False for ``TORCH_COMPILE_DISABLE=1`` and stances that put it off."""
    from torch._dynamo import config, eval_frame

    return not config.disable and eval_frame._stance.stance == "default"


def backend_error(error: Exception) -> Exception:
    """What a backend raised, without the exception that Dynamo wraps around it."""
    from torch._dynamo.exc import BackendCompilerFailed

    return error.inner_exception if isinstance(error, BackendCompilerFailed) else error


_LOOPS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "loops", "")  # what rewritten loops call
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
