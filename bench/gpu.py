"""`python -m bench gpu`: tests, measurements and tables on a GPU, in stages of at most eight minutes.

Every stage is a command of its own in a process of its own: one that fails, hangs or breaks the device's context leaves
the others alone. <out>/stages.json says what finished, failed or ran out of time, <out>/gpu.log what was printed, and
the rows are in <out>/<gpu>.csv as they are measured. A second call goes on where the first one ended; `--stage` runs
the named ones, again if need be; the table follows whatever ran. Nothing is installed: python3 with torch, triton,
numpy, safetensors, tqdm and tabulate is enough, and what needs PEFT, transformers, pytest or matplotlib says so in its
rows or its log.

A machine that is lent for minutes: `python3 -m bench gpu --stage linear; tar czf $OUT/gpu.tgz -C bench/out gpu` in each
call, and bench/out carried to the next.

A dry run does all of it on the CPU, with small models and launches stubbed out, into a folder for throwing away.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tabulate import tabulate

from bench import report, roofline, shapes, timing, tune
from bench.children import end_with_parent
from bench.rows import OUT, RESULTS, ROOT, Unusable, commit, locked

LIMIT = 480.0  # seconds of a stage
FINISHED, FAILED, LATE, STARTED = "finished", "failed", "out of time", "started"
STATE, LOG, TABLE = "stages.json", "gpu.log", "table.md"
KEPT_EVERY = 5  # seconds
TAIL = 12  # lines of a stage's output that are shown
BIG = ("Qwen2.5-7B", "Qwen2.5-1.5B")


@dataclass(frozen=True)
class Stage:
    """One command.

    bench: arguments of `python -m bench`; tests: of pytest's -k, on tests/test_gpu.py
    dry:   what a dry run appends; None: the command has a dry run of its own, and none here
    keep:  a folder of this checkout that the command writes to, of which <out> gets a copy
    """

    name: str
    what: str
    bench: tuple[str, ...] = ()
    tests: str = ""
    dry: tuple[str, ...] | None = ()
    keep: str = ""

    def arguments(self, out: Path, dry: bool) -> list[str]:
        """For `python -m`."""
        if self.tests:
            # Most of their time is Triton's compiler's, which a process per test or two has on as many cores.
            several = ["-n", "4"] if importlib.util.find_spec("xdist") and not dry else []
            quiet = ["-q", "-p", "no:cacheprovider"]
            return ["pytest", "-m", "gpu", *quiet, *several, str(ROOT / "tests/test_gpu.py"), "-k", self.tests]
        command, *rest = (str(out / word[1:]) if word[0] == "@" else word for word in self.bench)
        place = [] if command == "table" or self.keep else ["--out", str(out)]
        return ["bench", command, *rest, *place, *(self.dry if dry else ())]


CPU = ("--device", "cpu", "--threads", "1")
SMALL = (*CPU, "--budget", "0.1")
ROLLOUT = ("rollout", "--model", "Qwen2.5-1.5B")
FEW = ("--model", "Qwen2.5-0.5B", "--batch", "2", "--adapters", "2", "--new", "2")
STAGES = (
    Stage("numbers", "the kernels against fp64, compiled, past 2^31 elements", tests="numbers or compile or offsets"),
    Stage("repeat", "the same bits on every run, CUDA graphs, streams", tests="repeatable or graph or streams"),
    Stage(
        "layers",
        "layers that keep their operands, four bits, static caches",
        tests="keeps_its_operands or four_bits or static_cache or leading",
    ),
    Stage("sanitizer", "compute-sanitizer, where it is installed", tests="sanitizer"),
    Stage(
        "parts",
        "the device's ceilings; fused matmul, thin pass and decode against the library",
        ("parts", "--models", *BIG, "--budget", "330"),
        dry=(*SMALL, "--stubbed", "--models", "Qwen2.5-0.5B"),
    ),
    # Its table is used from then on; it goes on where it stopped, and is not finished until no cell is left.
    Stage("tune", "the table of launch shapes", ("tune", "--minutes", "7"), dry=None, keep="kernels/tables"),
    Stage(
        "linear",
        "one layer, every shape",
        ("linear", "--models", *BIG, "--dtypes", "bf16", "--budget", "360"),
        dry=(*SMALL, "--models", "Qwen2.5-0.5B", "--M", "4", "--providers", "bare", "peft", "plain", "ours"),
    ),
    Stage(
        "layer",
        "the seven layers of a block, many rows",
        ("layer", "--models", *BIG, "--dtypes", "bf16", "--M", "128", "1024", "8192", "--budget", "390"),
        dry=(*SMALL, "--models", "Qwen2.5-0.5B", "--M", "8", "--providers", "bare", "addmm", "ours"),
    ),
    Stage(
        "decode",
        "the same, few rows, eager and captured",
        ("layer", "--models", *BIG, "--dtypes", "bf16", "--M", "1", "8", "16", "32", "--budget", "390"),
        dry=(*SMALL, "--models", "Qwen2.5-0.5B", "--M", "1", "--providers", "bare", "addmm", "ours"),
    ),
    Stage(
        "four bits",
        "the same on a base in NF4, if bitsandbytes is there",
        ("layer", "--models", BIG[0], "--dtypes", "nf4", "--M", "1", "8", "16", "64", "2048", "--budget", "200"),
        dry=(*SMALL, "--models", "Qwen2.5-0.5B", "--M", "1"),
    ),
    Stage("host", "microseconds of the host per call", ("host", "--dtype", "bf16", "--budget", "60"), dry=SMALL),
    Stage(
        "memory",
        "what is kept for the backward, and the peak",
        ("memory", "--models", *BIG, "--M", "8192"),
        dry=(*CPU, "--models", "Qwen2.5-0.5B", "--M", "8"),
    ),
    Stage(
        "rollout",
        "tokens per second with adapters in place",
        (*ROLLOUT, "--questions", "speed", "--batch", "64", "--adapters", "64", "--new", "32", "--budget", "90"),
        dry=(*SMALL, *FEW),
    ),
    Stage(
        "agreement",
        "log-probabilities of rollouts against training, and what makes them differ",
        (*ROLLOUT, "--questions", "agreement", "operations", "--batch", "8", "--new", "16", "--blocks", "8"),
        dry=(*CPU, *FEW, "--blocks", "1"),
    ),
    Stage("table", f"all of it as {TABLE}", ("table", "--results", "@", "--readme", f"@{TABLE}")),
)
NAMES = tuple(stage.name for stage in STAGES)


def run(out: Path | None, names: tuple[str, ...], dry: bool, known: tuple[str, ...], limit: float = LIMIT) -> int:
    """Run the stages named, or all that have not finished; 1 if one of them did not finish, else 0.

    known: the commands that `python -m bench` has; a stage of another one is left out, and said so.
    """
    if dry and out is None:
        out = Path(tempfile.mkdtemp(prefix="bench-gpu-dry-run-"))
    out = (out or OUT / "gpu").resolve()
    if dry and out.is_relative_to(RESULTS.resolve()):
        raise Unusable(f"out is {out}, expected another folder than bench/results for a dry run: it measures nothing")
    with locked(out / STATE):
        return _run(out, names, dry, known, limit)


def _run(out: Path, names: tuple[str, ...], dry: bool, known: tuple[str, ...], limit: float) -> int:
    state = read(out)
    if state and state.get("dry_run") != dry:
        raise Unusable(f"{out} holds {'a dry run' if state['dry_run'] else 'measurements'}, expected the other kind")
    state = {"dry_run": dry, "stages": state.get("stages", {})}
    lines, good, ran = [], True, False
    for stage in STAGES:
        before = state["stages"].get(stage.name, {})
        stale = ran and stage.name == "table"  # whatever was written before does not hold what this call measured
        if names and stage.name not in names and not stale:
            continue
        if stage.bench and stage.bench[0] not in known:
            lines.append([stage.name, f"left out: there is no `python -m bench {stage.bench[0]}`", "", ""])
            continue
        if dry and stage.dry is None:
            lines.append([stage.name, "left out: the command has a dry run of its own", "", ""])
            continue
        if not names and before.get("status") == FINISHED and not stale:
            lines.append([stage.name, f"{FINISHED} before, at {before['commit']}", f"{before['seconds']:.0f}", ""])
            continue
        print(f"{stage.name}: {stage.what}", flush=True)
        entry = {"status": STARTED, "commit": commit(), "arguments": stage.arguments(out, dry)}
        state["stages"][stage.name] = entry
        write(out, state)
        started = time.perf_counter()
        with (out / LOG).open("a") as log:
            log.write(f"\n=== {stage.name}: python -m {' '.join(entry['arguments'])}\n")
            log.flush()
            if stage.name == "table" and not (out / TABLE).exists():
                (out / TABLE).write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")

            def keep(stage=stage):
                if stage.keep and (ROOT / stage.keep).is_dir():
                    passing = shutil.ignore_patterns(".*", "*.tmp")  # gone before they are copied
                    shutil.copytree(ROOT / stage.keep, out / Path(stage.keep).name, ignore=passing, dirs_exist_ok=True)

            rc = _here(entry["arguments"], log) if dry else _process(entry["arguments"], log, limit, keep)
        keep()
        ran = True
        entry |= {"status": LATE if rc in (None, tune.LEFT) else FAILED if rc else FINISHED, "rc": rc}
        entry["seconds"] = round(time.perf_counter() - started, 1)
        write(out, state)
        good &= entry["status"] == FINISHED
        lines.append([stage.name, entry["status"], f"{entry['seconds']:.0f}", "" if rc is None else rc])
        print("\n".join(f"    {line}" for line in _tail(out / LOG, stage.name)), flush=True)
    print("\n" + tabulate(lines, ["stage", "status", "seconds", "rc"], tablefmt="github"))
    print(f"{out}: {STATE}, {LOG}" + (", a dry run: nothing in it is a measurement of a GPU" if dry else ""))
    return 0 if good else 1


def read(out: Path) -> dict:
    """What stages.json holds; empty if there is none."""
    try:
        return json.loads((out / STATE).read_text()) if (out / STATE).exists() else {}
    except ValueError as error:
        raise Unusable(f"{out / STATE} is not JSON ({error}), expected what a run wrote, or none") from None


def write(out: Path, state: dict) -> None:
    fresh = out / f"{STATE}.tmp"
    fresh.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    fresh.replace(out / STATE)


def _tail(log: Path, name: str) -> list[str]:
    """The last lines of a stage's own part of the log."""
    own = log.read_text(errors="replace").rsplit(f"\n=== {name}:", 1)[-1].splitlines()[1:]
    return own[-TAIL:]


