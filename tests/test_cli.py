"""The command line, run as a user runs it."""

import json
import subprocess
import sys

import pytest
import torch
from models import qwen2

import tinylora
from tinylora.cli import main

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("as_folder", [True, False])
def test_params_of_qwen_7b_without_its_weights(as_folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    config = tmp_path if as_folder else tmp_path / "config.json"
    code, out, _ = run(capsys, "params", "--config", config, "--u", 1, 32, "--n-tie", 16, 1)
    assert code == 0
    rows = {tuple(line.split()[:5]): line.split() for line in out.splitlines() if line.startswith("TinyLoRA")}
    counts = {key[2:4]: row[5] for key, row in rows.items()}
    assert counts == {
        ("u=1", "n_tie=16"): "13", ("u=1", "n_tie=1"): "196",
        ("u=32", "n_tie=16"): "416", ("u=32", "n_tie=1"): "6,272",
    }  # fmt: skip
    assert "7,615,616,512 parameters, 196 modules" in out and "26 B" in out
    code, out, _ = run(
        capsys, "params", "--config", config, "--n-tie", 16, "--tying", "structured", "--target-modules", "q_proj"
    )
    assert "28 modules" in out and out.split("structured")[1].split()[0] == "2"


def test_errors_are_one_line(tmp_path, capsys):
    qwen2().config.save_pretrained(tmp_path / "small")
    settings = json.loads((tmp_path / "small" / "config.json").read_text())
    for name, change in (("heads", {"num_attention_heads": 0}), ("text", {"hidden_size": "x"}),
                         ("layers", {"layer_types": ["x"]}), ("class", {"architectures": ["pipeline"]})):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings | change))
    for arguments, message in (
        (("params", "--config", tmp_path / "heads"), "a model that can be built: ZeroDivisionError: integer"),
        (("params", "--config", tmp_path / "text"), "expected int, got str (value: 'x')"),
        (("params", "--config", tmp_path / "layers"), "`layer_types` entries must be in"),
        (("params", "--config", tmp_path / "class"), "has no attribute '_from_config'"),
        (("params", "--config", tmp_path / "none.json"), "expected a config.json, a model folder or a Hub name"),
        (("params", "--config", tmp_path / "small", "--r", 5000), "r is 5000, expected 1 to 32: model"),
        (("info", tmp_path), "does not exist, expected an adapter"),
    ):
        code, out, err = run(capsys, *arguments)
        assert code == 2 and err.startswith("tinylora: ") and message in err and err.count("\n") == 1


def test_info(tmp_path, capsys, monkeypatch):
    code, out, _ = run(capsys, "info")
    assert code == 0 and torch.__version__.split("+")[0] in out and tinylora.__version__ in out
    assert "torch: tensors are on cpu: the kernels run on NVIDIA GPUs" in out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "kernels: TRITON_INTERPRET=1" in run(capsys, "info")[1]
    tinylora.save(tinylora.apply(qwen2(), tinylora.TinyLoraConfig(u=5, n_tie=7)), tmp_path)
    code, out, _ = run(capsys, "info", tmp_path)
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert code == 0 and shown["adapter"] == "tinylora" and shown["n_tie"] == "7"
    assert "trained numbers  10" in out and "rebuilt from the base model" in out
    assert "every linear layer in a block" in out and "by n_tie" in out


def test_help_and_version_as_a_module():
    for arguments, expected in (
        (["--help"], "params"),
        (["params", "--help"], "--n-tie"),
        (["--version"], "tinylora 0."),
    ):
        done = subprocess.run([sys.executable, "-m", "tinylora.cli", *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout
