"""`tinylora convert` and `tinylora merge`, on folders as a user has them."""

import io
import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from models import qwen2, tokens
from peft_models import CONFIGS, adapted
from safetensors.torch import load_file
from test_family import trained

import tinylora
from tinylora import AdaLoraConfig, LoraConfig, LoraXSConfig, TinyLoraConfig, VeraConfig
from tinylora.cli import main
from tinylora.integrations import folders
from tinylora.nn.model import adapted_layers


@pytest.fixture(params=["one file", "shards"])
def base(request, tmp_path):
    return folder_of(qwen2(), tmp_path / "base", request.param == "shards")


def folder_of(model, folder, shards=True):
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").is_file() == shards
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    return folder


def model_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def run(*arguments):
    return main([str(a) for a in arguments])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        TinyLoraConfig(u=3, n_tie=14),
        LoraXSConfig(r=3),
        LoraConfig(r=4, alpha=6),
        VeraConfig(r=8),
        AdaLoraConfig(r=3, target_r=2, total_steps=10),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=lambda c: c.kind,
)
def test_convert_and_merge_ours(config, base, tmp_path, capsys):
    model = trained(model_of(base), config)
    want = model(tokens()).logits
    tinylora.save(model, tmp_path / "ours")
    for format in ("lora", "tinylora") if config.kind == "lora-xs" else ("lora", "peft", "tinylora"):
        out = tmp_path / format
        assert run("convert", tmp_path / "ours", out, "--format", format, "--base", base) == 0
        assert str(out) in capsys.readouterr().out
        if format == "tinylora":
            back = tinylora.load(model_of(base), out)
        else:
            back = peft.PeftModel.from_pretrained(model_of(base), out)
            assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        close(back(input_ids=tokens()).logits, want)
    merged = tmp_path / "merged"
    assert run("merge", "--base", base, "--adapter", tmp_path / "ours", "--out", merged) == 0
    close(model_of(merged)(tokens()).logits, want)
    assert {p.name for p in merged.iterdir()} == {p.name for p in base.iterdir()} - {"pytorch_model.bin"}


