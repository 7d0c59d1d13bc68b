"""What runs, as a pure function of sizes, dtype and card; and which operands the kernels take at all."""

import pytest
import torch

from tinylora.kernels import tiles
from tinylora.ops import dispatch
from tinylora.ops.dispatch import KERNELS, TORCH, route

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
H200, A100, B200 = (9, 0), (8, 0), (10, 0)


def kind(choice: tiles.Choice) -> str:
    return {tiles.Decode: "decode", tiles.Gemm: "fused", type(None): "library"}[type(choice.main)]


@pytest.mark.parametrize(
    "M, N, K, r, dtype, capability, want",
    [
        (1, 3584, 3584, 2, bf16, H200, "decode"),
        (128, 3584, 18944, 2, bf16, A100, "decode"),
        (64, 3000, 18944, 2, bf16, H200, "decode"),
        (64, 20000, 3584, 2, bf16, H200, "decode"),  # beside the thin pass
        (16, 20000, 3584, 2, bf16, H200, "decode"),
        (128, 3584, 18944, 2, bf16, H200, "library"),  # measured: 48 us and 70
        (257, 72, 104, 2, bf16, H200, "fused"),  # short sums: a pass over Y costs more than they do
        (512, 18944, 3584, 2, bf16, H200, "library"),  # measured: its tiles fill whole waves, ours do not
        (1024, 3584, 3584, 2, bf16, H200, "fused"),
        (8192, 18944, 3584, 64, f16, H200, "fused"),
        (8192, 3584, 18944, 2, bf16, H200, "fused"),  # a pass over Y costs 1.9 %, the fused matmul 1 %
        (8192, 3584, 80000, 2, bf16, H200, "library"),
        (8192, 3584, 3584, 2, f32, H200, "library"),
        (16, 3584, 3584, 2, f32, H200, "decode"),
        (8192, 3584, 3584, 2, bf16, A100, "fused"),
        (8192, 3584, 3584, 2, bf16, B200, "fused"),
        (8192, 3584, 18944, 2, bf16, B200, "library"),
        (8192, 3584, 3584, 2, bf16, (8, 6), "fused"),
        (8192, 3584, 3584, 2, bf16, (12, 0), "fused"),
        (130, 72, 104, 2, f32, None, "fused"),  # the interpreter
    ],
)
def test_the_regimes(M, N, K, r, dtype, capability, want):
    choice = tiles.choose(M, N, K, r, dtype, capability)
    assert kind(choice) == want, choice
    assert choice == tiles.choose(M, N, K, r, dtype, capability)
    beside = capability == H200 and 16 < M <= 64 and choice.main and choice.main.split == 1
    assert (choice.thin is None) == (want == "decode" and r <= 8 and not beside)
    assert (choice.expand is not None) == (want == "library")


