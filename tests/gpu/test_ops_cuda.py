"""The CUDA ops on a real device: every path, dtype and storage form, against float64.

Before every case freed memory is filled with NaN, so that a row that nobody wrote shows if it is read.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from layers import Layer, relative_error  # noqa: E402
from replays import long_way, replayed  # noqa: E402

from moe_compile.kernels import experts as pipeline  # noqa: E402
from moe_compile.kernels import grouped  # noqa: E402
from moe_compile.ops import calls, cuda, tables  # noqa: E402
from moe_compile.spec import Activation  # noqa: E402

PATHS = ("gemv", "decode", "sorted")
FLOOR = {torch.float32: 1e-7, torch.bfloat16: 1e-3, torch.float16: 1e-3}
GPT_OSS = Activation("silu", alpha=1.702, gate_limit=1.0, up_limit=1.0, up_offset=1.0)
FIRST_STEP = {"gemv": "gemv_up", "decode": "decode_projection", "sorted": "sort_pairs"}


@pytest.fixture(autouse=True)
def poison() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    calls.kind_of.cache_clear()
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (64, 4096, 1 << 18, 1 << 22, 1 << 25)]
    del blocks


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the paths whose first kernel was launched, the long way."""
    seen: list[str] = []
    for path, name in FIRST_STEP.items():
        original = getattr(pipeline, name)

        def spy(*args: Any, _original: Any = original, _path: str = path, **kwargs: Any) -> Any:
            seen.append(_path)
            return _original(*args, **kwargs)

        monkeypatch.setattr(pipeline, name, spy)
    with long_way():
        yield seen


def layer(*args: Any, **kwargs: Any) -> Layer:
    return Layer(*args, device="cuda", **kwargs)


def run(case: Layer, path: str | None = None) -> torch.Tensor:
    return cuda.experts(*case.op_args(), path=path)  # type: ignore[arg-type]


def assert_as_good(ours: torch.Tensor, naive: torch.Tensor, truth: torch.Tensor) -> None:
    error, own = relative_error(ours, truth), relative_error(naive, truth)
    assert error <= 2 * own + FLOOR[naive.dtype], f"ours {error:.2e}, torch {own:.2e}"


def check(case: Layer, path: str | None = None) -> torch.Tensor:
    """The output, which a program gives, too, bit by bit.

    A case of few numbers, each of them as lucky as it happens to be, is judged with 63 more seeds.
    """
    cases = [case]
    if case.T * case.H < 16:
        cases += [replace(case, seed=seed) for seed in range(1, 64)]
    ours = [run(c, path) for c in cases]
    naive = [c.moe().reference().to(c.dtype) for c in cases]
    assert_as_good(torch.cat(ours), torch.cat(naive), torch.cat([c.truth() for c in cases]))
    assert torch.equal(ours[0], replayed(lambda: run(case, path)))
    return ours[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(FLOOR))
@pytest.mark.parametrize(
    ("T", "E", "K", "H", "I"),
    [
        (1, 8, 2, 256, 512),
        (2, 16, 4, 192, 96),
        (7, 5, 5, 127, 61),
        (33, 17, 3, 360, 88),
        (150, 8, 2, 256, 384),
        (4, 3, 2, 1, 1),
    ],
)
def test_paths(path: str, dtype: torch.dtype, T: int, E: int, K: int, H: int, I: int, taken: list[str]) -> None:
    case = layer(T, E, K, H, I, dtype=dtype, routing="sentinels")
    first = check(case, path)
    assert set(taken) == {path}
    assert torch.equal(first, run(case, path)), "two runs differ"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate"])
@pytest.mark.parametrize(
    ("T", "E", "K", "H", "I"), [(1, 8, 2, 256, 512), (64, 8, 2, 512, 1024), (300, 8, 2, 1024, 2048)]
)
def test_fp32(path: str, layout: str, T: int, E: int, K: int, H: int, I: int, taken: list[str]) -> None:
    case = layer(T, E, K, H, I, layout=layout, dtype=torch.float32, bias=layout != "concat")
    check(case, path)
    assert set(taken) == {path}


