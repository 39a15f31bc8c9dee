"""The CPU ops against ``spec.MoE.reference(torch.float64)``.

The rule everywhere: the relative L2 error against float64 is at most twice the error of the plain
loop over experts in the same dtype, plus a floor. NaN never passes, zeros are never data. Results of a
few elements are judged together (root mean square): one half precision rounding of six is luck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.ops import cpu, cpu_gemm, cpu_order
from moe_compile.spec import ACTIVATIONS, Activation, Experts, MoE, Weight

OPS = torch.ops.moe_compile
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 1e-3, torch.float16: 1e-4}
DTYPES = tuple(FLOOR)
HALF = (torch.bfloat16, torch.float16)
GPT_OSS = Activation("silu", alpha=1.702, gate_limit=0.7, up_limit=0.6, up_offset=1.0)


@dataclass
class Sample:
    """One call of ``experts``: its arguments, and the same layer as a spec."""

    moe: MoE
    roles: dict[str, list[Tensor]]

    def arguments(self) -> tuple[Any, ...]:
        m, act = self.moe, self.moe.experts.activation
        assert act is not None
        weights = [self.roles[r] for r in ("w1", "w3", "w2", "b1", "b3", "b2")]
        return (m.hidden_states, m.topk_weights, m.topk_ids, *weights, act.name, act.args(), act.gated,
                m.experts.interleaved, m.weight_on_input, m.out_dtype)

    def run(self) -> Tensor:
        return OPS.experts(*self.arguments())


def route(t: int, k: int, e: int, generator: torch.Generator) -> Tensor:
    """K different experts for every token."""
    return torch.rand(t, e, generator=generator).argsort(1)[:, :k].clone(memory_format=torch.contiguous_format)


def make(
    t: int = 7,
    e: int = 5,
    k: int = 2,
    h: int = 12,
    i: int = 10,
    dtype: torch.dtype = torch.float32,
    act: Activation = Activation(),  # noqa: B008
    form: str = "fused",
    storage: str = "stacked",
    bias: bool = False,
    ids: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
    **moe: Any,
) -> Sample:
    """``form``: fused, interleaved or split (a w3 of its own); ``storage``: stacked, separate, transposed."""
    g = torch.Generator().manual_seed(seed)

    def matrix(out: int, inner: int) -> list[Tensor]:
        w = torch.randn(e, out, inner, generator=g).div(inner**0.5).to(dtype)
        if storage == "transposed":
            return [w.mT.contiguous().mT]
        if storage == "separate-transposed":
            return [x.t().contiguous().t() for x in w]
        return [x.clone() for x in w] if storage == "separate" else [w]

    def vector(out: int) -> list[Tensor]:
        b = torch.randn(e, out, generator=g).to(dtype)
        return ([x.clone() for x in b] if storage.startswith("separate") else [b]) if bias else []

    first = 2 * i if act.gated and form != "split" else i
    split = act.gated and form == "split"
    roles = {
        "w1": matrix(first, h), "w3": matrix(i, h) if split else [], "w2": matrix(h, i),
        "b1": vector(first), "b3": vector(i) if split else [], "b2": vector(h),
    }
    x = torch.randn(t, h, generator=g).to(dtype)
    weights = torch.rand(t, k, generator=g).add(0.1).to(weight_dtype or dtype)
    ids = route(t, k, e, g) if ids is None else ids
    spec = {
        name: Weight(tuple(p), not storage.startswith("separate")) if p else None for name, p in roles.items()
    }
    experts = Experts(e, h, i, activation=act, interleaved=form == "interleaved", **spec)  # type: ignore[arg-type]
    return Sample(MoE(x, ids, weights, k, experts, **moe), roles)


def error(value: Tensor, exact: Tensor) -> float:
    """Relative L2 error; an empty tensor has none."""
    scale = exact.double().norm().item()
    return (value.double() - exact.double()).norm().item() / scale if scale else value.double().norm().item()


def judge(*results: tuple[Tensor, MoE]) -> None:
    """Apply the rule of this file to results that share their dtypes."""
    ours, plain = [], []
    for value, moe in results:
        exact = moe.reference(torch.float64)
        assert value.shape == exact.shape
        assert value.dtype == (moe.out_dtype or moe.hidden_states.dtype)
        assert value.is_contiguous()
        ours.append(error(value, exact) ** 2)
        plain.append(error(moe.reference(), exact) ** 2)
    bound = 2 * math.sqrt(sum(plain) / len(plain)) + FLOOR[results[0][1].hidden_states.dtype]
    measured = math.sqrt(sum(ours) / len(ours))
    assert measured <= bound, (measured, bound)


def check(*samples: Sample) -> None:
    """Run and judge."""
    judge(*[(sample.run(), sample.moe) for sample in samples])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Waking threads would cost more than these small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["emulated", "native", "native-single"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of CPU, with and without instructions for half precision, and without batched products."""
    native = request.param.startswith("native")
    monkeypatch.setattr(cpu_gemm, "native_gemm", lambda dtype: native)
    if request.param.endswith("single"):
        never_batch(monkeypatch)
    return native


