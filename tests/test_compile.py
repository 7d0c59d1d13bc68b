"""What the compiler makes of every launch that the default can choose, for three architectures, without a GPU.

Operands on the "meta" device go through the product's own launchers, so that what is compiled here is what a
card would be given: the same divisibility, the same descriptors. STACK 0 means that no register spills.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import triton
from lanes import INTERPRETED_AT_IMPORT
from launches import ARCHITECTURES, compiled_for, key, warm

from tinylora.kernels import tiles

pytestmark = pytest.mark.skipif(INTERPRETED_AT_IMPORT, reason="TRITON_INTERPRET is set: nothing can be compiled")


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_every_launch(capability):
    """One test per architecture: the compiling is its price, and it is paid once."""
    workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, len(os.sched_getaffinity(0)))
    if workers > 1:  # the cores share the work through Triton's cache on disk
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(warm, [capability] * workers, range(workers), [workers] * workers))
    launches = compiled_for(capability)
    assert len(launches) > 80
    nothing_spills_and_everything_fits(capability, launches)
    the_long_kernel_keeps_the_hardware_s_pace(capability, launches)
    decode_multiplies_with_weights_as_rows(capability, launches)


def nothing_spills_and_everything_fits(capability, launches):
    limit = tiles.card(capability).shared
    spilled = [(launch.stack, launch.registers, key(launch)) for launch in launches if launch.stack]
    assert not spilled, spilled
    assert max(launch.shared for launch in launches) <= limit


def the_long_kernel_keeps_the_hardware_s_pace(capability, launches):
    """On Hopper and newer: bulk copies in and out. On Hopper: the loop is the bare matmul's, 89 instructions at
    128x256x64 (more where a thread has 256 rows' share), with one group of MMAs in flight across the wait, and no spill
    inside. Triton 3.6 adds up to four instructions of address arithmetic."""
    oldest = 4 if triton.__version__.startswith("3.6") else 0
    long = [x for x in launches if x.name == "gemm_kernel" and not x.options["EXPAND"]]
    bulk = [x for x in long if x.options["DESCRIPTORS"]]
    assert bool(bulk) == (capability >= (9, 0))
    for launch in bulk:
        assert "cp.async.bulk.tensor" in launch.ptx
        if capability[0] == 9:
            opcodes = launch.main_loop
            if any(op.startswith("UTMASTG") for op in opcodes):  # one loop, with the stores: who takes which way
                assert launch.options["FLAT"]  # through it no opcode tells, and a card has measured it
            else:
                rows_of_a_warp = launch.options["BLOCK_M"] // launch.options["num_warps"]
                allowed = 100 if rows_of_a_warp == 32 else 90
                assert len(opcodes) <= allowed + oldest, (len(opcodes), key(launch))
                assert not any(op.startswith("LDG") for op in opcodes)
            assert any(op.startswith("HGMMA") for op in opcodes)
            assert sum(op.startswith("UTMALDG") for op in opcodes) >= 2
            assert not any(op.startswith(("LDL", "STL")) for op in opcodes)
            assert 1 in launch.waits, key(launch)
    for launch in long:
        x = launch.args[0]
        if (
            not launch.options["DESCRIPTORS"]
            and capability[0] == 8
            and x.dtype != torch.float32
            and all(t.stride(0) % 8 == 0 for t in launch.args[:3] if t is not None)  # X's column blocks
        ):
            assert "cp.async.c" in launch.ptx and "mma.sync" in launch.ptx


def decode_multiplies_with_weights_as_rows(capability, launches):
    """On Hopper the decode kernel runs on warpgroup MMAs of 64 rows of W, its loads stay ahead, and few rows of
    X are padded to 16 and not to 64."""
    for launch in launches:
        if launch.name == "decode_kernel" and capability[0] == 9 and launch.args[0].dtype != torch.float32:
            m = launch.options["BLOCK_M"]
            assert f"wgmma.mma_async.sync.aligned.m64n{m}k16" in launch.ptx, key(launch)
            stride_wk = launch.args[21]  # the backward gets W as it lies, and strides that turn it
            if launch.options["EVEN_K"] and stride_wk == 1:
                assert "cp.async.cg" in launch.ptx
                # Rows of X that do not start at whole 16 bytes come by registers, and are waited for.
                assert launch.waits & {1, 2} or launch.args[0].stride(0) % 8, key(launch)
