"""Training through TRL: a tiny model that speaks GSM8K's format, a dozen problems, the command line, kill -9."""

import contextlib
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_gsm8k
import torch
from models import qwen2

import tinylora
from tinylora import cli, recipes
from tinylora.integrations import evaluate, peft, run_folder, training
from tinylora.integrations.problems import load_problems
from tinylora.integrations.transformers import load_model
from tinylora.integrations.trl import adapter_trainer, last_checkpoint, load_adapter, save_adapter
from tinylora.nn.model import named_numbers
from tinylora.tasks import gsm8k

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_gsm8k.write_problems(folder / "data")
    tiny_gsm8k.write_model(folder / "model")
    return folder


def flags(tiny, out, steps, **more):
    values = {"model": tiny / "model", "data": tiny / "data", "out": out, "steps": steps, "batch_size": 16, "lr": 0.02,
              "save_every": 2, "n_tie": 4} | more  # fmt: skip
    given = {key: value for key, value in values.items() if value is not None}
    return [str(x) for key, value in given.items() for x in (f"--{key.replace('_', '-')}", value)]


def train(tiny, out, steps, command="grpo", resume=False, **more):
    more = {"max_completion_length": 10} | more if command == "grpo" else more
    arguments = [] if not resume else ["--resume"]
    return cli.main(["train", command, *flags(tiny, out, steps, **more), *arguments])


def settings(tiny, command="grpo", **more):
    found = recipes.load("gsm8k-13") | {"model": str(tiny / "model"), "data": str(tiny / "data"), "steps": 3}
    found |= {"batch_size": 16, "save_every": 2, "dtype": "float32"} | more
    found["grpo"] |= {"max_completion_length": 10, "learning_rate": 0.02}
    found["sft"] |= {"learning_rate": 0.02}
    return found


def curve(out):
    """A run's log without what depends on the clock."""
    return [{k: v for k, v in e.items() if "time" not in k and "per_second" not in k} for e in log(out)]


def log(out):
    return run_folder.read_log(Path(out) / "log.jsonl")


