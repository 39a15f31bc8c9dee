"""Options: what can be chosen, where a value comes from, and what a wrong one says.

Precedence: the call (``options={"moe_compile.strict": True}`` or a keyword) over the environment
(``MOE_COMPILE_STRICT=1``) over the default. ``MOE_COMPILE=0`` switches the package off altogether.
This module imports neither torch nor triton.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

log = logging.getLogger("moe_compile.config")

PREFIX = "moe_compile."
ENV = "MOE_COMPILE"
EXPERTS = ("auto", "triton", "deepgemm", "cpu")
DEEPGEMM_RULES = ("auto", "vllm")
_CHOICES = {"experts": EXPERTS, "deepgemm_rule": DEEPGEMM_RULES}
# Names that mean something elsewhere; giving one here is an error that says where.
_RESERVED = {"quantize": "it changes weights, so moe_compile.optimize(model, quantize='fp8') takes it"}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_warned: set[str] = set()


class OptionError(ValueError):
    """An unknown option, or a value that the option does not take."""


@dataclass(frozen=True)
class Options:
    """The choices of one compilation.

    Args:
        strict: raise when a MoE candidate is refused or a rewrite fails, instead of keeping the original.
        experts: which kernels run the experts: ``"auto"`` (by device and number of tokens), ``"triton"``,
            ``"deepgemm"`` (experts with fp8 weights) or ``"cpu"``. Naming one makes it an error if it cannot run.
        deepgemm_rule: when ``experts="auto"`` sends experts with fp8 weights to DeepGEMM: ``"auto"`` (where it was
            measured to be faster) or ``"vllm"`` (exactly where vLLM does); see ``guards.py``.
        verify: run the original beside the rewritten program on the first call and compare.
        dryrun: match and report, change nothing.

    Raises:
        OptionError: a value of the wrong type or outside the allowed ones.
    """

    strict: bool = False
    experts: str = "auto"
    deepgemm_rule: str = "auto"
    verify: bool = False
    dryrun: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES:
                _check_choice(field.name, value)
            elif not isinstance(value, bool):
                raise OptionError(f"option {field.name!r} takes True or False, got {value!r} ({type(value).__name__})")

    @property
    def kernels(self) -> str:
        """What the op for fp8 weights is told: a rule, or kernels by name."""
        return self.experts if self.experts in ("triton", "deepgemm") else self.deepgemm_rule

    @staticmethod
    def resolve(overrides: Mapping[str, Any] | None = None) -> Options:
        """The options in force for a call that gave ``overrides``.

        Raises:
            OptionError: an unknown name (the nearest known one is suggested) or a wrong value.
        """
        return Options(**{name: value for name, (value, _) in effective(overrides).items()})


NAMES = tuple(field.name for field in fields(Options))


def effective(overrides: Mapping[str, Any] | None = None) -> dict[str, tuple[Any, str]]:
    """Each option's value and its origin: ``"call"``, ``"environment"`` or ``"default"``."""
    given = dict(overrides or {})
    for name in given:
        _check_name(name)
    _report_unknown_environment()
    out: dict[str, tuple[Any, str]] = {}
    for field in fields(Options):
        variable = f"{ENV}_{field.name.upper()}"
        if field.name in given:
            out[field.name] = (given[field.name], "call")
        elif variable in os.environ:
            raw = os.environ[variable]
            out[field.name] = (raw if field.name in _CHOICES else _parse_bool(variable, raw), "environment")
        else:
            out[field.name] = (field.default, "default")
    return out


def split_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part ``torch.compile(options=...)`` into ours (prefix ``moe_compile.`` removed) and Inductor's."""
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key.startswith(PREFIX):
            ours[key[len(PREFIX) :]] = value
        else:
            theirs[key] = value
    return ours, theirs


def enabled() -> bool:
    """Whether the package may rewrite anything; ``MOE_COMPILE=0`` says no."""
    raw = os.environ.get(ENV, "")
    return _parse_bool(ENV, raw) if raw else True


# Functions decorated with ``rewrite`` run as they were written while this is set (``explain``, ``check``).
AS_WRITTEN: ContextVar[bool] = ContextVar("moe_compile_as_written", default=False)


TUNED = f"{ENV}_TUNED"  # the folder with the tables of ``python -m moe_compile tune``
DEEP_GEMM = f"{ENV}_DEEP_GEMM"  # a folder with a package ``deep_gemm`` that goes before installed ones, or 0 for none


def tuned_folder() -> str:
    """Where tables of measured plans are kept: ``MOE_COMPILE_TUNED``, else the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get(TUNED) or os.path.join(cache, "moe_compile", "tuned")


def unknown_environment() -> list[str]:
    """Variables that look like ours and are not: ``MOE_COMPILE_STRCT``."""
    known = {ENV, TUNED, DEEP_GEMM, *(f"{ENV}_{name.upper()}" for name in NAMES)}
    return sorted(v for v in os.environ if v.startswith(f"{ENV}_") and v not in known)


def _report_unknown_environment() -> None:
    for variable in unknown_environment():
        name = variable[len(ENV) + 1 :].lower()
        if name in _RESERVED:
            _check_name(name)
        if variable not in _warned:
            _warned.add(variable)
            log.warning("environment variable %s is no option of moe_compile%s", variable, _nearest(name))


def _check_name(name: str) -> None:
    if name in _RESERVED:
        reason = _RESERVED[name]
        raise OptionError(f"option {name!r} is none of a compilation: {reason}")
    if name not in NAMES:
        raise OptionError(f"unknown option {name!r}{_nearest(name)}; the options are {', '.join(NAMES)}")


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _check_choice(name: str, value: object) -> None:
    allowed = _CHOICES[name]
    if value not in allowed:
        close = difflib.get_close_matches(str(value).lower(), allowed, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        given = f"{value!r} ({type(value).__name__})"
        raise OptionError(f"option {name!r} takes one of {', '.join(map(repr, allowed))}, got {given}{hint}")


def _parse_bool(variable: str, raw: str) -> bool:
    text = raw.strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    allowed = f"{'/'.join(_TRUE)} or {'/'.join(_FALSE)}"
    raise OptionError(f"environment variable {variable} takes {allowed}, got {raw!r}")
