"""Kernels run on CPU tensors under Triton's interpreter; with a GPU, ``tests/gpu`` runs them for real.

Triton decides at import whether its functions are interpreted, so the switch must come first. When another
test has already imported Triton without it, Triton's Python modules are imported anew: nothing on a machine
without a GPU can have used them.
"""

from __future__ import annotations

import os
import sys

import torch

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["TRITON_INTERPRET"] = "1"
    loaded = sys.modules.get("triton")
    if loaded is not None and not hasattr(loaded.cdiv, "rewrite"):
        for name in list(sys.modules):
            ours = name.startswith("moe_compile.kernels.")
            if ours or name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C")):
                del sys.modules[name]
