"""The grammar: one frozen value per axis, which combinations are valid, and drawing one from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .contexts import CONTEXTS
from .forms import FORMS

ROUTERS = (
    "softmax_topk", "topk_softmax", "sigmoid", "sigmoid_bias", "group_limited", "switch_top1", "two_heads", "external",
)  # fmt: skip
GLU_LAYOUTS = ("separate_cat", "stacked_cat", "stacked_interleaved")


@dataclass(frozen=True)
class Case:
    """One program and its input; ``seed`` draws weights and tokens, ``style`` chooses between equal spellings.

    ``weight`` is where the router weight goes: the expert's output, its input, or the output in float32 with a cast
    behind. ``mode`` dynamic compiles with ``dynamic=True``, recompile calls again with another number of tokens.
    ``rank`` 3d flattens ``[B, S, H]`` inside the layer, 3d_first turns it to ``[S, B, H]`` before, 3d_kept leaves it.
    ``inputs`` projected: the experts, not the router, read a projection of the tokens; inside: each expert projects.
    ``beside`` names what else stands in the layer.
    """

    form: str = "dense_masked"
    router: str = "softmax_topk"
    renormalise: str = "no"
    weight: str = "output"
    expert: str = "glu"
    activation: str = "silu"
    layout: str = "separate"
    transposed: bool = False
    dtype: str = "float32"
    experts: int = 4
    top_k: int = 2
    tokens: int = 7
    hidden: int = 16
    inter: int = 8
    routing: str = "random"
    mode: str = "eval"
    around: str = "nothing"
    rank: str = "2d"
    inputs: str = "tokens"
    beside: str = "nothing"
    style: int = 0
    mutation: str = "none"
    seed: int = 0

    @property
    def glu(self) -> bool:
        """Whether an expert multiplies a gate with a second projection."""
        return self.expert in ("glu", "glu_bias", "three")

    @property
    def bias(self) -> bool:
        return self.expert.endswith("_bias")

    @property
    def separate(self) -> bool:
        """Whether every expert is a module of its own."""
        return self.layout.startswith("separate")

    def axes(self) -> dict[str, Any]:
        """Every axis but the seed."""
        return {name: value for name, value in asdict(self).items() if name != "seed"}


# Values in the order in which the shrinker prefers them, with how often each is drawn.
AXES: dict[str, dict[Any, float]] = {
    "form": dict.fromkeys(FORMS, 1.0),
    "router": {**dict.fromkeys(ROUTERS, 1.0), "group_limited": 1.5, "switch_top1": 1.5, "external": 2.0},
    "renormalise": {"no": 1, "sum": 2, "sum_eps": 1, "scale": 1},
    "weight": {"output": 4, "input": 1, "fp32": 2},
    "expert": {"glu": 4, "plain": 2, "glu_bias": 2, "plain_bias": 2, "three": 0.3},
    "activation": {"silu": 3, "gelu": 1, "gelu_tanh": 1, "relu": 1, "relu2": 1, "clamped": 1.5, "unknown": 1},
    "layout": dict.fromkeys(("separate", "separate_cat", "stacked", "stacked_cat", "stacked_interleaved"), 1.0),
    "transposed": {False: 2, True: 1},
    "dtype": {"float32": 4, "bfloat16": 2, "float16": 1},
    "experts": {4: 6, 2: 3, 3: 4, 1: 0.3, 5: 2, 7: 1, 8: 1, 16: 0.3},
    "top_k": {2: 4, 1: 2, 3: 2, 4: 1, 7: 1, 8: 1, 16: 1},
    "tokens": {7: 4, 2: 2, 1: 2, 4: 1, 8: 0.5, 33: 2, 129: 1, 0: 0.3},
    "hidden": {16: 4, 8: 2, 7: 1, 13: 1, 24: 2, 32: 1},
    "inter": {8: 3, 16: 2, 7: 1, 13: 1, 24: 1, 40: 1},
    "routing": {"random": 4, "one": 1, "empty": 1, "ties": 1, "zero": 1},
    "mode": {"eval": 4, "train": 1, "dynamic": 2, "recompile": 1},
    "around": {"nothing": 4, "residual": 1, "shared": 1, "logits": 1, "two_layers": 1},
    "rank": {"2d": 3, "3d": 2, "3d_kept": 1, "3d_first": 1},
    "inputs": {"tokens": 6, "projected": 1, "projected_inside": 1},
    "beside": {**dict.fromkeys(CONTEXTS, 0.4), "nothing": 6},
    "style": {0: 2, **dict.fromkeys(range(1, 24), 1.0)},
}


EQUAL = 0.15  # share of the cases where sizes tell no dimension from another
EQUAL_SIZES = (7, 8)


def _sizes(c: Case) -> bool:
    return c.top_k <= c.experts and not (c.tokens == 0 and c.mode in ("dynamic", "recompile"))


def _router(c: Case) -> bool:
    if c.router == "switch_top1":
        return c.top_k == 1
    if c.router == "two_heads":
        return c.top_k % 2 == 0 and c.rank != "3d_kept" and c.routing == "random"
    if c.router == "group_limited":
        return c.experts % 2 == 0 and c.top_k <= c.experts // 2 and c.rank != "3d_kept"
    if c.router == "external":
        plain = c.renormalise == "no" and c.routing == "random" and c.rank != "3d_kept"
        return plain and c.around in ("nothing", "residual", "shared")
    return True


def _expert(c: Case) -> bool:
    if c.layout in GLU_LAYOUTS and not c.glu:
        return False
    if c.expert == "three" and not FORMS[c.form].loop:
        return False
    return c.glu or c.activation != "clamped"


def _layout(c: Case) -> bool:
    form = FORMS[c.form]
    return (
        (not c.separate or form.loop) and (c.separate or not form.separate_only) and not (c.separate and c.transposed)
    )


def _weight(c: Case) -> bool:
    form = FORMS[c.form]
    if c.form == "llama4":
        return c.weight == "input" and c.router == "sigmoid" and c.renormalise == "no" and c.rank != "3d_kept"
    return c.weight != "input" or form.weighs_input


def _grouped_mm(c: Case) -> bool:
    """``torch._grouped_mm`` is traced in bfloat16 only, and wants rows that are multiples of 16 bytes."""
    fits = c.dtype == "bfloat16" and c.hidden % 8 == 0 and c.inter % 8 == 0 and c.experts > 1
    return not FORMS[c.form].grouped or fits


def _around(c: Case) -> bool:
    if c.around == "two_layers":
        # The second router reads rounded values: only there, in low precision, could a top-k fall otherwise.
        return c.dtype == "float32" and c.tokens <= 33 and c.routing == "random"
    return True


def _rank(c: Case) -> bool:
    return c.rank != "3d_kept" or FORMS[c.form].any_rank


def _inputs(c: Case) -> bool:
    return c.inputs != "projected_inside" or (FORMS[c.form].loop and c.around != "shared")


def _beside(c: Case) -> bool:
    """A diagonal and a stride want tokens; a second layer reads what the first one's context makes of its sum."""
    return c.beside == "nothing" or (c.tokens > 0 and c.around != "two_layers")


