"""The tables of measured launch shapes in kernels/tables: data in git, held to the rows beside them and compiled."""

import json
from pathlib import Path

import pytest
import torch

from bench import candidates, tune
from bench.tune import Cell, Row, Rows
from tinylora.kernels import tiles

lanes = pytest.importorskip("lanes", reason="needs Triton")
needs_compiler = pytest.mark.skipif(
    lanes.INTERPRETED_AT_IMPORT, reason="TRITON_INTERPRET is set: nothing can be compiled"
)

bf16 = torch.bfloat16
H200 = (9, 0)


def check(path: Path) -> None:
    """AssertionError unless every entry is what its rows say, is no slower there than the default, and compiles for
    the card without stack and within its shared memory."""
    written = json.loads(path.read_text())
    capability = (int(path.stem[3:-1]), int(path.stem[-1]))
    measured = tune.read(path.parent / written["rows"])
    assert written["entries"] == tune.entries(measured), "the entries are not what the rows beside them give"
    for entry in written["entries"]:
        assert entry["ms"] < entry["default_ms"], entry
    entries = tiles.read_table(path)
    assert len(entries) == len(written["entries"]), "an entry stands there twice"
    for key, choice in entries.items():
        fits(key, choice)
        compiles(key, choice, capability)


def fits(key, choice):
    """Whether the kernels in it can run at every M that the entry serves."""
    _, _, rank, _, _, M = key
    if M == tiles.ANY_M:
        assert isinstance(choice.main, tiles.Gemm) and choice.thin and not choice.expand, (key, "pinned: fused alone")
    elif isinstance(choice.main, tiles.Decode):
        assert choice.main.m >= M and (choice.thin or rank <= tiles.INLINE_RANK), (key, "decode: too few rows")
    else:
        assert choice.thin and bool(choice.expand) == (choice.main is None), (key, "fused, or library and expand")


def compiles(key, choice, capability):
    from tinylora.ops import fused

    N, K, r, dtype, transposed, M = key

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    w, down, up = empty(N, K), empty(r, K), empty(N, r)
    if transposed:
        w, down, up = empty(K, N).T, empty(K, r).T, empty(r, N).T
    with lanes.compiler(capability) as launches:
        fused.forward(empty(M or 64, K), w, down, empty(r, r, dtype=torch.float32), up, None, None, None, choice)
    for launch in launches:
        assert launch.stack == 0, (key, launch.name, launch.stack)
        assert launch.shared <= tiles.card(capability).shared, (key, launch.name, launch.shared)


@needs_compiler
def test_the_tables_in_git():
    for path in sorted(tiles.TABLES.glob("*.json")):
        check(path)


def made_up(folder: Path) -> Path:
    """A table as `bench tune` would write it, from times that nobody measured."""
    file = Rows(folder / "sm_90.csv", torch.device("cpu"))

    def cell(which: Cell, choices, times):
        file.add([
            Row(**vars(which), candidate=i, of=len(times), choice=json.dumps(tiles.to_json(choice)), p50_ms=ms)
            for i, (choice, ms) in enumerate(zip(choices, times, strict=False))
        ])  # fmt: skip

    few = candidates.of(16, 512, 3584, 2, bf16, H200)
    cell(Cell(512, 3584, "bf16", 2, "forward", 16), few, (1.0, 0.8, 0.9))
    cell(
        Cell(512, 3584, "bf16", 2, "backward", 16), few, (1.0, 0.995, 1.2)
    )  # within what a second run would not repeat
    many = candidates.of(2048, 3584, 512, 16, bf16, H200)
    cell(Cell(3584, 512, "bf16", 16, "backward", 2048), many, (1.0, None, 0.7))
    fixed = candidates.pinned(512, 3584, 2, bf16, H200)
    for M, times in zip(
        tune.PINNED_AT, ((1.0, 0.5, 0.7), (1.0, 0.5, 0.8), (1.0, 3.0, 0.9), (1.0, 3.0, 0.9)), strict=True
    ):
        cell(Cell(512, 3584, "bf16", 2, "forward", M, True), fixed, times)
    cell(Cell(3584, 512, "bf16", 2, "forward", 16, True), fixed, (1.0, 0.5, 0.7))  # and at no other M: no entry
    tune.write_table(folder / "sm_90.json", file)
    return folder / "sm_90.json"


