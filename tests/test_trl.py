"""TRL's trainers on adapted models: what adapter_trainer adds, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import tiny_gsm8k
import torch
from models import qwen2
from tiny_runs import bytes_of, curve, load_numbers, made

import tinylora
from tinylora.integrations import peft
from tinylora.integrations.transformers import load_model
from tinylora.integrations.trl import adapter_trainer, last_checkpoint, load_adapter, save_adapter
from tinylora.nn.model import named_numbers

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")


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
    assert not (tmp_path / "README.md").exists()  # TRL's card would load a whole model
    trainer.save_model(tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["adapter.safetensors"]


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
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}
    expected = trainer.ref_model(**inputs).log_probs  # v is still zero
    with torch.no_grad():
        for p in tinylora.adapter_parameters(trainer.model):
            p.fill_(0.3)
    assert torch.equal(trainer.ref_model(**inputs).log_probs, expected)
    assert (trainer.model(**inputs).log_probs - expected).abs().max() > 1e-2
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0
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
    with pytest.raises(ValueError, match=r"modules_to_save has model\.norm, expected none with vLLM"):
        plain(tiny, tmp_path, Trainer, use_vllm=True, config=tinylora.TinyLoraConfig(modules_to_save=["model.norm"]))
    with pytest.raises(ValueError, match="name_or_path is '', expected the folder"):
        plain(tiny, tmp_path, Trainer, model=tinylora.apply(qwen2(), tinylora.TinyLoraConfig()), use_vllm=True)
    changed, _ = load_model(tiny / "model", "float32")
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight += 0.01
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight is not what .* vLLM loads the base"):
        plain(tiny, tmp_path, Trainer, model=tinylora.apply(changed, tinylora.TinyLoraConfig()), use_vllm=True)
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
