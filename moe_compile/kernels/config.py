"""Which kernel runs for which number of tokens, and with which tiles.

The figures behind the choice were measured on one H200 and one H100 (bf16); other devices get the same tiles with as
many pipeline stages as their shared memory holds. Pure functions of shapes: nothing is read back from the
device, so the choice is safe under CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

PATHS = ("gemv", "decode", "sorted")

# Up to here one pair per program wins, which reads an expert's weights for each of its rows: while hardly two tokens
# choose the same expert (mean rows per expert), and pairs times H times I are few.
GEMV_TOKENS = 2
GEMV_ROWS = 0.4
GEMV_WEIGHTS = 1 << 27
DECODE_TOKENS = 64  # up to here every hit expert's rows are found without a sort
LADDER_ROWS = 40  # mean rows per expert from which on tiles of graded height win
LADDER_TALL_ROWS = 60  # the same for tall ones, which pay as well where the rows are few but uneven
TMA_ROWS = 256  # the same for tiles of one height by descriptors
PERMUTE_COLUMNS = 2048  # columns of the first GEMM from which on it repays that its rows are put in order
DECODE_IDS = 4096  # ids that one program of the decode kernel holds in registers


class Device(NamedTuple):
    """What a plan needs to know about a device: shared bytes of one program, processors, whether it has TMA, and
    whether it is a Hopper GPU, for which the compiler's use of shared memory is known (``memory``)."""

    shared: int = 227 * 1024
    processors: int = 132
    tma: bool = True
    hopper: bool = True


H200 = Device()


@dataclass(frozen=True)
class Tiles:
    """The compile-time shape of one GEMM. ``wn`` counts the weight rows of one step, gate and up together.

    ``tail`` allows the last tile of an expert to be computed at 1/2 (1) or also 1/4 (2) of ``bm``;
    ``group`` row tiles share a sweep over the columns, so that weights and rows stay in L2. ``tma``: weights
    by descriptor, ``rows_tma``: rows too (``tail`` at most 1), which the first GEMM needs in expert order
    (``permute``). ``programs`` > 0: that many programs share all tiles. ``ladder`` (with ``tma`` and ``swap``)
    has tiles of 1/4, 2/4, 3/4, 4/4 and 5/4 of ``bm`` rows, so that one read of the weights serves up to 5/4.
    ``chained``: comes up while the kernel before it ends (``launch``), which a long kernel does not repay.
    """

    bm: int
    wn: int
    bk: int
    warps: int
    stages: int
    swap: bool
    tail: int = 0
    group: int = 1
    evict: str = ""
    tma: bool = False
    rows_tma: bool = False
    programs: int = 0
    ladder: bool = False
    chained: bool = True

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def rest(self) -> int:
        """Rows that an expert's last tile may have beyond ``bm``."""
        return self.bm // 4 if self.ladder else 0


@dataclass(frozen=True)
class Plan:
    """One path with the tiles of its two GEMMs (equal ``bm`` and ``rest``: they share one tile table)."""

    path: str
    up: Tiles
    down: Tiles


def choose_path(tokens: int, top_k: int, experts: int, hidden: int, inter: int, dense: bool = True) -> str:
    """The path for ``tokens`` rows; nothing here can know how they spread over the experts.

    Args:
        dense: every weight has stride one along its input dimension (what matrix-vector wants).
    """
    if dense and are_vectors(tokens, top_k, experts, hidden, inter):
        return "gemv"
    ids = power_of_two(tokens) * power_of_two(top_k)
    return "decode" if tokens <= DECODE_TOKENS and ids <= DECODE_IDS else "sorted"


def are_vectors(tokens: int, top_k: int, experts: int, hidden: int, inter: int) -> bool:
    """Whether the layer is best computed pair by pair."""
    alone = tokens == 1 or (tokens <= GEMV_TOKENS and tokens * top_k < GEMV_ROWS * experts)
    return alone and tokens * top_k * hidden * inter <= GEMV_WEIGHTS


@lru_cache(maxsize=4096)
def select(
    path: str,
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inter: int,
    elements: int,
    device: Device = H200,
    tma: tuple[bool, bool] = (False, False),
) -> Plan:
    """Tiles of a path.

    Args:
        elements: bytes of one element.
        tma: whether descriptors can hold the weights of the two GEMMs.
    """
    if elements == 4 or hidden % 8 or inter % 8:
        up, down = _small(path, elements)
    elif path == "sorted":
        mean = tokens * top_k / experts
        up, down = _sorted(mean)
        if device.tma and LADDER_ROWS < mean < TMA_ROWS and all(tma):
            up = down = _ladder(mean)
        elif device.tma and mean >= TMA_ROWS:
            up_tma, down_tma = _described(mean, inter, device.processors)
            up, down = up_tma if tma[0] else up, down_tma if tma[1] else down
    else:
        up, down = _decode(tokens)
    return Plan(path, _fit(up, hidden, elements, device), _fit(down, inter, elements, device))


