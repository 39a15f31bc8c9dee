"""README.md and the docs: commands are the ones CI runs, links lead somewhere, tables are current."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command(mark: str) -> str:
    found = re.search(rf"<!-- {mark}-command -->\n```bash\n(.+)\n```", README)
    assert found is not None, f"README.md has no one-line {mark} command"
    return found[1]


@pytest.mark.parametrize("mark", ["demo", "test"])
def test_each_command_does_all_the_set_up(mark: str) -> None:
    steps = command(mark).split(" && ")
    assert steps[0] == "python3 -m venv .venv"
    assert steps[1] == ".venv/bin/pip install torch==2.13.0"
    assert steps[2].startswith(".venv/bin/pip install -e '.[")
    assert steps[-1].startswith(".venv/bin/python -m ") and len(steps) == 4
    subprocess.run(["bash", "-n", "-c", command(mark)], check=True)


def test_the_extras_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"-e '\.\[(\w+)\]'", README):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_ci_takes_the_test_command_from_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "pytest" not in text.replace("PYTEST_ADDOPTS", ""), "the test command stands in README.md alone"
    program = re.search(r"command=\$\((awk .+? README\.md)\)", text, re.DOTALL)
    assert program is not None
    extracted = subprocess.run(
        ["bash", "-c", program[1]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert extracted.stdout.strip() == command("test")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    prose = re.sub(r"`[^`\]]*\][^`\n]*`", "", prose)  # code with an index
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_tables_are_written_from_their_data() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_options_are_documented() -> None:
    from moe_compile.config import NAMES

    page = (ROOT / "docs" / "index.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(NAMES)


def test_the_refusal_shown_is_a_real_one() -> None:
    from moe_compile.codes import CODES

    shown = re.search(r"```text\n(.+?)```", README, re.DOTALL)
    assert shown is not None
    for code in re.findall(r"MC\d{3}", shown[1]):
        assert CODES[code].title in shown[1]


def test_the_forms_page_is_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/forms.md is what docs/make_forms.py writes (the version of torch aside)."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    importlib.import_module("make_forms").main([])
    version = re.compile(r"torch \d+\.\d+\.\d+")
    assert version.sub("", capsys.readouterr().out) == version.sub("", (ROOT / "docs" / "forms.md").read_text())
