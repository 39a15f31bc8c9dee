"""Peers whose kernels come from a vLLM wheel: vLLM's own Triton kernel, and OpenAI's ``triton_kernels``.

``python benchmarks/carry.py WHEEL`` unpacks them into ``carried/``, outside of the repository; what is here only
calls them, as vLLM 0.20.2 does (``fused_moe.py`` and ``experts/gpt_oss_triton_kernels_moe.py``). No call waits for
the GPU, so CUDA graphs can hold them.

Shapes: ``x [T, H]``, ``logits [T, E]`` float32, ``w1 [E, 2I, H]`` (gate first), ``w2 [E, H, I]``; ``K`` experts per
token, ``P = T * K`` pairs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import ast
import atexit
import functools
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from peers import Layer, Program
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent / "carried"
FUSED_MOE = "vllm/model_executor/layers/fused_moe/"
CUT_OUT = ("write_zeros_to_output", "fused_moe_kernel")
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
Settings = dict[str, int]

# As in vLLM's tuned files for Hopper: BLOCK_SIZE_N, BLOCK_SIZE_K, GROUP_SIZE_M, warps, stages by BLOCK_SIZE_M.
TRIED = {
    16: ((64, 128, 1, 4, 4), (64, 256, 1, 4, 3), (128, 128, 1, 4, 3), (128, 64, 16, 4, 4), (256, 128, 1, 8, 3)),
    32: ((64, 128, 1, 4, 4), (128, 128, 1, 4, 3), (256, 128, 16, 4, 2)),
    64: ((128, 64, 1, 4, 3), (128, 128, 8, 8, 4), (256, 64, 8, 8, 4)),
    128: ((128, 64, 8, 8, 3), (256, 64, 1, 8, 4), (256, 64, 8, 8, 4), (256, 64, 32, 8, 4)),
}


def carried(name: str) -> Path:
    """The path of an unpacked member of the wheel."""
    path = ROOT / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run python benchmarks/carry.py WHEEL (vllm 0.20.2)")
    return path


def build(name: str, layer: Layer, w1: Any, w2: Any) -> Program:
    """``vllm``, ``vllm_best`` or ``tk``; ``vllm_fp8`` with pairs of fp8 weights and scales."""
    if name == "tk":
        return openai(layer, w1, w2)
    torch.ops.load_library(str(carried("vllm/_moe_C.abi3.so")))
    if name == "vllm_fp8":
        return VllmFp8(layer, w1[0], w2[0], fused_moe_kernel(), torch.ops._moe_C, True, {}, w1[1], w2[1])
    return Vllm(layer, w1, w2, fused_moe_kernel(), torch.ops._moe_C, best=name == "vllm_best")


@functools.cache
def fused_moe_kernel() -> Any:
    """vLLM's kernel, cut out of its file: importing that would import all of vLLM, which is not there."""
    source = carried(FUSED_MOE + "fused_moe.py").read_text()
    lines = source.splitlines(keepends=True)
    parts = ["import triton\nimport triton.language as tl\n"]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in CUT_OUT:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            parts.append("".join(lines[first - 1 : node.end_lineno]))
    if len(parts) != 1 + len(CUT_OUT):
        raise ImportError(f"{FUSED_MOE}fused_moe.py does not define {' and '.join(CUT_OUT)}")
    path = Path(tempfile.mkdtemp(prefix="moe_compile_peer_")) / "vllm_fused_moe.py"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    path.write_text("\n\n".join(parts))  # Triton reads the source of a kernel from its file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fused_moe_kernel


