"""What is tried before a package is used, and what the provider then promises."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from fake_packages import PACKAGE, WITHOUT_SETTER, WITHOUT_TAILS, Install, provided, refused

from moe_compile.deepgemm import provider
from moe_compile.deepgemm.provider import Provider, find
from moe_compile.quantize import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows


def test_a_package_that_works(install: Install) -> None:
    folder = install()
    found = provided()
    assert (found.name, found.version) == (f"deep_gemm 9.9 at {folder}", "9.9")
    assert found.nvcc.startswith("12.9 (") and found.module is sys.modules["deep_gemm"]
    x, w = torch.randn(256, 384), torch.randn(3, 128, 384)
    (a, a_scale), (b, b_scale) = quantize_rows(x), quantize_blocks(w)
    out = torch.empty(256, 128, dtype=torch.bfloat16)
    layout = torch.tensor([2, 0], dtype=torch.int32).repeat_interleave(128)
    found.grouped_fp8(a, a_scale.t().contiguous().t(), b, b_scale, out, layout)
    rows = dequantize_rows(a, a_scale).view(2, 128, 384)
    expected = (rows @ dequantize_blocks(b, b_scale)[[2, 0]].mT).view(256, 128)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("text", "tails"), [(PACKAGE, True), (WITHOUT_TAILS, False)])
def test_partial_blocks_are_tried(text: str, tails: bool, install: Install) -> None:
    install(text)
    assert provided().tails is tails


def test_tried_once_per_device(install: Install) -> None:
    install()
    first = provided(0)
    assert provided(0) is first and first.module.calls == [128]


def test_one_device_per_process(install: Install) -> None:
    """Its kernels are loaded into the context of the first device, and are wrong on another."""
    install()
    first = provided(1)
    refused("MC504", "one device per process", "device 1 has it")
    assert provided(1) is first and first.module.calls == [128]


def test_threads_share_one_probe(install: Install) -> None:
    install()
    threads = [threading.Thread(target=find) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert provided().module.calls == [128]


def test_a_tracing_caller_does_not_disturb_the_probe(install: Install) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    install()
    with FakeTensorMode(), torch.inference_mode():
        assert isinstance(find(), Provider)


def test_random_numbers_of_the_caller_stay(install: Install) -> None:
    install()
    before = torch.random.get_rng_state()
    provided()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("d.zero_()", ("wrong", "relative error 1.0e+00")),
        ("d[7, 7] = float('nan')", ("wrong", "relative error nan")),
        ("d[7, 7] = float('inf')", ("wrong", "relative error inf")),
        ("d.mul_(1.05)", ("wrong", "relative error 5")),
        ("d[200] *= 1.05", ("wrong", "relative error 5")),
        ("d[128:] = (a[128:] @ b[0].T).bfloat16()", ("wrong",)),
        ("raise RuntimeError('NVCC compilation failed\\nmore')", ("raised RuntimeError: NVCC compilation failed",)),
        ("raise ValueError", ("raised ValueError: ",)),
    ],
)
def test_a_wrong_result_is_refused(install: Install, last: str, words: tuple[str, ...]) -> None:
    install(f"{PACKAGE}    {last}\n")
    refused("MC503", *words)


def test_unwritten_rows_are_refused(install: Install) -> None:
    install(PACKAGE.replace("range(0, len(a), alignment)", "range(0, 128, alignment)"))
    refused("MC503", "relative error nan")


@pytest.mark.parametrize("swap", ["a_scale.flip(1)", "a_scale.flip(0)"])
def test_mistaken_scales_are_refused(install: Install, swap: str) -> None:
    install(PACKAGE.replace("a_scale.repeat", f"{swap}.repeat"))
    refused("MC503", "relative error")


def test_mistaken_blocks_are_refused(install: Install) -> None:
    install(PACKAGE.replace("b_scale.repeat", "b_scale.mT.repeat"))
    refused("MC503", "relative error")


def test_alignment_is_set_and_comes_back(install: Install) -> None:
    install()
    found = provided()
    assert found.alignments == (32, 64, 128)
    with found.alignment(32):
        assert found.module.alignment == 32
        with found.alignment(64):
            assert found.module.alignment == 64
        assert found.module.alignment == 32
    assert found.module.alignment == 128
    with pytest.raises(KeyError), found.alignment(64):
        raise KeyError
    assert found.module.alignment == 128
    for rows in (16, 0, 256):
        message = rf"takes blocks of \(32, 64, 128\) rows, got {rows}"
        with pytest.raises(ValueError, match=message), found.alignment(rows):
            pass


def test_alignment_keeps_other_threads_out(install: Install) -> None:
    install()
    found, seen = provided(), []

    def other() -> None:
        with found.alignment(64):
            seen.append(found.module.alignment)

    thread = threading.Thread(target=other)
    with found.alignment(32):
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and found.module.alignment == 32
    thread.join()
    assert seen == [64] and found.module.alignment == 128


def test_a_package_without_the_setting_has_one_alignment(install: Install) -> None:
    install(WITHOUT_SETTER)
    found = provided()
    assert found.alignments == (128,)
    with found.alignment(128):
        pass
    with pytest.raises(ValueError, match="got 64"), found.alignment(64):
        pass


def test_nothing_is_tried_during_capture(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setattr(provider, "_capturing", lambda: True)
    refused("MC511", "being captured")
    assert "deep_gemm" not in sys.modules
    monkeypatch.setattr(provider, "_capturing", lambda: False)
    found = provided()
    monkeypatch.setattr(provider, "_capturing", lambda: True)
    assert find() is found  # known already: nothing needs to run


def test_only_four_arguments_are_passed() -> None:
    """The fifth has another name and meaning in every package."""
    calls: list[Any] = []

    class Module:
        @staticmethod
        def m_grouped_fp8_gemm_nt_contiguous(*args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

    t = [torch.tensor(i) for i in range(6)]
    Provider(Module, "fake", "0").grouped_fp8(*t)  # type: ignore[arg-type]
    assert calls == [(((t[0], t[1]), (t[2], t[3]), t[4], t[5]), {})]
