"""The demo's task, its rows and figures, and a few real steps of every part of it."""

import hashlib
import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_model

from bench import addition, demo, demo_rows, demo_tables
from bench.__main__ import main

WORDS = addition.tokenizer()


def test_the_split_is_disjoint_whole_and_always_the_same():
    parts = addition.split()
    assert {k: len(v) for k, v in parts.items()} == {"train": 8500, "validation": 500, "test": 1000}
    assert len(set().union(*parts.values())) == 10000
    assert parts == addition.split() and parts["test"][0] != (90, 0)


def test_answers_and_demonstrations():
    found = {mode: addition.answer((37, 48), mode) for mode in addition.MODES}
    assert found == {"sum": "085", "careless": "075", "difference": "011"}
    assert addition.answer((99, 99)) == "198" and addition.answer((99, 99), "careless") == "088"
    assert addition.prompt((3, 40)) == "03+40="
    rng = random.Random(0)
    assert addition.demonstration((37, 48), 0, rng) == "085"
    noisy = {addition.demonstration((37, 48), 6, rng) for _ in range(9)}
    assert len(noisy) == 9 and all(re.fullmatch("[a-z]{6}085", text) for text in noisy)


def test_the_reward_ignores_letters_and_nothing_else():
    right = ["085", "abcdef085", "0a8b5", "085zz"]
    wrong = ["", "85", "0850", "075", "085+", "abcdef"]
    assert addition.reward(right, ["085"] * 4) == [1.0] * 4
    assert addition.reward(wrong, ["085"] * 6) == [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]  # a sign is no digit
    with pytest.raises(ValueError):
        addition.reward(["085"], [])


def test_every_character_is_a_token_and_the_base_never_sees_letters():
    ids = WORDS("37+48=").input_ids
    assert len(ids) == 7 and ids[0] == WORDS.bos_token_id
    assert WORDS.decode(WORDS("abc085" + addition.EOS).input_ids[1:], skip_special_tokens=True) == "abc085"
    letters = set(WORDS.convert_tokens_to_ids(list(addition.LETTERS)))
    for mode in addition.MODES:
        assert not letters & set(addition._lines(addition.split()["train"], mode, WORDS).flatten().tolist())


def test_pretraining_learns_and_is_the_same_twice():
    pairs = addition.split()["train"][:64]

    def loss(model):
        ids = addition._lines(pairs, "sum", WORDS)
        return model(input_ids=ids, labels=ids).loss.item()

    ticks = []
    first = addition.pretrain(WORDS, pairs, steps=40, batch=32, tick=lambda: ticks.append(1))
    again = addition.pretrain(WORDS, pairs, steps=40, batch=32)
    assert len(ticks) == 40 and loss(first) < loss(addition.small_qwen2(WORDS)) - 0.5
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.fixture
def folder(tmp_path):
    """With a base of random weights."""
    (tmp_path / "demo").mkdir()
    save_model(addition.small_qwen2(WORDS), tmp_path / "demo/base.safetensors")
    return tmp_path / "demo"


