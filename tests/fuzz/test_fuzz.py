"""The tester tested: the grammar reaches every value, the judge sees planted bugs, the shrinker keeps them."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import accepted, is_accepted

from moe_compile import lower, planning
from moe_compile.fuzz import __main__ as command
from moe_compile.fuzz import judge as judging
from moe_compile.fuzz.axes import AXES, Case, changed, draw, from_dict, must_match, valid
from moe_compile.fuzz.forms import FORMS
from moe_compile.fuzz.judge import judge
from moe_compile.fuzz.mutations import MUTATIONS, applicable
from moe_compile.fuzz.program import program, recorded
from moe_compile.fuzz.runner import QUIET, case_of, mutated_case, run, summary
from moe_compile.fuzz.shrink import shrink
from moe_compile.fuzz.source import source_of
from moe_compile.fuzz.tracing import traced
from moe_compile.spec import NoMatch

CORPUS = json.loads(Path(__file__).with_name("corpus.json").read_text())


@pytest.mark.parametrize("entry", CORPUS, ids=lambda e: e["note"])
def test_past_failures_stay_fixed(entry):
    accepted(from_dict(entry["case"]))


@pytest.mark.parametrize("seed", range(40))
def test_near_misses_are_refused_or_equal(seed):
    is_accepted(seed, negative=True)


# ------------------------------------------------------------------------- the grammar


def test_every_axis_value_is_drawn():
    seen = defaultdict(set)
    for seed in range(3000):
        for axis, value in draw(seed, loops=True).axes().items():
            seen[axis].add(value)
    for axis, values in AXES.items():
        assert seen[axis] == set(values), axis


def test_loops_are_drawn_only_when_asked_for():
    assert not any(FORMS[draw(seed).form].needs_loops for seed in range(500))
    assert any(FORMS[draw(seed, loops=True).form].needs_loops for seed in range(100))


def test_a_seed_gives_one_case():
    assert draw(11) == draw(11) and draw(11) != draw(12)
    assert from_dict(changed(draw(11))) == draw(11)
    with pytest.raises(ValueError, match="unknown axes: size"):
        from_dict({"size": 3})


@pytest.mark.parametrize("form", FORMS)
def test_programs_of_every_form_mean_what_the_case_says(form):
    """Against a layer written once more, with no code in common: one token and slot after the other, in float64."""
    for seed in range(12):
        case = replace(draw(seed, form=form), seed=seed)
        if case.around not in ("nothing", "logits") or case.beside != "nothing" or not must_match(case):
            continue  # an expert with biases that sees zeros for other tokens, for example, is a layer of its own
        with program(case) as p, torch.no_grad():
            (x,) = p.inputs(0)
            out, routing = recorded(p.model, (x,))
            double = p.reference((x,), routing)
            moe = p.model.moe
            weights, ids = routing[0][:2]
            rows = x.double()
            rows = (rows.transpose(0, 1) if case.rank == "3d_first" else rows).reshape(-1, case.hidden)
            weights, ids = weights.double().reshape(-1, case.top_k), ids.reshape(-1, case.top_k)
            expected = torch.zeros_like(rows)
            for t in range(rows.shape[0]):
                for k in range(case.top_k):
                    expected[t] += plain_expert(case, moe, int(ids[t, k]), rows[t], weights[t, k])
            double = double[0] if isinstance(double, tuple) else double
            if case.rank == "3d_first":
                expected = expected.view(x.transpose(0, 1).shape).transpose(0, 1).reshape(rows.shape)
            torch.testing.assert_close(double.reshape(rows.shape), expected, rtol=1e-9, atol=1e-11)
            out = out[0] if isinstance(out, tuple) else out
            loose = 1e-4 if case.dtype == "float32" else 0.1
            torch.testing.assert_close(out.double().reshape(rows.shape), expected, rtol=loose, atol=loose)


def plain_expert(case, moe, e, x, weight):
    def role(name):
        if case.separate:
            linear = getattr(moe.experts[e], f"w{name}")
            return linear.weight.double(), 0 if linear.bias is None else linear.bias.double()
        w = getattr(moe, f"w{name}")[e].double()
        b = getattr(moe, f"b{name}")[e].double() if case.bias else 0
        return (w.t() if case.transposed else w), b

    def linear(name, v):
        w, b = role(name)
        return w @ v + b

    if case.form == "llama4":
        weight = torch.sigmoid(weight)
    if case.inputs != "tokens":
        x = moe.project.weight.double() @ x
    v = x * weight if case.weight == "input" else x
    up = None
    if case.layout.endswith("_cat"):
        gate, up = linear("13", v).chunk(2)
    elif case.layout.endswith("_interleaved"):
        gate, up = linear("13", v)[::2], linear("13", v)[1::2]
    else:
        gate, up = linear("1", v), linear("3", v) if case.glu else None
    f = torch.nn.functional
    if case.activation == "clamped":
        gate, up = gate.clamp(max=1), up.clamp(-1, 1) + 1
        h = gate * torch.sigmoid(1.702 * gate)
    elif case.activation == "unknown":
        h, up = gate.tanh() * (-(up if up is not None else gate).abs()).exp(), None
    else:
        h = {
            "silu": f.silu, "gelu": f.gelu, "gelu_tanh": lambda g: f.gelu(g, approximate="tanh"), "relu": f.relu,
            "relu2": lambda g: f.relu(g) ** 2,
        }[case.activation](gate)  # fmt: skip
    y = linear("2", h if up is None else h * up)
    return y if case.weight == "input" else y * weight


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_changes_some_program(name):
    for seed in range(2000):
        case = draw(seed, loops=True)
        if name in applicable(source_of(case)) and mutated_case(case, name) is not None:
            return  # and its text is another
    raise AssertionError(f"{name} fits no program")


def test_the_text_can_be_read_by_inspect():
    import inspect

    with program(draw(3)) as p:
        assert "class MoE(nn.Module)" in inspect.getsource(inspect.getmodule(type(p.model)))
        assert inspect.getsource(type(p.model).forward).startswith("    def forward(")


# ------------------------------------------------------------------------- the judge and the shrinker

BUGGY = from_dict({"form": "dense_masked", "layout": "stacked", "tokens": 33, "dtype": "bfloat16", "style": 5})


def test_the_judge_sees_a_layer_with_wrong_weights(monkeypatch):
    router = lower._router

    def doubled(cursor, plan, ids):
        return cursor.call(torch.mul, (router(cursor, plan, ids), 1.2))

    monkeypatch.setattr(lower, "_router", doubled)
    verdict = judge(BUGGY)
    assert verdict.kind == "wrong" and "error" in verdict.detail
    small = shrink(BUGGY, "wrong")
    assert valid(small) and judge(small).kind == "wrong"
    assert (small.layout, small.dtype, small.style, small.tokens) == ("separate", "float32", 0, 7)


def spoiled(monkeypatch, change):
    """The verdict when ``change(args, result)`` stands between the compiled program and the judge."""

    def spoil(model, dynamic=None):
        result = traced(model, dynamic)
        call = result.call
        result.call = lambda *args: change(args, call(*args))
        return result

    monkeypatch.setattr(judging, "traced", spoil)
    return judge(Case())


def test_the_judge_sees_a_graph_that_keeps_its_first_answer(monkeypatch):
    kept = []
    verdict = spoiled(monkeypatch, lambda args, out: (kept.append(out), kept[0])[1])
    assert verdict.kind == "wrong" and verdict.detail.startswith("call 1:")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda args, out: out * float("nan"), "NaN"),
        (lambda args, out: out.double(), "float64"),
        (lambda args, out: out.t().contiguous().t(), "strides"),
        (lambda args, out: (args[0].add_(1), out)[1], "input 0: written"),
        (lambda args, out: out + 1e-5 * out.abs().max(), "error"),
    ],
    ids=["nan", "dtype", "strides", "write", "small"],
)
def test_the_judge_sees(monkeypatch, change, text):
    verdict = spoiled(monkeypatch, change)
    assert verdict.kind == "wrong" and text in verdict.detail, verdict


@pytest.mark.parametrize(("error", "kind"), [(1e-7, "ok"), (1e-3, "wrong")])
def test_one_unlucky_rounding_is_forgiven_and_one_wrong_answer_is_not(monkeypatch, error, kind):
    calls = []
    verdict = spoiled(monkeypatch, lambda args, out: (calls.append(1), out + (len(calls) == 1) * error * out.norm())[1])
    assert verdict.kind == kind and len(calls) > (40 if kind == "ok" else 0), verdict


def test_the_judge_counts_misses_and_crashes(monkeypatch):
    def refuse(*_):
        raise NoMatch("MC207", "planted")

    monkeypatch.setattr(planning, "plan_of", refuse)
    verdict = judge(Case())
    assert (verdict.kind, verdict.codes) == ("miss", ["MC207"])
    assert judge(replace(Case(), mutation="the last expert is skipped")).kind == "ok"
    monkeypatch.undo()
    monkeypatch.setattr(lower, "lower", lambda plan: 1 / 0)
    assert judge(Case()).kind == "crash"


def test_a_program_that_cannot_run_is_invalid_not_wrong():
    verdict = judge(from_dict({"form": "bool_mask", "mutation": "weights read by token and token", "top_k": 2}))
    assert verdict.kind in ("ok", "invalid")
    assert judge(replace(Case(), mutation="accumulates into the input")).kind == "ok"


def test_excused_cases_need_no_rewrite():
    assert must_match(Case())
    for axes in ({"experts": 1, "top_k": 1}, {"tokens": 0}, {"router": "external"}, {"expert": "three"}):
        assert not must_match(from_dict(axes))


def test_results_add_up():
    verdicts = list(run([Case(), replace(Case(), activation="gelu")], workers=0, total=2))
    result = summary(verdicts)
    assert result["verdicts"] == {"ok": 2} and result["match_rate"] == 1.0 and not result["failures"]
    assert result["values"]["activation"] == {"silu": 1, "gelu": 1} and 0 < result["pair_coverage"] < 0.2


def levels():
    return torch.get_num_threads(), [logging.getLogger(name).level for name in QUIET]


def test_the_command_replays_a_case(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger(QUIET[0]), "level", logging.INFO)
    before = levels()
    quiet_there = []
    monkeypatch.setattr(command, "judge", lambda case: quiet_there.append(levels()) or judge(case))
    assert command.main(["--case", json.dumps({"form": "gather_einsum", "layout": "stacked"})]) == 0
    shown = capsys.readouterr().out
    assert "seed 0: ok, 1 rewritten" in shown and "class MoE(nn.Module)" in shown
    assert quiet_there == [(1, [logging.CRITICAL] * len(QUIET))] and levels() == before
    out = tmp_path / "result.json"
    assert command.main(["--seed", "2", "--count", "1", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["programs"] == 1
    assert case_of(5, negative=True).mutation in MUTATIONS
