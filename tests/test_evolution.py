"""Training without gradients: a generation in one batch is what its adapters do one by one, and the reward rises."""

import copy
import json
import os
import shutil

import pytest
import torch
from models import qwen2
from safetensors.torch import load_file
from tiny_gsm8k import write_model, write_problems

import tinylora
from bench.addition import tokenizer
from tinylora import LoraConfig, LoraXSConfig, TinyLoraConfig, cli, recipes
from tinylora.evolution import Evolution

CHARS = tokenizer()
PROMPTS = CHARS(["ab", "fourplums", "k", "seats"]).input_ids  # of different lengths
ANSWERS = ["3", "8", "1", "7"]


def digits(completions, answers):
    """The share of a completion's characters that are digits, more for the digit asked for."""
    return [
        sum(c.isdigit() + (c == a) for c in text) / max(1, len(text)) / 2
        for text, a in zip(completions, answers, strict=True)
    ]


def evolution(config, model=None, reward=digits, **settings):
    model = tinylora.apply(model or qwen2(vocab_size=len(CHARS), hidden=32, initializer_range=0.1), config)
    return Evolution(model, CHARS, reward, **({"max_new_tokens": 5, "population": 8} | settings))


@pytest.mark.parametrize("config", [TinyLoraConfig(u=3, n_tie=4), LoraXSConfig(r=2)], ids=str)
def test_a_generation_in_one_batch_is_its_adapters_one_by_one(config):
    seen = []

    def reward(completions, answers):
        seen.append((completions, answers))
        return digits(completions, answers)

    es = evolution(config, reward=reward)
    adapters = torch.randn(6, len(es.numbers()), generator=torch.Generator().manual_seed(0))
    together = es.rewards(adapters, PROMPTS, ANSWERS)
    (texts, answers), own = seen[0], copy.deepcopy(es.model)
    assert together.shape == (6, 4) and answers == ANSWERS * 6 and len(set(texts)) > 12
    for i, numbers in enumerate(adapters):
        with torch.no_grad():
            for p, value in zip(
                tinylora.adapter_parameters(own),
                numbers.split([p.numel() for p in tinylora.adapter_parameters(own)]),
                strict=True,
            ):
                p.copy_(value.view(p.shape))
        for j, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            ends = {"eos_token_id": CHARS.eos_token_id, "pad_token_id": CHARS.pad_token_id}  # as in eval
            mask = torch.ones_like(ids)
            out = own.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **ends)
            text = CHARS.decode(out[0, len(prompt) :], skip_special_tokens=True)
            assert texts[4 * i + j] == text
            assert together[i, j] == pytest.approx(digits([text], [ANSWERS[j]])[0])