@pytest.mark.parametrize("M", [32, 64])
@pytest.mark.parametrize("N", [14336, 18944, 28672, 37888, 151936])
def test_beside_the_thin_pass_all_of_decodes_programs_fit_or_are_wide(M, N):
    choice = tiles.default(M, N, 3584, 2, bf16, H200)
    main, thin = choice.main, choice.thin
    at_once = 132 * (tiles.CARDS[H200].shared // tiles.staged_bytes(main, bf16))
    assert thin is None or -(-N // main.n) <= at_once or main.n == 128
    assert (thin is None) == (M == 32 and N > 30000)


def test_on_hopper_the_thin_pass_fits_beside_the_fused_matmul():
    """One program of each on a multiprocessor: no more programs than there are, and room for both."""
    for M in (1024, 2048, 8192):
        for K in (1536, 3584, 18944):
            choice = tiles.default(M, 3584, K, 2, bf16, H200)
            thin, main = choice.thin, choice.main
            assert main.pdl and main.flat and thin.pdl
            assert -(-M // thin.m) * thin.split <= 132
            stages = bf16.itemsize * thin.stages * thin.k * (thin.m + thin.width)
            assert stages + bf16.itemsize * (
                main.stages * main.k * (main.m + main.n) + main.m * main.n // main.subtiles
            ) < (228 << 10)
    choice = tiles.default(8192, 3584, 3584, 2, bf16, B200)
    assert choice.main.pdl and not choice.main.flat, "Triton 3.6 does not compile the flat loop for 10.0"
    assert not tiles.default(8192, 3584, 3584, 2, bf16, A100).thin.pdl


def test_bulk_copies_only_where_card_and_operands_allow_them():
    sizes = (8192, 3584, 3584, 2, bf16)
    assert tiles.choose(*sizes, H200).main.descriptors
    assert not tiles.choose(*sizes, A100).main.descriptors
    assert not tiles.choose(*sizes, (12, 0)).main.descriptors  # 99 KB of shared memory
    assert kind(tiles.choose(*sizes, H200, descriptors=False)) == "library"
    assert not tiles.choose(8192, 512, 512, 2, bf16, H200, descriptors=False).main.descriptors


def test_decode_fills_the_card_and_never_cuts_k_below_four_steps():
    for N, K in ((3584, 3584), (512, 3584), (18944, 3584), (64, 128), (8, 8)):
        tile = tiles.default(1, N, K, 2, bf16, H200).main
        programs = -(-N // tile.n) * tile.split
        assert tile.split == 1 or (K // tile.split >= 4 * tile.k and programs <= 2 * 132)
    assert tiles.default(1, 3584, 3584, 2, bf16, H200).main.split == 4
    assert tiles.default(1, 18944, 3584, 2, bf16, H200).main.split == 1


def test_an_unknown_card_is_taken_for_the_newest_known_before_it():
    assert tiles.card((9, 1)) is tiles.card((9, 0))


def test_padded_ranks_and_where_s_holds_its_remainder():
    assert [tiles.pad(r) for r in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
    assert [tiles.period(bf16, r) for r in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 32]
    assert tiles.period(f32, 2) == 16


COVERED = {
    "device": "cuda",
    "dtype": bf16,
    "factors": (bf16,),
    "r": 2,
    "capability": (9, 0),
    "interpret": False,
    "triton": (3, 6),
}


@pytest.mark.parametrize(
    "changes, path, why",
    [
        ({}, KERNELS, "compute capability 9.0"),
        ({"dtype": f64}, TORCH, "an operand is torch.float64: the kernels take"),
        ({"factors": (bf16, f64)}, TORCH, "an operand is torch.float64"),
        ({"dtype": f32, "factors": (bf16, f32)}, KERNELS, "compute capability"),
        ({"r": 129}, TORCH, "r = 129: the kernels take r <= 128"),
        ({"capability": (7, 5)}, TORCH, "compute capability (7, 5): the kernels need (8, 0) or newer"),
        ({"capability": None}, TORCH, "compute capability None"),
        ({"device": "cpu"}, TORCH, "tensors are on cpu: the kernels run on NVIDIA GPUs"),
        ({"device": "cpu", "interpret": True}, KERNELS, "TRITON_INTERPRET=1: Triton's interpreter runs"),
        ({"interpret": True}, TORCH, "TRITON_INTERPRET=1 and tensors on cuda"),
        ({"triton": None}, TORCH, "Triton is not installed"),
        ({"triton": (3, 9)}, KERNELS, "compute capability"),
        ({"triton": (3, 5)}, TORCH, "Triton 3.5 is installed: the kernels are proven with 3.6 to 3.9"),
        ({"triton": (3, 10)}, TORCH, "Triton 3.10 is installed"),
    ],
)
def test_the_path_and_its_reason(changes, path, why):
    got, reason = route(**(COVERED | changes))
    assert got == path and reason.startswith(why), reason


def test_the_installed_triton_is_found():
    triton = pytest.importorskip("triton")
    assert dispatch.triton_version() == tuple(int(n) for n in triton.__version__.split(".")[:2])


def test_the_two_rank_limits_agree():
    assert dispatch.MAX_RANK == tiles.MAX_RANK


@pytest.mark.parametrize("value, on", [("1", True), ("true", True), ("0", False), ("", False)])
def test_interpreting_follows_the_environment(value, on, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert dispatch.interpreting() == on
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not dispatch.interpreting()
