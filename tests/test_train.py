"""`tinylora train`: a run from end to end, kill -9, what resumes, and what does not start."""

import contextlib
import json
import os
import re
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
from tiny_runs import curve, flags, load_numbers, log, settings, train

import tinylora
from tinylora import cli, recipes
from tinylora.integrations import run_folder, training
from tinylora.integrations.transformers import load_model
from tinylora.integrations.trl import last_checkpoint
from tinylora.tasks import gsm8k

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")


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
    printed = capsys.readouterr().out
    for name in ("strict", "lenient"):
        score = found["scores"][name]
        assert score["correct"] == sum(c[name] for c in found["completions"])
        assert 0 <= score["low"] <= score["pass@1"] <= score["high"] <= 1 and score["low"] < score["high"]
        assert re.search(rf"^{name} +{score['correct']} of 12 ", printed, re.M)
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
@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-best", "log.jsonl", "adapter"])
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
