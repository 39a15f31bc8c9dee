"""``python -m moe_compile demo | explain | check | bench | tune | warmup | doctor``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cli_gpu
from .cli_arguments import UsageError, load_target, number, numbers, sizes, workers

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it ended well, 1 when something is wrong, 2 for a wrong command line."""
    arguments = _parser().parse_args(argv)
    # The commands print their report: the same refusals as log lines would only repeat it.
    log = logging.getLogger("moe_compile.report")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return int(arguments.run(arguments))
    except UsageError as error:
        print(f"moe_compile: {error}", file=sys.stderr)
        return 2
    finally:
        log.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe_compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print JSON instead of text")
        sub.set_defaults(run=run)
        return sub

    command("demo", _demo, "rewrite, check and time small MoE models here; takes about a minute")
    for name, run, text in (
        ("explain", _explain, "tell which MoE layers of a model are rewritten, and why not"),
        ("check", _check, "compare a model with its rewritten form"),
    ):
        sub = command(name, run, text)
        sub.add_argument("target", help="path.py:function, a function that returns (model, args[, kwargs])")
        if name == "explain":
            sub.add_argument("--html", metavar="FILE", help="write the report as a page, too")
    bench = command("bench", _bench, "time a naive MoE layer: eager, torch.compile, moe_compile")
    bench.add_argument("--layer", type=sizes, default=(8, 2, 256, 512), metavar="E,K,H,I", help="default 8,2,256,512")
    bench.add_argument("--tokens", type=numbers, default=[1, 16, 128], metavar="N,N,..", help="default 1,16,128")
    bench.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on a GPU, else float32")
    tune = command("tune", cli_gpu.tune, "measure kernel plans for a layer on this GPU and keep those that win")
    tune.add_argument("--layer", type=sizes, required=True, metavar="E,K,H,I", help="such as 128,8,2048,768")
    tune.add_argument(
        "--tokens", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096], metavar="N,N,..",
        help="numbers of tokens, each for those up to 1.4 times away; default 1,2,4,..,4096",
    )  # fmt: skip
    tune.add_argument("--dtype", choices=DTYPES[1:], default="bfloat16", help="default bfloat16")
    tune.add_argument("--layout", default="concat", help="of gate and up: single, concat, interleaved, separate")
    tune.add_argument("--storage", default="stacked", help="of the weights: stacked, transposed, separate")
    tune.add_argument("--activation", default="silu", help="default silu")
    tune.add_argument("--budget", type=number, default=60, metavar="N", help="plans per number of tokens, default 60")
    warm = command("warmup", cli_gpu.warmup, "compile the kernels of a model's MoE layers before they are needed")
    warm.add_argument("target", nargs="?", help="path.py:function as for explain; or give --layer")
    warm.add_argument("--layer", type=sizes, metavar="E,K,H,I", help="a layer without a model, such as 128,8,2048,768")
    warm.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of --layer, default bfloat16")
    warm.add_argument("--fp8", action="store_true", help="--layer has fp8 weights with block scales")
    warm.add_argument("--activation", default="silu", help="of --layer, default silu")
    warm.add_argument("--max-tokens", type=number, default=16384, metavar="N", help="of one call, default 16384")
    warm.add_argument("--workers", type=workers, metavar="N", help="processes, 0 for none; default one per processor")
    command("doctor", _doctor, "show what is installed and test that it works")
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    from moe_compile.explaining import explain

    model, args, kwargs = load_target(arguments.target)
    report = explain(model, *args, **kwargs)
    print(report.to_json() if arguments.json else report)
    if arguments.html:
        Path(arguments.html).write_text(report.to_html(), encoding="utf-8")
    return 0 if report.sites and len(report.rewritten) == len(report.sites) else 1


def _check(arguments: argparse.Namespace) -> int:
    from moe_compile.checking import check

    model, args, kwargs = load_target(arguments.target)
    result = check(model, *args, **kwargs)
    print(json.dumps(_check_row(result), indent=2) if arguments.json else result)
    return 0 if result else 1


def _check_row(result: Any) -> dict[str, Any]:
    row = {k: v for k, v in result.__dict__.items() if k != "report"}
    return {**row, "report": json.loads(result.report.to_json())}


def _demo(arguments: argparse.Namespace) -> int:
    from moe_compile import bench
    from moe_compile.checking import check
    from moe_compile.demo import device_and_dtype, samples
    from moe_compile.explaining import explain

    device, dtype = device_and_dtype()
    shown = samples()
    good, rows, out = True, [], []

    def say(text: str) -> None:
        if not arguments.json:
            print(text, flush=True)

    say(f"moe_compile demo on {device.type}, {str(dtype).removeprefix('torch.')}")
    for sample in shown:
        report = explain(sample.model, *sample.args, **sample.kwargs)
        say(f"\n== {sample.name}\n{report}")
        result = check(sample.model, *sample.args, **sample.kwargs)
        say(str(result))
        times = bench.speed(sample)
        rows.append({"model": sample.name, **times})
        good = good and result.ok and bool(report.rewritten)
        out.append({**rows[-1], "check": _check_row(result)})
    if not any("Mixtral" in sample.name for sample in shown):
        say("\nA Hugging Face model is shown too with: pip install 'transformers>=5.17'")
    say(f"\n== milliseconds per call, median\n{bench.table(rows)}")
    if arguments.json:
        print(json.dumps(out, indent=2))
    return 0 if good else 1


def _bench(arguments: argparse.Namespace) -> int:
    import torch

    from moe_compile import bench
    from moe_compile.demo import device_and_dtype

    device, dtype = device_and_dtype()
    if arguments.dtype is not None:
        dtype = getattr(torch, arguments.dtype)
    rows = bench.layer_rows(arguments.layer, arguments.tokens, device, dtype)
    if arguments.json:
        head = {"layer": arguments.layer, "device": device.type, "dtype": str(dtype)}
        print(json.dumps({**head, "rows": rows}, indent=2))
    else:
        experts, top_k, hidden, inner = arguments.layer
        name = str(dtype).removeprefix("torch.")
        print(f"E={experts} K={top_k} H={hidden} I={inner} on {device.type}, {name}")
        print(bench.table(rows))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from moe_compile import doctor

    found = doctor.findings()
    print(json.dumps(doctor.as_rows(found), indent=2) if arguments.json else doctor.as_text(found))
    return 1 if any(f.status == doctor.BAD for f in found) else 0
