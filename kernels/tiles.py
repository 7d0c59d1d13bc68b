"""Which kernel runs and with what launch shape: data and arithmetic, no GPU and no maths of the operator.

`choose` is a pure function of the sizes, the dtype and the compute capability. Nothing is timed at run time.
The constants are a model until a card has been measured; docs/LOG.md says which.
"""

from dataclasses import dataclass

import torch

# The largest rank the kernels take. Above it the adapter is no longer small against the layer.
MAX_RANK = 128
# Up to this rank decode computes z in every column block; above, reading D that often costs more than a launch.
INLINE_RANK = 8
# Up to this many rows the layer is a stream of weights, and the decode kernel takes it. fp32 is multiplied outside
# the tensor cores, where more than a padded row block is no longer free.
DECODE_ROWS = 128
DECODE_ROWS_FP32 = 16


def pad(n: int, least: int = 16) -> int:
    """The power of two that holds n, at least 16: a tensor core's shortest side."""
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


@dataclass(frozen=True)
class Thin:
    """Rows per program, the K step, and in how many slices K is cut. `width`: the padded rank."""

    m: int
    k: int
    split: int
    width: int
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class Decode:
    """Rows (all of X, padded), columns per program, the K step, and in how many slices K is cut."""

    m: int
    n: int
    k: int
    split: int
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class CoreGradient:
    """A [r, r] tile of dC, m rows at a time, `rows` rows per program."""

    m: int
    r: int
    rows: int
    precision: str
    warps: int = 4


@dataclass(frozen=True)
class FactorGradient:
    """c columns of dD or dU, m rows at a time, `rows` rows per program. `width`: the padded rank."""

    m: int
    c: int
    rows: int
    width: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Choice:
    """What runs, in launch order: `thin` if it is not None, then `main`.

    main is a Decode, a Gemm, or None: then the library multiplies, and `expand` adds the low-rank part in place.
    """

    main: Decode | Gemm | None
    thin: Thin | None
    expand: Gemm | None
    why: str


@dataclass(frozen=True)
class Card:
    """What `choose` knows of a GPU: how many programs run at once, what one may use, and the expand law.

    expand_cost: a separate pass over Y costs expand_cost / K of the layer's time. From the card's bf16 rate F and
    its bandwidth B: 4 M N bytes / B against 2 M N K / F is (2 F / B) / K.
    slack: by how much the fused matmul is expected to trail the library's.
    rank_in_registers: how wide S and U may be to wait in registers for the next tile without spilling.
    """

    sms: int
    shared: int
    bulk_copies: bool
    expand_cost: float
    slack: float
    rank_in_registers: int = 32


CARDS = {
    (8, 0): Card(108, 166912, False, 331.0, 0.05),
    (8, 6): Card(84, 101376, False, 200.0, 0.05),
    (8, 9): Card(128, 101376, False, 330.0, 0.05),
    (9, 0): Card(132, 232448, True, 367.0, 0.04, 64),
    (10, 0): Card(148, 232448, True, 485.0, 0.04),
    (10, 3): Card(148, 232448, True, 485.0, 0.04),
    (12, 0): Card(170, 101376, False, 250.0, 0.05),
}
# On a card with bulk copies a matmul without them (operands that they refuse) reaches half of the library's speed.
POINTER_SLACK = 0.5


def card(capability: tuple[int, int]) -> Card | None:
    """The newest known card that is no newer than `capability`; None below 8.0, which has no bf16."""
    known = [c for c in CARDS if c <= tuple(capability)]
    return CARDS[max(known)] if known else None


