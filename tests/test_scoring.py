"""GSM8K's files, scorers and intervals, and the recipes: no model, and nothing of TRL."""

import json
from pathlib import Path

import pytest
import tiny_gsm8k
import torch

import tinylora
from tinylora import recipes
from tinylora.integrations.problems import digest, load_problems
from tinylora.integrations.transformers import meta_model
from tinylora.nn.targets import find_targets, sites_of
from tinylora.tasks import gsm8k
from tinylora.tasks.intervals import wilson


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [
        ("so 9 x 2 = $18.\n#### 18", "18", "18"),
        ("#### 18", "18", "18"),
        ("####18", "18", "18"),
        ("#### $1,018.00", "1018", "1018"),
        ("#### -3", "-3", "-3"),
        ("#### -$3", "-3", "-3"),
        ("#### $-3", "-3", "-3"),
        ("$20-$5", None, "5"),
        ("#### .50", "0.5", "0.5"),
        ("#### 5\nNo, wait:\n#### 18\nThat is 3 a day.", "18", "18"),  # the last mark, whatever follows
        ("The answer is 18.", None, "18"),
        ("\\boxed{18}", None, "18"),
        ("#### eighteen, or 18", None, "18"),
        ("20-2=18", None, "18"),
        ("20-2", None, "2"),  # a subtraction's minus is no sign
        ("one of 1,2,3", None, "3"),  # commas that separate no thousands
        ("1,000 and 2,500,000", None, "2500000"),
        ("18%", None, "18"),
        ("#### 100", "100", "100"),  # its trailing zeros are not those of a fraction
        (f"#### {'1' * 35}.50", f"{'1' * 35}.5", f"{'1' * 35}.5"),
        ("#### " + "9" * 2_000_000, "9" * 2_000_000, "9" * 2_000_000),
        ("I do not know ####", None, None),
        ("", None, None),
    ],
)
def test_answers(completion, strict, lenient):
    assert gsm8k.strict_answer(completion) == strict
    assert gsm8k.lenient_answer(completion) == lenient
    for final in ("18", "3", "1018"):
        assert gsm8k.strict(completion, final) == (strict == final)
        assert gsm8k.lenient(completion, final) == (lenient == final)


def test_what_strict_counts_lenient_counts():
    pieces = ["#### ", "18", "\n", " is 7", "$", "-", ",", "####", "."]
    generator = torch.Generator().manual_seed(0)
    counted = 0
    for _ in range(2000):
        text = "".join(pieces[i] for i in torch.randint(len(pieces), (6,), generator=generator))
        if gsm8k.strict(text, "18"):
            counted += 1
            assert gsm8k.lenient(text, "18"), text
    assert counted > 100


def test_problems_from_a_folder_a_file_and_parquet(tmp_path):
    folder = tiny_gsm8k.write_problems(tmp_path / "flat")
    problems = load_problems(folder, "train")
    assert [p.final for p in problems] == [str(n) for _, _, n in tiny_gsm8k.PROBLEMS]
    assert problems[0].solution == "2 + 3 = <<2+3=5>>5 hens.\n#### 5"
    assert problems[0].plain_solution == "2 + 3 = 5 hens.\n#### 5"
    assert len(load_problems(folder, "test")) == 6
    tiny_gsm8k.write_problems(tmp_path / "github" / "grade_school_math" / "data")
    assert load_problems(tmp_path / "github", "train") == load_problems(folder / "train.jsonl", "train") == problems
    import datasets

    (tmp_path / "hub" / "main").mkdir(parents=True)
    table = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    table.to_parquet(tmp_path / "hub" / "main" / "train-00000-of-00001.parquet")
    assert load_problems(tmp_path / "hub", "train") == problems
    assert digest(problems) == digest(list(problems)) != digest(problems[::-1])


