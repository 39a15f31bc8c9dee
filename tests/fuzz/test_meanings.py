"""New near misses: each changes what a rewritable program means, is refused or equal, and is seen without its guard."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from programs import accepted
from torch.utils._pytree import tree_leaves

from moe_compile import legality
from moe_compile.fuzz.axes import draw, from_dict, must_match, valid
from moe_compile.fuzz.contexts import CONTEXTS
from moe_compile.fuzz.judge import judge
from moe_compile.fuzz.program import program
from moe_compile.fuzz.runner import mutated_case
from moe_compile.fuzz.slips import SLIPS
from moe_compile.fuzz.source import source_of
from moe_compile.fuzz.writes import PLACES, WRITES
from moe_compile.match import engine, layer, marks, nodes, views

EVERY = {**WRITES, **SLIPS}
LIMIT = 60  # programs with a mutation that are looked at


@cache
def drawn():
    """Programs where a change of meaning shows: in float32, with tokens that go to various experts.

    Those with few experts come first: Dynamo's time goes with their number.
    """
    cases = (draw(seed, loops=True) for seed in range(8000))
    plain = (c for c in cases if c.tokens > 1 and c.experts > 1 and c.routing == "random" and c.mode != "train")
    return [(c, source_of(c)) for c in sorted(plain, key=lambda c: c.experts > 4)]


def result(case):
    with program(case) as p, torch.no_grad():
        torch.manual_seed(0)
        return tree_leaves(p.model(*p.inputs(0)))


def differs(case):
    """Whether a mutated program computes something else than without its mutation; None where it cannot run."""
    try:
        near = result(case)
    except (IndexError, RuntimeError, NameError):  # sizes or names that the mutation does not fit
        return None
    pairs = list(zip(near, result(replace(case, mutation="none")), strict=True))
    return any(a.shape != b.shape or (a - b).norm() > 0.01 * b.norm() for a, b in pairs)


@cache
def example(name):
    """The first program, rewritten without the mutation, that the mutation changes (or leaves equal, as it says)."""
    fitting = ((c, s) for c, s in drawn() if any(old in s for old, _ in EVERY[name].changes))
    mutated = (mutated_case(c, name) for c, _ in fitting)
    near = [c for c, _ in zip((c for c in mutated if c is not None and base(c)), range(LIMIT), strict=False)]
    return next(c for c in near if differs(c) is (not EVERY[name].same))


def base(case):
    return must_match(replace(case, mutation="none")) and case.form != "token_loop"


@pytest.mark.parametrize("name", EVERY)
def test_changes_the_meaning_of_a_program_that_is_rewritten(name):
    assert example(name).mutation == name


FEW = [
    *SLIPS, *(name for name in WRITES if name.endswith(("ids", "tokens, in the loop"))),
    *(f"written through a list: {place}" for place in PLACES),
]  # fmt: skip


CHOSEN = EVERY if os.environ.get("MOE_COMPILE_NEAR_MISSES") == "all" else dict.fromkeys(FEW)


@pytest.mark.parametrize("name", CHOSEN)
def test_is_refused_or_equal(name):
    accepted(example(name))


@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "nothing"])
@pytest.mark.parametrize("form", ["dense_masked", "index_add_where", "einsum_one_hot"])
def test_what_stands_beside_does_no_harm(name, form):
    case = from_dict({"form": form, "layout": "stacked", "beside": name})
    assert valid(case)
    accepted(case)


# ------------------------------------------------------------------------- without its guard a fault is seen


def without_guard(monkeypatch, where, name, instead, mutation, **axes):
    case = mutated_case(from_dict({"seed": 1, **axes}), mutation)
    assert judge(case).kind == "ok"
    monkeypatch.setattr(where, name, instead)
    verdict = judge(case)
    assert verdict.kind == "wrong", verdict


def styled(text, **axes):
    """Axes with a style that writes ``text``."""
    cases = ({**axes, "style": style} for style in range(24))
    return next(c for c in cases if text in source_of(from_dict(c)))


def first_only(node):
    """Writes as they were once seen: only of ops that write their first argument and return it."""
    return [node.args[0]] if nodes.writes(node.target) else []


@pytest.mark.parametrize("way", ["through a list", "by a user's op", "through two lists"])
def test_the_fuzzer_sees_a_write_that_the_engine_does_not(monkeypatch, way):
    name = f"written {way}: weights, in the loop"
    without_guard(monkeypatch, engine, "mutated", first_only, name, form="dense_masked", layout="stacked")


def test_the_fuzzer_sees_lost_digits(monkeypatch):
    without_guard(monkeypatch, legality, "_no_double", lambda *_: None, "a step in float64", form="dense_masked")


def test_the_fuzzer_sees_an_input_beside_its_projection(monkeypatch):
    axes = {"form": "dense_masked", "layout": "stacked", "inputs": "projected_inside"}
    without_guard(monkeypatch, layer, "_reads_input", lambda *_: False, "the input beside its projection", **axes)


def test_the_fuzzer_sees_rounded_numbers(monkeypatch):
    name = "numbers of experts in half precision"
    counting = (*views._COUNTING, torch.bfloat16)
    axes = styled("torch.arange(self.num_experts", form="einsum_one_hot", layout="stacked")
    without_guard(monkeypatch, views, "_COUNTING", counting, name, **axes)


def test_the_fuzzer_sees_a_list_that_is_too_short(monkeypatch):
    block = marks.Block
    short = lambda *args: block(*args[:6])  # noqa: E731
    axes = styled("torch.histc", form="expert_hit", layout="stacked", tokens=33)
    without_guard(monkeypatch, marks, "Block", short, "hits among the first experts", **axes)
