"""The table, the JSON, the page and the log lines of a report."""

from __future__ import annotations

import json
import logging

import pytest

from moe_compile import report as report_module
from moe_compile.report import NOT_CAPTURED, REFUSED, REWRITTEN, Report, Site, collect, record
from moe_compile.spec import Experts, MoE, Weight


def layer() -> MoE:
    weight = Weight((None,), stacked=True)
    return MoE(None, None, None, 2, Experts(8, 64, 128, weight, weight))


@pytest.fixture(autouse=True)
def _fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "_logged", set())


GOOD = Site(
    REWRITTEN, form="where-loop", location="m.py:12", spec=layer(), kernel="T<=64 decode, else grouped"
)
BAD = Site(
    REFUSED, form="dense-mask", code="MC208", reason="expert 3 of 8 is visited twice", location="m.py:40"
)


def test_table_starts_with_the_totals_and_says_why() -> None:
    text = str(Report([GOOD, BAD]))
    lines = text.splitlines()
    assert lines[0] == "moe_compile: 1 of 2 MoE candidates rewritten, 1 refused"
    assert "8 experts, top-2, silu-gated, H=64 I=128" in text and "m.py:12" in text and "T<=64 decode" in text
    assert "why: MC208 missing or repeated expert: expert 3 of 8 is visited twice" in text
    assert "fix: visit each expert in 0..E-1 exactly once" in text


def test_columns_are_aligned() -> None:
    lines = str(Report([GOOD, BAD])).splitlines()
    column = lines[2].index("source")
    assert lines[3][column:].startswith("m.py:12")
    assert next(line for line in lines if line.startswith("refused"))[column:].startswith("m.py:40")


def test_identical_sites_are_folded() -> None:
    text = str(Report([GOOD] * 48 + [BAD]))
    assert "rewritten x48" in text
    assert text.count("where-loop") == 1
    assert text.startswith("moe_compile: 48 of 49 MoE candidates rewritten")


def test_long_reasons_are_wrapped() -> None:
    site = Site(REFUSED, code="MC203", reason="word " * 60, location="m.py:1")
    assert max(map(len, str(Report([site])).splitlines())) <= report_module.WIDTH


def test_empty_report() -> None:
    assert str(Report()) == "moe_compile: no MoE candidate found"


def test_own_fix_comes_before_the_table() -> None:
    site = Site(NOT_CAPTURED, code="MC101", reason="graph break at m.py:7", fix="remove the if at m.py:7")
    assert "fix: remove the if at m.py:7" in str(Report([site]))


def test_json_round_trip() -> None:
    rows = json.loads(Report([GOOD, BAD]).to_json())
    assert rows[0]["spec"].startswith("8 experts") and rows[0]["code"] is None
    assert rows[1]["spec"] is None and rows[1]["code"] == "MC208"


def test_html_escapes_everything() -> None:
    evil = "<script>alert(1)</script>\"'&"
    page = Report([Site(evil, evil, "MC208", evil, evil, evil, None, evil)]).to_html()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5
    assert "http" not in page


def test_collect_is_scoped_and_nests() -> None:
    with collect() as outer:
        with collect() as inner:
            record(GOOD)
        record(BAD)
    record(GOOD)
    assert inner.sites == [GOOD] and outer.sites == [GOOD, BAD]


def test_collect_closes_after_an_exception() -> None:
    with pytest.raises(RuntimeError), collect():
        raise RuntimeError
    assert not report_module._collectors


def test_refusals_are_logged_once_per_code_and_place(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moe_compile.report"), collect():
        for site in (BAD, BAD, GOOD, Site(REFUSED, code="MC208", location="m.py:41")):
            record(site)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2 and "m.py:40" in warnings[0] and "expert 3 of 8" in warnings[0]
    infos = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert infos == ["moe_compile: 1 of 4 MoE candidates rewritten, 3 refused"]
