"""Find a DeepGEMM package, check what it needs, and try it once before anything relies on it.

Searched in this order: the folder that ``MOE_COMPILE_DEEP_GEMM`` names, the module ``deep_gemm`` (built from source, or
sgl-deep-gemm), and the copy inside an installed vLLM, which is loaded without vLLM itself. The first that imports and
computes right wins. Nothing is downloaded, nor taken from a download cache, whose code nobody asked to run.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from moe_compile.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from moe_compile.spec import NoMatch

log = logging.getLogger("moe_compile.deepgemm")

ENVIRONMENT = "MOE_COMPILE_DEEP_GEMM"  # ``config.DEEP_GEMM``, which this room may not import
CAPABILITY, NVCC = (9, 0), (12, 3)
LIMIT = 2e-2  # relative error of a row in the probe: rounding to bfloat16 costs 0.2 %, another expert's weights 100 %
_PRIVATE = "moe_compile_deep_gemm"  # a copy loaded from a folder must not pass for an installed ``deep_gemm``
_INSIDE_VLLM = "vllm.third_party.deep_gemm"
_GEMM = "m_grouped_fp8_gemm_nt_contiguous"

_alignment_lock = threading.RLock()  # the setting belongs to the library, so to all threads
_lock = threading.Lock()
_found: dict[int, Provider | NoMatch] = {}


@dataclass(frozen=True)
class Provider:
    """A DeepGEMM package that has computed right on one device; its methods hide how packages differ.

    Args:
        module: the imported package.
        name: for people, such as ``"deep_gemm 2.5.0 at /path"``.
        version: ``"2.5.0"``, or ``"unknown"``.
        nvcc: the compiler that it will call, such as ``"12.9 (/usr/local/cuda/bin/nvcc)"``.
        tails: it has computed partial blocks right, of sizes that are a multiple of 64 and not of 128.
    """

    module: ModuleType
    name: str
    version: str
    nvcc: str = ""
    tails: bool = False

    def grouped_fp8(
        self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, layout: Tensor
    ) -> None:
        """``out[r] = a[r] @ b[layout[r]].T``, where the rows of a block (see ``alignment``) have one expert.

        Runs on the current stream of the current device, which must be the tensors' own. Rows with layout -1 hold
        anything afterwards.

        Args:
            a: float8_e4m3fn ``[M, K]``.
            a_scale: float32 ``[M, ceil(K/128)]``; column by column (stride ``(1, M rounded up to 4)``) saves a kernel.
            b: float8_e4m3fn ``[E, N, K]``, contiguous.
            b_scale: float32 ``[E, ceil(N/128), ceil(K/128)]``, contiguous.
            out: bfloat16 ``[M, N]``.
            layout: int32 ``[M]``, the expert of each row, or -1; only the first row of a block is read.
        """
        # Four by position: what follows differs from package to package in name, place and default.
        getattr(self.module, _GEMM)((a, a_scale), (b, b_scale), out, layout)

    @property
    def alignments(self) -> tuple[int, ...]:
        """How many rows a block may have."""
        return (32, 64, 128) if hasattr(self.module, "set_mk_alignment_for_contiguous_layout") else (128,)

    @contextmanager
    def alignment(self, rows: int) -> Iterator[None]:
        """Blocks of ``rows`` rows for the calls inside; other threads wait, and the old value comes back.

        Raises:
            ValueError: ``rows`` is not one of ``alignments``.
        """
        if rows not in self.alignments:
            raise ValueError(f"{self.name} takes blocks of {self.alignments} rows, got {rows}")
        if len(self.alignments) == 1:
            yield
            return
        with _alignment_lock:
            before = self.module.get_mk_alignment_for_contiguous_layout()
            self.module.set_mk_alignment_for_contiguous_layout(rows)
            try:
                yield
            finally:
                self.module.set_mk_alignment_for_contiguous_layout(before)


def find(device: int = 0) -> Provider | NoMatch:
    """The package to use on a CUDA device, or why there is none; found out once per process and device.

    The first call may take seconds, since DeepGEMM compiles its kernel then. The answer to a call during CUDA graph
    capture, where nothing can be tried, is not kept.
    """
    with _lock:
        if device in _found:
            return _found[device]
        if _capturing():
            return NoMatch("MC511", "a CUDA graph is being captured, and DeepGEMM has not been tried before")
        _found[device] = _search(device)
        return _found[device]


def reset() -> None:
    """Forget what was found (for tests)."""
    with _lock:
        _found.clear()
        _forget_private()


def _search(device: int) -> Provider | NoMatch:
    named = os.environ.get(ENVIRONMENT, "")
    if named == "0":
        return NoMatch("MC501", f"switched off by {ENVIRONMENT}=0")
    other = next((d for d, known in _found.items() if d != device and isinstance(known, Provider)), None)
    if other is not None:  # it keeps handles of kernels that belong to the device on which they were loaded
        return NoMatch("MC504", f"DeepGEMM serves one device per process, and device {other} has it")
    capability = _capability(device)
    if capability != CAPABILITY:
        has = "there is no such CUDA device" if capability is None else f"it has {capability[0]}.{capability[1]}"
        return NoMatch("MC504", f"DeepGEMM needs compute capability 9.0 here; device {device}: {has}")
    places = _places(named)
    absent = [f"{label}: not found" for label, folder, _ in places if folder is None]
    if len(absent) == len(places):
        return NoMatch("MC501", "no DeepGEMM; " + "; ".join(absent))
    nvcc = _nvcc()  # first, because the import of DeepGEMM ends in an assertion without it
    if isinstance(nvcc, NoMatch):
        return nvcc
    failures = [text for text in absent if text.startswith(ENVIRONMENT)]  # only what was asked for is missed
    for label, folder, module in places:
        if folder is None:
            continue
        tried = _try(folder, module, nvcc, device)
        if isinstance(tried, Provider):
            for failure in failures:
                log.warning("%s; %s is used instead", failure, tried.name)
            return tried
        failures.append(f"{label}: {tried}")
    return NoMatch("MC503", "; ".join(failures))


def _places(named: str) -> list[tuple[str, Path | None, str]]:
    """In order: what a message calls the place, the package's folder if it is there, the name to import it by."""
    own = Path(named).expanduser().absolute() / "deep_gemm"
    vllm = _installed("vllm")
    inside = vllm / "third_party" / "deep_gemm" if vllm else None
    places = [
        ("module deep_gemm", _installed("deep_gemm"), "deep_gemm"),
        (_INSIDE_VLLM, inside if inside and (inside / "__init__.py").is_file() else None, _PRIVATE),
    ]
    if named:
        there = (own / "__init__.py").is_file()
        places.insert(0, (f"{ENVIRONMENT} ({own})", own if there else None, _PRIVATE))
    return places