def never_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "CALL", dict.fromkeys(DTYPES, -1))


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batched products: these tests are about the other methods, with sizes too small for them."""
    never_batch(monkeypatch)


def set_blas(monkeypatch: pytest.MonkeyPatch, blas: cpu_gemm.Blas) -> None:
    """As on a CPU of another kind."""
    for module in (cpu, cpu_gemm, cpu_order):
        monkeypatch.setattr(module, "blas", lambda: blas)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[cpu.Method]]:
    """The methods that were chosen, in order."""
    seen: list[cpu.Method] = []
    choose = cpu.choose

    def spy(*args: Any) -> cpu.Method:
        seen.append(choose(*args))
        return seen[-1]

    monkeypatch.setattr(cpu, "choose", spy)
    yield seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0, 1, 2, 7, 33, 129])
def test_shapes(t: int, dtype: torch.dtype, native: bool) -> None:
    sizes = [(1, 1, 8, 8), (2, 1, 3, 5), (5, 5, 13, 7), (8, 3, 16, 1), (16, 4, 1, 9), (16, 16, 31, 17),
             (8, 2, 32, 64)]
    for e, k, h, i in sizes:
        seeds = range(min(5, 1 + 60 // (1 + t * h)))
        check(*[make(t, e, k, h, i, dtype, seed=seed) for seed in seeds])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["stacked", "separate", "transposed", "separate-transposed"])
@pytest.mark.parametrize("form", ["fused", "interleaved", "split", "plain"])
def test_layouts(form: str, storage: str, dtype: torch.dtype, native: bool) -> None:
    act = Activation(gated=form != "plain")
    width, inner = (32, 64) if native else (11, 6)
    for bias, on_input, t, e in itertools.product((False, True), (False, True), (1, 40), (1, 4)):
        common = (t, e, min(e, 2), width, inner, dtype, act, form, storage, bias)
        check(*[make(*common, seed=seed, weight_on_input=on_input) for seed in range(6 if t == 1 else 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, dtype: torch.dtype) -> None:
    limits = [{}, {"gate_limit": 0.3}, {"act_limit": 0.2}, {"gate_limit": 0.4, "act_limit": 0.1}]
    alphas = [1.0, 1.702] if name == "silu" else [1.0]
    for gated, alpha, limit in itertools.product((False, True), alphas, limits):
        ups = [{}, {"up_limit": 0.5}, {"up_offset": 1.0}, {"up_limit": 0.5, "up_offset": -0.5}]
        for up, form in itertools.product(ups, ("fused", "interleaved")) if gated else [({}, "fused")]:
            act = Activation(name, gated, alpha, **limit, **up)
            check(make(20, 3, 2, 8, 16, dtype, act, form))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt_oss(dtype: torch.dtype) -> None:
    sample = make(40, 4, 2, 24, 18, dtype, GPT_OSS, "interleaved", "transposed", bias=True)
    check(sample)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    sample = make(20, dtype=dtype, weight_dtype=torch.float32, out_dtype=out_dtype)
    check(sample)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("t", [3, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_out_of_range(dtype: torch.dtype, t: int, id_dtype: torch.dtype) -> None:
    e, k = 4, 3
    ids = torch.randint(0, e, (t, k), generator=torch.Generator().manual_seed(1)).to(id_dtype)
    for n, bad in enumerate((-1, e, e + 5, torch.iinfo(id_dtype).max, torch.iinfo(id_dtype).min)):
        ids[n % t, n % k] = bad
    ids[1] = torch.tensor([-1, e, -7])  # this token has no expert at all
    sample = make(t, e, k, dtype=dtype, ids=ids)
    sample.moe.hidden_states[1] = math.nan  # so nobody reads its row
    out = sample.run()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    sample.moe.hidden_states[1] = 1.0
    judge((out, sample.moe))


@pytest.mark.parametrize("t", [2, 70])
def test_all_ids_out_of_range(t: int) -> None:
    sample = make(t, ids=torch.full((t, 2), -1))
    sample.moe.hidden_states.fill_(math.nan)
    assert torch.equal(sample.run(), torch.zeros(t, 12))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 5, 300])
def test_duplicates_and_one_expert(t: int, dtype: torch.dtype) -> None:
    one = make(t, 4, 2, dtype=dtype, ids=torch.full((t, 2), 3))
    some = make(t, 4, 3, dtype=dtype, ids=torch.tensor([[2, 0, 2]]).repeat(t, 1))
    for sample in (one, some):
        check(sample)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_token(dtype: torch.dtype, native: bool) -> None:
    for t, (h, i) in itertools.product((2, 40, 600), ((9, 7), (33, 42), (64, 32))):
        sample = make(t, 3, 2, h, i, dtype)
        clean = sample.run()
        sample.moe.hidden_states[1, 4] = math.nan
        out = sample.run()
        assert out[1].isnan().all()
        others = [n for n in range(t) if n != 1]
        assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("storage", ["stacked", "separate"])
def test_experts_that_nobody_chose_are_not_read(storage: str) -> None:
    for t in (1, 60):
        sample = make(t, 6, 2, ids=torch.tensor([[4, 1]]).repeat(t, 1), storage=storage, bias=True)
        expected = sample.run()
        for parts in sample.roles.values():
            for e in (0, 2, 3, 5) if parts else ():
                (parts[0][e] if storage == "stacked" else parts[e]).fill_(math.nan)
        assert torch.equal(sample.run(), expected)


def test_strided_arguments() -> None:
    base = make(40, 4, 2, 12, 10)
    m, act = base.moe, base.moe.experts.activation
    assert act is not None
    wide = torch.randn(80, 24)
    wide[::2, ::2] = m.hidden_states
    weights, ids = m.topk_weights.t().contiguous().t(), m.topk_ids.t().contiguous().t()
    padded = torch.randn(4, 25, 30)
    padded[:, :20, 3:15] = base.roles["w1"][0]
    spread = torch.randn(4, 12, 20)
    spread[:, :, ::2] = base.roles["w2"][0]
    tail = ([], [], [], act.name, act.args(), True)
    out = OPS.experts(wide[::2, ::2], weights, ids, [padded[:, :20, 3:15]], [], [spread[:, :, ::2]], *tail)
    judge((out, m))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_unchanged_and_result_fresh(dtype: torch.dtype, native: bool) -> None:
    for act, t in itertools.product((GPT_OSS, Activation("identity"), Activation("relu2", False)), (1, 50)):
        sample = make(t, act=act, dtype=dtype, bias=True, weight_on_input=True)
        m = sample.moe
        inputs = [m.hidden_states, m.topk_weights, m.topk_ids, *itertools.chain(*sample.roles.values())]
        before = [(x.clone(), x._version) for x in inputs]
        first, second = sample.run(), sample.run()
        assert torch.equal(first, second)  # bit for bit
        assert first.data_ptr() != second.data_ptr()
        for x, (copy, version) in zip(inputs, before, strict=True):
            assert torch.equal(x, copy) and x._version == version


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_tiles_and_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "TILE", 40)
    monkeypatch.setattr(cpu_order, "BLOCK_BYTES", 400)
    monkeypatch.setattr(cpu_order, "SPLIT_ROWS", 3)
    monkeypatch.setattr(cpu_gemm, "NATIVE_ROWS", 0)
    monkeypatch.setattr(cpu_gemm, "native_gemm", lambda dtype: False)
    for t, form, storage in itertools.product((1, 9, 77), ("fused", "split"), ("stacked", "transposed")):
        sample = make(t, 5, 2, 13, 11, dtype, form=form, storage=storage, bias=True)
        check(sample)


def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_order, "SPLIT_ROWS", 4)
    monkeypatch.setattr(cpu_order, "BLOCK_BYTES", 30)
    segments = [(0, 0, 1), (2, 1, 3), (3, 3, 14), (7, 14, 15)]
    rows: list[tuple[int, int]] = []
    for start, end, runs in cpu_order.blocks(segments, 10):
        assert runs[0][1] == 0 and runs[-1][2] == end - start
        assert len(runs) == 1 or end - start <= 3
        rows += [(e, start + r) for e, a, b in runs for r in range(a, b)]
    assert rows == [(e, r) for e, a, b in segments for r in range(a, b)]


AVX512, OTHER = cpu_gemm.BLAS["AVX512"]._replace(least=5000), cpu_gemm.Blas()
ROWS, COLUMNS, REPACKED, GROUPED = {}, {"columns": True}, {"columns": True, "repack": True}, {"grouped": True}


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "storage", "upcast", "other", "avx512"),
    [
        (1, "stacked", False, ROWS, ROWS),  # a row for every expert: PyTorch's own half precision loop
        (1, "transposed", True, ROWS, ROWS),
        (24, "stacked", True, REPACKED, REPACKED),  # 12 rows
        (30, "stacked", True, REPACKED, GROUPED),  # 15 rows
        (40, "stacked", True, COLUMNS, GROUPED),
        (256, "stacked", True, COLUMNS, GROUPED),  # 128 rows
        (258, "stacked", True, GROUPED, GROUPED),
        (258, "separate", True, ROWS, ROWS),
        (40, "transposed", True, ROWS, ROWS),
    ],
)
@pytest.mark.parametrize("blas", [OTHER, AVX512], ids=["other", "avx512"])
def test_method(
    t: int, storage: str, upcast: bool, other: dict[str, bool], avx512: dict[str, bool], blas: cpu_gemm.Blas,
    dtype: torch.dtype, methods: list[cpu.Method], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_gemm, "native_gemm", lambda dtype: False)
    set_blas(monkeypatch, blas)
    ids = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]).repeat((t + 1) // 2, 1)[:t, : 4 if t == 1 else 2]
    check(make(t, 4, ids.shape[1], 16, 24, dtype, storage=storage, ids=ids))
    expected = cpu.Method(torch.float32 if upcast and dtype in HALF else dtype, **(avx512 if blas == AVX512 else other))
    if dtype != torch.float32:  # grouped_mm takes no float64, and no weights that are upcast a tile at a time
        expected = expected._replace(grouped=False)
    assert methods == [expected]


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize(("least", "columns"), [(4 * 4 * 16 * 72, True), (4 * 4 * 16 * 72 + 1, False)])
def test_small_weights_stay_in_the_cache(
    least: int, columns: bool, methods: list[cpu.Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_blas(monkeypatch, AVX512._replace(least=least))
    ids = torch.tensor([[0, 1], [2, 3]]).repeat(12, 1)
    for storage in ("stacked", "separate"):
        check(make(24, 4, 2, 16, 24, storage=storage, ids=ids))
    assert [method.columns for method in methods] == [columns] * 2


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("h", "i"), [(32, 64), (32, 62), (30, 64)])
def test_what_grouped_mm_does_not_take(
    h: int, i: int, biased: bool, methods: list[cpu.Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_blas(monkeypatch, AVX512)
    check(make(60, 4, 2, h, i, bias=biased))
    assert [method.grouped for method in methods] == [(h, i) == (32, 64) and not biased]


@pytest.mark.parametrize("dtype", HALF)
def test_method_on_a_cpu_with_half_precision(
    dtype: torch.dtype, methods: list[cpu.Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_gemm, "native_gemm", lambda dtype: True)
    for t in (1, 64, 600):  # with 600 tokens an expert has too many rows for a batched product
        check(make(t, 2, 1, 32, 64, dtype=dtype))
    assert methods == [cpu.Method(dtype), cpu.Method(dtype, batched=True), cpu.Method(dtype, grouped=True)]
    methods.clear()
    for h, i in ((33, 64), (32, 42)):  # oneDNN would read on into the next row
        check(make(64, 2, 1, h, i, dtype=dtype))
    assert [method.dtype for method in methods] == [torch.float32] * 2


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("form", ["fused", "split"])
def test_experts_without_rows_in_one_call(
    form: str, methods: list[cpu.Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts of a block need not follow each other, and one may lie in two blocks."""
    monkeypatch.setattr(cpu_order, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(cpu_order, "SPLIT_ROWS", 7)
    set_blas(monkeypatch, AVX512)
    ids = torch.tensor([[1, 6], [6, 1], [4, 1], [1, 9]]).repeat(20, 1)
    check(make(80, 9, 2, 32, 64, form=form, ids=ids))
    assert [method.grouped for method in methods] == [True]


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("counts", [(11, 12, 32, 10), (5, 15, 0, 14), (15, 31, 13, 13)])
def test_columns_are_filled(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts with 11 to 15 rows in their last vector get what it lacks; nobody else's number changes."""
    set_blas(monkeypatch, cpu_gemm.Blas(columns=128, vector=16))
    multiplied: list[int] = []
    mm = torch.mm

    def spy(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        multiplied.append(len(x))
        return mm(x, w, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    ids = torch.repeat_interleave(torch.tensor([0, 1, 2, 3]), torch.tensor(counts))
    shuffled = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids, torch.tensor([-1, 4, -1])])[shuffled].view(-1, 1)
    sample = make(len(ids), 4, 1, 16, 24, ids=ids)
    sample.moe.hidden_states[ids[:, 0] == 1] = float("nan")
    out = sample.run()
    rows = [n if (-n) % 16 > 5 else n + (-n) % 16 for n in counts if n]
    assert multiplied == rows * 2
    exact = sample.moe.reference(torch.float64)
    other = ids[:, 0] != 1
    assert bool(out[~other].isnan().all()) and error(out[other], exact[other]) < 1e-6


def batched(
    routing: cpu_gemm.Routing, dtype: torch.dtype = torch.float32, storage: str = "stacked", bias: bool = False,
    h: int = 64, i: int = 32,
) -> bool:
    """Whether experts of these sizes make one product."""
    roles = make(1, routing.experts, 1, h, i, dtype, storage=storage, bias=bias).roles
    weights, biases = ([roles[name + n] for n in "132"] for name in "wb")
    return cpu_gemm.choose(dtype, routing, weights, biases).batched


def test_when_products_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each condition on both sides of its border."""
    monkeypatch.setattr(cpu_gemm, "native_gemm", lambda dtype: dtype != torch.float16)
    even = cpu_gemm.Routing(pairs=80, experts=8, hit=8, most=10)
    assert batched(even) and batched(even, torch.float64) and batched(even, torch.bfloat16)
    assert not batched(even, torch.float16)  # no instructions for it
    assert not batched(even, torch.bfloat16, h=48)  # oneDNN would read on
    assert batched(even, storage="transposed") and batched(even, bias=True)
    assert not batched(even, storage="separate") and not batched(even, storage="separate", bias=True)
    assert not batched(cpu_gemm.Routing(8, 8, 8, 1))  # one row each
    assert batched(cpu_gemm.Routing(8 * 256, 8, 8, 256)) and not batched(cpu_gemm.Routing(8 * 257, 8, 8, 257))

    def added(rows: int, idle: int = 0) -> cpu_gemm.Routing:
        hit = 8 - idle
        return cpu_gemm.Routing(pairs=8 * 100 - rows, experts=8, hit=hit, most=100)

    most = 8 * 2 * cpu_gemm.CALL[torch.float32] // (3 * 64 * 32)  # rows that cost as much as the calls they save
    assert most > 600 and batched(added(600)) and not batched(added(600), h=96, i=128)
    monkeypatch.setitem(cpu_gemm.CALL, torch.float32, 600 * 3 * 64 * 32 // 16)
    assert batched(added(600)) and not batched(added(601))
    assert batched(added(600 * 7 // 8 - 32, idle=1)) and not batched(added(600 * 7 // 8 - 31, idle=1))


def test_sliced_weights_are_not_batched() -> None:
    """``torch.bmm`` would copy them."""
    even = cpu_gemm.Routing(pairs=80, experts=8, hit=8, most=10)
    w1, w2 = torch.randn(8, 48, 64), torch.randn(8, 64, 24)
    assert cpu_gemm.choose(torch.float32, even, ([w1], [], [w2])).batched
    assert not cpu_gemm.choose(torch.float32, even, ([w1[:, ::2]], [], [w2])).batched
    assert not cpu_gemm.choose(torch.float32, even, ([w1], [], [w2[..., :12]])).batched
    biases = [[torch.randn(48)] * 8, [], []]
    assert not cpu_gemm.choose(torch.float32, even, ([w1], [], [w2]), biases).batched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["stacked", "transposed"])
@pytest.mark.parametrize("form", ["fused", "interleaved", "split"])
def test_batched(
    form: str, storage: str, dtype: torch.dtype, methods: list[cpu.Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uneven experts, one without rows, ids out of range and NaN in the row that fills: nobody reads it."""
    monkeypatch.setattr(cpu_gemm, "native_gemm", lambda dtype: True)
    monkeypatch.setattr(cpu_order, "BLOCK_BYTES", 4000)  # several blocks
    ids = torch.tensor([[1, 6], [6, -1], [4, 1], [1, 9], [0, 2]]).repeat(9, 1)
    for bias, on_input in itertools.product((False, True), repeat=2):
        sample = make(45, 8, 2, 32, 64, dtype, form=form, storage=storage, bias=bias, ids=ids, weight_on_input=on_input)
        clean = sample.run()
        judge((clean, sample.moe))
        sample.moe.hidden_states[0] = math.nan
        out = sample.run()
        assert bool(out[0].isnan().all()) and torch.equal(out[1:], clean[1:])
    assert all(method.batched for method in methods) and len(methods) == 8


def test_embedding_bag_accumulates_half_precision_in_float32() -> None:
    """What ``_weighted_sum`` relies on: 64 terms, each less than half a step of the first in bfloat16."""
    rows = torch.full((65, 40), 2.0**-9).bfloat16()
    rows[0] = 1.0
    place = torch.arange(65)
    out = cpu._weighted_sum(rows, place, 65, True, None, 65, torch.bfloat16)
    assert torch.equal(out, torch.full((1, 40), 1.125).bfloat16())


def test_upcast_is_more_accurate_than_the_loop() -> None:
    for dtype in HALF:
        sample = make(64, 4, 2, 96, 64, dtype)
        exact = sample.moe.reference(torch.float64)
        assert error(sample.run(), exact) <= error(sample.moe.reference(), exact)


def test_too_many_pairs() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64).expand(2**30, 2)
    with pytest.raises(ValueError, match="2147483648 pairs"):
        OPS.sort_pairs(ids, 3)


def test_one_token_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sort = cpu_order.sort
    monkeypatch.setattr(cpu_order, "sort", lambda ids, e: calls.append(len(ids)) or sort(ids, e))
    for t in (1, 2, 64, 65):
        check(make(t))
    assert calls == [65]  # up to 128 pairs Python sorts


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_few_pairs_are_sorted_alike(id_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for t, e in itertools.product((0, 1, 2, 9, 40), (1, 3, 50)):
        ids = torch.randint(-2, e + 2, (t, 3), generator=torch.Generator().manual_seed(t)).to(id_dtype)
        few = cpu_order.grouped(ids, e)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_order, "FEW_PAIRS", -1)
            many = cpu_order.grouped(ids, e)
        assert isinstance(few, cpu_order.Few) and isinstance(many, cpu_order.Many)
        assert few.routing == many.routing
        both = [(few.sorted(), many.sorted())]
        if few.routing.pairs:
            both.append((few.evened(), many.evened()))
        for found, expected in both:
            assert torch.equal(found.order, expected.order) and torch.equal(found.position, expected.position)
            assert found.segments == expected.segments
            assert found.order.dtype == found.position.dtype == torch.int64


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("t", [0, 1, 50])
def test_sort_pairs(t: int, id_dtype: torch.dtype) -> None:
    e = 6
    ids = torch.randint(-2, e + 3, (t, 3), generator=torch.Generator().manual_seed(t)).to(id_dtype)
    order, offsets = OPS.sort_pairs(ids, e)
    flat = ids.flatten().tolist()
    key = [x if 0 <= x < e else e for x in flat]
    assert order.dtype == offsets.dtype == torch.int32
    assert order.tolist() == sorted(range(len(flat)), key=key.__getitem__)
    assert offsets.tolist() == [sum(x < n for x in key) for n in range(e + 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["stacked", "separate", "transposed"])
def test_grouped_linear(
    storage: str, dtype: torch.dtype, native: bool, methods: list[cpu.Method], request: pytest.FixtureRequest
) -> None:
    for t, bias in itertools.product((0, 1, 60), (False, True)):
        sample = make(t, 4, 3, 9, 7, dtype, storage=storage, bias=bias)
        m, weight, b = sample.moe, sample.roles["w2"], sample.roles["b2"]
        m.topk_ids[:, 1] = torch.arange(t) % 6 - 1  # some are out of range
        order, offsets = OPS.sort_pairs(m.topk_ids, 4)
        rows = torch.randn(3 * t, 7).to(dtype)
        end = int(offsets[-1])
        rows[end:] = math.nan  # not read
        out = OPS.grouped_linear(rows, weight, b, offsets)
        assert out.dtype == dtype and out.is_contiguous() and out[end:].eq(0).all()
        expert = m.topk_ids.flatten()[order.long()[:end]]
        w = (weight[0] if len(weight) == 1 else torch.stack(weight))[expert]  # [n, 9, 7]

        def loop(d: torch.dtype, rows: Tensor = rows[:end], w: Tensor = w, b: list[Tensor] = b,
                 expert: Tensor = expert) -> Tensor:
            y = torch.stack([r @ x.t() for r, x in zip(rows.to(d), w.to(d), strict=True)])
            return y if not b else y + (b[0] if len(b) == 1 else torch.stack(b))[expert].to(d)

        if end:
            exact = loop(torch.float64)
            assert error(out[:end], exact) <= 2 * error(loop(dtype), exact) + FLOOR[dtype]
    one = dtype not in HALF and storage != "separate" and "single" not in request.node.name
    assert any(method.batched for method in methods) == one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_combine(weighted: bool, dtype: torch.dtype) -> None:
    for t, out_dtype in itertools.product((0, 1, 60), (None, torch.float32, torch.bfloat16)):
        ids = torch.randint(-1, 5, (t, 3), generator=torch.Generator().manual_seed(t))
        order, offsets = OPS.sort_pairs(ids, 4)
        rows = torch.randn(3 * t, 9).to(dtype)
        rows[int(offsets[-1]) :] = math.nan  # not read
        weights = torch.rand(t, 3) if weighted else None
        out = OPS.combine(rows, order, offsets, weights, 3, out_dtype)
        assert out.shape == (t, 9) and out.dtype == (out_dtype or dtype)
        pairs = torch.empty(3 * t, 9, dtype=torch.float64)
        pairs[order.long()] = rows.double()
        pairs[(ids.flatten() < 0) | (ids.flatten() > 3)] = 0
        exact = pairs.view(t, 3, 9) * (1 if weights is None else weights.double()[..., None])
        limit = max(FLOOR[dtype] * 4, FLOOR[out.dtype] * 4)
        assert error(out, exact.sum(1)) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 60])
