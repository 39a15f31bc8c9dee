"""``python -m moe_compile demo | explain | check | bench | tune | doctor``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


class UsageError(Exception):
    """The command line names something that is not there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it ended well, 1 when something is wrong, 2 for a wrong command line."""
    arguments = _parser().parse_args(argv)
    # The commands print their report: the same refusals as log lines would only repeat it.
    logging.getLogger("moe_compile.report").setLevel(logging.ERROR)
    try:
        return int(arguments.run(arguments))
    except UsageError as error:
        print(f"moe_compile: {error}", file=sys.stderr)
        return 2


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
    bench.add_argument("--layer", type=_sizes, default=(8, 2, 256, 512), metavar="E,K,H,I", help="default 8,2,256,512")
    bench.add_argument("--tokens", type=_numbers, default=[1, 16, 128], metavar="N,N,..", help="default 1,16,128")
    bench.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on a GPU, else float32")
    tune = command("tune", _tune, "measure kernel plans for a layer on this GPU and keep those that win")
    tune.add_argument("--layer", type=_sizes, required=True, metavar="E,K,H,I", help="such as 128,8,2048,768")
    tune.add_argument(
        "--tokens", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096], metavar="N,N,..",
        help="numbers of tokens, each for those up to 1.4 times away; default 1,2,4,..,4096",
    )  # fmt: skip
    tune.add_argument("--dtype", choices=DTYPES[1:], default="bfloat16", help="default bfloat16")
    tune.add_argument("--layout", default="concat", help="of gate and up: single, concat, interleaved, separate")
    tune.add_argument("--storage", default="stacked", help="of the weights: stacked, transposed, separate")
    tune.add_argument("--activation", default="silu", help="default silu")
    tune.add_argument("--budget", type=_number, default=60, metavar="N", help="plans per number of tokens, default 60")
    command("doctor", _doctor, "show what is installed and test that it works")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,16,128") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every number must be positive")
    return numbers


def _number(text: str) -> int:
    numbers = _numbers(text)
    if len(numbers) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be one number")
    return numbers[0]


def _sizes(text: str) -> tuple[int, int, int, int]:
    numbers = _numbers(text)
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be four numbers E,K,H,I")
    experts, top_k, hidden, inner = numbers
    if top_k > experts:
        raise argparse.ArgumentTypeError(f"K={top_k} experts per token, but there are only E={experts}")
    return experts, top_k, hidden, inner


def load_target(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """``path.py:function`` -> the model, its arguments and keyword arguments.

    Raises:
        UsageError: no such file or function, or it returns something else.
    """
    path, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(f"{target!r} must look like path.py:function")
    if not Path(path).is_file():
        raise UsageError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{path!r} has no function {name!r}")
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise UsageError(f"{name} must return (model, args) or (model, args, kwargs), got {type(made).__name__}")
    model, args = made[:2]
    kwargs = dict(made[2]) if len(made) == 3 else {}
    return model, tuple(args) if isinstance(args, (tuple, list)) else (args,), kwargs


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


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    from moe_compile.config import tuned_folder

    if not torch.cuda.is_available():
        raise UsageError("tune measures on a CUDA GPU, and torch finds none here: run it on the machine that has it")
    from moe_compile import tuning
    from moe_compile.kernels.experts import device_of, table_of
    from moe_compile.kernels.tuned import merge

    device = torch.device("cuda", torch.cuda.current_device())
    path = table_of(tuned_folder(), device.index)
    try:
        layer = tuning.layer_of(
            arguments.layer, arguments.dtype, arguments.layout, arguments.storage, arguments.activation
        )
        merge(path, {})  # a table that cannot be written is told before anything is measured
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    results = []
    for i, tokens in enumerate(arguments.tokens, 1):

        def step(tried: int, best: str, at: str = f"T={tokens} ({i} of {len(arguments.tokens)})") -> None:
            sys.stderr.write(f"\r{at}: plan {tried} of at most {arguments.budget}, best {best}   ")

        problem = tuning.Problem(layer, tokens, arguments.activation, device, device_of(device.index))
        result = tuning.tune(problem, arguments.budget, step=step)
        tuning.keep(path, result)
        results.append(result)
        sys.stderr.write("\r" + " " * 70 + "\r")
        if not arguments.json:
            print(result, flush=True)
    if arguments.json:
        print(json.dumps({"table": str(path), "results": [result.to_dict() for result in results]}, indent=2))
    else:
        print(f"kept in {path}; new processes use it")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from moe_compile import doctor

    found = doctor.findings()
    print(json.dumps(doctor.as_rows(found), indent=2) if arguments.json else doctor.as_text(found))
    return 1 if any(f.status == doctor.BAD for f in found) else 0
