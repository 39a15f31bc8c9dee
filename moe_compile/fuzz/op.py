"""A user's op that programs call: defined once, for PyTorch crashes where an op is called that was defined again."""

from __future__ import annotations

import torch


@torch.library.custom_op("moe_fuzz::scale_", mutates_args=("values",))
def scale_(values: torch.Tensor, by: float) -> None:
    """Only its schema says that it writes."""
    values.mul_(by)
