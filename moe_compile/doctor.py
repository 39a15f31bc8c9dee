"""``doctor``: what is installed, what works, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import moe_compile
from moe_compile import config
from moe_compile.spec import Activation, Experts, MoE, Weight

OK, NOTE, BAD = "ok", "note", "BAD"
_DEEP_GEMM_FIXES = {
    "MC502": "install CUDA toolkit 12.3 or newer and set CUDA_HOME to its folder",
    "MC503": f"install a DeepGEMM that fits this torch, or set {config.DEEP_GEMM}=0 to do without it",
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: a status (``ok``, ``note`` or ``BAD``), what was found, and what to do."""

    name: str
    status: str
    text: str
    fix: str = ""


def findings() -> list[Finding]:
    """Every finding; a probe that raises is a finding itself."""
    checks: list[Callable[[], list[Finding]]] = [
        _versions,
        _entry_point,
        _compiler,
        _devices,
        _options,
        _cache_directories,
        _kernels,
        _tables,
        _deep_gemm,
    ]
    out: list[Finding] = []
    for check in checks:
        try:
            out += check()
        except Exception as error:  # the doctor must survive what it looks for
            out.append(Finding(check.__name__.strip("_"), BAD, f"{type(error).__name__}: {error}"))
    return out


def as_rows(found: list[Finding]) -> list[dict[str, str]]:
    """Findings for JSON."""
    return [asdict(f) for f in found]


def as_text(found: list[Finding]) -> str:
    """Findings as aligned text with a verdict."""
    width = max(len(f.name) for f in found)
    lines = [f"{f.status:4}  {f.name:{width}}  {f.text}" + (f"\n      fix: {f.fix}" if f.fix else "") for f in found]
    bad = sum(f.status == BAD for f in found)
    return "\n".join([*lines, f"moe_compile doctor: {bad} problem(s)" if bad else "moe_compile doctor: all well"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    out = [
        Finding("moe_compile", OK, moe_compile.__version__),
        Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    known = (2, 11) <= release <= (2, 15)
    out.append(
        Finding("torch", OK, torch.__version__)
        if known
        else Finding("torch", NOTE, f"{torch.__version__} is untested", "use torch 2.11 to 2.15")
    )
    triton, transformers = _version("triton"), _version("transformers")
    if triton is not None or not torch.cuda.is_available():
        out.append(Finding("triton", OK if triton else NOTE, triton or "not installed (only GPUs need it)"))
    else:
        out.append(Finding("triton", BAD, "not installed, so no kernel can run on the GPU", "pip install triton"))
    out.append(
        Finding("transformers", OK, transformers)
        if transformers
        else Finding("transformers", NOTE, "not installed", "pip install 'moe-compile[hf]' for Hugging Face models")
    )
    return out


def _entry_point() -> list[Finding]:
    if "moe_compile" in torch.compiler.list_backends():
        return [Finding("backend", OK, 'torch.compile(model, backend="moe_compile") finds the entry point')]
    return [Finding("backend", BAD, "the entry point is not installed", "pip install moe-compile, or pip install -e .")]


def _compiler() -> list[Finding]:
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "cl") if c and shutil.which(c)), None)
    if compiler:
        return [Finding("C++ compiler", OK, compiler)]
    needed = "torch.compile needs it on the CPU"
    return [Finding("C++ compiler", NOTE, f"none found; {needed}", "install g++ or clang, or set CXX")]


def _devices() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPU", NOTE, f"none; CPU with {torch.get_num_threads()} threads")]
    out = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        text = f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        old = (p.major, p.minor) < (8, 0)
        fix = "bfloat16 kernels need compute capability 8.0 or newer" if old else ""
        out.append(Finding(f"GPU {i}", NOTE if old else OK, f"{text}, CUDA {torch.version.cuda}", fix))
    return out


def _options() -> list[Finding]:
    out = []
    if not config.enabled():
        out.append(Finding("MOE_COMPILE", NOTE, "0: nothing is rewritten", "unset MOE_COMPILE"))
    for name, (value, origin) in config.effective().items():
        out.append(Finding(f"option {name}", OK, f"{value!r} ({origin})"))
    config.Options.resolve()
    unknown = config.unknown_environment()
    out += [Finding(name, NOTE, "is no option of moe_compile", f"unset {name}") for name in unknown]
    return out


