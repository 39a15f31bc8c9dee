"""Unpack from a vLLM wheel what the peers ``vllm``, ``vllm_best`` and ``tk`` of ``experts.py`` need.

Run ``python benchmarks/carry.py WHEEL``; it fills ``carried/`` at the repository root, which git ignores. Nothing of
vLLM is kept in the repository: its kernels are read from there at run time. Known to fit: vllm 0.20.2, which is
built for torch 2.11 with CUDA 13.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import zipfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "carried"
LAYER = "vllm/model_executor/layers/fused_moe/"
KERNELS = "vllm/third_party/triton_kernels/"
FILES = (LAYER + "fused_moe.py", "vllm/_moe_C.abi3.so", KERNELS + "matmul_ogs.py", KERNELS + "topk.py")
# Tuned settings for unquantised weights have no dtype= in their names.
SETTINGS = re.compile(re.escape(LAYER) + r"configs/E=\d+,N=\d+,device_name=NVIDIA_H[12]00[^,]*\.json")
LIMIT = 60_000_000  # a machine that takes a working copy takes 64 MiB of ignored files


def wanted(names: list[str]) -> list[str]:
    """The members to unpack, in the wheel's order; a missing one ends the program."""
    chosen = [n for n in names if n in FILES or SETTINGS.fullmatch(n) or (n.startswith(KERNELS) and n[-1] != "/")]
    missing = [name for name in FILES if name not in chosen]
    if not any(SETTINGS.fullmatch(name) for name in chosen):
        missing.append(LAYER + "configs/E=*,N=*,device_name=NVIDIA_H?00*.json")
    if missing:
        raise SystemExit(f"the wheel lacks {', '.join(missing)}: is it vllm 0.20.2?")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="vllm-0.20.2-cp38-abi3-manylinux_2_35_x86_64.whl")
    path = parser.parse_args().wheel
    if not zipfile.is_zipfile(path):
        print(f"{path} is not a wheel", file=sys.stderr)
        return 1
    with zipfile.ZipFile(path) as wheel:
        names = wanted(wheel.namelist())
        size = sum(wheel.getinfo(name).file_size for name in names)
        if size > LIMIT:
            print(f"{size / 1e6:.1f} MB are more than {LIMIT / 1e6:.0f} MB", file=sys.stderr)
            return 1
        shutil.rmtree(TARGET, ignore_errors=True)  # of another version nothing may stay
        wheel.extractall(TARGET, names)
    print(f"{len(names)} files, {size / 1e6:.1f} MB in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
