"""Rollouts by vLLM itself, its build for CPUs: `make vllm-test` installs it, other test runs skip this."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tiny_gsm8k
import torch
from peft_models import CONFIGS

import tinylora
from tinylora.integrations import vllm
from tinylora.integrations.transformers import load_model
from tinylora.integrations.trl import adapter_trainer

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[1]
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB
LENGTH = 160


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    heads = {"hidden": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # vLLM on a CPU: of 32 numbers or more
    tiny_gsm8k.write_model(folder / "model", torch.bfloat16, max_position_embeddings=LENGTH, **heads)
    tiny_gsm8k.write_problems(folder / "data")
    return folder


def copied(tiny, out):
    return shutil.copytree(tiny / "model", out / "other")


def make(tiny, out, config=None, peft_config=None, folder=None, change=0.0, dtype="bfloat16", **more):
    import trl
    from datasets import Dataset

    model, tokenizer = load_model(folder or tiny / "model", dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += change
    if peft_config is None:
        tinylora.apply(model, config or tinylora.TinyLoraConfig(u=2, n_tie=4))
    args = {"output_dir": str(out), "use_cpu": True, "report_to": [], "max_steps": 3, "num_generations": 4,
            "per_device_train_batch_size": 16, "max_completion_length": 10, "learning_rate": 1.0, "logging_steps": 1,
            "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True, "bf16": False,
            "use_vllm": True, "vllm_mode": "colocate"} | more  # fmt: skip
    return adapter_trainer(trl.GRPOTrainer)(
        model=model,
        peft_config=peft_config,
        reward_funcs=lambda completions, **_: [sum(map(ord, c)) % 5.0 for c in completions],
        args=trl.GRPOConfig(**args),
        train_dataset=Dataset.from_dict({"prompt": [q for q, *_ in tiny_gsm8k.PROBLEMS]}),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def colocated(tiny, tmp_path_factory):
    return make(tiny, tmp_path_factory.mktemp("out"))


def differences(trainer, adapted=True):
    """|log p of vLLM - log p of the model| of sampled tokens: of ours, adapted or not."""
    model, rollouts = trainer.model, trainer.vllm_generation
    prompts = [trainer.processing_class(q)["input_ids"] for q, *_ in tiny_gsm8k.PROBLEMS]
    _, completions, log_p, _ = rollouts.generate([p for p in prompts for _ in range(4)], None, 4)
    found = []
    for i, (tokens, theirs) in enumerate(zip(completions, log_p, strict=True)):
        ids = torch.tensor([prompts[i // 4] + list(tokens)])
        off = contextlib.nullcontext() if adapted else _off(model)
        with torch.no_grad(), off:
            ours = model(ids).logits[0, -len(tokens) - 1 : -1].float().log_softmax(-1)
        chosen = ours.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        found.append((chosen - torch.tensor([each[0] for each in theirs])).abs())
    return torch.cat(found)


def _off(model):
    return model.disable_adapter() if hasattr(model, "peft_config") else tinylora.disabled(model)


def set_numbers(model, size):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # PEFT lets AdaLoRA's ranknum train on a bf16 base, and does not save it
        for v in (p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n):
            v.copy_(torch.randn(v.shape, generator=generator) * size)


def test_samples_are_of_the_adapted_model(colocated):
    for size in (0, 20, 5):
        set_numbers(colocated.model, size)
        colocated.vllm_generation.sync_weights()
        ours = differences(colocated)
        # bf16 on one processor and another; of 480 tokens sampled a far tail has been off by more, once
        assert ours.mean() < 0.03 and ours.quantile(0.99) < 0.2, (size, ours.mean(), ours.max())
        if size:
            theirs = differences(colocated, adapted=False).mean()
            assert theirs > 10 * ours.median(), (size, theirs, ours.median())


def test_whatever_changes_between_samples_is_sampled_from(colocated):
    """TRL asks once a step: a loaded checkpoint, another adapter and none at all come in between."""
    model = colocated.model
    set_numbers(model, 20)
    assert differences(colocated).mean() < 0.03
    tinylora.apply(model, tinylora.TinyLoraConfig(u=1, n_tie=2, seed=1), "other")
    with torch.no_grad():
        for v in tinylora.adapter_parameters(model, "other"):
            v.fill_(-15)
    try:
        assert differences(colocated).mean() < 0.03
        with tinylora.disabled(model):
            assert differences(colocated).mean() < 0.01
        tinylora.activate(model, "default")
        assert differences(colocated).mean() < 0.03 < 1 < differences(colocated, adapted=False).mean()
    finally:
        tinylora.remove(model, "other")
    assert colocated.vllm_generation.llm.llm_engine.model_config.dtype == torch.bfloat16


def test_v_trains(colocated):
    """Every step samples with the numbers of the one before, and not with those it began with."""
    set_numbers(colocated.model, 5)
    numbers = list(tinylora.adapter_parameters(colocated.model))
    start = [v.detach().clone() for v in numbers]
    colocated.train()
    trained = [v.detach().clone() for v in numbers]
    steps = [e["sampling/sampling_logp_difference/mean"] for e in colocated.state.log_history if "loss" in e]
    with torch.no_grad():
        for v, first in zip(numbers, start, strict=True):
            v.copy_(first)
        colocated.vllm_generation.sync_weights()
        known = colocated.vllm_generation._known
        for v, last in zip(numbers, trained, strict=True):
            v.copy_(last)
    colocated.vllm_generation._known = known[0], [v.detach().clone() for v in numbers]  # as if it had been told
    stale = differences(colocated).mean()
    assert len(steps) == 3 and max(steps) < stale / 4, (steps, stale)
    assert not list(Path(colocated.args.output_dir).iterdir())


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (tinylora.LoraXSConfig(r=4), 2),
        (tinylora.LoraConfig(r=8, alpha=16), 0.1),
        (tinylora.AdaLoraConfig(total_steps=10, r=6, target_r=4), 0.3),
        (tinylora.VeraConfig(r=8), 1),
        (tinylora.TiedLoraConfig(r=4), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_adapter_is_a_lora_for_vllm(config, size, colocated, tiny, tmp_path):
    model, _ = load_model(tiny / "model", "bfloat16")
    tinylora.apply(model, config)
    set_numbers(model, size)
    vllm_samples_from(model, lambda folder: tinylora.save(model, folder, format="lora"), colocated, tmp_path)


def vllm_samples_from(model, save, colocated, tmp_path):
    """The engine that is there computes the adapter that `save` writes."""
    from vllm.lora.request import LoRARequest

    save(tmp_path / "lora")
    rollouts, former = colocated.vllm_generation, colocated.model
    request = LoRARequest(str(tmp_path), 1000 + sum(map(ord, str(tmp_path))), str(tmp_path / "lora"))
    kept = rollouts.llm.generate
    try:
        rollouts.llm.generate = lambda *args, **kwargs: type(rollouts.llm).generate(
            rollouts.llm, *args, **kwargs | {"lora_request": request}
        )
        colocated.model = model
        ours, base = differences(colocated), differences(colocated, adapted=False)
    finally:
        rollouts.llm.generate, colocated.model = kept, former
    assert ours.mean() < base.mean() / 20, (ours.mean(), base.mean())


def test_a_longer_text_than_the_model_takes(tiny):
    model, _ = load_model(tiny / "model", "bfloat16")
    message = f"are {LENGTH + 1} tokens, expected at most {LENGTH} with vLLM"
    with pytest.raises(ValueError, match=message), vllm.engine(model, LENGTH + 1):
        pass


def test_a_rank_that_vllm_has_not(tiny, tmp_path):
    with pytest.raises(ValueError, match="rank 600, expected at most 512"):
        make(tiny, tmp_path, tinylora.VeraConfig(r=600))


@contextlib.contextmanager
def served(folder, log, *more):
    """vLLM's server on a port of its own, as `SERVE` starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    start += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enforce-eager", *more]
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with open(log, "w") as output:
        server = subprocess.Popen(start, env=os.environ | own, stdout=output, stderr=output, start_new_session=True)
    try:
        yield {"vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": port}
    finally:
        server.terminate()
        server.wait(60)