def read_anew():
    for function in (tiles.table, tiles.choose, tiles.pinned):
        function.cache_clear()


@needs_compiler
def test_a_good_table_passes_and_is_used(tmp_path, monkeypatch):
    path = made_up(tmp_path)
    check(path)
    entries = [(e["N"], e["M"], e["transposed"], e["ms"]) for e in json.loads(path.read_text())["entries"]]
    assert entries == [
        (512, 16, False, 0.8),
        (3584, 2048, True, 0.7),
        (512, 0, False, round((0.7 * 0.8 * 0.9 * 0.9) ** 0.25, 6)),
    ]

    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    read_anew()
    sizes = (512, 3584, 2, bf16, H200)
    try:
        assert tiles.choose(9, *sizes).main == candidates.of(16, *sizes)[1].main
        backward = tiles.choose(1025, 3584, 512, 12, bf16, H200, transposed=True)
        assert backward in tiles.read_table(path).values() and backward.thin.width == 16
        assert tiles.pinned(*sizes) == candidates.pinned(*sizes)[2]
        unlisted = [
            (tiles.choose(17, *sizes), tiles.default(17, *sizes)),  # another bucket
            (tiles.choose(9, *sizes, transposed=True), tiles.default(9, *sizes)),  # the other direction
            (tiles.choose(9, *sizes, descriptors=False), tiles.default(9, *sizes, descriptors=False)),
            (tiles.choose(9, 512, 3584, 9, bf16, H200), tiles.default(9, 512, 3584, 9, bf16, H200)),  # another rank
            (tiles.choose(9, 512, 3584, 2, bf16, (8, 0)), tiles.default(9, 512, 3584, 2, bf16, (8, 0))),
            (tiles.pinned(*sizes, transposed=True), tiles.pinned_default(*sizes)),
        ]
        assert all(chosen == default for chosen, default in unlisted)
    finally:
        read_anew()


@needs_compiler
@pytest.mark.parametrize("M", [1, 16, 2048])
def test_the_operator_asks_the_table_at_any_number_of_rows(M, monkeypatch):
    """A table holds entries for operands that bulk copies take, decode's too: the operator must say that its are."""
    from tinylora.ops import fused

    choose, asked = tiles.choose, []
    monkeypatch.setattr(tiles, "choose", lambda *sizes: asked.append(sizes) or choose(*sizes))

    def empty(*shape):
        return torch.empty(*shape, dtype=bf16, device="meta")

    with lanes.compiler(H200, only_count=True):
        fused.forward(empty(M, 3584), empty(512, 3584), empty(2, 3584), None, empty(512, 2), None, None, None)
    assert asked == [(M, 512, 3584, 2, bf16, H200, True, False, 1)]


def change(path, edit):
    """Edit the first entry of a table and, to keep them in agreement, its rows."""
    written = json.loads(path.read_text())
    entry = written["entries"][0]
    before = json.dumps(entry["choice"])
    edit(entry)
    path.write_text(json.dumps(written))
    rows = path.with_suffix(".csv")
    rows.write_text(rows.read_text().replace(before.replace('"', '""'), json.dumps(entry["choice"]).replace('"', '""')))


@needs_compiler
@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda e: e.update(ms=1.5), "not what the rows"),
        (lambda e: e["choice"]["main"].update(stages=40), "smem|shared|OutOfResources|resource"),
        (lambda e: e["choice"]["main"].update(m=8), "decode: too few rows"),
        (lambda e: e["choice"]["main"].update(n=256, k=256, m=128, warps=4, stages=1), "decode_kernel"),
    ],
    ids=["slower", "too large", "too few rows", "spills"],
)
def test_a_bad_table_fails(edit, message, tmp_path):
    path = made_up(tmp_path)
    change(path, edit)
    with pytest.raises(Exception, match=message):
        check(path)


def test_rows_that_are_missing_or_cut_short_fail(tmp_path):
    path = made_up(tmp_path)
    rows = path.with_suffix(".csv")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:3]))  # killed in its first cell
    assert tune.read(rows) == []
    with pytest.raises(AssertionError, match="not what the rows"):
        check(path)


