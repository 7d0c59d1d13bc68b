"""`python -m bench folders`: `tinylora merge` and `convert` on a model folder of real size: seconds, and peak memory.

The model has the shapes of its config and random bf16 weights, in shards of 4 GB; the adapters are PEFT's, with random
factors written in its format (nothing is decomposed: only sizes matter here). Every command is a process of its own, on
the CPU; `peak_mb` is the most that it ever held, Python and torch included. Rows of what merge wrote are compared with
fp64. It takes twice the model's size on the disk.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench import providers as who
from bench.rows import ROOT, Results, Row

RANK, U = {"LoRA": 16, "TinyLoRA": 2}, 13
ALPHA = 32
ROWS = 64  # of a merged weight, compared with fp64


def size_of(config: Path) -> int:
    """Bytes of the model in bf16."""
    from tinylora.integrations.transformers import meta_model

    return 2 * sum(p.numel() for p in meta_model(config).parameters())


def write_base(config: Path, folder: Path, shard: str = "4GB") -> dict[str, tuple[int, ...]]:
    """A model folder with random weights; the shapes of its linear layers in the decoder, by name."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from tinylora.integrations.transformers import meta_model
    from tinylora.nn.targets import find_targets

    model = meta_model(config)
    state = {n: torch.empty(p.shape, dtype=torch.bfloat16, device="meta") for n, p in model.named_parameters()}
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard)
    block = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    folder.mkdir(parents=True)
    for name, names in tqdm(split.filename_to_tensors.items(), desc="writing the model", unit="shard"):
        tensors = {}
        for n in names:
            tensors[n] = t = torch.empty(state[n].shape, dtype=torch.bfloat16)
            for part in t.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(config, folder / "config.json")
    return {n: tuple(layer.weight.shape) for n, layer in find_targets(model, None).items()}


def write_adapter(kind: str, layers: dict[str, tuple[int, ...]], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """PEFT's adapter of this kind with random numbers; (D, U C) of every layer, C folded into U and not rounded."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(1)
    r, tensors, factors = RANK[kind], {}, {}
    v = torch.randn(U, generator=g)
    for name, (N, K) in layers.items():
        down, up = (torch.randn(*shape, generator=g) * 0.02 for shape in ((r, K), (N, r)))
        prefix = f"base_model.model.{name}."
        if kind == "LoRA":
            tensors |= {prefix + "lora_A.weight": down, prefix + "lora_B.weight": up}
            factors[name] = down, up.double() * (ALPHA / r)
        else:
            P = torch.randn(U, r, r, generator=g)
            tensors |= {prefix + "tinylora_A": down, prefix + "tinylora_B": up, prefix + "tinylora_P": P}
            factors[name] = down, up.double() @ torch.einsum("u,uij->ij", v.double(), P.double())
    names = sorted({name.rpartition(".")[2] for name in layers})
    config = {"target_modules": names, "bias": "none", "task_type": "CAUSAL_LM", "r": r}
    if kind == "LoRA":
        config |= {"peft_type": "LORA", "lora_alpha": ALPHA, "lora_dropout": 0.0, "init_lora_weights": True}
    else:
        tensors["base_model.tinylora_v.0"] = v
        config |= {"peft_type": "TINYLORA", "u": U, "weight_tying": 1.0, "save_projection": True}
        config |= {"projection_seed": 0, "tinylora_dropout": 0.0}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


# Not getrusage: what it says of a child begins with the parent's own peak.
COMMAND = """
import re, sys
from pathlib import Path
from tinylora.cli import main
code = main(sys.argv[1:])
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]))
raise SystemExit(code)
"""


def measured(*arguments: object) -> tuple[float, float | None, str]:
    """(seconds, peak MiB, what went wrong) of one `tinylora` command in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", COMMAND, *map(str, arguments)]
    started = time.perf_counter()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))  # as the rows say
    environment = os.environ | threads | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        return seconds, None, f"failed: {done.stderr.strip().splitlines()[-1]}"
    return seconds, int(done.stdout.split()[-1]) / 1024, ""


def differs(base: Path, merged: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> str:
    """What merge got wrong, or "": rows of two weights against fp64, and a weight that it must not touch."""
    from tinylora.integrations.folders import ModelFolder

    old, new = ModelFolder(base), ModelFolder(merged)

    def both(name: str) -> tuple[Tensor, Tensor]:
        return tuple(f.shard_of[name].tensor(name) for f in (old, new))

    for name in (min(factors), max(factors)):
        before, after = both(f"{name}.weight")
        down, up = factors[name]
        rows = torch.linspace(0, len(before) - 1, ROWS).long()
        want = before[rows].double() + up[rows] @ down.double()
        error = ((after[rows].double() - want).abs() / want.abs().clamp(min=1e-3)).max().item()
        if not error <= 2**-8:  # half a unit in the last place of bf16, relative
            return f"wrong: {name} after merge is off by {error:.1e} relative"
    name = next(n for n in old.shard_of if n.removesuffix(".weight") not in factors)
    if not torch.equal(*both(name)):
        return f"wrong: {name} has no adapter and is changed"
    return ""


def run(results: Results, config: Path, parent: Path | None, kinds: tuple[str, ...] = tuple(RANK)) -> None:
    """Rows of op "folders": seconds (as ms) and peak memory of every command, on a model of this config."""
    model = config.stem
    with tempfile.TemporaryDirectory(dir=parent, prefix="tinylora-folders-") as scratch:
        place = Path(scratch)
        needed, free = 2.1 * size_of(config), shutil.disk_usage(place).free
        if free < needed:
            note = f"not measured: {free / 1e9:.3g} GB free in {place.parent}, expected {needed / 1e9:.3g}"
            results.add(Row("folders", model, "", who.OURS, "", note=note))
            return
        layers = write_base(config, place / "base")
        for kind in kinds:
            r, factors = RANK[kind], write_adapter(kind, layers, place / kind)
            base, adapter, out = place / "base", place / kind, place / "out"
            commands = {"merge": ("merge", "--base", base, "--adapter", adapter, "--out", out)}
            for format in ("lora", "tinylora"):
                commands[f"convert to {format}"] = ("convert", adapter, out, "--format", format, "--base", base)
            for pass_, arguments in commands.items():
                seconds, peak, note = measured(*arguments)
                if pass_ == "merge" and not note:
                    note = differs(base, out, factors)
                shutil.rmtree(out, ignore_errors=True)
                row = Row("folders", model, kind, who.OURS, pass_, r=r, u=None if kind == "LoRA" else U, dtype="bf16")
                row.p50_ms, row.peak_mb, row.rounds, row.note = seconds * 1e3, peak, 1, note
                results.add(row)
