"""Launch shapes that `python -m bench tune` holds against the default: `of` sizes, `pinned` for batch invariance."""

from dataclasses import replace
from itertools import product

import torch

from tinylora.kernels import tiles

# Columns a program, K step, warps and stages of decode kernels that are worth timing.
DECODE_SHAPES = (
    (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3),
    (128, 64, 4, 6),
)  # fmt: skip


def shared_bytes(tile: tiles.Gemm | tiles.Decode, dtype: torch.dtype) -> int:
    """About how much shared memory a launch takes, from above: its stages, and what the store passes through."""
    if isinstance(tile, tiles.Decode):
        return tiles.staged_bytes(tile, dtype) + dtype.itemsize * tile.stages * tile.k * 16 + 4096
    stored = tile.m * tile.n // tile.subtiles if tile.descriptors else 0
    return tiles.staged_bytes(tile, dtype) + dtype.itemsize * stored + 16384


def of(M: int, N: int, K: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> list[tiles.Choice]:
    """What is worth timing for these sizes and aligned operands, the default first; all of it fits shared memory."""
    first = tiles.default(M, N, K, r, dtype, capability)
    found = [first]
    chip = tiles.CARDS[9, 0] if capability is None else tiles.card(capability)
    usual = tiles.thin_tile(M, K, r, dtype, capability)
    thins = [usual, *(replace(usual, split=s) for s in (usual.split // 2, usual.split * 2) if 0 < s <= K // usual.k)]
    if M <= tiles.DECODE_ROWS:
        shapes = DECODE_SHAPES if dtype != torch.float32 else [(n, k, 4, 3) for n in (32, 64) for k in (16, 32)]
        for (n, k, warps, stages), split in product(shapes, (1, 2, 3, 4, 5, 6, 8, 12)):
            programs = -(-N // n) * split
            too_thin = split > 1 and (split > K // (2 * k) or programs > 6 * chip.sms)
            spills = tiles.pad(M) * n > 2048 * warps
            if too_thin or spills or programs < chip.sms // 4:
                continue
            registers = tiles.ALL_REGISTERS if dtype == torch.float32 else None
            tile = tiles.Decode(tiles.pad(M), n, k, split, warps, stages, registers, chip.pdl)
            found.append(tiles.Choice(tile, None if r <= tiles.INLINE_RANK else usual, None))
            if M > 16 and r <= tiles.INLINE_RANK and chip.pdl and dtype != torch.float32:
                found.append(tiles.Choice(tile, tiles.thin_beside(M, K, r, chip), None))
    if dtype != torch.float32:
        found += [tiles.Choice(tile, thin, None) for tile, thin in _wide_tiles(M, K, r, chip, usual)]
    if capability is None:
        return [first, replace(first, thin=thins[-1])]  # a dry run on a CPU tries two
    wide = dtype == torch.float32
    expand = tiles.default(8192, N, K, r, dtype, capability).expand if wide else tiles.Gemm(64, 64, 16, 4, 1)
    expand = replace(expand, pdl=chip.pdl)
    found += [tiles.Choice(None, replace(thin, pdl=chip.pdl), expand) for thin in thins]
    fits = [c for c in found if c.main is None or shared_bytes(c.main, dtype) <= chip.shared]
    return list(dict.fromkeys(fits))


def pinned(N: int, K: int, r: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> list[tiles.Choice]:
    """The same for `pinned`: fused tiles, and splits of K that no M changes; the default first."""
    first = tiles.pinned_default(N, K, r, dtype, capability)
    if capability is None or dtype == torch.float32:
        return [first]
    chip = tiles.card(capability)
    usual = tiles.thin_tile(tiles.PINNED_ROWS, K, r, dtype, capability)
    found = [first, *(tiles.Choice(*both, None) for both in _wide_tiles(tiles.PINNED_ROWS, K, r, chip, usual))]
    fits = [c for c in found if shared_bytes(c.main, dtype) <= chip.shared]
    return list(dict.fromkeys(fits))


def _wide_tiles(M: int, K: int, r: int, chip: tiles.Card, usual: tiles.Thin) -> list[tuple[tiles.Gemm, tiles.Thin]]:
    """Tiles of the fused matmul, each with its thin pass: those of the default in other orders and depths, and smaller
    ones for few rows."""
    if not chip.bulk_copies:
        known = [tile for tile, _ in tiles.gemms(chip, False, usual.width)]
        return [(replace(tile, group=group), usual) for tile in known for group in (8, 4, 16)]
    beside = tiles.thin_beside(M, K, r, chip)
    wider = replace(beside, k=128, stages=2) if K % 128 == 0 else beside
    before = replace(usual, pdl=True)
    big, tall, square = ((128, 256), (256, 128), (128, 128))
    found = [(tiles.bulk_tile(*shape, chip), beside) for shape in (big, tall, square)]
    found += [(tiles.bulk_tile(*shape, chip, subtiles=4), wider) for shape in (big, tall)]
    found += [(tiles.bulk_tile(*big, chip, group=group), beside) for group in (4, 16)]
    found += [(tiles.bulk_tile(*shape, chip, stages=4, subtiles=4), before) for shape in (big, tall)]
    found.append((tiles.bulk_tile(*square, chip, warps=4, programs=2 * chip.sms, subtiles=4), before))
    for m, n, warps in ((64, 128, 4), (64, 256, 8), (128, 64, 4)):
        found += [(tiles.bulk_tile(m, n, chip, warps=warps, stages=4, subtiles=2), thin) for thin in (beside, before)]
    return found
