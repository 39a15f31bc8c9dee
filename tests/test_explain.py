"""explain: a row for every candidate, also for those that no backend is shown; the model is unchanged."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile import torch_breaks
from moe_compile.demo import DenseLoop, GatherLoop, NaiveMoE
from moe_compile.explaining import explain
from moe_compile.report import NOT_CAPTURED

SIZES = (4, 2, 16, 24)


class AnyBranch(NaiveMoE):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            chosen = ids == e
            if chosen.any():  # line: any
                self.hit = e
                token, slot = torch.where(chosen)
                out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class HitLoop(NaiveMoE):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for row in hit:  # line: hit
            print(end="")
            slot, token = torch.where(mask[row[0]])
            expert = self.experts[int(row[0])]
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class SplitList(NaiveMoE):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        flat = ids.flatten()
        order = flat.argsort()
        sizes = flat.bincount(minlength=self.num_experts).tolist()  # line: tolist
        print(end="")
        rows = [e(part) for e, part in zip(self.experts, x[order // self.top_k].split(sizes), strict=True)]
        y = torch.cat(rows)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(-1, self.top_k, x.shape[1]) * weights.unsqueeze(-1)).sum(dim=1)


class Threshold(NaiveMoE):
    """Experts with a single token are left out: no test for emptiness, so nothing can be assumed."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            chosen = ids == e
            if chosen.sum() > 1:  # line: threshold
                token, slot = torch.where(chosen)
                out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class Disabled(DenseLoop):
    @torch.compiler.disable
    def experts_of(self, x: Tensor) -> Tensor:
        return DenseLoop.forward(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts_of(x) * 2  # line: disabled


def line_of(mark: str) -> str:
    """``file:line`` of the line in this file that ends in ``# line: mark``."""
    with open(__file__, encoding="utf-8") as source:
        numbers = [n for n, text in enumerate(source, 1) if text.rstrip().endswith(f"# line: {mark}")]
    return f"{__file__}:{numbers[0]}"


def made(kind: type[NaiveMoE]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind(*SIZES).eval(), torch.randn(6, SIZES[2])


@pytest.mark.parametrize(
    ("kind", "code", "mark", "fix"),
    [
        (AnyBranch, "MC101", "any", "remove the test"),
        (Threshold, "MC101", "threshold", "torch.where"),
        (HitLoop, "MC102", "hit", r"loop over range(num_experts)"),
        (SplitList, "MC101", "tolist", "replace the Python numbers"),
        (Disabled, "MC104", "disabled", "remove the decorator"),
    ],
)
def test_a_graph_break_names_code_line_and_edit(kind: type[NaiveMoE], code: str, mark: str, fix: str) -> None:
    model, x = made(kind)
    report = explain(model, x)
    rows = [site for site in report.not_captured if site.code == code]
    assert rows, str(report)
    assert rows[0].location == line_of(mark)
    assert line_of(mark) in rows[0].reason
    assert fix in rows[0].advice()
    assert not report.rewritten


@pytest.mark.parametrize("kind", [GatherLoop, DenseLoop])
def test_rewritable_layers(kind: type[NaiveMoE]) -> None:
    model, x = made(kind)
    report = explain(model, x)
    assert len(report.rewritten) == len(report.sites) == 1, str(report)
    site = report.rewritten[0]
    assert "demo.py:" in site.location
    assert "4 experts, top-2, silu-gated, H=16 I=24" in str(report)


def test_every_layer_is_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(DenseLoop(*SIZES), GatherLoop(*SIZES), DenseLoop(*SIZES)).eval()
    report = explain(model, torch.randn(6, SIZES[2]))
    assert len(report.rewritten) == 3, str(report)
    assert "rewritten x2" in str(report)


def test_a_lookalike_is_refused_with_the_failing_fact() -> None:
    class SkipsOne(DenseLoop):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.route(x)
            out = torch.zeros_like(x)
            for e in range(self.num_experts - 1):
                out = (
                    out
                    + self.experts[e](x)
                    * (weights * (ids == e)).sum(dim=-1, keepdim=True)
                    * 2
                    * weights[:, :1]
                )
            return out.amax(dim=-1, keepdim=True) + x

    model, x = made(SkipsOne)
    report = explain(model, x)
    assert not report.rewritten
    assert report.refused and all(site.code and site.reason for site in report.refused), str(report)


def test_nothing_captured_is_a_row() -> None:
    hidden = torch.compiler.disable(lambda x: x + 1)

    def program(x: Tensor) -> Tensor:
        return hidden(x)

    report = explain(program, torch.ones(2))
    assert [(site.status, site.code) for site in report.sites] == [(NOT_CAPTURED, "MC106")], str(report)


def test_a_model_without_moe() -> None:
    report = explain(nn.Linear(4, 4), torch.ones(2, 4))
    assert report.sites == [] and str(report) == "moe_compile: no MoE candidate found"


def test_model_is_unchanged() -> None:
    class Counting(GatherLoop):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    torch.manual_seed(0)
    model = Counting(*SIZES).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    explain(model, torch.randn(6, SIZES[2]))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled() and random.shape == torch.get_rng_state().shape


def test_the_users_own_exception_passes_through() -> None:
    class OwnError(Exception):
        pass

    def program(x: Tensor) -> Tensor:
        raise OwnError(f"bad {x.shape}")

    with pytest.raises(OwnError, match="bad"):
        explain(program, torch.ones(2))


def test_a_compiled_module_is_read_through() -> None:
    model, x = made(DenseLoop)
    assert len(explain(torch.compile(model, backend="eager"), x).rewritten) == 1


def test_users_log_handlers_see_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, x = made(AnyBranch)
    with caplog.at_level(logging.INFO):
        explain(model, x)
    assert not [r for r in caplog.records if "graph_breaks" in r.name]


BREAK = """Graph break in user code at /home/me/model.py:17
Graph Break Reason: Encountered graph break when attempting to trace CALL: a function call, e.g. f(x, y):

Data-dependent branching
  Explanation: Detected data-dependent branching.

User code traceback:
  File "/home/me/train.py", line 3, in <module>
    model(x)
  File "/home/me/model.py", line 17, in forward
    if chosen.any():
"""
INSIDE = "/site/torch/nn/modules/module.py:5"  # torch's own frame: the user's innermost one is meant
DUPLICATE = """Graph break (user stack suppressed due to duplicate graph break) in user code at a.py:2
Graph Break Reason: Dynamic shape operator
"""


@pytest.mark.parametrize(
    ("message", "place", "reason"),
    [
        (BREAK, ("/home/me/model.py", 17), "Data-dependent branching"),
        (
            BREAK.replace("/home/me/model.py:17", INSIDE),
            ("/home/me/model.py", 17),
            "Data-dependent branching",
        ),
        (DUPLICATE, ("a.py", 2), "Dynamic shape operator"),
    ],
)
def test_breaks_are_parsed(message: str, place: tuple[str, int], reason: str) -> None:
    found = torch_breaks.parse(message)
    assert found is not None and (found.file, found.line) == place and found.reason == reason


def test_other_messages_are_no_breaks() -> None:
    assert torch_breaks.parse("something else") is None


def test_log_settings_are_put_back() -> None:
    logger = logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks")
    before: tuple[Any, ...] = (logger.level, logger.propagate, list(logger.handlers))
    with torch_breaks.collect_breaks():
        pass
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
