"""Write the tables of the docs from the JSON that the benchmarks wrote.

A table stands between ``<!-- table: benchmarks/results/NAME.json -->`` and ``<!-- end table -->``; the JSON
holds ``{"machine": {..}, "table": {"columns": [..], "rows": [[..]]}}``. Without the file the docs say that
nothing was measured. ``--check`` changes nothing and exits with 1 when a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def render(path: Path) -> str:
    """One table in Markdown, with the machine below it."""
    if not path.is_file():
        return "Not measured yet.\n"
    data = json.loads(path.read_text())
    table = data["table"]
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    machine = ", ".join(f"{key} {value}" for key, value in data.get("machine", {}).items())
    return f"{text}\n\nMeasured on: {machine}. Raw data: `{path.relative_to(ROOT)}`.\n"


def filled(page: str) -> str:
    """The page with every table written anew."""
    return BLOCK.sub(lambda m: m[1] + "\n" + render(ROOT / m[2]) + "\n" + m[3], page)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only tell whether the tables are up to date")
    arguments = parser.parse_args()
    stale = []
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.read_text()
        new = filled(page)
        if new != page:
            stale.append(str(path.relative_to(ROOT)))
            if not arguments.check:
                path.write_text(new)
    print(f"{'out of date' if arguments.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
