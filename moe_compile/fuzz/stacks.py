"""Forms over stacked weights: gathered per pair, all experts in one product, or sorted pairs in grouped products."""

from __future__ import annotations

from collections.abc import Callable

from .writer import Lines, Writer

# ------------------------------------------------------------------------- weights gathered per pair


def _matrix(w: Writer, role: str) -> str:
    """A stack as ``[E, in, out]``."""
    return f"self.w{role}" if w.case.transposed else f"self.w{role}.{w.pick('mT', 'transpose(1, 2)', 'mT')}"


def gather_einsum(w: Writer) -> Lines:
    flip = w.case.transposed

    def project(x: str, role: str, last: bool) -> str:
        left = "tkb" if x == "h" else "tb"
        text = f'torch.einsum("{left},tk{"ba" if flip else "ab"}->tka", {x}, self.w{role}[ids])'
        return f"{text} + self.b{role}[ids]" if w.case.bias else text

    return [*w.between(project, "x"), f"out = {w.over_slots('y')}"]


def gather_matmul(w: Writer) -> Lines:
    def project(x: str, role: str, last: bool) -> str:
        text = f"torch.matmul(self.w{role}[ids], {x}.unsqueeze(-1)).squeeze(-1)"
        if w.case.transposed:
            text = f"torch.matmul({x}.unsqueeze(-2), self.w{role}[ids]).squeeze(-2)"
        return f"{text} + self.b{role}[ids]" if w.case.bias else text

    return ["rows = x.unsqueeze(1)", *w.between(project, "rows"), f"out = {w.over_slots('y')}"]


def batched_mm(w: Writer) -> Lines:
    def project(x: str, role: str, last: bool) -> str:
        text = f"torch.bmm(self.w{role}[flat], {x}.unsqueeze(-1)).squeeze(-1)"
        if w.case.transposed:
            text = f"torch.bmm({x}.unsqueeze(1), self.w{role}[flat]).squeeze(1)"
        return f"{text} + self.b{role}[flat]" if w.case.bias else text

    rows = w.pick(
        "rows",
        "x.repeat_interleave(self.top_k, dim=0)",
        "x.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, x.shape[-1])",
    )
    summed = "(y * weights.reshape(-1, 1)).view(x.shape[0], self.top_k, -1).sum(dim=1)"
    return ["flat = ids.reshape(-1)", f"rows = {rows}", *w.between(project, "rows"), f"out = {w.cast(summed)}"]


# ------------------------------------------------------------------------- all experts in one product


def einsum_one_hot(w: Writer) -> Lines:
    flip = w.case.transposed
    inner = w.pick("order", "tea", "eta")

    def project(x: str, role: str, last: bool) -> str:
        left = inner.replace("a", "b") if x == "h" else "tb"
        bias = f"self.b{role}" if inner == "tea" else f"self.b{role}[:, None]"
        text = f'torch.einsum("{left},e{"ba" if flip else "ab"}->{inner}", {x}, self.w{role})'
        return f"{text} + {bias}" if w.case.bias else text

    combine = w.pick(
        "gates", "(F.one_hot(ids, self.num_experts).to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1)",
        "((torch.arange(self.num_experts, device=x.device) == ids[..., None]) * weights.unsqueeze(-1)).sum(dim=1)",
    )  # fmt: skip
    dims = (1, "combine.unsqueeze(-1)") if inner == "tea" else (0, "combine.t().unsqueeze(-1)")
    summed = f"(y * {dims[1]}).sum(dim={dims[0]})"
    if w.case.weight != "fp32":
        summed = w.pick("combine", f'torch.einsum("{inner.replace("a", "h")},te->th", y, combine)', summed)
    return [f"combine = {combine}", *w.between(project, "x"), f"out = {w.cast(summed)}"]


