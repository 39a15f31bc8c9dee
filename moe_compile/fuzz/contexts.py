"""What stands inside a layer beside its experts and does them no harm: writes into tensors that they do not read."""

from __future__ import annotations

from dataclasses import dataclass

from .mutation import Change

_IMPORT = "from torch.nn import functional as F\n"
_OP = "from moe_compile.fuzz.op import scale_\n"


def with_op(text: str) -> tuple[Change, ...]:
    """The change that imports the user's op in a program's text, where ``text`` calls it."""
    return ((_IMPORT, f"{_IMPORT}\n{_OP}"),) if "scale_(" in text else ()


@dataclass(frozen=True)
class Context:
    """Lines before the routing, between the routing and the experts, and behind the sum; and in ``__init__``."""

    before: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    init: tuple[str, ...] = ()
    rewritten: bool = True  # whether the layer must be rewritten all the same


def _copy(write: str) -> Context:
    """A copy of the tokens, written while the layer runs, and added at the end."""
    return Context(("kept = x.clone()",), (write,), ("out = out + kept",))


CONTEXTS: dict[str, Context] = {
    "nothing": Context(),
    "a copy written": _copy("kept.mul_(2)"),
    "a list": _copy("torch._foreach_add_([kept, torch.ones_like(x)], 1.0)"),
    "a list behind": Context(
        after=("kept = [out * 2, x + 1]", "torch._foreach_mul_(kept, 0.5)", "out = kept[0] + kept[1]")
    ),
    "an own buffer as out=": Context(
        ("kept = torch.empty_like(x)",), ("torch.mul(x, 2, out=kept)",), ("out = out + kept",)
    ),
    "a diagonal": _copy("kept.diagonal().mul_(3)"),
    "as_strided": _copy("kept.as_strided((x.shape[-1],), (1,)).mul_(3)"),
    "a user's op": _copy("scale_(kept, 2.0)"),
    "a copy of the weights": Context(
        between=("kept = weights.clone()", "kept.diagonal().mul_(3)"),
        after=("out = out + kept.sum(-1, keepdim=True).to(x.dtype)",),
    ),
    "a count of tokens": Context(
        between=("self.seen.add_(F.one_hot(ids, self.num_experts).flatten(0, -2).sum(0))",),
        init=('self.register_buffer("seen", torch.zeros({experts}))',),
    ),
    "the sum through a list": Context(after=("torch._foreach_mul_([out], 0.5)",), rewritten=False),
    "the sum's diagonal": Context(after=("out.diagonal().mul_(3)",), rewritten=False),
    "the sum as out=": Context(after=("torch.mul(out, 0.5, out=out)",), rewritten=False),
}