def bytes_of(model):
    """A hash of everything but the adapters' numbers."""
    sha = hashlib.sha256()
    for name, t in model.state_dict().items():
        if not name.startswith("tinylora.") and ".adapters." not in name:
            sha.update(name.encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def test_the_recipe_runs_from_end_to_end_and_eval_scores_it(tiny, tmp_path, capsys):
    """What the main run does, with another model and other data: only these are missing here."""
    assert train(tiny, tmp_path / "run", 6) == 0
    printed = capsys.readouterr().out
    assert "grpo: 4 numbers train, 12 problems, 6 steps" in printed and "step 6/6" in printed
    entries = log(tmp_path / "run")
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 5, 6]
    for entry in entries:
        assert entry["reward"] == entry["strict"] <= entry["lenient"]
        assert {"loss", "learning_rate", "completions/mean_length"} <= entry.keys()
    without = [e["groups_without_signal"] for e in entries]
    assert min(without) < 1 and all(4 * w == int(4 * w) for w in without), "a fraction of 4 groups"
    assert max(e["reward"] for e in entries) > 0

    model, tokenizer = load_model(tiny / "model", "bfloat16")
    tinylora.load(model, tmp_path / "run" / "adapter")
    v = tinylora.adapter_parameters(model)
    assert len(v) == 4 and all(p.dtype == torch.float32 and p.abs() > 0 for p in v)

    arguments = ["eval", "--model", str(tiny / "model"), "--data", str(tiny / "data"), "--split", "train"]
    arguments += ["--max-completion-length", "10", "--adapter", str(tmp_path / "run" / "adapter")]
    assert cli.main([*arguments, "--out", str(tmp_path / "scores.json")]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["problems"] == 12 and found["adapter"].endswith("adapter")
    for name in ("strict", "lenient"):
        score = found["scores"][name]
        assert score["correct"] == sum(c[name] for c in found["completions"])
        assert 0 <= score["low"] < score["pass@1"] < score["high"] <= 1 or score["correct"] in (0, 12)
        assert f"{score['correct']} of 12" in capsys.readouterr().out or name == "lenient"
    assert cli.main([*arguments, "--out", str(tmp_path / "scores.json")]) == 2
    assert "scores.json exists" in capsys.readouterr().err


def test_kill_9_in_the_middle_and_resume_give_the_curve_of_an_uninterrupted_run(tiny, tmp_path, capsys):
    steps = 12  # three steps are an epoch: the kill comes in the second, where TRL by itself would repeat the first
    command = [sys.executable, "-m", "tinylora.cli", "train", "grpo", *flags(tiny, tmp_path / "killed", steps)]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, "--max-completion-length", "10"], stdout=output, stderr=output, cwd=Path(__file__).parents[1]
        )
        while process.poll() is None and len(log(tmp_path / "killed")) < 5:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()[-3000:]
    done = len(log(tmp_path / "killed"))
    assert 5 <= done < steps and not (tmp_path / "killed" / "adapter").exists()
    assert last_checkpoint(tmp_path / "killed") is not None
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a line that was being written

    assert train(tiny, tmp_path / "killed", steps, resume=True) == 0
    assert "resumed from checkpoint-" in capsys.readouterr().out
    assert train(tiny, tmp_path / "whole", steps) == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert len({e["reward"] for e in log(tmp_path / "whole")}) > 2, "a curve that says nothing"
    ours, theirs = (load_numbers(tmp_path / run / "adapter") for run in ("killed", "whole"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    (tmp_path / "whole" / "adapter" / "adapter.safetensors").unlink()
    assert train(tiny, tmp_path / "whole", steps, resume=True) == 0, "killed when all was done but the result"
    assert len(log(tmp_path / "whole")) == steps
    again = load_numbers(tmp_path / "whole" / "adapter")
    assert all(torch.equal(again[n], theirs[n]) for n in theirs)


def load_numbers(folder):
    return tinylora.nn.checkpoint.read(folder / "adapter.safetensors")[1]


class Stop(Exception):
    pass


@contextlib.contextmanager
def stopped_after(monkeypatch, steps):
    """An exception at the end of a step: the process lives on, the run does not."""
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step == steps:
                raise Stop

    with monkeypatch.context() as patch:
        original = training._callbacks
        patch.setattr(training, "_callbacks", lambda path: [*original(path), Stopper()])
        with pytest.raises(Stop):
            yield


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("sft", {}),
        ("grpo", {"adapter": "adalora", "n_tie": None}),
        ("sft", {"adapter": "tied-lora", "r": 2, "n_tie": None}),
    ],
)
def test_any_adapter_resumes(command, more, tiny, tmp_path, monkeypatch):
    more = {k: v for k, v in ({"n_tie": 4} | more).items() if v is not None}

    def go(out, resume=False):
        arguments = ["train", command, "--model", tiny / "model", "--data", tiny / "data", "--out", out, "--steps", 4]
        arguments += ["--batch-size", 8, "--lr", 0.01, "--save-every", 2, "--resume" if resume else "--seed=3"]
        arguments += ["--max-completion-length", 10] if command == "grpo" else []
        for key, value in more.items():
            arguments += [f"--{key.replace('_', '-')}", value]
        return cli.main([str(a) for a in arguments])

    with stopped_after(monkeypatch, 3):
        go(tmp_path / "stopped")
    assert go(tmp_path / "stopped", resume=True) == 0 == go(tmp_path / "whole")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert [e["step"] for e in log(tmp_path / "whole")] == [1, 2, 3, 4]
    ours, theirs = (load_numbers(tmp_path / run / "adapter") for run in ("stopped", "whole"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    if command == "sft":
        assert all(e["loss"] > 0 and e["grad_norm"] > 0 for e in log(tmp_path / "whole"))


def test_a_run_says_why_it_does_not_start(tiny, tmp_path, capsys, monkeypatch):
    def fails(message, steps=1, command="grpo", **more):
        assert train(tiny, tmp_path / "run", steps, command, **more) == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1, error

    fails("does not exist, expected the folder of a run to resume", resume=True)
    fails("a step takes 16", batch_size=64)
    fails("steps is 0, expected an integer of at least 1", steps=0)
    for command in ("grpo", "sft"):
        fails(f"{command}.num_train_epochs is -1.0, expected a number above 0", steps=None, epochs=-1, command=command)
        fails("save_every is 0, expected an integer of at least 1", save_every=0, command=command)
        fails(f"{command}.learning_rate is nan, expected a number above 0", lr="nan", command=command)
    fails("grpo.num_generations is 1, expected an integer of at least 2", group_size=1)

    def refuses(message, section="grpo", command="grpo", steps=1, **changed):
        """A recipe's values of a section; None takes a key out."""

        def change(recipe):
            for name, value in changed.items():
                recipe[section].pop(name, None)
                if value is not None:
                    recipe[section][name] = {"value": value, "source": "ours", "note": ""}

        fails(message, recipe=write_recipe(tmp_path, change), command=command, steps=steps)

    refuses("save_every is 2, expected a multiple of 3, the steps that grpo's samples serve", num_iterations=3)
    refuses(
        "save_every is 2, expected a multiple of 4, the steps that grpo's", steps_per_generation=4, num_iterations=2
    )
    refuses("save_every is 2, expected a multiple of 4, the steps that grpo's samples", generation_batch_size=64)
    refuses("grpo.num_generations is '4', expected an integer of at least 2", num_generations="4")
    refuses("grpo.num_generations is missing", num_generations=None)
    refuses("sft.num_train_epochs is missing", section="sft", command="sft", steps=None, num_train_epochs=None)
    refuses("adapter kind is None, expected one of tinylora", section="adapter", kind=None)
    refuses("grpo.seed is in the recipe, expected the recipe's seed", seed=7)
    refuses("grpo.reward_weights is in the recipe, expected the recipe's reward", reward_weights=[0.5, 0.5])
    refuses("grpo.bf16 is in the recipe, expected none: it is the run's own", bf16=True)
    refuses("grpo.save_only_model is True, expected none: no run resumes with it", save_only_model=True)
    refuses("grpo.train_sampling_strategy is 'group_by_length'", train_sampling_strategy="group_by_length")
    refuses("grpo.ignore_data_skip is True", ignore_data_skip=True)
    fails("seed is 4294967296, expected less than 2^32", seed=1 << 32)
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        fails("accelerate's mixed_precision is bf16, expected no")
    with run_folder.at_work(tmp_path / "run"):
        fails("another run works in")
    fails("sft.max_length is 0, expected an integer of at least 1", max_length=0, command="sft")
    (tmp_path / "file").write_text("x")
    assert train(tiny, tmp_path / "file" / "run", 1, "grpo") == 2
    assert "cannot be written to" in capsys.readouterr().err
    fails("expected a multiple of num_generations, 4", batch_size=18, micro_batch_size=6)
    fails("expected a multiple of micro_batch_size, 5", micro_batch_size=5)
    fails("reward is 'kind', expected one of strict, lenient", reward="kind")
    fails("expected a model folder with a tokenizer", model=tmp_path)
    fails("dtype is 'int8'", dtype="int8")
    fails("u is 0, expected an integer of 1 or more", u=0)
    fails("LoraConfig", adapter="lora")  # n_tie is not LoRA's
    fails("is unknown", recipe=write_recipe(tmp_path, lambda r: r.update(colour=r["seed"])))
    fails("grpo.colour is no argument of TRL's GRPOConfig", recipe=write_recipe(tmp_path, lambda r: r["grpo"].update(
        colour=r["seed"])))  # fmt: skip
    fails("Invalid `cache_implementation`", cache="colour")
    assert not (tmp_path / "run").exists(), "a run that did not start leaves nothing behind"
    assert train(tiny, tmp_path / "run", 1) == 0
    capsys.readouterr()
    fails("holds a run already (run.json), expected another folder, or --resume")
    fails("seed is 4, but the run in", resume=True, seed=4)
    fails("expected no --recipe", resume=True, recipe="gsm8k-13")
    fails("a run of 'grpo', expected 'sft'", command="sft", resume=True)
    changed = tmp_path / "changed"
    shutil.copytree(tiny / "data", changed)
    moved = json.loads((tmp_path / "run" / "run.json").read_text())
    moved["settings"]["data"] = str(changed)
    (tmp_path / "run" / "run.json").write_text(json.dumps(moved))
    (changed / "train.jsonl").write_text("\n".join((changed / "train.jsonl").read_text().splitlines()[::-1]))
    fails("has other problems than when", resume=True, data=changed)
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        fails("has 1 processes, and now there are 2", resume=True, data=changed)
        (tmp_path / "run").rename(tmp_path / "before")
        fails("batch_size is 15 sequences, expected a multiple of 2: so many processes share it", batch_size=15)
        fails("batch_size is 24, 12 for each of 2 processes, expected a multiple of micro_batch_size, 8", batch_size=24)
        fails("expected a multiple of num_generations, 4", batch_size=6)
        es = ["train", "es", "--data", str(tiny / "data"), "--out", str(tmp_path / "run"), "--population", "2"]
        launched.setenv("WORLD_SIZE", "4")
        assert cli.main(es) == 2 and "es.population is 2, expected at least 4" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "trl", None)
    fails('training needs trl: pip install -e ".[rl]"')


def test_what_sft_leaves_out_is_said_and_a_failed_start_may_be_repeated(tiny, tmp_path, capsys):
    tokenizer, instruction = load_model(tiny / "model", "float32")[1], settings(tiny)["instruction"]
    lengths = sorted(len(tokenizer(gsm8k.prompt(q, instruction)).input_ids) for q, *_ in tiny_gsm8k.PROBLEMS)
    assert train(tiny, tmp_path / "my run", 1, "sft", max_length=2, batch_size=2) == 2
    assert "no problem has a token of its solution within sft.max_length, 2" in capsys.readouterr().err
    assert not (tmp_path / "my run").exists()

    def broken(recipe):
        recipe["grpo"]["loss_type"]["value"] = "colour"

    assert train(tiny, tmp_path / "my run", 1, recipe=write_recipe(tmp_path, broken)) == 2
    assert not (tmp_path / "my run").exists()
    assert train(tiny, tmp_path / "my run", None, "sft", max_length=lengths[6], batch_size=2, epochs=1) == 0
    shown = capsys.readouterr().out
    kept = int(re.search(r"12 problems in (\d+) sequences", shown)[1])
    assert 0 < kept < 12 and f", {-(-kept // 2)} steps" in shown
    assert train(tiny, tmp_path / "ada", None, "sft", max_length=lengths[6], batch_size=2, epochs=1, adapter="adalora",
                 n_tie=None) == 0  # fmt: skip
    header = tinylora.nn.checkpoint.read(tmp_path / "ada" / "adapter" / "adapter.safetensors")[0]
    assert header["config"]["total_steps"] == -(-kept // 2)
    command = shlex.split(shown.rpartition("score it with ")[2])
    assert cli._parser().parse_args(command[1:]).adapter == str(tmp_path / "my run" / "adapter")
    assert command[command.index("--data") + 1] == str(tiny / "data")


def test_a_resumed_run_that_fails_at_once_is_still_a_run(tiny, tmp_path, monkeypatch):
    with stopped_after(monkeypatch, 1):
        train(tiny, tmp_path, 4, save_every=4)
    assert log(tmp_path) and not last_checkpoint(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("trl.GRPOTrainer.training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny, tmp_path, 4, save_every=4, resume=True)
    assert train(tiny, tmp_path, 4, save_every=4, resume=True) == 0


def test_a_child_does_not_hold_a_folder(tmp_path):
    """What a data loader forks may live on for seconds after its parent was killed."""
    with run_folder.at_work(tmp_path / "a" / "b"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        with pytest.raises(ValueError, match="another run works in"), run_folder.at_work(tmp_path / "a" / "b"):
            pass
        assert (tmp_path / "a" / "b").exists()
    try:
        assert not (tmp_path / "a").exists()
        with run_folder.at_work(tmp_path / "a"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_samples_that_serve_several_steps_are_resumed(tiny, tmp_path, capsys):
    """Two epochs are twelve steps then, not six: a run that was killed in the ninth is not done."""

    def twice(recipe):
        recipe["grpo"]["num_iterations"]["value"] = 2

    recipe = write_recipe(tmp_path, twice)
    out, short = tmp_path / "whole", tmp_path / "killed"
    more = {"batch_size": 16, "epochs": 2, "group_size": 8}
    assert train(tiny, out, None, recipe=recipe, **more) == 0
    assert ", 24 steps" in capsys.readouterr().out and len(log(out)) == 24
    shutil.copytree(out, short)
    shutil.rmtree(short / "adapter")
    shutil.rmtree(short / "checkpoint-24")
    assert train(tiny, short, None, resume=True) == 0
    assert curve(short) == curve(out) and ", 24 steps, resumed from checkpoint-22" in capsys.readouterr().out
    ours, theirs = (load_numbers(run / "adapter") for run in (short, out))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("command", ["grpo", "sft", "es"])
@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-best", "log.jsonl", "adapter", "README.md"])
def test_a_folder_of_somebody_elses(name, command, tiny, tmp_path, capsys):
    (tmp_path / name).mkdir()
    arguments = [str(a) for a in ("--out", tmp_path, "--model", tiny / "model", "--data", tiny / "data", "--steps", 1)]
    assert cli.main(["train", command, *arguments]) == 2
    assert f"holds {name} and no run.json, expected another folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]


def write_recipe(folder, change):
    found = {"about": "broken"} | recipes.read("gsm8k-13")
    change(found)
    (folder / "broken.json").write_text(json.dumps(found))
    return folder / "broken.json"


def made(tiny, out, model=None, command="grpo", **more):
    """A trainer over a fresh model with an adapter, through the same function as the command line."""
    values = settings(tiny, command, **more)
    loaded, tokenizer = load_model(tiny / "model", values["dtype"])
    model = model or tinylora.apply(loaded, tinylora.TinyLoraConfig(u=1, n_tie=4))
    return training.make_trainer(command, model, tokenizer, load_problems(tiny / "data", "train"), values, out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollouts_are_unmerged_and_checkpoints_hold_the_adapter_alone(dtype, tiny, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    trainer = made(tiny, tmp_path, dtype=dtype)
    model, seen = trainer.model, set()
    before = bytes_of(model)
    generate = type(model).generate

    def watched(self, *args, **kwargs):
        seen.add(bytes_of(self))
        found = generate(self, *args, **kwargs)
        seen.add(bytes_of(self))
        return found

    monkeypatch.setattr(type(model), "generate", watched)

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.add(bytes_of(model))

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == {before} and bytes_of(model) == before
    assert any(p.abs().item() > 0 for p in tinylora.adapter_parameters(model)), "nothing was trained"
    files = {p.name: p.stat().st_size for p in (tmp_path / "checkpoint-3").iterdir()}
    assert set(files) == {
        "adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"
    }  # fmt: skip
    assert files["adapter.safetensors"] < 2000
    trainer.save_model(tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["adapter.safetensors"]


def test_a_checkpoint_that_was_being_written_is_passed_over(tiny, tmp_path, capsys):
    assert last_checkpoint(tmp_path) is None
    made(tiny, tmp_path).train()
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter.safetensors"):
        path = tmp_path / "checkpoint-3" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert last_checkpoint(tmp_path).name == "checkpoint-2", name
        assert "checkpoint-3 is not whole" in capsys.readouterr().err
        path.unlink()
        if name != "rng_state.pth":  # its name depends on the number of processes
            assert last_checkpoint(tmp_path).name == "checkpoint-2", name
        path.write_bytes(whole)
    assert last_checkpoint(tmp_path).name == "checkpoint-3"


def plain(tiny, out, trainer, model=None, dtype="float32", config=None, **more):
    """A trainer as in a user's own code: no recipe, TRL's own defaults."""
    import trl
    from datasets import Dataset

    loaded, tokenizer = load_model(tiny / "model", dtype)
    model = model or tinylora.apply(loaded, config or tinylora.TinyLoraConfig(u=2, n_tie=4))
    prompts = [q + " Let's think step by step and output the final answer after \"####\"." for q, *_ in
               tiny_gsm8k.PROBLEMS]  # fmt: skip
    args = {"output_dir": str(out), "use_cpu": True, "report_to": [], "max_steps": 2, "num_generations": 4,
            "per_device_train_batch_size": 16, "max_completion_length": 10, "learning_rate": 0.02, "logging_steps": 1,
            "save_strategy": "no", "disable_tqdm": True} | more  # fmt: skip
    return trainer(
        model=model,
        reward_funcs=lambda completions, **_: [float("7" in c or "3" in c) for c in completions],
        args=trl.GRPOConfig(**args),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        ("float32", {"bf16": True}),
        ("bfloat16", {"bf16": True}),
        ("bfloat16", {"bf16": False}),
        ("bfloat16", {"bf16": True, "use_transformers_continuous_batching": True,
                      "transformers_continuous_batching_config":
                      {"num_blocks": 64, "max_batch_tokens": 256, "page_size": 16}}),
    ],
    ids=["autocast", "bf16 and autocast", "bf16", "continuous batching"],
)  # fmt: skip
def test_v_stays_fp32(dtype, more, tiny, tmp_path):
    """Continuous batching with bf16=True casts the whole model, and never back: PEFT's v is bf16 from then on."""
    import trl

    trainer = plain(tiny, tmp_path, trl.GRPOTrainer, dtype=dtype, **more)  # nothing of ours but the model
    trainer.train()
    numbers = tinylora.adapter_parameters(trainer.model)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in numbers}
    assert all(p.dtype == torch.float32 for p in numbers)
    assert all(s.dtype == torch.float32 for state in trainer.optimizer.state.values() for s in state.values())
    assert sum(p.abs().sum().item() for p in numbers) > 0


def test_gradient_checkpointing_loses_no_gradient(tiny, tmp_path):
    """The base is frozen, the embedding, too: a reentrant checkpoint would see no input that needs a gradient."""
    import trl

    found = []
    for on, kwargs in ((False, None), (True, None), (True, {"use_reentrant": True}), (True, {"use_reentrant": False})):
        trainer = plain(tiny, tmp_path, adapter_trainer(trl.GRPOTrainer), bf16=False, gradient_checkpointing=on,
                        gradient_checkpointing_kwargs=kwargs)  # fmt: skip
        trainer.train()
        found.append(torch.cat([p.detach() for p in tinylora.adapter_parameters(trainer.model)]))
    assert found[0].abs().min() > 0
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-6)


def test_decode_steps_on_a_static_cache_are_compiled_once(tiny, tmp_path):
    """v trains, prompts differ, checkpointing is switched off and on around every generation: one graph serves all."""
    import trl
    from transformers import CompileConfig

    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    compiling._compile_all_devices = True
    found = []
    for more in ({}, {"cache_implementation": "static", "pad_to_multiple_of": 64}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = plain(tiny, tmp_path, adapter_trainer(trl.GRPOTrainer), bf16=False, gradient_checkpointing=True,
                        max_steps=4, per_device_train_batch_size=8, **more)  # fmt: skip
        trainer.generation_config.compile_config = compiling if more else None
        trainer.train()
        found.append(torch.cat([p.detach() for p in tinylora.adapter_parameters(trainer.model)]))
        assert len(trainer.model.get_input_embeddings()._forward_hooks) == 1
        if not more:
            trainer.evaluate(trainer.train_dataset.select(range(4)))
            assert len(trainer.model.get_input_embeddings()._forward_hooks) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert found[0].abs().min() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_the_reference_is_the_base_without_a_second_model(tiny, tmp_path, monkeypatch):
    import trl

    def load_again(*args, **kwargs):
        raise AssertionError("TRL loaded the base model a second time")

    monkeypatch.setattr(trl.trainer.grpo_trainer, "create_model_from_path", load_again)
    with pytest.raises(AssertionError, match="second time"):
        plain(tiny, tmp_path, trl.GRPOTrainer, beta=0.1)
    trainer = plain(tiny, tmp_path, adapter_trainer(trl.GRPOTrainer), beta=0.1, bf16=False)
    assert trainer.args.beta == trainer.beta == 0.1
    with torch.no_grad():
        for p in tinylora.adapter_parameters(trainer.model):
            p.fill_(0.3)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}
    base, _ = load_model(tiny / "model", "float32")
    expected = base(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    reference = trainer.ref_model(**inputs).log_probs
    torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-5)
    assert (trainer.model(**inputs).log_probs - expected).abs().max() > 1e-2
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0  # v is not zero: policy and reference differ


def test_the_best_checkpoint_is_loaded_at_the_end(tiny, tmp_path):
    import trl
    from datasets import Dataset

    model, tokenizer = load_model(tiny / "model", "float32")
    rows = Dataset.from_dict({"prompt": ["1 + 1?", "2 + 2?"], "completion": [" two", " four"]})
    args = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=3, learning_rate=0.1,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = adapter_trainer(trl.SFTTrainer)(
        model=tinylora.apply(model, tinylora.TinyLoraConfig(u=2, n_tie=4)),
        args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = {step: load_numbers(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)}
    assert best.name != "checkpoint-3", "the best was the last: this shows nothing"
    for name, t in named_numbers(model).items():
        assert torch.equal(t, saved[int(best.name.rpartition("-")[2])][name])
        assert not torch.equal(t, saved[3][name])


def test_rloo_has_the_same_reference(tiny, tmp_path, monkeypatch):
    """Its beta is 0.05 unless told otherwise."""
    import trl

    def load_again(*args, **kwargs):
        raise AssertionError("TRL loaded the base model a second time")

    monkeypatch.setattr(trl.trainer.rloo_trainer, "create_model_from_path", load_again)
    monkeypatch.setattr(trl, "GRPOConfig", trl.RLOOConfig)
    trainer = plain(tiny, tmp_path, adapter_trainer(trl.RLOOTrainer), bf16=False)
    assert trainer.beta == trainer.args.beta == 0.05 and not isinstance(trainer.ref_model, torch.nn.Module)
    trainer.train()
    assert abs(trainer.state.log_history[0]["kl"]) < 1e-6  # v is still zero
    with pytest.raises(ValueError, match="args is missing, expected RLOOTrainer's"):
        adapter_trainer(trl.RLOOTrainer)(model=trainer.model, reward_funcs=[])


def test_what_trl_would_do_wrong_is_refused(tiny, tmp_path):
    import trl

    Trainer = adapter_trainer(trl.GRPOTrainer)
    assert Trainer is adapter_trainer(trl.GRPOTrainer) and issubclass(Trainer, trl.GRPOTrainer)
    for more, message in (
        ({"use_vllm": True, "vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode is True, expected False"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model is True"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(tiny, tmp_path, Trainer, **more)
    with pytest.raises(ValueError, match=r"modules_to_save has model\.norm, expected none with use_vllm"):
        plain(tiny, tmp_path, Trainer, use_vllm=True, config=tinylora.TinyLoraConfig(modules_to_save=["model.norm"]))
    with pytest.raises(ValueError, match="was not loaded from a folder"):
        plain(tiny, tmp_path, Trainer, model=tinylora.apply(qwen2(), tinylora.TinyLoraConfig()), use_vllm=True)
    with pytest.raises(ImportError, match=r'use_vllm needs vllm: pip install -e "\.\[vllm\]"'):
        plain(tiny, tmp_path, Trainer, use_vllm=True)
    for config in (
        tinylora.TinyLoraConfig(target_modules=["q_proj", "lm_head"]),
        tinylora.TinyLoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        with pytest.raises(ValueError, match="lm_head has an adapter or is in modules_to_save"):
            plain(tiny, tmp_path, Trainer, config=config)


def test_a_model_that_peft_adapted_takes_the_fast_path_and_resumes(tiny, tmp_path, monkeypatch):
    from peft import TinyLoraConfig, get_peft_model

    def peft_trainer():
        model, _ = load_model(tiny / "model", "float32")
        config = TinyLoraConfig(
            r=2, u=3, weight_tying=1.0, target_modules=["q_proj", "v_proj", "down_proj"], projection_seed=1
        )
        return made(tiny, tmp_path / "run", get_peft_model(model, config))

    tinylora.patch_peft()
    try:
        peft.reset_counts()
        trainer = peft_trainer()
        before = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        counts = peft.counts()["TinyLoRA"]
        assert counts["fast"] > 100 and set(counts) == {"fast"}, counts
        assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
        (v,) = (p for p in trainer.model.parameters() if p.requires_grad)
        assert v.dtype == torch.float32 and v.abs().min() > 0
        whole = curve(tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoint-3")
        again = peft_trainer()
        again.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "run")))
        assert curve(tmp_path / "run") == whole and last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    finally:
        tinylora.unpatch_peft()


def test_the_plain_script_of_the_docs(tiny, chat, tmp_path, monkeypatch):
    script = Path(__file__).parents[1] / "docs" / "grpo.py"
    data = tiny / "data" / "train.jsonl"
    monkeypatch.setattr(sys, "argv", [str(script), str(chat), str(data), str(tmp_path / "out"), "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert len(script.read_text().splitlines()) <= 37
    model, _ = load_model(chat, "float32")
    tinylora.load(model, tmp_path / "out")
    assert sum(p.numel() for p in tinylora.adapter_parameters(model)) == 1


def test_the_commands_of_the_docs_are_commands():
    lines = (Path(__file__).parents[1] / "docs" / "training.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tinylora ")]
    launched = [shlex.split(line) for line in lines if line.startswith(("torchrun ", "accelerate ")) and "-m " in line]
    commands += [command[command.index("tinylora") + 1 :] for command in launched]
    assert len(commands) >= 13 and len(launched) >= 5
    for command in commands:
        if "--help" in command:
            with pytest.raises(SystemExit, match="0"):
                cli._parser().parse_args(command)
        else:
            assert cli._parser().parse_args(command).run


def test_a_checkpoint_of_another_base_or_adapter_is_refused(tiny, tmp_path):
    save_adapter(made(tiny, tmp_path).model, tmp_path / "one")
    other, _ = load_model(tiny / "model", "float32")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="trained on another base model"):
        load_adapter(tinylora.apply(other, tinylora.TinyLoraConfig(u=1, n_tie=4)), tmp_path / "one")
    with pytest.raises(ValueError, match="with another config"):
        load_adapter(tinylora.apply(load_model(tiny / "model", "float32")[0], tinylora.TinyLoraConfig()),
                     tmp_path / "one")  # fmt: skip


def test_eval_of_a_base_of_ours_and_of_pefts(tiny, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    def score(*more):
        common = ["--model", tiny / "model", "--data", tiny / "data", "--max-completion-length", 10, "--dtype",
                  "float32", "--split", "train"]  # fmt: skip
        code = cli.main(["eval", *map(str, common), *map(str, more)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    model, tokenizer = load_model(tiny / "model", "float32")
    problems = load_problems(tiny / "data", "train")
    adapted = get_peft_model(load_model(tiny / "model", "float32")[0], LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "peft")
    for scored, more in ((model, ()), (adapted, ("--adapter", tmp_path / "peft"))):
        prompts = [
            q.question + ' Let\'s think step by step and output the final answer after "####".' for q in problems
        ]
        texts = []
        for prompt in prompts:  # one by one, without padding
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            out = scored.generate(input_ids=ids, do_sample=False, max_new_tokens=10, pad_token_id=0)
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        path = tmp_path / f"{len(more)}.json"
        code, out, _ = score(*more, "--out", path, "--batch-size", 5, *(("--cache", "static") if more else ()))
        assert code == 0 and "strict" in out and "lenient" in out
        assert [c["completion"] for c in json.loads(path.read_text())["completions"]] == texts
    assert len({(tmp_path / f"{n}.json").read_text() for n in (0, 2)}) == 2
    assert "lenient" not in score("--scorer", "strict", "--limit", 3)[1]
    for more, message in (
        (("--adapter", tmp_path), "does not exist, expected an adapter"),
        (("--limit", 0), "limit is 0"),
        (("--split", "dev"), "no problems of the split 'dev'"),
    ):
        code, _, error = score(*more)
        assert code == 2 and message in error


@pytest.fixture
def chat(tiny, tmp_path):
    return tiny_gsm8k.write_chat_model(tiny / "model", tmp_path / "chat")


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_a_chat_model_from_end_to_end(command, tiny, chat, tmp_path, capsys):
    """An epoch: GRPO leaves out the prompts that fill no batch, SFT trains on them."""
    size = {"grpo": {"batch_size": 20, "micro_batch_size": 5}, "sft": {"batch_size": 8, "micro_batch_size": 4}}[command]
    assert train(tiny, tmp_path / "run", None, command, model=chat, epochs=1, **size) == 0
    assert "12 problems, 2 steps" in capsys.readouterr().out and len(log(tmp_path / "run")) == 2
    scored = ["eval", "--model", chat, "--data", tiny / "data", "--adapter", tmp_path / "run" / "adapter"]
    assert cli.main([*map(str, scored), "--max-completion-length", "4"]) == 0


def test_a_chat_template_is_used_where_there_is_one(tiny):
    model, tokenizer = load_model(tiny / "model", "float32")
    tokenizer.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }}\n{% endfor %}"
    heard = []
    generate = model.generate
    model.generate = lambda input_ids, **kwargs: (
        heard.append(tokenizer.decode(input_ids[0])) or generate(input_ids=input_ids, **kwargs)
    )
    evaluate.complete(model, tokenizer, ["one"], max_new_tokens=1, batch_size=1)
    assert heard == ["<|user|> one\n"]
    values = settings(tiny)
    problems = load_problems(tiny / "data", "train")
    for command, columns in (("grpo", {"prompt", "final"}), ("sft", {"prompt", "completion"})):
        row = training._dataset(command, tokenizer, problems, values["instruction"])[0]
        assert set(row) == columns
        assert row["prompt"] == [{"role": "user", "content": values["instruction"].replace(
            "{question}", problems[0].question)}]  # fmt: skip
    assert row["completion"] == [{"role": "assistant", "content": "2 + 3 = 5 hens.\n#### 5"}]
    completion = [{"role": "assistant", "content": "#### 5"}]
    assert training._reward("strict")(completions=[completion], final=["5"], prompts=None) == [1.0]
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_all_numbers_of_an_adalora_come_back(tiny, tmp_path):
    """Its averages of importance are in no adapter file, and a resumed run prunes by them."""

    def adapted():
        model, _ = load_model(tiny / "model", "float32")
        return tinylora.apply(model, tinylora.AdaLoraConfig(total_steps=4, r=3, target_r=2))

    model = adapted()
    layer = model.model.layers[0].self_attn.q_proj.adapters["default"]
    with torch.no_grad():
        layer.smoothed_lam.fill_(0.7)
        layer.lam.fill_(0.2)
    save_adapter(model, tmp_path)
    other = adapted()
    load_adapter(other, tmp_path)
    assert torch.equal(other.model.layers[0].self_attn.q_proj.adapters["default"].smoothed_lam, layer.smoothed_lam)
    for name, t in named_numbers(model).items():
        assert torch.equal(named_numbers(other)[name], t), name
    (tmp_path / "running.safetensors").unlink()
    with pytest.raises(ValueError, match=r"running\.safetensors does not exist"):
        load_adapter(other, tmp_path)
