"""Every launch that the default can choose, for the compiler lane (test_compile.py)."""

import torch
from lanes import Launch, compiler
from problems import NAMES

from tinylora.kernels import tiles
from tinylora.ops import fused

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16

ARCHITECTURES = [(8, 0), (9, 0), (10, 0)]

# M, N, K, r, and what differs from bf16 with a dense core. One line, one regime.
ALL = {"need": ("x", "core", "down", "up")}
CASES = [
    (8192, 3584, 3584, 2, ALL),  # the fused matmul with [rounded | remainder] in s
    (8192, 3584, 3584, 16, {"core": "none", "factors": f32, **ALL}),  # LoRA with fp32 factors
    (8192, 3584, 3584, 64, {"core": "diagonal", "factors": f32, **ALL}),  # and scaled
    (8192, 3584, 3584, 128, {"core": "diagonal", **ALL}),
    (8192, 3584, 3584, 16, {"core": "diagonal", **ALL}),
    (8192, 3584, 3584, 32, {"core": "diagonal", "factors": f32, **ALL}),
    (16, 3584, 3584, 8, {"core": "diagonal", "factors": f32}),
    (8192, 3584, 3584, 64, {"need": ("x", "core")}),  # the widest rank that waits in registers
    (8192, 3584, 3584, 128, ALL),  # ranks in several dots
    (2048, 512, 3584, 2, {"u": 13, "need": ("x", "core")}),  # fewer tiles than programs; C is mixed inside
    (1000, 3584, 2048, 2, {"core": "rows", "need": ("x", "core")}),
    (8192, 3584, 18944, 2, {}),  # the library multiplies, then one pass over Y
    (8192, 3584, 3584, 2, {"dtype": f16}),
    (512, 3580, 3580, 2, {}),  # rows of 7160 bytes: no bulk copies
    (1024, 512, 512, 2, {"x_stride": 517}),  # the fused matmul through pointers, K small
    (8192, 3584, 3584, 2, {"dtype": f32, **ALL}),
    (8192, 4608, 3584, 6, {"parts": (3584, 512, 512)}),  # siblings: dX from three gradients side by side
    (8192, 4608, 3584, 6, {"u": 39, "parts": (3584, 512, 512)}),  # each with a v of its own
    (8192, 37888, 3584, 4, {"parts": (18944, 18944)}),  # the library multiplies each, one thin pass over both
    (1000, 3000, 512, 6, {"parts": (1500, 1500)}),  # no whole steps of K
    (512, 3580, 3580, 6, {"parts": (3000, 290, 290)}),  # through pointers
    (1, 3584, 3584, 2, {}),  # decode, inline
    (1, 18944, 3584, 2, {}),  # decode without a split of K
    (16, 3584, 3584, 8, {"core": "rows", "u": 13, "factors": f32}),
    (16, 4608, 3584, 6, {"u": 39, "parts": (3584, 512, 512)}),
    (16, 37888, 3584, 4, {"core": "rows", "u": 26, "parts": (18944, 18944)}),
    (64, 3584, 3584, 2, {}),
    (128, 3584, 3584, 2, {}),
    (16, 3584, 3584, 64, {}),  # decode in two launches
    (5, 77, 72, 2, ALL),  # nothing is divisible
    (1, 3584, 3584, 2, {"added": True}),  # to what bitsandbytes has multiplied
    (16, 3584, 3584, 16, {"added": True, "core": "diagonal", "factors": f32}),
    (64, 3584, 18944, 64, {"added": True, "core": "none", "factors": f32}),
    (16, 3584, 3584, 2, {"dtype": f32}),
]
# What `batch_invariant=True` runs, with operands that bulk copies take and refuse.
CASES += [
    (M, N, K, r, {"pin": True, **options})
    for M, N, K, r, options in (
        (16, 3584, 3584, 2, {}),
        (16, 3584, 3584, 64, {"core": "rows"}),
        (16, 512, 3584, 128, {"core": "none", "factors": f32}),
        (16, 3580, 3580, 2, {}),
        (16, 3581, 3583, 128, {}),
        (16, 3584, 3584, 2, {"dtype": f32}),
        (16, 3583, 3581, 128, {"dtype": f32}),
    )
]
# What torch.set_float32_matmul_precision("high") makes of the fp32 cases.
TF32 = [(M, 3584, 3584, 2, {"dtype": f32, "pin": pin}) for M, pin in ((16, False), (8192, False), (16, True))]
SWEEP = [
    (M, N, K, r, {"dtype": dtype, "x_stride": x_stride, "need": ()})
    for M in (1, 17, 33, 65, 129, 200, 512, 1000, 2048, 8192, 100000)
    for N, K in ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944), (4608, 3584), (256, 1536), (64, 64))
    for r in (2, 9, 32, 64, 128)
    for dtype in (bf16, f32)
    for x_stride in (None, K + 1)
]


