"""``moe_compile::experts_fp8`` on CPU and CUDA: experts whose weights are fp8 with a scale per block.

On CUDA a call goes to DeepGEMM's grouped GEMMs where the chosen rule of ``guards`` holds and a package computes right,
else to Triton. The choice is made from shapes once for all calls that are alike, and never waits for the device.
Shape legend: see ``spec.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..guards import ALIGNMENT, Facts, Failure, TokenRange, decide
from ..quantize import dequantize_blocks, dequantize_rows, quantize_rows
from ..spec import Activation, NoMatch
from .calls import Kind, check_device, epilogue, kernel, kind_of, on, traits
from .parts import in_parts, tokens_of_part
from .schema import implement
from .validate import block_of, check_fp8

if TYPE_CHECKING:
    from ..deepgemm.provider import Provider
    from ..kernels.config import Plan
    from ..kernels.tile import Projection

KERNELS = ("auto", "vllm", "deepgemm", "triton")  # two rules of ``guards``, and two by name


class KernelUnavailable(RuntimeError):
    """DeepGEMM was asked for by name and cannot run this call; ``code`` is a key of ``codes.CODES``."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}; use kernels='auto' to let Triton serve such calls")
        self.code = code


class Choice(NamedTuple):
    """What runs a call: DeepGEMM with blocks of ``align`` rows, or Triton by a plan."""

    provider: Provider | None
    align: int
    plan: Plan | None