def test_the_update_is_the_formula():
    """On a reward that needs no model: the sum over pairs, standardised, along what rose."""
    values = {}

    def reward(completions, answers):
        return [values["given"][i // 4].item() for i in range(len(completions))]

    es = evolution(TinyLoraConfig(u=3, n_tie=100), reward=reward, sigma=0.5, lr=0.25, population=6, seed=7)
    values["given"] = given = torch.tensor([1.0, 2.0, 0.5, -1.0, 0.0, 2.0])
    from tinylora.adapters import noise

    half = noise.normal(7, "generation 0", 3, 3)
    epsilon = torch.cat((half, -half))
    standard = (given - given.mean()) / given.std(correction=0)
    generation = es.step(PROMPTS, ANSWERS)
    wanted = 0.25 / 6 * sum(f * e for f, e in zip(standard, epsilon, strict=True))
    torch.testing.assert_close(es.numbers(), wanted)
    assert (generation.number, generation.completions, generation.best) == (1, 24, 2.0)
    assert generation.reward == pytest.approx(0.75) and generation.moved == pytest.approx(wanted.norm().item())
    values["given"] = torch.ones(6)
    assert es.step(PROMPTS, ANSWERS).moved == 0.0
    torch.testing.assert_close(es.numbers(), wanted)  # nobody did better: nobody moves


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_the_reward_rises_and_the_seed_decides_everything(temperature):
    def trained(seed, interrupted=False):
        settings = {"sigma": 0.3, "lr": 0.3, "population": 16, "temperature": temperature, "seed": seed}
        model = qwen2(vocab_size=len(CHARS), hidden=32, initializer_range=0.1, seed=1)
        es = evolution(TinyLoraConfig(u=13, n_tie=100), model=model, **settings)
        before = es.rewards(torch.zeros(32, 13), PROMPTS, ANSWERS).mean()
        for k in range(15):
            if interrupted and k == 4:  # the numbers and the count are all there is to carry over
                es = Evolution(es.model, CHARS, digits, max_new_tokens=5, number=4, **settings)
            torch.rand(k)  # nobody else's random numbers matter
            es.step(PROMPTS, ANSWERS)
        es.number = 0
        return before, es.rewards(es.numbers().expand(32, -1), PROMPTS, ANSWERS).mean(), es.numbers()

    before, after, numbers = trained(0)
    assert after > before + 0.12
    assert torch.equal(numbers, trained(0, interrupted=True)[2])
    assert not torch.equal(numbers, trained(1)[2])


def test_decode_steps_on_a_static_cache_are_compiled_once():
    """Generations, prompts and v differ, and the model has another stack in between: one graph, where the first lay."""
    from transformers import CompileConfig

    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    compiling._compile_all_devices = True
    found = []
    for cache in (None, "static"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        es = evolution(TinyLoraConfig(u=3, n_tie=4), temperature=1.0, cache=cache)
        es.settings |= {"compile_config": compiling} if cache else {}
        names = [n for n, _ in es.model.tinylora.default.named_parameters()]
        places = set()
        for k, prompts in enumerate((PROMPTS[2:], PROMPTS[:2], PROMPTS[1:3])):  # the longest is not the first
            tinylora.stack(es.model, [dict.fromkeys(names, torch.full((3,), float(k)))] * es.population)
            es.step(prompts, ANSWERS[:2])
            stacks = [t for n, t in es.model.named_buffers() if "stacked_" in n]
            assert len(stacks) == len(names) and all((t == k).all() for t in stacks)
            places.add(tuple(t.data_ptr() for t in es.stack.values()))
        assert len(places) == 1 and len(*places) == len(names)
        found.append(es.numbers())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert found[0].abs().min() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_training_mode_random_state_and_other_parameters_are_left_alone():
    es = evolution(TinyLoraConfig(u=2, n_tie=100), temperature=1.0)
    es.model.train()
    state, weights = torch.get_rng_state(), copy.deepcopy(es.model.model.state_dict())
    es.step(PROMPTS, ANSWERS)
    assert es.model.training and torch.equal(torch.get_rng_state(), state)
    for name, value in es.model.model.state_dict().items():
        assert torch.equal(value, weights[name]) or "default" in name, name


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LoraConfig(r=2), {}, "is of LoraConfig, expected TinyLoraConfig or LoraXSConfig"),
        (TinyLoraConfig(modules_to_save=["lm_head"]), {}, r"modules_to_save \['lm_head'\], expected none"),
        (TinyLoraConfig(), {"population": 7}, "population is 7, expected an even number"),
        (TinyLoraConfig(), {"sigma": 0.0}, "sigma is 0.0, expected a number above 0"),
        (TinyLoraConfig(), {"lr": -1.0}, "lr is -1.0, expected a number above 0"),
        (TinyLoraConfig(), {"temperature": -1.0}, "temperature is -1.0"),
        (TinyLoraConfig(), {"name": "other"}, "name is 'other'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_cannot_evolve_is_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        evolution(config, **settings)


def test_rewards_and_prompts_that_do_not_fit_are_refused():
    es = evolution(TinyLoraConfig(u=2))
    with pytest.raises(ValueError, match="4 prompts and 3 answers"):
        es.step(PROMPTS, ANSWERS[:3])
    with pytest.raises(ValueError, match="0 prompts and 0 answers"):
        es.step([], [])
    for reward in (lambda texts, _: [0.0], lambda texts, _: [float("nan")] * len(texts)):
        es.reward = reward
        with pytest.raises(ValueError, match="for 32 completions"):
            es.step(PROMPTS, ANSWERS)
    assert torch.equal(es.numbers(), torch.zeros_like(es.numbers()))


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    return write_model(folder / "model"), write_problems(folder / "data")


def flags(gsm8k, out, *more):
    small = {"u": 13, "n-tie": 100, "population": 8, "prompts": 4, "sigma": 0.3, "lr": 0.3, "steps": 6, "save-every": 2}
    small |= {"model": gsm8k[0], "data": gsm8k[1], "out": out, "dtype": "float32", "max-completion-length": 9}
    return ["train", "es", *(str(x) for k, v in small.items() for x in (f"--{k}", v)), *map(str, more)]


def test_the_command_trains_logs_and_a_killed_run_goes_on(gsm8k, tmp_path, capsys):
    assert cli.main(flags(gsm8k, tmp_path / "whole", "--cache", "static")) == 0
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(entry["completions"] == 32 and entry["reward"] == pytest.approx(entry["strict"]) for entry in log)
    assert sorted(p.name for p in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert "13 numbers evolve, 12 problems, 6 generations" in capsys.readouterr().out

    killed = tmp_path / "killed"  # in the sixth generation, while it wrote the log
    shutil.copytree(tmp_path / "whole", killed)
    shutil.rmtree(killed / "adapter")
    shutil.rmtree(killed / "checkpoint-6")
    (killed / "log.jsonl").write_text((killed / "log.jsonl").read_text()[:-20])
    (killed / "checkpoint-5").mkdir()
    (killed / "checkpoint-5/adapter.safetensors").write_bytes(b"half")
    assert cli.main(["train", "es", "--out", str(killed), "--resume"]) == 0
    said = capsys.readouterr()
    assert "checkpoint-5 is not whole" in said.err and "resumed from checkpoint-4" in said.out
    assert (killed / "log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
    one, other = (load_file(folder / "adapter/adapter.safetensors") for folder in (killed, tmp_path / "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prompts", 13), "es.prompts is 13, expected 1 to 12"),
        (("--population", 3), "population is 3, expected an even number"),
        (("--population", 0), "es.population is 0, expected an integer of at least 1"),
        (("--steps", -3), "steps is -3, expected an integer of at least 1"),
        (("--steps", 0), "steps is 0, expected an integer of at least 1"),
        (("--save-every", 0), "save_every is 0, expected an integer of at least 1"),
        (("--cache", "small"), "cache_implementation"),
        (("--reward", "luck"), "reward is 'luck', expected one of strict, lenient"),
        (("--resume",), "run.json does not exist"),
    ],
)
def test_the_command_says_what_does_not_fit(gsm8k, tmp_path, capsys, more, message):
    arguments = flags(gsm8k, tmp_path / "out", *more)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_takes_what_can_evolve(gsm8k, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(flags(gsm8k, tmp_path, "--adapter", "lora"))
    assert "invalid choice: 'lora' (choose from" in capsys.readouterr().err
    recipe = {"about": "cannot evolve"} | recipes.read(recipes.DEFAULT)
    recipe["adapter"] = {"kind": {"value": "lora", "source": "ours", "note": ""}}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    # Before anything is loaded: the model does not exist.
    where = {"recipe": "mine.json", "model": "none", "out": "out"}
    assert cli.main(["train", "es", *(f"--{flag}={tmp_path / name}" for flag, name in where.items())]) == 2
    assert "the adapter is a LoraConfig, expected TinyLoraConfig or LoraXSConfig" in capsys.readouterr().err


def test_a_step_leaves_the_model_s_stack_and_settings():
    es = evolution(TinyLoraConfig(u=3, n_tie=4))
    model, ids = es.model, torch.tensor([PROMPTS[1], PROMPTS[1]])
    sets = [{n: torch.randn(3) for n in es._parameters()} for _ in range(2)]
    tinylora.stack(model, sets)
    model.generation_config.suppress_tokens = [CHARS.convert_tokens_to_ids("3")]
    settings = model.generation_config
    with tinylora.adapter_ids(model, [0, 1]):
        before = model(ids).logits
    first = es.rewards(torch.randn(2, len(es.numbers()), generator=torch.Generator().manual_seed(1)), PROMPTS, ANSWERS)
    with tinylora.adapter_ids(model, [0, 1]):
        assert torch.equal(model(ids).logits, before)
    assert model.generation_config is settings
    model.generation_config.suppress_tokens = None
    again = es.rewards(torch.randn(2, len(es.numbers()), generator=torch.Generator().manual_seed(1)), PROMPTS, ANSWERS)
    assert torch.equal(first, again), "a checkpoint's own settings do not act"


def test_an_encoder_decoder_s_texts_are_whole():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=len(CHARS), decoder_start_token_id=0
    )
    es = evolution(TinyLoraConfig(), T5ForConditionalGeneration(config).eval())
    es.settings |= {"min_new_tokens": 5, "eos_token_id": None}
    tinylora.stack(es.model, es._named(es.numbers()[None]))
    out, width = es._generated(1, [[5, 6, 7, 8, 9, 10, 11]])
    assert out[:, width:].shape == (1, 5)


def test_rewards_that_differ_by_rounding_are_no_step():
    """The same rewards in another order, for every adapter."""

    def reward(completions, answers):
        return [[0.1, 0.2, 0.3, 0.7][(i % 4 + i // 4) % 4] for i in range(len(completions))]

    es = evolution(TinyLoraConfig(u=3, n_tie=4), reward=reward)
    assert es.step(PROMPTS, ANSWERS).moved == 0 and es.numbers().abs().max() == 0
    for wrong in ({"sigma": float("inf")}, {"lr": float("nan")}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match="expected"):
            evolution(TinyLoraConfig(u=3, n_tie=4), **wrong)


def test_a_folder_whose_name_is_not_utf8_is_noted_as_it_is(tmp_path):
    from tinylora.integrations import run_folder

    name = os.fsdecode(b"donn\xe9es")
    run_folder.write_run(tmp_path, "es", {"data": name}, "digest")
    assert run_folder.read_run(tmp_path)["settings"]["data"] == name