def test_what_is_no_gsm8k(tmp_path):
    folder = tiny_gsm8k.write_problems(tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"no problems of the split 'dev'.*dev\.jsonl.*found test\.jsonl, train\.jsonl"
    ):
        load_problems(folder, "dev")
    with pytest.raises(ValueError, match="does not exist, expected a folder"):
        load_problems(tmp_path / "none", "train")
    with pytest.raises(ValueError, match="no local folder, and the Hub does not give it"):
        load_problems("nobody/nothing", "train")
    good = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"})
    for line, message in (
        ("{", r"line 2 is not JSON"),
        ('{"question": "?"}', 'expected a record with the texts "question" and "answer"'),
        ('["question", "answer"]', "expected a record"),
        ('{"question": "?", "answer": "It is 2."}', 'expected a line "#### <number>"'),
    ):
        (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
        with pytest.raises(ValueError, match=message) as raised:
            load_problems(tmp_path / "bad.jsonl", "train")
        assert "line 2" in str(raised.value)
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        load_problems(tmp_path / "bad.jsonl", "train")
    with pytest.raises(ValueError, match=r"expected a text with \{question\}"):
        gsm8k.prompt("?", "Answer.")


@pytest.mark.parametrize(  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilsons_interval_refuses():
    for correct, total in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="expected 0 <= correct <= total"):
            wilson(correct, total)


def test_the_recipe_is_the_papers_run_and_every_value_says_where_it_is_from(tmp_path):
    values = recipes.load("gsm8k-13")
    rows = recipes.rows("gsm8k-13")
    assert all(source in ("paper", "ours") and note for _, _, source, note in rows)
    from_paper = {name: json.loads(value) for name, value, source, _ in rows if source == "paper"}
    assert from_paper.items() >= {
        "model": "Qwen/Qwen2.5-7B-Instruct", "data": "openai/gsm8k", "batch_size": 64, "adapter.r": 2, "adapter.u": 1,
        "adapter.n_tie": 16, "grpo.num_generations": 4, "grpo.max_completion_length": 4096, "grpo.beta": 0.0,
        "grpo.num_train_epochs": 3,
    }.items()  # fmt: skip
    config = tinylora.adapters.config_from_dict(values["adapter"])
    qwen_7b = {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(qwen_7b))
    assert config.count(sites_of(find_targets(meta_model(tmp_path), None))) == 13


def test_the_docs_have_the_recipe_as_it_is():
    shown = (Path(__file__).parents[1] / "docs" / "training.md").read_text().splitlines()
    rows = [f"| {name} | `{value}` | {source} | {note} |" for name, value, source, note in recipes.rows("gsm8k-13")]
    start = shown.index(rows[0])
    assert shown[start : start + len(rows)] == rows
    assert not any(line.startswith("|") for line in shown[start + len(rows) :])


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "own.json"
    found = {"about": "mine"} | recipes.read("gsm8k-13")
    found["grpo"]["learning_rate"]["value"] = 0.5
    path.write_text(json.dumps(found))
    assert recipes.load(path)["grpo"]["learning_rate"] == 0.5

    def broken(change, message):
        copy = json.loads(json.dumps(found))
        change(copy)
        path.write_text(json.dumps(copy))
        with pytest.raises(ValueError, match=message):
            recipes.load(path)

    broken(lambda r: r.pop("about"), 'has no "about"')
    broken(lambda r: r.pop("seed"), "'seed' is missing")
    broken(lambda r: r.update(sead=r["seed"]), "'sead' is unknown")
    broken(lambda r: r["eval"].pop("split"), "eval: 'split' is missing")
    broken(lambda r: r.update(seed=3), r'seed is 3, expected \{"value"')
    broken(lambda r: r["seed"].update(source="rumour"), "rumour")
    broken(lambda r: r["seed"].update(value="3"), "seed has the value '3', expected int")
    broken(lambda r: r["grpo"].update(beta=0.0), "grpo.beta is 0.0")
    broken(lambda r: r.update(grpo={"value": 1, "source": "ours", "note": ""}), "grpo is .*, expected a section")
    with pytest.raises(ValueError, match="expected one of gsm8k-13, or a JSON file"):
        recipes.load(tmp_path / "none.json")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        recipes.load(path)


@pytest.mark.parametrize("answer", ["1/2", "10:30", "2 1/2", "1e3", "1 000", "1,00", "3.5.1"])
def test_a_reference_that_is_no_plain_number_is_refused(answer):
    with pytest.raises(ValueError, match="expected a line"):
        gsm8k.problem({"question": "q", "answer": f"so\n#### {answer}"}, "here")


def test_a_typographic_minus():
    assert gsm8k.lenient("It is \u22125.", "-5") and not gsm8k.lenient("It is \u22125.", "5")
    assert gsm8k.strict("#### \u22125", "-5")
    for answer, final in (("\u22127", "-7"), ("1,000", "1000"), ("$72 a day", "72")):
        assert gsm8k.problem({"question": "q", "answer": f"#### {answer}"}, "here").final == final
