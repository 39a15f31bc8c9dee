"""Write docs/forms.md by running every example of every form, and of what is left alone.

    python docs/make_forms.py > docs/forms.md     # with the rows that other versions of torch have recorded
    python docs/make_forms.py --record            # keep this version's rows in docs/forms.json
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from left_alone import EXAMPLES as LEFT_ALONE
from moe_compile.patterns import FORMS, grouped_mm, name_of

import moe_compile
from moe_compile import capture
from moe_compile.rewriting import rewrite_graph

RECORD = Path(__file__).with_name("forms.json")
VERSION = torch.__version__.split("+")[0]
HEAD = """# Forms

What users write, and what becomes of it. Each form is one file in `patterns/`; the table below was made by compiling
each example with plain `torch.compile(layer, backend="moe_compile")` on random weights on the CPU, with each version
of torch that it names (`docs/make_forms.py`). "1 graph, 1 op": Dynamo captured the layer whole, and one op of ours
does all of it.
"""
LEFT = """
## Left alone

The original runs, and `explain` names the line and the edit. The rows are what `explain` says of each example.
"""
FP8 = """
## Weights in fp8

Each of these forms may keep its weights as stacked float8_e4m3fn tensors and widen them before it multiplies, an expert
at a time, gathered by the ids, or the whole stack at once. The layer then becomes one call of `experts_fp8`, which
widens them in the kernel: rows stay as they are, sums are in float32. Every line below was compiled on weights
`[E, out, in]`.

| scales | as written |
|---|---|
| one per tensor, `[E]` or one for all | `self.w1[e].to(x.dtype) * self.w1_scale[e]` |
| one per output channel, `[E, out, 1]` or `[E, out]` | `(self.w1[e].float() * self.w1_scale[e][:, None]).to(x.dtype)` |
| the same on the outputs | `F.linear(x, self.w1[e].to(x.dtype)) * self.w1_scale[e]` |
| one per block of 128 x 128, `[E, out / 128, in / 128]` rounded up | \
`w * s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :in]` |
| the same by a view | `(w.view(out // 128, 128, in // 128, 128) * s[:, None, :, None]).view(out, in)` |

What must hold is proved: the scale is taken at the same expert as the weight, its blocks are whole, neither is written
meanwhile, all projections are fp8, and the widened weight has the dtype of the rows. Else the original stays, with
[MC408](refusals.md): also for float8_e5m2, for a tensor per expert, and for other blocks. A whole stack that is widened
in an unknown way is a plain weight for the op of plain weights, as the program keeps it anyway.
"""
HUGGING_FACE = """
## Hugging Face models

Experts modules that carry transformers' `@use_experts_implementation` (64 families in transformers 5.23) are taken by
their declared interface, whatever implementation is configured, with no matching at all: the module's own gate is
traced and recognised, or run as it is between two grouped GEMMs. dbrx, llama4, jetmoe, longcat_flash, step3p7 and
switch_transformers are taken by class. nllb_moe, doge and vitpose are left alone, with the reason in the report.
"""


def outcome(form: Any, example: Any) -> str:
    """What becomes of an example, from a real compilation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = example(experts=3).eval()
    x = torch.randn(6, layer.hidden)
    if form is grouped_mm:
        layer, x = layer.bfloat16(), x.bfloat16()
    graphs, sites, ops = 0, [], 0

    def backend(gm: Any, inputs: Any, **_: Any) -> Any:
        nonlocal graphs, ops
        sites.extend(rewrite_graph(gm).sites)
        graphs += 1
        ops += sum("moe_compile" in str(n.target) for n in gm.graph.nodes)
        return gm.forward

    capture.install(backend)
    with torch.no_grad():
        torch.compile(layer, backend=backend)(x)
    status = ", ".join(s.status for s in sites)
    return f"{status}: {graphs} graph{'s' * (graphs != 1)}, {ops} op{'s' * (ops != 1)}"


def left_alone(example: Any) -> str:
    """A row of what is left alone, from ``explain``."""
    torch.manual_seed(0)
    layer = example().eval()
    (site,) = moe_compile.explain(layer, torch.randn(6, layer.hidden)).sites
    path, _, line = site.location.rpartition(":")
    statement = Path(path).read_text().splitlines()[int(line) - 1].strip()
    fix = str(site.advice()).replace(site.location, "this line")
    return f"| `{example.__name__}` | {summary(example)} | `{statement}` | {site.code} | {fix} |"


def summary(example: Any) -> str:
    return (inspect.getdoc(example) or "").splitlines()[0].rstrip(".")


def source(example: Any) -> str:
    body = "\n".join(line[4:] for line in inspect.getsource(example.forward).rstrip().splitlines())
    return f"`{example.__name__}`\n\n```python\n{body}\n```\n"


def page(known: dict[str, dict[str, str]]) -> str:
    """The whole page, with the rows of every known version."""
    versions = sorted(known)
    lines = [HEAD, "| form | example | what it is | " + " | ".join(f"torch {v}" for v in versions) + " |"]
    lines.append("|---" * (3 + len(versions)) + "|")
    for form in FORMS:
        link = f"[`{name_of(form)}`](../patterns/{name_of(form)}.py)"
        for example in form.EXAMPLES:
            cells = [known[v].get(f"{name_of(form)}.{example.__name__}", "not run") for v in versions]
            lines.append(f"| {link} | `{example.__name__}` | {summary(example)} | {' | '.join(cells)} |")
    lines += [LEFT, "| example | what it is | line | code | edit |", "|---|---|---|---|---|"]
    lines += [left_alone(example) for example in LEFT_ALONE]
    lines.append(
        "\nWhatever else differs from the meaning of an MoE layer in one fact is left alone too: "
        "[refusals.md](refusals.md) lists the facts."
    )
    lines.append(FP8)
    lines.append(HUGGING_FACE + "\n## Source of the examples\n")
    for form in FORMS:
        lines.append(f"### {name_of(form)}\n\n{(form.__doc__ or '').strip().splitlines()[0]}\n")
        lines += [source(example) for example in form.EXAMPLES]
    lines.append("### Left alone\n")
    lines += [source(example) for example in LEFT_ALONE]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str]) -> None:
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known = {v: rows for v, rows in known.items() if v.rpartition(".")[0] != VERSION.rpartition(".")[0]}
    every = [(form, example) for form in FORMS for example in form.EXAMPLES]
    known[VERSION] = {f"{name_of(form)}.{example.__name__}": outcome(form, example) for form, example in every}
    if "--record" in argv:
        RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    else:
        sys.stdout.write(page(known))


if __name__ == "__main__":
    main(sys.argv[1:])
