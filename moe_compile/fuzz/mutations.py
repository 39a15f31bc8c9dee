"""Near misses: small changes of a program's text. Each must be refused, or be numerically equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .mutation import Mutation
from .mutation import m as _m
from .slips import SLIPS
from .writes import WRITES

if TYPE_CHECKING:
    from .axes import Case

_ROUTED = "weights, ids = self.router(x)\n"
_LOOP = "for e in range(self.num_experts):"

MUTATIONS: dict[str, Mutation] = {
    # ids and loop bounds
    "ids are shifted": _m(("ids == e", "ids == (e + 1) % self.num_experts"), ("mask[e]", "mask[e - 1]")),
    "the last expert is skipped": _m((_LOOP, "for e in range(self.num_experts - 1):")),
    "the first expert is skipped": _m((_LOOP, "for e in range(1, self.num_experts):")),
    "an expert comes twice": _m((_LOOP, "for e in [*range(self.num_experts), 0]:")),
    "experts in reverse": _m((_LOOP, "for e in reversed(range(self.num_experts)):")),
    "another expert's weights": _m(
        ("self.experts[e](", "self.experts[e - 1]("), ("self.expert(e, ", "self.expert((e + 1) % self.num_experts, ")
    ),
    "another expert's bias": _m(("self.b2[e]", "self.b2[e - 1]"), ("self.b1[e]", "self.b1[e - 1]")),
    "a negative mask": _m(("ids == e", "ids != e")),
    "ids as truth values": _m(("ids == e", "ids.bool().long() == e"), ("self.w2[ids]", "self.w2[ids.bool().long()]")),
    "ids are at least e": _m(("ids == e", "ids >= e")),
    # routing weights
    "weights of another token": _m(
        ("weights * (ids == e)", "weights.roll(e, 0) * (ids == e)"),
        ("weights[token, slot", "weights.roll(e, 0)[token, slot"),
        ("weights.unsqueeze(-1)", "weights.roll(1, 0).unsqueeze(-1)"),
        ("weights.reshape(-1)", "weights.roll(1, 0).reshape(-1)"),
    ),
    "weights of another slot": _m(
        ("weights[token, slot", "weights.flip(-1)[token, slot"),
        ("weights.unsqueeze(-1)", "weights.flip(-1).unsqueeze(-1)"),
        ("weights * (ids == e)", "weights.flip(-1) * (ids == e)"),
        ("scatter(-1, ids, weights)", "scatter(-1, ids, weights.flip(-1))"),
    ),
    "ids of another slot": _m(
        ("ids == e", "ids.flip(-1) == e"),
        ("self.w2[ids]", "self.w2[ids.flip(-1)]"),
        ("self.w2[flat]", "self.w2[flat.flip(0)]"),
        ("F.one_hot(ids,", "F.one_hot(ids.flip(-1),"),
    ),
    "squared weights": _m(
        ("weights * (ids", "weights * weights * (ids"),
        ("weights[token, slot", "(weights * weights)[token, slot"),
        ("scatter(-1, ids, weights)", "scatter(-1, ids, weights * weights)"),
    ),
    "a threshold on the weights": _m(
        (
            "weights, ids = self.router(x)\n",
            "weights, ids = self.router(x)\n        weights = weights * (weights > 0.3)\n",
        )
    ),
    "weights read by token and token": _m(("weights[token, slot", "weights[token, token % self.top_k")),
    "the smallest scores": _m(
        ("torch.topk(scores, self.top_k, dim=-1)", "torch.topk(scores, self.top_k, dim=-1, largest=False)")
    ),
    "scattered over the tokens": _m(("(ids == e)).sum(-1, keepdim=True)", "(ids == e)).sum(0)[None, :1]")),
    # rows
    "rows of another token": _m(
        ("x[token]", "x[(token + 1) % x.shape[0]]"),
        ("x[None, token]", "x[None, token - 1]"),
        ("x[m]", "x.roll(1, 0)[m]"),
    ),
    "rows of the slot": _m(
        ("x[token]", "x[slot]"), ("x.index_select(0, token)", "x.index_select(0, order % x.shape[0])")
    ),
    "added to another token": _m(
        ("index_add_(0, token", "index_add_(0, (token + 1) % x.shape[0]"),
        ("index_add(0, token", "index_add(0, (token + 1) % x.shape[0]"),
    ),
    "a capacity": _m(
        ("token, slot = torch.where(ids == e)", "token, slot = (i[:2] for i in torch.where(ids == e))"),
        ("slot, token = torch.where(mask[e])", "slot, token = (i[:2] for i in torch.where(mask[e]))"),
    ),
    "tokens in rounds": _m(
        ("x.repeat_interleave(self.top_k, dim=0)", "x.repeat(self.top_k, 1)"),
        ("order // self.top_k", "order % x.shape[0]"),
    ),
    "pairs in rounds": _m(
        (".view(x.shape[0], self.top_k, -1).sum(dim=1)", ".view(self.top_k, x.shape[0], -1).sum(dim=0)")
    ),
    "another order of the outputs": _m(("y[torch.argsort(order)]", "y[order]"), ("y[inverse]", "y[order]")),
    "the sort descends": _m(
        ("flat.argsort()", "flat.argsort(descending=True)"),
        ("torch.argsort(flat, stable=True)", "torch.argsort(flat, stable=True, descending=True)"),
    ),
    "offsets of other ids": _m(
        ("torch.bincount(flat,", "torch.bincount((flat + 1) % self.num_experts,"),
        ("F.one_hot(flat,", "F.one_hot((flat + 1) % self.num_experts,"),
        ("right=True", "right=False"),
        ("max=self.num_experts - 1", "max=self.num_experts"),
    ),
    # accumulation and combine
    "starts from ones": _m(
        ("torch.zeros_like(x)", "torch.ones_like(x)"), ("x.new_zeros(x.shape)", "x.new_ones(x.shape)")
    ),
    "starts from the input": _m(("torch.zeros_like(x)", "x.clone()"), ("x.new_zeros(x.shape)", "x + 0.5")),
    "accumulates into the input": _m(("out = torch.zeros_like(x)", "out = x")),
    "alpha is two": _m(("index_add_(0, token, y", "index_add_(0, token, y, alpha=2"), ("out.add(", "out.add(2 * ")),
    "assigned, not added": _m(
        ("out[token] +=", "out[token] ="),
        ("out[m] +=", "out[m] ="),
        ("out.index_add_(0, token, y)", "out.index_copy_(0, token, y)"),
    ),
    "absolute values are summed": _m(("out = out + ", "out = out.abs() + "), ("out += ", "out = out.abs() + ")),
    "the mean over slots": _m((".sum(dim=1)", ".mean(dim=1)"), (".sum(1)", ".mean(1)")),
    "scaled afterwards": _m(("return out\n", "return out * 0.5\n")),
    "a bias afterwards": _m(("return out\n", "return out + x.mean(-1, keepdim=True)\n")),
    "a padding mask afterwards": _m(("return out\n", "return out * (x[..., :1] > 0)\n")),
    "the sum in between": _m((_LOOP + "\n", _LOOP + "\n            x = x + 0.1 * out\n")),
    # inside the expert
    "one expert doubles": _m(
        ("(self, e, x):\n", "(self, e, x):\n        x = 2 * x if e == 1 else x\n"),
        ("self.experts[e](", "(2 if e == 1 else 1) * self.experts[e]("),
    ),
    "another activation in one": _m(
        ("F.silu(gate)", "(F.gelu(gate) if e == 1 else F.silu(gate))"),
        ("F.relu(gate)", "(F.gelu(gate) if e == 1 else F.relu(gate))"),
    ),
    "dropout": _m(("return y\n", "return F.dropout(y, 0.5, True)\n"), refuse=True),
    "a norm per expert": _m(("return y\n", "return F.normalize(y, dim=-1)\n")),
    "a norm inside": _m(("h = F.silu(gate)", "gate = F.normalize(gate, dim=-1)\n        h = F.silu(gate)")),
    "a mean over rows": _m(
        ("        y = self.w2(h)\n", "        y = self.w2(h - h.mean(0, keepdim=True))\n"),
        ("up = self.w3(x)\n", "up = self.w3(x).mean(0, keepdim=True)\n"),
    ),
    "the input bypasses": _m(("return y\n", "return y + x\n")),
    "an inner residual": _m(("        y = self.w2(h)\n", "        y = self.w2(h) + self.w2(h * h)\n")),
    "halves swapped": _m(("gate, up = h", "up, gate = h")),
    "halves of the wrong size": _m(
        (
            "gate, up = h.chunk(2, dim=-1)",
            "gate, up = h[..., :-1], h[..., 1:]\n        gate, up = gate[..., ::2], up[..., ::2]",
        )
    ),
    "interleaved the other way": _m(("h[..., ::2], h[..., 1::2]", "h[..., 1::2], h[..., ::2]")),
    "gate and up swapped": _m(("F.silu(gate) * up", "gate * F.silu(up)"), ("F.relu(gate) * up", "gate * F.relu(up)")),
    "rounded inside": _m(("h = F.silu(gate)", "gate = gate.to(torch.int32).to(x.dtype)\n        h = F.silu(gate)")),
    "another dtype inside": _m(
        ("h = F.silu(gate)", "gate = gate.to(torch.float8_e4m3fn).to(x.dtype)\n        h = F.silu(gate)")
    ),
    "the activation cuts off": _m(
        ("F.silu(gate)", "F.silu(gate.clamp(-0.5, 0.5))"), ("F.relu(gate)", "F.relu6(gate * 9)")
    ),
    "a bias after the weight": _m(("out.index_add_(0, token, y", "out.index_add_(0, token, 0.1 + y")),
    # weights
    "two experts share": _m(
        ("range(self.num_experts))\n", "range(self.num_experts))\n        self.experts[-1] = self.experts[0]\n")
    ),
    "a weight is written": _m((_LOOP + "\n", _LOOP + "\n            self.w2[e].mul_(1.01)\n")),
    "the input is written": _m((_LOOP + "\n", _LOOP + "\n            x.mul_(1.01)\n")),
    "transposed though square": _m(("self.w2[e])\n", "self.w2[e].t())\n"), ("self.w2[ids])", "self.w2[ids].mT)")),
    "weights scaled on the way": _m(
        ("self.w2[e]", "(self.w2[e] * 2)"),
        ("self.w2[ids]", "(self.w2 * 2)[ids]"),
        ("self.w2[flat]", "self.w2.flip(0)[flat]"),
    ),
    "stack reordered": _m(
        ("self.w2.transpose(1, 2)", "self.w2.flip(0).transpose(1, 2)"),
        ("self.w1[ids]", "self.w1.roll(1, 0)[ids]"),
        ("self.w13[ids]", "self.w13.roll(1, 0)[ids]"),
    ),
    # writes through views
    "weights are written before": _m(
        (_ROUTED, _ROUTED + "        weights = weights * 1\n        weights[..., 0].mul_(0.5)\n")
    ),
    "weights are written in the loop": _m((_LOOP + "\n", _LOOP + "\n            weights[..., 0].mul_(1.1)\n")),
    "ids are written before": _m(
        (_ROUTED, _ROUTED + "        ids = ids.clone()\n        ids[..., 0] = ids[..., -1]\n")
    ),
    "ids are written in the loop": _m((_LOOP + "\n", _LOOP + "\n            ids[..., 0].clamp_(max=e)\n")),
    "tokens are written after the routing": _m((_ROUTED, _ROUTED + "        x = x.clone()\n        x[..., 0] = 1.0\n")),
    # observers
    "an output is kept": _m(("return y\n", "self.kept = y\n        return y\n")),
    "the last output is used": _m(("return out\n", "return out + y.mean()\n")),
    **WRITES,
    **SLIPS,
}


def applicable(source: str) -> list[str]:
    """The mutations that change a program's text."""
    return [name for name, m in MUTATIONS.items() if any(old in source for old, _ in m.changes)]


def mutated(source: str, name: str) -> str:
    """``source`` with one mutation, unchanged for "none" or where it does not apply."""
    if name == "none":
        return source
    mutation = MUTATIONS[name]
    for old, new in mutation.changes:
        if old in source:
            source = source.replace(old, new)
            for also, by in mutation.also:
                source = source.replace(also, by)
            return source
    return source


def sizes(case: Case, name: str) -> dict[str, Any]:
    """The axes that a mutation needs to have a meaning, for a case."""
    axes = case.axes()
    needed = {axis: axes.get(str(value), value) for axis, value in MUTATIONS[name].sizes}
    return {**needed, "mode": "eval", "rank": "2d"} if "tokens" in needed else needed
