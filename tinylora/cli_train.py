"""`tinylora train` and `tinylora eval`: a run in a folder, and what a model and an adapter score."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from tabulate import tabulate

from tinylora import recipes
from tinylora.adapters import CONFIGS
from tinylora.adapters.files import write_whole
from tinylora.integrations import evaluate, evolving, processes, run_folder, training
from tinylora.integrations.optional import needed
from tinylora.integrations.peft_files import load
from tinylora.integrations.problems import load_problems
from tinylora.integrations.transformers import load_model
from tinylora.tasks import gsm8k

# Flags that stand for a value of the recipe, by its name there. The value's own default is the recipe's.
_COMMON = {
    "model": (str, "model", "a model folder, or a name on the Hub"),
    "data": (str, "data", "GSM8K: a folder, a .jsonl file, or a name on the Hub"),
    "steps": (int, "steps", "optimiser steps"),
    "seed": (int, "seed", "of the adapter, the order of the data and the sampling"),
    "dtype": (str, "dtype", "of the frozen base: bfloat16, float16, float32 or nf4; v is fp32"),
    "batch-size": (int, "batch_size", "sequences in a step, of all processes: for GRPO prompts times group size"),
    "micro-batch-size": (int, "micro_batch_size", "sequences in one forward and backward of a process, at most"),
    "save-every": (int, "save_every", "steps between checkpoints"),
    "r": (int, "adapter.r", "rank"),
    "u": (int, "adapter.u", "TinyLoRA: length of each v"),
    "n-tie": (int, "adapter.n_tie", "TinyLoRA: modules to a v"),
}
_OF = {
    "grpo": {
        "lr": (float, "grpo.learning_rate", "learning rate"),
        "epochs": (float, "grpo.num_train_epochs", "passes over the data"),
        "group-size": (int, "grpo.num_generations", "completions of each prompt"),
        "max-completion-length": (int, "grpo.max_completion_length", "tokens"),
        "cache": (str, "grpo.cache_implementation", "static: decode steps are compiled, on a GPU into CUDA graphs"),
        "vllm": (bool, "grpo.use_vllm", "vLLM samples, with the adapter unmerged, beside training on each GPU"),
        "reward": (str, "reward", f"which scorer rewards: {' or '.join(gsm8k.SCORERS)}; both are logged"),
    },
    "sft": {
        "lr": (float, "sft.learning_rate", "learning rate"),
        "epochs": (float, "sft.num_train_epochs", "passes over the data"),
        "max-length": (
            int,
            "sft.max_length",
            "tokens of a problem with its solution; without any of that, left out",
        ),
    },
}
_OF["es"] = {
    "steps": (int, "steps", "generations"),
    "lr": (float, "es.learning_rate", "length of a step, in the units of v"),
    "sigma": (float, "es.sigma", "how far from v the perturbed adapters are"),
    "population": (int, "es.population", "perturbed adapters in a generation, an even number"),
    "prompts": (int, "es.prompts", "problems in a generation, the same for each of them"),
    "temperature": (float, "es.temperature", "of the answers; 0 is greedy"),
    "epochs": (float, "es.num_train_epochs", "passes over the data"),
    "max-completion-length": (int, "es.max_completion_length", "tokens"),
    "cache": (str, "es.cache_implementation", _OF["grpo"]["cache"][2]),
    "tensor-parallel": (bool, "es.tensor_parallel", "all processes hold one model, where a GPU cannot"),
    "reward": _OF["grpo"]["reward"],
}
_NOT_OF = {"es": ("batch-size", "micro-batch-size")}
_HELP = {
    "grpo": "reinforcement learning: sampled answers, rewarded if right (TRL's GRPOTrainer)",
    "sft": "supervised fine-tuning on the data's own solutions (TRL's SFTTrainer)",
    "es": "evolution strategies: no gradients, every perturbed adapter of a generation in one generate()",
}


def _flags(command: str) -> dict[str, tuple]:
    """The flags of a command that stand for a value of the recipe."""
    return {flag: what for flag, what in (_COMMON | _OF[command]).items() if flag not in _NOT_OF.get(command, ())}


def add(commands) -> None:
    """Add `train` and `eval` to the subparsers of `tinylora`."""
    train = commands.add_parser("train", help="train an adapter: grpo, sft or es")
    kinds = train.add_subparsers(required=True, metavar="method")
    for command, about in _HELP.items():
        _add_training(kinds, command, about)
    _add_eval(commands)


def _add_training(kinds, command: str, about: str) -> None:
    parser = kinds.add_parser(
        command,
        help=about,
        description=f"{about}. What no flag says is the recipe's. A run killed at any moment goes on with --resume "
        "and gives the curve of one that was not. The result is OUT/adapter, the log OUT/log.jsonl. Several GPUs: "
        f"torchrun --standalone --nproc-per-node 8 -m tinylora train {command} ...; the processes share the "
        + ("generation." if command == "es" else "batch."),
    )
    parser.add_argument("--out", required=True, help="the run's folder")
    known = ", ".join(recipes.names())
    parser.add_argument("--recipe", help=f"{known}, or a JSON file of your own (default: {recipes.DEFAULT})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT, with its own settings")
    parser.add_argument(
        "--adapter",
        dest="adapter.kind",
        choices=[kind for kind, config in CONFIGS.items() if command != "es" or config.adapter_class.core_alone_trains],
        help="default: the recipe's; another kind has its own defaults"
        + (". Of those whose core alone trains" if command == "es" else ""),
    )
    values = recipes.load(recipes.DEFAULT)
    for flag, (kind, name, what) in _flags(command).items():
        if kind is bool:  # of the machine and not of the recipe
            how = {"action": "store_true", "default": None, "help": what}
        else:
            default = f"{recipes.DEFAULT}: {_get(values, name)}" if name != "steps" else "the recipe's epochs"
            how = {"type": kind, "metavar": kind.__name__.upper(), "help": f"{what} ({default})"}
        parser.add_argument(f"--{flag}", dest=name, **how)
    parser.set_defaults(run=_train, command=command)


def _train(options: argparse.Namespace) -> None:
    flags = {name for _, name, _ in _flags(options.command).values()} | {"adapter.kind"}
    asked = {n: v for n, v in vars(options).items() if n in flags and v is not None}
    for name in ("model", "data"):  # a run may be resumed from elsewhere
        if name in asked and Path(asked[name]).exists():
            asked[name] = str(Path(asked[name]).resolve())
    if options.resume:
        if options.recipe:
            raise ValueError("--resume goes on with the run's own settings, expected no --recipe")
        settings = training.resumed(options.command, options.out, asked)
    else:
        settings = recipes.load(options.recipe or recipes.DEFAULT)
        kind = settings["adapter"].get("kind")
        if asked.get("adapter.kind", kind) != kind:
            settings["adapter"] = {}  # another adapter's own defaults: the recipe's are not meant for it
        for name, value in asked.items():
            section, _, key = name.rpartition(".")
            (settings[section] if section else settings)[key] = value
        for name in ("model", "data"):
            if Path(settings[name]).exists():
                settings[name] = str(Path(settings[name]).resolve())
        if options.recipe:  # for who scores the result: the prompt is the recipe's
            own = Path(options.recipe)
            settings["recipe"] = str(own.resolve()) if own.is_file() else options.recipe
    if options.command == "es":
        folder = evolving.run(settings, options.out, options.resume)
    else:
        folder = training.run(options.command, settings, options.out, options.resume)
    processes.end()
    if processes.rank() == 0:
        names = [name for name in ("model", "dtype", "data", "recipe") if name in settings]
        command = ["tinylora", "eval", *(part for name in names for part in (f"--{name}", settings[name]))]
        if options.command == "es" and settings["es"].get("tensor_parallel"):
            launcher = ["torchrun", "--standalone", "--nproc-per-node", str(processes.count()), "-m"]
            command = [*launcher, *command, "--tensor-parallel"]
        print(f"{folder}: score it with {shlex.join([*command, '--adapter', str(folder)])}")


def _add_eval(commands) -> None:
    values = recipes.load(recipes.DEFAULT)
    parser = commands.add_parser(
        "eval",
        help="what a model scores on GSM8K, with an adapter or without: pass@1, strict and lenient",
        description="pass@1 on GSM8K by both scorers, with 95 % confidence intervals (Wilson): one greedy completion "
        "a problem. strict counts the right number behind ####, as the prompt asks for; lenient takes the text's last "
        "number where nothing stands behind ####. Several GPUs: torchrun --standalone --nproc-per-node 8 -m tinylora "
        "eval ...; the processes share problems.",
    )
    parser.add_argument("--model", help=f"a model folder, or a name on the Hub ({values['model']})")
    parser.add_argument("--adapter", help="a folder that tinylora.save, a run or PEFT's save_pretrained wrote")
    parser.add_argument("--data", help=f"a folder, a .jsonl file, or a name on the Hub ({values['data']})")
    parser.add_argument("--split", help=f"({values['eval']['split']})")
    parser.add_argument("--scorer", choices=("both", *gsm8k.SCORERS), default="both", help="which to print")
    parser.add_argument("--limit", type=int, help="the first so many problems alone")
    parser.add_argument("--batch-size", type=int, help=f"problems at once ({values['eval']['batch_size']})")
    parser.add_argument("--max-completion-length", type=int, help=f"({values['eval']['max_completion_length']})")
    parser.add_argument("--dtype", help=f"of the base: bfloat16, float16, float32 or nf4 ({values['dtype']})")
    parser.add_argument("--cache", choices=("static",), help="decode steps are compiled, on a GPU into CUDA graphs")
    parser.add_argument("--tensor-parallel", action="store_true", help=_OF["es"]["tensor-parallel"][2])
    parser.add_argument("--vllm", action="store_true", help="vLLM answers, with the adapter unmerged")
    parser.add_argument("--recipe", default=recipes.DEFAULT, help="where the prompt and the defaults are from")
    parser.add_argument("--out", help="a JSON file for the scores, the settings and every completion")
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> None:
    settings = recipes.load(options.recipe)
    settings |= {n: getattr(options, n) for n in ("model", "data", "dtype") if getattr(options, n) is not None}
    own = ("split", "batch_size", "max_completion_length")
    settings["eval"] |= {n: getattr(options, n) for n in own if getattr(options, n) is not None}
    for name in ("limit", "batch_size", "max_completion_length"):
        value = options.limit if name == "limit" else settings["eval"][name]
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if options.split and Path(settings["data"]).is_file():
        raise ValueError(
            f"split is {options.split!r}, but {settings['data']} is one file, expected a folder or no split"
        )
    if options.adapter and not Path(options.adapter).is_dir():
        raise ValueError(f"adapter is {options.adapter!r}, expected a folder with an adapter in it")
    if options.out and Path(options.out).exists():
        raise ValueError(f"{options.out} exists, expected a new file to write to")
    if options.out:  # said before hours of generating, not after
        run_folder.writable(Path(options.out).parent)
    if options.vllm:
        needed("vllm", "vllm", "--vllm")
        other = {"--cache": options.cache, "--tensor-parallel": options.tensor_parallel}
        other |= {"--batch-size": options.batch_size, "nf4": settings["dtype"] == "nf4"}
        for what in (what for what, given in other.items() if given):
            raise ValueError(f"{what} is asked for with --vllm, expected one of the two")
    problems = load_problems(settings["data"], settings["eval"]["split"])[: options.limit]
    processes.start()
    together = options.tensor_parallel
    model, tokenizer = load_model(settings["model"], settings["dtype"], together)
    if options.adapter:
        with processes.one_first(together):
            load(model, options.adapter)
    found = evaluate.evaluate(
        model,
        tokenizer,
        problems,
        instruction=settings["instruction"],
        max_completion_length=settings["eval"]["max_completion_length"],
        batch_size=settings["eval"]["batch_size"],
        cache=options.cache,
        tensor_parallel=together,
        by_vllm=options.vllm,
    )
    processes.end()
    if processes.rank() > 0:
        return
    rows = [
        (name, f"{s['correct']} of {found['problems']}", f"{s['pass@1']:.1%}", f"{s['low']:.1%} to {s['high']:.1%}")
        for name, s in found["scores"].items()
        if options.scorer in ("both", name)
    ]
    print(tabulate(rows, ("scorer", "correct", "pass@1", "95 % interval"), disable_numparse=True))
    if options.out:
        what = {"model": settings["model"], "adapter": options.adapter, "data": settings["data"]} | settings["eval"]
        what |= {"dtype": settings["dtype"], "instruction": settings["instruction"], "versions": run_folder.versions()}
        text = json.dumps(what | found, indent=1, ensure_ascii=False) + "\n"
        print(write_whole(Path(options.out), lambda path: Path(path).write_text(text, "utf-8", "surrogateescape")))


def _get(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values
