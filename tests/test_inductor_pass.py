"""``MoEPass`` in Inductor's own slot: the same rewrite with ``backend="inductor"``, and warm caches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from moe_compile.patterns.dense_loop import MaskedDense
from support import relative

import moe_compile
from moe_compile import report
from moe_compile.config import OptionError

PROGRAM = """
import torch, moe_compile
from torch._dynamo.utils import counters
from moe_compile.patterns.dense_loop import MaskedDense
torch._inductor.config.pre_grad_custom_pass = moe_compile.MoEPass()
torch.manual_seed(0)
layer, x = MaskedDense().eval(), torch.randn(6, 32)
with torch.no_grad():
    out = torch.compile(layer, backend="inductor")(x)
    print("error", float((out - layer(x)).norm()))
print("hits", counters["inductor"]["fxgraph_cache_hit"], "misses", counters["inductor"]["fxgraph_cache_miss"])
"""


def test_rewrites_under_inductor():
    torch._dynamo.reset()
    layer, x = MaskedDense().eval(), torch.randn(6, 32)
    slot = {"pre_grad_custom_pass": moe_compile.MoEPass(), "force_disable_caches": True}  # a graph found meets no pass
    with torch._inductor.config.patch(slot), torch.no_grad():
        with report.collect() as found:
            out = torch.compile(layer, backend="inductor")(x)
        assert [s.status for s in found.sites] == ["rewritten"]
        assert relative(out, layer(x)) < 1e-6


def test_caches_hit_in_a_second_process(tmp_path: Path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    # in an empty cache, headers for one kernel and trials of the processor's vectors take longer than all the rest
    environment |= {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (r.stdout.split() for r in runs)
    assert float(first[1]) < 1e-5 and float(second[1]) < 1e-5
    assert first[2:] == ["hits", "0", "misses", "1"]
    assert second[2:] == ["hits", "1", "misses", "0"]


def test_identity_depends_on_the_options():
    assert moe_compile.MoEPass().uuid() == moe_compile.MoEPass().uuid()
    assert moe_compile.MoEPass().uuid() != moe_compile.MoEPass(strict=True).uuid()
    with pytest.raises(OptionError, match="strict"):
        moe_compile.MoEPass(stric=True)
