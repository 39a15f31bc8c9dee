"""The table of codes and the page that is generated from it."""

from __future__ import annotations

import re
from pathlib import Path

from moe_compile.codes import CODES, GROUPS, markdown

ROOT = Path(__file__).parents[1]


def test_codes_are_well_formed_and_unique() -> None:
    for key, code in CODES.items():
        assert key == code.code and re.fullmatch(r"MC[1-5]\d\d", key)
        assert key[:3] in GROUPS
        assert all((code.title, code.meaning, code.example, code.fix))
        assert not code.fix.endswith("."), f"{key}: the page adds the full stop"
    assert list(CODES) == sorted(CODES)


def test_the_source_and_the_table_have_the_same_codes() -> None:
    used: set[str] = set()
    for folder in ("moe_compile", "patterns"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "codes.py":
                used.update(re.findall(r'"(MC\d{3})"', path.read_text()))
    assert used == set(CODES)


def test_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text()
    assert page == markdown(), "run: python -m moe_compile.codes > docs/refusals.md"
