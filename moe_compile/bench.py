"""Timing for the command line: medians of eager, ``torch.compile`` and ``moe_compile`` on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from moe_compile import torch_breaks
from moe_compile.backend import moe_compile as backend
from moe_compile.config import AS_WRITTEN
from moe_compile.demo import GatherLoop, Sample, naive

BUDGET_S = 1.0  # of timed calls per program, after compilation
FEWEST = 7  # calls, whatever they take: a median of fewer says little on a busy machine


def median_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of one warm call in milliseconds, the device's work included."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    for _ in range(3):
        once()
    times = [once()]
    while len(times) < FEWEST or (sum(times) < BUDGET_S * 1e3 and len(times) < 500):
        times.append(once())
    return median(times)


def speed(sample: Sample) -> dict[str, float]:
    """Milliseconds per call: ``eager``, ``torch.compile``, ``moe_compile``."""
    tensors = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    out: dict[str, float] = {}
    token = AS_WRITTEN.set(True)  # "eager" means it for what is decorated, too
    with torch.no_grad():
        for name in ("eager", "torch.compile", "moe_compile"):
            torch_breaks.reset()
            program = sample.model
            if name != "eager":
                program = torch.compile(program, backend="inductor" if name == "torch.compile" else backend)
            out[name] = median_ms(lambda run=program: run(*sample.args, **sample.kwargs), device)  # type: ignore[misc]
    AS_WRITTEN.reset(token)
    torch_breaks.reset()
    return out


def layer_rows(
    sizes: tuple[int, int, int, int], tokens: list[int], device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row per number of tokens for a naive gather loop with ``sizes = (E, K, H, I)``."""
    rows: list[dict[str, Any]] = []
    for count in tokens:
        sample = naive(GatherLoop, sizes, count, device, dtype)
        rows.append({"tokens": count, **speed(sample)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text, with the speed-up over the faster of the two others."""
    names = [key for key in rows[0] if isinstance(rows[0][key], (int, float, str))]
    lines = [[*names, "speed-up"]]
    for row in rows:
        best = min(row["eager"], row["torch.compile"])
        cells = [f"{row[n]:.3f} ms" if isinstance(row[n], float) else str(row[n]) for n in names]
        lines.append([*cells, f"{best / row['moe_compile']:.2f}x"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
