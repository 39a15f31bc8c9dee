"""Measured plans: a JSON table takes the place of ``config``'s own choice for the shapes that it holds.

There is one table per kind of GPU and Triton version, written by ``python -m moe_compile tune`` and read once per
process: nothing is measured in a user's step. A table can only make a layer faster or slower, never wrong: every plan
computes the same sums, and one that a call cannot follow is passed over.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .config import DECODE_IDS, GEMV_TOKENS, PATHS, Device, Plan, Tiles, memory, power_of_two

log = logging.getLogger("moe_compile.kernels.tuned")

FORMAT = 1
NEAR = math.sqrt(2)  # a plan serves numbers of tokens up to this factor away
STORAGES = ("stacked", "transposed", "separate")
_TOGETHER = ("path", "up", "down", "us", "default_us")


class TableError(ValueError):
    """A file that is no table of plans."""


class Layer(NamedTuple):
    """What a measurement holds for, next to the number of tokens."""

    experts: int
    top_k: int
    hidden: int
    inter: int
    dtype: str  # "bfloat16" or "float16"
    layout: str  # see ``activation.LAYOUTS``
    storage: str  # one of STORAGES

    @property
    def name(self) -> str:
        """The key in a table."""
        return f"E{self.experts} K{self.top_k} H{self.hidden} I{self.inter} {self.dtype} {self.layout} {self.storage}"


@dataclass(frozen=True)
class Entry:
    """A plan with its time and that of the plan that it replaces, in microseconds."""

    plan: Plan
    us: float
    default_us: float

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {**asdict(self.plan), "us": self.us, "default_us": self.default_us}


Table = dict[str, dict[int, Entry]]  # by ``Layer.name`` and number of tokens


def table_path(folder: str | Path, device: str, triton: str) -> Path:
    """The file for a kind of GPU (its name) and the minor version of Triton."""
    words = f"{device} triton {'.'.join(triton.split('.')[:2])}".split()
    return Path(folder) / ("-".join("".join(c for c in word if c.isalnum() or c == ".") for word in words) + ".json")


def read(path: Path) -> Table:
    """The table in a file; an empty one where there is no file.

    Raises:
        TableError: something in it is not as ``merge`` writes it; nothing of such a file is used.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("layers"), dict):
        raise TableError(f"{path} is no table of format {FORMAT}")
    table: Table = {}
    for name, cells in data["layers"].items():
        if not isinstance(cells, dict):
            raise TableError(f"{path}: {name!r} holds {cells!r}, expected plans by number of tokens")
        for tokens, cell in cells.items():
            where = f"{path}: {name!r} at {tokens!r} tokens"
            if not tokens.isdecimal() or int(tokens) < 1:
                raise TableError(f"{where}: not a number of tokens")
            table.setdefault(name, {})[int(tokens)] = _entry(cell, where)
    return table


def _entry(cell: Any, where: str) -> Entry:
    if not isinstance(cell, dict) or set(cell) != set(_TOGETHER):
        raise TableError(f"{where}: expected the fields {', '.join(_TOGETHER)}")
    if cell["path"] not in PATHS:
        raise TableError(f"{where}: path {cell['path']!r} is not one of {', '.join(PATHS)}")
    up, down = _tiles(cell["up"], where), _tiles(cell["down"], where)
    if (up.bm, up.rest) != (down.bm, down.rest):
        raise TableError(f"{where}: the two GEMMs have tiles of different heights")
    times = [cell["us"], cell["default_us"]]
    if not all(isinstance(t, (int, float)) and 0 < t < math.inf for t in times):
        raise TableError(f"{where}: the times {times} are no positive numbers")
    return Entry(Plan(cell["path"], up, down), *times)


