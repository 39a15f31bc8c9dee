"""``fused_experts`` and ``deep_gemm_moe_fp8``: the routed experts of one MoE layer as plain functions.

Shape legend: ``T`` tokens, ``E`` experts held here, ``G`` experts of the whole layer (``G = E`` without
``expert_map``), ``K`` experts chosen per token, ``H`` hidden size, ``I`` intermediate size.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

import moe_compile.ops  # noqa: F401  (registers torch.ops.moe_compile)
from moe_compile.spec import ACTIVATIONS, Activation

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64)


class ArgumentError(ValueError):
    """An argument that cannot be right: what, its value, and what to do."""


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str | Activation = "silu",
    expert_map: Tensor | None = None,
    gated: bool | None = None,
    interleaved: bool = False,
    w3: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``out[t] = sum_k topk_weights[t, k] * expert[topk_ids[t, k]](hidden_states[t])``.

    ``expert[e](x) = w2[e] @ act(w1[e] @ x + b1[e]) + b2[e]``, where a gated ``act`` splits its argument into
    gate and up and returns ``f(gate) * up``. Sums are accumulated in float32 or better.

    Args:
        hidden_states: ``[T, H]``; ``T`` may be 0.
        w1: ``[E, 2I, H]``, gate rows first, or alternating gate and up rows when ``interleaved``;
            ``[E, I, H]`` when not gated, or when ``w3`` holds the up projection. Any strides.
        w2: ``[E, H, I]``.
        topk_weights: ``[T, K]``, any floating dtype; used as given, never renormalised.
        topk_ids: ``[T, K]`` int32 or int64. An id outside ``[0, G)`` contributes exactly zero and reads no
            weight.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"relu2"``, ``"identity"``, or a
            ``moe_compile.spec.Activation`` for clamps, alpha and offsets (gpt-oss).
        expert_map: ``[G]`` int32 or int64, global id to local id; -1 marks an expert held elsewhere, which
            contributes zero.
        gated: default True, or what the given ``Activation`` says.
        interleaved: gate and up rows of ``w1`` alternate.
        w3: ``[E, I, H]``, the up projection when it is not part of ``w1``.
        b1: bias of ``w1``, ``[E, 2I]`` or ``[E, I]``, like the rows of ``w1``.
        b2: bias of ``w2``, ``[E, H]``.
        b3: bias of ``w3``, ``[E, I]``.
        apply_router_weight_on_input: multiply the router weight into the expert's input, not its output.
        out_dtype: dtype of the result, default that of ``hidden_states``.

    Returns:
        ``[T, H]``, a fresh tensor.

    Raises:
        TypeError: an argument that is no tensor.
        ArgumentError: shapes, dtypes, devices or options that do not fit together.
    """
    act = _activation(activation, gated)
    tensors = {
        "hidden_states": hidden_states,
        "w1": w1,
        "w2": w2,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
    }
    optional = {"w3": w3, "b1": b1, "b2": b2, "b3": b3, "expert_map": expert_map}
    tensors.update({name: t for name, t in optional.items() if t is not None})
    _check_kinds(tensors, out_dtype)
    _check_shapes(tensors, act, interleaved)
    ids = topk_ids if expert_map is None else _local_ids(topk_ids, expert_map)
    out: Tensor = torch.ops.moe_compile.experts(
        hidden_states,
        topk_weights,
        ids,
        [w1],
        _role(w3),
        [w2],
        _role(b1),
        _role(b3),
        _role(b2),
        act.name,
        act.args(),
        act.gated,
        interleaved,
        apply_router_weight_on_input,
        out_dtype,
    )
    return out


