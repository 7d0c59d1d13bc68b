"""`python -m bench analysis`: what LoRA and full fine-tuning learn, forget and change, on a model trained in the run.

In the manner of arXiv 2405.09673, at the size of a laptop: a small Qwen2 learns to predict the bytes of English prose
(Python's own manual, which the interpreter carries); then each contestant trains it on Python source (the standard
library) with one and the same loop. The learning rate of each is chosen on a validation part of the code, the figures
come from test parts of both domains.
"""

import copy
import csv
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import tinylora
from bench.rows import NO_PLOT, commit, device_name, locked, slug
from tinylora import analysis

CONTESTANTS: dict[str, tuple[tinylora.LoraConfig | tinylora.TinyLoraConfig | None, tuple[float, ...]]] = {
    "full fine-tuning": (None, (1e-3, 3e-3)),
    "LoRA r=64": (tinylora.LoraConfig(r=64, alpha=128), (1e-3, 3e-3)),
    "LoRA r=8": (tinylora.LoraConfig(r=8, alpha=16), (3e-3, 1e-2)),
    "LoRA r=1": (tinylora.LoraConfig(r=1, alpha=2), (3e-3, 1e-2)),
    "LoRA-XS r=8": (tinylora.LoraXSConfig(r=8), (1e-2, 3e-2)),
    "TinyLoRA u=13, tied": (tinylora.TinyLoraConfig(u=13, n_tie=1000), (1e-2, 3e-2)),
}
COLUMNS = ("contestant", "lr", "trained", "learned", "forgotten", "distance", "median_effective_rank", "test_loss")
LENGTH, BATCH = 128, 16


def prose() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[k] for k in sorted(topics)).encode()


def code() -> bytes:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-p]*.py"))
    return b"\n".join(f.read_bytes() for f in files)


class Domain:
    """A text as bytes, cut into a training, a validation and a test part, in runs of LENGTH."""

    def __init__(self, text: bytes):
        rows = torch.frombuffer(bytearray(text[: len(text) // LENGTH * LENGTH]), dtype=torch.uint8).view(-1, LENGTH)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].long()
        self.validation, self.test, self.train = rows[:64], rows[64:192], rows[192:]

    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield as_batch(self.train[torch.randint(len(self.train), (BATCH,), generator=g)])


def as_batch(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "labels": rows, "use_cache": False}


def small_qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    return Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=256, tie_word_embeddings=True)
    )


def train(model: nn.Module, parameters: list[nn.Parameter], domain: Domain, steps: int, lr: float, what: str) -> None:
    """The one loop: AdamW, a cosine from lr to zero after a tenth of warm-up, gradients clipped at 1."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    with tqdm(domain.batches(steps, seed=1), total=steps, desc=what, unit="step", leave=False) as bar:
        for batch in bar:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def run(out: Path, pretraining: int = 500, steps: int = 150) -> list[dict]:
    """Train everything; write <out>/analysis/<device>.csv, row by row in .tmp until all are there, and .png; return
    the rows."""
    english, python = Domain(prose()), Domain(code())
    base = small_qwen2()
    train(base, list(base.parameters()), english, pretraining, 3e-3, "pretraining on prose")
    path = out / "analysis" / f"{slug(device_name(torch.device('cpu')))}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, comparisons = [], []
    extra = {"steps": steps, "pretraining": pretraining, "torch": torch.__version__, "commit": commit()}
    fresh = path.with_suffix(".tmp")  # a run that is killed must not take the last one's results with it
    with locked(path), fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *extra], lineterminator="\n")
        writer.writeheader()
        for name, (config, rates) in CONTESTANTS.items():
            tried = []
            for lr in rates:
                model = copy.deepcopy(base)
                if config is None:
                    parameters = list(model.parameters())
                else:
                    parameters = tinylora.adapter_parameters(tinylora.apply(model, config))
                train(model, parameters, python, steps, lr, f"{name}, lr {lr:g}")
                tried.append((analysis.held_out_loss(model, [as_batch(python.validation)]), lr, model))
            _, lr, model = min(tried, key=lambda t: t[0])
            found = analysis.compare(name, base, model, [as_batch(python.test)], [as_batch(english.test)])
            comparisons.append(found)
            row = {
                "contestant": name,
                "lr": lr,
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "learned": round(found.learned, 4),
                "forgotten": round(found.forgotten, 4),
                "distance": round(found.distance, 5),
                "median_effective_rank": found.median_rank,
                "test_loss": round(found.learned_after, 4),
            }
            rows.append(row | extra)
            writer.writerow(rows[-1])
            file.flush()
    fresh.replace(path)
    try:
        analysis.plot(comparisons, path.with_suffix(".png"))
    except ImportError:
        print(NO_PLOT)
    print(tabulate([[row[c] for c in COLUMNS] for row in rows], COLUMNS, tablefmt="github"))
    print(f"{path} (.csv, .png)")
    return rows
