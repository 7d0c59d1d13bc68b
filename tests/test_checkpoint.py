"""Adapter files: small, whole, checked, and the same numbers anywhere."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import qwen2, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2ForSequenceClassification

import tinylora
from tinylora import Linear, LoraXSConfig, TinyLoraConfig
from tinylora.nn.checkpoint import FILE, read

CONFIGS = [TinyLoraConfig(u=1, n_tie=16), TinyLoraConfig(u=2, tying="structured", n_tie=2), LoraXSConfig(r=3)]
ROOT = Path(__file__).parents[1]


def trained(config=CONFIGS[0], **model):
    m = tinylora.apply(qwen2(**model), config)
    for p in tinylora.adapter_parameters(m):
        nn.init.normal_(p, std=0.3)
    return m


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_round_trip(config, factors, tmp_path, monkeypatch):
    model, ids = trained(config), tokens()
    path = tinylora.save(model, tmp_path / "new" / "folder", factors=factors)
    assert path == tmp_path / "new" / "folder" / FILE and [p.name for p in path.parent.iterdir()] == [FILE]
    if factors:
        monkeypatch.setattr("tinylora.adapters.lora_xs.cached_svd", lambda *_: pytest.fail("factors were recomputed"))
        for copied in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            tinylora.save(copied(tinylora.load(qwen2(), path.parent)), path.parent)  # they stay
    other = tinylora.load(qwen2(), path.parent, "again")
    assert tinylora.adapter_names(other) == ["again"]
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert other.tinylora["again"].config == config
    for a, b in zip(tinylora.adapter_parameters(other, "again"), tinylora.adapter_parameters(model), strict=True):
        assert torch.equal(a, b) and a.requires_grad
    # into a model that has the adapter already: a resumed run
    with torch.no_grad():
        for p in tinylora.adapter_parameters(other, "again"):
            p.zero_()
    tinylora.load(other, path.parent, "again")
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert read(tinylora.save(model, tmp_path / "of its own base"))[0]["factors"] is False


def test_thirteen_numbers_fit_in_4_kb_and_nothing_is_pickled(tmp_path):
    model = trained(layers=28, hidden=64)  # 196 modules, as Qwen2.5-7B
    assert sum(p.numel() for p in tinylora.adapter_parameters(model)) == 13
    path = tinylora.save(model, tmp_path)
    assert path.stat().st_size < 4096
    with safe_open(path, "pt") as file:
        assert sorted(file.offset_keys()) == sorted(f"v_{i}" for i in range(13))
        assert all(file.get_tensor(n).shape == (1,) for n in file.offset_keys())
        header = json.loads(file.metadata()["tinylora"])
    assert header["config"] == model.tinylora["default"].config.to_dict() and header["modules"] == 196


FRESH = """
import sys, torch, tinylora
from models import qwen2, tokens
torch.set_num_threads(int(sys.argv[2]))
model = tinylora.load(qwen2(hidden=int(sys.argv[3]), layers=1), sys.argv[1])
torch.save(model(tokens()).logits.detach(), sys.argv[1] + "/logits.pt")
"""


@pytest.mark.parametrize("hidden, threads", [(64, 1), (640, 1), (640, 2)], ids=str)
def test_loads_in_a_fresh_process_to_the_same_outputs(hidden, threads, tmp_path):
    """Nothing but the base and the file: an empty factor cache, another thread count. 640 is past the exact SVD."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 - threads)
    try:
        model = trained(hidden=hidden, layers=1)
        want = model(tokens()).logits
    finally:
        torch.set_num_threads(before)
    tinylora.save(model, tmp_path)
    env = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "another cache"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    subprocess.run([sys.executable, "-c", FRESH, tmp_path, str(threads), str(hidden)], check=True, env=env)
    got = torch.load(tmp_path / "logits.pt")
    with tinylora.disabled(model):
        assert torch.dist(model(tokens()).logits, want) > 1e-2 * want.norm()  # the adapter does something
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_bf16_checkpoint_in_fp32_is_the_same_base(tmp_path):
    """And the adapter the same one: nearly equal entries of a singular vector must not turn its sign."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(48, 8, generator=g), torch.randn(8, 32, generator=g)
    left[0] = left[1] = 3.0  # two largest entries in every column, apart by less than bf16 rounds
    left[1] *= -1.0005
    weight = (left @ right + 1e-3 * torch.randn(48, 32, generator=g)).float()

    def layer(dtype):
        linear = nn.Linear(32, 48, bias=False)
        linear.weight.data = weight.to(dtype)
        return linear

    ours = Linear.from_linear(layer(torch.bfloat16), LoraXSConfig(r=8))
    nn.init.normal_(ours.adapters["default"].core, generator=g)
    tinylora.save(ours, tmp_path)
    wide = tinylora.load(Linear.wrap(layer(torch.float32)), tmp_path)
    want, got = (m.adapters["default"].factors().delta() for m in (ours, wide))
    assert torch.dist(got, want) < 1e-2 * want.norm()


def test_a_load_activates_and_refuses_a_merged_model(tmp_path):
    model, ids = trained(), tokens()
    want = model(ids).logits
    tinylora.save(model, tmp_path)
    tinylora.apply(model, LoraXSConfig(r=3), "other")
    tinylora.load(model, tmp_path)
    assert torch.equal(model(ids).logits, want)
    assert all(p.requires_grad for p in tinylora.adapter_parameters(model))
    assert not any(p.requires_grad for p in tinylora.adapter_parameters(model, "other"))
    frozen = tinylora.adapter_parameters(model)[0].requires_grad_(False)
    tinylora.load(model, tmp_path)  # active already: what somebody froze stays frozen
    assert not frozen.requires_grad
    tinylora.merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        tinylora.load(model, tmp_path)


def test_a_saved_module_of_another_shape(tmp_path):
    def classifier(labels):
        torch.manual_seed(0)
        return Qwen2ForSequenceClassification(qwen2(num_labels=labels).config)

    config = TinyLoraConfig(modules_to_save=["score"])
    tinylora.save(tinylora.apply(classifier(1), config), tmp_path)
    model = classifier(2)
    with pytest.raises(ValueError, match=r"saved.score.weight with shape \(.*\) is on one side only"):
        tinylora.load(model, tmp_path)
    assert tinylora.adapter_names(model) == []


def rewrite(path, change):
    """Write the file again with another header or other tensors, as a careless tool would."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {n: file.get_tensor(n) for n in file.offset_keys()}
    header = json.loads(metadata["tinylora"])
    change(header, tensors)
    save_file(tensors, path, metadata | {"tinylora": json.dumps(header)})


