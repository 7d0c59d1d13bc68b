"""Which kernel runs and with what launch shape: data and arithmetic, no GPU and no maths of the operator.

`choose` is a pure function of the sizes, the dtype and the compute capability. Nothing is timed at run time.
The constants are a model until a card has been measured; docs/LOG.md says which. What `python -m bench tune` measured
on a card stands in tables/sm_<capability>.json and comes first; the model serves what no table lists.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch

# A model asks the same few questions at every call: the answers are remembered.
remembered = lru_cache(maxsize=4096)

# The largest rank the kernels take. Above it the adapter is no longer small against the layer.
MAX_RANK = 128
# Up to this rank decode computes z in every column block; above, reading D that often costs more than a launch.
INLINE_RANK = 8
# Up to this many rows the layer is a stream of weights, and the decode kernel takes it. fp32 is multiplied outside
# the tensor cores, where more than a padded row block is no longer free.
DECODE_ROWS = 128
DECODE_ROWS_FP32 = 16
# On 9.0 the library is the faster one beyond (measured: 128 rows of 18944 x 3584, 48 us with it and 70 without).
DECODE_ROWS_HOPPER = 64


# A bound of its own ends ptxas's aim at an occupancy, for which it parks a few words outside the loop in fp32 kernels
# and in the long one, although nothing runs short: only one program of those fits an SM anyway. On 10.0 it does so in
# decode of 32 rows (Triton 3.6).
ALL_REGISTERS = 255


def pad(n: int, least: int = 16) -> int:
    """The power of two that holds n, and at least `least`: 16 is a tensor core's shortest side."""
    return max(least, 1 << (n - 1).bit_length())


def period(dtype: torch.dtype, r: int) -> int:
    """After how many columns s repeats: half the width where it is stored as [rounded | remainder]."""
    width = pad(r)
    return width // 2 if dtype != torch.float32 and 2 * r <= width else width


@dataclass(frozen=True)
class Gemm:
    """A tile of Y and how its main loop is pipelined.

    descriptors, programs: bulk copies, by that many programs that walk over all tiles
    subtiles: in how many column blocks a tile is stored; rank: how much of the padded rank one dot takes
    registers: an upper bound for a thread, None for the compiler's own
    pdl: starts while the thin pass still runs (programmatic dependent launch, from 9.0 on), whose tile says so, too
    flat: main loop and stores in one loop: a tile's first steps are under way while the one before is stored
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    descriptors: bool = False
    programs: int = 0
    subtiles: int = 1
    group: int = 8
    rank: int = 32
    registers: int | None = None
    pdl: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Thin:
    """Rows per program, the K step, and in how many slices K is cut. `width`: the padded rank; `pdl`: as the Gemm's."""

    m: int
    k: int
    split: int
    width: int
    warps: int = 4
    stages: int = 4
    registers: int | None = None
    pdl: bool = False


@dataclass(frozen=True)
class Decode:
    """Rows (all of X, padded), columns per program, the K step, and in how many slices K is cut.

    pdl: gets ready while the launch before still runs.
    """

    m: int
    n: int
    k: int
    split: int
    warps: int = 4
    stages: int = 4
    registers: int | None = None
    pdl: bool = False


@dataclass(frozen=True)
class CoreGradient:
    """A [r, r] tile of dC, m rows at a time, `rows` rows per program."""

    m: int
    r: int
    rows: int
    precision: str
    warps: int = 4
    pdl: bool = False


@dataclass(frozen=True)
class FactorGradient:
    """c columns of dD or dU, m rows at a time, `rows` rows per program. `width`: the padded rank."""

    m: int
    c: int
    rows: int
    width: int
    warps: int = 4
    stages: int = 3
    registers: int | None = None


@dataclass(frozen=True)
class Choice:
    """What runs, in launch order: `thin` if it is not None, then `main`.

    main is a Decode, a Gemm, or None: then the library multiplies first, and after `thin` `expand` adds the low-rank
    part in place.
    """

    main: Decode | Gemm | None
    thin: Thin | None
    expand: Gemm | None


