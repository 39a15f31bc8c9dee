"""The base programs that mutators change: one layer per naive form, with every step a method to override.

The steps that all bases share: ``route`` (weights and ids), ``source`` (what experts read), ``activate`` (between the
projections), ``output`` (after the down projection) and ``finish`` (after the sum). ``e`` is the expert's number in a
loop and None where one operation serves all experts; there ``chosen(e)`` masks the values of expert ``e``.
"""

from __future__ import annotations

import torch
from moe_compile.patterns._examples import GatedMLP, Layer
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {"hidden": 8, "inter": 16, "experts": 3, "top_k": 2}
TOKENS = 5


class Base(Layer):
    """Steps of every base; ``form`` is the form that the plain base is rewritten by."""

    form = ""
    separate = False  # whether gate and up are two projections
    remembers = False  # whether ``chosen`` is asked for: attributes set while tracing become outputs of the graph

    def __init__(self, **sizes):
        super().__init__(**(SIZES | sizes))
        self.build()

    def build(self):
        raise NotImplementedError

    def route(self, x):
        return self.router(x)

    def source(self, x, e, out=None):
        return x

    def split(self, h):
        """The fused projection ``[.., 2I]`` as gate and up."""
        return h.chunk(2, dim=-1)

    def activate(self, gate, up, e):
        return F.silu(gate) * up

    def output(self, y, e):
        return y

    def start(self, x):
        return torch.zeros_like(x)

    def finish(self, out, x):
        return out

    def mix(self, x, w, ids):
        raise NotImplementedError

    def chosen(self, e):
        raise NotImplementedError

    def forward(self, x):
        w, ids = self.route(x)
        return self.finish(self.mix(x, w, ids), x)


class Looped(Base):
    """A Python loop over the experts."""

    separate = True

    def build(self):
        self.mlps = nn.ModuleList(GatedMLP(self.hidden, self.inter) for _ in range(self.experts))

    def order(self):
        return list(enumerate(self.mlps))

    def expert(self, mlp, x, e):
        return self.output(mlp.w2(self.activate(mlp.w1(x), mlp.w3(x), e)), e)

    def name(self, e):
        """The id that expert ``e`` answers to."""
        return e

    def step(self, out, x, w, ids, e, mlp):
        raise NotImplementedError

    def mix(self, x, w, ids):
        out = self.start(x)
        for e, mlp in self.order():
            out = self.step(out, x, w, ids, e, mlp)
        return out


class Dense(Looped):
    """Every expert on every token, then a masked sum."""

    form = "dense_loop"

    def weight(self, w, ids, e):
        return (w * (ids == self.name(e))).sum(-1, keepdim=True)

    def add(self, out, y, token=None):
        return out + y

    def step(self, out, x, w, ids, e, mlp):
        return self.add(out, self.weight(w, ids, e) * self.expert(mlp, self.source(x, e, out), e))


class Where(Looped):
    """Each expert on the token-slot pairs of its mask, added back by ``index_add_``."""

    form = "index_add_loop"

    def pick(self, ids, e):
        return torch.where(ids == self.name(e))

    def read(self, x, token):
        return x[token]

    def weight(self, w, token, slot):
        return w[token, slot, None]

    def add(self, out, y, token):
        return out.index_add_(0, token, y)

    def step(self, out, x, w, ids, e, mlp):
        token, slot = self.pick(ids, e)
        y = self.expert(mlp, self.read(self.source(x, e, out), token), e)
        return self.add(out, y * self.weight(w, token, slot), token)


class Rows:
    """Row ``e`` of stacked weights, with the calls of a ``GatedMLP``."""

    def __init__(self, layer, e):
        self.layer, self.e = layer, e

    def w1(self, x):
        return self.layer.split(F.linear(x, self.layer.w13[self.e]))[0]

    def w3(self, x):
        return self.layer.split(F.linear(x, self.layer.w13[self.e]))[1]

    def w2(self, h):
        return F.linear(h, self.layer.w2[self.e])


class Stacked(Where):
    """The same loop over the rows of stacked weights, gate and up fused."""

    separate = False

    def build(self):
        self.w13 = self.stack(2 * self.inter, self.hidden)
        self.w2 = self.stack(self.hidden, self.inter)

    def order(self):
        return [(e, Rows(self, e)) for e in range(self.experts)]

    def expert(self, mlp, x, e):
        gate, up = self.split(F.linear(x, self.w13[mlp.e]))
        return self.output(mlp.w2(self.activate(gate, up, e)), e)


class BoolMask(Looped):
    """Each expert on the tokens of a boolean mask, rows assigned back."""

    form = "bool_mask_loop"

    def pick(self, ids, e):
        return (ids == self.name(e)).any(dim=-1)

    def read(self, x, token):
        return x[token]

    def weight(self, w, ids, e, m):
        return (w * (ids == self.name(e))).sum(dim=-1)[m, None]

    def add(self, out, y, token):
        out[token] += y
        return out

    def step(self, out, x, w, ids, e, mlp):
        m = self.pick(ids, e)
        y = self.expert(mlp, self.read(self.source(x, e, out), m), e)
        return self.add(out, y * self.weight(w, ids, e, m), m)


class StackGather(Looped):
    """Every expert on every token, stacked, then the chosen outputs."""

    form = "stack_gather"

    def names(self, ids):
        return ids

    def combine(self, chosen, w):
        return (chosen * w.unsqueeze(-1)).sum(dim=1)

    def mix(self, x, w, ids):
        ys = torch.stack([self.expert(mlp, self.source(x, e), e) for e, mlp in self.order()], dim=1)
        index = self.names(ids).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return self.combine(ys.gather(1, index), w)


def tokens(layer: Base, count: int = TOKENS) -> Tensor:
    """Random hidden states ``[T, H]`` for a layer, in the dtype of its experts."""
    dtypes = [p.dtype for name, p in layer.named_parameters() if not name.startswith("router")]
    return torch.randn(count, layer.hidden, dtype=dtypes[-1] if dtypes else torch.float32)
