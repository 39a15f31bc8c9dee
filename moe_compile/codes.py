# ruff: noqa: E501  (a table of prose)
"""The why-not codes: one table for reports, log lines and ``docs/refusals.md``.

``python -m moe_compile.codes > docs/refusals.md`` writes the page; a test keeps it up to date.
Codes are stable: a number is never given a second meaning. This module imports nothing heavy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

GROUPS = {
    "MC1": "Capture: the graph never reached the backend whole",
    "MC2": "Structure: the region is not one MoE layer",
    "MC3": "Semantics: the layer means something else",
    "MC4": "Data: dtypes, layouts and sizes",
    "MC5": "Backend: kernels and environment",
}


@dataclass(frozen=True)
class Code:
    """One reason.

    Args:
        code: ``"MC"`` and three digits.
        title: a few words for a table.
        meaning: what was found and why the original program stays.
        example: the smallest source that shows it.
        fix: what the user can do, in one line.
    """

    code: str
    title: str
    meaning: str
    example: str
    fix: str


# fmt: off
_TABLE = (
    Code("MC101", "graph break on a value",
         "Dynamo cannot follow a branch or a Python number that depends on tensor values (`.any()`, `.item()`, `.tolist()`), so the experts were in no graph and the backend was never shown them.",
         "if mask.any(): out[mask] += expert(x[mask])",
         "remove the test: an expert without tokens adds nothing, so the result is the same"),
    Code("MC102", "loop over the experts that were hit",
         "The loop runs over the result of `nonzero()` or `unique()`, whose length is known only at run time; no capture setting can unroll it.",
         "for e in hit.nonzero(): ...",
         "loop over range(num_experts); for a Hugging Face model call moe_compile.optimize(model)"),
    Code("MC103", "dynamic-shape operator not captured",
         "An operator whose output shape depends on tensor values (`where(mask)`, `nonzero`, `x[mask]`, `bincount`) ended the graph.",
         "token = torch.where(ids == e)[0]  # under a backend that does not capture dynamic shapes",
         'compile with torch.compile(model, backend="moe_compile"), or pass fullgraph=True'),
    Code("MC104", "call disabled or hooked",
         "The call is kept out of every graph: `torch.compiler.disable`, a wrapper that Dynamo skips, or a hook.",
         "@torch.compiler.disable\ndef moe(self, x): ...",
         "remove the decorator or the hook, or call moe_compile.optimize(model) for a Hugging Face model"),
    Code("MC105", "other graph break in MoE code",
         "Dynamo ended the graph inside a function that looks like an MoE layer, for a reason that has nothing to do with routing; the reason is quoted.",
         'print("routing", ids.shape)',
         "move the statement out of the layer"),
    Code("MC106", "nothing captured",
         "The program ran, but no graph reached the backend, so there was nothing to look at.",
         "model.forward = torch.compiler.disable(model.forward)",
         "compile the module whose forward does the work"),
    Code("MC200", "no form fits",
         "Experts are chosen and their outputs combined here, but in a way that no form knows.",
         "out = custom_combine(expert_outputs, ids, weights)",
         "write the layer in one of the forms of docs/forms.md, or call moe_compile.fused_experts"),
    Code("MC201", "experts differ",
         "The experts have different shapes, dtypes, devices or biases; one op needs them alike.",
         "experts = [MLP(64, 128), MLP(64, 256)]",
         "give every expert the same shape, dtype and device"),
    Code("MC202", "shared expert weight",
         "One tensor serves two experts; in training its gradient would be counted in two places.",
         "experts[1].w1.weight = experts[0].w1.weight",
         "untie the experts, or keep the original layer"),
    Code("MC203", "inner value used elsewhere",
         "A value inside the region (for example one expert's output) is also returned, saved or read by a hook, and the fused op never makes it.",
         "self.last = expert_out",
         "do not keep per-expert values; router logits and weights may be returned freely"),
    Code("MC204", "weights or inputs written in the loop",
         "A tensor that the region reads is changed between its reads.",
         "self.w1[e].mul_(0.5)",
         "move the write before or after the layer"),
    Code("MC205", "side effect or random numbers in an expert",
         "An expert drops out, draws random numbers or writes state; one op cannot repeat that order.",
         "F.dropout(h, training=True)",
         "call model.eval() for inference, or move the dropout behind the layer"),
    Code("MC206", "experts of different kinds",
         "The experts do not all compute the same function: another activation, an extra operation, another bias.",
         "experts = [SwiGLU(), ReLUMLP()]",
         "give every expert the same structure"),
    Code("MC207", "ids and weights from different places",
         "The token index, the expert id and the router weight do not come from the same pair of top-k results.",
         "weights.roll(1, 0)",
         "index all of them with the same token and slot"),
    Code("MC208", "missing or repeated expert",
         "The loop does not visit every expert exactly once with its own id.",
         "for e in range(num_experts - 1): ...",
         "visit each expert in 0..E-1 exactly once"),
    Code("MC209", "capacity or dropped tokens",
         "Some tokens are dropped or limited per expert, so the layer is not the plain routed sum.",
         "token = torch.where(ids == e)[0][:capacity]",
         "remove the limit, or keep the original layer"),
    Code("MC210", "order-dependent accumulation",
         "The result depends on the order of the experts (assignment instead of addition, reading the output so far).",
         "out[token] = expert(x[token])",
         "add with out[token] += ... or index_add_ into zeros"),
    Code("MC211", "autocast inside the layer",
         "The layer runs under torch.autocast, which changes dtypes operation by operation; the op cannot promise the same.",
         'with torch.autocast("cuda"): moe(x)',
         "convert the model with model.to(torch.bfloat16) instead"),
    Code("MC212", "a value comes too late",
         "Something that the op needs as input is computed only after the place where its output is needed, or inside a composite operation.",
         "out = moe(x); scale = weights.sum()",
         "keep the original layer, or compute the value before the layer"),
    Code("MC213", "missing or repeated slot",
         "A loop over the slots of the top-k does not visit every slot of every expert exactly once, so the sum is not over all chosen experts.",
         "for k in range(top_k - 1): ...",
         "visit each slot in 0..K-1 exactly once for each expert"),
    Code("MC214", "code that does not depend on the experts' tokens alone",
         "A step runs only for experts with tokens, or for the experts that were hit, and it does more than add those tokens' outputs, or its test is about something else. Run for every expert it would change the result.",
         "if mask.sum() > 1: out[mask] += expert(x[mask])",
         "keep nothing but the experts' sum under the test, and test for emptiness alone"),
    Code("MC215", "a loop whose experts are not alike",
         "The loop over many experts does something else for some of them than for the first two, or passes something other than the sum out of the loop. It is then traced whole, which only takes longer.",
         "y = expert(x[token]) * self.scales[e]",
         "nothing to do, or give every expert the same structure"),
    Code("MC216", "checkpointed region",
         "Part of the layer runs under activation checkpointing, as a graph within the graph that is run again in the backward pass; the layer is not looked at across that border.",
         "torch.utils.checkpoint.checkpoint(expert, x[token], use_reentrant=False)",
         "run inference without activation checkpointing, or keep the original layer for training"),
    Code("MC301", "unknown expert function",
         "What an expert computes is not two linear maps with a known activation (silu, gelu, relu, relu squared, clamped variants) between them.",
         "w2(my_activation(w1(x)) * w3(x))",
         "use a known activation, or call moe_compile.fused_experts with a moe_compile.spec.Activation"),
    Code("MC302", "router weight in the wrong place",
         "The router weight multiplies neither exactly the expert's input nor exactly its output: both, something in between, or before a bias.",
         "w2(act(w1(x)) * weight) + bias",
         "multiply the router weight into the expert's output (or its input) once"),
    Code("MC303", "the expert does not end in a linear map",
         "Something follows the down projection inside the expert, for example a norm, before the weighted sum.",
         "self.norm(expert(x[token])) * w",
         "keep the original layer, or normalise once after the sum"),
    Code("MC304", "combine is no plain sum",
         "The expert outputs are combined by something other than a weighted sum (maximum, mean, concatenation).",
         "torch.maximum(out, y)",
         "use a weighted sum, or keep the original layer"),
    Code("MC401", "dtype",
         "The op has no kernel for this dtype or mixture of dtypes.",
         "model.to(torch.complex64)",
         "use float32, bfloat16 or float16 for hidden states and weights (DeepGEMM: bfloat16 and float8_e4m3fn)"),
    Code("MC402", "quantised weight or tensor subclass",
         "A weight is not a plain tensor (quantised, sharded, wrapped), and guessing its meaning would be wrong. For fp8 see MC408.",
         "experts[0].w1.weight  # a DTensor",
         "keep the original layer for this model, or load it with plain weights"),
    Code("MC403", "layout needs a copy",
         "The weights are laid out so that the kernel would need a second copy of them.",
         "w1 = w.expand(E, I, H)",
         "store one contiguous tensor per expert or one stacked tensor"),
    Code("MC404", "alignment",
         "A size or address is not aligned as the kernel needs it.",
         "H = 63 in bfloat16",
         "pad the size to a multiple of 8 (for DeepGEMM of 128)"),
    Code("MC407", "layout of the result",
         "The layer's result lies in memory with gaps or overlaps, or its buffer is read later in two orders; the op returns dense rows.",
         "out = torch.zeros(T, 2 * H)[:, :H]",
         "allocate the output as it is: torch.zeros(T, H)"),
    Code("MC408", "fp8 weights and their scales",
         "The experts' weights are fp8 and are widened in a way that the op does not compute: another format than float8_e4m3fn, a tensor per expert, only some of the projections, or scales that are not one per block of 128 x 128, per output channel or per tensor, taken at the same expert as the weight.",
         "w = self.w1[e].to(x.dtype) * self.scale[e].repeat_interleave(64, 0)[:, None]",
         "store stacked float8_e4m3fn weights [E, out, in] with scales [E], [E, out, 1] or [E, out / 128, in / 128], and write w1[e].to(x.dtype) * scale[e], repeated by 128 for blocks"),
    Code("MC501", "DeepGEMM missing",
         "DeepGEMM was asked for by name and no package provides it.",
         'options={"moe_compile.experts": "deepgemm"}',
         'use experts="auto"'),
    Code("MC502", "nvcc missing or too old",
         "DeepGEMM compiles its kernels with nvcc at the first call; none, or one that is too old, was found.",
         "nvcc 12.1, needed 12.3",
         "install a newer CUDA toolkit, or use the Triton kernels"),
    Code("MC503", "probe failed",
         "A kernel was compiled and run once on a small problem, and its result was wrong or it raised.",
         "RuntimeError in the probe",
         "run python -m moe_compile doctor and report its output"),
    Code("MC504", "architecture",
         "The device is not one that the kernel supports.",
         "compute capability 7.5",
         "use a supported device, or the CPU implementation"),
    Code("MC505", "slower here (note)",
         "Another implementation is faster for this shape, so it was chosen.",
         "T = 1 with 8 experts",
         "nothing to do"),
    Code("MC506", "bias not supported",
         "The chosen kernel takes no biases.",
         'experts="deepgemm" with b1',
         'use experts="auto"'),
    Code("MC507", "training not supported",
         "Gradients are needed, and the op cannot give them for this layer yet; the original stays.",
         "loss.backward()",
         "run inference under torch.no_grad(), or keep the original layer for training"),
    Code("MC508", "the rewrite failed",
         "moe_compile itself raised while it looked at the graph; the original program runs. This is a bug.",
         "TypeError in the reason",
         "report it with the reason and the output of python -m moe_compile doctor"),
    Code("MC509", "too few tokens for DeepGEMM (note)",
         "DeepGEMM pads the rows of every expert to whole tiles, so the reference rule leaves calls with fewer than 128 tokens to the Triton kernels. One compiled layer serves both.",
         "T = 127",
         "nothing to do"),
    Code("MC510", "experts too narrow for DeepGEMM (note)",
         "With an intermediate size of at most 512 (of one rank), sorting and quantising the rows costs more than the faster matrix product saves, so the reference rule takes the Triton kernels.",
         "I = 512",
         "nothing to do"),
    Code("MC511", "kernel not compiled yet",
         "DeepGEMM compiles a kernel when a shape is first seen, and this would have been inside the capture of a CUDA graph, where nothing can be compiled or loaded.",
         "with torch.cuda.graph(graph): moe(x)  # the first call with this T",
         "call moe_compile.warmup(model) before, or the layer once with the same shapes outside the capture"),
    Code("MC512", "a kernel was not warmed up",
         "moe_compile.warmup could not compile or run a kernel; the others are compiled. The error names the kernel, the layer and the number of tokens.",
         "moe_compile.warmup(model, max_tokens=1000000)  # no memory for so many tokens",
         "follow the compiler's message; if it blames no memory, disk or tool of this machine, report it with the output of python -m moe_compile doctor"),
    Code("MC513", "nothing to warm up",
         "The model ran, and none of its layers is one op of ours, or nothing is known to run it with.",
         "moe_compile.warmup(naive_model)",
         "give inputs as for a call, moe_compile.warmup(model, *inputs); moe_compile.explain(model, *inputs) tells why a layer is left alone"),
)
# fmt: on

CODES: dict[str, Code] = {code.code: code for code in _TABLE}


def fix_for(code: str | None) -> str:
    """The table's own advice for a code, "" for none or an unknown one."""
    return CODES[code].fix if code in CODES else ""


def markdown() -> str:
    """The page ``docs/refusals.md``."""
    lines = [
        "# What is refused, and why",
        "",
        "Every MoE candidate that is not rewritten has a code. `moe_compile.explain(model, *inputs)` and the logger "
        "`moe_compile.report` print it with the failing fact and the source line. Codes marked (note) are no "
        "refusals: the layer was rewritten, and the note says how.",
        "",
        "This page is generated by `python -m moe_compile.codes`.",
    ]
    for prefix, title in GROUPS.items():
        lines += ["", f"## {prefix}xx {title}"]
        for code in _TABLE:
            if code.code.startswith(prefix):
                lines += [
                    "",
                    f"### {code.code} {code.title}",
                    "",
                    code.meaning,
                    "",
                    "```python",
                    code.example,
                    "```",
                    "",
                    f"What to do: {code.fix}.",
                ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