def test_errors_leave_the_model_as_it_was(tmp_path):
    model, ids = trained(), tokens()
    path = tinylora.save(model, tmp_path)
    whole = path.read_bytes()
    target = qwen2()
    want = target(ids).logits

    def fails(message, onto=None):
        onto = target if onto is None else onto
        with pytest.raises(ValueError) as error:
            tinylora.load(onto, tmp_path)
        assert message in str(error.value), error.value
        assert tinylora.adapter_names(onto) == []

    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        fails("is truncated or damaged")
    path.write_bytes(whole)
    rewrite(path, lambda h, t: h.update(format=99))
    fails("has format version 99, expected 2: it was written by another tinylora (0.1.0, this is 0.1.0), whose")
    path.write_bytes(whole)
    rewrite(path, lambda h, t: h["config"].update(seed=1))
    fails("its checksum is not that of its contents")
    path.write_bytes(whole)
    rewrite(path, lambda h, t: t.update(v_0=t["v_0"].double()))
    fails("its checksum is not that of its contents")
    save_file({"v": torch.zeros(1)}, path)
    fails("is a safetensors file, but not an adapter that tinylora.save wrote")
    path.unlink()
    fails("does not exist, expected an adapter that tinylora.save wrote")
    path.write_bytes(whole)
    fails("was trained on another base model: it was made for weights", qwen2(seed=1))
    fails('convert and merge take what tinylora.save(..., format="lora") writes', qwen2().half())
    fails("was trained on 14 modules, but Qwen2ForCausalLM has 21 targets", qwen2(layers=3))
    other = tinylora.apply(qwen2(), TinyLoraConfig(u=2))
    with pytest.raises(ValueError, match="the model has an adapter of that name with another config"):
        tinylora.load(other, tmp_path)
    assert torch.equal(target(ids).logits, want)
    assert torch.equal(tinylora.load(target, tmp_path)(ids).logits, model(ids).logits)


