"""Every private torch name that the package touches, one function each; what it hangs into Dynamo is ``torch_hooks``.

Checked on torch 2.11.0 and 2.13.0; the hooks themselves were also read or run on 2.15 (see docs/compatibility.md).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.comptime import comptime as comptime
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch.fx.experimental.symbolic_shapes import guard_or_false as guard_or_false

GRAPH_BREAKS = "torch._dynamo.symbolic_convert.__graph_breaks"  # the logger behind TORCH_LOGS="graph_breaks"
LOGGERS = ("torch._dynamo", "torch._subclasses", "torch.fx")  # what speaks about odd programs while they are traced
_LOOPS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "loops", "")  # what rewritten loops call


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