def _process(arguments: list[str], log, limit: float, keep: Callable[[], None]) -> int | None:
    """The exit status of `python -m arguments`, or None where it had to be stopped after `limit` seconds. keep() is
    called every few seconds: what a stage writes is safe although the machine may be gone before the stage ends."""
    environment = os.environ | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", *arguments]

    def apart() -> None:
        os.setpgrp()  # a group of its own, so that what the stage started (a sanitizer, compilers) ends with it
        end_with_parent()

    with terminated():
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=apart
        )
        try:
            for left in range(int(limit), 0, -KEPT_EVERY):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(min(left, KEPT_EVERY))
                keep()
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """In here SIGTERM is a SystemExit, which passes through every `finally`."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _here(arguments: list[str], log) -> int:
    """The same in this process: a dry run is over before a dozen interpreters have imported torch."""
    module, *rest = arguments
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), small_models():
        try:
            if module == "pytest":
                import pytest

                return int(pytest.main(rest))
            from bench.__main__ import INTERRUPTED, main

            rc = main(rest)
            if rc == INTERRUPTED:
                raise KeyboardInterrupt
            return rc
        except Exception:
            traceback.print_exc(file=log)
            return 1


@contextlib.contextmanager
def small_models() -> Iterator[None]:
    """Models, buffers and round counts that a CPU is through with at once."""
    config = shapes.config

    def small(model: str) -> dict:
        values = dict(config(model))
        values |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
        return values | {"num_attention_heads": 4, "num_key_value_heads": 2}

    patches = [
        mock.patch.object(shapes, "config", small),
        mock.patch.object(timing, "MIN_ROUNDS", 1),
        mock.patch.object(timing, "MAX_ROUNDS", 1),
        mock.patch.object(timing, "buffers_past_cache", lambda size, device: 1),
        mock.patch.object(timing, "last_level_cache", lambda device: 1 << 16),
        mock.patch.dict(roofline.SIZES, {"cpu": (1 << 12, 32)}),
    ]
    shapes.layers.cache_clear()  # they remember what the config said
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    finally:
        shapes.layers.cache_clear()
