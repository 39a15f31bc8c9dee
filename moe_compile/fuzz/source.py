"""From a case to the text of a program: ``Router``, ``Expert``, ``MoE`` and ``Model`` modules."""

from __future__ import annotations

from .axes import Case
from .contexts import CONTEXTS, with_op
from .forms import FORMS
from .mutations import mutated
from .writer import Lines, Writer, indent

_HEAD = ["import torch", "from torch import nn", "from torch.nn import functional as F"]


def source_of(case: Case) -> str:
    """The program, with its mutation applied."""
    w = Writer(case)
    blocks = [] if case.router == "external" else [_router(w)]
    if case.separate or case.around == "shared":
        blocks.append(_expert(w))
    blocks += [_layer(w), _model(w)]
    lines = list(_HEAD)
    for block in blocks:
        lines += ["", "", *block]
    text = "\n".join(lines) + "\n"
    for old, new in with_op(text):
        text = text.replace(old, new)
    return mutated(text, case.mutation)


def _module(name: str, doc: str, init: Lines, methods: dict[str, Lines]) -> Lines:
    lines = [
        f"class {name}(nn.Module):",
        f'    """{doc}"""',
        "",
        "    def __init__(self):",
        "        super().__init__()",
    ]
    lines += indent(indent(init))
    for head, body in methods.items():
        lines += ["", f"    def {head}:", *indent(indent(body))]
    return lines


def _router(w: Writer) -> Lines:
    c = w.case
    init = [f"self.gate = nn.Linear({c.hidden}, {c.experts})", f"self.top_k = {c.top_k}"]
    if c.router == "sigmoid_bias":
        init.append(f"self.bias = nn.Parameter(torch.randn({c.experts}) * 0.1)")
    topk = w.pick("topk", "torch.topk(scores, self.top_k, dim=-1)", "scores.topk(self.top_k)")
    softmax = w.pick(
        "softmax", "F.softmax(logits, dim=-1, dtype=torch.float32)", "logits.float().softmax(dim=-1)",
        "torch.softmax(logits, dim=-1)",
    )  # fmt: skip
    sigmoid = w.pick("sigmoid", "logits.float().sigmoid()", "torch.sigmoid(logits)")
    body = ["logits = self.gate(x)"]
    if c.form == "llama4":
        body.append("weights, ids = torch.topk(logits, self.top_k, dim=1)")
    elif c.router == "softmax_topk":
        body += [f"scores = {softmax}", f"weights, ids = {topk}"]
    elif c.router == "topk_softmax":
        body += [
            "scores, ids = torch.topk(logits, self.top_k, dim=-1)",
            f"weights = {softmax.replace('logits', 'scores')}",
        ]
    elif c.router == "sigmoid":
        body += [f"scores = {sigmoid}", f"weights, ids = {topk}"]
    elif c.router == "sigmoid_bias":
        body += [
            f"scores = {sigmoid}", "ids = torch.topk(scores + self.bias, self.top_k, dim=-1)[1]",
            "weights = scores.gather(-1, ids)",
        ]  # fmt: skip
    elif c.router == "two_heads":
        init[0] = f"self.gate = nn.Linear({c.hidden}, {2 * c.experts})"
        body += [
            f"logits = logits.view({w.pick('heads', '-1', '-1, 2')}, {c.experts})", f"scores = {softmax}",
            "weights, ids = torch.topk(scores, self.top_k // 2, dim=-1)",
            "weights, ids = weights.reshape(-1, self.top_k), ids.reshape(-1, self.top_k)",
        ]  # fmt: skip
    elif c.router == "group_limited":
        body += [
            f"scores = {softmax}", f"groups = scores.view(-1, 2, {c.experts // 2})",
            "best = torch.topk(groups.max(dim=-1).values, 1, dim=-1)[1]",
            "keep = torch.zeros(groups.shape[:2], device=x.device).scatter_(1, best, 1.0)",
            f"keep = keep.unsqueeze(-1).expand(-1, -1, {c.experts // 2}).reshape(-1, {c.experts})",
            "scores = scores.masked_fill(~keep.bool(), 0.0)", f"weights, ids = {topk}",
        ]  # fmt: skip
    else:
        top = w.pick("top1", "scores.max(dim=-1, keepdim=True)", "torch.topk(scores, 1, dim=-1)")
        body += [f"scores = {softmax}", f"weights, ids = {top}"]
    body += {
        "no": [],
        "sum": ["weights = weights / weights.sum(dim=-1, keepdim=True)"],
        "sum_eps": ["weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-9)"],
        "scale": ["weights = weights * 2.5"],
    }[c.renormalise]
    cast = "weights.float()" if c.weight == "fp32" else "weights.to(x.dtype)"
    body.append(f"return {cast}, ids" + (", logits" if c.around == "logits" else ""))
    return _module("Router", "Chooses experts and their weights.", init, {"forward(self, x)": body})