def test_composition_equals_experts(t: int, dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 6, (t, 3), generator=torch.Generator().manual_seed(5))
    sample = make(t, 5, 3, 12, 10, dtype, bias=True, ids=ids)
    m, r = sample.moe, sample.roles
    order, offsets = OPS.sort_pairs(m.topk_ids, 5)
    rows = m.hidden_states[order.long() // 3]
    gate, up = OPS.grouped_linear(rows, r["w1"], r["b1"], offsets).chunk(2, dim=-1)
    rows = OPS.grouped_linear(Activation()(gate, up), r["w2"], r["b2"], offsets)
    out = OPS.combine(rows, order, offsets, m.topk_weights, 3)
    judge((out, m))
    check(sample)


OPCHECK = [
    make(7),
    make(1, dtype=torch.bfloat16, storage="separate", form="split", bias=True),
    make(40, act=GPT_OSS, form="interleaved", storage="transposed", bias=True, out_dtype=torch.float64),
]


@pytest.mark.parametrize("sample", OPCHECK, ids=["stacked", "separate", "transposed"])
def test_opcheck(sample: Sample) -> None:
    m, r = sample.moe, sample.roles
    order, offsets = OPS.sort_pairs(m.topk_ids, 5)
    rows = m.hidden_states[order.long() // 2]
    checks = [
        (OPS.experts, sample.arguments()),
        (OPS.sort_pairs, (m.topk_ids, 5)),
        (OPS.grouped_linear, (rows, r["w1"], r["b1"], offsets)),
        (OPS.combine, (rows, order, offsets, m.topk_weights, 2, m.out_dtype)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op.default, arguments)


def test_compiled_with_dynamic_tokens() -> None:
    samples = [make(t) for t in (2, 7, 64, 129)]
    first = samples[0]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    def layer(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return OPS.experts(x, weights, ids, *first.arguments()[3:]) + 1

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for sample in samples:
        m = sample.moe
        inputs = [x.clone() for x in (m.hidden_states, m.topk_weights, m.topk_ids)]
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(*inputs), layer(*inputs))
    assert len(graphs) == 1


def test_compiled_with_unbacked_tokens() -> None:
    samples = [make(t) for t in (1, 2, 65)]
    tail = samples[0].arguments()[3:]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    def layer(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return OPS.experts(x, weights, ids, *tail)

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for sample in samples:
        m = sample.moe
        inputs = [x.clone() for x in (m.hidden_states, m.topk_weights, m.topk_ids)]
        for x in inputs:
            torch._dynamo.decorators.mark_unbacked(x, 0)
        torch.testing.assert_close(compiled(*inputs), layer(*inputs))
    assert len(graphs) == 1


def test_parameters_that_require_grad_are_accepted() -> None:
    sample = make()
    expected = sample.run()
    for parts in sample.roles.values():
        for p in parts:
            p.requires_grad_()
    assert torch.equal(sample.run().detach(), expected)


E, H, I = 5, 12, 10
BAD: list[tuple[dict[int, Any], type[Exception], str]] = [
    ({0: torch.randn(7, H).half()}, TypeError, r"w1 is torch.float32 .* torch.float16"),
    ({5: [torch.randn(E, H, I).bfloat16()]}, TypeError, r"w2 is torch.bfloat16 .* torch.float32"),
    ({6: [torch.randn(E, 2 * I).double()]}, TypeError, r"b1 is torch.float64 .* torch.float32"),
    ({0: torch.ones(7, H, dtype=torch.int32)}, TypeError, r"hidden_states is torch.int32; pass"),
    ({1: torch.ones(7, 2, dtype=torch.int64)}, TypeError, r"topk_weights is torch.int64; pass"),
    ({2: torch.ones(7, 2)}, TypeError, r"topk_ids is torch.float32; pass int32 or int64"),
    ({0: torch.randn(1, 7, H)}, ValueError, r"hidden_states is \[1, 7, 12\], expected \[T, H\]; flatten"),
    ({2: torch.ones(7, dtype=torch.int64)}, ValueError, r"topk_ids is \[7\], expected \[T, K\]"),
    ({2: torch.ones(7, 0, dtype=torch.int64)}, ValueError, r"topk_ids is \[7, 0\]; .* K >= 1"),
    ({0: torch.randn(6, H)}, ValueError, r"topk_ids \[7, 2\] and hidden_states \[6, 12\] disagree"),
    ({1: torch.rand(7, 3)}, ValueError, r"topk_weights \[7, 3\] and topk_ids \[7, 2\] differ"),
    ({0: torch.randn(7, H + 1)}, ValueError, r"w1 is \[5, 20, 12\], expected \[5, 20, 13\]; weights are"),
    ({3: []}, ValueError, r"w1 has 0 tensors and w2 1; both projections are required"),
    ({3: [torch.randn(E, I, H)]}, ValueError, r"w1 is \[5, 10, 12\], expected \[5, 20, 12\]"),
    ({4: [torch.randn(E, I + 1, H)], 3: [torch.randn(E, I, H)]}, ValueError, r"w3 is \[5, 11, 12\]"),
    ({5: [torch.randn(E + 1, H, I)]}, ValueError, r"w2 is \[6, 12, 10\], expected \[5, 12, 10\]"),
    ({5: [torch.randn(H, I)] * 4}, ValueError, r"w2 has 4 tensors for 5 experts; pass one stacked"),
    ({5: [torch.randn(H, I)] * 4 + [torch.randn(H, 11)]}, ValueError, r"w2 is \[12, 11\], expected"),
    ({6: [torch.randn(E, I)]}, ValueError, r"b1 is \[5, 10\], expected \[5, 20\]; biases are"),
    ({7: [torch.randn(E, I)]}, ValueError, r"b3 is the bias of w3, which is absent"),
    ({11: False, 3: [torch.randn(E, I, H)], 4: [torch.randn(E, I, H)]}, ValueError, "belong to gated"),
    ({12: True, 3: [torch.randn(E, I, H)], 4: [torch.randn(E, I, H)]}, ValueError, "need one fused w1"),
    ({9: "swish"}, ValueError, "activation 'swish' is not one of"),
    ({10: [1.0, math.nan, 1.0, 1.0, 1.0]}, ValueError, "gate_limit is NaN"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[m for _, _, m in BAD])
def test_typed_errors(change: dict[int, Any], kind: type[Exception], message: str) -> None:
    arguments = [*make().arguments()]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(kind, match=message):
        OPS.experts(*arguments)


def test_typed_errors_of_the_parts() -> None:
    ids = torch.tensor([[0, 1], [1, 2]])
    order, offsets = OPS.sort_pairs(ids, 3)
    rows, w = torch.randn(4, 6), torch.randn(3, 8, 6)
    with pytest.raises(TypeError, match=r"topk_ids is torch\.float32"):
        OPS.sort_pairs(ids.float(), 3)
    with pytest.raises(TypeError, match=r"weight is torch.float64 .* torch.float32"):
        OPS.grouped_linear(rows, [w.double()], [], offsets)
    with pytest.raises(ValueError, match=r"weight is \[3, 8, 6\], expected \[3, 8, 5\]"):
        OPS.grouped_linear(rows[:, :5], [w], [], offsets)
    with pytest.raises(ValueError, match=r"offsets is torch.int32 \[3\], expected integers \[4\]"):
        OPS.grouped_linear(rows, [w], [], offsets[:3])
    with pytest.raises(ValueError, match="weight is an empty list"):
        OPS.grouped_linear(rows, [], [], offsets)
    with pytest.raises(ValueError, match=r"4 rows are not T \* top_k, top_k=3"):
        OPS.combine(rows, order, offsets, None, 3)
    with pytest.raises(ValueError, match=r"order is torch.int32 \[3\]"):
        OPS.combine(rows, order[:3], offsets, None, 2)
    with pytest.raises(ValueError, match=r"topk_weights \[1, 2\] does not fit 4 rows"):
        OPS.combine(rows, order, offsets, torch.rand(1, 2), 2)


def test_no_global_state_is_changed() -> None:
    before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.mkldnn.enabled)
    make(64, dtype=torch.bfloat16).run()
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.mkldnn.enabled) == before


def test_autocast_does_not_reach_inside() -> None:
    sample = make(40)
    expected = sample.run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = cpu._experts(*sample.arguments())
    assert torch.equal(inside, expected)