def test_a_server_samples_from_the_adapted_model(tiny, tmp_path):
    with served(tiny / "model", tmp_path / "log", "--enable-lora", "--max-lora-rank", "8") as where:
        trainer = make(tiny, tmp_path / "out", max_steps=2, learning_rate=0.1, **where)
        trainer.train()
        steps = [e["sampling/sampling_logp_difference/mean"] for e in trainer.state.log_history if "loss" in e]
        assert len(steps) == 2 and max(steps) < 0.03, steps
        theirs = make(tiny, tmp_path / "out", peft_config=CONFIGS["TinyLoRA"](), max_steps=2, **where)
        theirs.train()
        for adapted, size in ((trainer, 20), (theirs, 5)):
            set_numbers(adapted.model, size)
            found, base = differences(adapted).mean(), differences(adapted, adapted=False).mean()
            assert found < base / 10, (found, base)  # in bf16, of tokens that nobody seeds
        with pytest.warns(UserWarning, match=r"the vLLM server has .*model, and the model was loaded from .*other"):
            make(tiny, tmp_path / "out", folder=copied(tiny, tmp_path), max_steps=1, **where)
        again = make(tiny, tmp_path / "out", max_steps=1, **where)  # a run after a run, on the same server
        assert differences(again).mean() < 0.01
        with pytest.raises(RuntimeError, match=r"did not load the adapter[\s\S]*--enable-lora --max-lora-rank 16"):
            make(tiny, tmp_path / "out", tinylora.LoraXSConfig(r=9), **where)