def all_experts(first: str, multiply: str) -> Callable[[Writer], Lines]:
    def body(w: Writer) -> Lines:
        def project(x: str, role: str, last: bool) -> str:
            if w.case.bias and multiply == "torch.bmm" and w.pick("baddbmm", "no", "yes") == "yes":
                return f"torch.baddbmm(self.b{role}[:, None], {x}, {_matrix(w, role)})"
            text = f"{multiply}({x}, {_matrix(w, role)})"
            return f"{text} + self.b{role}[:, None, :]" if w.case.bias else text

        summed = w.pick("combine", "(y * dense.t().unsqueeze(-1)).sum(dim=0)", "(dense.t()[..., None] * y).sum(0)")
        return [
            *w.combine_matrix(), f"states = {first}", *w.between(project, "states"), f"out = {w.cast(summed)}",
        ]  # fmt: skip

    return body


def llama4(w: Writer) -> Lines:
    """The router gives the chosen logits: their sigmoid scales the experts' input."""

    def project(x: str, role: str, last: bool) -> str:
        text = f"torch.bmm({x}, {_matrix(w, role)})"
        return f"{text} + self.b{role}[:, None, :]" if w.case.bias else text

    return [
        "scores = torch.full((x.shape[0], self.num_experts), float('-inf'), dtype=x.dtype, device=x.device)",
        "scores = torch.sigmoid(scores.scatter_(1, ids, weights).float()).to(x.dtype).transpose(0, 1)",
        "routed = x.repeat(self.num_experts, 1) * scores.reshape(-1, 1)",
        "states = routed.view(self.num_experts, -1, x.shape[-1])",
        *w.between(project, "states"),
        "out = y.view(self.num_experts, -1, x.shape[-1]).sum(dim=0)",
    ]


# ------------------------------------------------------------------------- sorted pairs, grouped products


def grouped(offsets: Lines) -> Callable[[Writer], Lines]:
    def body(w: Writer) -> Lines:
        def project(x: str, role: str, last: bool) -> str:
            text = f"torch._grouped_mm({x}, {_matrix(w, role)}, offs)"
            return f"{text} + self.b{role}[sorted_ids]" if w.case.bias else text

        weight = w.pick("weight", "weights.reshape(-1)[order].unsqueeze(-1)", "weights.flatten()[order, None]")
        ends = {
            "slots": ["y = y[torch.argsort(order)].view(x.shape[0], self.top_k, -1)", f"out = {w.over_slots('y')}"],
            "inverse": [
                f"y = y * {weight}", "inverse = torch.empty_like(order)",
                "inverse[order] = torch.arange(order.shape[0], device=order.device)",
                f"out = {w.cast('y[inverse].view(x.shape[0], self.top_k, -1).sum(dim=1)')}",
            ],
            "index_add": [f"y = {w.cast(f'y * {weight}')}", "out = torch.zeros_like(x).index_add_(0, token, y)"],
            "scatter_add": [
                f"y = {w.cast(f'y * {weight}')}", "index = token.unsqueeze(-1).expand(-1, x.shape[-1])",
                "out = torch.zeros_like(x).scatter_add(0, index, y)",
            ],
        }  # fmt: skip
        token = w.pick("token", "order // self.top_k", 'torch.div(order, self.top_k, rounding_mode="floor")')
        return [
            "flat = ids.reshape(-1)", f"order = {w.pick('sort', 'torch.argsort(flat, stable=True)', 'flat.argsort()')}",
            f"token = {token}", "sorted_ids = flat[order]", *offsets,
            f"rows = {w.pick('rows', 'x[token]', 'x.index_select(0, token)')}", *w.between(project, "rows"),
            *ends[w.pick("end", *ends)],
        ]  # fmt: skip

    return body


HISTC = [
    "counts = torch.histc(sorted_ids.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)",
    "offs = torch.cumsum(counts, dim=0, dtype=torch.int32)",
]
BINCOUNT = ["offs = torch.bincount(flat, minlength=self.num_experts).cumsum(0).to(torch.int32)"]
ONE_HOT = ["offs = F.one_hot(flat, self.num_experts).sum(0).cumsum(0).to(torch.int32)"]
SEARCHSORTED = [
    "ends = torch.arange(self.num_experts, device=x.device)",
    "offs = torch.searchsorted(sorted_ids, ends, right=True).to(torch.int32)",
]
