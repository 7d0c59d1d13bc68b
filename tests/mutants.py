"""Break each mask, each index and each term of the kernels once, and see the interpreter lane fail.

    python3 tests/mutants.py [--jobs 2] [--only WORD] [--out FILE]

Every mutant is one replacement in a copy of the checkout; `tests/test_kernels.py` (for the files in
tinylora/ops `tests/test_invariant.py`, too) runs there and must fail. The
last result stands in docs/LOG.md. A mutant that lives names a mask or a term that no test can see.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    what: str
    nth: int = 0  # which occurrence of `old`
    cannot: str = ""  # why no test without a GPU can see it; it runs with --all only


M = Mutant
BLOCKS, GEMM, THIN, DECODE, GRADIENTS = (f"kernels/{n}.py" for n in ("blocks", "gemm", "thin", "decode", "gradients"))
FUSED, MATMUL, INVARIANT = (f"tinylora/ops/{name}.py" for name in ("fused", "matmul", "invariant"))

# The tests that see most mutants of a file: they run first, to save time.
FIRST = {
    BLOCKS: (
        "every_split_of_k_in_decode",
        "an_id_out_of_range_reads_nothing_and_gives_nan",
        "rank_r_arrives_in_y_with_more_bits_than_bf16_has",
        "the_thin_pass_keeps_the_core_in_fp32",
        "no_number_behind_a_diagonal_is_read",
        "siblings_with_a_core_each",
        "more_p_in_a_block_than_are_mixed_at_once",
        "bitwise_repeatable_and_the_counters_return_to_zero",
    ),
    GEMM: (
        "every_way_to_multiply_many_rows",
        "dx_from_gradients_side_by_side",
        "strides_and_what_lies_beside_the_operands",
    ),
    THIN: (
        "dx_from_gradients_side_by_side",
        "the_thin_pass_keeps_the_core_in_fp32",
        "the_thin_pass_reads_no_rank_beyond_r",
        "strides_and_what_lies_beside_the_operands",
    ),
    DECODE: (
        "every_split_of_k_in_decode",
        "strides_and_what_lies_beside_the_operands",
        "nothing_is_written_before_the_launch_before_is_waited_for",
    ),
    GRADIENTS: ("gradients_one_by_one", "strides_and_what_lies_beside_the_operands"),
    FUSED: ("gradients_one_by_one",),
    MATMUL: ("gradients_one_by_one", "the_library_s_y_has_the_dimensions_of_x"),
    INVARIANT: (),
}
# What follows if those see nothing.
BOTH = "tests/test_kernels.py", "tests/test_invariant.py"
ALL = {FUSED: BOTH, MATMUL: BOTH, INVARIANT: BOTH[1:]}

MUTANTS = [
    # blocks.py
    M(BLOCKS, "min(tiles_m - first, GROUP_M)", "GROUP_M", "tile order: the last group's height"),
    M(BLOCKS, "first + tile % height, tile % per_group // height", "first, tile % per_group", "tile order: rows"),
    M(BLOCKS, "acc = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), acc)", "acc = acc", "wide dot: the low half"),
    M(BLOCKS, "mask=rows < M, other=-1", "mask=rows < M, other=0", "ids beyond M", cannot="such rows are never stored"),
    M(BLOCKS, "(own >= 0) & (own < adapters)", "(own >= -1) & (own < adapters)", "rows without an adapter"),
    M(BLOCKS, "(own >= 0) & (own < adapters)", "own >= 0", "ids of no adapter: nothing is read"),
    M(BLOCKS, "(own < -1) | (own >= adapters)", "own < -1", "ids of no adapter: too large"),
    M(BLOCKS, "(own < -1) | (own >= adapters)", "own >= adapters", "ids of no adapter: too small"),
    M(BLOCKS, "tl.load(core + ranks, mask=real, other=0.0)", "tl.load(core + ranks)", "diagonal core: rank mask"),
    M(BLOCKS, "tl.load(core + ranks", "tl.load(core + 0 * ranks", "diagonal core: which rank"),
    M(BLOCKS, "ranks[None, :] == i, z, 0.0", "ranks[None, :] <= i, z, 0.0", "core: which rank"),
    M(BLOCKS, "at = i * R + ranks if TRANSPOSED else ranks * R + i", "at = ranks * R + i", "core: transposed"),
    M(BLOCKS, "at = i * R + ranks if TRANSPOSED else ranks * R + i", "at = i * R + ranks", "core: not transposed"),
    M(BLOCKS, "core + own[:, None] * (R * R)", "core + own[:, None] * R", "core per row: stride"),
    M(BLOCKS, "mask=one, other=0.0", "mask=adapted[:, None], other=0.0", "core per row: rank mask"),
    M(BLOCKS, "tl.load(core + at, mask=(i < R) & (j < R), other=0.0)", "tl.load(core + at)", "core: rank mask"),
    M(BLOCKS, "at = i * R + j if TRANSPOSED else j * R + i", "at = j * R + i", "small core: transposed"),
    M(BLOCKS, "at = i * R + j if TRANSPOSED else j * R + i", "at = i * R + j", "small core: not transposed"),
    M(BLOCKS, "load_basis(basis, a, i[None, :, :], j[None, :, :]", "load_basis(basis, a, j[None, :, :], i[None, :, :]",
      "small P: transposed"),
    M(BLOCKS, "load_basis(basis, a, j[None, :, :], i[None, :, :]", "load_basis(basis, a, i[None, :, :], j[None, :, :]",
      "small P: not transposed"),
    M(BLOCKS, "j = f % P if TRANSPOSED else f // P", "j = f // P", "small cores per row: transposed, rows"),
    M(BLOCKS, "i = f // P if TRANSPOSED else f % P", "i = f % P", "small cores per row: transposed, columns"),
    M(BLOCKS, "load_basis(basis, a[:, None], i, ranks[None, :]", "load_basis(basis, a[:, None], ranks[None, :], i",
      "P of rows, large ranks: transposed"),
    M(BLOCKS, "load_basis(basis, a[:, None], ranks[None, :], i", "load_basis(basis, a[:, None], i, ranks[None, :]",
      "P of rows, large ranks: not transposed"),
    M(BLOCKS, "basis + a * (BLOCK * BLOCK)", "basis + a * BLOCK", "P: which one"),
    M(BLOCKS, "some = (a < U) & (j < R) & (i < R)", "some = (a >= 0) & (j < R) & (i < R)", "P: beyond u"),
    M(BLOCKS, "some = (a < U) & (j < R) & (i < R)", "some = (a < U) & (j < R) & (i >= 0)", "P: columns beyond R"),
    M(BLOCKS, "some = (a < U) & (j < R) & (i < R)", "some = (a < U) & (j >= 0) & (i < R)", "P: rows beyond R"),
    M(BLOCKS, "(a // (U // GROUPS) == j // BLOCK) & (j", "(j", "P: of which block"),
    M(BLOCKS, "& (j // BLOCK == i // BLOCK)", "& (j >= 0)", "P: nothing between blocks"),
    M(BLOCKS, "j = j % BLOCK", "j = j", "P in a block: rows"),
    M(BLOCKS, "i = i % BLOCK", "i = i", "P in a block: columns"),
    M(BLOCKS, "a += (j // (R // GROUPS) * OWN)", "a += (j // (R // GROUPS) * 0)", "v: of which block"),
    M(BLOCKS, "inside = inside & (j < R)[None, :, :]", "inside = inside", "v: beyond the last block"),
    M(BLOCKS, "inside = a < OWN", "inside = a >= 0", "v: beyond the block's"),
    M(BLOCKS, "tl.load(core + a, mask=inside", "tl.load(core + 0 * a, mask=inside", "v: which one"),
    M(BLOCKS, "core + own[:, None] * U + a", "core + own[:, None] + a", "v per row: stride"),
    M(BLOCKS, "core + own[:, None] * U + a", "core + own[:, None] + a", "v per row, large ranks: stride", 1),
    M(BLOCKS, "for first in range(0, OWN, AT_ONCE)", "for first in range(0, AT_ONCE, AT_ONCE)",
      "P: those after the first few"),
    M(BLOCKS, "for first in range(0, U, AT_ONCE)", "for first in range(0, AT_ONCE, AT_ONCE)",
      "P of rows: those after"),
    M(BLOCKS, "for first in range(0, U, 16)", "for first in range(0, 16, 16)", "P of rows, large ranks: those after"),
    M(BLOCKS, "* WIDTH + first + tl", "* WIDTH + tl", "load_s: which ranks"),
    M(BLOCKS, "tl.load(s + at, mask=rows[:, None] < M, other=0.0)", "tl.load(s + at)", "load_s: rows beyond M",
      cannot="such rows are never stored; on a card the read could fault"),
    M(BLOCKS, "(first + tl.arange(0, BLOCK_R)) % PERIOD", "first + tl.arange(0, BLOCK_R)", "U meets both halves of s"),
    M(BLOCKS, "(columns[:, None] < N) & (ranks[None, :] < R)", "columns[:, None] < N", "load_up: rank mask"),
    M(BLOCKS, "(columns[:, None] < N) & (ranks[None, :] < R)", "ranks[None, :] < R", "load_up: columns beyond N",
      cannot="such columns are never stored; on a card the read could fault"),
    M(BLOCKS, "== programs - 1", "== programs", "the last to arrive"),
    M(BLOCKS, "tl.store(counter, 0)", "tl.store(counter, 1)", "the counter returns to zero"),
    M(BLOCKS, "mask & (tl.full(at.shape, first + j, tl.int32) < count)", "mask", "planes: beyond the last"),
    M(BLOCKS, "for first in range(0, count, TOGETHER)", "for first in range(0, TOGETHER, TOGETHER)",
      "planes: those after the first few"),
    # gemm.py
    M(GEMM, "x.load([row, k * BLOCK_K])", "x.load([row, 0])", "bulk copies: x's k"),
    M(GEMM, "w.load([column, at]).T if", "w.load([column, begin]).T if", "bulk copies: w's k"),
    M(GEMM, "else w.load([at, column])", "else w.load([begin, column])", "bulk copies: w's k, transposed"),
    M(GEMM, "at = begin + k * BLOCK_K", "at = k * BLOCK_K", "column blocks of X: where they meet W, bulk copies"),
    M(GEMM, "(begin + k).to(tl.int64)", "k.to(tl.int64)", "column blocks of X: where they meet W, pointers"),
    M(GEMM, "acc, x1, w, row, column, end, M", "acc, x, w, row, column, end, M", "column blocks of X: the second"),
    M(GEMM, "acc, x2, w, row, column, end1, M", "acc, x2, w, row, column, end, M", "column blocks of X: the third's W"),
    M(GEMM, "K - end1, stride_x2m", "K - end, stride_x2m", "column blocks of X: the third's width"),
    M(GEMM, "end1 - end, stride_x1m", "end1 - end, stride_xm", "column blocks of X: the second's row stride"),
    M(GEMM, "for k in range(tl.cdiv(K, BLOCK_K))", "for k in range(K // BLOCK_K)", "bulk copies: the last step of K"),
    M(GEMM, "((row + tl.arange(0, BLOCK_M)) % M)", "(row + tl.arange(0, BLOCK_M))", "pointers: rows wrap",
      cannot="such rows are never stored; on a card the read could fault"),
    M(GEMM, "((column + tl.arange(0, BLOCK_N)) % N)", "(column + tl.arange(0, BLOCK_N))", "pointers: columns wrap",
      cannot="such columns are never stored; on a card the read could fault"),
    M(GEMM, "            m = row + tl", "            m = tl", "bulk copies: S of which rows"),
    M(GEMM, "            n = column + tl", "            n = tl", "bulk copies: U of which columns"),
    M(GEMM, "mask=k[None, :] < K - k_first", "mask=k[None, :] < BLOCK_K", "pointers: x's K mask"),
    M(GEMM, "mask=k[:, None] < K - k_first", "mask=k[:, None] < BLOCK_K", "pointers: w's K mask"),
    M(GEMM, "x_at += BLOCK_K * stride_xk", "x_at += BLOCK_K", "pointers: x's step"),
    M(GEMM, "w_at += BLOCK_K * stride_wk", "w_at += BLOCK_K", "pointers: w's step"),
    M(GEMM, "x + m[:, None] * stride_xm", "x + m[:, None] * K", "pointers: x's row stride"),
    M(GEMM, "w + n[None, :] * stride_wn", "w + n[None, :] * K", "pointers: w's row stride"),
    M(GEMM, "row, column + half, SUBTILES // 2", "row, column, SUBTILES // 2", "column blocks: the right half's place"),
    M(GEMM, "mask=n < N, other=0.0).to(tl.float32)[None, :]", "other=0.0, mask=n < 0).to(tl.float32)[None, :]", "bias"),
    M(GEMM, "tl.load(bias + n, mask=n < N", "tl.load(bias + tl.arange(0, BLOCK_N), mask=n < N", "bias: its columns"),
    M(GEMM, "mask=(m[:, None] < M) & (n[None, :] < N))\n\n\n@triton", "mask=n[None, :] < N)\n\n\n@triton",
      "store: rows beyond M"),
    M(GEMM, "mask=(m[:, None] < M) & (n[None, :] < N))\n\n\n@triton", "mask=m[:, None] < M)\n\n\n@triton",
      "store: columns beyond N"),
    M(GEMM, "acc = tl.dot(a, b.T, acc)  #", "acc = acc  #", "the low-rank dot, rank by rank"),
    M(GEMM, "acc = tl.dot(a, b.T, acc, input_precision=PRECISION)  #", "acc = acc  #", "the low-rank dot, pointers"),
    M(GEMM, "a = load_s(s, m, rank, M", "a = load_s(s, m, 0, M", "ranks one after the other, bulk copies"),
    M(GEMM, "a = load_s(s, m, rank, M", "a = load_s(s, m, 0, M", "ranks one after the other, pointers", 1),
    M(GEMM, "tl.load(y + at, mask=", "0.0 * tl.load(y + at, mask=", "expand: what Y held"),
    # thin.py
    M(THIN, "z + row * R", "z + row * WIDTH", "z: row stride"),
    M(THIN, "inside & (ranks[None, :] < R)", "inside", "z: rank mask"),
    M(THIN, "inside = m[:, None] < M", "inside = m[:, None] >= 0", "rows beyond M"),
    M(THIN, "tl.store(at + PERIOD, low", "tl.store(at + PERIOD, 0.0 * low", "s: the remainder"),
    M(THIN, "inside & (ranks[None, :] < PERIOD)", "inside & (ranks[None, :] < R)", "s: zeros between the halves"),
    M(THIN, "k_first = tl.program_id(1) * k_slice", "k_first = 0", "slices of K: where they start"),
    M(THIN, "min(k_first + k_slice, K)", "K", "slices of K: where they end"),
    M(THIN, "k_first, min(k_last, end), 0,", "k_first, k_last, 0,", "column blocks of X: where the first ends"),
    M(THIN, "max(k_first, end), min(k_last, end1), end,", "k_first, min(k_last, end1), end,", "X's second block: from"),
    M(THIN, "max(k_first, end), min(k_last, end1), end,", "max(k_first, end), k_last, end,", "X's second block: end"),
    M(THIN, "max(k_first, end1), k_last, end1,", "max(k_first, end1), k_last, end,", "X's third block: its columns"),
    M(THIN, "(m % M).to(tl.int64)", "m.to(tl.int64)", "rows wrap",
      cannot="such rows are never stored; on a card the read could fault"),
    M(THIN, "tl.load(x_at, mask=inside[None, :], other=0.0)", "tl.load(x_at)", "x's K mask"),
    M(THIN, "mask=real[None, :] & inside[:, None]", "mask=real[None, :]", "D's K mask"),
    M(THIN, "mask=real[None, :] & inside[:, None]", "mask=inside[:, None]", "D's rank mask"),
    M(THIN, "x_at += BLOCK_K * stride_xk", "x_at += BLOCK_K", "x's step"),
    M(THIN, "d_at += BLOCK_K * stride_dk", "d_at += BLOCK_K", "D's step"),
    M(THIN, "sum_planes(planes, plane,", "sum_planes(planes, 0 * plane,", "planes: which one"),
    M(THIN, "one = (m[:, None] < M) & real[None, :]", "one = m[:, None] < M", "planes: rank mask"),
    M(THIN, "one = (m[:, None] < M) & real[None, :]", "one = real[None, :]", "planes: rows beyond M"),
    # decode.py
    M(DECODE, "rows = m[:, None] < M", "rows = m[:, None] >= 0", "rows beyond M"),
    M(DECODE, "k_first = tl.program_id(1) * k_slice", "k_first = 0", "slices of K: where they start"),
    M(DECODE, "min(k_first + k_slice, K)", "K", "slices of K: where they end"),
    M(DECODE, "tl.load(w_at, mask=inside[None, :], other=0.0,", "tl.load(w_at,", "w's K mask"),
    M(DECODE, "mask=rows & inside[None, :], other=0.0", "mask=rows, other=0.0", "x's K mask"),
    M(DECODE, "(ranks[None, :] < R) & inside[:, None]", "ranks[None, :] < R", "D's K mask"),
    M(DECODE, "(ranks[None, :] < R) & inside[:, None]", "inside[:, None]", "D's rank mask"),
    M(DECODE, "(n % N).to(tl.int64)", "n.to(tl.int64)", "columns wrap",
      cannot="such columns are never stored; on a card the read could fault"),
    M(DECODE, "d_at += BLOCK_K * stride_dk", "d_at += BLOCK_K", "D's step"),
    M(DECODE, "x_at += BLOCK_K * stride_xk", "x_at += BLOCK_K", "x's step"),
    M(DECODE, "w_at += BLOCK_K * stride_wk", "w_at += BLOCK_K", "w's step"),
    M(DECODE, "z_mask = rows & (ranks[None, :] < R)", "z_mask = rows", "z: rank mask"),
    M(DECODE, "acc = dot_wide(u_tile, s_tile.T, acc, PRECISION)", "acc = acc", "the low-rank dot, inline"),
    M(DECODE, "if PDL and INLINE:", "if PDL and INLINE and tl.program_id(0) == 1:", "who waits, inline"),
    M(DECODE, "if PDL and not INLINE:", "if PDL and not INLINE and tl.program_id(1) == 0:", "who waits, beside"),
    M(DECODE, "elif tl.program_id(1) == 0:", "elif tl.program_id(1) >= 0:", "s is added by one slice alone"),
    M(DECODE, "s_tile = load_s(s, m, rank, M", "s_tile = load_s(s, m, 0, M", "ranks one after the other"),
    M(DECODE, "WANT_Z and tile_n == 0", "WANT_Z and tile_n == 1", "who stores z"),
    M(DECODE, "WANT_Z and tile_n == 0", "WANT_Z and tile_n == 1", "who adds z's planes", 1),
    M(DECODE, '"WANT_Z": want_z', '"WANT_Z": False', "whether z is stored"),
    M(DECODE, "z_planes + tl.program_id(1) * M * R", "z_planes", "z's planes: which one is written"),
    M(DECODE, "sum_planes(z_planes, M * R", "sum_planes(z_planes, 0 * R", "z's planes: which one is read"),
    M(DECODE, "planes + tl.program_id(1) * plane", "planes", "planes: which one is written"),
    M(DECODE, "sum_planes(planes, plane,", "sum_planes(planes, 0 * plane,", "planes: which one is read"),
    M(DECODE, "inside = (m[None, :] < M) & (n[:, None] < N)", "inside = n[:, None] < N", "store: rows beyond M"),
    M(DECODE, "inside = (m[None, :] < M) & (n[:, None] < N)", "inside = m[None, :] < M", "store: columns beyond N"),
    M(DECODE, "if HAS_BIAS:", "if False:", "bias, K in slices"),
    M(DECODE, "if HAS_BIAS:", "if False:", "bias, K in one piece", 1),
    # gradients.py
    M(GRADIENTS, "load_basis(basis, a[:, None, None]", "load_basis(basis, 0 * a[:, None, None]", "dv: which P"),
    M(GRADIENTS, "fold(fold(dcore, P).T, P).T", "fold(fold(dcore, P).T, P)", "dv: which side is t"),
    M(GRADIENTS, "for first in range(0, U, AT_ONCE)", "for first in range(0, AT_ONCE, AT_ONCE)",
      "dv: those after the first few"),
    M(GRADIENTS, "adapter.to(tl.int64) * (R * R)", "adapter.to(tl.int64) * R", "dC: which adapter"),
    M(GRADIENTS, "adapter.to(tl.int64) * U + a", "adapter.to(tl.int64) + a", "dv: which adapter"),
    M(GRADIENTS, "own = m < M  # [BLOCK_M]", "own = m >= 0", "dC: rows beyond M"),
    M(GRADIENTS, "mask=own, other=-1) == adapter", "mask=own, other=-1) >= -1", "dC: rows of other adapters"),
    M(GRADIENTS, "own[:, None] & (rank_i[None, :] < R)", "own[:, None]", "dC: t's rank mask",
      cannot="the store's mask and dv's drop what it lets in; on a card the read could fault"),
    M(GRADIENTS, "own[:, None] & (rank_j[None, :] < R)", "own[:, None]", "dC: z's rank mask",
      cannot="the store's mask and dv's drop what it lets in; on a card the read could fault"),
    M(GRADIENTS, "dcore = tl.dot(a.T, b, dcore", "dcore = tl.dot(b.T, a, dcore", "dC: which side is t"),
    M(GRADIENTS, "min(first + slice_rows, M)", "M", "dC: where a slice of rows ends"),
    M(GRADIENTS, "min(first + slice_rows, M)", "M", "dD, dU: where a slice of rows ends", 1),
    M(GRADIENTS, "sum_planes(planes, plane, at, at", "sum_planes(planes, 0 * plane, at, at", "dC: planes"),
    M(GRADIENTS, "sum_planes(planes, plane, at, inside", "sum_planes(planes, 0 * plane, at, inside", "dD, dU: planes"),
    M(GRADIENTS, "mask=(m[:, None] < M) & (ranks[None, :] < R), other", "mask=ranks[None, :] < R, other",
      "dD, dU: rows of z beyond M"),
    M(GRADIENTS, "mask=(m[:, None] < M) & (ranks[None, :] < R), other", "mask=m[:, None] < M, other",
      "dD, dU: z's rank mask", cannot="columns beyond R are never stored; on a card the read could fault"),
    M(GRADIENTS, "mask=(m[:, None] < M) & (c[None, :] < C), other", "mask=c[None, :] < C, other",
      "dD, dU: rows of x beyond M"),
    M(GRADIENTS, "mask=(m[:, None] < M) & (c[None, :] < C), other", "mask=m[:, None] < M, other",
      "dD, dU: columns of x beyond C", cannot="such columns are never stored; on a card the read could fault"),
    M(GRADIENTS, "inside = (c[:, None] < C) & (ranks[None, :] < R)", "inside = c[:, None] < C", "dD, dU: store, ranks"),
    M(GRADIENTS, "inside = (c[:, None] < C) & (ranks[None, :] < R)", "inside = ranks[None, :] < R",
      "dD, dU: store, columns"),
    # fused.py, matmul.py
    M(MATMUL, "use_z is not None and self.thin is None", "use_z is not None and self.thin",
      "dC beside decode, which has no thin pass"),
    M(FUSED, "theirs = Core(values, own_basis, adapter_ids, transposed=True)", "theirs = ours", "backward: Cᵀ"),
    M(FUSED, "factor_gradient(t, theirs, x", "factor_gradient(t, ours, x", "dD: q = t C"),
    M(FUSED, "factor_gradient(z, ours, dy", "factor_gradient(z, theirs, dy", "dU: s = z Cᵀ"),
    M(FUSED, "or 0 in strides", "", "a broadcast gradient",
      cannot="pointers take a stride of 0, and `fits_descriptors` refuses it: the copy is for speed"),
    M(MATMUL, "y.resize_(self.shape) if self.copies else y", "y", "the library's Y in x's dimensions"),
    M(FUSED, "z, s = reduce.run(x, down, core, True)\n    finish", "z, s = reduce.run(x, down, core, True)\n    z",
      "the pass over a Y that is there"),
    M(MATMUL, "tiles.pinned(N, K, self.r", "tiles.choose(self.M, N, K, self.r",
      "batch invariant: one choice for every M"),
    M(FUSED, "down, None, choice, pin, use_z", "down, None, choice, False, use_z", "batch invariant: dX, too"),
    M(MATMUL, "first.stride() != (K, 1) or first.data_ptr() % 16", "False", "batch invariant: rows with strides",
      cannot="the interpreter rounds alike by pointers and by bulk copies"),
    # invariant.py
    M(INVARIANT, "padded(x[rows], ROWS, inner)", "padded(x[rows], count, inner)", "blocks: always as many rows"),
    M(INVARIANT, "if not (lies_aligned(w) and lies_aligned(down)):", "if False:",
      "blocks: rows that start anywhere are copied"),
    M(INVARIANT, "core[..., i, :] if transposed else core[..., i]", "core[..., i]", "core: transposed"),
    M(INVARIANT, "core[..., i, :] if transposed else core[..., i]", "core[..., i, :]", "core: not transposed"),
    M(INVARIANT, "z[:, i : i + 1]", "z[:, :1]", "core: which rank"),
    M(INVARIANT, "masked_fill_((adapter_ids < 0).unsqueeze(-1), 0)", "mul_(1)", "rows without an adapter"),
    M(INVARIANT, "adapter_ids[rows]", "adapter_ids[: count]", "which rows' adapters"),
    M(INVARIANT, "core, up.t(), bias", "core, up.t(), None", "bias"),
]  # fmt: skip


def apply(mutant: Mutant, folder: Path) -> str:
    """The file's text before; raises where the mutant no longer fits the source."""
    path = folder / mutant.file
    text = path.read_text()
    parts = text.split(mutant.old)
    if len(parts) < mutant.nth + 2:
        raise ValueError(f"{mutant.file}: {mutant.old!r} does not occur {mutant.nth + 1} times: {mutant.what}")
    head, tail = parts[: mutant.nth + 1], parts[mutant.nth + 1 :]
    path.write_text(mutant.old.join(head) + mutant.new + mutant.old.join(tail))
    return text


