"""When an fp8 MoE layer goes to DeepGEMM's grouped GEMMs: rules as sympy predicates over its shapes and facts.

Shape legend: ``T`` tokens, ``E`` experts, ``K`` experts chosen per token, ``H`` hidden size, ``I`` intermediate size.
``w2`` is ``[E, H, I]``: what the reference rule calls K is ``H`` here, and its N is ``I``, the width after the
activation on this rank. ``T`` counts the rows that the layer is given, before each is repeated K times.

A rule is an ordered tuple of conjuncts. All but ``T`` is known when a layer is compiled, so ``decide`` leaves at most
one integer to compare with, and one compiled graph serves both sides of the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from sympy import Eq, Mod, Symbol, symbols
from sympy.logic.boolalg import Boolean

from .spec import NoMatch
from .torch_compat import symbol_range

ALIGNMENT = 128  # rows and columns of DeepGEMM's tiles, and of a block of scales
# Mean rows per expert from which DeepGEMM wins over Triton; one H100: even or behind at 128, 10 to 34 % ahead at 256.
AUTO_ROWS_PER_EXPERT = 192
TAIL = 64  # what sizes must be a multiple of where a package has shown that it computes partial blocks right
WEIGHT_DTYPE = torch.float8_e4m3fn

T = symbols("T", integer=True, nonnegative=True)
H, I, E, K = symbols("H I E K", integer=True, positive=True)
# What is no shape: true or false, known when the layer is compiled.
PROVIDER, DTYPES, CONTIGUOUS = Symbol("provider"), Symbol("dtypes"), Symbol("contiguous")


@dataclass(frozen=True)
class Conjunct:
    """One condition of a rule.

    Args:
        code: what a report shows when it fails; an unusable provider brings its own.
        name: a word for tables and tests.
        predicate: over the symbols of this module. In ``T`` it must be ``a*T >= b`` with ``a > 0``.
        text: why it failed, a format string over ``_values``.
    """

    code: str
    name: str
    predicate: Boolean
    text: str


_PROVIDER = Conjunct("MC501", "provider", PROVIDER, "{provider.reason}")
_I_ALIGNED = Conjunct("MC404", "I aligned", Eq(Mod(I, ALIGNMENT), 0), f"I={{I}} is not a multiple of {ALIGNMENT}")
_H_ALIGNED = Conjunct("MC404", "H aligned", Eq(Mod(H, ALIGNMENT), 0), f"H={{H}} is not a multiple of {ALIGNMENT}")
_I_TAIL = Conjunct("MC404", "I in tails", Eq(Mod(I, TAIL), 0), f"I={{I}} is not a multiple of {TAIL}")
_H_TAIL = Conjunct("MC404", "H in tails", Eq(Mod(H, TAIL), 0), f"H={{H}} is not a multiple of {TAIL}")
_DTYPES = Conjunct("MC401", "dtypes", DTYPES, f"w1 is {{w1_dtype}}, w2 is {{w2_dtype}}; both must be {WEIGHT_DTYPE}")
_CONTIGUOUS = Conjunct("MC403", "contiguous", CONTIGUOUS, "not contiguous: {strided}")

# ``_valid_deep_gemm`` of vLLM 0.10 to 0.33, in its order.
VLLM_RULE = (
    _PROVIDER,
    Conjunct("MC509", "tokens", T >= ALIGNMENT, f"T={{T}} is not >= {ALIGNMENT}"),
    _I_ALIGNED,
    _H_ALIGNED,
    Conjunct("MC510", "wide", I > 512, "I={I} is not > 512"),
    _DTYPES,
    _CONTIGUOUS,
)

# What the kernels need, and the cost model in place of the reference's two fixed borders: every expert's rows are
# padded to whole tiles, so what counts is how many rows an expert gets.
AUTO_RULE = (
    _PROVIDER,
    Conjunct(
        "MC505",
        "rows",
        T * K >= AUTO_ROWS_PER_EXPERT * E,
        f"T={{T}}, K={{K}}, E={{E}}: fewer than {AUTO_ROWS_PER_EXPERT} rows per expert",
    ),
    _I_TAIL,
    _H_TAIL,
    _DTYPES,
    _CONTIGUOUS,
)

RULES = {"vllm": VLLM_RULE, "auto": AUTO_RULE}  # the values of the option ``deepgemm_rule``


@dataclass(frozen=True)
class Facts:
    """What is known of a layer when it is compiled. ``provider`` says why DeepGEMM is unusable, None if it is usable.

    ``experts`` and ``inter`` are those of this rank: the sizes of ``w2 [E, H, I]``.
    """

    experts: int
    top_k: int
    hidden: int
    inter: int
    w1_dtype: torch.dtype
    w2_dtype: torch.dtype
    w1_contiguous: bool
    w2_contiguous: bool
    hidden_contiguous: bool
    provider: NoMatch | None


@dataclass(frozen=True)
class TokenRange:
    """The values that ``T`` can take, both ends included; ``high`` is None where nothing bounds it."""

    low: int
    high: int | None

    def __post_init__(self) -> None:
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise ValueError(f"T={self} is no range of token counts")

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{'' if self.high is None else self.high}"


@dataclass(frozen=True)
class Failure:
    """A conjunct that holds for no ``T`` in the range: its code, and one line with the values."""

    code: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """Which kernels run, for every ``T`` of the range that was asked about.

    ``failed`` is in the order of the rule. ``residual`` is what is left to test at run time, true when nothing is.
    ``from_tokens`` is the smallest ``T`` that goes to DeepGEMM, None when none does.
    """

    verdict: Literal["deepgemm", "triton", "residual"]
    failed: tuple[Failure, ...]
    residual: Boolean
    from_tokens: int | None

    def holds(self, tokens: int) -> bool:
        """Whether a call with this many tokens goes to DeepGEMM; the op asks on every call."""
        return self.from_tokens is not None and tokens >= self.from_tokens

    def text(self) -> str:
        """One line for reports: ``DeepGEMM for T >= 128, else Triton``."""
        if self.verdict == "residual":
            return f"DeepGEMM for T >= {self.from_tokens}, else Triton"
        if self.verdict == "deepgemm":
            return "DeepGEMM"
        return "Triton: " + "; ".join(f"{failure.code} {failure.reason}" for failure in self.failed)


def decide(rule: str, facts: Facts, tokens: TokenRange) -> Decision:
    """Apply the rule of this name to a layer whose calls have ``tokens`` tokens.

    Raises:
        ValueError: no rule has this name.
    """
    if rule not in RULES:
        raise ValueError(f"unknown DeepGEMM rule {rule!r}; allowed: {', '.join(map(repr, RULES))}")
    known = _known(facts)
    failed, from_tokens = [], 0
    for conjunct in RULES[rule]:
        first = _first_tokens(conjunct.predicate.xreplace(known))
        if first is None or (tokens.high is not None and tokens.high < first):
            failed.append(_failure(conjunct, facts, tokens))
        else:
            from_tokens = max(from_tokens, first)
    if failed:
        return Decision("triton", tuple(failed), sympy.true, None)
    if from_tokens <= tokens.low:
        return Decision("deepgemm", (), sympy.true, from_tokens)
    return Decision("residual", (), sympy.Ge(T, from_tokens), from_tokens)


def tokens_of(size: int | torch.SymInt) -> TokenRange:
    """The range of a (symbolic) number of tokens, as far as it is known without a guard."""
    return TokenRange(*symbol_range(size))


def _known(facts: Facts) -> dict[Any, Any]:
    """The value of every symbol but ``T``."""
    flags = {
        PROVIDER: facts.provider is None,
        DTYPES: facts.w1_dtype == facts.w2_dtype == WEIGHT_DTYPE,
        CONTIGUOUS: not _strided(facts),
    }
    sizes = {E: facts.experts, K: facts.top_k, H: facts.hidden, I: facts.inter}
    return {symbol: sympy.sympify(value) for symbol, value in (flags | sizes).items()}


def _first_tokens(predicate: Boolean) -> int | None:
    """The smallest ``T`` from which a predicate over nothing but ``T`` holds, None if it never does."""
    if predicate in (sympy.true, sympy.false):
        return 0 if predicate == sympy.true else None
    line = isinstance(predicate, sympy.GreaterThan) and predicate.free_symbols == {T}
    terms = sympy.Poly(predicate.gts - predicate.lts, T).all_coeffs() if line else []
    if len(terms) != 2 or terms[0] < 0:
        raise ValueError(f"{predicate} is not of the form a*T >= b with a > 0")
    return max(0, int(sympy.ceiling(-terms[1] / terms[0])))


def _failure(conjunct: Conjunct, facts: Facts, tokens: TokenRange) -> Failure:
    code = facts.provider.code if conjunct is _PROVIDER and facts.provider is not None else conjunct.code
    return Failure(code, conjunct.text.format(**_values(facts, tokens)))


def _values(facts: Facts, tokens: TokenRange) -> dict[str, Any]:
    """What the texts of the conjuncts can name."""
    return {
        "T": tokens,
        "E": facts.experts,
        "K": facts.top_k,
        "H": facts.hidden,
        "I": facts.inter,
        "w1_dtype": facts.w1_dtype,
        "w2_dtype": facts.w2_dtype,
        "provider": facts.provider,
        "strided": ", ".join(_strided(facts)),
    }


def _strided(facts: Facts) -> list[str]:
    """The operands that are not contiguous."""
    operands = {
        "hidden_states": facts.hidden_contiguous,
        "w1": facts.w1_contiguous,
        "w2": facts.w2_contiguous,
    }
    return [name for name, contiguous in operands.items() if not contiguous]
