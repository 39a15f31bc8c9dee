"""Tables of measured plans: what is kept, what is passed over, and that no bad file does harm."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layers import Layer, relative_error

from moe_compile import config as options
from moe_compile.kernels import config, experts, tuned
from moe_compile.kernels.config import Plan, Tiles
from moe_compile.kernels.tuned import Entry, TableError

TILES = Tiles(32, 64, 32, 4, 2, swap=True, group=4)
SORTED = Plan("sorted", TILES, replace(TILES, wn=128))
LAYER = tuned.Layer(8, 2, 64, 32, "bfloat16", "concat", "stacked")


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    assert tuned.read(path) == {}
    first, second = Entry(SORTED, 10.0, 12.5), Entry(Plan("gemv", TILES, TILES), 1, 2.0)
    tuned.merge(path, {LAYER.name: {1024: first}})
    whole = tuned.merge(path, {LAYER.name: {1: second}, "other": {7: first}})
    assert whole == tuned.read(path) == {LAYER.name: {1024: first, 1: second}, "other": {7: first}}
    assert tuned.merge(path, {LAYER.name: {1: None}, "other": {7: None, 8: None}}) == {LAYER.name: {1024: first}}
    assert sorted(p.suffix for p in path.parent.iterdir()) in ([".json"], [".json", ".lock"])


def test_merging_at_once_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    entry = Entry(SORTED, 10.0, 12.5)
    threads = [threading.Thread(target=tuned.merge, args=(path, {f"layer {i}": {16: entry}})) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tuned.read(path) == {f"layer {i}": {16: entry} for i in range(12)}


def test_a_failed_write_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    before = tuned.merge(path, {"a": {1: Entry(SORTED, 1, 2)}})

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tuned.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tuned.merge(path, {"b": {1: Entry(SORTED, 1, 2)}})
    assert tuned.read(path) == before
    assert not list(tmp_path.glob("*.tmp"))


def broken(change: Any) -> Any:
    data = {"format": 1, "layers": {"a": {"16": Entry(SORTED, 1.0, 2.0).to_dict()}}}
    change(data, data["layers"]["a"]["16"])  # type: ignore[index]
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d, c: d.update(format=2), "no table of format 1"),
        (lambda d, c: d.update(layers=[]), "no table of format 1"),
        (lambda d, c: d["layers"].update(a=3), "expected plans by number of tokens"),
        (lambda d, c: d["layers"]["a"].update({"-1": c}), "not a number of tokens"),
        (lambda d, c: d["layers"]["a"].update({"0": c}), "not a number of tokens"),
        (lambda d, c: c.pop("us"), "expected the fields"),
        (lambda d, c: c.update(more=1), "expected the fields"),
        (lambda d, c: c.update(path="fast"), "path 'fast' is not one of"),
        (lambda d, c: c.update(us=0), "no positive numbers"),
        (lambda d, c: c.update(us=float("nan")), "no positive numbers"),
        (lambda d, c: c.update(us="1"), "no positive numbers"),
        (lambda d, c: c["up"].update(bm=64), "different heights"),
        (lambda d, c: c["up"].update(bk=True), "bk is True, expected int"),
        (lambda d, c: c["up"].pop("swap"), "tiles need exactly the fields"),
        (lambda d, c: c["up"].update(bk=48), "none that the kernels can run"),
        (lambda d, c: c["up"].update(bk=8), "none that the kernels can run"),
        (lambda d, c: c["up"].update(bk=512), "none that the kernels can run"),
        (lambda d, c: c["up"].update(warps=3), "none that the kernels can run"),
        (lambda d, c: c["up"].update(stages=0), "none that the kernels can run"),
        (lambda d, c: c["up"].update(tail=3), "none that the kernels can run"),
        (lambda d, c: c["up"].update(tail=2), "none that the kernels can run"),  # 8 rows
        (lambda d, c: c["up"].update(group=0), "none that the kernels can run"),
        (lambda d, c: c["up"].update(programs=-1), "none that the kernels can run"),
        (lambda d, c: c["up"].update(evict="x"), "none that the kernels can run"),
        (lambda d, c: c["up"].update(rows_tma=True), "none that the kernels can run"),
        (lambda d, c: [c[w].update(ladder=True, tma=True) for w in ("up", "down")], "none that the kernels can run"),
    ],
)
def test_what_is_no_table(tmp_path: Path, change: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "table.json"
    text = json.dumps(broken(change))
    path.write_text(text)
    with pytest.raises(TableError, match=words):
        tuned.read(path)
    with pytest.raises(TableError, match=words):
        tuned.merge(path, {"b": {1: Entry(SORTED, 1, 2)}})
    assert path.read_text() == text
    tuned.load.cache_clear()
    with caplog.at_level(logging.WARNING, "moe_compile.kernels.tuned"):
        assert tuned.load(path) == tuned.load(path) == {}
    assert len(caplog.records) == 1
    assert str(path) in caplog.text and "tune" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(TableError, match=r"table\.json"):
        tuned.read(path)


def test_the_nearest_number_of_tokens() -> None:
    plans = {t: replace(SORTED, up=replace(TILES, group=t)) for t in (64, 128, 1024)}
    table = {LAYER.name: {t: Entry(plan, 1, 2) for t, plan in plans.items()}}

    def found(tokens: int, layer: tuned.Layer = LAYER) -> Plan | None:
        return tuned.find(table, layer, tokens, config.H200, dense=True, tma=(True, True))

    assert found(64) == found(50) == found(90) == plans[64]
    assert found(91) == found(128) == found(181) == plans[128]
    assert found(1024) == plans[1024]
    assert [found(t) for t in (0, 1, 45, 182, 700, 1449)] == [None] * 6
    assert found(64, LAYER._replace(layout="interleaved")) is None
    assert found(64, LAYER._replace(storage="separate")) is None


def follows(
    plan: Plan,
    tokens: int,
    top_k: int = 8,
    device: config.Device = config.H200,
    dense: bool = True,
    tma: tuple[bool, bool] = (True, True),
    dtype: str = "bfloat16",
) -> bool:
    layer = LAYER._replace(top_k=top_k, dtype=dtype)
    return tuned.follows(plan, layer, tokens, device, dense=dense, tma=tma)


def test_plans_that_a_call_cannot_follow() -> None:
    gemv, decode = replace(SORTED, path="gemv"), replace(SORTED, path="decode")
    assert follows(gemv, 4) and not follows(gemv, 5)
    assert not follows(gemv, 1, dense=False)
    assert follows(decode, 512) and not follows(decode, 513)
    assert follows(SORTED, 513, dense=False)
    for role, tma in (("up", (False, True)), ("down", (True, False))):
        described = replace(SORTED, **{role: replace(TILES, tma=True)})
        assert follows(described, 1024) and follows(SORTED, 1024, tma=tma)
        assert not follows(described, 1024, tma=tma)
        assert not follows(described, 1024, device=config.H200._replace(tma=False))


@pytest.mark.parametrize("role", ["up", "down"])
def test_plans_that_a_device_has_no_memory_for(role: str) -> None:
    large = replace(TILES, bm=32, wn=128, bk=64, stages=5)  # 102,400 bytes in half precision, and 8 KiB beside them
    plan = replace(SORTED, **{role: large})
    at = config.H200._replace(shared=5 * 20_480 + 8 * 1024)
    below = at._replace(shared=at.shared - 1)
    for path in ("sorted", "decode"):
        assert follows(replace(plan, path=path), 64, device=at)
        assert not follows(replace(plan, path=path), 64, device=below)
        assert not follows(replace(plan, path=path), 64, device=at, dtype="float32")
    assert follows(replace(plan, path="gemv"), 1, device=below)  # its kernels have no such tiles


@pytest.mark.parametrize(
    ("form", "storage"),
    [({}, "stacked"), ({"transposed": True}, "transposed"), ({"separate": True}, "separate")],
)
def test_the_op_follows_the_table(form: dict[str, Any], storage: str) -> None:
    layer = Layer(20, 5, 2, 32, 16, layout="separate", bias=True, **form)
    up, down = layer.projections()
    name = experts.layer_of(layer.ids, 5, up, down)
    assert name == (5, 2, 32, 16, "float32", "separate", storage)
    table = {name.name: {16: Entry(SORTED, 1, 2)}}
    standard = experts.plan_of(layer.ids, 5, up, down)
    assert standard.path == "decode"
    plan = experts.plan_of(layer.ids, 5, up, down, table=table)
    assert plan == SORTED
    assert experts.plan_of(layer.ids, 5, up, down, "decode", table=table) == standard  # a forced path stays
    ours = experts.follow_plan(plan, layer.x, layer.weights, layer.ids, 5, up, down, False, None)
    assert relative_error(ours, layer.truth()) < 2e-6


def test_descriptors_need_a_device_that_has_them() -> None:
    layer = Layer(20, 5, 2, 32, 16)
    up, down = layer.projections()
    described = Plan("sorted", replace(TILES, tma=True), TILES)
    table = {experts.layer_of(layer.ids, 5, up, down).name: {20: Entry(described, 1, 2)}}
    assert up.describable
    assert experts.plan_of(layer.ids, 5, up, down, table=table) == described
    old = config.H200._replace(tma=False)
    assert not experts.plan_of(layer.ids, 5, up, down, device=old, table=table).up.tma


def test_where_tables_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuned.table_path("/x", "NVIDIA H200", "3.6.0+git1") == Path("/x/NVIDIA-H200-triton-3.6.json")
    assert tuned.table_path("/x", "A/B: C", "3.10.1").name == "AB-C-triton-3.10.json"
    monkeypatch.delenv("MOE_COMPILE_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert options.tuned_folder() == str(tmp_path / "moe_compile" / "tuned")
    monkeypatch.setenv("MOE_COMPILE_TUNED", "/tables")
    assert options.tuned_folder() == "/tables"
    assert options.unknown_environment() == []
