"""Every kernel once on small layers, for NVIDIA's checkers: ``compute-sanitizer --tool memcheck python sanitize.py``.

Run it with ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``, so that every tensor is an allocation of its own and a byte past its
end is found. Each case is compared with float64 too; one line per case, the exit status is 1 if any is off.
``plain``, ``fp8`` or ``vectors`` as arguments run these parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from layers import Layer, quantised, relative_error

import moe_compile.ops  # noqa: F401  (registers torch.ops.moe_compile)
from moe_compile.kernels import grouped
from moe_compile.kernels.combine import combine_padded, combine_twin
from moe_compile.kernels.config import Plan, Tiles
from moe_compile.kernels.experts import follow_plan, plan_of
from moe_compile.kernels.launch import Launch, Start
from moe_compile.kernels.quantize import activate_quantize, activate_quantize_twin, quantize_permute
from moe_compile.kernels.route import route
from moe_compile.kernels.scaled_experts import follow_scaled, plan_scaled, run_scaled_twin
from moe_compile.kernels.sort import sort_pairs
from moe_compile.quantize import dequantize_rows, quantize_rows
from moe_compile.spec import Activation, Router

BF16 = torch.bfloat16
MAX_ERROR = {torch.float32: 1e-5, BF16: 1e-2}
POINTERS = Tiles(64, 128, 64, 4, 3, swap=True, tail=2, group=2)
WIDE = Tiles(64, 128, 64, 4, 3, swap=False, group=2, tma=True)
LADDER = Tiles(64, 128, 64, 4, 3, swap=True, group=2, tma=True, ladder=True)
ROWS = Tiles(64, 128, 64, 4, 3, swap=False, group=2, tma=True, rows_tma=True)
SHARED = Tiles(64, 128, 64, 4, 3, swap=False, group=2, tma=True, rows_tma=True, programs=7)
TAILED = Tiles(64, 128, 64, 4, 3, swap=False, tail=1, group=2, tma=True, rows_tma=True)
PLANS = {"pointers": POINTERS, "wide": WIDE, "ladder": LADDER, "rows": ROWS, "shared": SHARED, "tailed": TAILED}
FORMS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "separate, biases": {"separate": True, "bias": True},
    "interleaved": {"layout": "interleaved", "bias": True},
    "two weights": {"layout": "separate"},
    "not gated": {"activation": Activation(gated=False)},
    "odd sizes": {"H": 150, "I": 77},
    "transposed": {"transposed": True},
    "float32": {"dtype": torch.float32},
    "sentinels": {"routing": "sentinels", "weight_on_input": True},
}


def case(tokens: int, **form: Any) -> Layer:
    return Layer(**{"T": tokens, "E": 5, "K": 2, "H": 160, "I": 136, "dtype": BF16, "device": "cuda", **form})


class Checks(Start):
    """What was launched, and which cases were off."""

    def __init__(self) -> None:
        self.launched: set[str] = set()
        self.wrong: list[str] = []

    def __call__(self, make: Callable[[], Launch], *args: Any) -> None:
        """Launch, and keep the kernel's name."""
        kernel, grid, constants = make()
        self.launched.add(kernel.__name__)
        kernel[grid](*args, **constants)

    def near(self, label: str, ours: Tensor, truth: Tensor, limit: float | None = None) -> None:
        error, limit = relative_error(ours, truth), limit or MAX_ERROR[ours.dtype]
        print(f"{label}: error {error:.1e}", flush=True)
        if not error < limit:
            self.wrong.append(label)

    def layer(self, label: str, layer: Layer, plan: Plan | None = None, path: str | None = None) -> None:
        up, down = layer.projections()
        chosen = plan or plan_of(layer.ids, layer.E, up, down, path)
        args = (layer.x, layer.weights, layer.ids, layer.E, up, down, layer.weight_on_input, None, self)
        self.near(f"{label}, path {chosen.path}", follow_plan(chosen, *args), layer.truth())


def layers(checks: Checks, *paths: tuple[str, int]) -> None:
    for label, form in FORMS.items():
        for path, tokens in paths:
            if path != "gemv" or not form.get("transposed"):
                checks.layer(label, case(tokens, **form), path=path)


