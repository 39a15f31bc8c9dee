"""How near misses of layers with fp8 weights are written: a form with one thing changed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from fp8_layers import build, stays, tokens
from torch import Tensor, nn

SQUARE = {"way": "block", "hidden": 256, "inter": 256}
CHANNEL = {"way": "channel", "hidden": 24, "inter": 16}
SMALL = {"way": "tensor", "hidden": 24, "inter": 16}


class Near(NamedTuple):
    """A form with some methods and tensors changed; ``tensors`` are new ones, or the shapes of new scales."""

    form: Any
    said: str
    changes: dict[str, Any]
    tensors: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    code: str = "MC408"
    dtype: torch.dtype = torch.float32

    def layer(self) -> Any:
        made = build(type("Near", (self.form,), self.changes), self.dtype, **self.options)
        for name, tensor in self.tensors.items():
            given = tensor if isinstance(tensor, Tensor) else torch.rand(tensor) + 0.5
            setattr(made, name, nn.Parameter(given, requires_grad=False))
        return made

    def stays(self) -> None:
        """Assert that the layer is refused for what is said, and computes as before."""
        layer = self.layer()
        stays(layer, tokens(layer, dtype=self.dtype), self.code, self.said)


def picked(scale: Any) -> dict[str, Any]:
    """Gathered weights times ``scale(the stack of scales, ids)``."""

    def method(self: Any, name: str, ids: Tensor, x: Tensor) -> Tensor:
        return getattr(self, f"w{name}")[ids].to(x.dtype) * scale(getattr(self, f"s{name}"), ids)

    return {"picked": method}


def row(scale: Any) -> dict[str, Any]:
    """The weight of an expert times ``scale(layer, the stack of scales, e)``."""

    def method(self: Any, name: str, e: int, x: Tensor) -> Tensor:
        return self.wide(getattr(self, f"w{name}")[e], scale(self, getattr(self, f"s{name}"), e), x)

    return {"row": method}


def wide(product: Any) -> dict[str, Any]:
    return {"wide": lambda self, w, s, x: product(w, s, x)}
