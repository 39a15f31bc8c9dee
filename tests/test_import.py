"""The package is light: nothing heavy is imported before a public name is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moe_compile

HEAVY = ("torch", "triton", "numpy", "sympy", "transformers")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("room", ["", ".config", ".codes", ".report", ".cli"])
def test_import_is_light(room: str) -> None:
    code = f"import sys, moe_compile{room}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(code) == "[]"


def test_import_is_fast() -> None:
    code = "import time; t = time.perf_counter(); import moe_compile; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.2


@pytest.mark.parametrize("name", moe_compile.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(moe_compile, name) is not None


def test_a_submodule_never_hides_a_public_function() -> None:
    code = (
        "import moe_compile.checking, moe_compile.explaining, moe_compile.functional, moe_compile.cli\n"
        "import moe_compile\n"
        "print(all(callable(getattr(moe_compile, n)) for n in moe_compile.__all__ if n != '__version__'))"
    )
    assert run(code) == "True"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = moe_compile.nothing
    assert set(moe_compile.__all__) <= set(dir(moe_compile))


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert version("moe-compile") == moe_compile.__version__
