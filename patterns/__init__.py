"""The naive forms, in the order in which they are tried. This list is the only registry.

A form is one file: what users write (``EXAMPLES``), the operations that may end it (``ANCHORS``, registered with
Inductor's PatternMatcherPass), the rules that only it needs (``RULES``) and ``match``, which proves a layer or
raises ``NoMatch``.
"""

from __future__ import annotations

from types import ModuleType

from . import (
    all_experts,
    bool_mask_loop,
    dense_loop,
    gathered_weights,
    grouped_mm,
    index_add_loop,
    pair_assign,
    slot_loop,
    sorted_groups,
    stack_gather,
)

FORMS: tuple[ModuleType, ...] = (
    sorted_groups,
    grouped_mm,
    slot_loop,
    index_add_loop,
    bool_mask_loop,
    dense_loop,
    pair_assign,
    stack_gather,
    gathered_weights,
    all_experts,
)


def name_of(form: ModuleType) -> str:
    """``dense_loop`` for ``moe_compile.patterns.dense_loop``."""
    return form.__name__.rpartition(".")[2]
