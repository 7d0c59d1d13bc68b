"""`python -m bench`: the command line of the benchmark."""

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything the benchmark reads is on this machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from bench import (
    analysis,
    block,
    demo,
    folders,
    gpu,
    host,
    layer,
    linear,
    memory,
    model,
    parts,
    peft,
    providers,
    report,
    rollout,
    roofline,
    rows,
    shapes,
    svd,
    timing,
    tune,
)

DESCRIPTION = """\
Measures tinylora against the bare frozen layer, PEFT's TinyLoRA, plain code and torch.compile.

Without a command: svd, model and linear, in about 150 seconds on two CPU cores. Every provider is compared with fp64
before it is timed, and a wrong one gets no time; providers alternate within a run, so compare ratios, not runs.
Rows go to <out>/<device>.csv as they are measured; <device>.md then has this run's tables, <device>.png all rows."""

EXAMPLES = """\
examples:
  python -m bench                                            svd, model and linear, on the GPU if there is one
  python -m bench linear --models Qwen2.5-7B --M 1 16        two row counts on one model's shapes
  python -m bench linear --layers all --budget 1800          every distinct shape, every M
  python -m bench --out bench/results && python -m bench table    renew the results in git and in the README"""

COMMANDS = ("linear", "layer", "host", "memory", "svd", "model", "peft", "rollout", "analysis", "folders")
COMMANDS += ("demo", "parts", "tune", "roofline", "gpu", "table")
MAIN_BUDGET = 150.0
INTERRUPTED = 130  # as shells have it
NOISY = 1.3  # spread of a typical cell from which on a run should not be trusted; 1.1 on a quiet machine


def count(text: str) -> int:
    """There is nothing to measure at none of it, or less."""
    return _above_zero(text, int, "a whole number above 0")


def amount(text: str) -> float:
    return _above_zero(text, float, "a number above 0")