def copy_of_checkout() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tinylora-mutants-"))
    for name in ("kernels", "tinylora", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(mutant: Mutant, folder: Path, timeout: float) -> tuple[bool, str, float]:
    """(killed, by what, seconds)."""
    before = apply(mutant, folder)
    started = time.monotonic()
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    all_tests = ALL.get(mutant.file, ("tests/test_kernels.py",))
    try:
        for which in ([f"tests/test_kernels.py::test_{name}" for name in FIRST[mutant.file]], all_tests):
            if not which:
                continue
            done = subprocess.run(
                [*pytest, *which], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
            )
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            by = failed[0].split("::")[-1].split(" - ")[0] if failed else f"exit code {done.returncode}"
            killed = done.returncode != 0
            if killed:
                break
    except subprocess.TimeoutExpired:
        killed, by = True, f"no end within {timeout:.0f} s"
    finally:
        (folder / mutant.file).write_text(before)
    return killed, by, time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="mutants whose file or description holds this word")
    parser.add_argument("--all", action="store_true", help="run those, too, that no test without a GPU can see")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--out", type=Path, help="write the table here, too")
    options = parser.parse_args()
    mutants = [m for m in MUTANTS if options.only in f"{m.file} {m.what}"]
    folders = [copy_of_checkout() for _ in range(options.jobs)]
    free = list(folders)

    def one(mutant):
        if mutant.cannot and not options.all:
            return False, "", 0.0
        folder = free.pop()
        try:
            return run(mutant, folder, options.timeout)
        finally:
            free.append(folder)

    wrong, lines = 0, []
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            for mutant, (killed, by, seconds) in zip(mutants, pool.map(one, mutants), strict=True):
                verdict = "killed" if killed else "harmless" if mutant.cannot else "LIVES"
                wrong += not killed and not mutant.cannot
                detail = by if killed else mutant.cannot
                lines.append(f"| {mutant.file} | {mutant.what} | {verdict} | {detail} | {seconds:.0f} |")
                print(lines[-1], flush=True)
    finally:
        for folder in folders:
            shutil.rmtree(folder)
    killed = sum("| killed |" in line for line in lines)
    summary = (
        f"{len(mutants)} mutants: {killed} killed, {len(mutants) - killed - wrong} harmless without a GPU, {wrong} LIVE"
    )
    print(summary)
    if options.out:
        table = ["| file | what is broken | | by / why | s |", "|---|---|---|---|---|", *lines]
        options.out.write_text("\n".join([summary, "", *table, ""]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