def _cache_directories() -> list[Finding]:
    """Inductor, Triton and DeepGEMM run code from their caches: nobody else may write there."""
    home = os.path.expanduser("~")
    default = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.environ.get('USER', 'root')}")
    places = {
        "Inductor cache": os.environ.get("TORCHINDUCTOR_CACHE_DIR", default),
        "Triton cache": os.environ.get("TRITON_CACHE_DIR", os.path.join(home, ".triton", "cache")),
        "DeepGEMM cache": _deep_gemm_cache(),
    }
    out = []
    for name, path in places.items():
        if not os.path.isdir(path):
            continue
        info = os.stat(path)
        shared = bool(info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not info.st_mode & stat.S_ISVTX
        foreign = hasattr(os, "getuid") and info.st_uid != os.getuid()
        if shared or foreign:
            out.append(Finding(name, BAD, f"{path} can be written by others; its files are run as code",
                               f"chmod go-w {path}, or name a private directory"))  # fmt: skip
        else:
            out.append(Finding(name, OK, path))
    return out


def _kernels() -> list[Finding]:
    """Run the op once on a small problem on each kind of device and compare with the reference."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_probe(device) for device in devices]


def _probe(device: str) -> Finding:
    from moe_compile.functional import fused_experts

    name = f"experts op on {device}"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, w1, w2, weights = random(5, 32), random(4, 64, 32) / 6, random(4, 32, 32) / 6, random(5, 2).abs()
    ids = torch.randint(0, 4, (5, 2), generator=generator).to(device)
    try:
        ours = fused_experts(x, w1, w2, weights, ids)
    except Exception as error:  # whatever the op raises is what the doctor is there to tell
        return Finding(name, BAD, f"{type(error).__name__}: {error}", "report this output")
    experts = Experts(4, 32, 32, Weight((w1,), True), Weight((w2,), True), activation=Activation())
    expected = MoE(x, ids, weights, 2, experts).reference(torch.float64)
    difference = float((ours.double() - expected).norm() / expected.norm())
    # A GPU may compute float32 products in TF32, as torch itself does when it is allowed to.
    limit = 1e-5 if device == "cpu" else 2e-3
    if difference <= limit:
        return Finding(name, OK, f"relative error {difference:.1e}")
    return Finding(name, BAD, f"relative error {difference:.1e} > {limit:.0e}", "report this output")


def _tables() -> list[Finding]:
    """The measured plans for this GPU; none is no problem."""
    if not torch.cuda.is_available():
        return []
    from moe_compile.kernels.experts import table_of
    from moe_compile.kernels.tuned import TableError, read

    path = table_of(config.tuned_folder(), torch.cuda.current_device())
    try:
        table = read(path)
    except TableError as error:
        fix = "delete it, or write it again with python -m moe_compile tune; until then its plans are not used"
        return [Finding("tuned plans", BAD, str(error), fix)]
    plans = sum(map(len, table.values()))
    return [Finding("tuned plans", OK, f"{plans} for {len(table)} layers in {path}" if plans else f"none in {path}")]


def _deep_gemm_cache() -> str:
    return os.environ.get("DG_JIT_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".deep_gemm")


def _deep_gemm() -> list[Finding]:
    """The DeepGEMM package for the current GPU: none is no problem, one that does not work is."""
    name = "DeepGEMM"
    if not torch.cuda.is_available():
        return [Finding(name, NOTE, "not looked for: there is no GPU")]
    from moe_compile.deepgemm.provider import Provider, find

    found = find(torch.cuda.current_device())
    if isinstance(found, Provider):
        return [Finding(name, OK, f"{found.name}, nvcc {found.nvcc}, compiles into {_deep_gemm_cache()}")]
    if found.code == "MC501":
        fix = f"install DeepGEMM, or set {config.DEEP_GEMM} to a folder with a package deep_gemm"
        return [Finding(name, NOTE, f"{found.reason}; fp8 layers run on Triton", fix)]
    if found.code in ("MC502", "MC503"):
        return [Finding(name, BAD, f"{found.code}: {found.reason}", _DEEP_GEMM_FIXES[found.code])]
    return [Finding(name, NOTE, f"{found.code}: {found.reason}")]
