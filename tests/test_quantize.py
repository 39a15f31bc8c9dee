"""8-bit values and scales: against a slow loop, at the ends, and at the limits of the formats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_compile.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slowly(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    (n, k), (bn, bk) = x.shape, block
    q = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(n / bn), math.ceil(k / bk))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = x[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk].float()
            scales[i, j] = torch.tensor(max(float(part.abs().max()), 1e-10)) / torch.tensor(448.0)
            q[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk] = (part / scales[i, j]).clamp(-448, 448).to(q.dtype)
    return q, scales


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0)
        assert a.dtype == b.dtype and a.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "group"), [(3, 256, 128), (5, 130, 128), (2, 7, 3), (1, 1, 128), (4, 64, 64)])
def test_rows(m: int, k: int, group: int, dtype: torch.dtype) -> None:
    x = random(m, k, dtype=dtype)
    q, scales = quantize_rows(x, group)
    assert (q.shape, scales.shape) == ((m, k), (m, math.ceil(k / group)))
    same((q, scales), slowly(x, (1, group)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "k", "block"), [(256, 128, (128, 128)), (130, 257, (128, 128)), (5, 7, (2, 3)), (1, 1, (128, 128))]
)
def test_blocks(n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    w = random(n, k, dtype=dtype)
    same(quantize_blocks(w, block), slowly(w, block))
    stacked = random(3, n, k, dtype=dtype)
    q, scales = quantize_blocks(stacked, block)
    for e in range(3):
        same((q[e], scales[e]), slowly(stacked[e], block))


def test_any_strides() -> None:
    x = random(6, 10).t()
    same(quantize_rows(x, 4), slowly(x, (1, 4)))
    w = random(2, 6, 10).transpose(1, 2)
    q, _ = quantize_blocks(w, (4, 4))
    same((q[1], quantize_blocks(w[1], (4, 4))[1]), slowly(w[1], (4, 4)))


def test_zeros_stay_zero() -> None:
    q, scales = quantize_rows(torch.zeros(2, 130))
    assert (q.float() == 0).all()
    torch.testing.assert_close(scales, torch.full((2, 2), 1e-10) / torch.full((2, 2), 448.0), rtol=0, atol=0)
    assert (dequantize_rows(q, scales) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spoil_their_group_and_no_other(bad: float) -> None:
    x = random(2, 256)
    x[1, 130] = bad
    back = dequantize_rows(*quantize_rows(x))
    assert back[1, 128:].isnan().all() and back[0].isfinite().all() and back[1, :128].isfinite().all()
    w = random(2, 5, 7)
    w[1, 0, 6] = bad
    back = dequantize_blocks(*quantize_blocks(w, (2, 3)), (2, 3))
    assert back[1, :2, 6].isnan().all() and int(back.isnan().sum()) == 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype)
    x = torch.tensor([[limit.max, -limit.max, 1.0, 0.0], [limit.tiny, -limit.tiny, 0.0, 0.0]], dtype=dtype)
    q, scales = quantize_rows(x)
    assert q.float()[0].tolist() == [448.0, -448.0, pytest.approx(448 / limit.max, abs=2**-9), 0.0]
    assert scales.isfinite().all() and (scales > 0).all() and not q.float().isnan().any()
    back = dequantize_rows(q, scales, dtype=torch.float64)
    assert back[0, 0].item() == pytest.approx(limit.max, rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e3])
def test_round_trip(dtype: torch.dtype, spread: float) -> None:
    w = (random(2, 200, 300, seed=1) * spread).to(dtype)
    q, scales = quantize_blocks(w)
    back = dequantize_blocks(q, scales, dtype=torch.float64)
    step = scales.double().repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)[..., :300]
    error = (back - w.double()).abs()
    assert (error <= 2**-4 * 448 * step).all()  # of the group's largest value
    # Tighter: half of the last of three mantissa bits, or half of the smallest number below them.
    assert (error <= torch.maximum(2**-4 * w.double().abs(), 2**-10 * step) * (1 + 1e-5)).all()
    assert dequantize_blocks(q, scales, dtype=dtype).dtype == dtype


def test_numbers_of_the_format_come_back_exactly() -> None:
    x = torch.tensor([[448.0, 1.0, -0.875, 2**-9, 416.0, 0.0]])
    q, scales = quantize_rows(x)
    assert scales.item() == 1.0
    torch.testing.assert_close(dequantize_rows(q, scales), x, rtol=0, atol=0)


def test_empty() -> None:
    for m, k in ((0, 256), (3, 0), (0, 0)):
        q, scales = quantize_rows(torch.empty(m, k))
        assert (q.shape, scales.shape) == ((m, k), (m, math.ceil(k / 128)))
        assert dequantize_rows(q, scales).shape == (m, k)
    q, scales = quantize_blocks(torch.empty(0, 130, 4))
    assert (q.shape, scales.shape) == ((0, 130, 4), (0, 2, 1))
    assert dequantize_blocks(q, scales).shape == (0, 130, 4)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"rows are \[M, K\], got \[3\]"):
        quantize_rows(torch.ones(3))
    with pytest.raises(ValueError, match=r"got \[1, 2, 3, 4\]"):
        quantize_blocks(torch.ones(1, 2, 3, 4))
    q, scales = quantize_blocks(torch.ones(130, 4))
    with pytest.raises(ValueError, match=r"has scales \[2, 1\], got \[1, 2\]"):
        dequantize_blocks(q, scales.t())