def _above_zero(text: str, kind: type, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not value > 0:  # NaN is none, either
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser("python -m bench", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)

    def common(p, device=True):
        p.add_argument("--out", type=Path, default=rows.OUT, help="folder for csv, md and png (default bench/out)")
        if device:
            p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        p.add_argument("--threads", type=count, help="CPU threads (default: one per idle core)")

    common(main)
    main.add_argument("--budget", type=amount, default=MAIN_BUDGET, help="seconds for all of it (default %(default)g)")
    what = main.add_subparsers(dest="what", metavar=" | ".join(COMMANDS))

    p = what.add_parser("linear", help=_first(linear), description=linear.__doc__)
    common(p)
    p.add_argument("--models", nargs="+", choices=shapes.models(), default=list(shapes.models()), metavar="MODEL")
    p.add_argument("--dtypes", nargs="+", choices=tuple(linear.DTYPES), default=["bf16", "fp32"])
    p.add_argument("--M", nargs="+", type=count, help=f"rows (default {linear.CPU_ROWS}, on a GPU {linear.CUDA_ROWS})")
    p.add_argument("--passes", nargs="+", choices=linear.PASSES, default=list(linear.PASSES))
    p.add_argument(
        "--providers", nargs="+", choices=(*providers.NAMES, providers.INVARIANT), default=list(providers.NAMES),
        metavar="PROVIDER", help=f"(default: {', '.join(providers.NAMES)}; there is also '{providers.INVARIANT}')",
    )  # fmt: skip
    p.add_argument("--budget", type=amount, default=100.0, help="seconds (default %(default)g); min. 5 rounds a cell")
    p.add_argument(
        "--layers",
        choices=("sample", "all"),
        help="sample (default on a CPU): q_proj, gate_proj and down_proj of each model, no cell above "
        f"{linear.CPU_OPERATIONS / 1e9:g} GFLOP, and `compiled` on {linear.CPU_COMPILED[0]} q_proj alone; "
        "all (default on a GPU): every distinct shape at every M",
    )
    p.add_argument("--r", type=count, default=linear.R, help="rank (default %(default)s)")
    p.add_argument("--u", type=count, default=linear.U, help="length of v (default %(default)s)")

    p = what.add_parser("layer", help=_first(layer), description=layer.__doc__)
    common(p)
    p.add_argument("--models", nargs="+", choices=shapes.decoders(), metavar="MODEL")
    p.add_argument("--dtypes", nargs="+", choices=layer.BASES, default=["bf16", "fp32"])
    p.add_argument("--M", nargs="+", type=count, help=f"rows (default {layer.CPU_ROWS}, on a GPU {layer.CUDA_ROWS})")
    p.add_argument("--providers", nargs="+", choices=block.PROVIDERS, default=list(block.PROVIDERS))
    p.add_argument("--budget", type=amount, default=110.0, help="seconds of timing (default %(default)g)")
    p.add_argument("--r", type=count, default=linear.R, help="rank (default %(default)s)")
    p.add_argument("--u", type=count, default=linear.U, help="length of v (default %(default)s)")

    p = what.add_parser("host", help=_first(host), description=host.__doc__)
    common(p)
    p.add_argument("--dtype", choices=tuple(linear.DTYPES), default="fp32", help="of the tiny layer (%(default)s)")
    p.add_argument("--budget", type=amount, default=60.0, help="seconds of timing (default %(default)g)")

    p = what.add_parser("memory", help=_first(memory), description=memory.__doc__)
    common(p)
    p.add_argument("--models", nargs="+", choices=shapes.decoders(), default=["Qwen2.5-0.5B"], metavar="MODEL")
    p.add_argument("--dtype", choices=tuple(linear.DTYPES), default="bf16", help="(default %(default)s)")
    p.add_argument("--M", nargs="+", type=count, default=[1024], help="rows (default 1024)")

    p = what.add_parser("parts", help=_first(parts), description=parts.__doc__)
    common(p)
    p.add_argument("--models", nargs="+", choices=shapes.decoders(), default=list(layer.CUDA_MODELS), metavar="MODEL")
    p.add_argument("--budget", type=amount, default=330.0, help="seconds of timing (default %(default)g)")
    p.add_argument(
        "--stubbed", action="store_true", help="on a CPU, launches stubbed out: runs the code, measures nothing"
    )

    p = what.add_parser("gpu", help=_first(gpu), description=gpu.__doc__)
    p.add_argument("--stage", nargs="+", choices=gpu.NAMES, default=[], metavar="STAGE", help=", ".join(gpu.NAMES))
    p.add_argument("--dry-run", action="store_true", help="on the CPU, small: proves that every stage runs")
    p.add_argument(
        "--out", type=Path, help="folder for all of it (default bench/out/gpu; a dry run's: a temporary one)"
    )

    p = what.add_parser("roofline", help=_first(roofline), description=roofline.__doc__)
    p.add_argument("--models", nargs="+", choices=shapes.decoders(), default=list(layer.CUDA_MODELS), metavar="MODEL")
    p.add_argument("--M", nargs="+", type=count, default=[1, 16, 128, 512, 2048, 8192])

    p = what.add_parser("svd", help=_first(svd), description=svd.__doc__)
    common(p)
    p.add_argument("--model", choices=shapes.models(), default="Qwen2.5-7B", help="whose q_proj (default %(default)s)")

    p = what.add_parser("peft", help=_first(peft), description=peft.__doc__)
    common(p)
    p.add_argument("--dtypes", nargs="+", choices=tuple(linear.DTYPES), default=["bf16", "fp32"])
    p.add_argument("--kinds", nargs="+", choices=peft.KINDS, default=list(peft.KINDS))
    p.add_argument("--budget", type=amount, default=120.0, help="seconds of timing (default %(default)g)")

    p = what.add_parser("folders", help=_first(folders), description=folders.__doc__)
    common(p, device=False)
    p.add_argument("--model", choices=shapes.decoders(), default="Qwen2.5-7B", help="(default %(default)s)")
    p.add_argument("--folder", type=Path, help="a disk with room for the model twice (default: the temporary folder)")

    p = what.add_parser("model", help=_first(model), description=model.__doc__)
    common(p)
    p.add_argument("--dtypes", nargs="+", choices=tuple(linear.DTYPES), default=["bf16", "fp32"])
    p.add_argument("--budget", type=amount, default=12.0, help="seconds of timing (default %(default)g)")

    p = what.add_parser("analysis", help=_first(analysis), description=analysis.__doc__)
    common(p, device=False)
    p.add_argument("--pretraining", type=count, default=500, help="steps on prose (default %(default)s)")
    p.add_argument("--steps", type=count, default=150, help="steps on code, for every rate (default %(default)s)")

    p = what.add_parser("demo", help=_first(demo), description=demo.__doc__)
    p.add_argument("--out", type=Path, default=rows.OUT, help="its folder demo/ takes the results (default bench/out)")
    part = p.add_mutually_exclusive_group()
    for flag, about in demo.MINUTES.items():
        part.add_argument(f"--{flag}", dest="part", action="store_const", const=flag, help=about)
    p.set_defaults(part="demo")

    p = what.add_parser("rollout", help=_first(rollout), description=rollout.__doc__)
    common(p)
    p.add_argument("--model", choices=shapes.decoders(), default="Qwen2.5-0.5B", help="(default %(default)s)")
    p.add_argument(
        "--batch", type=count, nargs="+", default=[1, 8], help="sequences; agreement takes the last (default 1 8)"
    )
    p.add_argument("--adapters", type=count, nargs="+", default=[1, 8], help="different ones in a batch (default 1 8)")
    p.add_argument(
        "--blocks", type=count, help="of the model's transformer blocks only so many, the first (default: all)"
    )
    p.add_argument(
        "--questions", nargs="+", choices=rollout.QUESTIONS, default=list(rollout.QUESTIONS), help="(default: all)"
    )
    p.add_argument("--new", type=count, default=16, help="tokens generated after each prompt (default %(default)s)")
    p.add_argument("--budget", type=amount, default=100.0, help="seconds of timing (default %(default)g)")

    p = what.add_parser("tune", help=_first(tune), description=tune.__doc__)
    p.add_argument("--out", type=Path, default=rows.ROOT / "kernels" / "tables", help="(default kernels/tables)")
    p.add_argument("--models", nargs="+", choices=shapes.models(), default=["Qwen2.5-7B"], metavar="MODEL")
    p.add_argument("--dtypes", nargs="+", choices=tuple(linear.DTYPES), default=["bf16"])
    p.add_argument("--r", nargs="+", type=count, default=[2], help="ranks (default 2, which stands for 1 to 8)")
    p.add_argument("--M", nargs="+", type=count, help="buckets of rows (default: all)")
    p.add_argument("--seconds", type=amount, default=2.0, help="of timing a cell (default %(default)g)")
    p.add_argument("--minutes", type=amount, default=25.0, help="time limit; run again to go on (default %(default)g)")
    p.add_argument("--dry-run", action="store_true", help="in Triton's interpreter, with tiny sizes; needs --out")

    p = what.add_parser(
        "table", help="rewrite the tables of README.md and bench/results/README.md from bench/results/*.csv"
    )
    p.add_argument("--readme", type=Path, default=rows.ROOT / "README.md")
    p.add_argument("--results", type=Path, default=rows.RESULTS)
    return main


def _first(module) -> str:
    """What a module's docstring says after the command, its first line."""
    return module.__doc__.split(": ", 1)[1].splitlines()[0]


def plan(args, device: torch.device, budget: float) -> linear.Plan:
    """The plan that the arguments of `linear` describe."""
    cpu = device.type == "cpu"
    sample = cpu if args.layers is None else args.layers == "sample"
    return linear.Plan(
        models=tuple(args.models),
        dtypes=tuple(args.dtypes),
        rows=tuple(args.M or (linear.CPU_ROWS if cpu else linear.CUDA_ROWS)),
        passes=tuple(args.passes),
        providers=tuple(args.providers),
        budget=budget,
        sample=sample,
        most=linear.CPU_OPERATIONS if sample and not args.M else math.inf,  # what was asked for is measured
        r=args.r,
        u=args.u,
    )


def main(argv: list[str] | None = None) -> int:
    try:
        return _main(argv)
    except rows.Unusable as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "bench").split(".")[0] in ("bench", "tinylora"):
            raise
        print(f"{error}: pip install -e '.[rl,bench]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.what and argv[0] != args.what:  # argparse would take the command's own defaults in their place
        parser().error(f"options come after the command: python -m bench {args.what} {' '.join(argv[:2])} ...")
    if getattr(args, "device", None) == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device: --device cpu measures the CPU.", file=sys.stderr)
        return 2
    if out := getattr(args, "out", None):  # before anything is trained or measured
        there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        if not there.is_dir():
            print(f"--out is {out}, expected a folder: {there} is a file", file=sys.stderr)
            return 2
    if args.what == "table":
        for given, there, expected in (
            (args.results, any(args.results.glob("*.csv")), "a folder with CSV files that a run wrote"),
            (args.readme, args.readme.is_file(), "a file"),
        ):
            if not there:
                print(f"{given} is not {expected}", file=sys.stderr)
                return 2
        report.write_readme(args.readme, args.results)
        return 0
    if args.what == "demo":
        demo.run(args.out, args.part)
        return 0
    if args.what == "tune":
        return _tune(args)
    if args.what == "roofline":
        print(report.roofline_table(args.models, args.M))
        return 0
    if args.what == "gpu":
        if not args.dry_run and not torch.cuda.is_available():
            print("There is no CUDA device: nothing is measured. --dry-run takes the CPU.", file=sys.stderr)
            return 2
        return gpu.run(args.out, tuple(args.stage), args.dry_run, COMMANDS)
    if args.what == "analysis":
        _set_threads(args.threads)
        analysis.run(args.out, args.pretraining, args.steps)
        return 0
    # PEFT and transformers warn of what this benchmark does on purpose; stderr is for the progress bar.
    warnings.filterwarnings("ignore", module=r"(peft|transformers)\b")
    device = torch.device(getattr(args, "device", "cpu"))
    if device.type == "cpu":
        _set_threads(args.threads)
    started = time.perf_counter()
    ops = (args.what,) if args.what else ("svd", "model", "linear")
    if args.what == "layer":
        cpu = device.type == "cpu"
        args.models = args.models or (layer.CPU_MODELS if cpu else layer.CUDA_MODELS)
        args.M = args.M or (layer.CPU_ROWS if cpu else layer.CUDA_ROWS)
    missed: list[str] = []
    with rows.Results(args.out, device) as results:
        if "svd" in ops:
            svd.run(results, device, **({"model": args.model} if args.what else {"budget": args.budget / 2}))
        if "peft" in ops:
            peft.run(results, device, tuple(args.dtypes), tuple(args.kinds), args.budget)
        if "folders" in ops:
            folders.run(results, Path(__file__).parent / "models" / f"{args.model}.json", args.folder)
        if "model" in ops:
            _model(results, device, args, started)
        if "rollout" in ops:
            rollout.run(
                results, args.out, device, args.model, args.batch, args.adapters, args.new, args.budget, args.blocks,
                tuple(args.questions),
            )  # fmt: skip
        if "layer" in ops:
            what = (tuple(t) for t in (args.models, args.dtypes, args.M, args.providers))
            missed = layer.run(layer.Plan(*what, args.budget, args.r, args.u), results, device)
        if "memory" in ops:
            memory.run(results, device, tuple(args.models), args.dtype, tuple(args.M))
        if "parts" in ops:
            _parts(results, device, args)
        if "host" in ops:
            host.run(results, device, args.dtype, args.budget)
        if "linear" in ops:
            chosen = args if args.what else parser().parse_args(["linear"])
            budget = args.budget if args.what else max(30.0, args.budget - (time.perf_counter() - started))
            missed = linear.run(plan(chosen, device, budget), results, device)
    _show(results, missed, time.perf_counter() - started)
    # Others may fail for the machine's reasons (torch.compile without a C++ compiler); we may not, and nobody be wrong.
    bad = (
        r.note.startswith("wrong") or (r.note.startswith("failed") and r.provider.startswith(providers.OURS))
        for r in results.rows
    )
    return 1 if any(bad) else 0


def _tune(args) -> int:
    if args.dry_run:
        if args.out == rows.ROOT / "kernels" / "tables":
            print("tune: --dry-run measures nothing that belongs into kernels/tables: give --out", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    elif not torch.cuda.is_available():
        print(
            "tune: there is no GPU to measure; --dry-run --out FOLDER goes through all steps on a CPU", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    seconds = 0.0 if args.dry_run else args.seconds
    with rows.locked(args.out / "tables"):
        what = (args.models, args.dtypes, args.r, args.M)
        left = tune.run(args.out, device, *what, args.minutes, seconds, args.dry_run)
    return tune.LEFT if left else 0


def _parts(results, device, args) -> None:
    if device.type == "cpu" and not args.stubbed:
        results.add(rows.Row("parts", "", "", "", "", note="not measured: the kernels run on NVIDIA GPUs"))
        return
    _, ceilings = roofline.measure(device, ("bf16", "fp32"), 0.05 * args.budget)
    for row in ceilings:
        results.add(row)
    with host.launches_stubbed_out() if args.stubbed else contextlib.nullcontext():
        parts.run(results, device, tuple(args.models), args.budget, check=not args.stubbed)


def _set_threads(wanted: int | None) -> None:
    """As many as wanted, else as many as find an idle core: threads that wait for one that waits for a core measure
    the scheduler, and a tenth of the speed."""
    threads = wanted or max(1, min(torch.get_num_threads(), round(timing.idle_cores())))
    if threads < torch.get_num_threads() and not wanted:
        print(f"The machine is busy: {threads} of {torch.get_num_threads()} threads are used.", file=sys.stderr)
    torch.set_num_threads(threads)


def _model(results, device, args, started) -> None:
    try:
        model.folder()
        import transformers  # noqa: F401
    except ImportError as error:
        results.add(rows.Row("model", model.MODEL, "all", "", "", note=f"not measured: {error}"))
        return
    model.lost(results, device)
    if args.what:
        model.run(results, device, tuple(args.dtypes), args.budget)
    else:  # a slow start-up on a busy machine must not eat what the linear layers need
        model.run(results, device, latest_start=started + 0.6 * args.budget)


def _show(results, missed, seconds) -> None:
    """Tables on stdout and as markdown, the plot, and where all of it is."""
    kept = rows.read(results.path)
    ops = {row.op for row in results.rows}
    shown = []
    if "layer" in ops:
        shown += [report.layer_table(results.rows)]
    if "linear" in ops:
        shown += [report.linear_table(results.rows)]
    if "memory" in ops:
        shown += ["Memory of one block\n\n" + report.memory_table(results.rows)]
    if "parts" in ops:
        shown += ["The kernels one by one\n\n" + report.parts_table(results.rows)]
    if "host" in ops:
        shown += ["Microseconds of the host\n\n" + report.host_table(results.rows)]
    if "svd" in ops:
        shown += ["Start-up of one layer\n\n" + report.svd_table(results.rows)]
    if "folders" in ops:
        shown += ["Folders\n\n" + report.folders_table(results.rows)]
    if "peft" in ops:
        shown += ["Small models adapted by PEFT\n\n" + report.model_table(results.rows, "peft")]
        shown += ["\n".join(peft.bars(results.rows))]
    if "model" in ops:
        shown += ["A whole model\n\n" + report.model_table(results.rows)]
    if "rollout" in ops:
        shown += ["Rollouts\n\n" + report.rollout_table(results.rows)]
    if report.barred(results.rows):
        title = f"Geometric means over the shapes of Qwen2.5 at M >= {report.BAR_ROWS}"
        shown += [f"{title}\n\n{report.means_table(results.rows)}", "\n".join(report.bars(results.rows))]
    text = "\n\n".join(shown)
    results.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    report.plot(kept, results.path.with_suffix(".png"))
    report.plot(kept, results.path.with_name(f"{results.path.stem}-layer.png"), "layer", block.PROVIDERS)
    print(f"\n{text}\n")
    noisy = report.noise(results.rows)
    if noisy > NOISY:
        busy = f"The machine was busy: the median cell's p80 is {noisy:.2f} times its p20. Measure again in quiet."
        print(busy, file=sys.stderr)
    if missed:
        print("The budget did not reach:", *missed, sep="\n  ", file=sys.stderr)
    print(f"{len(results.rows)} rows in {seconds:.0f} s: {results.path} (.csv, .md, .png)")


if __name__ == "__main__":
    raise SystemExit(main())
