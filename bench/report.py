"""What the rows say: tables, the means that the project is held to, a plot, and the two READMEs that show them."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tabulate import tabulate

from bench import block, demo_tables, peft, roofline
from bench import providers as who
from bench.layer import CAPTURED, NF4
from bench.linear import PASSES, R, U
from bench.model import LOST
from bench.rows import Row, Unusable, new_figure, read

HOW = """Every figure is a row in a CSV beside this file, with its commit, device and versions. Where tinylora loses,
the row stays. `python -m bench` measures, `python -m bench table` writes this file."""
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
IN_ALL = """In the last row attention and the head are made batch invariant, too, by the benchmark: transformers' own
attention rounds a token by how many there are. Which operations do stands in the CSV, one by one."""
BARS = {who.PEFT: 0.85, who.BARE: 1.25}  # ours over each, at most, on a CPU
BAR_ROWS = 16  # the bars are about M of at least this


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.geometric_mean(values) if values else math.nan


def _cell(row: Row | None) -> str:
    """A time over the bare layer's, or why there is none."""
    return "" if row is None else row.note or (f"{row.ratio_to_bare:.2f}" if row.ratio_to_bare else "")


def cells(rows: Iterable[Row], op: str = "linear") -> dict[tuple, dict[str, Row]]:
    """The rows of `linear` (or `layer`) by (model, layer, dtype, M, pass, r, u), and in each by provider."""
    found: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.op == op and row.M is not None:
            pass_ = f"{row.pass_}, {row.mode}" if op == "layer" else row.pass_
            found[row.model, row.layer, row.dtype, row.M, pass_, row.r, row.u][row.provider] = row
    return found


def usual(rows: Iterable[Row], op: str = "linear") -> dict[tuple, dict[str, Row]]:
    """The `cells` of rank R and U numbers, which alone may meet in a mean."""
    return {key: cell for key, cell in cells(rows, op).items() if key[5:] == (R, U)}


def _named(model: str, r: int, u: int) -> str:
    return model if (r, u) == (R, U) else f"{model}, r = {r}, u = {u}"