@dataclass(frozen=True)
class Card:
    """What `choose` knows of a GPU: how many programs run at once, what one may use, and the expand law.

    expand_cost: a separate pass over Y costs expand_cost / K of the layer's time. From the card's bf16 rate F and
    its bandwidth B: 4 M N bytes / B against 2 M N K / F is (2 F / B) / K.
    slack: by how much the fused matmul is expected to trail the library's.
    rank_at_once: how wide S and U may be for one dot, without spilling.
    pdl: whether a launch may start before the one that it depends on has ended.
    flat: whether Triton 3.6 compiles the flat loop of `Gemm`.
    measured: whether tiles and bounds below were measured on it, and not taken from a model alone.
    """

    sms: int
    shared: int
    bulk_copies: bool
    expand_cost: float
    slack: float
    rank_at_once: int = 32
    pdl: bool = False
    flat: bool = False
    measured: bool = False


CARDS = {
    (8, 0): Card(108, 166912, False, 331.0, 0.05),
    (8, 6): Card(84, 101376, False, 200.0, 0.05),
    (8, 9): Card(128, 101376, False, 330.0, 0.05),
    (9, 0): Card(132, 232448, True, 367.0, 0.01, 64, True, True, True),
    (10, 0): Card(148, 232448, True, 485.0, 0.04, 32, True),
    (10, 3): Card(148, 232448, True, 485.0, 0.04, 32, True),
    (12, 0): Card(170, 101376, False, 250.0, 0.05, 32, True),
}
# On a card with bulk copies a matmul without them (operands that they refuse) reaches half of the library's speed.
POINTER_SLACK = 0.5


def card(capability: tuple[int, int]) -> Card:
    """The newest known card that is no newer than `capability`, which is 8.0 at least (`ops.dispatch`)."""
    return CARDS[max(c for c in CARDS if c <= tuple(capability))]


def gemms(chip: Card, descriptors: bool, width: int) -> list[tuple[Gemm, float]]:
    """Candidates with the share of the peak that a full wave of them reaches."""
    if descriptors:
        tall = () if width > 32 else ((bulk_tile(256, 128, chip), 1.0),)
        square = 0.74 if chip.measured else 0.9  # measured on 9.0: 31 us of 3584 columns, where the wide tile takes 46
        return [(bulk_tile(128, 256, chip), 1.0), *tall, (bulk_tile(128, 128, chip), square)]
    if chip.shared > 150000:
        wide = () if width > 64 else ((Gemm(128, 256, 32, 8, 4), 1.0),)
        return [*wide, (Gemm(128, 128, 64, 8, 3), 0.9), (Gemm(64, 128, 64, 4, 3), 0.75)]
    return [(Gemm(128, 128, 32, 8, 3), 1.0), (Gemm(64, 128, 32, 4, 3), 0.75)]


def bulk_tile(m: int, n: int, chip: Card, **changes) -> Gemm:
    """A tile by bulk copies. On 9.0 three stages: what a fourth would take, the thin pass has beside it."""
    stages, subtiles = (3, 2) if chip.measured else (4, 4 if m * n > 128 * 128 else 2)
    rank = chip.rank_at_once
    tile = Gemm(m, n, 64, 8, stages, True, chip.sms, subtiles, 8, rank, ALL_REGISTERS, chip.pdl, chip.flat)
    return replace(tile, **changes)


def gemm_tile(M: int, N: int, chip: Card, descriptors: bool, width: int, aligned: bool = True) -> Gemm:
    """The candidate with the shortest time in whole waves; of equals the first.

    Operands that are not aligned need a mask and an address per element: larger tiles spill then. So do columns that
    16 does not divide, of which Triton tells the compiler nothing (3.7 on 8.0).
    """

    if not aligned or (N % 16 and not descriptors):
        return Gemm(128, 128, 32, 8, 3)
    return min(gemms(chip, descriptors, width), key=lambda c: whole_waves(M, N, chip.sms, c[0].m, c[0].n, c[1]))[0]


def whole_waves(M: int, N: int, sms: int, m: int, n: int, efficiency: float) -> float:
    """The time of all tiles [m, n] of Y [M, N] on so many multiprocessors, in products per k of one of them."""
    tiles = -(-M // m) * -(-N // n)
    return -(-tiles // sms) * m * n / efficiency


# The library's tiles on 9.0, with the share of the peak of a full wave. 2048 x 4608 and 512 x 18944 end in whole waves
# of 128 x 192, which our own do not.
LIBRARY_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 192, 1.0), (192, 128, 1.0), (128, 128, 0.97), (64, 256, 0.97))
# Up to this many rows it cuts K as well, and our long kernel cannot.
LIBRARY_ROWS = 256
# Where its tiles leave multiprocessors idle it cuts K, with this share of the peak.
LIBRARY_CUTS = 0.6
# Microseconds of a wave of 128 x 256 per column of K, and of the thin pass with the pass over Y beyond their bytes.
WAVE, LAUNCHES = 46 / 3584, 4.5


def by_library(M: int, N: int, K: int, ours: float, chip: Card) -> tuple[float, float]:
    """Shares of the library's time on 9.0: (what its launches cost beyond a pass over Y, by how much we trail it)."""
    theirs = min(whole_waves(M, N, chip.sms, *tile) for tile in LIBRARY_TILES)
    theirs = min(theirs, M * N / chip.sms / LIBRARY_CUTS)
    return LAUNCHES / (theirs / (128 * 256) * WAVE * K), ours / theirs - 1