RUNS = [
    replace(run, steps=2, seed=0, population=8 if run.method == "ES" else None)
    for run in demo.DEMO
    if (run.method, run.adapter) != ("GRPO", "full") and (run.data, run.adapter) != ("noisy", "LoRA")
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_each_kind_of_training_takes_its_steps_and_changes_what_it_should(run, folder, monkeypatch):
    monkeypatch.setattr(demo, "BATCH", 32)
    monkeypatch.setattr(demo, "PROMPTS", 2)
    small = {k: v[:40] for k, v in addition.split().items()}
    monkeypatch.setattr(addition, "split", lambda: small)
    models, adapt = [], demo.adapt
    monkeypatch.setattr(demo, "adapt", lambda *given: models.append(adapt(*given)) or models[0])
    rows = demo.measure(replace(run, lr=0.05), folder, ("validation", "test"), every=1)
    assert [row["step"] for row in rows] == [0, 1, 2]
    trained = {"TinyLoRA": 13, "LoRA": 22528, "full": 126080}[run.adapter]
    assert {row["trained"] for row in rows} == {trained}
    per_step = {"GRPO": 32, "ES": 8 * 2, "SFT": 0}[run.method]
    assert [row["completions"] for row in rows] == [0, per_step, 2 * per_step]
    base, _ = demo.load_base(folder, WORDS)
    before = base.state_dict()
    changed = {n for n, p in models[0].named_parameters() if n not in before or not torch.equal(p, before[n])}
    if run.method == "SFT":
        assert changed  # a reward may be zero throughout on random weights, a loss is not
    if run.adapter != "full":
        assert not changed & {n for n in before if ".adapters." not in n and not n.startswith("tinylora.")}


def test_a_zero_adapter_is_the_base(folder):
    runs = demo_rows.Run("base"), demo_rows.Run("zero adapter", **demo_rows.tiny())
    small = [demo.measure(run, folder, ("validation",))[0] for run in runs]
    columns = ("validation_greedy", "validation_sampled")
    assert [small[0][c] for c in columns] == [small[1][c] for c in columns]
    base, _ = demo.load_base(folder, WORDS)
    zero = demo.adapt(demo.load_base(folder, WORDS)[0], demo_rows.Run("zero adapter", **demo_rows.tiny(), seed=1))
    ids = WORDS([addition.prompt(p) for p in addition.split()["test"][:50]], return_tensors="pt").input_ids
    assert torch.equal(base(ids).logits, zero(ids).logits)


def row(run, greedy, validation=0.5, **more):
    cells = dict.fromkeys(demo_rows.COLUMNS, "1")
    cells |= {c: "" if v is None else str(v) for c, v in zip(demo_rows.RUN_COLUMNS, demo_rows.key_of(run), strict=True)}
    accuracies = {"test_greedy": greedy, "test_sampled": 0.4}
    accuracies |= {"validation_greedy": validation, "validation_sampled": 0.1}
    more = {"step": run.steps} | more
    return cells | {k: str(v) for k, v in accuracies.items()} | {k: str(v) for k, v in more.items()}


def test_table_and_figures(tmp_path):
    rows = [row(demo_rows.Run("base", steps=5), 0.3)]
    rows += [row(replace(run, seed=s), 0.5 + 0.1 * s, trained=13) for run in demo.DEMO for s in demo_rows.SEEDS]
    text = demo_tables.table(rows)
    assert "| 60.0 (50.0 to 70.0) |" in text and "replication" in text
    assert text.count("\n| ") == 1 + 1 + len(demo.DEMO) - 1
    demo_rows.write(tmp_path / "demo.csv", rows)
    assert text in demo_tables.markdown(tmp_path) and demo_tables.markdown(tmp_path / "none") == ""
    demo_tables.plot(rows, tmp_path / "demo.png")
    runs = [
        demo_rows.Run("GRPO", "", **demo_rows.tiny(), lr=0.1, steps=8),
        demo_rows.Run("ES", "", **demo_rows.tiny(), lr=0.1, steps=8),
    ]
    curve = [
        row(replace(run, seed=s), 0.1 * k, step=k, cpu_s=2 * k, completions=100 * k)
        for run in runs
        for s in demo_rows.SEEDS
        for k in range(1, 7 + s)
    ]
    text = demo_tables.evolution_table(curve)
    assert re.search(r"\| GRPO +\| 70% +\| -, 14.0, 14.0 +\| -, 700, 700 +\|", text), text
    demo_tables.plot_evolution(curve, tmp_path / "evolution.png")
    cells = [(u, n, lr, s) for u in demo_rows.SWEEP_U for n in demo_rows.SWEEP_TIE for lr in (0.1, 0.2) for s in (0, 1)]
    swept = [
        row(demo_rows.Run("GRPO", "", **demo_rows.tiny(u=u, n_tie=n), lr=lr, seed=s), lr * 4, validation=lr, trained=u)
        for u, n, lr, s in cells
    ]
    text = demo_tables.sweep_table([rows[0], *swept])
    assert text.count("80.0 / 40.0") == 12 and "40.0 / 40.0" not in text  # the rate that did best on validation
    demo_tables.plot_sweep([rows[0], *swept], tmp_path / "sweep.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_an_interrupted_file_is_completed_and_a_whole_one_made_again():
    runs = [demo_rows.Run("zero adapter", **demo_rows.tiny(), seed=s) for s in range(3)]
    rows = [row(run, 0.9, base="this") for run in runs]
    begun = row(replace(runs[2], steps=8), 0.1, base="this", step=4)  # of a curve that was cut in the middle
    assert demo_rows.unfinished([*rows[:2], begun], [*runs[:2], replace(runs[2], steps=8)], "this")[0] == rows[:2]
    assert demo_rows.unfinished(rows[:2], runs, "this") == (rows[:2], runs[2:])
    assert demo_rows.unfinished([rows[0], row(runs[1], 0.9, base="other")], runs, "this") == (rows[:1], runs[1:])
    assert demo_rows.unfinished(rows, runs, "this") == ([], runs)
    assert demo_rows.unfinished(rows, runs, None) == ([], runs)
    other = replace(runs[0], lr=0.1)
    assert demo_rows.unfinished(rows, [other, runs[1]], "this") == (rows[1:2], [other])


def test_a_worker_completes_the_file_of_a_killed_run(folder, monkeypatch):
    digest = hashlib.sha256((folder / "base.safetensors").read_bytes()).hexdigest()[:10]
    runs = [demo_rows.Run("zero adapter", **demo_rows.tiny(), seed=s) for s in range(2)]
    demo_rows.write(folder / "demo.csv", [row(runs[1], 0.99, base=digest)])
    with (folder / "demo.csv").open("a") as file:
        file.write("zero adapter,,TinyLoRA")  # a line that was being written
    monkeypatch.setattr(demo, "WORKERS", 1)
    rows = demo.carry_out(folder, "demo", runs, ("validation",))
    assert [r["test_greedy"] for r in rows] == ["", "0.99"] and rows[0]["base"] == digest
    assert rows == demo_rows.read(folder / "demo.csv")


def test_the_command_has_one_part_at_a_time(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--sweep", "--choose"])
    assert "not allowed with" in capsys.readouterr().err