def _decode(tokens: int) -> tuple[Tiles, Tiles]:
    # one tile holds all tokens, whoever they choose: an expert's weights are read once
    if tokens > 32:
        tiles = Tiles(64, 128, 128, 8, 4, swap=True, tail=2, evict="evict_first")
        return tiles, tiles
    bm, tail = (16, 0) if tokens <= 16 else (32, 1)
    return (
        Tiles(bm, 128, 128, 4, 5, swap=True, tail=tail, evict="evict_first"),
        Tiles(bm, 128, 128, 4, 4, swap=True, tail=tail, evict="evict_first"),
    )


def _sorted(mean: float) -> tuple[Tiles, Tiles]:
    if mean <= 256:
        if mean <= LADDER_ROWS:
            tiles = Tiles(64, 128, 128, 4, 4, swap=True, tail=2, group=4)
        elif mean <= LADDER_TALL_ROWS:
            tiles = Tiles(128, 128, 128, 8, 3, swap=True, tail=2, group=4)
        else:
            tiles = Tiles(128, 256, 64, 8, 4, swap=True, tail=2, group=4)
        return tiles, tiles
    # the last tile of an expert still matters with a few tiles each, and no longer with many
    tail = 1 if mean <= 1024 else 0
    return Tiles(128, 256, 64, 8, 3, False, tail, 16), Tiles(128, 256, 64, 8, 3, False, tail, 8)


def _ladder(mean: float) -> Tiles:
    if mean <= LADDER_TALL_ROWS:
        return Tiles(64, 128, 128, 4, 4, swap=True, group=2, tma=True, ladder=True)
    return Tiles(128, 256, 64, 8, 4, swap=True, group=4, tma=True, ladder=True)


def _described(mean: float, inter: int, processors: int) -> tuple[Tiles, Tiles]:
    shared = Tiles(128, 256, 64, 8, 4, False, 0, 16, tma=True, rows_tma=True, programs=processors, chained=False)
    gathered = Tiles(128, 256, 64, 8, 4, False, 1, 8, tma=True, chained=False)
    up = shared if inter >= PERMUTE_COLUMNS else gathered
    return up, shared if mean < 1024 else replace(shared, stages=3)


def _small(path: str, elements: int) -> tuple[Tiles, Tiles]:
    """Exact fp32 runs on the CUDA cores, and rows of odd length cannot be copied to shared memory in the
    background: with larger tiles both would run out of registers.

    A step of fp32 is one chain of roundings (``tile._add_step``): 16 keep the layer as accurate as BLAS.
    """
    bm = 64 if path == "sorted" else 16
    bk, stages = (16, 4) if elements == 4 else (32, 2)
    tiles = Tiles(bm, 64, bk, 4, stages, swap=False, group=8 if path == "sorted" else 1)
    return tiles, tiles


def _fit(tiles: Tiles, depth: int, elements: int, device: Device) -> Tiles:
    """Steps that divide the depth (no masks in the loop) and stages that fit the shared memory."""
    if depth % tiles.bk and depth % (tiles.bk // 2) == 0 and tiles.bk > 64:
        tiles = replace(tiles, bk=tiles.bk // 2, stages=2 * tiles.stages - 2)
    stage, beside = memory(tiles, elements, device)
    stages = min(tiles.stages, (device.shared - beside) // stage)
    if stages < 2 and tiles.wn > 64:
        return _fit(replace(tiles, wn=tiles.wn // 2), depth, elements, device)
    return replace(tiles, stages=max(1, stages))


def memory(tiles: Tiles, elements: int, device: Device) -> tuple[int, int]:
    """Shared bytes of one pipeline stage, and of what a program holds beside its stages."""
    stage = (tiles.bm + tiles.rest + tiles.wn) * tiles.bk * elements
    # a program with several tiles holds the finished one beside the stages of the next; half of it on Hopper
    finished = tiles.bm * tiles.wn * elements
    shared = finished // 2 + 256 if device.hopper else finished
    return stage, shared if tiles.programs else 8 * 1024


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


def gemv_up_steps(depth: int, gated: bool) -> tuple[int, int]:
    """Columns and depth of one step of the first matrix-vector kernel: 32 or 64 weights per thread."""
    bk = _step(depth, 2048, 512)
    return min(8, max(1, (4096 if gated else 8192) // bk)), bk


def gemv_down_steps(depth: int, top_k: int) -> tuple[int, int, int]:
    """Experts, columns and depth of one step of the second matrix-vector kernel."""
    experts = min(power_of_two(top_k), 8)
    bk = _step(depth, 4096 // experts if experts > 4 else 1024, 128)
    return experts, min(8, max(1, 4096 // (experts * bk))), bk


def _step(depth: int, largest: int, smallest: int) -> int:
    """The largest power of two that divides the depth, or a masked step where only tiny ones do."""
    step = largest
    while step >= smallest:
        if depth % step == 0:
            return step
        step //= 2
    return min(max(power_of_two(depth), 16), 2 * smallest)
