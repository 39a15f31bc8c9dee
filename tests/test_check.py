"""check: right rewrites pass, wrong ones never do, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

from moe_compile import checking, comparing
from moe_compile.checking import CheckError, check
from moe_compile.comparing import Run
from moe_compile.demo import DenseLoop, GatherLoop
from moe_compile.report import REWRITTEN, Site, record

SIZES = (4, 2, 16, 24)


def made(dtype: torch.dtype = torch.float32, tokens: int = 32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return DenseLoop(*SIZES).to(dtype).eval(), torch.randn(tokens, SIZES[2]).to(dtype)


def corrupt(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A backend that runs the graph as it is and changes its first output."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        record(Site(REWRITTEN, "stub"))

        def run(*args: Any) -> Any:
            first, *rest = gm.forward(*args)
            return (change(first.clone()), *rest)

        return run

    return backend


def one_nan(t: Tensor) -> Tensor:
    t.view(-1)[3] = float("nan")
    return t


def one_expert_wrong(t: Tensor) -> Tensor:
    t[::4] *= 0.5
    return t


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda t: t * 1.02,
    "nan": one_nan,
    "some rows": one_expert_wrong,
    "shape": lambda t: t[:-1],
    "dtype": lambda t: t.double(),
    "zero": torch.zeros_like,
    "infinite": lambda t: t.masked_fill(t == t.max(), float("inf")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rewrites_fail(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(checking, "backend", corrupt(WRONG[name]))
    result = check(*made(dtype))
    assert not result and not result.ok
    assert result.problems and "FAILED" in str(result)
    with pytest.raises(AssertionError, match="FAILED"):
        result.raise_if_bad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_copy_passes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(checking, "backend", corrupt(lambda t: t))
    result = check(*made(dtype))
    assert result.ok and result.max_abs == 0.0 and result.reference == "float64"
    assert result.error_ours == result.error_original <= result.limit


@pytest.mark.parametrize("kind", [DenseLoop, GatherLoop])
def test_the_real_rewrite_passes_and_is_counted(kind: type[DenseLoop]) -> None:
    torch.manual_seed(0)
    model, x = kind(*SIZES).eval(), torch.randn(32, SIZES[2])
    result = check(model, x).raise_if_bad()
    assert result.rewritten == 1 and result.error_ours <= result.limit < 1e-5


def test_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(DenseLoop(*SIZES), nn.BatchNorm1d(SIZES[2])).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    x = torch.randn(8, SIZES[2])
    kept = x.clone()
    check(model, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == identities
    assert model.training and torch.equal(x, kept)


def test_nothing_rewritten_is_told() -> None:
    result = check(nn.Linear(4, 4), torch.ones(2, 4))
    assert result.ok and result.rewritten == 0
    assert any("nothing was rewritten" in p for p in result.problems)


class Out(NamedTuple):
    hidden: Tensor
    extra: dict[str, Any]


def test_nested_outputs_and_integer_outputs() -> None:
    class Nested(DenseLoop):
        def forward(self, x: Tensor) -> Any:
            _, ids = self.route(x)
            return Out(super().forward(x), {"ids": ids, "list": [x * 2, None, 3]})

    torch.manual_seed(0)
    result = check(Nested(*SIZES).eval(), torch.randn(8, SIZES[2]))
    assert result.ok, str(result)


def test_nan_passes_only_where_the_original_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made()
    x[2, 5] = float("nan")
    monkeypatch.setattr(checking, "backend", corrupt(lambda t: t))
    assert check(model, x).ok
    monkeypatch.setattr(checking, "backend", corrupt(torch.nan_to_num))
    assert not check(model, x).ok


def test_a_function_and_a_compiled_module() -> None:
    model, x = made()
    assert check(lambda t: model(t) + 1, x).ok
    assert check(torch.compile(model, backend="eager"), x).ok


def test_hard_wired_dtypes_fall_back_to_less_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    eye = torch.eye(SIZES[2])

    class HardWired(DenseLoop):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ eye

    monkeypatch.setattr(checking, "backend", corrupt(lambda t: t))
    torch.manual_seed(0)
    result = check(HardWired(*SIZES).eval(), torch.randn(8, SIZES[2]))
    assert result.ok and result.reference == "original"
    assert any("does not run in float64" in p for p in result.problems)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_code_that_asks_for_float32_has_a_float64_reference(tokens: int) -> None:
    """Else the original is its own reference, with no error at all, and any other order of sums fails."""

    class Float32Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.float())

    class InFloat32(DenseLoop):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(dtype=torch.float32))

    torch.manual_seed(0)
    model = InFloat32(*SIZES).eval()
    for part in model.modules():
        if type(part) is nn.Linear:
            part.__class__ = Float32Linear
    result = check(model, torch.randn(tokens, SIZES[2])).raise_if_bad()
    assert result.rewritten == 1 and result.reference == "float64"
    assert 2e-8 < result.error_original < 1e-6


def test_no_tensor_output() -> None:
    with pytest.raises(CheckError, match="returned no tensor"):
        check(lambda x: 3, torch.ones(2))


def test_the_users_own_exception_passes_through() -> None:
    with pytest.raises(KeyError, match="mine"):
        check(lambda x: {}["mine"], torch.ones(2))


def test_few_flipped_rows_are_judged_by_the_originals_own_flips() -> None:
    """The original's own reruns move one row: moving one row passes, moving a third does not."""
    torch.manual_seed(0)
    exact = torch.randn(64, 16, dtype=torch.float64)
    noise = 1e-3 * torch.randn(64, 16, dtype=torch.float64)

    def moved(rows: int, seed: int) -> Run:
        generator = torch.Generator().manual_seed(seed)
        t = exact + noise
        t[:rows] += torch.randn(rows, 16, generator=generator, dtype=torch.float64)
        return Run([t.float()])

    original, others = moved(0, 0), [moved(1, 1), moved(0, 2)]
    reference = Run([exact])
    plain = comparing.compare(moved(1, 3), original, reference, 1e-6, 2.0)
    assert not plain.ok
    assert comparing.compare(moved(1, 3), original, reference, 1e-6, 2.0, others).ok
    assert not comparing.compare(moved(20, 3), original, reference, 1e-6, 2.0, others).ok
    scaled = Run([(exact * 1.02).float()])
    assert not comparing.compare(scaled, original, reference, 1e-6, 2.0, others).ok
