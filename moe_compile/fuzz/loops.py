"""Forms whose Python control flow depends on values: Dynamo alone breaks the graph there."""

from __future__ import annotations

from collections.abc import Callable

from .writer import Lines, Writer, indent

_MASK = "mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)"
_ROWS = "token, slot = torch.where(ids == e)"
_WEIGHT = "weights[token, slot, None]"


def _hit(w: Writer) -> str:
    """The list of the experts that any token chose."""
    found = w.pick(
        "hit", "torch.greater(mask.sum(dim=(-1, -2)), 0)",
        "(ids.flatten().bincount(minlength=self.num_experts) > 0)",
        "(torch.histc(ids.flatten().float(), self.num_experts, 0, self.num_experts - 1) > 0)",
        "(F.one_hot(ids, self.num_experts).sum((0, 1)) > 0)",
    )  # fmt: skip
    return f"hit = {found}.nonzero()"


def _expert_hit(w: Writer) -> Lines:
    """transformers 5: ``for e in hit`` over stacked weights."""
    return [
        w.zeros(), _MASK, _hit(w), "for index in hit:",
        *indent([
            "e = index[0]", "slot, token = torch.where(mask[e])", f"y = {w.term('x[token]', _WEIGHT)}",
            "out.index_add_(0, token, y.to(x.dtype))",
        ]),
    ]  # fmt: skip


def _expert_hit_modules(w: Writer) -> Lines:
    """transformers 4.5x: the loop variable, a tensor ``[1]``, indexes a ModuleList."""
    return [
        w.zeros(), _MASK, _hit(w), "for e in hit:",
        *indent([
            "slot, token = torch.where(mask[e].squeeze(0))",
            f"y = {w.term('x[None, token].reshape(-1, x.shape[-1])', _WEIGHT)}",
            "out.index_add_(0, token, y.to(x.dtype))",
        ]),
    ]  # fmt: skip


def _rows_then(w: Writer, head: Lines, test: Lines) -> Lines:
    """A loop with a test, then the rows of one expert added back."""
    return [
        w.zeros(), *head,
        *indent([*test, f"y = {w.term('x[token]', _WEIGHT)}", "out.index_add_(0, token, y)"]),
    ]  # fmt: skip


def _unique(w: Writer) -> Lines:
    return _rows_then(w, ["for e in ids.unique().tolist():"], [_ROWS])


def _numel(w: Writer) -> Lines:
    test = w.pick("test", "if token.numel() == 0:", "if token.shape[0] == 0:", "if len(token) == 0:")
    return _rows_then(w, [w.loop()], [_ROWS, test, "    continue"])


def _any(w: Writer) -> Lines:
    return [
        *w.combine_matrix(), w.zeros(), w.loop(),
        *indent([
            "m = (ids == e).any(dim=-1)", "if m.any():",
            f"    out[m] += {w.term('x[m]', 'dense[m, e].unsqueeze(-1)')}",
        ]),
    ]  # fmt: skip


def _bincount(w: Writer) -> Lines:
    """DeepSeek-V3's reference: counts as a list, empty experts are skipped."""
    head = ["counts = torch.bincount(ids.flatten(), minlength=self.num_experts).tolist()", w.loop()]
    return _rows_then(w, head, ["if counts[e] == 0:", "    continue", _ROWS])


def _moe_infer(w: Writer) -> Lines:
    """DeepSeek's remote code: sorted pairs, one slice per expert, counts on the host."""
    counts = w.pick("counts", ".cpu().numpy()", ".tolist()")
    return [
        f"counts = F.one_hot(ids, self.num_experts).sum(dim=(0, 1)){counts}", "order = ids.view(-1).argsort()",
        "rows = x[order // self.top_k]", "outputs, start = [], 0", "for e, count in enumerate(counts):",
        *indent([
            "end = start + int(count)", "if count == 0:", "    continue",
            f"outputs.append({w.expert('rows[start:end]')})", "start = end",
        ]),
        "y = torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)", "back = torch.empty_like(y)",
        "back[order] = y",
        f"out = {w.cast('(back.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)')}",
    ]  # fmt: skip


def _tolist(w: Writer) -> Lines:
    """Mixtral of transformers 4.36: indices as lists."""
    return [
        w.zeros(), _MASK, w.loop(),
        *indent([
            "slot, token = torch.where(mask[e])", "if token.shape[0] == 0:", "    continue",
            "token_list, slot_list = token.tolist(), slot.tolist()",
            "state = x[None, token_list].reshape(-1, x.shape[-1])",
            f"y = {w.term('state', 'weights[token_list, slot_list, None]')}",
            "out.index_add_(0, token, y.to(x.dtype))",
        ]),
    ]  # fmt: skip


def _bins(w: Writer) -> Lines:
    """MegaBlocks-like: borders on the host, every bin written into one buffer."""
    buffer = w.pick("buffer", "torch.empty_like(rows)", "torch.zeros_like(rows)")
    return [
        "order = ids.flatten().sort(stable=True).indices",
        "bins = torch.bincount(ids.flatten(), minlength=self.num_experts).cumsum(0)",
        "rows = x[order // self.top_k]", f"y, start = {buffer}, 0", "for e, end in enumerate(bins.tolist()):",
        *indent([f"y[start:end] = {w.expert('rows[start:end]')}", "start = end"]),
        w.zeros(), "out.index_add_(0, order // self.top_k, (y * weights.flatten()[order, None]).to(x.dtype))",
    ]  # fmt: skip


def _inline(w: Writer) -> Lines:
    """Lists of indices without a name."""
    host = w.pick("host", ".tolist()", ".cpu().numpy()")
    return [
        w.zeros(), w.loop(),
        *indent([_ROWS, f"y = {w.term(f'x[token{host}]', 'weights[token.tolist(), slot.tolist(), None]')}",
                 "out.index_add_(0, token, y.to(x.dtype))"]),
    ]  # fmt: skip


def _slots(w: Writer) -> Lines:
    """The slots outside, the experts inside."""
    return [
        w.zeros(), "for k in range(self.top_k):",
        *indent([
            w.loop(),
            *indent([
                "m = ids[:, k] == e", "if m.any():",
                f"    out[m] += {w.term('x[m]', 'weights[m, k].unsqueeze(-1)')}",
            ]),
        ]),
    ]  # fmt: skip


def _tokens(w: Writer) -> Lines:
    """One token after the other."""
    return [
        w.zeros(), "for t in range(x.shape[0]):",
        *indent([
            "for k in range(self.top_k):",
            f"    out[t] += {w.term('x[t]', 'weights[t, k]', 'ids[t, k]')}",
        ]),
    ]  # fmt: skip


# name -> (body, whether the experts must be modules)
LOOPS: dict[str, tuple[Callable[[Writer], Lines], bool]] = {
    "expert_hit": (_expert_hit, False),
    "expert_hit_modules": (_expert_hit_modules, True),
    "unique_tolist": (_unique, False),
    "numel_continue": (_numel, False),
    "any_if": (_any, False),
    "bincount_tolist": (_bincount, False),
    "moe_infer": (_moe_infer, False),
    "tolist_indices": (_tolist, False),
    "bins": (_bins, False),
    "tolist_inline": (_inline, False),
    "slot_then_expert": (_slots, False),
    "token_loop": (_tokens, False),
}
