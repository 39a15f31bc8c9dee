"""The CUDA op's own Python on CPU tensors: validation, layouts, choice of path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import Layer, quantised, relative_error

from moe_compile.kernels import config, experts, tuned
from moe_compile.ops import calls, cuda, fp8
from moe_compile.spec import Activation

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize("layout", ["concat", "interleaved", "separate"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_against_float64(layout: str, separate: bool, gated: bool) -> None:
    layer = Layer(5, 3, 2, 12, 10, Activation("gelu", gated), layout, separate, bias=True, routing="sentinels")
    out = cuda.experts(*layer.op_args())  # type: ignore[arg-type]
    assert relative_error(out, layer.truth()) < 2e-6


def test_a_measured_plan_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer = Layer(24, 5, 2, 12, 10, layout="separate", bias=True)
    used = []
    follow = experts.follow_plan
    monkeypatch.setattr(experts, "follow_plan", lambda plan, *args: used.append(plan) or follow(plan, *args))
    standard = config.select("sorted", 24, 2, 5, 12, 10, 4)
    plan = replace(standard, up=replace(standard.up, group=2))
    name = tuned.Layer(5, 2, 12, 10, "float32", "separate", "stacked").name
    tuned.merge(tmp_path / "table.json", {name: {32: tuned.Entry(plan, 1.0, 2.0)}})
    out = cuda.experts(*layer.op_args())  # type: ignore[arg-type]
    cuda.experts(*layer.op_args(), path="decode")  # type: ignore[arg-type]
    assert used[0] == plan
    assert used[1].path == "decode"
    assert relative_error(out, layer.truth()) < 2e-6


def test_three_ops_make_a_layer() -> None:
    layer = Layer(9, 4, 2, 12, 10, Activation("relu", gated=False), bias=True, routing="sentinels")
    order, offsets = cuda.sort_pairs(layer.ids, 4)
    rows = layer.x[order.long() // 2]
    h = torch.relu(cuda.grouped_linear(rows, layer.w1, layer.b1, offsets))
    y = cuda.grouped_linear(h, layer.w2, layer.b2, offsets)
    assert not y[int(offsets[4]) :].any()
    out = cuda.combine(y, order, offsets, layer.weights, 2)
    assert relative_error(out, layer.truth()) < 2e-6


def test_no_tokens() -> None:
    assert cuda.experts(*Layer(0).op_args()).shape == (0, 19)  # type: ignore[arg-type]
    rows, offsets = torch.empty(0, 19), torch.zeros(6, dtype=torch.int32)
    assert cuda.grouped_linear(rows, [torch.empty(5, 7, 19)], [], offsets).shape == (0, 7)
    empty = torch.empty(0, dtype=torch.int32)
    assert cuda.combine(rows, empty, offsets, None, 2).shape == (0, 19)


def broken(change: Callable[[list[Any]], None], **layer: Any) -> list[Any]:
    args = list(Layer(**layer).op_args())
    change(args)
    return args


def test_errors() -> None:
    def put(index: int, value: Callable[[Any], Any]) -> Callable[[list[Any]], None]:
        def change(args: list[Any]) -> None:
            args[index] = value(args[index])

        return change

    for change, kind, text in (
        (put(0, lambda x: x.double()), TypeError, "float64"),
        (put(0, lambda x: x[:, :5]), ValueError, "w1"),
        (put(1, lambda w: w.long()), TypeError, "topk_weights"),
        (put(2, lambda i: i.float()), TypeError, "topk_ids"),
        (put(2, lambda i: i[:3]), ValueError, "tokens"),
        (put(3, lambda w: [w[0].half()]), TypeError, "w1"),
        (put(5, lambda w: [w[0].mT]), ValueError, "w1|w2"),
        (put(12, lambda i: True), ValueError, "w3|interleaved"),
    ):
        layout = "separate" if text == "w3|interleaved" else "concat"
        with pytest.raises(kind, match=text):
            cuda.experts(*broken(change, layout=layout))


def test_too_many_pairs() -> None:
    """A pair's number would not fit its 32 bits; nothing is allocated before that is seen."""
    args = list(Layer(2, 3, 2, 16, 24).op_args())
    args[0], args[1], args[2] = (t[:1].expand(2**30, -1) for t in args[:3])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"2147483648 pairs, and a pair's number has 32 bits; split .* 1073217535"):
        cuda.experts(*args)  # type: ignore[arg-type]


def test_unlike_separate_weights() -> None:
    def strides(args: list[Any]) -> None:
        args[3][1] = args[3][1].t().contiguous().t()

    with pytest.raises(ValueError, match=r"w1: expert 1 has strides .* contiguous"):
        cuda.experts(*broken(strides, separate=True))


def test_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(calls, "import_module", fail)
    with pytest.raises(RuntimeError, match="pip install triton"):
        cuda.experts(*Layer().op_args())  # type: ignore[arg-type]
    calls.kernel.cache_clear()


@pytest.mark.parametrize("path", ["decode", "sorted"])
@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_fp8_against_float64(monkeypatch: pytest.MonkeyPatch, layout: str, scales: str, path: str) -> None:
    """Gate and up in one tensor or two, whose scales may lie differently in memory."""
    layer = Layer(5, 3, 2, 256, 192, Activation("gelu"), layout, routing="sentinels")
    up, down = quantised(layer, scales)
    scale, up_scale = up.scale, up.up_scale
    assert scale is not None and down.scale is not None
    apart: dict[str, Any] = {}
    if up.up is not None and up_scale is not None:
        turned = up_scale.contiguous().mT.contiguous().mT
        assert scales == "channel" or turned.stride() != scale.stride()
        apart = {"w3": up.up.first, "w3_scale": turned}
    out = fp8.experts_fp8(
        layer.x, layer.weights, layer.ids, up.w.first, scale, down.w.first, down.scale, "gelu",
        layer.activation.args(), True, quantise=False, path=path, **apart,
    )  # fmt: skip
    assert relative_error(out, layer.truth()) < 3e-6


def test_fp8_in_two_tensors_is_not_for_deepgemm() -> None:
    layer = Layer(5, 3, 2, 256, 256, layout="separate", dtype=torch.bfloat16)
    up, down = quantised(layer)
    codes = [f.code for f in fp8.refusals("auto", layer.x, layer.ids, up, down, True, None)]
    assert codes == ["MC505", "MC403"]