def _gemms(chip: Card, descriptors: bool, width: int) -> list[tuple[Gemm, float]]:
    """Candidates with the share of the peak that a full wave of them reaches."""
    if descriptors:
        rank = chip.rank_in_registers
        tall = () if width > 32 else ((Gemm(256, 128, 64, 8, 4, True, chip.sms, 4, rank=rank), 1.0),)
        return [
            (Gemm(128, 256, 64, 8, 4, True, chip.sms, 4, rank=rank), 1.0),
            *tall,
            (Gemm(128, 128, 64, 8, 4, True, chip.sms, 2, rank=rank), 0.9),
        ]
    if chip.shared > 150000:
        wide = () if width > 64 else ((Gemm(128, 256, 32, 8, 4), 1.0),)
        return [*wide, (Gemm(128, 128, 64, 8, 3), 0.9), (Gemm(64, 128, 64, 4, 3), 0.75)]
    return [(Gemm(128, 128, 32, 8, 3), 1.0), (Gemm(64, 128, 32, 4, 3), 0.75)]


def gemm_tile(M: int, N: int, chip: Card, descriptors: bool, width: int, aligned: bool = True) -> Gemm:
    """The candidate with the shortest time in whole waves; of equals the first.

    Operands that are not aligned need a mask and an address per element: larger tiles spill then.
    """

    def waves(candidate: tuple[Gemm, float]) -> float:
        tile, efficiency = candidate
        tiles = -(-M // tile.m) * -(-N // tile.n)
        return -(-tiles // chip.sms) * tile.m * tile.n / efficiency

    if not aligned:
        return Gemm(128, 128, 32, 8, 3)
    return min(_gemms(chip, descriptors, width), key=waves)[0]


def thin_tile(M: int, K: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Thin:
    """Enough programs to fill the card: K is cut where M alone gives too few, but never below four steps."""
    width = pad(r)
    if capability is None:
        return Thin(16, 32, 2, width, 4, 1)
    chip = card(capability)
    if dtype == torch.float32:  # ieee dots hold a whole step of both operands in registers
        m, k = (16 if M <= 16 or width > 64 else 32), (32 if width <= 32 else 16)
    else:
        m, k = (16 if M <= 16 else 64 if width <= 64 else 32), (128 if width <= 64 and K % 8 == 0 else 64)
    split = max(1, min(2 * chip.sms // max(1, -(-M // m)), K // (4 * k), 32))
    return Thin(m, k, split, width, stages=3)


def decode_tile(M: int, N: int, K: int, dtype: torch.dtype, chip: Card) -> Decode:
    """W in 64 rows a program and enough slices of K to occupy the card twice."""
    m = pad(M)
    k = 32 if dtype == torch.float32 else 64 if m > 32 or K % 8 else 128
    stages = 4 if chip.shared > 150000 and dtype != torch.float32 else 3
    blocks = -(-N // 64)
    split = max(1, min(2 * chip.sms // blocks, K // (4 * k), 16))
    return Decode(m, 64, k, split, 8 if m > 64 and not chip.bulk_copies else 4, stages)


def choose(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    descriptors: bool = True,
) -> Choice:
    """What computes Y [M, N] from K, by a model of its time. The backward's dX asks with N and K swapped.

    capability: the card's, or None for Triton's interpreter: the same choice as on 9.0, in small tiles, and never
    the library, so that every kernel can be run on a CPU.
    descriptors: whether the operands meet the rules of bulk copies (`gemm.fits_descriptors`).
    """
    chip = CARDS[9, 0] if capability is None else card(capability)
    inline = r <= INLINE_RANK
    few = DECODE_ROWS_FP32 if dtype == torch.float32 and capability is not None else DECODE_ROWS
    if few >= M:
        why = f"M = {M} <= {few}: W is streamed once, " + (
            f"z on the way (r = {r} <= {INLINE_RANK})" if inline else f"s from a pass of its own (r = {r})"
        )
        main = decode_tile(M, N, K, dtype, chip)
        thin = None if inline else thin_tile(M, K, r, dtype, capability)
        if capability is None:
            main = _small(main)
        return Choice(main, thin, None, why)
    thin = thin_tile(M, K, r, dtype, capability)
    bulk = descriptors and chip.bulk_copies and dtype != torch.float32
    if capability is None:
        main = gemm_tile(M, N, chip if descriptors else CARDS[8, 0], descriptors, thin.width)
        return Choice(_small(main), thin, None, "Triton's interpreter: the fused matmul in small tiles")
    expand = Gemm(64, 64, 16, 4, 1)
    if dtype == torch.float32:
        expand = Gemm(
            32, 64, 16, 4, 1, rank=16
        )  # ieee dots multiply outside the tensor cores, all operands in registers
        return Choice(None, thin, expand, "fp32: the library's matmul is the faster one, the low-rank part is added")
    saved = chip.expand_cost / K
    lost = POINTER_SLACK if chip.bulk_copies and not bulk else chip.slack
    compared = f"a pass over Y costs {saved:.1%} at K = {K}, the fused matmul {lost:.0%}"
    if saved <= lost:
        return Choice(None, thin, expand, f"{compared}: the library multiplies")
    return Choice(gemm_tile(M, N, chip, bulk, thin.width, descriptors), thin, None, f"{compared}: fused")


# What `pinned` is made for: rows enough that the thin pass has several blocks, few enough that K is cut for the rest.
PINNED_ROWS = 1024


def pinned(
    N: int, K: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None, descriptors: bool = True
) -> Choice:
    """The one choice for every M, so that a row's sums are cut and ordered alike however many rows there are.

    The thin pass and the fused matmul, since both walk over blocks of rows that know nothing of each other: decode's
    tile grows with M, and the library does what it likes. No tile is the best for one row and for thousands; this one
    leans to few rows, which rollouts have: narrow, to occupy more of the card. Arguments as in `choose`.
    """
    chip = CARDS[9, 0] if capability is None else card(capability)
    thin = thin_tile(PINNED_ROWS, K, r, dtype, capability)
    why = f"batch invariant: one choice for every M at N = {N}, K = {K}"
    if capability is None:
        return Choice(_small(Gemm(128, 128, 64, 8, 4, descriptors, 1)), thin, None, why)
    if dtype == torch.float32:
        return Choice(Gemm(16, 64, 16, 4, 2, rank=16), thin, None, why)
    if descriptors and chip.bulk_copies:
        main = Gemm(128, 128, 64, 8, 4, True, chip.sms, 2, rank=chip.rank_in_registers)
    elif descriptors and chip.shared > 150000:
        main = Gemm(128, 128, 64, 8, 3)
    else:
        main = Gemm(128, 128, 32, 8, 3)
    return Choice(main, thin, None, why)


def core_gradient_tile(M: int, r: int, adapters: int, dtype: torch.dtype, small: bool = False) -> CoreGradient:
    """512 rows a program; with many adapters fewer slices, since each adapter has programs of its own."""
    side = min(pad(r), 32)
    if small:
        return CoreGradient(16, 16, 32, "ieee")
    rows = 512 if adapters <= 64 else max(512, pad(-(-M // 4)))
    return CoreGradient(64, side, rows, "ieee" if side == 16 or dtype == torch.float32 else "tf32x3")


def factor_gradient_tile(M: int, C: int, r: int, small: bool = False) -> FactorGradient:
    """64 columns a program, and enough slices of the rows to fill a card: one choice for all cards."""
    width = pad(r)
    if small:
        return FactorGradient(16, 32, 32, width)
    slices = max(1, min(264 // -(-C // 64), -(-M // 256), 32))
    rows = pad(-(-M // slices), 64)
    return FactorGradient(64, 64, rows, width) if width <= 64 else FactorGradient(32, 64, rows, width, 8)


def _small(tile: Decode | Gemm) -> Decode | Gemm:
    """The same kernel in tiles that an interpreter runs quickly, and that small problems cross the edges of."""
    if isinstance(tile, Decode):
        return Decode(tile.m, 32, 32, 3, 4, 1)
    return Gemm(32, 32, 32, 4, 1, tile.descriptors, 3, 2 if tile.descriptors else 1, 2, tile.rank)
