"""The forms of the grammar: the text between ``weights, ids`` and the sum ``out``, as users write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import stacks
from .loops import LOOPS
from .writer import Lines, Writer, indent


@dataclass(frozen=True)
class Form:
    """How a layer is written. ``loop``: experts are called one by one, so any layout of their weights will do."""

    body: Callable[[Writer], Lines]
    loop: bool = False
    separate_only: bool = False
    weighs_input: bool = False
    any_rank: bool = False
    grouped: bool = False
    needs_loops: bool = False


# ------------------------------------------------------------------------- every expert on every token


def _dense(gate: str) -> Callable[[Writer], Lines]:
    def body(w: Writer) -> Lines:
        return [w.zeros(), w.loop(), *indent([f"gate = {gate}", w.add(w.term("x", "gate"))])]

    return body


def _dense_masked(w: Writer) -> Lines:
    gate = w.pick(
        "gate", "(weights * (ids == e)).sum(-1, keepdim=True)", "((ids == e) * weights).sum(dim=-1).unsqueeze(-1)",
        "((ids == e).to(weights.dtype) * weights).sum(-1)[..., None]",
    )  # fmt: skip
    return _dense(gate)(w)


def _dense_scatter(w: Writer) -> Lines:
    column = w.pick("column", "dense[..., e : e + 1]", "dense[..., e, None]", "dense[..., e].unsqueeze(-1)")
    return [*w.combine_matrix(), *_dense(column)(w)]


def _dense_one_hot(w: Writer) -> Lines:
    combine = w.pick(
        "combine", "(mask * weights.unsqueeze(-1)).sum(dim=-2)", "(weights[..., None] * mask.to(weights.dtype)).sum(-2)"
    )
    return [
        "mask = F.one_hot(ids, num_classes=self.num_experts)", f"combine = {combine}",
        *_dense("combine[..., e : e + 1]")(w),
    ]  # fmt: skip


def _dense_index_put(w: Writer) -> Lines:
    return [
        "dense = torch.zeros(x.shape[0], self.num_experts, dtype=weights.dtype, device=x.device)",
        "dense[torch.arange(x.shape[0], device=x.device)[:, None], ids] = weights",
        *_dense("dense[:, e : e + 1]")(w),
    ]


def _stacked_outputs(w: Writer) -> str:
    return f"ys = torch.stack([{w.expert('x')} for e in range(self.num_experts)], dim=1)"


def _stack_gather(w: Writer) -> Lines:
    index = w.pick(
        "index", "ids.unsqueeze(-1).expand(-1, -1, x.shape[-1])", "ids[..., None].expand(-1, -1, ys.size(-1))"
    )
    return [_stacked_outputs(w), f"y = ys.gather(1, {index})", f"out = {w.over_slots('y')}"]


def _stack_index(w: Writer) -> Lines:
    return [
        _stacked_outputs(w), "y = ys[torch.arange(x.shape[0], device=x.device).unsqueeze(-1), ids]",
        f"out = {w.over_slots('y')}",
    ]  # fmt: skip


# ------------------------------------------------------------------------- every expert on its own tokens


def _where(w: Writer) -> Lines:
    state = w.pick("state", "x[None, token].reshape(-1, x.shape[-1])", "x[token]", "x.index_select(0, token)")
    return [
        w.zeros(), "mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)", w.loop(),
        *indent([
            "slot, token = torch.where(mask[e])",
            f"y = {w.term(state, 'weights[token, slot, None]')}",
            "out.index_add_(0, token, y.to(x.dtype))",
        ]),
    ]  # fmt: skip


def _rows(w: Writer) -> str:
    return w.pick("rows", "token, slot = torch.where(ids == e)", "token, slot = (ids == e).nonzero(as_tuple=True)")


def _nonzero(w: Writer) -> Lines:
    weight = w.pick("weight", "weights[token, slot].unsqueeze(-1)", "weights[token, slot][:, None]")
    added = w.pick("index_add", "out = out.index_add(0, token, y)", "out.index_add_(dim=0, index=token, source=y)")
    return [w.zeros(), w.loop(), *indent([_rows(w), f"y = {w.term('x[token]', weight)}", added])]


def _scatter_add(w: Writer) -> Lines:
    index = w.pick("index", "token.unsqueeze(-1).expand(-1, x.shape[-1])", "token[:, None].expand_as(y)")
    term = w.term("x[token]", "weights[token, slot, None]")
    return [w.zeros(), w.loop(), *indent([_rows(w), f"y = {term}", f"out.scatter_add_(0, {index}, y)"])]


def _mistral(w: Writer) -> Lines:
    term = w.term("x[token]", "weights[token, slot, None]")
    added = w.pick("row sum", f"out[token] += {term}", f"out.index_put_((token,), {term}, accumulate=True)")
    return [w.zeros(), w.loop(), *indent([_rows(w), added])]


def _bool_mask(w: Writer) -> Lines:
    weight = "dense[..., e][m].unsqueeze(-1)"
    if w.case.rank != "3d_kept":
        weight = w.pick("weight", "dense[m, e].unsqueeze(-1)", "dense[m, e, None]", weight)
    term = w.term("x[m]", weight)
    return [
        *w.combine_matrix(), w.zeros(), w.loop(),
        *indent(["m = (ids == e).any(dim=-1)", w.pick("row sum", f"out[m] += {term}", f"out[m] = out[m] + {term}")]),
    ]  # fmt: skip


def _bool_mask_sum(w: Writer) -> Lines:
    return [
        w.zeros(), w.loop(),
        *indent([
            "hit = ids == e", "m = hit.any(dim=-1)", "weight = (weights * hit).sum(dim=-1)",
            f"out[m] = out[m] + {w.term('x[m]', 'weight[m].unsqueeze(-1)')}",
        ]),
    ]  # fmt: skip


FORMS: dict[str, Form] = {
    "dense_masked": Form(_dense_masked, loop=True, weighs_input=True, any_rank=True),
    "dense_scatter": Form(_dense_scatter, loop=True, weighs_input=True, any_rank=True),
    "dense_where": Form(_dense("torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)"), loop=True, any_rank=True),
    "dense_one_hot": Form(_dense_one_hot, loop=True, any_rank=True),
    "dense_index_put": Form(_dense_index_put, loop=True),
    "index_add_where": Form(_where, loop=True, weighs_input=True),
    "index_add_nonzero": Form(_nonzero, loop=True, weighs_input=True),
    "scatter_add": Form(_scatter_add, loop=True, weighs_input=True),
    "mistral_where": Form(_mistral, loop=True, weighs_input=True),
    "bool_mask": Form(_bool_mask, loop=True, any_rank=True),
    "bool_mask_sum": Form(_bool_mask_sum, loop=True),
    "stack_gather": Form(_stack_gather, loop=True),
    "stack_index": Form(_stack_index, loop=True),
    "gather_einsum": Form(stacks.gather_einsum),
    "gather_matmul": Form(stacks.gather_matmul),
    "batched_mm": Form(stacks.batched_mm),
    "einsum_one_hot": Form(stacks.einsum_one_hot),
    "repeat_bmm": Form(
        stacks.all_experts("x.repeat(self.num_experts, 1).view(self.num_experts, -1, x.shape[-1])", "torch.bmm")
    ),
    "expand_bmm": Form(stacks.all_experts("x.unsqueeze(0).expand(self.num_experts, -1, -1)", "torch.bmm")),
    "broadcast_matmul": Form(stacks.all_experts("x.unsqueeze(0)", "torch.matmul")),
    "llama4": Form(stacks.llama4, weighs_input=True),
    "grouped_histc": Form(stacks.grouped(stacks.HISTC), grouped=True),
    "grouped_bincount": Form(stacks.grouped(stacks.BINCOUNT), grouped=True),
    "grouped_one_hot": Form(stacks.grouped(stacks.ONE_HOT), grouped=True),
    "grouped_searchsorted": Form(stacks.grouped(stacks.SEARCHSORTED), grouped=True),
    **{
        name: Form(body, loop=True, separate_only=separate, needs_loops=True)
        for name, (body, separate) in LOOPS.items()
    },
}