def covering(capability) -> list[tuple]:
    """CASES, and from SWEEP whatever makes the default choose a tile that CASES do not."""

    def tiles_of(M, N, K, r, options):
        dtype = options.get("dtype", bf16)
        bulk = not options.get("x_stride") and N % 8 == K % 8 == 0
        for n, k in ((N, K), (K, N))[: 1 + bool(options.get("need", True))]:  # forward, backward
            if options.get("pin"):
                choice = tiles.pinned(n, k, r, dtype, capability, bulk)
            else:
                choice = tiles.choose(M, n, k, r, dtype, capability, bulk)
            for tile in (choice.main, choice.thin, choice.expand):
                if tile is not None:
                    split = {"split": tile.split > 1} if hasattr(tile, "split") else {}
                    yield type(tile).__name__, tuple((vars(tile) | split | {"programs": 0}).items())

    seen, cases = {t for case in CASES for t in tiles_of(*case)}, list(CASES)
    for case in SWEEP:
        new = set(tiles_of(*case)) - seen
        if new:
            cases.append(case)
            seen |= new
    return cases


def run(
    M, N, K, r, dtype=bf16, factors=None, core="dense", u=0, adapters=3, x_stride=None, need=("x",), pin=False,
    parts=(), added=False,
):  # fmt: skip
    """Forward and backward of one layer on the meta device; parts: of siblings, whose gradients come side by side;
    added: the low-rank part alone, to a Y that is there."""
    factors = factors or dtype

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    one = (u,) if u else (r,) if core == "diagonal" else (r, r)
    c = None if core == "none" else empty(*((adapters, *one) if core == "rows" else one), dtype=f32)
    ids = empty(M, dtype=torch.int64) if core == "rows" else None
    groups = len(parts)
    blocks = (groups, u // groups, r // groups, r // groups) if groups else (u, r, r)
    basis = empty(*blocks, dtype=f32) if u else None
    x = empty(M, x_stride or K)[:, :K]
    weight, down, up, bias = empty(N, K), empty(r, K, dtype=factors), empty(N, r, dtype=factors), empty(N)
    if added:
        fused.add_low_rank(empty(M, N), x, down, c, up, ids, basis)
        return
    y, z = fused.forward(x, weight, down, c, up, bias, ids, basis, pin=pin)
    if parts:
        dys = [empty(M, n) for n in parts]
        fused.backward_of_parts(dys, z, weight, down, c, up, ids, basis, True, c is not None)
        return
    need = tuple(n in need and (n != "core" or c is not None) for n in NAMES)
    if any(need):
        fused.backward(torch.empty_like(y), x, z, weight, down, c, up, ids, basis, need, pin=pin)


def key(launch: Launch) -> tuple:
    """A launch up to its grid."""
    return launch.name, tuple(sorted((k, str(v)) for k, v in launch.options.items()))


def config(capability, case) -> list[Launch]:
    *sizes, options = case
    with compiler(capability) as launches:
        run(*sizes, **options)
    return launches


def warm(capability: tuple[int, int], part: int, parts: int) -> None:
    """Compile every parts-th case into Triton's cache on disk: one process per core does this."""
    for precision, cases in (("highest", covering(capability)), ("high", TF32)):
        torch.set_float32_matmul_precision(precision)
        for case in cases[part::parts]:
            config(capability, case)


def compiled_for(capability: tuple[int, int]) -> list[Launch]:
    """Every distinct launch, compiled."""
    launches = {}
    for precision, cases in (("highest", covering(capability)), ("high", TF32)):
        torch.set_float32_matmul_precision(precision)
        for case in cases:
            for launch in config(capability, case):
                launches.setdefault(id(launch.compiled), launch)
    torch.set_float32_matmul_precision("highest")
    return list(launches.values())