def settings_of(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Settings:
    sizes = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": group}
    return {**sizes, "num_warps": warps, "num_stages": stages}


def default_settings(layer: Layer, tokens: int) -> Settings:
    """vLLM's rule for unquantised weights without a tuned file."""
    m = 16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128
    n, k = (64, 128) if tokens <= 64 else (128, 64)
    group = 16 if tokens // layer.E > 128 else 1
    return settings_of(m, n, k, group, 4 if tokens <= 128 else 8, 4 if tokens <= 32 else 3)


def tuned_settings(layer: Layer, tokens: int, device: str) -> Settings | None:
    """From the file that vLLM ships for this layer and GPU, if any: the nearest number of tokens."""
    name = "NVIDIA_H200" if "H200" in device.split() else device.replace(" ", "_")
    path = ROOT / FUSED_MOE / "configs" / f"E={layer.E},N={layer.I},device_name={name}.json"
    if not path.exists():
        return None
    table = json.loads(path.read_text())
    table.pop("triton_version", None)
    found: Settings = table[min(table, key=lambda size: abs(int(size) - tokens))]
    return found


def candidates(layer: Layer, tokens: int) -> list[Settings]:
    """What is worth timing: as many rows as an expert gets or half, and what vLLM ships for either Hopper GPU."""
    rows = max(16, min(triton.next_power_of_2(triton.cdiv(tokens * layer.K, layer.E)), 128))
    found = [settings_of(m, *rest) for m in dict.fromkeys((rows, max(rows // 2, 16))) for rest in TRIED[m]]
    shipped = [tuned_settings(layer, tokens, name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")]
    return [default_settings(layer, tokens), *(s for s in shipped if s), *found]


def replay_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one replay of a CUDA graph of ``call``: the host must not decide which one is fastest."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    ms: float = triton.testing.do_bench(graph.replay, warmup=5, rep=30, return_mode="median")
    return ms


@triton.jit
def silu_and_mul(source, target, WIDTH, BLOCK: tl.constexpr):
    """``source [P, 2 * WIDTH]``, gate first, to ``target [P, WIDTH]``; a program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(source + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + row * WIDTH + columns, gate / (1 + tl.exp(-gate)) * up, mask=inside)


@dataclass
class Vllm:
    """``TritonExperts`` of vLLM for unquantised weights, with its router in front.

    ``ops`` has its compiled ``topk_softmax``, ``moe_align_block_size`` and ``moe_sum``. The activation is ours:
    vLLM's, in a library too large to carry, is bound by memory just the same. ``best``: instead of the settings
    that vLLM would choose, the fastest of ``candidates``, timed in the first call with a new number of tokens.
    """

    layer: Layer
    w1: Tensor
    w2: Tensor
    kernel: Any
    ops: Any
    best: bool = False
    chosen: dict[int, Settings] = field(default_factory=dict)

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        tokens = x.shape[0]
        if tokens not in self.chosen:
            self.chosen[tokens] = self.fastest(x, logits) if self.best else self.settings(tokens)
        return self.run(x, logits, self.chosen[tokens])

    def settings(self, tokens: int) -> Settings:
        """What vLLM chooses on this GPU."""
        tuned = tuned_settings(self.layer, tokens, torch.cuda.get_device_name())
        return tuned or default_settings(self.layer, tokens)

    def candidates(self, tokens: int) -> list[Settings]:
        """The settings to try."""
        return candidates(self.layer, tokens)

    def fastest(self, x: Tensor, logits: Tensor) -> Settings:
        """The fastest candidate; one that needs too much shared memory is none."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("vllm_best chooses its settings in its first call, which a CUDA graph cannot hold")
        times: list[tuple[float, Settings]] = []
        failed: Exception | None = None
        for settings in self.candidates(x.shape[0]):
            try:
                self.run(x, logits, settings)
                times.append((replay_ms(functools.partial(self.run, x, logits, settings)), settings))
            except Exception as error:  # settings that do not fit are none; if none fit, this says why
                failed = error
        if not times:
            raise RuntimeError("no settings of vLLM's kernel run") from failed
        ms, best = min(times, key=lambda pair: pair[0])
        name = "vllm_best" if self.w1.dtype in DTYPES else "vllm_fp8"
        print(f"{name}: {self.layer.name} T={x.shape[0]} {ms:.4f} ms with {best}", file=sys.stderr)
        return best

    def run(self, x: Tensor, logits: Tensor, settings: Settings) -> Tensor:
        """One layer, ``[T, H]``."""
        (tokens, hidden), top_k, width = x.shape, self.layer.K, self.layer.I
        weights = torch.empty(tokens, top_k, device=x.device)
        ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
        self.ops.topk_softmax(weights, ids, torch.empty_like(ids), logits, True, None)
        blocks = self.blocks(ids, settings["BLOCK_SIZE_M"])
        shared = torch.empty(tokens * top_k * max(2 * width, hidden), dtype=x.dtype, device=x.device)
        gate_up = shared[: tokens * top_k * 2 * width].view(-1, 2 * width)
        rows = torch.empty(tokens * top_k, width, dtype=x.dtype, device=x.device)
        self.product(x, self.w1, gate_up, weights, blocks, settings, False, top_k)
        silu_and_mul[(rows.shape[0], triton.cdiv(width, 1024))](gate_up, rows, width, BLOCK=1024)
        pairs = shared[: tokens * top_k * hidden].view(-1, hidden)
        self.product(rows, self.w2, pairs, weights, blocks, settings, True, 1)
        out = torch.empty_like(x)
        self.ops.moe_sum(pairs.view(tokens, top_k, hidden), out)
        return out

    def blocks(self, ids: Tensor, block: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """Pairs in expert order, padded to whole blocks; the expert of each block; the number of padded pairs.

        With few pairs vLLM sorts nothing, and every pair is a block of its own.
        """
        pairs, E = ids.numel(), self.layer.E
        if pairs * 4 <= E:
            return None, ids.view(-1), torch.full((1,), pairs * block, dtype=torch.int32, device=ids.device)
        padded = pairs + E * (block - 1)
        if pairs < E:
            padded = min(pairs * block, padded)
        order = torch.empty(padded, dtype=torch.int32, device=ids.device)
        experts = torch.empty(triton.cdiv(padded, block), dtype=torch.int32, device=ids.device)
        count = torch.empty(1, dtype=torch.int32, device=ids.device)
        self.ops.moe_align_block_size(ids, E, block, order, experts, count, None)
        return order, experts, count

    def product(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        weights: Tensor,
        blocks: tuple[Tensor | None, Tensor, Tensor],
        settings: Settings,
        weigh: bool,
        top_k: int,
    ) -> None:
        """``c[p] = a[p // top_k] @ b[expert of p].T``, times the router's weight if ``weigh``.

        ``a [P / top_k, D]``, ``b [E, N, D]``, ``c [P, N]``.
        """
        order, experts, count = blocks
        block, pairs = settings["BLOCK_SIZE_M"], a.shape[0] * top_k
        padded = pairs * block
        if order is not None:  # with fewer rows than a block has, no expert gets more than one block
            padded = min(order.shape[0], padded) if a.shape[0] < block else order.shape[0]
        grid = (triton.cdiv(padded, block) * triton.cdiv(b.shape[1], settings["BLOCK_SIZE_N"]),)
        sizes = (b.shape[1], b.shape[2], padded, pairs)
        strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1), c.stride(0), c.stride(1))
        a_scale, b_scale, scaling, quantised = self.scales(a, b)
        self.kernel[grid](
            *(a, b, c, None, a_scale, b_scale, weights, order, experts, count, *sizes, *strides, *scaling),
            naive_block_assignment=order is None,
            MUL_ROUTED_WEIGHT=weigh,
            top_k=top_k,
            compute_type=DTYPES[c.dtype],
            use_fp8_w8a8=quantised,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            per_channel_quant=False,
            HAS_BIAS=False,
            **{**settings, "SPLIT_K": 1},
        )


    def scales(self, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None, tuple[int, ...], bool]:
        """Scales of rows and weights; their strides, those of the bias and the sizes of blocks; whether it is fp8."""
        return None, None, (0,) * 9, False


@dataclass
class VllmFp8(Vllm):
    """The same for fp8 weights in blocks of 128 x 128; rows are quantised by our kernel, as vLLM's does it.

    Settings: what vLLM has for such weights without a tuned file, and the same with the next two heights.
    """

    s1: Tensor | None = None
    s2: Tensor | None = None
    row_scales: dict[int, Tensor] = field(default_factory=dict)

    def candidates(self, tokens: int) -> list[Settings]:
        m = 16 if tokens <= 64 else 64
        group, stages = 1 if tokens <= 16 else 32, 4 if tokens <= 4 else 3
        n = 64 if tokens <= 8 else 128
        heights = (m, 32, 128) if tokens <= 64 else (m, 16, 128)
        return [settings_of(h, n, 128, group, 8 if h == 128 else 4, stages) for h in heights]

    def product(self, a: Tensor, *rest: Any) -> None:
        from moe_compile.kernels.quantize import quantize_rows

        rows, scale = quantize_rows(a)
        self.row_scales[rows.data_ptr()] = scale
        super().product(rows, *rest)
        del self.row_scales[rows.data_ptr()]

    def scales(self, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None, tuple[int, ...], bool]:
        a_scale, b_scale = self.row_scales[a.data_ptr()], self.s1 if b is self.w1 else self.s2
        assert b_scale is not None
        strides = (a_scale.stride(0), a_scale.stride(1), b_scale.stride(0), b_scale.stride(2), b_scale.stride(1))
        return a_scale, b_scale, (*strides, 0, 0, 128, 128), True


@triton.jit
def _silu_of_pairs(tile):
    """``tile [M, 2N]`` with gate and up columns alternating, to ``[M, N]``, in float32."""
    gate, up = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


def openai(layer: Layer, w1: Tensor, w2: Tensor) -> Program:
    """Its router, a product that gathers and applies the activation, and a product that scatters and sums.

    Its own SwiGLU multiplies by ``up + 1``, so a function of ours goes through the same interface. ``w1`` is
    copied with gate and up rows alternating; both weights stay contiguous along the summed axis, as in its own
    benchmark. The router's softmax is over the chosen experts. All block sizes are its own choice.
    """
    folder = str(carried("vllm/third_party/triton_kernels/matmul_ogs.py").parent.parent)
    sys.path[:0] = [] if folder in sys.path else [folder]
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, GatherIndx, RoutingData, ScatterIndx, matmul_ogs
    from triton_kernels.tensor import make_ragged_tensor_metadata
    from triton_kernels.topk import topk

    up_t = w1.view(layer.E, 2, layer.I, layer.H).transpose(1, 2).reshape(w1.shape).transpose(1, 2)  # [E, H, 2I]
    down_t = w2.transpose(1, 2)  # [E, I, H]
    activation = FusedActivation(FnSpecs("silu_and_mul", _silu_of_pairs, (), reduction_n=2), ())

    def program(x: Tensor, logits: Tensor) -> Tensor:
        chosen = topk(logits, layer.K, apply_softmax=True)
        to, source = chosen.mask_metadata.row_sorted_indx, chosen.mask_metadata.col_sorted_indx
        ragged = make_ragged_tensor_metadata(chosen.mask_metadata.col_sum, to.shape[0])
        weights = chosen.vals.flatten()[source]
        routing = RoutingData(weights, ragged.slice_sizes, layer.E, layer.K, ragged)
        gather, scatter = GatherIndx(source, to), ScatterIndx(to, source)
        rows = matmul_ogs(x, up_t, None, routing, gather_indx=gather, fused_activation=activation)
        out: Tensor = matmul_ogs(rows, down_t, None, routing, scatter_indx=scatter, gammas=weights)
        return out

    return program