def test_a_folder_of_fp64_merges_as_its_model_does(tmp_path):
    base = folder_of(qwen2(dtype=torch.float64), tmp_path / "base", shards=False)
    model = trained(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), LoraXSConfig(r=3))
    tinylora.save(model, tmp_path / "ours")
    merged = folders.merge(base, tmp_path / "ours", tmp_path / "merged")
    found = load_file(merged / "model.safetensors")
    for name, layer in adapted_layers(tinylora.merge(model)).items():
        torch.testing.assert_close(found[f"{name}.weight"], layer.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", CONFIGS)
def test_convert_and_merge_pefts(kind, base, tmp_path):
    theirs = adapted(kind)
    want = theirs(input_ids=tokens()).logits
    theirs.save_pretrained(tmp_path / "theirs")
    for format in ("lora", "peft", "tinylora"):
        out = tmp_path / format
        assert run("convert", tmp_path / "theirs", out, "--format", format, "--base", base) == 0
        close(tinylora.load(model_of(base), out)(tokens()).logits, want)
    assert run("merge", "--base", base, "--adapter", tmp_path / "theirs", "--out", tmp_path / "merged") == 0
    close(model_of(tmp_path / "merged")(tokens()).logits, want)


def test_a_terminal_sees_how_far_it_is(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    base = folder_of(qwen2(), tmp_path / "base")
    adapted("LoRA").save_pretrained(tmp_path / "theirs")
    for command, bars in (
        (
            ("convert", tmp_path / "theirs", tmp_path / "lora", "--format", "lora", "--base", base),
            ("reading", "writing"),
        ),
        (("convert", tmp_path / "theirs", tmp_path / "ours", "--format", "tinylora", "--base", base), ("weights",)),
        (("merge", "--base", base, "--adapter", tmp_path / "theirs", "--out", tmp_path / "merged"), ("merging",)),
    ):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert run(*command) == 0
        for bar in bars:
            assert bar in sys.stderr.getvalue()


def test_an_adapted_head_of_pefts(base, tmp_path, capsys):
    """Its weight lies beside the adapter, and is compared with the base's."""
    theirs = adapted("LoRA", target_modules=["q_proj", "lm_head"])
    want = theirs(input_ids=tokens()).logits
    theirs.save_pretrained(tmp_path / "theirs")
    assert run("merge", "--base", base, "--adapter", tmp_path / "theirs", "--out", tmp_path / "merged") == 0
    close(model_of(tmp_path / "merged")(tokens()).logits, want)
    for format in ("lora", "peft", "tinylora"):
        out = tmp_path / format
        assert run("convert", tmp_path / "theirs", out, "--format", format, "--base", base) == 0
        close(tinylora.load(model_of(base), out)(tokens()).logits, want)
    other = folder_of(qwen2(seed=5), tmp_path / "other")
    assert run("merge", "--base", other, "--adapter", tmp_path / "theirs", "--out", tmp_path / "out") == 2
    assert "holds another weight for lm_head" in capsys.readouterr().err


def test_merging_bf16_is_one_rounding(tmp_path):
    """Bit for bit what tinylora.merge does in memory, and close to the adapted model."""
    base = folder_of(qwen2(dtype=torch.bfloat16), tmp_path / "base")
    model = trained(qwen2(dtype=torch.bfloat16), TinyLoraConfig(u=3))
    tinylora.save(model, tmp_path / "ours")
    want = model(tokens()).logits
    with tinylora.disabled(model):
        effect = torch.dist(model(tokens()).logits, want)
    assert run("merge", "--base", base, "--adapter", tmp_path / "ours", "--out", tmp_path / "merged") == 0
    tinylora.merge(model)
    merged = model_of(tmp_path / "merged")
    assert all(p.dtype == torch.bfloat16 for p in merged.parameters())
    assert torch.dist(merged(tokens()).logits, want) < 0.5 * effect
    own, found = dict(model.named_parameters()), dict(merged.named_parameters())
    differing = sum((own[n] != p).sum().item() for n, p in found.items())
    assert differing <= 1e-4 * sum(p.numel() for p in found.values())  # fp32 sums in another order


def test_errors(base, tmp_path, capsys):
    model = trained(model_of(base), TinyLoraConfig(n_tie=4))
    tinylora.save(model, tmp_path / "ours")
    (tmp_path / "there").mkdir()
    other = folder_of(qwen2(seed=5), tmp_path / "other")
    (tmp_path / "empty").mkdir()
    lost = folder_of(qwen2(), tmp_path / "lost")
    (lost / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    sorted(lost.glob("*.safetensors"))[0].unlink()
    cut = folder_of(qwen2(), tmp_path / "cut", shards=False)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    tied = folder_of(qwen2(tie_word_embeddings=True), tmp_path / "tied")
    head = trained(qwen2(tie_word_embeddings=True), LoraConfig(target_modules=["lm_head"]))
    tinylora.save(head, tmp_path / "head")
    before = sorted(p.name for p in tmp_path.iterdir())
    for adapter, folder, out, message in (
        ("ours", base, "there", "exists, expected a new folder"),
        ("ours", other, "out", "was trained on another base model"),
        ("ours", tmp_path / "empty", "out", "expected a model folder with config.json"),
        ("ours", lost, "out", "expected a model folder with config.json"),
        ("ours", cut, "out", "is truncated"),
        ("head", tied, "out", "has no lm_head.weight"),
        ("empty", base, "out", "does not exist, expected an adapter"),
    ):
        for command in (
            ("convert", tmp_path / adapter, tmp_path / out, "--format", "lora", "--base", folder),
            ("merge", "--adapter", tmp_path / adapter, "--out", tmp_path / out, "--base", folder),
        ):
            assert run(*command) == 2
            assert message in capsys.readouterr().err, command
    assert run("convert", tmp_path / "ours", tmp_path / "out", "--format", "peft", "--base", base) == 2
    assert "PEFT's TinyLoRA cannot tie 14 modules" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before and not list((tmp_path / "there").iterdir())


def test_an_interrupted_merge_leaves_nothing(base, tmp_path, monkeypatch, capsys):
    from tinylora.integrations import folders

    tinylora.save(trained(model_of(base), LoraConfig(r=2)), tmp_path / "ours")
    calls = []

    def fail(file, t):
        calls.append(t)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders, "_write", fail)
    before = sorted(tmp_path.iterdir())
    assert run("merge", "--base", base, "--adapter", tmp_path / "ours", "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err.endswith("tinylora: interrupted\n")
    assert sorted(tmp_path.iterdir()) == before


TERMINATED = """
import os, signal, sys
from tinylora import cli
from tinylora.integrations import folders
folders._write = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
cli.main(sys.argv[1:])
"""


def test_a_terminated_merge_leaves_nothing(tmp_path):
    base = folder_of(qwen2(), tmp_path / "base")
    tinylora.save(trained(model_of(base), LoraConfig(r=2)), tmp_path / "ours")
    before = sorted(tmp_path.iterdir())
    arguments = ["merge", "--base", base, "--adapter", tmp_path / "ours", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TERMINATED, *map(str, arguments)], timeout=300)
    assert done.returncode == 143
    assert sorted(tmp_path.iterdir()) == before


PEAK = """
import resource, sys
from tinylora.integrations import folders
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, small, adapter, small_adapter, out = sys.argv[1:]
folders.merge(small, small_adapter, out + "/small")
folders.convert(small_adapter, out + "/small lora", "lora", small)
start = peak()
folders.merge(base, adapter, out + "/merged")
folders.convert(adapter, out + "/lora", "lora", base)
print(peak() - start)
"""


def test_memory_stays_near_one_shard(tmp_path):
    """A model of 125 MB in shards of at most 21 MB, in a process that has done the same to a small one."""
    model = qwen2(hidden=512, layers=8, intermediate_size=2048)
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    shards = [p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors")]
    assert sum(shards) > 100e6 and max(shards) < 21e6
    small = qwen2()
    small.save_pretrained(tmp_path / "small")
    for m, name in ((model, "adapter"), (small, "small adapter")):
        tinylora.save(trained(m, TinyLoraConfig(n_tie=7)), tmp_path / name)
    arguments = [str(tmp_path / n) for n in ("base", "small", "adapter", "small adapter", "out")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 2 * max(shards), done.stdout
    close(model_of(tmp_path / "out" / "merged")(tokens()).logits, model(tokens()).logits)


def test_factors_in_the_file_go_into_the_next(base, tmp_path):
    tinylora.save(trained(model_of(base), LoraXSConfig(r=3)), tmp_path / "ours", factors=True)
    assert run("convert", tmp_path / "ours", tmp_path / "out", "--format", "tinylora", "--base", base) == 0
    before, after = (load_file(tmp_path / f / "adapter.safetensors") for f in ("ours", "out"))
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_weights_under_other_names_than_their_modules(tmp_path, capsys):
    """What the message says instead of merging works."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    kind, images = transformers.ViTForImageClassification, torch.randn(2, 3, 32, 32)
    base = folder_of(kind(config).eval(), tmp_path / "base", shards=False)
    model = trained(kind.from_pretrained(base).eval(), LoraConfig(target_modules=["q_proj"]))
    want = model(images).logits
    tinylora.save(model, tmp_path / "ours")
    assert run("merge", "--base", base, "--adapter", tmp_path / "ours", "--out", tmp_path / "out") == 2
    assert "under another name than the module has: load the model" in capsys.readouterr().err
    tinylora.merge(tinylora.load(kind.from_pretrained(base).eval(), tmp_path / "ours")).save_pretrained(
        tmp_path / "merged"
    )
    close(kind.from_pretrained(tmp_path / "merged").eval()(images).logits, want)


def test_a_skeleton_stays_one(base, tmp_path):
    """Layers of one input are not moved into a storage of their own: a 7B model's would be 8.5 GB of zeros."""
    from tinylora.integrations import folders
    from tinylora.nn.model import adapted_layers

    model = trained(model_of(base), TinyLoraConfig())
    for format in ("tinylora", "peft"):
        tinylora.save(model, tmp_path / format, format=format)
        skeleton = folders.load_onto_skeleton(folders.ModelFolder(base), tmp_path / format)
        layers = adapted_layers(skeleton).values()
        assert len(layers) > 1 and max(layer.weight.untyped_storage().nbytes() for layer in layers) <= 8


def test_shards_keep_their_layout(base, tmp_path):
    tinylora.save(trained(model_of(base), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "ours")
    assert run("merge", "--base", base, "--adapter", tmp_path / "ours", "--out", tmp_path / "merged") == 0
    for path in base.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "merged" / path.name)
        assert before.keys() == after.keys()
        for name, t in before.items():
            assert torch.equal(t, after[name]) != ("q_proj.weight" in name), name


def test_a_head_with_a_bias_an_embedding_and_folders_within(tmp_path, capsys):
    """What `modules_to_save` names is in files alone while the rest is a skeleton; all of a folder goes along."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, num_labels=3
    )
    kind = transformers.BertForSequenceClassification
    base = folder_of(kind(config).eval(), tmp_path / "base", shards=False)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"stale")
    config = LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier", "word_embeddings"])
    model = trained(kind.from_pretrained(base).eval(), config)
    want = model(tokens()).logits
    tinylora.save(model, tmp_path / "ours")
    assert run("merge", "--base", base, "--adapter", tmp_path / "ours", "--out", tmp_path / "merged") == 0
    close(kind.from_pretrained(tmp_path / "merged").eval()(tokens()).logits, want)
    assert (tmp_path / "merged" / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "merged" / "onnx").exists()
    for format in ("lora", "tinylora"):
        out = tmp_path / format
        assert run("convert", tmp_path / "ours", out, "--format", format, "--base", base) == 0
        close(tinylora.load(kind.from_pretrained(base).eval(), out)(tokens()).logits, want)
    capsys.readouterr()
    tied = folder_of(qwen2(tie_word_embeddings=True), tmp_path / "tied")
    tinylora.save(trained(model_of(tied), LoraConfig(modules_to_save=["embed_tokens"])), tmp_path / "embedding")
    assert run("merge", "--base", tied, "--adapter", tmp_path / "embedding", "--out", tmp_path / "out") == 2
    assert "are one tensor" in capsys.readouterr().err


def test_files_that_are_no_weights_and_places_that_take_none(base, tmp_path, capsys):
    tinylora.save(trained(model_of(base), TinyLoraConfig()), tmp_path / "ours")
    pointer = folder_of(qwen2(), tmp_path / "pointer", shards=False)
    (tmp_path / "file").write_text("x")
    arguments = ["merge", "--adapter", tmp_path / "ours"]
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = [
        {"a": good | {"shape": [3]}},
        {"a": good | {"dtype": "BF16"}},
        {"a": good | {"data_offsets": [8, 0]}},
        {"a": good | {"data_offsets": [0.0, 8.0]}},
        {"a": good | {"data_offsets": [-8, 8]}},
        {"a": good, "b": good},
        [],
    ]
    files = [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\xff" * 64]
    files += [len(h).to_bytes(8, "little") + h + bytes(8) for h in (json.dumps(header).encode() for header in headers)]
    for text in files:
        (pointer / "model.safetensors").write_bytes(text)
        assert run(*arguments, "--base", pointer, "--out", tmp_path / "out") == 2
        assert "model.safetensors is truncated, damaged or no safetensors file" in capsys.readouterr().err
    assert run(*arguments, "--base", base, "--out", tmp_path / "file" / "out") == 2
    assert "file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_lies_beside_the_weights(tmp_path):
    """One file comes before an index, as transformers has it; templates come along, an adapter does not."""
    base = folder_of(qwen2(), tmp_path / "base", shards=False)
    model = trained(model_of(base), TinyLoraConfig())
    want = model(tokens()).logits
    tinylora.save(model, tmp_path / "ours")
    index = base / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}')
    (base / "adapter_config.json").write_text("{}")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    merge = ["merge", "--base", base, "--adapter", tmp_path / "ours", "--out"]
    assert run(*merge, tmp_path / "merged") == 0
    close(model_of(tmp_path / "merged")(tokens()).logits, want)
    files = {"config.json", "generation_config.json", "model.safetensors", "vocab.txt", "additional_chat_templates"}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == files
    assert (tmp_path / "merged" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"


def test_shards_in_a_folder_within(tmp_path, capsys):
    base = folder_of(qwen2(), tmp_path / "base")
    tinylora.save(trained(model_of(base), LoraConfig(r=2)), tmp_path / "ours")
    want = tinylora.load(model_of(base), tmp_path / "ours")(tokens()).logits
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text())

    def places(folder):
        index.write_text(json.dumps(listed | {"weight_map": {n: folder + f for n, f in listed["weight_map"].items()}}))

    (base / "sub").mkdir()
    for shard in base.glob("model-*.safetensors"):
        shard.rename(base / "sub" / shard.name)
    places("sub/")
    merge = ["merge", "--base", base, "--adapter", tmp_path / "ours", "--out"]
    assert run(*merge, tmp_path / "merged") == 0
    close(model_of(tmp_path / "merged")(tokens()).logits, want)
    for folder in ("../base/sub/", f"{base}/sub/"):
        places(folder)
        assert run(*merge, tmp_path / "out") == 2
        assert "expected files within the folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
