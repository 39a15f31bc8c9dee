"""All base programs; what each step means stands in steps.py."""

from __future__ import annotations

from batched import AllBmm, AllEinsum, BatchedMM, Gathered, Grouped
from steps import Base, BoolMask, Dense, Rows, Stacked, StackGather, Where, tokens

BASES = (Dense, Where, Stacked, BoolMask, StackGather, Gathered, BatchedMM, AllEinsum, AllBmm, Grouped)
MODULES = (Dense, Where, BoolMask, StackGather)  # a ModuleList of experts
LOOPS = (Dense, Where, Stacked, BoolMask)  # one step per expert, one after the other

__all__ = [
    "BASES", "LOOPS", "MODULES", "AllBmm", "AllEinsum", "Base", "BatchedMM", "BoolMask", "Dense", "Gathered", "Grouped",
    "Rows", "StackGather", "Stacked", "Where", "tokens",
]  # fmt: skip