def barred(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """The cells that the bars are about: shapes of Qwen2.5 at M >= 16."""
    return {key: cell for key, cell in usual(rows).items() if key[0].startswith("Qwen2.5") and key[3] >= BAR_ROWS}


def over(cells: Iterable[dict[str, Row]], provider: str, base: str) -> list[float]:
    """provider's time over base's, in every cell that has both, of runs that can be compared."""
    pairs = ((cell.get(provider), cell.get(base)) for cell in cells)
    timed = [(a, b) for a, b in pairs if a and b and a.p50_ms and b.p50_ms]
    # Where one alone was measured beside the bare layer, they are of two runs, and a machine is now slow, now fast.
    return [_over(a, b) for a, b in timed if (a.ratio_to_bare is None) == (b.ratio_to_bare is None)]


def _over(a: Row, b: Row) -> float:
    """By the rows' ratios, which may have been taken round by round (`timing.Times.over`), as two medians were not."""
    return a.ratio_to_bare / b.ratio_to_bare if a.ratio_to_bare and b.ratio_to_bare else a.p50_ms / b.p50_ms


def means(rows: list[Row]) -> tuple[list[str], list[list]]:
    """Geometric means over Qwen2.5's shapes at M >= 16 by dtype and pass, by dtype, and over all: (headers, lines)."""
    found = barred(rows)
    dtypes = sorted({key[2] for key in found})
    groups = [(d, p) for d in dtypes for p in PASSES] + [(d, "both") for d in dtypes] + [("all", "both")]
    lines = []
    for dtype, pass_ in groups:
        group = [c for k, c in found.items() if dtype in (k[2], "all") and pass_ in (k[4], "both")]
        if group:
            columns = [(who.OURS, who.PEFT), (who.OURS, who.BARE)]
            columns += [(p, who.BARE) for p in (who.PEFT, who.PEFT_SAME_DTYPE, who.PLAIN, who.COMPILED)]
            lines.append([dtype, pass_, len(group), *(_mean(over(group, a, b)) for a, b in columns)])
    headers = ["dtype", "pass", "cells", "ours / PEFT", "ours / bare", "PEFT / bare", "PEFT same dtype / bare"]
    return [*headers, "plain / bare", "compiled / bare"], lines


def _shapes(cells: Iterable[tuple]) -> str:
    """Which layers and rows there are: a run may have ended before the last."""
    layers, Ms = defaultdict(list), sorted({key[3] for key in cells})
    for model, layer in dict.fromkeys(key[:2] for key in cells):
        layers[model].append(layer)
    return (
        "; ".join(f"{model}'s {', '.join(found)}" for model, found in layers.items())
        + f"; M = {', '.join(map(str, Ms))}"
    )


def _mean(ratios: list[float]) -> str:
    return f"{geometric_mean(ratios):.2f}" if ratios else ""


def noise(rows: list[Row]) -> float:
    """Spread of the median row: its p80 over its p20."""
    return statistics.median([row.p80_ms / row.p20_ms for row in rows if row.p20_ms and row.p80_ms] or [1.0])


def bars(rows: list[Row]) -> list[str]:
    """One line per bar: what it is, what was measured, met or missed."""
    found = list(barred(rows).values())
    lines = []
    for base, bar in BARS.items():
        ratios = over(found, who.OURS, base)
        if ratios:
            mean = geometric_mean(ratios)
            verdict = "met" if mean <= bar else "MISSED"
            lines.append(f"ours / {base}: {mean:.3f} over {len(ratios)} cells, bar {bar}: {verdict}")
    return lines


def linear_table(rows: list[Row]) -> str:
    """Every cell on a line: the bare layer's milliseconds, and everybody's time over it."""
    found = cells(rows)
    names = [*who.NAMES[1:], *(who.INVARIANT for cell in list(found.values())[:1] if who.INVARIANT in cell)]
    lines = []
    for (model, layer, dtype, M, pass_, r, u), cell in found.items():
        bare = cell.get(who.BARE)
        shape = next(iter(cell.values()))
        ms = f"{bare.p50_ms:.3f}" if bare and bare.p50_ms else ""
        line = [_named(model, r, u), layer, f"{shape.N} x {shape.K}", dtype, M, pass_, ms]
        lines.append([*line, *(_cell(cell.get(name)) for name in names)])
    headers = ["model", "layer", "N x K", "dtype", "M", "pass", "bare ms", *names]
    text = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    return "\n\n".join([text, *_without_times(rows, "linear")])


def _without_times(rows: list[Row], op: str) -> list[str]:
    """Why some have no times at all."""
    notes = {f"{row.mode or row.provider}: {row.note}" for row in rows if row.op == op and row.M is None}
    return sorted(note.removeprefix(": ") for note in notes)


def layer_table(rows: list[Row]) -> str:
    """Blocks: the roofline's bound, everybody's time over the bare layers', and ours over PEFT's."""
    names = (*block.PROVIDERS[1:],)
    lines = []
    refused = [r for r in rows if r.op == "layer" and r.M is not None and not r.p50_ms]
    rows = [r for r in rows if r not in refused]
    for (model, _, dtype, M, pass_, r, u), cell in cells(rows, "layer").items():
        bare = cell.get(who.BARE)
        least = (f"{bare.bound_ms:.4g}", f"{bare.p50_ms:.4g}") if bare else ("", "")
        line = [_named(model, r, u), dtype, M, pass_, *least]
        line += [_cell(cell.get(name)) for name in names]
        best = cell.get(who.OURS) if who.OURS in cell and cell[who.OURS].p50_ms else cell.get(who.ALONE)
        pair = over([{"": best} | cell], "", who.PEFT)
        lines.append([*line, f"{pair[0]:.2f}" if pair else ""])
    headers = ["model", "dtype", "M", "pass", "bound ms", "bare ms", *names, "ours / PEFT"]
    text = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    many = [cell for key, cell in usual(rows, "layer").items() if key[3] >= BAR_ROWS and key[2] != NF4]
    pairs = ((name, over(many, who.OURS, name)) for name in (who.BARE, *names) if name != who.OURS)
    means = [f"{name} {geometric_mean(found):.2f} ({len(found)} cells)" for name, found in pairs if found]
    if means:
        text += f"\n\nAt M ≥ {BAR_ROWS}, geometric means of the time of ours over: " + ", ".join(means)
    notes = {f"{row.provider}, {row.model}, {row.dtype}, M = {row.M}: {row.note}" for row in refused}
    found = [f"{r.pass_} {_ceiling(r)}" for r in rows if r.op == "ceilings"]
    below = ["The bound is the roofline of: " + ", ".join(found)] if found else []
    return "\n\n".join([text, *below, *_without_times(rows, "layer"), *sorted(notes)])


def parts_table(rows: list[Row]) -> str:
    """The kernels one by one, against the library's bare matmul."""
    timed = [r for r in rows if r.op == "parts" and r.M is not None]
    lines = [[r.model, r.layer, f"{r.N} x {r.K}", r.M, r.pass_, r.provider, *_part(r)] for r in timed]
    headers = ["model", "layer", "N x K", "M", "part", "provider", "us", "GB/s", "TFLOP/s", "over F.linear"]
    found = [f"{r.pass_} {_ceiling(r)}" for r in rows if r.op == "ceilings"]
    text = tabulate(lines, headers, tablefmt="github", disable_numparse=True)
    below = ["Ceilings: " + ", ".join(found)] if found else []
    return "\n\n".join([text, *below, *_without_times(rows, "parts")])


def _part(row: Row) -> list[str]:
    if not row.p50_ms:
        return [row.note]
    ratio = f"{row.ratio_to_bare:.3f}" if row.ratio_to_bare else ""
    return [f"{row.p50_ms * 1e3:.2f}", f"{row.gb_per_s:.0f}", f"{row.tflops:.1f}", row.note or ratio]


def memory_table(rows: list[Row]) -> str:
    """What a block keeps and the peak, in MB."""
    lines = [
        [r.model, r.dtype, r.M, r.provider, r.pass_, r.note if r.peak_mb is None else f"{r.peak_mb:.3f}"]
        for r in rows
        if r.op == "memory"
    ]
    return tabulate(lines, ["model", "dtype", "M", "provider", "what", "MiB"], tablefmt="github", disable_numparse=True)


def host_table(rows: list[Row]) -> str:
    """Microseconds of the host per call."""
    found: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for r in rows:
        if r.op == "host" and r.p50_ms:
            found[r.layer, r.M, r.provider, r.dtype][f"{r.pass_}, {r.mode}"] = r
    columns = list(dict.fromkeys(f"{r.pass_}, {r.mode}" for r in rows if r.op == "host" and r.p50_ms))
    lines = [
        [*key, *(f"{cell[c].p50_ms * 1e3:.1f}" if c in cell else "" for c in columns)] for key, cell in found.items()
    ]
    text = tabulate(lines, ["layer", "M", "provider", "dtype", *columns], tablefmt="github", disable_numparse=True)
    notes = [f"{row.mode or row.provider}: {row.note}" for row in rows if row.op == "host" and row.note]
    return "\n\n".join([text, *notes])


def _ceiling(row: Row) -> str:
    return f"{row.gb_per_s:.4g} GB/s" if row.gb_per_s else f"{row.tflops:.4g} TFLOP/s"


def roofline_table(models: Iterable[str], rows: Iterable[int]) -> str:
    """What the roofline allows an H200 and what the model says every provider adds."""
    found = [roofline.table(model, rows) for model in models]
    lines = [line for _, lines in found for line in lines]
    text = tabulate(lines, found[0][0], tablefmt="github", disable_numparse=True)
    ceilings = roofline.H200
    return f"{ceilings.device}, a model: nothing here is measured ({ceilings.source}).\n\n{text}"


def means_table(rows: list[Row]) -> str:
    headers, lines = means(rows)
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def svd_table(rows: list[Row]) -> str:
    lines = [
        [r.layer, f"{r.N} x {r.K}", r.provider, f"{r.p50_ms / 1e3:.2f}" if r.p50_ms else r.note, _angle(r)]
        for r in rows
        if r.op == "svd"
    ]
    headers = ["spectrum", "N x K", "provider", "seconds", "angle to the full SVD's subspace"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _angle(row: Row) -> str:
    return "" if row.angle_deg is None else f"{row.angle_deg:.2g}°"


def model_table(rows: list[Row], op: str = "model") -> str:
    lines = []
    for r in rows:
        if r.op == op:
            time, ratio = (f"{r.p50_ms:.1f}", r.ratio_to_bare) if r.p50_ms else (r.note, None)
            what = [r.model, r.layer] if op == "peft" else [r.model]
            lines.append([*what, r.dtype, r.pass_, r.provider, time, f"{ratio:.2f}" if ratio else ""])
    headers = ["model", *["adapter"] * (op == "peft"), "dtype", "pass", "provider", "ms", "over base"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def folders_table(rows: list[Row]) -> str:
    """Seconds and peak memory of merge and convert."""
    lines = [
        [r.model, r.layer, r.pass_, f"{r.p50_ms / 1e3:.0f}" if r.p50_ms else "", f"{r.peak_mb or 0:.0f}", r.note]
        for r in rows
        if r.op == "folders"
    ]
    headers = ["model", "adapter", "command", "seconds", "peak MiB", "note"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def rollout_table(rows: list[Row]) -> str:
    """Speed and agreement of `python -m bench rollout`."""
    lines = [
        [
            r.model,
            r.M,
            f"{r.layer}, {r.dtype}" if r.layer == "operation" else r.layer,
            r.provider,
            f"{r.ratio_to_bare:.2f}" if r.ratio_to_bare else "",
            r.note.replace("|", "\\|"),
        ]
        for r in rows
        if r.op == "rollout"
    ]
    headers = ["model", "batch", "what", "provider", "time over base", ""]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _where(rows: list[Row]) -> str:
    def all_(name: str) -> str:
        return " and ".join(sorted({getattr(row, name) for row in rows} - {""}))

    first, days = rows[0], sorted({row.date[:10] for row in rows})
    versions = f"torch {all_('torch')}" + (f", triton {all_('triton')}" if first.device.startswith("NVIDIA") else "")
    used = sorted({row.threads for row in rows if row.threads})
    threads = f", {' or '.join(map(str, used))} thread{'s' * (used[-1] > 1)}" if used else ""
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"**{first.device}**{threads}; {versions}, PEFT {all_('peft')}; {when}"


class _Grid:
    """A table of "ours / PEFT's", filled cell by cell; lines and columns stand in the order in which they came."""

    def __init__(self, what: str):
        self.what = what
        self.lines: dict[str, dict[str, str]] = defaultdict(dict)

    def add(self, line: str, column: str, found: Iterable[dict[str, Row]], name: str = who.OURS) -> None:
        """The means over `found` of the time of `name` and of PEFT over the bare layers'."""
        found = list(found)
        values = [_mean(over(found, one, who.BARE)) for one in (name, who.PEFT)]
        if values[0]:
            self.lines[line][column] = " / ".join(filter(None, values))

    def __str__(self) -> str:
        columns = list(dict.fromkeys(c for line in self.lines.values() for c in line))
        lines = [[line, *(of.get(c, "") for c in columns)] for line, of in self.lines.items()]
        return tabulate(lines, [self.what, *columns], "github", disable_numparse=True)


def summary(rows: list[Row]) -> str:
    """The results of one device as the README shows them: "ours / PEFT's" time over the same without an adapter."""
    grids: dict[str, _Grid] = {}

    def grid(what: str) -> _Grid:
        return grids.setdefault(what, _Grid(what))

    on_gpu, patched = rows[0].device.startswith("NVIDIA"), "PEFT's layers under `patch_peft()`"
    together: dict[tuple[str, str, str], list] = defaultdict(list)  # grid, line and column of what is averaged
    for (model, _, dtype, M, pass_, *_), cell in sorted(usual(rows, "layer").items(), key=lambda item: item[0][:4]):
        if on_gpu:  # what a row is about is another thing at every M
            grid(f"linear layers of a block, {model}, {dtype}").add(f"{M} row{'s' * (M > 1)}", pass_, [cell])
        else:
            line = f"{dtype}, {'<' if M < BAR_ROWS else '≥'} {BAR_ROWS} rows"
            together["linear layers of a block", line, pass_.removesuffix(", eager")].append(cell)
    for (_, _, dtype, _, pass_, *_), cell in sorted(barred(rows).items()):
        if on_gpu:  # the block says more, of all its layers
            break
        together[f"one linear layer, ≥ {BAR_ROWS} rows", dtype, pass_].append(cell)
    for (size, adapter, pass_, r, _), cell in _by(rows, "peft", lambda r: (r.model, r.layer, r.pass_, r.r, r.dtype)):
        together[patched, f"{size}: {pass_}", f"{adapter}, r = {r}"].append(cell)
    for (what, line, column), found in together.items():
        grid(what).add(line, column, found, peft.PATCHED if what == patched else who.OURS)
    for key, cell in _by(rows, "model", lambda r: (r.model, r.pass_, r.dtype)):
        if key[1] != "startup":
            grid("a whole model").add(f"{key[0]}, {key[2]}", key[1], [cell])
    for (model, batch, mode), cell in _by(rows, "rollout", lambda r: (r.model, r.M, r.mode)):
        for name in cell:
            if name.startswith(who.OURS):
                extra = name.removeprefix(who.OURS).replace(" 1 adapters", " 1 adapter")
                beside = (who.BARE,) if extra else (who.BARE, who.PEFT)  # PEFT's runs one adapter, as ours plain
                one = {n: cell[n] for n in (name, *beside) if n in cell}
                column = "in CUDA graphs" if mode == CAPTURED else "generate()"
                grid("decoding").add(f"{model}, batch {batch}{extra}", column, [one], name)
    return "\n\n".join([_where(rows), *map(str, grids.values()), *_asides(rows)])


def _asides(rows: list[Row]) -> list[str]:
    """What is no time over another's: start-up, and how far rollouts are from training."""
    lines = []
    for (spectrum, shape), cell in _by(rows, "svd", lambda r: (r.layer, f"{r.N} x {r.K}")):
        seconds = [f"{cell[n].p50_ms / 1e3:.2f} s" if n in cell else "" for n in (who.OURS, who.PEFT)]
        lines.append([f"start-up of one {shape} layer, {spectrum}", *seconds])
    agreed = [r for r in rows if r.op == "rollout" and r.layer == "agreement"]
    drift = {r.provider: r.note for r in agreed if r.note.startswith("|Δ") and "mean " in r.note}
    mean = {name: note.split("mean ")[1].split(",")[0] for name, note in drift.items()}
    of = [drift[who.OURS].rpartition("over ")[2]] if who.OURS in drift else []
    of += [f"{mean[who.BARE]} without an adapter"] if who.BARE in mean else []
    for name, what in ((who.OURS, "unmerged"), (who.INVARIANT, "all batch invariant"), ("merged", "merged into bf16")):
        if name in mean:
            means = [mean.get(n, "") for n in (name, who.PEFT)][: 2 - (name != who.OURS)]
            lines.append([f"rollout against training, mean \\|Δ log p\\| ({'; '.join(of)}), {what}", *means])
    for r in (r for r in rows if r.op == "model" and r.layer == LOST):
        lines.append([f"of the update, lost by merging it into {r.dtype} ({r.model}, {r.pass_})", r.note])
    return [tabulate(lines, ["", "ours", "PEFT"], "github", disable_numparse=True)] if lines else []


def _by(rows: list[Row], op: str, key) -> list[tuple[tuple, dict[str, Row]]]:
    """The timed rows of an op by `key`, and in each by provider."""
    found: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.op == op and row.p50_ms:
            found[key(row)][row.provider] = row
    return list(found.items())


def markdown(rows: list[Row]) -> str:
    """All results of one device, as bench/results/README.md shows them."""
    commits = sorted({row.commit for row in rows if row.commit})
    parts = [f"{_where(rows)}; commit {', '.join(commits)}"]
    ops = {row.op for row in rows}
    if "linear" in ops:
        headers, lines = means(rows)
        parts.append(
            f"One adapted linear layer (TinyLoRA, r = {R}): time over another's, geometric means over the cells that "
            f"have both: {_shapes(barred(rows))}.\n\n"
            + tabulate(lines, headers, tablefmt="github", disable_numparse=True)
        )
    if "layer" in ops:
        parts.append(
            "The seven linear layers of one transformer block: the roofline's bound, the bare layers, and time over "
            "theirs.\n\n" + layer_table(rows)
        )
    if "memory" in ops:
        parts.append("Memory of one block beside its weights, in MiB.\n\n" + memory_table(rows))
    if "parts" in ops:
        parts.append("The kernels one by one (r = 2, bf16).\n\n" + parts_table(rows))
    if "host" in ops:
        parts.append("Microseconds of the host for one call of a tiny layer.\n\n" + host_table(rows))
    if "svd" in ops:
        what = "Start-up of one layer, with nothing in the cache: `Linear.from_linear`, and PEFT's `get_peft_model`."
        parts.append(f"{what}\n\n" + svd_table(rows))
    if "rollout" in ops:
        brief = [r for r in rows if r.layer != "operation" and not r.provider.endswith(" alone")]
        brief = [r for r in brief if ", all but " not in r.provider]
        parts.append(
            "Rollouts with the adapter in place (random weights, bf16; every model, the base too, gets a head whose "
            "input is contiguous, without which a CPU copies the head's weight once per sequence). "
            + IN_ALL * any(r.provider == who.INVARIANT and r.layer == "agreement" for r in brief)
            + "\n\n"
            + rollout_table(brief)
        )
    if "folders" in ops:
        parts.append(
            "`tinylora merge` and `convert` on a model folder with random weights: a process each, Python and torch "
            "included in its memory.\n\n" + folders_table(rows)
        )
    if "model" in ops:
        parts.append("A whole pretrained model, every linear layer adapted.\n\n" + model_table(rows))
    if "peft" in ops:
        what = "Small models adapted by PEFT, with and without `patch_peft()`."
        parts.append(f"{what}\n\n" + model_table(rows, "peft"))
    return "\n\n".join(parts)


def write_readme(readme: Path, results: Path) -> None:
    """Replace what stands between the README's two marks by a table per CSV in `results`, and renew README.md there,
    which has all tables and the demo's."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise Unusable(f"{readme} has no single pair of marks {BEGIN} and {END}, expected a README with them")
    measured = [rows for rows in map(read, sorted(results.glob("*.csv"))) if rows]
    measured.sort(key=lambda rows: not rows[0].device.startswith("NVIDIA"))
    body = "\n\n".join(map(summary, measured)) or "Nothing has been measured yet."
    if not any(rows[0].device.startswith("NVIDIA") for rows in measured):
        body += "\n\nOn a GPU: not measured."
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    whole = [*map(markdown, measured), *filter(None, [demo_tables.markdown(results / "demo")])]
    (results / "README.md").write_text("\n\n".join(["# Results", HOW, *whole]) + "\n", encoding="utf-8")
    readme.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")


def plot(rows: list[Row], path: Path, op: str = "linear", names: tuple[str, ...] = who.NAMES) -> None:
    """Time over the bare layer against M, a panel per dtype and pass; geometric mean of all shapes at that M."""
    found = usual(rows, op)
    if not found:
        return
    dtypes, passes = (sorted({key[i] for key in found}) for i in (2, 4))
    if not (figure := new_figure(5 * len(passes), 3.6 * len(dtypes))):
        return
    axes = figure.subplots(len(dtypes), len(passes), squeeze=False, sharey="row")
    for i, dtype in enumerate(dtypes):
        for j, pass_ in enumerate(passes):
            axis = axes[i][j]
            group = {k: c for k, c in found.items() if (k[2], k[4]) == (dtype, pass_)}
            Ms = sorted({k[3] for k in group})
            for color, name in enumerate(names):
                means = [geometric_mean(over((c for k, c in group.items() if k[3] == M), name, who.BARE)) for M in Ms]
                if not all(map(math.isnan, means)):
                    axis.plot(Ms, means, f"C{color}o-", label=name, zorder=3 if name == who.OURS else 2)
            axis.set(title=f"{dtype}, {pass_}", xlabel="M (rows)", ylabel=f"time / bare {op}")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncols=len(labels))
    figure.suptitle(_where(rows).replace("**", ""))
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120)
