"""Pieces of program text that several forms share: experts, activations, weighted outputs, sums."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .axes import Case

Lines = list[str]
Project = Callable[[str, str, bool], str]  # (argument, role such as "1" or "13", is it the last map) -> expression


def indent(lines: Sequence[str]) -> Lines:
    """One level deeper."""
    return [f"    {line}" if line else "" for line in lines]


class Writer:
    """Writes the text of one case; ``pick`` chooses between spellings of the same meaning."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def pick(self, what: str, *spellings: str) -> str:
        """The spelling that the case's style gives ``what``; style 0 always takes the first."""
        style = self.case.style
        return spellings[zlib.crc32(f"{style} {what}".encode()) % len(spellings) if style else 0]

    # ---------------------------------------------------------------------------------- inside an expert

    def between(self, project: Project, source: str) -> Lines:
        """Lines from ``source`` through both projections to ``y``."""
        c = self.case
        if c.layout.endswith("_cat"):
            width = str(c.inter)
            halves = ("h.chunk(2, dim=-1)", f"(h[..., :{width}], h[..., {width}:])", f"h.split({width}, dim=-1)")
            lines = [f"h = {project(source, '13', False)}", f"gate, up = {self.pick('halves', *halves)}"]
        elif c.layout.endswith("_interleaved"):
            lines = [f"h = {project(source, '13', False)}", "gate, up = h[..., ::2], h[..., 1::2]"]
        else:
            lines = [f"gate = {project(source, '1', False)}"]
            if c.glu:
                lines.append(f"up = {project(source, '3', False)}")
        lines += self._activation()
        if c.expert == "three":
            lines.append(f"h = torch.relu({project('h', '4', False)})")
        return [*lines, f"y = {project('h', '2', True)}"]

    def _activation(self) -> Lines:
        c = self.case
        if c.activation == "clamped":
            low = self.pick("clamp", "min=-1.0, max=1.0", "-1.0, 1.0")
            glu = self.pick("swish", "gate * torch.sigmoid(gate * 1.702)", "gate * (1.702 * gate).sigmoid()")
            return [
                f"gate, up = gate.clamp({self.pick('clamp max', 'max=1.0', 'min=None, max=1.0')}), up.clamp({low})",
                f"h = {self.pick('clamped', f'(up + 1) * ({glu})', f'{glu} * (up + 1)', f'({glu}) * up + {glu}')}",
            ]
        if c.activation == "unknown":
            other = "torch.exp(-up.abs())" if c.glu else "torch.exp(-gate.abs())"
            return [f"h = torch.tanh(gate) * {other}"]
        act = self.pick(c.activation, *_ACTIVATIONS[c.activation])
        if not c.glu:
            return [f"h = {act}"]
        if self.pick("in place", "no", "no", "yes") == "yes":
            return [f"h = {act}", "h *= up"]
        return [f"h = {self.pick('product', f'{act} * up', f'up * ({act})')}"]

    # ---------------------------------------------------------------------------------- the routed sum

    def expert(self, state: str, e: str = "e") -> str:
        """A call of expert ``e`` on some rows."""
        return f"self.experts[{e}]({state})" if self.case.separate else f"self.expert({e}, {state})"

    def term(self, state: str, weight: str, e: str = "e") -> str:
        """The weighted output of expert ``e``."""
        kind = self.case.weight
        if kind == "input":
            return self.expert(f"{state} * {weight}", e)
        y = self.expert(state, e)
        product = self.pick("term", f"{y} * {weight}", f"{weight} * {y}")
        return f"({product}).to(x.dtype)" if kind == "fp32" else product

    def loop(self) -> str:
        numbered = "for e in range(self.num_experts):"
        if self.case.separate:
            other = "for e, _ in enumerate(self.experts):"
        else:
            other = "for e in list(range(self.num_experts)):"
        return self.pick("loop", numbered, f"for e in range({self.case.experts}):", numbered, other)

    def zeros(self) -> str:
        return self.pick(
            "zeros", "out = torch.zeros_like(x)", "out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)",
            "out = x.new_zeros(x.shape)",
        )  # fmt: skip

    def add(self, term: str) -> str:
        return self.pick(
            "add", f"out = out + {term}", f"out += {term}", f"out = {term} + out", f"out = out.add({term})"
        )

    def combine_matrix(self, name: str = "dense") -> Lines:
        """The router weights spread to ``[.., E]``."""
        lead = "*x.shape[:-1]" if self.case.rank == "3d_kept" else self.pick("tokens", "x.shape[0]", "x.size(0)")
        made = f"torch.zeros({lead}, self.num_experts, dtype=weights.dtype, device=x.device)"
        fill = self.pick(
            "scatter", "scatter(-1, ids, weights)", "scatter_(-1, ids, weights)", "scatter_add(-1, ids, weights)"
        )
        return [f"{name} = {made}.{fill}"]

    def cast(self, text: str) -> str:
        """``text`` back in the dtype of the tokens where the router weights are float32."""
        return f"({text}).to(x.dtype)" if self.case.weight == "fp32" else text

    def over_slots(self, y: str) -> str:
        """Outputs ``[T, K, H]`` times weights, summed over the slots."""
        options = [f"({y} * weights.unsqueeze(-1)).sum(dim=1)", f"({y} * weights[..., None]).sum(1)"]
        if self.case.weight != "fp32":  # a product of matrices takes one dtype
            options += [
                f'torch.einsum("tkh,tk->th", {y}, weights)', f"torch.bmm(weights.unsqueeze(1), {y}).squeeze(1)",
                f"(weights[:, None] @ {y}).squeeze(1)",
            ]  # fmt: skip
        return self.cast(self.pick("over slots", *options))


_ACTIVATIONS = {
    "silu": ("F.silu(gate)", "gate * torch.sigmoid(gate)", "nn.functional.silu(gate)", "gate / (1 + torch.exp(-gate))"),
    "gelu": ("F.gelu(gate)", "0.5 * gate * (1 + torch.erf(gate / 2**0.5))"),
    "gelu_tanh": ('F.gelu(gate, approximate="tanh")',
                  "0.5 * gate * (1 + torch.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3)))"),
    "relu": ("F.relu(gate)", "torch.relu(gate)", "gate.clamp(min=0)"),
    "relu2": ("F.relu(gate).square()", "torch.relu(gate) ** 2", "F.relu(gate).pow(2)"),
}  # fmt: skip