def test_candidates_fit_and_are_all_different():
    for capability in ((8, 0), (8, 6), H200, (10, 0)):
        for M in (16, 128, 8192):
            for r in (2, 64):
                found = candidates.of(M, 3584, 3584, r, bf16, capability)
                assert found[0] == tiles.default(M, 3584, 3584, r, bf16, capability)
                assert 5 < len(found) < 150 and len(set(found)) == len(found)
                again = [tiles.from_json(tiles.to_json(c)) for c in found]
                assert again == found
        fixed = candidates.pinned(3584, 3584, 2, bf16, capability)
        assert fixed[0] == tiles.pinned_default(3584, 3584, 2, bf16, capability) and len(fixed) > 3


def test_a_dry_run_goes_through_every_step_and_resumes(tmp_path, monkeypatch, poison_empty):
    """In the interpreter: a candidate that computes wrongly gets no time and never reaches the table."""
    of = candidates.of

    def one_wrong(M, *sizes):
        first, second = of(M, *sizes)
        broken = tiles.replace(first, main=tiles.replace(second.main, split=0) if M <= 128 else first.main, thin=None)
        return [first, second, broken] if M <= 128 else [first, second]

    monkeypatch.setattr(candidates, "of", one_wrong)
    monkeypatch.setattr("bench.timing.MIN_ROUNDS", 1)
    options = {"device": torch.device("cpu"), "models": [], "dtypes": [], "ranks": [], "buckets": None, "seconds": 0.0}
    with lanes.interpreter():
        assert tune.run(tmp_path, minutes=0, dry=True, **options) == 4
        assert json.loads((tmp_path / "dry_run.json").read_text())["entries"] == []
        assert tune.run(tmp_path, minutes=9, dry=True, **options) == 0
        rows = tmp_path / "dry_run.csv"
        whole = rows.read_text()
        rows.write_text(whole[: whole.rindex("\n", 0, -1) - 20])  # killed while it wrote the last cell
        assert tune.run(tmp_path, minutes=9, dry=True, **options) == 0
    measured = tune.read(rows)
    assert [row.of for row in measured] == [3, 3, 3, 2, 2, 1, 3, 3, 3]
    assert [bool(row.note) for row in measured] == [False, False, True, *[False] * 5, True]
    assert all((row.p50_ms is None) == bool(row.note) for row in measured)
    assert all(row.choice in [m.choice for m in measured if m.p50_ms] for row in measured if not row.note)
    tiles.read_table(tmp_path / "dry_run.json")


def test_cells_are_the_distinct_shapes_in_both_directions():
    cells = tune.cells(["Qwen2.5-0.5B", "Qwen2.5-0.5B"], ["bf16"], [2], [16, 8192])
    assert len(set(cells)) == len(cells) == 2 * 6 * 2 + 4 * 4 * 2  # four shapes, and two groups of siblings
    assert Cell(1152, 896, "bf16", 2, "forward", 16) in cells
    assert Cell(896, 1152, "bf16", 2, "backward", 16, False, "896+128+128") in cells
    assert Cell(128, 896, "bf16", 2, "forward", 16) in cells and Cell(896, 128, "bf16", 2, "backward", 16) in cells


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    from bench.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["tune", "--dry-run"]) == 2
    assert "give --out" in capsys.readouterr().err


def test_a_tie_goes_to_fewer_launches_and_a_time_with_a_note_does_not_count():
    thin = tiles.thin_beside(16, 3584, 2, tiles.CARDS[H200])
    slow, one, noted = (tiles.Choice(tiles.Decode(16, 64, k, 1), None, None) for k in (32, 64, 128))
    two = tiles.Choice(tiles.Decode(16, 64, 64, 1), thin, None)

    def best(*timed):
        rows = [
            Row(
                4096, 4096, "bf16", 2, tune.FORWARD, 16, False, "", i, len(timed),
                json.dumps(tiles.to_json(choice)), p50_ms=ms, note=note,
            )
            for i, (choice, ms, note) in enumerate(timed)
        ]  # fmt: skip
        return [tiles.from_json(entry["choice"]) for entry in tune.entries(rows)]

    assert best((slow, 2.0, ""), (two, 1.0, ""), (one, 1.005, "")) == [one]
    assert best((slow, 2.0, ""), (two, 1.0, ""), (one, 1.02, "")) == [two]
    assert best((slow, 2.0, ""), (two, 1.0, ""), (noted, 0.5, "24 bytes of stack: does not count")) == [two]