def test_no_changed_byte_passes(tmp_path):
    """Every byte of the file, changed one at a time, is an error."""
    model = trained()
    path = tinylora.save(model, tmp_path)
    whole = bytearray(path.read_bytes())
    base = qwen2()
    tinylora.load(base, tmp_path)
    v = tinylora.adapter_parameters(base)[0]
    for i in range(len(whole)):
        changed = whole.copy()
        changed[i] ^= 0x01
        path.write_bytes(changed)
        with torch.no_grad():
            v.zero_()
        with pytest.raises(ValueError, match=r"damaged|not an adapter|has format version"):
            tinylora.load(base, tmp_path)
        assert not v.any(), i


def test_a_failed_save_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    model = trained()
    path = tinylora.save(model, tmp_path)
    whole = path.read_bytes()
    for step in ("save_file", "os.fsync", "os.replace"):
        with monkeypatch.context() as m:

            def full(*args, **kwargs):
                raise OSError("no space left on device")

            m.setattr(f"tinylora.nn.checkpoint.{step}", full)
            with pytest.raises(OSError, match="no space left"):
                tinylora.save(model, tmp_path)
        assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [FILE]


KILLED = """
import sys, torch, tinylora
layer = tinylora.Linear.from_linear(torch.nn.Linear(64, 64), tinylora.LoraXSConfig(r=64))
tinylora.save(layer, sys.argv[1], factors=True)
print("ready", flush=True)
while True:
    tinylora.save(layer, sys.argv[1], factors=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path):
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        process.stdout.readline()
        time.sleep(0.05 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        header, tensors = read(tmp_path / FILE)
        assert header["factors"] and "core" in {n.rpartition(".")[2] for n in tensors}


def test_a_single_layer(tmp_path):
    torch.manual_seed(0)
    base = nn.Linear(32, 24)
    for config in CONFIGS:
        layer = Linear.from_linear(copy.deepcopy(base), config)
        for p in tinylora.adapter_parameters(layer):
            nn.init.normal_(p)
        tinylora.save(layer, tmp_path, factors=True)
        other = Linear.from_linear(copy.deepcopy(base), config)
        tinylora.load(other, tmp_path)
        x = torch.randn(3, 32)
        assert torch.equal(other(x), layer(x))
        fresh = Linear.wrap(copy.deepcopy(base))
        assert torch.equal(tinylora.load(fresh, tmp_path)(x), layer(x))


def test_numbers_of_other_factors_than_the_files(tmp_path):
    """Factors of a file may be the weights' own, or have other signs: numbers without any are of the former."""
    model = tinylora.apply(qwen2(layers=1), LoraXSConfig(r=3))
    for p in tinylora.adapter_parameters(model):
        torch.nn.init.normal_(p, std=0.1)
    tinylora.save(model, tmp_path / "mine")
    tinylora.save(model, tmp_path / "the same", factors=True)
    with torch.no_grad():
        for adapter in model.tinylora["default"].layers.values():
            adapter.down[1].neg_()
            adapter.up[:, 0].neg_()
    tinylora.save(model, tmp_path / "theirs", factors=True)
    same, other = (tinylora.load(qwen2(layers=1), tmp_path / f) for f in ("the same", "theirs"))
    tinylora.load(same, tmp_path / "mine")
    tinylora.stack(same, [tmp_path / "mine"])
    for onto in (tinylora.load, lambda model, folder: tinylora.stack(model, [folder])):
        with pytest.raises(ValueError, match="has other frozen factors than the adapter on the model"):
            onto(other, tmp_path / "mine")


