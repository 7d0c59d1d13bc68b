"""`tinylora`: what runs here and why, how many numbers an adapter trains; convert, merge, train and score adapters."""

import argparse
import contextlib
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import metadata

import torch
from safetensors import SafetensorError
from tabulate import tabulate

from tinylora import __version__, cli_train
from tinylora.adapters import AdaLoraConfig, LoraConfig, LoraXSConfig, TiedLoraConfig, TinyLoraConfig, VeraConfig
from tinylora.adapters.factor_cache import cache_folder
from tinylora.adapters.tying import TYINGS
from tinylora.integrations import folders
from tinylora.integrations.peft import counts, covered
from tinylora.integrations.transformers import meta_model
from tinylora.nn.checkpoint import FILE, numbers_in, read
from tinylora.nn.targets import find_targets, several_in_one, sites_of
from tinylora.ops import dispatch
from tinylora.ops.four_bit import FEW


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError, SafetensorError) as error:  # the latter two: disks, folders, networks
        print(f"tinylora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tinylora: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinylora", description=__doc__)
    parser.add_argument("--version", action="version", version=f"tinylora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="what runs on this machine and why; or what an adapter file holds")
    info.add_argument("adapter", nargs="?", help=f"a folder with an {FILE}")
    info.set_defaults(run=_info)

    params = commands.add_parser(
        "params",
        help="how many numbers an adapter trains on a model, without loading its weights",
        description="How many numbers an adapter trains on a model, without loading its weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    params.add_argument(
        "--config",
        required=True,
        default=argparse.SUPPRESS,
        help="a config.json, a model folder, or a model's name on the Hub",
    )
    params.add_argument("--r", type=int, nargs="+", default=[2], help="rank of TinyLoRA's and LoRA-XS's frozen factors")
    params.add_argument("--lora-r", type=int, nargs="+", default=[1, 8], help="rank of LoRA, AdaLoRA and Tied-LoRA")
    params.add_argument("--vera-r", type=int, nargs="+", default=[256], help="rank of VeRA")
    params.add_argument("--u", type=int, nargs="+", default=[1], help="TinyLoRA: length of each v")
    params.add_argument("--n-tie", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="TinyLoRA: modules to a v")
    params.add_argument("--tying", choices=TYINGS, default="tiled", help="TinyLoRA: which modules share a v")
    # .0s: the formatter adds a default, None, to whatever does not show one
    what = "names, such as q_proj (default: all linear layers in blocks)%(default).0s"
    params.add_argument("--target-modules", nargs="+", help=what)
    params.set_defaults(run=_params)

    convert = commands.add_parser(
        "convert",
        help="write an adapter in another format: ours, PEFT's own, or a plain LoRA for PEFT, vLLM and SGLang",
        description="Write an adapter folder, ours or PEFT's, in another format. The base model is read a layer at a "
        "time and never loaded.",
    )
    convert.add_argument("adapter", help="a folder that tinylora.save or PEFT's save_pretrained wrote")
    convert.add_argument("out", help="a new folder")
    convert.add_argument("--format", choices=("peft", "lora", "tinylora"), required=True, help="lora: a plain LoRA")
    convert.add_argument("--base", required=True, help="the base model's folder: config.json and safetensors")
    convert.set_defaults(run=_convert)

    merge = commands.add_parser(
        "merge",
        help="write the base model with an adapter in its weights",
        description="Write the base model with an adapter in its weights: summed in fp32, rounded once, 32 MB of a "
        "weight at a time (some 200 MB of memory). An adapter without its frozen factors has them decomposed anew, for "
        "which one weight at a time is read whole.",
    )
    merge.add_argument("--base", required=True, help="the base model's folder: config.json and safetensors")
    merge.add_argument("--adapter", required=True, help="a folder that tinylora.save or PEFT's save_pretrained wrote")
    merge.add_argument("--out", required=True, help="a new folder")
    merge.set_defaults(run=_merge)

    cli_train.add(commands)
    return parser


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """In here SIGTERM is a SystemExit, which passes through every `finally`, where nobody else takes it."""

    def leave(number, frame):
        signal.signal(number, signal.SIG_IGN)  # a second one must not end the clean-up of the first
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@_terminated()
def _convert(options: argparse.Namespace) -> None:
    print(folders.convert(options.adapter, options.out, options.format, options.base))


@_terminated()
def _merge(options: argparse.Namespace) -> None:
    print(folders.merge(options.base, options.adapter, options.out))


def _params(options: argparse.Namespace) -> None:
    model = meta_model(options.config)
    layers = find_targets(model, options.target_modules)
    sites = sites_of(layers)
    total = sum(p.numel() for p in model.parameters())
    rows = [
        ("TinyLoRA", f"r={r} u={u} n_tie={n} {options.tying}", c.count(sites))
        for r in options.r
        for u in options.u
        for n in options.n_tie
        for c in [TinyLoraConfig(r=r, u=u, n_tie=n, tying=options.tying)]
    ]
    others = [("LoRA-XS", f"r={r}", LoraXSConfig(r=r)) for r in options.r]
    others += [("VeRA", f"r={r}", VeraConfig(r=r)) for r in options.vera_r]
    for r in options.lora_r:
        others += [
            *(("Tied-LoRA", f"r={r} {name}", TiedLoraConfig.preset(name, r=r)) for name in ("TL5", "vBuA")),
            ("LoRA", f"r={r}", LoraConfig(r=r)),
            ("AdaLoRA", f"r={r}, at the start", AdaLoraConfig(r=r, target_r=1, total_steps=1)),
        ]
    rows += [(name, what, config.count(sites)) for name, what, config in others]
    rows += [("full fine-tuning", "", total)]
    types = ", ".join(dict.fromkeys(site.name.rpartition(".")[2] for site in sites))
    packed = several_in_one(model) if options.target_modules is None else []
    left = f"; none in {len(packed)} tensors that hold several matrices" if packed else ""
    print(f"{type(model).__name__}: {total:,} parameters, {len(sites)} modules to adapt ({types}){left}\n")
    table = [(name, what, f"{n:,}", _bytes(2 * n), f"{100 * n / total:.3g} %") for name, what, n in rows]
    headers = ("adapter", "settings", "trainable", "in bf16", "of the model")
    print(tabulate(table, headers, colalign=("left", "left", "right", "right", "right")))


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000


def _info(options: argparse.Namespace) -> None:
    print(tabulate(_adapter_rows(options.adapter) if options.adapter else _machine_rows(), tablefmt="plain"))


def _invariant(device: torch.device, path: str) -> str:
    """Whether a row's result can be the same in any company on this device, and how."""
    if path == dispatch.KERNELS:
        return "yes: one launch shape for every number of rows; an error for operands that no kernel takes"
    if device.type == "cpu":
        return "yes: products of a fixed number of rows"
    return "no: an error, since the library's matmul rounds a row by how many there are"


def _adapter_rows(folder: str) -> list[tuple[str, object]]:
    header, tensors = read(f"{folder}/{FILE}")
    trained = numbers_in(tensors)
    unset = {"target_modules": "every linear layer in a block", "groups": "by n_tie", "modules_to_save": "none"}
    return [
        ("adapter", header["config"].pop("kind")),
        *((name, unset.get(name, "") if value is None else value) for name, value in header["config"].items()),
        ("modules", header["modules"]),
        ("trained numbers", sum(t.numel() for t in trained.values())),
        ("frozen factors", "in the file" if header["factors"] else "rebuilt from the base model"),
        ("base model", header["base"]),
        ("written by", f"tinylora {header['tinylora']}, format {header['format']}"),
    ]


def _calls() -> list[tuple[str, str]]:
    """PEFT's layers in this process: `tinylora.cli.main(["info"])` in that which trains shows what ran, and why."""
    found = {kind: {why: n for why, n in ways.items() if n} for kind, ways in counts().items()}
    rows = [(f"calls of {kind}", ", ".join(f"{n} {why}" for why, n in ways.items())) for kind, ways in found.items()]
    where = 'counted in the process that patches: tinylora.cli.main(["info"]) there, or integrations.peft.counts()'
    return [row for row in rows if row[1]] or [("", where)]


def _machine_rows() -> list[tuple[str, object]]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    bf16 = torch.bfloat16

    def route(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        return dispatch.route_on(device, dtype, dtype, dtype, None, 2)

    return [
        ("tinylora", __version__),
        ("python", platform.python_version()),
        *((p, version(p)) for p in ("torch", "triton", "transformers", "peft", "bitsandbytes")),
        ("CPU", f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("GPU", ", ".join(torch.cuda.get_device_name(d) for d in gpus) or "none"),
        *((f"bf16 on {d}", ": ".join(route(d, bf16))) for d in (torch.device("cpu"), *gpus)),
        *((f"fp64 on {d}", ": ".join(route(d, torch.float64))) for d in gpus),
        *((f"batch_invariant on {d}", _invariant(d, route(d, bf16)[0])) for d in (torch.device("cpu"), *gpus)),
        (
            "4-bit bases",
            f"up to {FEW} rows on a GPU by bitsandbytes' product, the correction added; else W is made in x's dtype "
            "for as long as a matmul reads it",
        ),
        ("patch_peft", f"covers {', '.join(covered())}" if version("peft") != "not installed" else "needs peft"),
        *_calls(),
        ("factor cache", cache_folder()),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