def experts_fp8(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    activation: str,
    activation_args: Sequence[float],
    gated: bool,
    interleaved: bool = False,
    weight_on_input: bool = False,
    quantise: bool = True,
    kernels: str = "auto",
    out_dtype: torch.dtype | None = None,
    w3: Tensor | None = None,
    w3_scale: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """The CUDA implementation.

    ``path`` (not in the schema) forces one of ``kernels.config.PATHS`` of Triton, for all tokens.
    """
    x, args = hidden_states, tuple(activation_args)
    given = (x, topk_weights, topk_ids, w1, w1_scale, w2, w2_scale, w3, w3_scale)
    tensors = tuple(None if t is None else traits(t) for t in given)
    options = (gated, interleaved, weight_on_input, quantise, kernels, out_dtype, path)
    kind = kind_of("fp8", tensors, activation, args, *options)
    if not kind.checked:
        check_fp8(
            x, topk_weights, topk_ids, w1, w1_scale, w2, w2_scale, gated, interleaved, quantise, w3, w3_scale
        )
        names = ("topk_weights", "topk_ids", "w1", "w1_scale", "w2", "w2_scale", "w3", "w3_scale")
        check_device(x, **{name: t for name, t in zip(names, given[1:], strict=True) if t is not None})
        _check_kernels(kernels)
        kind.part = tokens_of_part(x, topk_ids, w2.shape[2]) if path is None else 0
        kind.checked = True
    if kind.part:

        def part(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            rest = (activation, activation_args, *options[:-1], w3, w3_scale)
            return experts_fp8(x, weights, ids, w1, w1_scale, w2, w2_scale, *rest)

        return in_parts(part, kind.part, x, topk_weights, topk_ids, out_dtype)
    with on(x):
        if kind.choice is not None and kind.choice.provider is None:
            program = kind.kernels(False).program()
            if program is not None:
                out: Tensor = program(given)[0]
                return out
        count, hidden, inter = w2.shape
        layout = ("interleaved" if interleaved else "concat") if gated else "single"
        if w3 is not None and w3_scale is not None:
            layout = "separate"
            if w1_scale.stride() != w3_scale.stride():  # the kernels walk both with one set of strides
                w1_scale, w3_scale = w1_scale.contiguous(), w3_scale.contiguous()
        make, projection = kernel("operand", "Operand"), kernel("tile", "Projection")
        second, act = None if w3 is None else make((w3,)), epilogue(activation, args, layout)
        up = projection(make((w1,)), inter, act, second, scale=w1_scale, up_scale=w3_scale)
        down = projection(make((w2,)), hidden, scale=w2_scale)
        choice = _choice(kind, kernels, x, topk_ids, up, down, quantise, path)
        found = kind.kernels(choice.provider is not None)
        call = found.call()
        if choice.provider is not None:
            from ..deepgemm.experts import follow_deepgemm

            out = follow_deepgemm(
                choice.provider, choice.align, x, topk_weights, topk_ids, count, up, down, weight_on_input, out_dtype,
                call,
            )  # fmt: skip
            found.done(call)
            # its kernels are compiled now, so that a later capture can hold them, unless nothing was launched
            kind.warm = kind.warm or kernel("launch", "note_of_thread")() is None
        else:
            out = kernel("scaled_experts", "follow_scaled")(
                choice.plan, x, topk_weights, topk_ids, count, up, down, quantise, weight_on_input, out_dtype, call
            )
            found.done(call, given, [out])
        return out


def _check_kernels(kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is not one of {', '.join(map(repr, KERNELS))}")


def _choice(
    kind: Kind, kernels: str, x: Tensor, ids: Tensor, up: Projection, down: Projection, quantise: bool, path: str | None
) -> Choice:
    """What runs this kind of call. DeepGEMM compiles at a first call, which a graph that is captured cannot hold."""
    cold = not kind.warm and torch.cuda.is_current_stream_capturing()
    if kind.choice is not None and not (cold and kind.choice.provider is not None):
        return kind.choice
    choice = None
    if kernels != "triton" and path is None:
        choice = _deepgemm(kernels, x, ids, up, down, quantise, cold)
    if choice is None:
        plan_of, device_of = kernel("scaled_experts", "plan_scaled"), kernel("experts", "device_of")
        device = device_of(x.get_device())
        plan = plan_of(ids, down.w.first.shape[0], up, down, quantise, x.element_size(), path, device)
        choice = Choice(None, 0, plan)
    if not cold:
        kind.choice = choice
    return choice


def _deepgemm(
    kernels: str, x: Tensor, ids: Tensor, up: Projection, down: Projection, quantise: bool, cold: bool
) -> Choice | None:
    """DeepGEMM for this call, None where the rule says Triton.

    Raises:
        KernelUnavailable: DeepGEMM was named and cannot run.
    """
    from ..deepgemm.experts import alignment, has_run
    from ..deepgemm.provider import find

    failures = refusals("vllm" if kernels == "vllm" else "auto", x, ids, up, down, quantise, None)
    if kernels == "deepgemm":  # by name: what cannot run it counts, and not what is faster
        failures = [f for f in failures if f.code != "MC505"]
    provider: Any = None
    if not failures:
        provider = find(x.get_device())
        hidden, inter = down.w.first.shape[1:]
        if isinstance(provider, NoMatch):
            failures = [Failure(provider.code, provider.reason)]
        elif (hidden % ALIGNMENT or inter % ALIGNMENT) and not provider.tails:
            failures = [Failure("MC404", f"H={hidden}, I={inter}, and {provider.name} computes partial blocks wrong")]
        elif cold and not has_run(provider, ids, up, down):
            failures = [Failure("MC511", "a CUDA graph is being captured, and no call of this size has run before")]
    if not failures:
        tokens, top_k = ids.shape
        return Choice(provider, alignment(tokens, top_k, down.w.first.shape[0], provider.alignments), None)
    if kernels == "deepgemm":
        raise KernelUnavailable(failures[0].code, failures[0].reason)
    return None


def refusals(
    rule: str, x: Tensor, ids: Tensor, up: Projection, down: Projection, quantise: bool, provider: NoMatch | None
) -> list[Failure]:
    """Why calls like this one do not go to DeepGEMM under a rule of ``guards``; nothing if they do."""
    w1, w2 = up.w.first, down.w.first
    assert up.scale is not None and down.scale is not None
    facts = Facts(
        experts=w2.shape[0],
        top_k=ids.shape[1],
        hidden=w2.shape[1],
        inter=w2.shape[2],
        w1_dtype=w1.dtype,
        w2_dtype=w2.dtype,
        w1_contiguous=w1.is_contiguous() and up.scale.is_contiguous(),
        w2_contiguous=w2.is_contiguous() and down.scale.is_contiguous(),
        hidden_contiguous=True,  # the kernel that quantises the rows takes any
        provider=provider,
    )
    failures = list(decide(rule, facts, TokenRange(x.shape[0], x.shape[0])).failed)
    if not quantise:
        failures.append(Failure("MC401", "the rows stay as they are, and DeepGEMM multiplies fp8 with fp8"))
    if up.up is not None:
        failures.append(Failure("MC403", "w1 and w3 are two tensors, and DeepGEMM takes one"))
    if x.dtype != torch.bfloat16:
        failures.append(Failure("MC401", f"hidden_states are {x.dtype}, and DeepGEMM writes bfloat16"))
    return failures


def experts_fp8_cpu(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    activation: str,
    activation_args: Sequence[float],
    gated: bool,
    interleaved: bool = False,
    weight_on_input: bool = False,
    quantise: bool = True,
    kernels: str = "auto",
    out_dtype: torch.dtype | None = None,
    w3: Tensor | None = None,
    w3_scale: Tensor | None = None,
) -> Tensor:
    """The CPU implementation: one expert's weights are widened at a time, to float32 (float64 for such rows)."""
    check_fp8(
        hidden_states, topk_weights, topk_ids, w1, w1_scale, w2, w2_scale, gated, interleaved, quantise, w3, w3_scale
    )
    _check_kernels(kernels)
    if kernels == "deepgemm":
        raise KernelUnavailable("MC504", "the tensors are on the CPU, and DeepGEMM needs a CUDA device")
    act = Activation.from_args(activation, gated, activation_args)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    top_k, flat = topk_ids.shape[1], topk_ids.reshape(-1)
    x, weights = hidden_states.to(dtype), topk_weights.to(dtype).reshape(-1)
    y = x.new_zeros(flat.numel(), w2.shape[1])  # [P, H]
    for e in range(w2.shape[0]):
        pair = torch.where(flat == e)[0]
        if pair.numel() == 0:
            continue
        rows = _rounded(x[pair // top_k], quantise)
        if weight_on_input:
            rows = rows * weights[pair, None]
        h = _times(rows, w1[e], w1_scale[e])
        up: Tensor | None = None
        if w3 is not None and w3_scale is not None:
            up = _times(rows, w3[e], w3_scale[e])
        elif gated:
            h, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=-1)
        y[pair] = _times(_rounded(act(h, up), quantise), w2[e], w2_scale[e])
    if not weight_on_input:
        y = torch.where((flat >= 0) & (flat < w2.shape[0]), weights, 0.0)[:, None] * y
    return y.view(-1, top_k, y.shape[1]).sum(1).to(out_dtype or hidden_states.dtype)


def _times(rows: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """``rows [n, in]`` times an expert's ``w [out, in]``, widened to their dtype."""
    return rows @ dequantize_blocks(w, scale, block_of(w, scale), rows.dtype).t()


def _rounded(rows: Tensor, quantise: bool) -> Tensor:
    return dequantize_rows(*quantize_rows(rows), dtype=rows.dtype) if quantise else rows


implement("experts_fp8", experts_fp8, "CUDA")
implement("experts_fp8", experts_fp8_cpu, "CPU")