@pytest.mark.parametrize(("rows", "D", "N"), [(2, 256, 512), (64, 1024, 512), (600, 2048, 1024), (600, 4096, 64)])
def test_fp32_grouped_linear(rows: int, D: int, N: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g).cuda() for shape in ((rows, D), (4, N, D)))
    ends = [0, 1, rows // 2, rows // 2, rows]  # one row, many, none, many
    out = torch.ops.moe_compile.grouped_linear(x, [w], [], torch.tensor(ends, dtype=torch.int32, device="cuda"))
    naive, truth = (
        torch.cat([x[a:b].to(dtype) @ w[e].to(dtype).t() for e, (a, b) in enumerate(pairwise(ends))])
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_good(out, naive, truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(FLOOR))
def test_not_finite(path: str, dtype: torch.dtype) -> None:
    """A sum that overflows is infinite, not NaN; a NaN passes every clamp and stays in its token."""
    case = layer(3, 3, 1, 96, 40, Activation("identity", gated=False), dtype=dtype)
    case.x[:], case.w1[0][:], case.w2[0][:] = torch.finfo(dtype).max / 8, 1.0, 1.0
    assert bool(run(case, path).isposinf().all())
    case.x.neg_()
    assert bool(run(case, path).isneginf().all())
    case = layer(3, 3, 2, 96, 40, Activation("silu", gate_limit=1.0, up_limit=1.0, act_limit=1.0), dtype=dtype)
    case.x[1, 5] = float("nan")
    out = run(case, path)
    assert bool(out[1].isnan().all()) and bool(out[[0, 2]].isfinite().all())


@pytest.mark.parametrize("T", [0, 1, 2, 3, 64, 65, 128, 129, 700, 3000])
def test_chosen_path(T: int, taken: list[str]) -> None:
    case = layer(T, 16, 4, 256, 128, dtype=torch.bfloat16)
    if T == 0:
        assert run(case).shape == (0, 256)
        return
    check(case)
    expected = "gemv" if T == 1 else "decode" if T <= 64 else "sorted"
    assert set(taken) == {expected}


def test_two_tokens_of_many_experts(taken: list[str]) -> None:
    check(layer(2, 32, 4, 256, 128, dtype=torch.bfloat16))
    assert set(taken) == {"gemv"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("T", [2, 40, 400, 1200])
def test_storage(path: str, layout: str, transposed: bool, T: int) -> None:
    """Stacked and separate weights give the same bits.

    On the sorted path stacked ones may be read by descriptors, in tiles of other heights and widths (T=400: the
    ladder, T=1200: whole tiles), and separate ones never are. But no tile splits a sum, steps are 64 deep in
    both plans (``tests/kernels/test_plans.py``), and every instruction is a wgmma of depth 16, so each element
    adds the same products in the same order.
    """
    if (path == "gemv" and (transposed or T > 2)) or (path == "decode" and T > 100):
        pytest.skip("not a case of this path")
    form = {"bias": True, "routing": "sentinels", "dtype": torch.bfloat16, "transposed": transposed}
    stacked = layer(T, 6, 3, 320, 176, GPT_OSS, layout, **form)
    separate = layer(T, 6, 3, 320, 176, GPT_OSS, layout, True, **form)
    assert torch.equal(check(stacked, path), check(separate, path)), "stacked and separate differ"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate", "single"])
@pytest.mark.parametrize(("H", "I"), [(320, 176), (256, 384), (72, 40)])
@pytest.mark.parametrize("T", [200, 1200, 3000])  # graded heights; short last tiles; many tiles
@pytest.mark.parametrize("transposed", [False, True])
def test_descriptors(
    dtype: torch.dtype, layout: str, H: int, I: int, T: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = grouped.describe

    def spy(*args: Any) -> Any:
        seen.append("described")
        return original(*args)

    monkeypatch.setattr(grouped, "describe", spy)
    activation = Activation(gated=layout != "single")
    form = {"dtype": dtype, "bias": True, "routing": "sentinels", "transposed": transposed}
    case = layer(T, 6, 3, H, I, activation, layout, **form)
    first = check(case)
    if pipeline.device_of(0).tma:
        assert len(seen) == 4  # two GEMMs of two calls: a program describes nothing
    assert torch.equal(first, run(case)), "two runs differ"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations(path: str, name: str, gated: bool) -> None:
    activation = Activation(name, gated, gate_limit=2.0, act_limit=1.5)
    check(layer(6, 4, 2, 128, 64, activation, dtype=torch.bfloat16, bias=True), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("routing", ["one", "nobody", "distinct", "random"])
def test_routing(path: str, routing: str) -> None:
    case = layer(48, 8, 4, 256, 128, dtype=torch.float16, routing=routing)
    if routing == "nobody":
        assert not run(case, path).any()
    else:
        check(case, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate"])
def test_weight_on_input(path: str, layout: str) -> None:
    case = layer(9, 8, 2, 256, 128, layout=layout, dtype=torch.bfloat16, bias=True, weight_on_input=True)
    assert relative_error(run(case, path), case.truth()) < 8e-3


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_many_experts_sort(tokens: int) -> None:
    ids = torch.randint(-3, 1103, (tokens, 8), device="cuda")
    order, offsets = torch.ops.moe_compile.sort_pairs(ids, 1100)
    bucket = torch.where((ids >= 0) & (ids < 1100), ids, 1100).reshape(-1)
    assert torch.equal(order.long(), torch.argsort(bucket, stable=True))
    ends = torch.bincount(bucket, minlength=1101).cumsum(0)
    assert torch.equal(offsets[1:].long(), ends[:1100]) and int(offsets[0]) == 0


@pytest.mark.parametrize("dtype", list(FLOOR))
@pytest.mark.parametrize("separate", [False, True])
def test_three_ops_make_a_layer(dtype: torch.dtype, separate: bool) -> None:
    case = layer(
        300, 7, 3, 200, 120, Activation("relu", gated=False), dtype=dtype, bias=True, routing="sentinels",
        separate=separate,
    )  # fmt: skip
    ops = torch.ops.moe_compile
    order, offsets = ops.sort_pairs(case.ids, 7)
    h = torch.relu(ops.grouped_linear(case.x[order.long() // 3], case.w1, case.b1, offsets))
    y = ops.grouped_linear(h, case.w2, case.b2, offsets)
    assert not y[int(offsets[7]) :].any()
    out = ops.combine(y, order, offsets, case.weights, 3)
    assert_as_good(out, case.moe().reference().to(dtype), case.truth())


@pytest.mark.parametrize("separate", ["stacked", "separate", "separate, first seen in the capture"])
@pytest.mark.parametrize("T", [1, 16, 600, 2400])
def test_cuda_graph(separate: str, T: int) -> None:
    case = layer(T, 8, 2, 256, 128, dtype=torch.bfloat16, separate=separate != "stacked", routing="sentinels")
    torch.ops.moe_compile.experts(*case.op_args())  # compiles
    if "capture" in separate:
        tables._tables.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.moe_compile.experts(*case.op_args())
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        case.ids.copy_(torch.randint(-1, 9, (T, 2), generator=g))
        case.x.copy_(torch.randn(T, 256, generator=g))
        tables._tables.clear()  # what a graph reads must not hang on the cache
        graph.replay()
        assert torch.equal(out, torch.ops.moe_compile.experts(*case.op_args()))
        if bool((case.ids >= 0).logical_and(case.ids < 8).any()):
            assert relative_error(out, case.truth()) < 1e-2


def test_tables_follow_the_weights() -> None:
    case = layer(4, 4, 2, 64, 32, dtype=torch.bfloat16, separate=True)
    check(case)
    for w in case.w1:
        w.mul_(0.5)  # in place: same addresses, new values
    check(case)
    case.w2 = [w.flip(0) for w in case.w2]  # new tensors
    check(case)
    with torch.cuda.stream(torch.cuda.Stream()):
        case.w2 = [w.clone() for w in case.w2]
        torch.cuda.synchronize()
        check(case)
    torch.cuda.synchronize()
    check(case)


class Bindings:
    """How often Triton bound the arguments of a launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, original = 0, JITFunction.run

        def run(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(JITFunction, "run", run)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("T", [1, 16, 600, 5000])
def test_like_calls_bind_once(T: int, separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(monkeypatch)
    first = layer(T, 8, 2, 256, 128, dtype=torch.bfloat16, separate=separate, routing="sentinels")
    check(first)
    torch.ops.moe_compile.experts(*first.op_args())
    bindings.count = 0
    for seed in (1, 2):
        again = layer(T, 8, 2, 256, 128, dtype=torch.bfloat16, separate=separate, seed=seed)
        out = torch.ops.moe_compile.experts(*again.op_args())
        assert bindings.count == 0
        calls.kind_of.cache_clear()
        assert torch.equal(out, torch.ops.moe_compile.experts(*again.op_args()))
        assert bindings.count > 0
        bindings.count = 0


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("T", [1, 16, 600, 5000])
def test_programs_in_graphs_and_on_streams(T: int, separate: bool) -> None:
    """A program that eager calls left launches into a capture and onto another stream, with other weights."""
    make = {"dtype": torch.bfloat16, "separate": separate, "routing": "sentinels"}
    case, other = (layer(T, 8, 2, 256, 128, seed=seed, **make) for seed in (0, 1))
    op = torch.ops.moe_compile.experts
    with long_way():
        expected = [op(*c.op_args()) for c in (case, other)]
    programs = [replayed(lambda c=c: op(*c.op_args())) for c in (case, other)]
    assert torch.equal(programs[0], expected[0]) and torch.equal(programs[1], expected[1])
    op(*case.op_args())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000)
        aside = op(*other.op_args())
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected[1])
    with torch.cuda.graph(graph):
        out = op(*case.op_args())
    graph.replay()
    assert torch.equal(out, expected[0])
    case.x.copy_(other.x), case.ids.copy_(other.ids), case.weights.copy_(other.weights)
    for ours, theirs in ((case.w1, other.w1), (case.w2, other.w2)):
        for w, v in zip(ours, theirs, strict=True):
            w.copy_(v)
    graph.replay()
    assert torch.equal(out, expected[1])


def test_like_routers_bind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings, counts = Bindings(monkeypatch), []
    calls.kind_of.cache_clear()
    wide = torch.randn(50, 24, device="cuda")
    for logits in (
        wide[:, :16].clone(),
        torch.randn(50, 16, device="cuda"),
        wide[:, :16],
        wide[:, 1:17],
        wide[:3, :16],
    ):
        for scale in (1.0, 2.5):
            bindings.count = 0
            weights, ids = torch.ops.moe_compile.route(logits, 4, "softmax", True, 0.0, scale, torch.float32)
            counts.append(bindings.count)
            top = logits.softmax(-1).topk(4)
            assert torch.equal(ids, top.indices)
            assert torch.allclose(weights, scale * top.values / top.values.sum(-1, keepdim=True))
    assert counts == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]


def shifted(t: torch.Tensor) -> torch.Tensor:
    """A copy that starts one element after a full vector."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return buffer[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("T", [1, 16, 600, 5000])
def test_unlike_calls_bind_anew(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was compiled for aligned rows must not get others: it would read another address, or fault."""
    bindings = Bindings(monkeypatch)
    for separate in (False, True):
        case = layer(T, 8, 2, 256, 128, dtype=torch.bfloat16, separate=separate)
        expected = torch.ops.moe_compile.experts(*case.op_args())
        changes: list[dict[str, Any]] = [
            {"x": shifted(case.x)},
            {"ids": shifted(case.ids)},
            {"ids": case.ids.int()},
            {"weights": shifted(case.weights)},
            {"w1": [shifted(w) for w in case.w1]},
            {"w2": [shifted(w) for w in case.w2]},
        ]
        if T > 1:
            changes.append({"x": torch.cat([case.x, case.x], 1)[:, :256]})
        for change in changes:
            other = copy.copy(case)
            for name, value in change.items():
                setattr(other, name, value)
            bindings.count = 0
            out = torch.ops.moe_compile.experts(*other.op_args())
            assert bindings.count > 0, change.keys()
            assert relative_error(out, case.truth()) < 1e-2
            assert torch.allclose(out.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_no_synchronisation() -> None:
    cases = [layer(T, 8, 2, 128, 64, dtype=torch.bfloat16, separate=True) for T in (1, 32, 500)]
    for case in cases:
        run(case)
    # the tables of this one are built under the watch
    fresh = layer(32, 8, 2, 128, 64, dtype=torch.bfloat16, separate=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case in (*cases, fresh):
            run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_errors_name_the_values() -> None:
    case = layer()
    args = list(case.op_args())
    args[2] = case.ids.cpu()
    with pytest.raises(ValueError, match="topk_ids is on cpu"):
        cuda.experts(*args)  # type: ignore[arg-type]
    args = list(case.op_args())
    args[0] = case.x.double()
    with pytest.raises(TypeError, match="float64"):
        cuda.experts(*args)  # type: ignore[arg-type]
