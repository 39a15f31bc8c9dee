"""moe_compile: a torch.compile backend that runs naive Mixture-of-Experts layers as one fused op.

Nothing is imported until a public name is used: this module is loaded inside ``torch.compile(...)``
(entry point) and by ``TORCH_LOGS``, so it stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compile.checking import CheckResult, check
    from moe_compile.decorator import NotRewritten, rewrite
    from moe_compile.explaining import explain
    from moe_compile.functional import deep_gemm_moe_fp8, fused_experts
    from moe_compile.huggingface import optimize, restore
    from moe_compile.inductor_pass import MoEPass
    from moe_compile.report import Report, Site
    from moe_compile.warming import WarmUp, WarmUpError, warmup

__version__ = "0.1.0"

# No module shares a name with a public function: importing it would hide the function.
_HOME = {
    "CheckResult": "checking",
    "MoEPass": "inductor_pass",
    "NotRewritten": "decorator",
    "Report": "report",
    "Site": "report",
    "WarmUp": "warming",
    "WarmUpError": "warming",
    "check": "checking",
    "deep_gemm_moe_fp8": "functional",
    "explain": "explaining",
    "fused_experts": "functional",
    "optimize": "huggingface",
    "restore": "huggingface",
    "rewrite": "decorator",
    "warmup": "warming",
}

__all__ = [
    "CheckResult",
    "MoEPass",
    "NotRewritten",
    "Report",
    "Site",
    "WarmUp",
    "WarmUpError",
    "__version__",
    "check",
    "deep_gemm_moe_fp8",
    "explain",
    "fused_experts",
    "optimize",
    "restore",
    "rewrite",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
