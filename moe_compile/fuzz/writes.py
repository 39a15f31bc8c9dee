"""Near misses that write into what a layer reads or makes: every way of writing, at every place."""

from __future__ import annotations

from collections.abc import Callable

from .contexts import with_op
from .mutation import Change, Mutation, before, before_activation, in_loop

# How a tensor comes to be written: PyTorch ops that no table of views or of in-place ops lists, and a user's op.
WAYS: dict[str, str] = {
    "through a list": "torch._foreach_mul_([{0}], 1.2)",
    "through two lists": "torch._foreach_copy_([{0}], [{0} * 1.2])",
    "as out=": "torch.mul({0}, 1.2, out={0}.view_as({0}))",
    "by a user's op": "scale_({0}, 1.2)",
    "through a diagonal": "{0}.diagonal().mul_(3)",
    "through as_strided": "{0}.as_strided(({0}.shape[-1],), ({0}.stride(-1),)).mul_(3)",
    "through unfold": "{0}.unfold(-1, 1, 1).mul_(1.2)",
    "through split": "{0}.tensor_split(2, dim=-1)[0].mul_(3)",
    "by index": "{0}.index_fill_(-1, torch.zeros(1, dtype=torch.long, device=x.device), 0.5)",
    "by a mask": "{0}.masked_fill_({0} > 0.3, 0.1)",
    "by an activation": "F.threshold({0}, 0.3, 0.1, inplace=True)",
}

# What is written, and where: a way of writing it -> the alternatives in a program's text.
PLACES: dict[str, Callable[[str], tuple[Change, ...]]] = {
    "weights, in the loop": lambda way: in_loop(way.format("weights")),
    "tokens, in the loop": lambda way: in_loop(way.format("x")),
    "tokens, between the projections": lambda way: (before("up = ", way.format("x")),),
    "the sum, in the loop": lambda way: in_loop(way.format("out")),
    "the sum, behind the layer": lambda way: (before("return out", way.format("out")),),
    "the gate, before its activation": lambda way: before_activation(way.format("gate")),
    "the output of an expert": lambda way: (before("return y\n", way.format("y")), before("out = ", way.format("y"))),
}


def _write(place: str, way: str) -> Mutation:
    return Mutation(PLACES[place](WAYS[way]), also=with_op(WAYS[way]))


WRITES: dict[str, Mutation] = {
    **{f"written {way}: {place}": _write(place, way) for place in PLACES for way in WAYS},
    "written through a list: ids": Mutation(in_loop("torch._foreach_clamp_max_([ids], e)")),
    "written as out=: ids": Mutation(in_loop("torch.clamp(ids, max=e, out=ids.view_as(ids))")),
    "written through a diagonal: ids": Mutation(in_loop("ids.diagonal().clamp_(max=e)")),
}
