"""Which layers go to DeepGEMM: every condition on both sides of its border, for known, unknown and ranged T."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.export import Dim

from moe_compile import guards
from moe_compile.codes import CODES
from moe_compile.guards import RULES, VLLM_RULE, Decision, Facts, Failure, T, TokenRange, decide, tokens_of
from moe_compile.spec import NoMatch

FP8 = torch.float8_e4m3fn
GOOD = Facts(8, 2, 1024, 640, FP8, FP8, True, True, True, None)
UNKNOWN = TokenRange(0, None)
MANY = TokenRange(4096, 4096)
ROWS = guards.AUTO_ROWS_PER_EXPERT


def only_failure(rule: str, facts: Facts, tokens: TokenRange) -> tuple[str, str]:
    decision = decide(rule, facts, tokens)
    assert decision.verdict == "triton" and len(decision.failed) == 1
    return decision.failed[0].code, decision.failed[0].reason


# --- T ----------------------------------------------------------------------------------------------------


def test_known_tokens_at_the_border() -> None:
    short = decide("vllm", GOOD, TokenRange(127, 127))
    assert short == Decision("triton", (Failure("MC509", "T=127 is not >= 128"),), sympy.true, None)
    assert short.text() == "Triton: MC509 T=127 is not >= 128"
    for tokens in (128, 129):
        decision = decide("vllm", GOOD, TokenRange(tokens, tokens))
        assert decision == Decision("deepgemm", (), sympy.true, 128)
        assert decision.text() == "DeepGEMM"


def test_unknown_tokens_leave_a_residual() -> None:
    decision = decide("vllm", GOOD, UNKNOWN)
    assert decision == Decision("residual", (), sympy.Ge(T, 128), 128)
    assert decision.text() == "DeepGEMM for T >= 128, else Triton"
    assert [decision.holds(tokens) for tokens in (0, 127, 128, 129)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0, 127, "triton"),
        (0, 128, "residual"),
        (127, 128, "residual"),
        (127, None, "residual"),
        (128, 128, "deepgemm"),
        (128, 4096, "deepgemm"),
        (128, None, "deepgemm"),
        (129, None, "deepgemm"),
    ],
)
def test_a_range_decides_where_it_can(low: int, high: int | None, verdict: str) -> None:
    decision = decide("vllm", GOOD, TokenRange(low, high))
    assert decision.verdict == verdict
    assert decision.residual == (sympy.Ge(T, 128) if verdict == "residual" else sympy.true)
    assert decision.from_tokens == (None if verdict == "triton" else 128)


def test_a_range_that_is_too_low_is_named() -> None:
    assert only_failure("vllm", GOOD, TokenRange(3, 127)) == ("MC509", "T=3..127 is not >= 128")


def test_holds_is_exact_outside_of_the_range_too() -> None:
    """torch.export gives 2 as the lower end of a size that may be 1 at run time."""
    facts = replace(GOOD, experts=1, top_k=ROWS // 2)
    decision = decide("auto", facts, TokenRange(2, None))
    assert decision.verdict == "deepgemm" and decision.holds(2) and not decision.holds(1)


def test_a_refused_layer_never_holds() -> None:
    assert not decide("vllm", replace(GOOD, inter=512), UNKNOWN).holds(10**9)


@pytest.mark.parametrize("rule", RULES)
def test_the_border_is_a_plain_integer(rule: str) -> None:
    """A sympy one compares equal, and makes a symbolic comparison out of every call of the op."""
    assert type(decide(rule, replace(GOOD, top_k=3), UNKNOWN).from_tokens) is int


@pytest.mark.parametrize(("low", "high"), [(-1, None), (-1, 5), (5, 4)])
def test_an_impossible_range_is_an_error(low: int, high: int | None) -> None:
    with pytest.raises(ValueError, match="no range of token counts"):
        TokenRange(low, high)


def test_ranges_read_well() -> None:
    assert [str(TokenRange(*ends)) for ends in ((7, 7), (0, 7), (7, None))] == ["7", "0..7", "7.."]


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [MANY, UNKNOWN])
def test_width_at_the_border(tokens: TokenRange) -> None:
    assert only_failure("vllm", replace(GOOD, inter=512), tokens) == ("MC510", "I=512 is not > 512")
    assert only_failure("vllm", replace(GOOD, inter=513), tokens) == ("MC404", "I=513 is not a multiple of 128")
    assert decide("vllm", replace(GOOD, inter=640), tokens).failed == ()


MULTIPLES = {"vllm": 128, "auto": 64}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1, 63, 65, 127, 129, 1000, 1025])
def test_unaligned_hidden_size(rule: str, size: int) -> None:
    facts = replace(GOOD, hidden=size)
    assert only_failure(rule, facts, MANY) == ("MC404", f"H={size} is not a multiple of {MULTIPLES[rule]}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [639, 641, 735])
def test_unaligned_intermediate_size(rule: str, size: int) -> None:
    facts = replace(GOOD, inter=size)
    assert only_failure(rule, facts, MANY) == ("MC404", f"I={size} is not a multiple of {MULTIPLES[rule]}")


@pytest.mark.parametrize("size", [704, 2880])
def test_partial_blocks(size: int) -> None:
    for facts in (replace(GOOD, hidden=size), replace(GOOD, inter=size)):
        assert decide("auto", facts, MANY).verdict == "deepgemm"
        assert decide("vllm", facts, MANY).failed[0].code == "MC404"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [128, 512, 7168])
def test_hidden_size_has_no_other_border(rule: str, size: int) -> None:
    assert decide(rule, replace(GOOD, hidden=size), MANY).verdict == "deepgemm"


# --- facts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_an_unusable_provider_brings_its_own_reason(rule: str) -> None:
    facts = replace(GOOD, provider=NoMatch("MC502", "nvcc 12.1, needed 12.3"))
    assert only_failure(rule, facts, UNKNOWN) == ("MC502", "nvcc 12.1, needed 12.3")
    assert decide(rule, facts, UNKNOWN).text() == "Triton: MC502 nvcc 12.1, needed 12.3"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("w1", "w2"), [(torch.bfloat16, FP8), (FP8, torch.float8_e5m2), (torch.float8_e4m3fnuz, torch.float8_e4m3fnuz)]
)
def test_other_dtypes(rule: str, w1: torch.dtype, w2: torch.dtype) -> None:
    reason = f"w1 is {w1}, w2 is {w2}; both must be torch.float8_e4m3fn"
    assert only_failure(rule, replace(GOOD, w1_dtype=w1, w2_dtype=w2), MANY) == ("MC401", reason)


@pytest.mark.parametrize("rule", RULES)
def test_strided_operands(rule: str) -> None:
    hidden = replace(GOOD, hidden_contiguous=False)
    assert only_failure(rule, hidden, MANY) == ("MC403", "not contiguous: hidden_states")
    assert only_failure(rule, replace(GOOD, w1_contiguous=False), MANY) == ("MC403", "not contiguous: w1")
    assert only_failure(rule, replace(GOOD, w2_contiguous=False), MANY) == ("MC403", "not contiguous: w2")
    all_three = replace(hidden, w1_contiguous=False, w2_contiguous=False)
    assert only_failure(rule, all_three, MANY) == ("MC403", "not contiguous: hidden_states, w1, w2")


# --- order, texts, names ----------------------------------------------------------------------------------

BAD = Facts(8, 2, 1000, 500, torch.bfloat16, FP8, False, True, True, NoMatch("MC501", "no provider"))
BAD_REASONS = {
    "provider": "MC501 no provider",
    "I": "MC404 I=500 is not a multiple of 128",
    "H": "MC404 H=1000 is not a multiple of 128",
    "dtypes": "MC401 w1 is torch.bfloat16, w2 is torch.float8_e4m3fn; both must be torch.float8_e4m3fn",
    "contiguous": "MC403 not contiguous: w1",
}


def test_failures_come_in_the_order_of_the_reference() -> None:
    assert decide("vllm", BAD, TokenRange(5, 5)).text() == "Triton: " + "; ".join(
        (
            BAD_REASONS["provider"],
            "MC509 T=5 is not >= 128",
            BAD_REASONS["I"],
            BAD_REASONS["H"],
            "MC510 I=500 is not > 512",
            BAD_REASONS["dtypes"],
            BAD_REASONS["contiguous"],
        )
    )


def test_failures_come_in_the_order_of_the_cost_model() -> None:
    rows = f"MC505 T=5, K=2, E=8: fewer than {ROWS} rows per expert"
    names = ("I", "H", "dtypes", "contiguous")
    expected = "; ".join((BAD_REASONS["provider"], rows, *(BAD_REASONS[name] for name in names)))
    assert decide("auto", BAD, TokenRange(5, 5)).text() == "Triton: " + expected.replace("of 128", "of 64")


def test_a_condition_on_unknown_tokens_is_no_failure() -> None:
    assert [f.code for f in decide("vllm", BAD, UNKNOWN).failed] == [
        "MC501",
        "MC404",
        "MC404",
        "MC510",
        "MC401",
        "MC403",
    ]


def test_every_conjunct_has_a_code_of_the_table() -> None:
    assert {c.code for rule in RULES.values() for c in rule} == {
        "MC401",
        "MC403",
        "MC404",
        "MC501",
        "MC505",
        "MC509",
        "MC510",
    }
    assert all(c.code in CODES for rule in RULES.values() for c in rule)


def test_an_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown DeepGEMM rule 'vlm'; allowed: 'vllm', 'auto'$"):
        decide("vlm", GOOD, UNKNOWN)


@pytest.mark.parametrize("predicate", [T > 127, T <= 5, sympy.Ge(-T, -5), sympy.Ge(T * T, 4), sympy.Ge(T, guards.E)])
def test_a_rule_that_is_no_lower_bound_on_tokens_is_an_error(predicate: Any) -> None:
    """It could not be reduced to one integer, and a wrong integer would be silent."""
    with pytest.raises(ValueError, match=r"is not of the form a\*T >= b with a > 0"):
        guards._first_tokens(predicate)


# --- the cost model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (256, 8), (7, 3), (1, 1), (5, 5)])
def test_the_cost_model_counts_rows_per_expert(experts: int, top_k: int) -> None:
    facts = replace(GOOD, experts=experts, top_k=top_k)
    decision = decide("auto", facts, UNKNOWN)
    first = next(tokens for tokens in range(ROWS * experts + 1) if tokens * top_k >= ROWS * experts)
    assert decision.from_tokens == first and decision.text() == f"DeepGEMM for T >= {first}, else Triton"
    assert decide("auto", facts, TokenRange(first, first)).verdict == "deepgemm"
    code, reason = only_failure("auto", facts, TokenRange(first - 1, first - 1))
    assert code == "MC505"
    assert reason == f"T={first - 1}, K={top_k}, E={experts}: fewer than {ROWS} rows per expert"


def test_the_cost_model_has_none_of_the_fixed_borders() -> None:
    facts = replace(GOOD, inter=128, experts=1, top_k=1)
    few = replace(facts, top_k=2)  # as many rows per expert from half the tokens
    assert decide("auto", few, TokenRange(100, 100)).verdict == "deepgemm"
    assert [f.code for f in decide("vllm", few, TokenRange(100, 100)).failed] == ["MC509", "MC510"]


@pytest.mark.parametrize("order", [1, -1])
def test_several_borders_on_tokens_make_the_highest(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = next(c for c in guards.AUTO_RULE if c.name == "rows")
    monkeypatch.setitem(RULES, "both", (*VLLM_RULE, rows)[::order])
    assert decide("both", replace(GOOD, experts=256, top_k=8), UNKNOWN).from_tokens == ROWS * 32
    assert decide("both", replace(GOOD, experts=1, top_k=ROWS), UNKNOWN).from_tokens == 128


# --- against a transcription, and against the formulas themselves -------------------------------------------


def usable(facts: Facts, multiple: int) -> bool:
    whole_tiles = all(size // multiple * multiple == size for size in (facts.hidden, facts.inter))
    fp8 = [facts.w1_dtype, facts.w2_dtype] == [FP8, FP8]
    dense = facts.hidden_contiguous and facts.w1_contiguous and facts.w2_contiguous
    return facts.provider is None and whole_tiles and fp8 and dense


def reference(rule: str, facts: Facts, tokens: int) -> bool:
    """The two rules in plain Python."""
    if rule == "vllm":
        return usable(facts, 128) and tokens > 127 and facts.inter >= 513
    return usable(facts, 64) and tokens * facts.top_k / facts.experts >= ROWS


def random_facts(rng: random.Random) -> Facts:
    """Half of them usable: independent coins would leave hardly any."""
    near = [64 * n + d for n in (2, 5, 6, 8, 10, 11, 16) for d in (-1, 0, 0, 0, 1)]
    good = rng.random() < 0.5
    facts = replace(
        GOOD,
        experts=rng.choice((1, 2, 7, 8, 64, 256)),
        top_k=rng.choice((1, 2, 3, 6, 8)),
        hidden=128 * rng.randint(1, 60) if good else rng.choice(near),
        inter=128 * rng.randint(1, 12) if good else rng.choice((*near, rng.randint(1, 2000))),
    )
    if good:
        return facts
    return replace(
        facts,
        w1_dtype=rng.choice((FP8, FP8, FP8, torch.bfloat16)),
        w2_dtype=rng.choice((FP8, FP8, FP8, torch.float8_e5m2)),
        w1_contiguous=rng.random() < 0.8,
        w2_contiguous=rng.random() < 0.8,
        hidden_contiguous=rng.random() < 0.8,
        provider=rng.choice((None, None, None, NoMatch("MC501", "none"))),
    )


@pytest.mark.parametrize("rule", RULES)
def test_agrees_with_a_transcription_on_random_shapes(rule: str) -> None:
    rng = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(5000):
        facts = random_facts(rng)
        border = -(-ROWS * facts.experts // facts.top_k)
        tokens = max(0, rng.choice((rng.randint(0, 4096), 127, 128, 129, border - 1, border, border + 1)))
        around = TokenRange(max(0, tokens - rng.randint(0, 200)), rng.choice((None, tokens + rng.randint(0, 200))))
        expected = reference(rule, facts, tokens)
        seen[expected] += 1
        assert decide(rule, facts, TokenRange(tokens, tokens)).verdict == ("deepgemm" if expected else "triton")
        ranged = decide(rule, facts, around)
        assert ranged.holds(tokens) is expected, (facts, tokens, around)
        last = 10**9 if around.high is None else around.high
        verdicts = {(True, True): "deepgemm", (False, False): "triton", (False, True): "residual"}
        assert ranged.verdict == verdicts[reference(rule, facts, around.low), reference(rule, facts, last)]
    assert min(seen.values()) > 1000


@pytest.mark.parametrize("rule", RULES)
def test_holds_agrees_with_the_formula(rule: str) -> None:
    rng = random.Random(1)
    formula = sympy.And(*(conjunct.predicate for conjunct in RULES[rule]))
    for _ in range(20):
        facts = random_facts(rng)
        decision = decide(rule, facts, UNKNOWN)
        left = formula.xreplace(guards._known(facts))
        for tokens in {0, 127, 128, 129, *(max(0, (decision.from_tokens or 0) + d) for d in (-1, 0, 1))}:
            assert decision.holds(tokens) is bool(left.subs(T, tokens))
        if decision.verdict == "residual":
            assert decision.residual.subs(T, decision.from_tokens) == sympy.true
            assert decision.residual.subs(T, (decision.from_tokens or 0) - 1) == sympy.false


def test_the_reference_rule_as_formulas() -> None:
    assert [str(conjunct.predicate) for conjunct in VLLM_RULE] == [
        "provider",
        "T >= 128",
        "Eq(Mod(I, 128), 0)",
        "Eq(Mod(H, 128), 0)",
        "I > 512",
        "dtypes",
        "contiguous",
    ]


# --- ranges from torch ------------------------------------------------------------------------------------


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.reshape(-1), torch.cat([x, x]), torch.nonzero(x)


def sizes(dim: Any) -> dict[str, Any]:
    """The first size of every tensor in an exported program, by the name of its node."""
    shapes = None if dim is None else {"x": {0: dim}}
    graph = torch.export.export(Sizes(), (torch.randn(10, 3),), dynamic_shapes=shapes).graph
    return {n.name: n.meta["val"].shape[0] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)}


def test_tokens_of_a_number() -> None:
    assert tokens_of(0) == TokenRange(0, 0) and tokens_of(128) == TokenRange(128, 128)
    assert type(sizes(None)["reshape"]) is int and tokens_of(sizes(None)["reshape"]) == TokenRange(30, 30)


def test_tokens_of_a_bounded_size() -> None:
    found = sizes(Dim("tokens", min=4, max=200))
    assert isinstance(found["x"], torch.SymInt)
    assert tokens_of(found["x"]) == TokenRange(4, 200)
    assert tokens_of(found["reshape"]) == TokenRange(12, 600)
    assert tokens_of(found["cat"]) == TokenRange(8, 400)
    assert tokens_of(found["nonzero"]) == TokenRange(0, 600)


def test_tokens_of_an_unbounded_size() -> None:
    found = sizes(Dim.DYNAMIC)
    assert isinstance(found["x"], torch.SymInt) and isinstance(found["nonzero"], torch.SymInt)
    assert tokens_of(found["x"]).high is None
    assert tokens_of(found["nonzero"]) == UNKNOWN


def compiled_calls(ask: Any, **bounds: int) -> tuple[int, list[Any]]:
    """Compile with a backend that asks about T; how many graphs serve 100 and 300 tokens, and what it was told."""
    torch._dynamo.reset()
    answers = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        x = next(n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), Tensor))
        answers.append(ask(x.meta["example_value"].shape[0]))
        return gm.forward

    call = torch.compile(lambda x: x + 1, backend=backend)
    for tokens in (100, 300):
        x = torch.zeros(tokens, 4)
        torch._dynamo.mark_dynamic(x, 0, **bounds)
        call(x)
    return len(answers), answers


def test_asking_adds_no_guard() -> None:
    def ask(size: Any) -> str:
        return decide("vllm", GOOD, tokens_of(size)).text()

    assert compiled_calls(ask) == (1, ["DeepGEMM for T >= 128, else Triton"])
    assert compiled_calls(ask, min=64, max=4096) == (1, ["DeepGEMM for T >= 128, else Triton"])
    assert compiled_calls(lambda size: str(bool(size >= 128))) == (2, ["False", "True"])  # a guard is seen here


def test_marked_bounds_decide() -> None:
    assert compiled_calls(tokens_of, min=64, max=4096)[1] == [TokenRange(64, 4096)]