def _installed(package: str) -> Path | None:
    """The folder of a top-level package; asked for by such a name, it is not run."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a stand-in without a spec
        return None
    # Without an origin it is any folder of that name in the working directory.
    return Path(spec.origin).parent if spec and spec.origin else None


def _try(folder: Path, name: str, nvcc: str, device: int) -> Provider | str:
    """The provider in this folder, or what is wrong with it."""
    try:
        module = _load(folder, name)
    except Exception as error:  # an extension may fail in any way
        return _why_not_imported(error, folder)
    if not callable(getattr(module, _GEMM, None)):
        return f"it has no {_GEMM}: DeepGEMM 2.1 or newer is needed"
    version = str(getattr(module, "__version__", "unknown"))
    provider = Provider(module, f"deep_gemm {version} at {folder}", version, nvcc)
    # In a thread of its own, since modes belong to threads: a caller may be tracing with fake tensors, or have set
    # a default device, autocast or inference mode.
    with ThreadPoolExecutor(1) as pool:
        tails = pool.submit(_probe, provider, device, 320).result()
        if not tails:
            return replace(provider, tails=True)
        return pool.submit(_probe, provider, device, 256).result() or provider


def _load(folder: Path, name: str) -> ModuleType:
    for known in ("deep_gemm", _INSIDE_VLLM, _PRIVATE):  # an extension should not be loaded twice under two names
        module = sys.modules.get(known)
        if module is not None and module.__file__ and Path(module.__file__).parent.resolve() == folder.resolve():
            return module
    if name != _PRIVATE:
        return importlib.import_module(name)
    _forget_private()
    spec = importlib.util.spec_from_file_location(
        _PRIVATE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None  # it has both for any .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PRIVATE] = module  # the relative imports inside look for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _forget_private()
        raise
    return module


def _forget_private() -> None:
    for name in [n for n in sys.modules if n == _PRIVATE or n.startswith(_PRIVATE + ".")]:
        del sys.modules[name]


def _why_not_imported(error: Exception, folder: Path) -> str:
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    extensions = sorted(path.name for path in folder.glob("_C.*so"))
    if "undefined symbol" in last:
        return (
            f"ABI: {last}: it was built for another torch than {torch.__version__}; the DeepGEMM of vllm 0.20.2 to "
            "0.24.0 fits torch 2.11 with CUDA 13, for another torch build DeepGEMM from source"
        )
    if extensions and not any(f"_C{suffix}" in extensions for suffix in EXTENSION_SUFFIXES):
        return f"ABI: {', '.join(extensions)} is not for Python {sys.version_info[0]}.{sys.version_info[1]} ({last})"
    return f"the import failed: {last}"


def _probe(provider: Provider, device: int, size: int) -> str:
    """Two experts of 128 rows each, N = K = ``size``, against float64: "" if right, else what is wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, size, generator=generator)  # [M, K]
    blocks = -(-size // 128)
    factor = torch.arange(1.0, 1 + 2 * blocks**2).view(2, blocks, blocks)  # so that no two blocks may be mistaken
    w = dequantize_blocks(torch.randn(2, size, size, generator=generator), factor)  # [E, N, K]
    a, a_scale = quantize_rows(x)
    b, b_scale = quantize_blocks(w)
    rows = dequantize_rows(a, a_scale, dtype=torch.float64).view(2, 128, size)
    expected = (rows @ dequantize_blocks(b, b_scale, dtype=torch.float64).mT).view(256, size)
    layout = torch.arange(2, dtype=torch.int32).repeat_interleave(128)
    place = _device(device)
    try:
        with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
            out = torch.full((256, size), torch.nan, dtype=torch.bfloat16, device=place)  # what stays unwritten shows
            by_column = a_scale.to(place).t().contiguous().t()
            provider.grouped_fp8(a.to(place), by_column, b.to(place), b_scale.to(place), out, layout.to(place))
            difference = out.cpu().double() - expected
    except Exception as error:  # a compiler, a driver or a launch may fail in any way
        return f"the probe raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    error_of_rows = difference.norm(dim=1) / expected.norm(dim=1)
    worst = float(error_of_rows.max())  # NaN if any is
    return "" if worst <= LIMIT else f"the probe was wrong: relative error {worst:.1e}, allowed {LIMIT:.0e}"


def _nvcc() -> str | NoMatch:
    """Version and path of the compiler that DeepGEMM will call, sought as DeepGEMM seeks it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    default = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    path = os.environ.get("DG_JIT_NVCC_COMPILER") or default
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return NoMatch("MC502", f"nvcc {NVCC[0]}.{NVCC[1]} or newer is needed; {path}: {error}")
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        return NoMatch("MC502", f"{path} --version names no release")
    version = (int(release[1]), int(release[2]))
    if version < NVCC:
        return NoMatch("MC502", f"{path} is nvcc {version[0]}.{version[1]}, needed {NVCC[0]}.{NVCC[1]} or newer")
    return f"{version[0]}.{version[1]} ({path})"


def _capability(device: int) -> tuple[int, int] | None:
    """None where there is no such device; AMD's cards count themselves in the same numbers."""
    if torch.version.hip or not torch.cuda.is_available() or device >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_capability(device)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)