def deep_gemm_moe_fp8(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    inplace: bool = False,
    activation: str = "silu",
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """Gated experts with fp8 weights and block scales (w8a8), by DeepGEMM's grouped GEMMs where they run and pay.

    The arguments are those of vLLM's function of this name. The input of each GEMM is rounded to fp8 with one scale per
    row and 128 columns, as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437). Calls that DeepGEMM cannot run, or with
    few rows per expert, run on Triton with the same meaning, and on the CPU in plain PyTorch.

    Args:
        hidden_states: ``[T, H]`` bfloat16 for DeepGEMM; float16 and float32 run on Triton.
        w1: ``[E, 2I, H]`` float8_e4m3fn, gate rows first.
        w2: ``[E, H, I]`` float8_e4m3fn.
        w1_scale: ``[E, ceil(2I/128), ceil(H/128)]`` float32; a weight means ``w * scale`` of its block.
        w2_scale: ``[E, ceil(H/128), ceil(I/128)]`` float32.
        topk_weights: ``[T, K]``, any floating dtype; used as given.
        topk_ids: ``[T, K]`` int32 or int64; an id outside ``[0, G)`` contributes exactly zero.
        inplace: write the result into ``hidden_states`` and return it.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"relu2"`` or ``"identity"``.
        global_num_experts: ``G``, to be checked against ``expert_map``; -1 takes its length, or ``E``.
        expert_map: ``[G]`` int32 or int64, global id to local id, -1 for experts held elsewhere.
        a1_scale: must be None: rows are scaled as they come.
        a2_scale: likewise.
        apply_router_weight_on_input: multiply the router weight into the expert's input, not its output.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.

    Raises:
        TypeError: an argument that is no tensor, or of the wrong dtype.
        ArgumentError, ValueError: shapes or options that do not fit together.
    """
    for name, scale in (("a1_scale", a1_scale), ("a2_scale", a2_scale)):
        if scale is not None:
            raise ArgumentError(f"{name} must be None: rows get a scale per 128 columns as they come")
    experts = w2.shape[0] if expert_map is None else expert_map.shape[0]
    if global_num_experts not in (-1, experts):
        source = "w2" if expert_map is None else "expert_map"
        raise ArgumentError(f"global_num_experts={global_num_experts}, but {source} has {experts} experts")
    act = _activation(activation, None)
    ids = topk_ids if expert_map is None else _local_ids(topk_ids, expert_map)
    out: Tensor = torch.ops.moe_compile.experts_fp8(
        hidden_states,
        topk_weights,
        ids,
        w1,
        w1_scale,
        w2,
        w2_scale,
        act.name,
        act.args(),
        act.gated,
        weight_on_input=apply_router_weight_on_input,
    )
    return hidden_states.copy_(out) if inplace else out


def _role(t: Tensor | None) -> list[Tensor]:
    return [] if t is None else [t]


def _local_ids(topk_ids: Tensor, expert_map: Tensor) -> Tensor:
    size = expert_map.shape[0]
    known = (topk_ids >= 0) & (topk_ids < size)
    local = expert_map[topk_ids.clamp(0, size - 1)].to(topk_ids.dtype)  # [T, K]
    return torch.where(known, local, -1)


def _activation(activation: str | Activation, gated: bool | None) -> Activation:
    if isinstance(activation, Activation):
        if gated is not None and gated != activation.gated:
            raise ArgumentError(f"gated={gated} contradicts the given {activation}; leave gated out")
        return activation
    if activation not in ACTIVATIONS:
        close = difflib.get_close_matches(str(activation), ACTIVATIONS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ArgumentError(
            f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}{hint}; "
            "clamps, alpha and offsets go into a moe_compile.spec.Activation"
        )
    return Activation(activation, gated=True if gated is None else gated)


def _check_kinds(tensors: dict[str, Tensor], out_dtype: torch.dtype | None) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    x = tensors["hidden_states"]
    for name, t in tensors.items():
        if t.device != x.device:
            raise ArgumentError(
                f"{name} is on {t.device}, hidden_states on {x.device}; move it with {name}.to('{x.device}')"
            )
        if name in ("topk_ids", "expert_map"):
            if t.dtype not in INTS:
                raise ArgumentError(f"{name} has dtype {t.dtype}, needed int32 or int64; use {name}.to(torch.int64)")
        elif t.dtype not in FLOATS:
            raise ArgumentError(f"{name} has dtype {t.dtype}, needed one of {', '.join(map(str, FLOATS))}")
        # Under autocast the op casts its operands itself, as torch's own linear does.
        elif t.dtype != x.dtype and name != "topk_weights" and not torch.is_autocast_enabled(x.device.type):
            raise ArgumentError(f"{name} has dtype {t.dtype}, hidden_states {x.dtype}; cast one, or use torch.autocast")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ArgumentError(f"out_dtype {out_dtype} is not one of {', '.join(map(str, FLOATS))}")


def _check_shapes(tensors: dict[str, Tensor], act: Activation, interleaved: bool) -> None:
    sizes: dict[str, int] = {}
    w3 = tensors.get("w3")
    if w3 is not None and not act.gated:
        raise ArgumentError("w3 is the up projection of a gated activation, but gated is False; leave w3 out")
    if interleaved and (w3 is not None or not act.gated):
        raise ArgumentError("interleaved needs gate and up rows in one w1: a gated activation and no w3")
    if "b3" in tensors and w3 is None:
        raise ArgumentError("b3 is the bias of w3, which is absent; a fused w1 takes its whole bias as b1 [E, 2I]")
    _bind(sizes, "hidden_states", tensors["hidden_states"], "T H")
    _bind(sizes, "topk_ids", tensors["topk_ids"], "T K")
    _bind(sizes, "topk_weights", tensors["topk_weights"], "T K")
    _bind(sizes, "w2", tensors["w2"], "E H I")
    rows = "2I" if act.gated and w3 is None else "I"
    sizes["2I"] = 2 * sizes["I"]
    _bind(sizes, "w1", tensors["w1"], f"E {rows} H")
    for name, dims in (
        ("w3", "E I H"),
        ("b1", f"E {rows}"),
        ("b2", "E H"),
        ("b3", "E I"),
        ("expert_map", "G"),
    ):
        if name in tensors:
            _bind(sizes, name, tensors[name], dims)
    experts = sizes.get("G", sizes["E"])
    for dim in ("E", "H", "I", "K"):
        if sizes[dim] < 1:
            raise ArgumentError(f"{dim} is {sizes[dim]}; only T may be 0")
    if sizes["K"] > experts:
        raise ArgumentError(f"topk_ids chooses K={sizes['K']} experts per token, but there are only {experts}")


def _bind(sizes: dict[str, int], name: str, t: Tensor, dims: str) -> None:
    """Check a shape against named sizes; a name seen for the first time takes the size it meets."""
    names = dims.split()
    shape = tuple(t.shape)
    if len(shape) != len(names):
        flat = " (reshape [B, S, H] to [B*S, H])" if name == "hidden_states" else ""
        raise ArgumentError(f"{name} must have shape [{', '.join(names)}], got {list(shape)}{flat}")
    for position, (dim, size) in enumerate(zip(names, shape, strict=True)):
        if sizes.setdefault(dim, size) != size:
            known = ", ".join(f"{d}={n}" for d, n in sizes.items())
            raise ArgumentError(
                f"{name} must have shape [{', '.join(names)}], got {list(shape)}: dimension {position} is "
                f"{size}, but {dim}={sizes[dim]} (known so far: {known})"
            )
