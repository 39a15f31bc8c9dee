"""Write docs/forms.md by running every example of every form: ``python docs/make_forms.py > docs/forms.md``."""

from __future__ import annotations

import inspect
import sys

import torch
import torch._dynamo
from moe_compile.patterns import FORMS, grouped_mm, name_of

from moe_compile import capture
from moe_compile.rewriting import rewrite_graph

HEAD = """# Forms

What users write, and what becomes of it. Each form is one file in `patterns/`; the table below was made by compiling
each example with plain `torch.compile(layer, backend="moe_compile")` on random weights (torch {version}).
"""
HUGGING_FACE = """
## Hugging Face models

Experts modules that carry transformers' `@use_experts_implementation` (64 families in transformers 5.23) are taken by
their declared interface, whatever implementation is configured, with no matching at all: the module's own gate is
traced and recognised, or run as it is between two grouped GEMMs. dbrx, llama4, jetmoe, longcat_flash, step3p7 and
switch_transformers are taken by class. nllb_moe, doge and vitpose are left alone, with the reason in the report.

## Left alone

- Loops that Dynamo cannot capture: over the result of `nonzero()`, with `if mask.any():`, `.item()` or `.tolist()`.
  `explain` names the line and the edit (MC101, MC102).
- `torch.vmap` over stacked experts, capacity limits and token dropping, experts that are not two linear maps.
- Whatever else differs from the meaning in one fact: [refusals.md](refusals.md) lists the facts.
"""


def row(form, example) -> str:
    """One line of the table, from a real compilation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = example().eval()
    x = torch.randn(6, layer.hidden)
    if form is grouped_mm:
        layer, x = layer.bfloat16(), x.bfloat16()
    graphs, sites, ops = [], [], 0

    def backend(gm, inputs, **_):
        nonlocal ops
        sites.extend(rewrite_graph(gm).sites)
        graphs.append(gm)
        ops += sum("moe_compile" in str(n.target) for n in gm.graph.nodes)
        return gm.forward

    capture.install(backend)
    with torch.no_grad():
        torch.compile(layer, backend=backend)(x)
    what = (inspect.getdoc(example) or "").splitlines()[0].rstrip(".")
    status = ", ".join(s.status for s in sites)
    link = f"[`{name_of(form)}`](../patterns/{name_of(form)}.py)"
    return f"| {link} | `{example.__name__}` | {what} | {len(graphs)} | {ops} | {status} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD.format(version=torch.__version__.split("+")[0])]
    lines += ["| form | example | what it is | graphs | our ops | outcome |", "|---|---|---|---|---|---|"]
    lines += [row(form, example) for form in FORMS for example in form.EXAMPLES]
    lines.append("\n## Source of the examples\n")
    for form in FORMS:
        summary = (form.__doc__ or "").strip().splitlines()[0]
        lines.append(f"### {name_of(form)}\n\n{summary}\n")
        for example in form.EXAMPLES:
            source = inspect.getsource(example.forward).rstrip()
            body = "\n".join(line[4:] for line in source.splitlines())
            lines.append(f"`{example.__name__}`\n\n```python\n{body}\n```\n")
    return "\n".join(lines) + HUGGING_FACE


if __name__ == "__main__":
    sys.stdout.write(page())
