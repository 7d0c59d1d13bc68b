"""What two gloo processes do, for tests/test_processes.py: torchrun --nproc-per-node 2 tests/two_ranks.py TINY OUT

TINY holds model/ and data/ (tiny_gsm8k). One start for all, since importing TRL takes longer than training. Each
process writes what it saw to OUT/<scenario>-<rank>.json.
"""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

import tinylora
from tinylora import recipes
from tinylora.integrations import evolving, processes, training
from tinylora.integrations.evaluate import evaluate
from tinylora.integrations.problems import load_problems
from tinylora.integrations.transformers import load_model
from tinylora.integrations.trl import adapter_trainer
from tinylora.nn.model import named_numbers

# What one process and two have to agree on.
SFT = {"batch_size": 4, "micro_batch_size": 2, "steps": 5, "save_every": 3}
# 12 sequences for each process are a group and a half: whoever looks at its own share alone counts wrong.
GRPO = {"batch_size": 24, "micro_batch_size": 6, "steps": 8, "save_every": 2}
GROUP = 8
ES = {"steps": 3, "save_every": 2, "adapter": {"kind": "tinylora", "r": 2, "u": 13, "n_tie": 100}}


def settings(tiny, **more):
    """The recipe on the tiny model, for the commands of tests/test_processes.py, too."""
    found = recipes.load("gsm8k-13") | {"model": str(tiny / "model"), "data": str(tiny / "data"), "dtype": "float32"}
    found["adapter"] |= {"n_tie": 4}
    found |= more
    found["grpo"] |= {"max_completion_length": 10, "learning_rate": 0.02, "num_generations": GROUP}
    found["sft"] |= {"learning_rate": 0.02}
    # Near enough to a model that says digits, and often enough, that one is right whatever a processor made of it.
    found["es"] |= {"max_completion_length": 10, "population": 12, "prompts": 8, "sigma": 0.1, "learning_rate": 0.1}
    return found


class Watch(TrainerCallback):
    """v after every step; and for every step each process's own gradient beside the one that the optimiser gets."""

    def __init__(self):
        self.numbers, self.own, self.local, self.used = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.sums = [torch.zeros_like(p) for p in self.parameters()]
        for i, p in enumerate(self.parameters()):
            p.register_hook(partial(self.add, i))  # before DDP sees it

    def add(self, i, gradient):
        self.sums[i].add_(gradient)

    def parameters(self):
        return tinylora.adapter_parameters(self.model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # clipped already: see max_grad_norm
        self.local.append(flat(self.sums))
        self.used.append(flat([p.grad for p in self.parameters()]))
        for total in self.sums:
            total.zero_()

    def on_step_end(self, args, state, control, **kwargs):
        self.numbers.append(flat(named_numbers(self.model).values()))


def answers(tiny, tensor_parallel=False):
    """What `evaluate` finds, with an adapter that gives several answers: the model by itself has one for all."""
    model, tokenizer = load_model(tiny / "model", "float32", tensor_parallel)
    tinylora.apply(model, tinylora.TinyLoraConfig(u=13, n_tie=100))
    with torch.no_grad():
        for v in tinylora.adapter_parameters(model):
            v.normal_(std=4, generator=torch.Generator().manual_seed(1))
    problems, instruction = load_problems(tiny / "data", "train"), settings(tiny)["instruction"]
    how = {"instruction": instruction, "max_completion_length": 10, "tensor_parallel": tensor_parallel}
    return evaluate(model, tokenizer, problems, batch_size=3, **how)


def flat(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors]).tolist()


def watched_run(command, values, out):
    """`training.run` with the callback above, and with what each scorer gave in this process."""
    watch, given = Watch(), {name: [] for name in ("strict", "lenient")}
    callbacks, reward = training._callbacks, training._reward

    def recorded(name):
        score = reward(name)

        def scored(**columns):
            given[name].append(score(**columns))
            return given[name][-1]

        scored.__name__ = name
        return scored

    training._callbacks, training._reward = lambda path: [*callbacks(path), watch], recorded
    try:
        training.run(command, values, out)
    finally:
        training._callbacks, training._reward = callbacks, reward
    return {"numbers": watch.numbers, "local": watch.local, "used": watch.used, "rewards": given}


def scenarios(tiny, out):
    yield "sft", lambda: watched_run("sft", settings(tiny, **SFT), out / "sft")

    def grpo():
        values = settings(tiny, **GRPO)
        values["grpo"] |= {"max_grad_norm": 1e6}  # so that the gradient is seen as it is
        return watched_run("grpo", values, out / "grpo")

    yield "grpo", grpo

    def adalora():
        values = settings(tiny, **SFT | {"steps": 3})
        values["adapter"] = {"kind": "adalora", "r": 3, "target_r": 2}
        return watched_run("sft", values, out / "adalora")

    yield "adalora", adalora

    def es():
        evolving.run(settings(tiny, **ES), out / "es")

    yield "es", es

    def parallel():
        """The two as one model."""
        values = settings(tiny, **ES)
        values["es"]["tensor_parallel"] = True
        evolving.run(values, out / "parallel")
        return answers(tiny, tensor_parallel=True)

    yield "parallel", parallel

    def script():
        """The user's own: docs/grpo.py, which sends the frozen factors from rank 0 at every forward (DDP's default)."""
        path = Path(__file__).parents[1] / "docs" / "grpo.py"
        data = str(tiny / "data" / "train.jsonl")
        sys.argv = [str(path), str(tiny / "chat"), data, str(out / "script"), "--steps", "2"]
        return {"numbers": [flat(tinylora.adapter_parameters(runpy.run_path(str(path))["model"]))]}

    yield "script", script

    yield "evaluated", lambda: answers(tiny)

    def best():
        """Evaluation in training shares the problems, too, and all go back to the best checkpoint."""
        model, tokenizer = load_model(tiny / "model", "float32")
        rows = Dataset.from_dict({"prompt": ["1 + 1?", "2 + 2?"], "completion": [" two", " four"]})
        args = trl.SFTConfig(
            output_dir=str(out / "best"), use_cpu=True, bf16=False, report_to=[], max_steps=3, learning_rate=0.1,
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
            metric_for_best_model="eval_loss", greater_is_better=True, disable_tqdm=True,
            per_device_train_batch_size=1, per_device_eval_batch_size=1,
        )  # fmt: skip
        trainer = adapter_trainer(trl.SFTTrainer)(
            model=tinylora.apply(model, tinylora.TinyLoraConfig(u=2, n_tie=4)),
            args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        return {"numbers": [flat(named_numbers(model).values())], "best": trainer.state.best_model_checkpoint}

    yield "best", best

    def refused():
        model, tokenizer = load_model(tiny / "model", "float32")
        tinylora.apply(model, tinylora.TinyLoraConfig(n_tie=4))
        rows = Dataset.from_dict({"prompt": ["1 + 1?"], "completion": [" 2"]})
        errors = []
        for more in ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"fsdp": True}):
            args = trl.SFTConfig(output_dir=str(out / "no"), use_cpu=True, bf16=False, report_to=[], **more)
            try:
                adapter_trainer(trl.SFTTrainer)(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
            except ValueError as error:
                errors.append(str(error))
        return {"errors": errors}

    yield "refused", refused


if __name__ == "__main__":
    tiny, out = map(Path, sys.argv[1:])
    for name, scenario in scenarios(tiny, out):
        found = scenario()
        (out / f"{name}-{processes.rank()}.json").write_text(json.dumps(found))
    processes.end()