def scaled_layers(checks: Checks, *paths: tuple[str, int]) -> None:
    for form in ({}, {"layout": "interleaved", "bias": True}, {"H": 200, "I": 72, "routing": "sentinels"}):
        for path, tokens in paths:
            for quantise, scales in ((True, "block"), (False, "block"), (False, "tensor"), (False, "channel")):
                if scales == "channel" and path == "gemv":
                    continue
                layer = case(tokens, **form)
                up, down = quantised(layer, scales)
                plan = plan_scaled(layer.ids, layer.E, up, down, quantise, 2, path)
                args = (layer.x, layer.weights, layer.ids, layer.E, up, down, quantise, False)
                label = f"fp8 {form}, path {path}, T {tokens}, rows {'fp8' if quantise else 'bf16'}, per {scales}"
                checks.near(label, follow_scaled(plan, *args, None, checks), run_scaled_twin(*args), 3e-2)


def vectors(checks: Checks) -> None:
    """One or two tokens, weights of both kinds."""
    layers(checks, ("gemv", 2))
    scaled_layers(checks, ("gemv", 2))


def plain(checks: Checks) -> None:
    """Weights as they are."""
    layers(checks, ("decode", 19), ("decode", 60), ("sorted", 150))
    for label, tiles in PLANS.items():
        checks.layer(label, case(331), Plan("sorted", tiles, tiles))
    checks.layer("many chunks", case(2500, K=4), Plan("sorted", POINTERS, POINTERS))
    layer = case(40)
    down = layer.projections()[1]
    rows = torch.randn(50, 136, device="cuda").to(BF16)
    offsets = torch.tensor([0, 7, 7, 20, 41, 43], device="cuda").int()
    expert = torch.searchsorted(offsets.long(), torch.arange(50, device="cuda"), right=True) - 1
    twin = grouped.projection_twin(rows, torch.where(expert < 5, expert, -1), down, None)
    checks.near("grouped linear", grouped.grouped_linear(rows, offsets, down, POINTERS), twin)
    pairs = sort_pairs(layer.ids, 5, start=checks)
    rows, weights = torch.randn(80, 160, device="cuda").to(BF16), torch.rand(40, 2, device="cuda")
    ours = torch.ops.moe_compile.combine(rows, pairs.order, pairs.offsets, weights, 2)
    checks.near("combine", ours, combine_twin(rows, pairs.inverse, pairs.inverse >= 0, weights, 2, BF16))
    logits = torch.randn(33, 40, device="cuda")
    ours, theirs = (
        route(logits, 3, Router(), torch.float32, checks),
        Router().reference(logits, 3, torch.float32),
    )
    checks.near("router", ours[0], theirs[0])
    if not torch.equal(ours[1], theirs[1]):
        checks.wrong.append("router, ids")


def fp8(checks: Checks) -> None:
    """Weights in fp8 with scales, and what lies around DeepGEMM."""
    scaled_layers(checks, ("decode", 19), ("sorted", 40), ("sorted", 150))
    layer = case(70)
    pairs = sort_pairs(layer.ids, 5, 32, start=checks, padded=True)
    rows, scale, _ = quantize_permute(layer.x, pairs, 2, 32, layer.weights, checks)
    at = pairs.inverse.long()
    twin = dequantize_rows(*quantize_rows(layer.x)).repeat_interleave(2, 0) * layer.weights.reshape(-1, 1)
    checks.near("rows to padded order", dequantize_rows(rows, scale)[at], twin, 1e-5)
    wide = torch.randn(rows.shape[0], 160, device="cuda").to(BF16)
    epilogue = layer.projections()[0].epilogue
    rows, scale = activate_quantize(wide, pairs, 80, epilogue, 32, checks)
    twin = dequantize_rows(*activate_quantize_twin(wide[at], 80, epilogue))
    checks.near("activation to fp8", dequantize_rows(rows, scale)[at], twin, 3e-2)
    ours = combine_padded(wide, pairs.inverse, layer.weights, 2, BF16, checks)
    twin = combine_twin(wide, pairs.inverse, pairs.inverse >= 0, layer.weights, 2, BF16)
    checks.near("combine padded", ours, twin)


ROOMS = {"vectors": vectors, "plain": plain, "fp8": fp8}


def main() -> int:
    checks = Checks()
    for name in sys.argv[1:] or ROOMS:
        ROOMS[name](checks)
    torch.cuda.synchronize()
    print("kernels:", ", ".join(sorted(checks.launched)))
    print("wrong:", ", ".join(checks.wrong) or "none")
    return int(bool(checks.wrong))


if __name__ == "__main__":
    sys.exit(main())