def alone():
    """The environment without what an engine in this process left there."""
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return {k: v for k, v in os.environ.items() if k not in launched} | {"PYTHONPATH": places}


def run(*command, several=0):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(several)]
    start = [*(start if several else [sys.executable]), "-m", "tinylora", *map(str, command)]
    done = subprocess.run(start, capture_output=True, text=True, timeout=300, env=alone())
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-5000:]


def test_train_and_eval_from_the_command_line(tiny, tmp_path):
    where = ("--model", tiny / "model", "--data", tiny / "data")
    train = ("train", "grpo", "--vllm", *where, "--save-every", 2, "--batch-size", 16, "--micro-batch-size", 8, "--lr",
             0.1, "--n-tie", 4, "--u", 2, "--max-completion-length", 10, "--reward", "lenient")  # fmt: skip
    run(*train, "--steps", 4, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    run("train", "grpo", "--resume", "--out", tmp_path / "killed")
    curves = [
        [
            {k: v for k, v in json.loads(line).items() if "time" not in k}
            for line in (tmp_path / name / "log.jsonl").open()
        ]
        for name in ("whole", "killed")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 4 and any(step["reward"] for step in curves[0])
    run(*train, "--steps", 2, "--out", tmp_path / "two", several=2)
    assert (
        max(
            s["sampling/sampling_logp_difference/mean"]
            for s in map(json.loads, (tmp_path / "two" / "log.jsonl").open())
        )
        < 0.01
    )

    model, _ = load_model(tiny / "model", "float32")
    tinylora.apply(model, tinylora.TinyLoraConfig(u=2, n_tie=4))
    set_numbers(model, 4)
    tinylora.save(model, tmp_path / "adapter")
    evaluate = ("eval", *where, "--dtype", "float32", "--max-completion-length", 10)
    run(*evaluate, "--out", tmp_path / "base.json")
    run(*evaluate, "--out", tmp_path / "ours.json", "--adapter", tmp_path / "adapter")
    run(*evaluate, "--out", tmp_path / "vllm.json", "--adapter", tmp_path / "adapter", "--vllm", several=2)
    base, ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("base", "ours", "vllm"))
    assert theirs["completions"] == ours["completions"] != base["completions"]
    assert theirs["scores"] == ours["scores"]


@pytest.mark.parametrize(("kind", "size"), [("TinyLoRA", 5), ("LoRA", 0.2), ("AdaLoRA", 0.3), ("VeRA", 1)])
def test_a_model_that_peft_adapted_is_a_lora_for_vllm(kind, size, colocated, tiny, tmp_path):
    """Unmerged as well: TRL would merge it into the weights, and send these."""
    model = peft.get_peft_model(load_model(tiny / "model", "bfloat16")[0], CONFIGS[kind]())
    set_numbers(model, size)
    vllm_samples_from(model, vllm._adapter(model).save, colocated, tmp_path)


def test_what_is_no_lora_goes_trls_way_and_says_so(tiny, tmp_path, monkeypatch):
    """A DoRA is merged by TRL, as without us; sleep mode sends the base anew."""
    from trl.generation.vllm_generation import VLLMGeneration

    taken = []  # an engine for each takes its time
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda rollouts: taken.append(rollouts))
    for reason, changes, more in (
        ("use_dora", {"use_dora": True}, {}),
        ("vllm_enable_sleep_mode", {}, {"vllm_enable_sleep_mode": True}),
        ("layers.0.mlp.up_proj.weight is not what", {}, {"change": 0.1}),
    ):
        with pytest.warns(UserWarning, match=f"vLLM samples from merged weights.*{reason}"):
            make(tiny, tmp_path, peft_config=CONFIGS["LoRA"](**changes), **more)
    assert len(taken) == 3 and not any(rollouts._adapter for rollouts in taken)


