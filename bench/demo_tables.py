"""Tables and figures of the demo's rows."""

from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from bench import addition
from bench.demo_rows import ALL, NOISE, SEEDS, SWEEP_SEEDS, SWEEP_STEPS, SWEEP_TIE, SWEEP_U, Run, read, run_of
from bench.rows import new_figure

MARKS = (0.4, 0.5, 0.6, 0.7)  # greedy accuracy, and what it takes to get there


def validation(row: dict) -> float:
    return float(row["validation_greedy"]) + float(row["validation_sampled"])


def grouped(rows: list[dict], **without) -> dict[Run, list[dict]]:
    """Rows by their run with some of its fields set to `without`."""
    groups: dict[Run, list[dict]] = {}
    for row in rows:
        groups.setdefault(replace(run_of(row), **without), []).append(row)
    return groups


def percent(value) -> str:
    return f"{100 * float(value):.1f}"


def table(rows: list[dict]) -> str:
    """One line a method, mean and range over the seeds, as markdown; below it what it depends on."""
    lines = []
    for run, group in grouped(rows, seed=None).items():
        line = [run.name, f"{int(group[0]['trained']):,}", f"{run.lr:g}" if run.lr else "", run.steps]
        for column in ("test_greedy", "test_sampled"):
            values = [float(row[column]) for row in group]
            spread = f" ({percent(min(values))} to {percent(max(values))})" if len(values) > 1 else ""
            line.append(percent(sum(values) / len(values)) + spread)
        lines.append([*line, f"{sum(float(row['cpu_s']) for row in group) / len(group):.0f}"])
    headers = ["", "trained", "rate", "steps", "greedy, %", "T = 1, %", "CPU seconds"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n\n" + CAPTION


CAPTION = f"""\
Exact answers on {len(addition.split()["test"])} pairs that no training saw; mean (and range) over {len(SEEDS)} seeds,
on one base model. One accuracy has a standard error of at most 1.6 points; the seed draws the 13 directions, too.
What the effect depends on: the demonstrations. On clean ones SFT with the same 13 numbers does what GRPO does. Noisy
ones begin with {NOISE} random letters, which the base never saw, so that SFT's first loss is far higher than on
anybody's real demonstrations; LoRA and full fine-tuning learn the sum from them all the same. Most of what 13 numbers
gain is a choice among ways of answering that the base has already. It is the paper's mechanism in a toy, and no
replication of its result on GSM8K."""


def markdown(folder: Path) -> str:
    """The demo's results as bench/results/README.md shows them, "" if there are none."""
    rows = read(folder / "demo.csv")
    if not rows:
        return ""
    where = (
        f"{rows[0]['device']}; torch {rows[0]['torch']}, transformers {rows[0]['transformers']}, TRL {rows[0]['trl']}"
    )
    head = f"`make demo` (**{where}**; commit {rows[0]['commit']}, {rows[0]['date'][:10]}):"
    figure = "![accuracy against trained parameters](demo/demo.png)"
    return f"{head}\n\n{table(rows)}\n\n{figure}"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against trained parameters, RL and SFT, as Figures 1 and 2 of arXiv 2602.04118."""
    if not (figure := new_figure(11, 5.2)):
        return
    axes = figure.subplots(1, 2, sharey=True)
    groups = grouped(rows, seed=None)
    base = next(group[0] for run, group in groups.items() if run.method == "base")
    for axis, column, title in zip(
        axes, ("test_greedy", "test_sampled"), ("greedy answers", "sampled at T = 1"), strict=True
    ):
        kinds = [("GRPO", ""), ("SFT", "clean"), ("SFT", "noisy"), ("ES", "")]
        for color, (method, data) in enumerate(kinds):
            points = {}
            for run, group in groups.items():
                if (run.method, run.data) == (method, data):
                    points[int(group[0]["trained"])] = [float(row[column]) for row in group]
            label = f"SFT, {data} demonstrations" if data else method
            beside = {x: x * 1.2 ** (color - 1.5) for x in sorted(points)}  # so that no contestant hides another
            means = [sum(points[x]) / len(points[x]) for x in beside]
            axis.plot(beside.values(), means, f"C{color}-", marker="_", ms=12, label=label)
            for x, values in points.items():
                axis.plot([beside[x]] * len(values), values, f"C{color}o", ms=4, alpha=0.7)
        axis.axhline(float(base[column]), color="gray", ls="--", lw=1, label="base, 0 parameters")
        axis.set(xscale="log", xlabel="trained parameters", title=title, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact answers, test pairs")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), bbox_to_anchor=(0.5, 0.2), frameon=False)
    figure.text(0.5, 0.01, "A dot is a seed. " + CAPTION, ha="center", va="bottom", fontsize=7.5)
    figure.tight_layout(rect=(0, 0.26, 1, 1))
    figure.savefig(path, dpi=120)


def evolution_table(rows: list[dict]) -> str:
    """What each seed took to a greedy accuracy: CPU seconds and texts; "-" where it did not get there."""
    lines = []
    for run, group in grouped(rows, seed=None).items():
        of_seed = grouped(group).values()
        for mark in MARKS:
            reached = [next((r for r in curve if float(r["test_greedy"]) >= mark), None) for curve in of_seed]
            cells = [
                ", ".join("-" if r is None else f"{float(r[column]):,.{digits}f}" for r in reached)
                for column, digits in (("cpu_s", 1), ("completions", 0))
            ]
            lines.append([run.method, f"{mark:.0%}", *cells])
        ends = [
            ", ".join(percent(curve[-1][column]) for curve in of_seed) for column in ("test_greedy", "test_sampled")
        ]
        lines.append([run.method, "at the end", f"greedy {ends[0]} %", f"T = 1 {ends[1]} %"])
    headers = ["method", "greedy accuracy", f"CPU seconds, seeds {SEEDS}", "texts generated"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def plot_evolution(rows: list[dict], path: Path) -> None:
    if not (figure := new_figure(10.5, 7)):
        return
    axes = figure.subplots(2, 2, sharey="row")
    for i, (column, what) in enumerate((("test_greedy", "greedy"), ("test_sampled", "sampled at T = 1"))):
        for axis, x, label in zip(
            axes[i], ("cpu_s", "completions"), ("CPU seconds of training", "texts generated"), strict=True
        ):
            for run, curve in grouped(rows).items():
                color = f"C{3 * (run.method == 'ES')}"
                values = [[float(row[c]) for row in curve] for c in (x, column)]
                axis.plot(*values, color, label=run.method if run.seed == SEEDS[0] else None, alpha=0.8)
            axis.set(xlabel=label)
            axis.grid(alpha=0.3)
        axes[i][0].set_ylabel(f"exact answers, {what}")
    axes[0][0].legend(loc="lower right")
    figure.suptitle(f"13 numbers, {len(SEEDS)} seeds: GRPO (with gradients) and evolution strategies (without)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def chosen(rows: list[dict]) -> dict[Run, list[dict]]:
    """By cell (u, n_tie), the rows of the rate that did best on the validation pairs."""
    cells: dict[Run, list[dict]] = {}
    for run, group in grouped([r for r in rows if r["method"] == "GRPO"], seed=None).items():
        cell = replace(run, lr=None)
        if cell not in cells or sum(map(validation, group)) > sum(map(validation, cells[cell])):
            cells[cell] = group
    return cells


def sweep_table(rows: list[dict]) -> str:
    cells = chosen(rows)
    lines = []
    for n_tie in SWEEP_TIE:
        line = ["all" if n_tie == ALL else n_tie]
        for u in SWEEP_U:
            group = next(g for run, g in cells.items() if (run.u, run.n_tie) == (u, n_tie))
            mean, sampled = (sum(float(r[c]) for r in group) / len(group) for c in ("test_greedy", "test_sampled"))
            line.append(f"{percent(mean)} / {percent(sampled)} ({int(group[0]['trained'])})")
        lines.append(line)
    base = next(r for r in rows if r["method"] == "base")
    head = f"Base: {percent(base['test_greedy'])} / {percent(base['test_sampled'])}. "
    head += f"Greedy / T = 1 accuracy in %, seed {', '.join(map(str, SWEEP_SEEDS))} (trained parameters):\n\n"
    return head + tabulate(lines, ["n_tie", *(f"u={u}" for u in SWEEP_U)], tablefmt="github", disable_numparse=True)


def plot_sweep(rows: list[dict], path: Path) -> None:
    """Accuracy against trained parameters, a line for each n_tie, as Figure 8 of arXiv 2602.04118."""
    if not (figure := new_figure(10.5, 4.4)):
        return
    axes = figure.subplots(1, 2, sharey=True)
    base = next(r for r in rows if r["method"] == "base")
    cells = chosen(rows)
    for axis, column, title in zip(
        axes, ("test_greedy", "test_sampled"), ("greedy answers", "sampled at T = 1"), strict=True
    ):
        for color, n_tie in enumerate(SWEEP_TIE):
            groups = sorted((g for run, g in cells.items() if run.n_tie == n_tie), key=lambda g: int(g[0]["trained"]))
            xs = [int(g[0]["trained"]) for g in groups]
            means, bars = _mean_and_range([[float(r[column]) for r in g] for g in groups])
            label = f"n_tie = {'all' if n_tie == ALL else n_tie}"
            axis.errorbar(xs, means, bars, fmt=f"C{color}o-", label=label, capsize=3)
        axis.axhline(float(base[column]), color="gray", ls="--", lw=1, label="base, 0 parameters")
        axis.set(xscale="log", xlabel="trained parameters (u = " + ", ".join(map(str, SWEEP_U)) + ")", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact answers, test pairs")
    axes[0].legend()
    figure.suptitle(
        f"GRPO, TinyLoRA r = 2, {SWEEP_STEPS} steps, {len(SWEEP_SEEDS)} seed; rates chosen on validation pairs"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _mean_and_range(values: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and the bars of an errorbar down to the least and up to the greatest value."""
    means = [sum(v) / len(v) for v in values]
    low = [max(0.0, m - min(v)) for m, v in zip(means, values, strict=True)]
    high = [max(0.0, max(v) - m) for m, v in zip(means, values, strict=True)]
    return means, [low, high]
