"""What is read of the product that widens fp8 weights: which dimension of the scales counts what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scaling import FP8, E, K, N, q, read, wide
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tracing import engine_of

from moe_compile.match import fp8
from moe_compile.spec import Activation, Experts, MoE, NoMatch, Scale, Weight

ROWS, COLUMNS = N // 128, K // 128
SCALED = {
    "tensor": (lambda w, s: wide(w[1]) * s[1], (E,), ((0, None, None), (1, 1))),
    "one for all": (lambda w, s: wide(w[1]) * s, (), ((None, None, None), (1, 1))),
    "one of one": (lambda w, s: wide(w) * s, (1, 1, 1), ((None, None, None), (1, 1))),
    "stack": (lambda w, s: wide(w) * s[:, None, None], (E,), ((0, None, None), (1, 1))),
    "stack by view": (lambda w, s: wide(w) * s.view(-1, 1, 1), (E,), ((0, None, None), (1, 1))),
    "unbound": (lambda w, s: wide(w.unbind(0)[2]) * s.unbind(0)[2], (E, N, 1), ((0, 1, None), (1, 1))),
    "last by minus one": (lambda w, s: wide(w[3]) * s[-1], (E,), ((0, None, None), (1, 1))),
    "channel": (lambda w, s: wide(w[1]) * s[1][:, None], (E, N), ((0, 1, None), (1, 1))),
    "channel, squeezed first": (lambda w, s: wide(w) * s.squeeze(-1).unsqueeze(2), (E, N, 1), ((0, 1, None), (1, 1))),
    "channel, expanded": (lambda w, s: wide(w) * s.expand(E, N, K), (E, N, 1), ((0, 1, None), (1, 1))),
    "channel, turned": (lambda w, s: (wide(w).mT * s[:, None]), (E, N), ((0, 1, None), (1, 1))),
    "channel, scales [N, E]": (lambda w, s: wide(w) * s.t()[..., None], (N, E), ((1, 0, None), (1, 1))),
    "block": (
        lambda w, s: wide(w[1]) * s[1].repeat_interleave(128, 0).repeat_interleave(128, 1),
        (E, ROWS, COLUMNS), ((0, 1, 2), (128, 128)),
    ),
    "block of a stack, float32 first": (
        lambda w, s: (w.float() * s.repeat_interleave(128, dim=2).repeat_interleave(128, dim=1)).bfloat16(),
        (E, ROWS, COLUMNS), ((0, 1, 2), (128, 128)),
    ),
    "block, in two steps": (
        lambda w, s: wide(w) * s.repeat_interleave(32, 1).repeat_interleave(4, 1).repeat_interleave(128, 2),
        (E, ROWS, COLUMNS), ((0, 1, 2), (128, 128)),
    ),
    "block, scales stored turned": (
        lambda w, s: wide(w) * s.transpose(1, 2).repeat_interleave(128, 1).repeat_interleave(128, 2),
        (E, COLUMNS, ROWS), ((0, 2, 1), (128, 128)),
    ),
    "block, scales permuted": (
        lambda w, s: wide(w) * s.permute(2, 0, 1).repeat_interleave(128, 1).repeat_interleave(128, 2),
        (ROWS, COLUMNS, E), ((2, 0, 1), (128, 128)),
    ),
    "block by tiles": (
        lambda w, s: (wide(w[1]).view(ROWS, 128, COLUMNS, 128) * s[1][:, None, :, None]).view(N, K),
        (E, ROWS, COLUMNS), ((0, 1, 2), (128, 128)),
    ),
    "block by tiles of a stack": (
        lambda w, s: wide(w.view(E, ROWS, 128, COLUMNS, 128)).mul(s.view(E, ROWS, 1, COLUMNS, 1)).reshape(E, N, K),
        (E, ROWS, COLUMNS), ((0, 1, 2), (128, 128)),
    ),
    "block by unflatten": (
        lambda w, s: (wide(w[1]).unflatten(0, (-1, 128)).unflatten(2, (-1, 128)) * s[1][:, None, :, None]).view(N, K),
        (E, ROWS, COLUMNS), ((0, 1, 2), (128, 128)),
    ),
    "block by copies": (
        lambda w, s: wide(w) * s[:, :, None, :, None].expand(-1, -1, 128, -1, 128).reshape(E, N, K),
        (E, ROWS, COLUMNS), ((0, 1, 2), (128, 128)),
    ),
    "the only row": (lambda w, s: wide(w[1]) * s[0], (1, N, 1), ((None, 1, None), (1, 1))),
    "a row of copies": (lambda w, s: wide(w[1]) * s.expand(E)[1], (1,), ((None, None, None), (1, 1))),
    "of half of the weight": (lambda w, s: wide(w[1, :128]) * s[1], (E,), ((0, None, None), (1, 1))),
    "rounded like the weights": (
        lambda w, s: wide(w) * s.bfloat16().clone()[:, None, None], (E,), ((0, None, None), (1, 1)),
    ),
    "copies cut into tiles": (
        lambda w, s: (wide(w).view(E, ROWS, 128, K) * s.expand(E, N).reshape(E, ROWS, 128, 1)).view(E, N, K),
        (E, 1), ((0, None, None), (1, 1)),
    ),
    "a piece of the parameter": (
        lambda w, s: wide(w) * s.chunk(2)[1][:, None, None], (2 * E,), ((0, None, None), (1, 1)),
    ),
    "vectors without a dimension": (
        lambda w, s: wide(w[1]) * s[1].repeat_interleave(128)[:, None], (E, ROWS), ((0, 1, None), (128, 1)),
    ),
    "block, scales stored turned, by mT": (
        lambda w, s: wide(w) * s.mT.repeat_interleave(128, 1).repeat_interleave(128, 2),
        (E, COLUMNS, ROWS), ((0, 2, 1), (128, 128)),
    ),
    "block, experts second": (
        lambda w, s: wide(w) * s.transpose(0, 1).repeat_interleave(128, 1).repeat_interleave(128, 2),
        (ROWS, E, COLUMNS), ((1, 0, 2), (128, 128)),
    ),
    "tiles of repeated scales": (
        lambda w, s: (wide(w).view(E, ROWS, 128, K) * s.repeat_interleave(128, 1).view(E, ROWS, 128, 1)).view(E, N, K),
        (E, ROWS), ((0, 1, None), (128, 1)),
    ),
    "tiles under a dimension of one": (
        lambda w, s: (wide(w[1]).view(1, ROWS, 128, K) * s[1].view(1, ROWS, 1, 1)).view(N, K),
        (E, ROWS), ((0, 1, None), (128, 1)),
    ),
    "rows merged with columns": (
        lambda w, s: (wide(w[1]).view(ROWS, 128, K).flatten(1) * s[1][:, None]).view(N, K),
        (E, ROWS), ((0, 1, None), (128, 1)),
    ),
    "turned tiles, one for all": (
        lambda w, s: (wide(w).view(E, ROWS, 128, K).transpose(1, 2) * s).transpose(1, 2).reshape(E, N, K),
        (1,), ((None, None, None), (1, 1)),
    ),
    "rows of blocks": (
        lambda w, s: wide(w) * s.repeat_interleave(128, 1)[..., None], (E, ROWS), ((0, 1, None), (128, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_is_read(name: str) -> None:
    fn, scale, expected = SCALED[name]
    assert read(fn, scale) == expected


def test_past_the_end() -> None:
    """The last block is smaller than the others."""
    fn = lambda w, s: wide(w) * s.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :200, :300]  # noqa: E731
    assert read(fn, (E, 2, 3), (E, 200, 300)) == ((0, 1, 2), (128, 128))
    assert read(fn, (E, 3, 3), (E, 200, 300)) == "MC408"  # one more than there are blocks
    flat = lambda w, s: wide(w) * s.repeat_interleave(128, 1)[:, :200].view(E, 200, 1)  # noqa: E731
    assert read(flat, (E, 2), (E, 200, 300)) == ((0, 1, None), (128, 1))


NOT = {
    "another row": (lambda w, s: wide(w[1]) * s[2], (E,)),
    "a row for all": (lambda w, s: wide(w) * s[2], (E,)),
    "experts backwards": (lambda w, s: wide(w) * s.flip(0)[:, None, None] * s[:, None, None], (E,)),
    "the first of many": (lambda w, s: wide(w) * s[:, :1], (E, N, 1)),
    "the first of many, repeated": (lambda w, s: wide(w) * s[:, :1].repeat_interleave(N, 1), (E, N, 1)),
    "the first of many, expanded": (lambda w, s: wide(w) * s[:, :1].expand(E, N, 1), (E, N, 1)),
    "the first of many, by view": (lambda w, s: wide(w) * s[:, :1].view(E, 1, 1), (E, N)),
    "the first expert for all": (lambda w, s: wide(w) * s[:1].view(1, 1, 1), (E,)),
    "a number": (lambda w, s: wide(w) * 2.0, (E,)),
    "more experts": (lambda w, s: wide(w[1]) * s[1], (E + 1,)),
    "more dimensions than the weights": (lambda w, s: wide(w) * s, (1, 1, 1, 1)),
    "tiles, scales in the other order": (
        lambda w, s: wide(w[1]).view(ROWS, 128, COLUMNS, 128) * s[1][None, :, :, None].expand(ROWS, 128, COLUMNS, 128),
        (E, 128, COLUMNS),
    ),
    "blocks of 64": (lambda w, s: wide(w) * s.repeat_interleave(64, 1).repeat_interleave(64, 2), (E, N // 64, K // 64)),
    "groups of a channel": (lambda w, s: wide(w) * s.repeat_interleave(128, 2), (E, N, COLUMNS)),
    "an element each": (lambda w, s: wide(w) * s, (E, N, K)),
    "twice": (lambda w, s: wide(w) * s * s, (1,)),
    "through float16": (lambda w, s: (wide(w) * s).half().float(), (1,)),
    "scales through float16": (lambda w, s: wide(w) * s.half().float(), (1,)),
    "through integers": (lambda w, s: wide(w) * s.int().float(), (1,)),
    "of pairs of experts": (lambda w, s: wide(w) * s.repeat_interleave(2, 0)[:E, None, None], (E,)),
    "an element each, flat": (lambda w, s: wide(w[1]).view(-1) * s[1], (E, N * K)),
    "of weights cut twice": (lambda w, s: wide(w[1]).view(ROWS, 128, K).view(ROWS, 2, 64, K) * s[1], (E,)),
    "of experts cut in two": (lambda w, s: wide(w).view(2, 2, N, K) * s, (1,)),
    "uneven copies": (lambda w, s: wide(w) * s.expand(6, 2).reshape(4, 3)[0, 0], (1,)),
    "of uneven pieces": (lambda w, s: wide(w[1]).view(96, 2, 512) * s[1], (E,)),
    "repeated by the scales": (lambda w, s: wide(w[:, :1]) * s[:, :, None], (E, N)),
}  # fmt: skip


def copies_first(w: Tensor, s: Tensor) -> Tensor:
    return wide(w) * s[:, None, :].expand(E, 128, ROWS).reshape(E, N)[..., None]


def copied_rows(w: Tensor, s: Tensor) -> Tensor:
    return wide(w[:, :1]) * s[:, None, None].expand(E, N, 1)


# name -> (product, shape of the scales, shape of the weights); sizes that happen to fit hide nothing
SQUARE = {
    "another column of a square": (lambda w, s: wide(w[1]) * s[:, 2][:, None], (E, E), (E, E, K)),
    "a place of a square": (lambda w, s: wide(w[1]) * s[1][1], (E, E), (E, E, K)),
    "every second row": (lambda w, s: wide(w[1]) * s[::2][1], (E,), (E, N, K)),
    "rows from the second on": (lambda w, s: wide(w[1]) * s[1:][1], (E,), (E, N, K)),
    "blocks from within one": (
        lambda w, s: wide(w) * s.repeat_interleave(128, 1)[:, 56:, None], (E, 2), (E, 200, K),
    ),
    "one row for many": (lambda w, s: wide(w) * s[:, :, None], (E, N), (E, 1, K)),
    "copies before blocks": (copies_first, (E, ROWS), (E, N, K)),
    "weights repeated by copies of scales": (copied_rows, (E,), (E, N, K)),
}  # fmt: skip


@pytest.mark.parametrize("name", SQUARE)
def test_is_not_read_where_sizes_fit(name: str) -> None:
    fn, scale, weight = SQUARE[name]
    assert read(fn, scale, weight) in ("MC408", None)


@pytest.mark.parametrize("name", NOT)
def test_is_not_read(name: str) -> None:
    fn, scale = NOT[name]
    assert read(fn, scale) in ("MC408", None)


def test_other_formats_are_not_read() -> None:
    def fn(w: Tensor, s: Tensor) -> Tensor:
        return wide(w) * s

    for dtype in (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        engine, node = engine_of(fn, w_parameter=torch.zeros(E, N, K).to(dtype), s_parameter=torch.zeros(1))
        assert engine.fact(node) is None and [m.error.code for m in engine.misses] == ["MC408"]


def test_activations_in_fp8_are_no_weights() -> None:
    """Neither a parameter nor a stack: hidden states that pass through fp8."""
    engine, node = engine_of(lambda x: x.to(FP8).to(torch.float32) * 2, x=torch.zeros(5, 8))
    assert engine.fact(node) is None and not engine.misses


def test_a_channel_cut_into_tiles() -> None:
    """No copies: a place of the channel would be lost."""
    fn = lambda w, s: wide(w).view(E, ROWS, 128, K) * s.view(E, ROWS, 128, 1)  # noqa: E731
    engine, _ = engine_of(fn, w_parameter=q(), s_parameter=torch.zeros(E, N))
    assert "which is not read as their scales" in engine.misses[-1].error.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widened_scales_keep_their_numbers(dtype: torch.dtype) -> None:
    fn = lambda w, s: (w.float() * s.clone().float()[:, None, None]).to(torch.bfloat16)  # noqa: E731
    assert read(fn, (E,), dtype=dtype) == ((0, None, None), (1, 1))


def test_scales_that_depend_on_the_input_are_not_read() -> None:
    engine, node = engine_of(lambda w, x: wide(w) * x.amax(), w_parameter=q(), x=torch.zeros(5, 8))
    assert engine.fact(node) is None and [m.error.code for m in engine.misses] == ["MC408"]


# ------------------------------------------------------------------------------------- the meaning


def test_reference_multiplies_by_the_scales() -> None:
    g = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(2, *shape, generator=g).to(FP8) for shape in ((6, 5), (5, 3)))
    x, ids = torch.randn(4, 5, generator=g, dtype=torch.float64), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])
    s1, s2 = torch.rand(2, 2, 3, generator=g) + 0.5, torch.rand(2, 5, 1, generator=g) + 0.5
    every = s1.repeat_interleave(4, 1)[:, :6].repeat_interleave(2, 2)[:, :, :5]

    def meaning(one: Weight, two: Weight) -> Tensor:
        experts = Experts(2, 5, 3, one, two, activation=Activation())
        return MoE(x, ids, torch.ones(4, 2, dtype=torch.float64), 2, experts).reference(torch.float64)

    plain = meaning(Weight((w1.double() * every,), True), Weight((w2.double() * s2,), True))
    one, two = Scale(s1, (4, 2)), Scale(s2, (1, 3))
    assert torch.allclose(meaning(Weight((w1,), True, scale=one), Weight((w2,), True, scale=two)), plain)
    turned = Weight((w1.mT.contiguous(),), True, True, one)
    assert torch.allclose(meaning(turned, Weight((w2,), True, scale=two)), plain)


def test_invariants() -> None:
    scale, bias = Scale(torch.ones(1, 1, 1), (6, 5)), Weight((torch.zeros(2, 5),), True)
    plain, scaled = Weight((q(2, 6, 5),), True), Weight((q(2, 6, 5),), True, scale=scale)
    with pytest.raises(ValueError, match="shared by a block"):
        Scale(torch.ones(1), (0, 5))
    with pytest.raises(ValueError, match="is one stacked tensor, got 2"):
        Weight((q(6, 5), q(6, 5)), False, scale=scale)
    with pytest.raises(ValueError, match="1 of 2 projections have a scale"):
        Experts(2, 5, 3, scaled, plain)
    with pytest.raises(ValueError, match="no biases"):
        Experts(2, 5, 3, scaled, scaled, b2=bias)
    with pytest.raises(ValueError, match="a known activation"):
        Experts(2, 5, 3, scaled, scaled, activation=None, custom=object())
    assert Experts(2, 5, 3, scaled, scaled).fp8 and not Experts(2, 5, 3, plain, plain).fp8


@pytest.mark.parametrize("shape", [(), (4,)])
def test_scales_are_where_the_weights_are(shape, monkeypatch):
    """One number on the CPU too: PyTorch multiplies by it, the op would raise when it is called."""
    with FakeTensorMode():
        tensors = {
            "w": torch.empty(4, 8, 8, device="cuda").to(torch.float8_e4m3fn),
            "x": torch.empty(2, 8, device="cuda"),
            "s": torch.empty(shape),
        }
    monkeypatch.setattr(fp8, "value", lambda node: tensors[node])
    leaf, axes = SimpleNamespace(node="s"), (None, None, None)
    scales = SimpleNamespace(leaf=leaf, dtype=torch.float32, axes=axes, blocks=(1, 1))
    weight = SimpleNamespace(leaf=SimpleNamespace(node="w"), leaves=(), source="axis", scales=scales)
    slot, val = SimpleNamespace(weight=weight, transposed=False), SimpleNamespace(x=SimpleNamespace(node="x"))
    with pytest.raises(NoMatch, match="scales are on cpu, the weights on cuda"):
        fp8._check_weight(slot, val, "node")
    with FakeTensorMode():
        tensors["s"] = torch.empty(shape, device="cuda")
    fp8._check_weight(slot, val, "node")