def test_what_was_loaded_is_no_longer_the_files(tmp_path):
    """Whoever writes into the file afterwards changes nothing of the model."""
    for kind in ("tinylora", "peft"):
        folder = tmp_path / kind
        model = tinylora.apply(qwen2(layers=1), TinyLoraConfig(u=2, n_tie=100, sigma="split"))
        for v in tinylora.adapter_parameters(model):
            torch.nn.init.normal_(v)
        path = tinylora.save(model, folder, format=kind, **({"factors": True} if kind == "tinylora" else {}))
        loaded = tinylora.load(qwen2(layers=1), folder)
        want = loaded(tokens()).logits
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(bytes(path.stat().st_size // 2))
        assert torch.equal(loaded(tokens()).logits, want)


def test_files_are_written_where_fsync_wants_to_write(tmp_path, monkeypatch):
    """As on Windows; and everybody may read them whom the umask lets."""
    import fcntl
    import stat

    fsync = os.fsync

    def windows(descriptor):
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", windows)
    before = os.umask(0o027)
    try:
        path = tinylora.save(tinylora.apply(qwen2(layers=1), TinyLoraConfig()), tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_made_or_loaded_in_inference_mode(tmp_path):
    from tinylora.nn.model import named_numbers

    tinylora.save(tinylora.apply(qwen2(), TinyLoraConfig()), tmp_path)
    with torch.inference_mode():
        born = qwen2()
    for model in (qwen2(), born):
        with torch.inference_mode():
            tinylora.load(model, tmp_path)
            model(tokens())
            tinylora.stack(model, [{n: p + 1 for n, p in named_numbers(model).items()}] * 2)
            with tinylora.adapter_ids(model, [0, 1]):
                model(tokens())
        tinylora.load(model, tmp_path)
    tinylora.load(qwen2(), tmp_path)(tokens()).logits.sum().backward()
    for kind in ("tinylora", "peft", "apply"):
        model = qwen2()
        if kind == "tinylora":
            tinylora.save(tinylora.apply(qwen2(), TinyLoraConfig()), tmp_path / kind, factors=True)
        elif kind == "peft":
            tinylora.save(tinylora.apply(qwen2(), TinyLoraConfig(n_tie=100)), tmp_path / kind, format="peft")
        with torch.inference_mode():
            tinylora.apply(model, TinyLoraConfig()) if kind == "apply" else tinylora.load(model, tmp_path / kind)
        model(tokens()).logits.sum().backward()
        assert all(p.grad is not None for p in tinylora.adapter_parameters(model))


def test_torchs_default_device_is_not_the_adapters(tmp_path):
    for config in (tinylora.LoraConfig(r=2), tinylora.AdaLoraConfig(total_steps=9)):
        model, other = qwen2(layers=1), qwen2(layers=1)
        with torch.device("meta"):
            tinylora.apply(model, config)
            tinylora.save(model, tmp_path / config.kind, format="peft")
            tinylora.load(other, tmp_path / config.kind)
        assert model(tokens()).logits.isfinite().all() and other(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrapper", ["checkpoint_wrapper", "offload_wrapper"])
def test_wrappers_of_activations_leave_names_alone(when, wrapper, tmp_path):
    """accelerate's FSDP2 puts them on (activation_checkpointing)."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    def wrap(model):
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = getattr(wrappers, wrapper)(layer)

    model, plain = qwen2(), tinylora.apply(qwen2(), TinyLoraConfig(u=2))
    if when == "before":
        wrap(model)
    tinylora.apply(model, TinyLoraConfig(u=2))
    if when == "after":
        wrap(model)
    for own in (model, plain):
        for i, v in enumerate(tinylora.adapter_parameters(own)):
            nn.init.constant_(v, 0.1 * (i + 1))
    tinylora.save(model, tmp_path / "ours")
    tinylora.load(model, tmp_path / "ours")
    tinylora.save(model, tmp_path / "lora", format="lora")
    want = plain(tokens()).logits
    for folder in ("ours", "lora"):
        torch.testing.assert_close(tinylora.load(qwen2(), tmp_path / folder)(tokens()).logits, want)
    torch.testing.assert_close(model(tokens()).logits, want)
