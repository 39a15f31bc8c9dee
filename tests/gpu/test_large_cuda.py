"""Tensors of more than 2**31 elements: an offset in 32 bits would read or write elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from moe_compile.ops import cuda, parts  # noqa: E402

LIMIT = 2**31
SILU = ["silu", [1.0, float("inf"), float("inf"), float("inf"), 0.0], True]
MAX_ERROR = 1e-2


def needs(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / 2**30:.0f} are free")


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, scale)


def expected(x: Tensor, weights: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """In float32, token by token: ``x [t, H]`` -> ``[t, H]``."""
    out = torch.zeros(x.shape, device="cuda")
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up = (w1[e].float() @ x[t].float()).chunk(2)
            out[t] += weight * (w2[e].float() @ (torch.nn.functional.silu(gate) * up))
    return out


def run(x: Tensor, weights: Tensor, ids: Tensor, w1: Tensor, w2: Tensor, path: str) -> Tensor:
    return cuda.experts(x, weights, ids, [w1], [], [w2], [], [], [], *SILU, path=path)  # type: ignore[arg-type]


@pytest.mark.parametrize("transposed", [False, True])
def test_weights(transposed: bool) -> None:
    """Both weights, on every path; the last experts lie beyond 32 bits."""
    needs(16)
    experts, hidden, inter = 266, 2048, 4096
    w1, w2 = normal(experts, 2 * inter, hidden, scale=hidden**-0.5), normal(experts, hidden, inter, scale=inter**-0.5)
    if transposed:  # the same memory, seen with other strides
        w1, w2 = w1.view(experts, hidden, -1).transpose(1, 2), w2.view(experts, inter, hidden).transpose(1, 2)
    assert min(w1.numel(), w2.numel()) > LIMIT
    for path, tokens in (("gemv", 2), ("decode", 16), ("sorted", 80), ("sorted", 2000)):
        if path == "gemv" and transposed:
            continue
        x, weights = normal(tokens, hidden), torch.rand(tokens, 2, device="cuda")
        ids = torch.randint(experts - 3, experts, (tokens, 2), device="cuda")
        out, sample = run(x, weights, ids, w1, w2, path), slice(tokens - 2, None)
        truth = expected(x[sample], weights[sample], ids[sample], w1, w2)
        assert float((out[sample].float() - truth).norm() / truth.norm()) < MAX_ERROR, path
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("inter", [512, 2048])
def test_rows(inter: int) -> None:
    """The rows between the kernels; with many columns the rows of the tokens are put in order too."""
    needs(24)
    tokens, top_k, experts, hidden = 132_000, 8, 16, 2048
    assert tokens * top_k * hidden > LIMIT
    w1, w2 = normal(experts, 2 * inter, hidden, scale=hidden**-0.5), normal(experts, hidden, inter, scale=inter**-0.5)
    x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    ids[-2:] = experts - 1  # the very last rows in expert order
    out = run(x, weights, ids, w1, w2, "sorted")
    for sample in (slice(0, 2), slice(tokens // 2, tokens // 2 + 2), slice(tokens - 2, None)):
        truth = expected(x[sample], weights[sample], ids[sample], w1, w2)
        assert float((out[sample].float() - truth).norm() / truth.norm()) < MAX_ERROR
    assert bool(out.isfinite().all())


def test_memory_is_bounded() -> None:
    """Three parts of the tokens: no more memory than a part takes, right at their borders, and the same bits again."""
    memory = torch.cuda.get_device_properties(0).total_memory
    top_k, experts, hidden, inter = 8, 32, 2048, 768
    tokens = int(memory / parts.SHARE / (top_k * (2 * hidden + 3 * inter) * 2) * 2.5)
    needs(2 * memory / parts.SHARE / 2**30)
    w1, w2 = normal(experts, 2 * inter, hidden, scale=hidden**-0.5), normal(experts, hidden, inter, scale=inter**-0.5)
    x, weights = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    part = parts.tokens_of_part(x, ids, inter)
    assert 2 * part < tokens <= 3 * part
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = torch.ops.moe_compile.experts(x, weights, ids, [w1], [], [w2], [], [], [], *SILU)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes < memory / parts.SHARE + (64 << 20)
    for border in (0, part, 2 * part, tokens):
        sample = slice(max(border - 2, 0), border + 2)
        truth = expected(x[sample], weights[sample], ids[sample], w1, w2)
        assert float((out[sample].float() - truth).norm() / truth.norm()) < MAX_ERROR
    assert torch.equal(out, torch.ops.moe_compile.experts(x, weights, ids, [w1], [], [w2], [], [], [], *SILU))