# Each with the axes that are drawn again where it does not hold.
CONSTRAINTS: tuple[tuple[Callable[[Case], bool], tuple[str, ...]], ...] = (
    (_rank, ("rank",)),
    (_inputs, ("inputs",)),
    (_weight, ("weight", "router", "renormalise", "rank")),
    (_layout, ("layout", "transposed")),
    (_expert, ("expert", "layout", "activation")),
    (_grouped_mm, ("dtype", "hidden", "inter", "experts")),
    (_around, ("around", "dtype", "tokens", "routing")),
    (_router, ("router", "renormalise", "experts", "top_k", "rank", "routing", "around")),
    (_sizes, ("experts", "top_k", "tokens", "mode")),
    (_beside, ("beside",)),
)


def valid(case: Case) -> bool:
    """Whether the axes go together."""
    return all(holds(case) for holds, _ in CONSTRAINTS)


def draw(seed: int, loops: bool = False, form: str | None = None) -> Case:
    """The case of a seed; forms that Dynamo cannot capture by itself only with ``loops``."""
    rng = random.Random(seed)
    forms = [name for name, f in FORMS.items() if loops or not f.needs_loops]
    chosen = form if form is not None else rng.choice(forms)
    wrong: Iterable[str] = [axis for axis in AXES if axis != "form"]
    case = Case(form=chosen, seed=seed)
    while wrong:
        picked = {axis: rng.choices(list(AXES[axis]), list(AXES[axis].values()))[0] for axis in wrong}
        case = replace(case, **picked)
        wrong = next((axes for holds, axes in CONSTRAINTS if not holds(case)), ())
    equal = rng.choice(EQUAL_SIZES)
    square = replace(case, tokens=equal, hidden=equal, inter=equal, experts=equal)
    return square if rng.random() < EQUAL and valid(square) else case


def must_match(case: Case) -> bool:
    """Whether a rewrite is expected; otherwise a refusal is as good, as long as no number is wrong."""
    excused = (
        case.mutation != "none",
        case.router in ("external", "two_heads"),  # a token may name one expert twice
        case.expert == "three",
        case.experts == 1,
        case.tokens == 0,
        not CONTEXTS[case.beside].rewritten,
        # a weight that the experts share is taken out of them only where each sees all tokens, not where it sees rows
        case.inputs == "projected_inside" and not case.form.startswith(("dense_", "stack_")),
        case.inputs == "projected_inside" and case.around == "two_layers",  # MC203: what is projected is used elsewhere
        case.weight == "input" and (case.bias or case.activation == "unknown"),  # zero rows need not map to zero
    )
    return not any(excused)


def from_dict(values: dict[str, Any]) -> Case:
    """A case from axis values, the rest at their defaults; unknown axes are an error."""
    known = {f.name for f in fields(Case)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown axes: {', '.join(unknown)}")
    return replace(Case(), **values)


def changed(case: Case) -> dict[str, Any]:
    """The axes that differ from their defaults, and the seed."""
    default = Case()
    return {f.name: getattr(case, f.name) for f in fields(Case) if getattr(case, f.name) != getattr(default, f.name)}
