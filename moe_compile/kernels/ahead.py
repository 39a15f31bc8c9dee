"""Kernels ahead of their launches: what a launch would compile, found without it, and compiling that in any process.

The one file that uses private names of Triton. Checked with 3.6 and 3.9:

* ``_async_compile.active_mode``: what ``JITFunction._do_compile`` asks, with the key of the disk cache and a function
  that compiles. Stopping there leaves nothing behind in Triton's own tables. (Its ``jit_cache_hook`` would tell less,
  and writes the constants as JSON first, which fails for an element type inside a named tuple.)
* the names ``src``, ``target``, ``options`` and ``env_vars`` in that function;
* ``compile(..., _env_vars=)`` and ``get_cache_manager``.

Every process that compiles writes into Triton's disk cache. A file appears there whole (it is renamed into place) and
the one that makes a kernel count is the last, so a process that is stopped leaves nothing half done.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import triton
from filelock import FileLock
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime._async_compile import active_mode
from triton.runtime.cache import get_cache_manager

from .launch import Launch, settled


@dataclass(frozen=True)
class Source:
    """All that a compilation needs; it can be pickled."""

    module: str  # where the Triton function is
    function: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: tuple[str, int | str, int]
    environment: dict[str, str]  # variables that are part of the key


class Needed(NamedTuple):
    """The kernel of one launch."""

    key: str  # its name in Triton's disk cache
    function: str
    source: Source | None  # None where this process has compiled or loaded it already


class _Stop(Exception):
    """Carries what Triton was about to compile."""

    def __init__(self, key: str, values: dict[str, Any]) -> None:
        super().__init__(key)
        self.key, self.values = key, values


class _Stopper:
    """In the place of an ``AsyncCompileMode``."""

    def submit(self, key: str, compile_function: Any, *_: Any) -> Any:
        raise _Stop(key, dict(inspect.getclosurevars(compile_function).nonlocals))


def needed(launch: Launch, args: tuple[Any, ...]) -> Needed:
    """The kernel of a launch; nothing is compiled, loaded or launched."""
    function = settled(launch.kernel)
    token = active_mode.set(_Stopper())
    try:
        compiled = function.warmup(*args, grid=launch.grid, **launch.constants)
    except _Stop as stop:
        return Needed(_hashed(stop.key), function.__name__, _source(function, stop.values))
    finally:
        active_mode.reset(token)
    return Needed(compiled.hash, function.__name__, None)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


def _source(function: Any, values: dict[str, Any]) -> Source:
    src, target, options = values["src"], values["target"], values["options"]
    return Source(
        function.module, function.__name__, dict(src.signature), dict(src.constants), dict(src.attrs),
        dict(options.__dict__), (target.backend, target.arch, target.warp_size), dict(values["env_vars"]),
    )  # fmt: skip


def is_cached(key: str, function: str) -> bool:
    """Whether the disk cache holds a kernel whole."""
    name = f"{function[:150]}.json"
    return name in (get_cache_manager(key).get_group(name) or {})


def cache_folder() -> str:
    """Triton's disk cache."""
    return str(knobs.cache.dir)


def build(key: str, source: Source, folder: str) -> bool:
    """Compile into the disk cache; False where it was there, by now perhaps from another process.

    For processes that launch nothing: Triton's driver is replaced.

    Raises:
        RuntimeError: what was compiled has another key, so no launch would find it.
        Exception: whatever the compiler raises.
    """
    knobs.cache.dir = folder
    function = settled(getattr(import_module(source.module), source.function))
    target = GPUTarget(*source.target)
    src = ASTSource(function, source.signature, source.constants, source.attributes)
    driver.set_active(_Driver(target))
    with _alone(Path(folder), key):
        if is_cached(key, source.function):
            return False
        compiled = triton.compile(src, target=target, options=source.options, _env_vars=source.environment)
    if compiled.hash != key:
        raise RuntimeError("it compiled, but under another key than a launch here looks for")
    return True


@contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """One process at a time per kernel: the others wait and then find it. Without locks it is compiled twice."""
    locks = folder / "moe_compile_locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{key}.lock")
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


class _Driver:
    """As much of a driver as compiling asks for; a real one would claim memory of the GPU for every process."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target
