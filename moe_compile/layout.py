"""How the result of a layer lies in memory: as the original's does, for what comes after may look.

``torch.zeros_like(x)`` keeps the strides of a transposed ``x``, and a later ``view`` or ``as_strided`` reads them. The
op returns rows one after the other; anything dense is one permutation and one copy away from that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor, fx

from .canonical import value
from .match.facts import refuse
from .match.labels import same


def memory_order(node: fx.Node) -> tuple[int, ...]:
    """The dimensions of a dense value from the slowest to the fastest; ``(0, 1, ..)`` is row-major.

    Raises:
        NoMatch: MC407 when the value has gaps or overlaps.
    """
    tensor: Tensor = value(node)
    shape, strides = tensor.shape, tensor.stride()
    real = [d for d, size in enumerate(shape) if not same(size, 1)]  # the stride of a size of one means nothing
    if same(tensor.numel(), 0):
        return tuple(range(len(shape)))
    for order in itertools.permutations(real):
        expected = 1
        for d in reversed(order):
            if not same(strides[d], expected):
                break
            expected = expected * shape[d]
        else:
            places = iter(order)
            return tuple(next(places) if d in real else d for d in range(len(shape)))
    raise refuse(
        "MC407", f"the result of shape {tuple(shape)} is stored with strides {tuple(strides)}, which leave gaps", node
    )


def is_row_major(order: tuple[int, ...]) -> bool:
    """Whether every dimension is faster than those before it."""
    return order == tuple(range(len(order)))


def order_of_result(output: fx.Node, aliases: Iterable[fx.Node]) -> tuple[int, ...]:
    """The memory order of a layer's result.

    Raises:
        NoMatch: MC407 when it is not dense, or its buffer is also read in another order or shape.
    """
    order = memory_order(output)
    for alias in aliases:
        other = memory_order(alias)
        flat = is_row_major(other) and is_row_major(order)  # then another shape is another count of the same rows
        if other != order and not flat:
            raise refuse("MC407", f"the result is read in the order {order} and, as {alias.name}, in another", alias)
    return order