def _expert(w: Writer) -> Lines:
    c = w.case
    bias = f"bias={c.bias}"
    fused = c.layout.endswith(("_cat", "_interleaved"))
    roles = {"13": 2 * c.inter} if fused else {"1": c.inter, **({"3": c.inter} if c.glu else {})}
    init = [f"self.w{role} = nn.Linear({c.hidden}, {size}, {bias})" for role, size in roles.items()]
    if c.expert == "three":
        init.append(f"self.w4 = nn.Linear({c.inter}, {c.inter}, {bias})")
    init.append(f"self.w2 = nn.Linear({c.inter}, {c.hidden}, {bias})")
    body = w.between(lambda x, role, last: f"self.w{role}({x})", "x")
    if c.inputs == "projected_inside":
        body.insert(0, _PROJECTED)
    return _module("Expert", "One expert.", init, {"forward(self, x)": [*body, "return y"]})


_PROJECTED = "x = self.project(x)"


def _stacks(c: Case) -> Lines:
    """Parameters ``[E, out, in]`` (or ``[E, in, out]``) and biases ``[E, out]``."""
    fused = c.layout.endswith(("_cat", "_interleaved"))
    roles = {"13": (2 * c.inter, c.hidden)} if fused else {"1": (c.inter, c.hidden)}
    if c.glu and not fused:
        roles["3"] = (c.inter, c.hidden)
    if c.expert == "three":
        roles["4"] = (c.inter, c.inter)
    roles["2"] = (c.hidden, c.inter)
    lines = []
    for role, (rows, columns) in roles.items():
        shape = (columns, rows) if c.transposed else (rows, columns)
        lines.append(f"self.w{role} = nn.Parameter(torch.randn({c.experts}, {shape[0]}, {shape[1]}) / {columns}**0.5)")
        if c.bias:
            lines.append(f"self.b{role} = nn.Parameter(torch.randn({c.experts}, {rows}) * 0.3)")
    return lines


def _layer(w: Writer) -> Lines:
    c, form = w.case, FORMS[w.case.form]
    init = [f"self.num_experts, self.top_k = {c.experts}, {c.top_k}"]
    if c.router != "external":
        init.append("self.router = Router()")
    init += ["self.experts = nn.ModuleList(Expert() for _ in range(self.num_experts))"] if c.separate else _stacks(c)
    if c.around == "shared":
        init.append("self.shared = Expert()")
    if c.inputs != "tokens":
        init.append(f"self.project = nn.Linear({c.hidden}, {c.hidden}, bias=False)")
        if c.separate and c.inputs == "projected_inside":
            init += ["for expert in self.experts:", "    expert.project = self.project"]
    beside = CONTEXTS[c.beside]
    init += [line.format(experts=c.experts) for line in beside.init]
    arguments = "self, hidden_states, weights, ids" if c.router == "external" else "self, hidden_states"
    body = ["x = hidden_states"]
    if c.rank == "3d":
        body = [
            w.pick("flatten", "x = hidden_states.view(-1, hidden_states.shape[-1])", "x = hidden_states.flatten(0, 1)")
        ]
    elif c.rank == "3d_first":
        body = ["x = hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1])"]
    body += beside.before
    if c.router != "external":
        body.append(f"weights, ids{', logits' if c.around == 'logits' else ''} = self.router(x)")
    body += beside.between
    if c.inputs == "projected":
        body.append(_PROJECTED)
    body += form.body(w)
    if c.around == "shared":
        body.append(
            w.pick("shared", "out = out + self.shared(x)", "out = self.shared(x) + out", "out += self.shared(x)")
        )
    body += beside.after
    if c.rank == "3d":
        body.append(w.pick("restore", "out = out.view(hidden_states.shape)", "out = out.reshape(*hidden_states.shape)"))
    elif c.rank == "3d_first":
        body += ["turned = hidden_states.transpose(0, 1).shape", "out = out.view(turned).transpose(0, 1)"]
    body.append("return out, logits" if c.around == "logits" else "return out")
    methods = {f"forward({arguments})": body}
    if not c.separate and form.loop:
        methods = {
            "expert(self, e, x)": [
                *([_PROJECTED] if c.inputs == "projected_inside" else []),
                *w.between(lambda x, role, last: _row(w, x, role), "x"),
                "return y",
            ],
            **methods,
        }
    return _module("MoE", "The routed layer.", init, methods)


def _row(w: Writer, x: str, role: str) -> str:
    """A linear map with row ``e`` of the stacks."""
    c = w.case
    if c.transposed:
        text = f"{x} @ self.w{role}[e]"
        return f"{text} + self.b{role}[e]" if c.bias else text
    if not c.bias:
        return w.pick("linear", f"F.linear({x}, self.w{role}[e])", f"{x} @ self.w{role}[e].t()")
    linear = f"F.linear({x}, self.w{role}[e], self.b{role}[e])"
    return w.pick("linear", linear, f"F.linear({x}, self.w{role}[e]) + self.b{role}[e]")


def _model(w: Writer) -> Lines:
    c = w.case
    extra = ", weights, ids" if c.router == "external" else ""
    init, body = ["self.moe = MoE()"], [f"return self.moe(x{extra})"]
    if c.around == "residual":
        body = [w.pick("residual", f"return x + self.moe(x{extra})", f"return self.moe(x{extra}) + x")]
    elif c.around == "two_layers":
        init, body = ["self.first, self.second = MoE(), MoE()"], ["x = x + self.first(x)", "return self.second(x)"]
    return _module("Model", "What is compiled.", init, {f"forward(self, x{extra})": body})