@remembered
def thin_tile(M: int, K: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Thin:
    """Enough programs to fill the card: K is cut where M alone gives too few, but never below four steps."""
    width = pad(r)
    if capability is None:
        return Thin(16, 32, 2, width, 4, 1)
    chip = card(capability)
    if dtype == torch.float32:  # ieee dots hold a whole step of both operands in registers
        m, k = (16 if M <= 16 or width > 64 else 32), (32 if width <= 32 else 16)
    else:
        m = 16 if M <= 16 else 64 if width <= 64 else 32
        # A masked step of 128 fits the registers beside 16 rows only.
        whole = K % 128 == 0 or (M <= 16 and K % 8 == 0)
        # 64 ranks of an fp32 factor spill there, but not on 9.0.
        k = 128 if whole and width <= (64 if chip.measured else 32) else 32 if width > 64 and K % 8 else 64
    split = max(1, min(2 * chip.sms // max(1, -(-M // m)), K // (4 * k), 32))
    bounded = dtype == torch.float32 or m == 16 or (width > 32 and not chip.measured)
    return Thin(m, k, split, width, stages=3, registers=ALL_REGISTERS if bounded else None)


def thin_beside(M: int, K: int, r: int, chip: Card) -> Thin:
    """The thin pass of 16-bit operands beside the fused matmul: a program on each multiprocessor, in little room."""
    width = pad(r)
    m = 64 if width <= 64 else 32
    split = max(1, min(chip.sms // max(1, -(-M // m)), K // 256, 32))
    k = 64 if K % 64 == 0 or width <= 64 else 32
    bounded = width > 32 and not chip.measured  # 64 ranks park 8 bytes on 10.0 (Triton 3.7)
    return Thin(m, k, split, width, stages=3, registers=ALL_REGISTERS if bounded else None, pdl=True)


def decode_tile(M: int, N: int, K: int, dtype: torch.dtype, chip: Card) -> Decode:
    """W in 64 rows a program, and enough slices of K to occupy the card twice.

    Where the rows of W alone do that, short steps: what counts then is that all programs are there from the start.
    """
    m = pad(M)
    blocks = -(-N // 64)
    split = max(1, min(2 * chip.sms // blocks, K // 512, 16))
    k = 32 if dtype == torch.float32 else 64 if m > 32 or K % 8 or split == 1 else 128
    split = max(1, min(2 * chip.sms // blocks, K // (4 * k), 16))
    stages = 4 if chip.shared > 150000 and dtype != torch.float32 and (m > 32 or split > 1) else 3
    # On 9.0 nothing is parked, and many programs are what counts.
    registers = ALL_REGISTERS if dtype == torch.float32 or (m > 16 and not chip.measured) else None
    return Decode(m, 64, k, split, 8 if m > 64 and not chip.bulk_copies else 4, stages, registers, chip.pdl)


@remembered
def choose(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    descriptors: bool = True,
    transposed: bool = False,
    parts: int = 1,
) -> Choice:
    """What computes Y [M, N] from K: the card's table, or a model of the time. dX asks with N and K swapped.

    capability: the card's, or None for Triton's interpreter: small tiles, decode up to DECODE_ROWS in every dtype, else
    the fused matmul, and never the library, so that every kernel can be run on a CPU.
    descriptors: whether the operands meet the rules of bulk copies (`gemm.fits_descriptors`).
    transposed: whether w [N, K] is the view of a transposed matrix, as in the backward; tables tell them apart.
    parts: in how many column blocks x comes, which the library multiplies one by one.
    """
    if descriptors and capability is not None:
        bucket = next((bound for bound in BUCKETS if bound >= M), BUCKETS[-1])
        tuned = table(capability).get((N, K, rank_class(r), dtype, transposed, bucket))
        if tuned is not None:
            return fitted(tuned, r)
    return default(M, N, K, r, dtype, capability, descriptors, parts)


def default(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    descriptors: bool = True,
    parts: int = 1,
) -> Choice:
    """`choose` without a table: the model alone."""
    chip = CARDS[9, 0] if capability is None else card(capability)
    inline = r <= INLINE_RANK
    few = DECODE_ROWS_FP32 if dtype == torch.float32 and capability is not None else DECODE_ROWS
    if chip.measured and capability is not None:
        few = min(few, DECODE_ROWS_HOPPER)
    if few >= M:
        main = decode_tile(M, N, K, dtype, chip)
        thin = None if inline else thin_tile(M, K, r, dtype, capability)
        if capability is None:
            main = _small(main)
        elif chip.measured and inline and dtype != torch.float32 and M > 16 and main.split == 1:
            # Measured on 18944 x 3584: 46.6 us and 38.8 at 32 rows, 43.6 and 42.6 at 64. Where its programs are not
            # all there from the start (37888 x 3584), half as many, twice as wide, take 73.3 us and not 77.5 at 64
            # rows. At 32 a block took 15 of 145 us longer than with z on the way: that this is why is inferred.
            beside = replace(main, stages=4)
            if -(-N // beside.n) > chip.sms * (chip.shared // staged_bytes(beside, dtype)):
                beside = replace(main, n=128, warps=8, stages=3) if M > 32 else None
            if beside is not None:
                main, thin = beside, thin_beside(M, K, r, chip)
        return Choice(main, thin, None)
    thin = thin_tile(M, K, r, dtype, capability)
    bulk = descriptors and chip.bulk_copies and dtype != torch.float32
    if capability is None:
        main = gemm_tile(M, N, chip if descriptors else CARDS[8, 0], descriptors, thin.width)
        return Choice(_small(main), thin, None)
    before, expand = added(M, K, r, dtype, capability)
    if dtype == torch.float32:  # where the library's matmul is the faster one
        return Choice(None, before, expand)
    saved = chip.expand_cost / K
    lost = POINTER_SLACK if chip.bulk_copies and not bulk else chip.slack
    main = gemm_tile(M, N, chip, bulk, thin.width, descriptors)
    if bulk and chip.measured:
        if M <= LIBRARY_ROWS:
            return Choice(None, before, expand)
        ours = min(whole_waves(M, N, chip.sms, tile.m, tile.n, share) for tile, share in gemms(chip, True, thin.width))
        launches, trails = by_library(M, N, K, ours, chip)
        if parts == 1:
            saved, lost = saved + launches, lost + trails
    if saved <= lost:  # a pass over Y costs no more than the fused matmul trails
        return Choice(None, before, expand)
    thin = thin_beside(M, K, r, chip) if bulk and chip.pdl else thin
    return Choice(main, thin, None)


@remembered
def added(M: int, K: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> tuple[Thin, Gemm]:
    """The thin pass and the pass over Y that add the low-rank part to what a library has multiplied."""
    thin = thin_tile(M, K, r, dtype, capability)
    if capability is None:
        return thin, _small(Gemm(64, 64, 16, 4, 1))
    pdl = card(capability).pdl
    if dtype == torch.float32:  # ieee dots multiply outside the tensor cores, all operands in registers
        return replace(thin, pdl=pdl), Gemm(32, 64, 16, 4, 1, rank=16, registers=ALL_REGISTERS, pdl=pdl)
    return replace(thin, pdl=pdl), Gemm(64, 64, 16, 4, 1, pdl=pdl)


# What `pinned` is made for: rows enough that the thin pass has several blocks, few enough that K is cut for the rest.
PINNED_ROWS = 1024


@remembered
def pinned(
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    descriptors: bool = True,
    transposed: bool = False,
) -> Choice:
    """The one choice for every M, so that a row's sums are cut and ordered alike however many rows there are.

    The thin pass and the fused matmul, since both walk over blocks of rows that know nothing of each other: decode's
    tile grows with M, and the library does what it likes. No tile is the best for one row and for thousands; this one
    leans to few rows, which rollouts have: narrow, to occupy more of the card. A table may hold one for a shape, under
    ANY_M, and what it says of single M is ignored. Arguments as in `choose`.
    """
    if descriptors and capability is not None:
        tuned = table(capability).get((N, K, rank_class(r), dtype, transposed, ANY_M))
        if tuned is not None:
            return fitted(tuned, r)
    return pinned_default(N, K, r, dtype, capability, descriptors)


def pinned_default(
    N: int, K: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None, descriptors: bool = True
) -> Choice:
    """`pinned` without a table."""
    chip = CARDS[9, 0] if capability is None else card(capability)
    thin = thin_tile(PINNED_ROWS, K, r, dtype, capability)
    if capability is None:
        return Choice(_small(Gemm(128, 128, 64, 8, 4, descriptors, 1)), thin, None)
    if dtype == torch.float32:
        return Choice(Gemm(16, 64, 16, 4, 2, rank=16, registers=ALL_REGISTERS), thin, None)
    if descriptors and chip.bulk_copies:
        # A 7B block in 64 x 256 takes 0.71 of its time in 128 x 128 at 16 rows, 0.80 at 128, 0.85 at 1024 and 1.00 at
        # 8192 on an H200 (sums of the rows in tables/sm_90.csv, siblings together).
        main = bulk_tile(64, 256, chip, stages=4) if chip.measured else bulk_tile(128, 128, chip)
        thin = thin_beside(PINNED_ROWS, K, r, chip) if chip.pdl else thin
    elif descriptors and chip.shared > 150000:
        main = Gemm(128, 128, 64, 8, 3)
    else:
        main = Gemm(128, 128, 32, 8, 3)
    return Choice(main, thin, None)


@remembered
def core_gradient_tile(
    M: int, r: int, adapters: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> CoreGradient:
    """512 rows a program; with many adapters fewer slices, since each adapter has programs of its own."""
    side = min(pad(r), 32)
    if capability is None:
        return CoreGradient(16, side, 32, "ieee")
    rows = 512 if adapters <= 64 else max(512, pad(-(-M // 4)))
    precision = "ieee" if side == 16 or dtype == torch.float32 else "tf32x3"
    return CoreGradient(64, side, rows, precision, pdl=card(capability).pdl)


@remembered
def factor_gradient_tile(
    M: int, C: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None
) -> FactorGradient:
    """64 columns a program, and enough slices of the rows to fill a card."""
    width = pad(r)
    if capability is None:
        return FactorGradient(16, 32, 32, width)
    chip = card(capability)
    slices = max(1, min(2 * chip.sms // -(-C // 64), -(-M // 256), 32))
    rows = pad(-(-M // slices), 64)
    if width > 64 or (width > 32 and not chip.measured):
        return FactorGradient(32, 64, rows, width, 8, registers=None if chip.measured else ALL_REGISTERS)
    if dtype == torch.float32:
        return FactorGradient(32, 64, rows, width, registers=ALL_REGISTERS)
    parks = chip.bulk_copies and not chip.measured  # a few words on 10.0, for an occupancy
    return FactorGradient(64, 64, rows, width, registers=ALL_REGISTERS if parks else None)


def _small(tile: Decode | Gemm) -> Decode | Gemm:
    """The same kernel in tiles that an interpreter runs quickly, and that small problems cross the edges of."""
    if isinstance(tile, Decode):
        return Decode(tile.m, 32, 32, 3, 4, 1)
    return Gemm(32, 32, 32, 4, 1, tile.descriptors, 3, 2 if tile.descriptors else 1, 2, tile.rank)


# --- tables: what was measured on a card ------------------------------------------------------------------

TABLES = Path(__file__).parent / "tables"
# An entry serves all M from the bucket before up to its own, at which it was measured; the last one all above, too.
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ANY_M = 0  # an entry for `pinned`
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Key = tuple[int, int, int, torch.dtype, bool, int]


def rank_class(r: int) -> int:
    """Ranks that one entry serves: those of decode in one launch, then each padded rank by itself."""
    return INLINE_RANK if r <= INLINE_RANK else pad(r)


def fitted(choice: Choice, r: int) -> Choice:
    """An entry for this rank, which its class allows: the thin pass's width is the padded one."""
    return choice if choice.thin is None else replace(choice, thin=replace(choice.thin, width=pad(r)))


def to_json(choice: Choice) -> dict:
    """A choice as a table holds it: the kernels that run and their launch shapes."""
    kinds = {"main": choice.main, "thin": choice.thin, "expand": choice.expand}
    return {name: {"kernel": type(t).__name__} | asdict(t) for name, t in kinds.items() if t is not None}


def from_json(entry: dict) -> Choice:
    """The choice that `to_json` wrote; TypeError or KeyError on what it did not."""
    known = {"Gemm": Gemm, "Thin": Thin, "Decode": Decode}
    made = {name: known[t["kernel"]](**{k: v for k, v in t.items() if k != "kernel"}) for name, t in entry.items()}
    return Choice(made.get("main"), made.get("thin"), made.get("expand"))


def read_table(path: Path) -> dict[Key, Choice]:
    """The entries of a table, by (N, K, rank class, dtype, transposed, bucket of M or ANY_M)."""
    entries = {}
    for e in json.loads(path.read_text())["entries"]:
        key = e["N"], e["K"], e["rank"], DTYPES[e["dtype"]], e["transposed"], e["M"]
        entries[key] = from_json(e["choice"])
    return entries


@cache
def table(capability: tuple[int, int]) -> dict[Key, Choice]:
    """The table of exactly this architecture; empty where nothing has been measured."""
    path = TABLES / f"sm_{capability[0]}{capability[1]}.json"
    return read_table(path) if path.exists() else {}


def staged_bytes(tile: Gemm | Decode, dtype: torch.dtype) -> int:
    """The shared memory of X and W in all stages."""
    return dtype.itemsize * tile.stages * tile.k * (tile.m + tile.n)
