"""Draw the table of ``experts.py``, time over the limit, one picture per regime: ``python benchmarks/pictures.py``.

Needs matplotlib (``pip install moe_compile[plot]``). The pictures lie in ``docs/pictures``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from peers import LAYERS, PEERS

ROOT = Path(__file__).resolve().parents[1]
REGIMES = {"decode": (1, 16, 128), "middle": (1024,), "prefill": (4096, 16384)}
HIGHEST = 4.0  # a bar beyond it is cut, its number stands on top
COLORS = ("#1b6ca8", "#d98c3f", "#9aa5ab", "#b04a5a", "#6b8f47", "#7a5ca8", "#3f9d97", "#c2a83e")


def draw(data: dict[str, Any], regime: str, tokens: tuple[int, ...], path: Path) -> None:
    """Bars of every peer for every layer and number of tokens, the limit at 1."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # the same file from the same data
    matplotlib.rcParams.update({"svg.hashsalt": "moe_compile", "font.size": 9})
    rates = data["machine"]
    cells = [c for c in data["cells"] if c["tokens"] in tokens and "ms" in c]
    measured = {(c["layer"], c["tokens"]) for c in cells}
    groups = [(layer, t) for layer in LAYERS for t in tokens if (layer, t) in measured]
    names = [name for name in PEERS if any(c["peer"] == name for c in cells) and name != "hf_batched_c"]
    figure, axes = pyplot.subplots(figsize=(11, 3.6))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        found = {(c["layer"], c["tokens"]): c for c in cells if c["peer"] == name}
        for at, group in enumerate(groups):
            if group not in found:
                continue
            limit = LAYERS[group[0]].limit_ms(group[1], found[group]["hit"], rates["copy_tbs"], rates["dense_tflops"])
            ratio = found[group]["ms"] / limit
            x = at - 0.4 + (i + 0.5) * width
            label = name if at == 0 else None
            axes.bar(x, min(ratio, HIGHEST), width, color=COLORS[i], label=label)
            if ratio > HIGHEST:
                axes.text(x, HIGHEST, f"{ratio:.1f}", ha="center", va="bottom", fontsize=6, rotation=90)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{layer}\nT={t}" for layer, t in groups], fontsize=7)
    axes.set_ylabel("time / limit")
    axes.set_ylim(0, HIGHEST * 1.08)
    axes.set_title(f"{regime}: routed experts in bf16 on one {rates['gpu']}", fontsize=10)
    axes.legend(ncols=len(names), fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "benchmarks" / "results" / "experts_h200.json")
    arguments = parser.parse_args()
    data = json.loads(arguments.data.read_text())
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    for regime, tokens in REGIMES.items():
        draw(data, regime, tokens, folder / f"{regime}.svg")
        print(folder / f"{regime}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
