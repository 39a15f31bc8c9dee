"""Unpack from a vLLM wheel what the peers ``vllm``, ``vllm_best`` and ``tk`` of ``experts.py`` need, and DeepGEMM.

Run ``python benchmarks/carry.py WHEEL``; it fills ``carried/`` at the repository root, which git ignores. Nothing of
vLLM is kept in the repository: its kernels are read from there at run time. Known to fit: vllm 0.20.2, which is
built for torch 2.11 with CUDA 13. Its DeepGEMM, for Python 3.12, is found with
``MOE_COMPILE_DEEP_GEMM=carried/deep_gemm_home``. ``--only`` unpacks one of the two parts, the other stays as it is.
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
DEEP_GEMM = "vllm/third_party/deep_gemm/"
HOME = TARGET / "deep_gemm_home"
LIMIT = 70_000_000  # of both; a machine that takes a working copy takes 64 MiB of ignored files, so mind the sum


def wanted(names: list[str]) -> list[str]:
    """The members to unpack, in the wheel's order; a missing one ends the program."""
    chosen = [n for n in names if n in FILES or SETTINGS.fullmatch(n) or (n.startswith(KERNELS) and n[-1] != "/")]
    missing = [name for name in FILES if name not in chosen]
    if not any(SETTINGS.fullmatch(name) for name in chosen):
        missing.append(LAYER + "configs/E=*,N=*,device_name=NVIDIA_H?00*.json")
    if missing:
        raise SystemExit(f"the wheel lacks {', '.join(missing)}: is it vllm 0.20.2?")
    return chosen


def deep_gemm(names: list[str]) -> list[str]:
    """The members of DeepGEMM with its headers, which its compiler reads beside it; none ends the program."""
    chosen = [n for n in names if n.startswith(DEEP_GEMM) and n[-1] != "/"]
    if DEEP_GEMM + "__init__.py" not in chosen:
        raise SystemExit(f"the wheel lacks {DEEP_GEMM}: is it vllm 0.20.2?")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="vllm-0.20.2-cp38-abi3-manylinux_2_35_x86_64.whl")
    parser.add_argument("--only", choices=("peers", "deepgemm"), help="one part; default both")
    args = parser.parse_args()
    if not zipfile.is_zipfile(args.wheel):
        print(f"{args.wheel} is not a wheel", file=sys.stderr)
        return 1
    with zipfile.ZipFile(args.wheel) as wheel:
        members = wheel.namelist()
        peers = wanted(members) if args.only != "deepgemm" else []
        library = deep_gemm(members) if args.only != "peers" else []
        sizes = [sum(wheel.getinfo(name).file_size for name in names) for names in (peers, library)]
        if sum(sizes) > LIMIT:
            print(f"{sum(sizes) / 1e6:.1f} MB are more than {LIMIT / 1e6:.0f} MB", file=sys.stderr)
            return 1
        if peers:
            shutil.rmtree(TARGET / "vllm", ignore_errors=True)  # of another version nothing may stay
            wheel.extractall(TARGET, peers)
            print(f"{len(peers)} files, {sizes[0] / 1e6:.1f} MB in {TARGET / 'vllm'}")
        if library:
            shutil.rmtree(HOME, ignore_errors=True)
            for name in library:
                member = wheel.getinfo(name)
                member.filename = name.removeprefix("vllm/third_party/")  # where extract puts it
                wheel.extract(member, HOME)
            print(f"{len(library)} files, {sizes[1] / 1e6:.1f} MB in {HOME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
