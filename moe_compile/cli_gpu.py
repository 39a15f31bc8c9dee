"""The commands that need a GPU: ``tune`` and ``warmup``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from .cli_arguments import UsageError, load_target


def tune(arguments: argparse.Namespace) -> int:
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


def warmup(arguments: argparse.Namespace) -> int:
    """Compile and load; 1 when something failed."""
    from moe_compile.warming import WarmUpError

    if (arguments.target is None) == (arguments.layer is None):
        raise UsageError("warmup takes path.py:function, or --layer E,K,H,I for a layer without a model")
    code = 0
    try:
        result = _warm_layer(arguments) if arguments.layer else _warm_target(arguments)
    except WarmUpError as error:
        if error.result is None:
            raise UsageError(str(error)) from error
        print(f"moe_compile: {error}", file=sys.stderr)
        result, code = error.result, 1
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        print("\n".join([str(result), *map(str, result.failures)]))
    return code


def _warm_target(arguments: argparse.Namespace) -> Any:
    from moe_compile.warming import require_cuda, warmup

    require_cuda()  # before a model is loaded
    model, args, kwargs = load_target(arguments.target)
    return warmup(model, *args, max_tokens=arguments.max_tokens, workers=arguments.workers, **kwargs)


def _warm_layer(arguments: argparse.Namespace) -> Any:
    import torch

    from moe_compile.spec import ACTIVATIONS
    from moe_compile.warming import require_cuda, warm_layers
    from moe_compile.warming.calls import layers_of_size

    if arguments.activation not in ACTIVATIONS:
        raise UsageError(f"activation {arguments.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    require_cuda()
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, arguments.dtype)
    layers = layers_of_size(arguments.layer, dtype, arguments.fp8, arguments.activation, device)
    return warm_layers(layers, arguments.max_tokens, arguments.workers, True)