@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [("float32", False, torch.float32), ("float32", True, torch.bfloat16), ("float16", False, torch.float16)],
)
def test_the_engine_computes_in_the_dtype_of_training(dtype, autocast, expected, tiny, tmp_path, monkeypatch):
    """By itself vLLM lowers fp32 to 16 bits."""
    from trl.generation import vllm_generation

    def asked(rollouts):
        assert vllm_generation.LLM.keywords == {
            "dtype": expected, "enable_lora": True, "max_lora_rank": 8, "max_loras": 1
        }  # fmt: skip
        raise ZeroDivisionError

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", asked)
    with pytest.raises(ZeroDivisionError):
        make(tiny, tmp_path, dtype=dtype, bf16=autocast)


def test_several_active_adapters_of_pefts_are_no_lora(tiny, tmp_path):
    model = peft.get_peft_model(load_model(tiny / "model", "bfloat16")[0], CONFIGS["LoRA"]())
    model.add_adapter("two", CONFIGS["LoRA"]())
    assert vllm._adapter(model).name() == "default"
    with model.disable_adapter():
        assert vllm._adapter(model).name() is None
    with pytest.raises(ValueError, match=r"a layer's scaling is 4\.5, expected the one of alpha 6 and r 4"):
        next(m for m in model.modules() if hasattr(m, "set_scale")).set_scale("default", 3)
        vllm._adapter(model).save(tmp_path / "lora")
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match=r"the active adapters are \['default', 'two'\], expected one"):
        vllm._adapter(model).name()


ENGINE = """
import os, sys
import peft, torch
from peft_models import CONFIGS
import tinylora
from tinylora.generation import until_end
from tinylora.integrations import vllm
from tinylora.integrations.transformers import load_model
from vllm import SamplingParams

folder, greedy = sys.argv[1], SamplingParams(temperature=0, max_tokens=8, detokenize=False)
ours = tinylora.apply(load_model(folder, "float32")[0], tinylora.TinyLoraConfig(u=2, n_tie=4))
theirs = peft.get_peft_model(load_model(folder, "float32")[0], CONFIGS["LoRA"]())
for model in (ours, theirs):
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 5 if model is ours else 0.2, generator=torch.Generator().manual_seed(4))
prompts, end = [[5, 6, 7, 8], [9, 10, 11, 12]], {1}

def wanted(model):
    tokens = model.generate(input_ids=torch.tensor(prompts), max_new_tokens=8, do_sample=False)[:, 4:].tolist()
    return [until_end(row, end) for row in tokens]

def asked(model):
    with vllm.engine(model, 16) as answer:
        return [until_end(row, end) for row in answer(prompts, greedy)]

base = wanted(load_model(folder, "float32")[0])
with tinylora.disabled(ours):
    assert asked(ours) == wanted(ours) == base
assert asked(theirs) == wanted(theirs) != base
assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
"""


def test_the_engine_answers_as_whatever_is_active(tiny):
    """PEFT's models as well, and nothing of a launcher stays behind."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(tiny / "model")], capture_output=True, text=True, env=alone()
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
