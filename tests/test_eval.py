"""`tinylora eval`, chat models, and what the docs show."""

import json
import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import log, settings, train

import tinylora
from tinylora import cli
from tinylora.integrations import evaluate, training
from tinylora.integrations.problems import load_problems
from tinylora.integrations.transformers import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")


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


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_a_chat_model_from_end_to_end(command, tiny, tmp_path, capsys):
    """An epoch: GRPO leaves out the prompts that fill no batch, SFT trains on them."""
    size = {"grpo": {"batch_size": 20, "micro_batch_size": 5}, "sft": {"batch_size": 8, "micro_batch_size": 4}}[command]
    assert train(tiny, tmp_path / "run", None, command, model=tiny / "chat", epochs=1, **size) == 0
    assert "12 problems, 2 steps" in capsys.readouterr().out and len(log(tmp_path / "run")) == 2
    scored = ["eval", "--model", tiny / "chat", "--data", tiny / "data", "--adapter", tmp_path / "run" / "adapter"]
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


def test_the_plain_script_of_the_docs(tiny, tmp_path, monkeypatch):
    script = Path(__file__).parents[1] / "docs" / "grpo.py"
    data = tiny / "data" / "train.jsonl"
    places = [str(path) for path in (script, tiny / "chat", data, tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*places, "--steps", "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert len(script.read_text().splitlines()) <= 45
    model, _ = load_model(tiny / "chat", "float32")
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
