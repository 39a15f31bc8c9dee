"""Scales of fp8 weights that the ids gather: which row belongs to which weight."""

from __future__ import annotations

import pytest
import torch
from scaling import E, K, q, read, wide
from torch import Tensor
from tracing import chosen, engine_of


def sorted_ids(ids: Tensor) -> Tensor:
    return ids.view(-1)[ids.view(-1).argsort()]


# name -> (product, shape of the weights, of the scales, of the ids, what is read)
GATHERED = {
    "by the same ids": (lambda w, s, ids, _: wide(w[ids]) * s[ids][..., None, None], (), (E,), (2, 2), (0, None, None)),
    "sorted": (
        lambda w, s, ids, _: wide(w[sorted_ids(ids)]) * s[sorted_ids(ids)][:, None, None],
        (), (E,), (2, 2), (0, None, None),
    ),
    "by other ids": (lambda w, s, _, ids: wide(w[_]) * s[ids][..., None, None], (), (E,), (2, 2), "MC408"),
    "turned": (lambda w, s, ids, _: wide(w[ids]) * s[ids].t()[..., None, None], (), (E,), (2, 2), "MC408"),
    "twice": (lambda w, s, ids, _: wide(w[ids]) * s[ids][ids][:, None, None], (E, E, K), (E,), (E,), "MC408"),
    "columns": (
        lambda w, s, ids, _: wide(w[ids]) * s.index_select(1, ids)[..., None], (E, E, K), (E, E), (E,), "MC408",
    ),
    "by two indices": (lambda w, s, ids, _: wide(w[ids]) * s[ids, ids][..., None], (E, E, K), (E, E), (E, E), "MC408"),
    "against the features": (lambda w, s, ids, _: wide(w[ids]) * s[ids], (E, E, E), (E,), (E, E), "MC408"),
    "of a number": (lambda w, s, ids, _: wide(w) * s.index_select(0, ids), (), (), (1,), "MC408"),
    "one token's": (lambda w, s, ids, _: wide(w[ids]) * s[ids][E][:, None, None], (), (E,), (7, 2), "MC408"),
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERED)
def test_gathered(name: str) -> None:
    fn, weight, scale, shape, found = GATHERED[name]
    inputs = dict(w_parameter=q(*weight), s_parameter=torch.zeros(scale), ids=chosen(*shape), others=chosen(*shape))
    engine, node = engine_of(fn, **inputs)
    fact = engine.fact(node)
    assert (fact.scales.axes if fact is not None else engine.misses[-1].error.code) == found


def test_columns_of_scales() -> None:
    """Scales stored ``[N, E]``, of which a column belongs to an expert."""
    assert read(lambda w, s: wide(w[1]) * s[:, 1][:, None], (E, E), (E, E, K)) == ((1, 0, None), (1, 1))

    def columns(w: Tensor, s: Tensor, ids: Tensor) -> Tensor:
        return wide(w[ids]) * s.t()[ids][..., None]

    def rows_of_columns(w: Tensor, s: Tensor, ids: Tensor) -> Tensor:
        return wide(w[ids]) * s[1][ids][..., None, None]

    inputs = dict(w_parameter=q(E, E, K), s_parameter=torch.zeros(E, E), ids=chosen(2, 2))
    engine, node = engine_of(columns, **inputs)
    assert engine.fact(node).scales.axes == (1, 0, None)
    engine, node = engine_of(rows_of_columns, **inputs)
    assert engine.fact(node) is None
