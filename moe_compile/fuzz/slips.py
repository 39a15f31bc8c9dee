"""Near misses that read the right tensors in a wrong way: turned, cut short, repeated, rounded, in another order."""

from __future__ import annotations

from .mutation import Mutation, before_activation, everywhere, in_loop, m, routed

_INSIDE = "(self, e, x):\n        x = "
_PAIR = "weights[token, slot"
_MASKED = "weights * (ids == e)"
_WHERE = "torch.where(ids == e, weights, 0.0)"
_ROWS = "torch.where(ids == e)"
_HALF_TWICE = (
    "even = torch.arange(ids.shape[0], device=ids.device)[:, None] % 2 == 0\n"
    "        ids = torch.where(even, ids[..., :1].expand_as(ids), ids)"
)
_TOKENS, _CHOICES = (("tokens", "hidden"),), (("tokens", "top_k"),)
_EXPERTS, _MANY = (("tokens", "experts"),), (("experts", 280), ("tokens", 129))
_SQUARE = (("inter", "hidden"),)
_FLAT = (("rank", "2d"), ("around", "nothing"))
_ARANGE = "torch.arange(self.num_experts, device=x.device)"

SLIPS: dict[str, Mutation] = {
    # a projection that the experts share
    "the input beside its projection": m(
        ("x = self.project(x)\n", "tokens, x = x, self.project(x)\n"),
        also=tuple(
            (f"up = {old}", f"up = {new}")
            for old, new in (
                ("self.w3(x)", "self.w3(tokens)"), ("F.linear(x, ", "F.linear(tokens, "), ("x @ ", "tokens @ "),
                ('torch.einsum("tb,tkab->tka", x,', 'torch.einsum("tb,tkab->tka", tokens,'),
                ('torch.einsum("tb,eab->tea", x,', 'torch.einsum("tb,eab->tea", tokens,'),
            )
        ),
    ),
    "one expert reads another projection": m((f"{_INSIDE}self.project(x)\n",
                                              f"{_INSIDE}F.silu(self.project(x)) if e == 1 else self.project(x)\n")),
    "the projection in one expert only": m((f"{_INSIDE}self.project(x)\n",
                                            f"{_INSIDE}self.project(x) if e == 1 else x\n")),
    "the projection bent": m(("x = self.project(x)\n", "x = F.silu(self.project(x))\n")),
    "the projection turned": m(("self.project(x)\n", "self.project.weight @ x.t()\n"), sizes=_TOKENS),
    "the projection turned in and out": m(("self.project(x)\n", "self.project(x.t()).t()\n"), sizes=_TOKENS),
    "the projection turned and back": m(
        ("self.project(x)\n", 'torch.einsum("th,ph->pt", x, self.project.weight).t()\n'), sizes=_TOKENS, same=True
    ),
    # written inside the layer and needed behind it
    "the spread weights read behind": m(
        ("scatter_(-1, ids, weights)\n", "scatter_(-1, ids, weights)\n        dense = dense * 1.5\n"),
        ("ids] = weights\n", "ids] = weights\n        dense = dense * 1.5\n"),
        also=(("return out\n", "return out + dense.sum(0).mean()\n"),),
    ),
    # turned where sizes are equal
    "tokens read as features": m(*routed("x = x.t()"), sizes=_TOKENS),
    "the sum turned": m(("return out\n", "return out.t()\n"), sizes=_TOKENS),
    "weights turned": m(*routed("weights = weights.t()"), sizes=_CHOICES),
    "ids turned": m(*routed("ids = ids.t()"), sizes=_CHOICES),
    "ids and weights turned": m(*routed("weights, ids = weights.t(), ids.t()"), sizes=_CHOICES),
    "the mask turned": m((_ROWS, "torch.where((ids == e).t())"), (_MASKED, "weights * (ids == e).t()"), sizes=_CHOICES),
    "summed over the tokens": m((" * weights.unsqueeze(-1)).sum(dim=1)", " * weights.unsqueeze(-1)).sum(dim=0)"),
                                (" * weights[..., None]).sum(1)", " * weights[..., None]).sum(0)"),
                                ("self.top_k, -1).sum(dim=1)", "self.top_k, -1).sum(dim=0)"),
                                ('"tkh,tk->th"', '"tkh,tk->kh"'), sizes=_CHOICES),
    "the combine matrix turned": m(("dense.t()", "dense"), ("combine.t()", "combine"), ('h,te->th"', 'h,et->th"'),
                                   ("dense[:, e : e + 1]", "dense.t()[:, e : e + 1]"), sizes=_EXPERTS),
    "outputs stacked the other way": m(
        ("range(self.num_experts)], dim=1)", "range(self.num_experts)], dim=0)"), sizes=_EXPERTS
    ),
    "summed over the other dimension": m(
        ("combine.unsqueeze(-1)).sum(dim=1)", "combine.unsqueeze(-1)).sum(dim=0)"),
        ("combine.t().unsqueeze(-1)).sum(dim=0)", "combine.t().unsqueeze(-1)).sum(dim=1)"),
        ("dense.t().unsqueeze(-1)).sum(dim=0)", "dense.t().unsqueeze(-1)).sum(dim=1)"),
        ("(dense.t()[..., None] * y).sum(0)", "(dense.t()[..., None] * y).sum(1)"),
        sizes=_EXPERTS,
    ),
    "the first weight turned": m(("self.w1[e])", "self.w1[e].t())"), ("self.w1[ids])", "self.w1[ids].mT)"),
                                 ("self.w1.mT", "self.w1"), ("self.w1.transpose(1, 2)", "self.w1"), sizes=_SQUARE),
    # the same shape, but not the same order of elements
    "tokens scrambled": m(*routed("x = x.reshape(x.shape[-1], -1).t()"), sizes=_FLAT),
    "weights scrambled": m(*routed("weights = weights.reshape(self.top_k, -1).t()")),
    "ids scrambled": m(*routed("ids = ids.reshape(self.top_k, -1).t()")),
    "the combine matrix scrambled": m(
        ("dense.t()", "dense.reshape(self.num_experts, -1)"), ("combine.t()", "combine.reshape(self.num_experts, -1)"),
        (".to(x.dtype).transpose(0, 1)", ".to(x.dtype)"),
    ),
    "a stack reshaped": m(*(
        (f"self.w{w}.{turn}", f"self.w{w}.reshape(self.num_experts, self.w{w}.shape[2], -1)")
        for w in ("2", "1", "13") for turn in ("mT", "transpose(1, 2)")
    ), ("self.w2[e])", "self.w2[e].reshape(self.w2.shape[2], -1).t())")),
    "copies in rounds": m(("x.repeat(self.num_experts, 1)", "x.repeat_interleave(self.num_experts, 0)")),
    "rows numbered otherwise": m(*(
        (f"torch.arange(x.shape[0], device=x.device){to}", f"torch.arange(x.shape[0], device=x.device).flip(0){to}")
        for to in (".unsqueeze(-1), ids]", "[:, None], ids]")
    )),
    "one row for all": m(*(
        (f"torch.arange(x.shape[0], device=x.device){to}", f"torch.zeros_like(ids[:, 0]){to}")
        for to in (".unsqueeze(-1), ids]", "[:, None], ids]")
    )),
    "an expert per feature": m(*(
        (f"{ids}.{to}", f"(({ids} + torch.arange(x.shape[-1], device=x.device)) % self.num_experts).{to}")
        for ids in ("ids.unsqueeze(-1)", "ids[..., None]")
        for to in ("expand(-1, -1, x.shape[-1])", "expand(-1, -1, ys.size(-1))")
    )),
    # the sum has the strides of the tokens, and what follows needs them
    "tokens in columns": m(*routed("x = x.t().contiguous().t()"), sizes=_FLAT, same=True),
    "tokens in columns, the sum viewed": m(
        *routed("x = x.t().contiguous().t()"), also=(("return out\n", "return out.t().view(-1)\n"),), sizes=_FLAT
    ),
    "tokens in columns, the sum strided": m(
        *routed("x = x.t().contiguous().t()"), sizes=_FLAT,
        also=(("return out\n", "return out.as_strided((x.shape[-1],), (1,))\n"),),
    ),
    "tokens sequence first and kept": m(
        ("x = hidden_states\n", "x = hidden_states.transpose(0, 1)\n"),
        also=(("return out\n", "return out.transpose(0, 1).view(-1, x.shape[-1]).view(hidden_states.shape)\n"),),
        sizes=(("rank", "3d_kept"),), same=True,
    ),
    # tokens in another order on one side
    "tokens flipped behind the router": m(*routed("x = x.flip(0)")),
    "tokens sorted behind the router": m(*routed("x = x.sort(0).values")),
    "tokens counted backwards": m(*routed("x = x[torch.arange(x.shape[0] - 1, -1, -1, device=x.device)]")),
    "ids flipped": m(*routed("ids = ids.flip(0)")),
    "ids sorted": m(*routed("ids = ids.sort(0).values")),
    "ids sorted per token": m(*routed("ids = ids.sort(-1).values")),
    "weights sorted per token": m(*routed("weights = weights.sort(-1).values")),
    "the sum flipped": m(("return out\n", "return out.flip(0)\n")),
    "sequence first behind the router": m(
        *routed("x = hidden_states.transpose(0, 1).reshape(-1, x.shape[-1])"),
        sizes=(("rank", "3d"), ("router", "softmax_topk")),
    ),
    "the sum sequence first": m(
        ("out = out.view(hidden_states.shape)", "out = out.view(hidden_states.transpose(0, 1).shape).transpose(0, 1)"),
        ("out.reshape(*hidden_states.shape)", "out.reshape(hidden_states.transpose(0, 1).shape).transpose(0, 1)"),
    ),
    # lists that are too short
    "the last hit is left out": m(
        ("for index in hit:", "for index in hit[:-1]:"), ("for e in hit:", "for e in hit[:-1]:"),
        ("ids.unique().tolist()", "ids.unique().tolist()[:-1]"), ("enumerate(counts)", "enumerate(counts[:-1])"),
        ("enumerate(bins.tolist())", "enumerate(bins.tolist()[:-1])"),
    ),
    "the first two hits": m(("for index in hit:", "for index in hit[:2]:"), ("for e in hit:", "for e in hit[:2]:"),
                            ("ids.unique()", "ids.unique()[:2]")),
    "hits among the first experts": m(
        ("mask.sum(dim=(-1, -2))", "mask[:-1].sum(dim=(-1, -2))"),
        ("minlength=self.num_experts) > 0", "minlength=self.num_experts)[:-1] > 0"),
        ("self.num_experts, 0, self.num_experts - 1) > 0", "self.num_experts - 1, 0, self.num_experts - 2) > 0"),
        ("self.num_experts).sum((0, 1)) > 0", "self.num_experts)[..., :-1].sum((0, 1)) > 0"),
        ("minlength=self.num_experts).tolist()", "minlength=self.num_experts)[:-1].tolist() + [0]"),
    ),
    "hits of the first choice": m(
        ("mask.sum(dim=(-1, -2))", "mask[:, 0].sum(dim=-1)"), ("ids.flatten().bincount", "ids[:, 0].bincount"),
        ("torch.histc(ids.flatten()", "torch.histc(ids[:, 0].contiguous()"),
        ("ids, self.num_experts).sum((0, 1)) > 0", "ids[:, :1], self.num_experts).sum((0, 1)) > 0"),
        ("for e in ids.unique()", "for e in ids[:, 0].unique()"),
    ),
    "hits of more than one token": m(
        ("(-1, -2)), 0)", "(-1, -2)), 1)"), (") > 0).nonzero()", ") > 1).nonzero()"),
        ("if count == 0:", "if count <= 1:"), ("if counts[e] == 0:", "if counts[e] <= 1:"),
        ("if token.numel() == 0:", "if token.numel() <= 1:"), ("if token.shape[0] == 0:", "if token.shape[0] <= 1:"),
        ("if m.any():", "if m.sum() > 1:"),
    ),
    "a class too few": m(
        *((f"F.one_hot(ids, {n}self.num_experts)", f"F.pad(F.one_hot(ids, {n}self.num_experts)[..., :-1], (0, 1))")
          for n in ("", "num_classes=")),
    ),
    "a class too many": m(
        *((f"F.one_hot(ids, {n}self.num_experts)", f"F.one_hot(ids, {n}self.num_experts + 1)[..., 1:]")
          for n in ("", "num_classes=")),
    ),
    # repeated indices
    "all pairs put, not added": m(
        ("torch.zeros_like(x).index_add_(0, token, y)", "torch.zeros_like(x).index_put((token,), y)"),
        ("torch.zeros_like(x).scatter_add(0, index, y)", "torch.zeros_like(x).scatter(0, index, y)"),
        ("out.scatter_add_(0,", "out.scatter_(0,"), ("out = out.index_add(0, token, y)", "out[token] = y"),
        ("out.index_put_((token,), ", "out.index_put_((token,), out[token] * 0 + "),
    ),
    "rows repeated": m(
        *((f"token, slot = {rows}", f"token, slot = (i.repeat(2) for i in {rows})")
          for rows in (_ROWS, "(ids == e).nonzero(as_tuple=True)")),
        ("slot, token = torch.where(mask[e])", "slot, token = (i.repeat(2) for i in torch.where(mask[e]))"),
    ),
    "ids repeated": m(*routed("ids = ids[..., :1].expand_as(ids)")),
    "ids repeated for some": m(*routed(_HALF_TWICE)),
    "ids repeated, gates summed": m(
        (_PAIR, "gates[token, slot"), ("weights[m, k]", "gates[m, k]"),
        also=(*in_loop(f"gates = ({_MASKED}).sum(-1, keepdim=True).expand_as(weights)"), *routed(_HALF_TWICE)[:2]),
    ),
    "gates summed": m((_PAIR, "weights.sum(-1, keepdim=True).expand_as(weights)[token, slot"),
                      (_MASKED, "weights.sum(-1, keepdim=True) * (ids == e)")),
    # ids dropped or changed
    "ids dropped": m(*routed("ids = torch.where(weights > 0.3, ids, -1)")),
    "pairs dropped by weight": m(
        (_ROWS, "torch.where((ids == e) & (weights > 0.3))"), (_MASKED, "weights * ((ids == e) & (weights > 0.3))")
    ),
    "pairs dropped by place": m(
        ("slot = torch.where(ids == e)\n", "slot = (i[i.numel() // 2 :] for i in torch.where(ids == e))\n"),
        ("= torch.where(mask[e])\n", "= (i[i.numel() // 2 :] for i in torch.where(mask[e]))\n"),
    ),
    "only first choices": m(
        ("y = self.expert", "token, slot = token[slot == 0], slot[slot == 0]\n            y = self.expert")
    ),
    "ids limited": m(*routed("ids = ids.clamp(max=1)")),
    "ids counted down": m(*routed("ids = self.num_experts - 1 - ids")),
    "ids moved on": m(*routed("ids = (ids + 1) % self.num_experts")),
    "ids by their last bit": m(*routed("ids = ids & 1")),
    "ids modulo one less": m(*routed("ids = ids % (self.num_experts - 1)")),
    # digits
    "numbers of experts in half precision": m(
        (f"({_ARANGE} == ids", "(torch.arange(self.num_experts, device=x.device, dtype=torch.bfloat16) == ids"),
        sizes=_MANY,
    ),
    "ids through half precision": m(*routed("ids = ids.to(torch.bfloat16).long()"), sizes=_MANY),
    "ids through eight bits": m(*routed("ids = ids.to(torch.uint8).long()"), sizes=_MANY),
    "ids compared in half precision": m(("ids == e", "(ids + 256).to(torch.bfloat16) == e + 256")),
    "numbers counted in half precision": m(("sorted_ids.float()", "sorted_ids.to(torch.bfloat16).float()"),
                                           sizes=_MANY),
    "a step in float64": m(
        *before_activation("gate = ((gate.double() + 1e9).clamp(min=0) - 1e9).to(x.dtype)"), same=True
    ),
    "an expert's output through float64": m(
        ("return y\n", "return ((y.double() + 1e9).clamp(min=0) - 1e9).to(x.dtype)\n"), same=True
    ),
    # zeros that do not stay
    "zeros through exp": m((_WHERE, f"{_WHERE}.exp()"), (f"({_MASKED})", f"({_MASKED}).exp()"),
                           *everywhere(".exp()", *(f"{s}(-1, ids, weights)" for s in ("scatter", "scatter_add")))),
    "zeros and one": m((_WHERE, f"({_WHERE} + 0.1)"), (f"({_MASKED})", f"({_MASKED} + 0.1)"),
                       *everywhere(" + 0.1", *(f"{s}(-1, ids, weights)" for s in ("scatter", "scatter_add")))),
    "zeros through softmax": m((_WHERE, f"{_WHERE}.softmax(-1)"), (f"({_MASKED})", f"({_MASKED}).softmax(-1)"),
                               *everywhere(".softmax(-1)", "scatter(-1, ids, weights)")),
    "zeros through a sigmoid": m(*everywhere(".sigmoid()", _WHERE, "scatter_(-1, ids, weights)", "dim=-2)\n")),
    "a mask of the other value": m((_WHERE, "torch.where(ids == e, weights, 0.5)")),
    "terms through cos": m(("out = out + ", "out = out + 1 - torch.cos(out) + "), ("out += ", "out += out.cos() + ")),
    # the router
    "softmax over the tokens": m(
        ("F.softmax(logits, dim=-1", "F.softmax(logits, dim=0"), ("softmax(dim=-1)", "softmax(dim=0)"),
        ("torch.softmax(logits, dim=-1)", "torch.softmax(logits, dim=0)"),
    ),
    "weights of the shifted scores": m(("scores.gather(-1, ids)", "(scores + self.bias).gather(-1, ids)")),
    "the other group": m(("masked_fill(~keep.bool(), 0.0)", "masked_fill(keep.bool(), 0.0)")),
    "normalised over the tokens": m(("weights.sum(dim=-1, keepdim=True)", "weights.sum(dim=0, keepdim=True)")),
}  # fmt: skip
