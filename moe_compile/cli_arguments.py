"""What the command line's arguments mean; imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """The command line names something that is not there."""


def numbers(text: str) -> list[int]:
    """One or more positive numbers: ``1,16,128``."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,16,128") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every number must be positive")
    return found


def number(text: str) -> int:
    """One positive number."""
    found = numbers(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be one number")
    return found[0]


def workers(text: str) -> int:
    """A number of processes, or 0."""
    return 0 if text == "0" else number(text)


def sizes(text: str) -> tuple[int, int, int, int]:
    """``E,K,H,I`` of a layer."""
    found = numbers(text)
    if len(found) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be four numbers E,K,H,I")
    experts, top_k, hidden, inner = found
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