def _tiles(values: Any, where: str) -> Tiles:
    types = {f.name: {"int": int, "bool": bool, "str": str}[str(f.type)] for f in fields(Tiles)}
    if not isinstance(values, dict) or set(values) != set(types):
        raise TableError(f"{where}: tiles need exactly the fields {', '.join(types)}")
    wrong = [name for name, kind in types.items() if type(values[name]) is not kind]
    if wrong:
        raise TableError(f"{where}: {wrong[0]} is {values[wrong[0]]!r}, expected {types[wrong[0]].__name__}")
    tiles = Tiles(**values)
    if not sound(tiles):
        raise TableError(f"{where}: {tiles} is none that the kernels can run")
    return tiles


def sound(tiles: Tiles) -> bool:
    """Whether tiles fit together (not whether a device has the memory for them)."""
    sizes = (tiles.bm, tiles.wn, tiles.bk)
    return (
        all(16 <= size <= 256 and size == power_of_two(size) for size in sizes)
        and tiles.warps in (1, 2, 4, 8)
        and 1 <= tiles.stages <= 16
        and tiles.tail in (0, 1, 2)
        and tiles.group >= 1
        and tiles.programs >= 0
        and tiles.evict in ("", "evict_first", "evict_last")
        and tiles.bm >> tiles.tail >= 16
        and (not tiles.rows_tma or (tiles.tma and tiles.tail <= 1 and not tiles.ladder))
        and (not tiles.ladder or (tiles.tma and tiles.swap and tiles.tail == 0 and tiles.bm >= 64))
    )


def merge(path: Path, cells: dict[str, dict[int, Entry | None]]) -> Table:
    """Put cells into the table of a file, and take out those that are None; the whole new table.

    Another process that merges at the same time loses nothing: a lock beside the file orders them, and a reader sees
    the old file or the new one.

    Raises:
        TableError: the file there is no table; it stays as it is.
        OSError: the folder cannot be written.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = read(path)
        for name, plans in cells.items():
            row = {**table.get(name, {}), **plans}
            table[name] = {tokens: entry for tokens, entry in row.items() if entry is not None}
        table = {name: row for name, row in table.items() if row}
        layers = {n: {str(t): row[t].to_dict() for t in sorted(row)} for n, row in sorted(table.items())}
        file, new = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(file, "w", encoding="utf-8") as stream:
                stream.write(json.dumps({"format": FORMAT, "layers": layers}, indent=1) + "\n")
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
    return table


@lru_cache(maxsize=16)
def load(path: Path) -> Table:
    """``read``, once per process; a file that is no table counts as empty, and a warning says so."""
    try:
        return read(path)
    except TableError as error:
        log.warning("%s; its plans are not used: delete it, or write it again with python -m moe_compile tune", error)
        return {}


def find(
    table: Table, layer: Layer, tokens: int, device: Device, *, dense: bool, tma: tuple[bool, bool]
) -> Plan | None:
    """The plan measured nearest to ``tokens``, or None where ``config`` has to choose.

    Args:
        dense: every weight has stride one along its input dimension.
        tma: whether descriptors can hold the weights of the two GEMMs.
    """
    row = table.get(layer.name)
    if not row or tokens < 1:
        return None
    near = min(row, key=lambda t: (max(t, tokens) / min(t, tokens), t))
    plan = row[near].plan
    close = max(near, tokens) / min(near, tokens) <= NEAR
    return plan if close and follows(plan, layer, tokens, device, dense=dense, tma=tma) else None


def follows(plan: Plan, layer: Layer, tokens: int, device: Device, *, dense: bool, tma: tuple[bool, bool]) -> bool:
    """Whether a call on a device can follow a plan (arguments as in ``find``)."""
    if plan.path == "gemv":
        return dense and tokens <= 2 * GEMV_TOKENS
    elements = 4 if layer.dtype == "float32" else 2
    for tiles, described in zip((plan.up, plan.down), tma, strict=True):
        stage, beside = memory(tiles, elements, device)
        if tiles.stages * stage + beside > device.shared or (tiles.tma and not (described and device.tma)):
            return False
    return plan.path == "sorted" or power_of_two(tokens) * power_of_two(layer.top_k) <= DECODE_IDS
