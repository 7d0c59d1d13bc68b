"""A language model of a few thousand numbers that speaks GSM8K's format, and a dozen problems of our own in it."""

import json
import shutil
from pathlib import Path

import torch
from models import qwen2

from tinylora import recipes
from tinylora.tasks import gsm8k

# Final answers below ten: one digit, which a tiny model finds by chance often enough for a reward.
PROBLEMS = (
    ("Ann has 2 hens and buys 3 more. How many hens has she?", "2 + 3 = <<2+3=5>>5 hens.", 5),
    ("A boat has 4 seats and 1 is taken. How many are free?", "4 - 1 = <<4-1=3>>3 seats.", 3),
    ("Two bags hold 4 plums each. How many plums are there?", "2 * 4 = <<2*4=8>>8 plums.", 8),
    ("Six coins are shared by 3 boys. How many gets each?", "6 / 3 = <<6/3=2>>2 coins.", 2),
    ("Leo reads 1 book a week. How many in 7 weeks?", "1 * 7 = <<1*7=7>>7 books.", 7),
    ("A rope of 9 m loses 5 m. How long is it now?", "9 - 5 = <<9-5=4>>4 m.", 4),
    ("Mia had 8 pens and lost 8. How many are left?", "8 - 8 = <<8-8=0>>0 pens.", 0),
    ("A cat has 3 kittens, a dog 6 pups. How many young?", "3 + 6 = <<3+6=9>>9 young.", 9),
    ("A jar with 7 nuts, 6 eaten. How many are left?", "7 - 6 = <<7-6=1>>1 nut.", 1),
    ("Three tables with 2 lamps each. How many lamps?", "3 * 2 = <<3*2=6>>6 lamps.", 6),
    ("Tom walks 1 km there and 1 km back. How far?", "1 + 1 = <<1+1=2>>2 km.", 2),
    ("Ten eggs, 5 are boiled. How many are raw?", "10 - 5 = <<10-5=5>>5 eggs.", 5),
)


def write_problems(folder: Path) -> Path:
    """train.jsonl and test.jsonl in GSM8K's own format."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": q, "answer": f"{a}\n#### {n}"}) + "\n" for q, a, n in PROBLEMS]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "test.jsonl").write_text("".join(lines[:6]))
    return folder


def tokenizer():
    """Qwen2's kind of tokenizer with nothing merged: every byte a token. No chat template, as a base model has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def write_model(folder: Path, dtype=torch.float32, steps=100, **changes) -> Path:
    """A model folder. The model has learned the format, "\n#### 7", and says any digit: RL has something to reward."""
    chars = tokenizer()
    model = qwen2(**{"hidden": 32, "intermediate_size": 64, "vocab_size": len(chars), "seed": 1} | changes).train()
    model.config.eos_token_id = model.generation_config.eos_token_id = chars.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = chars.pad_token_id
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    instruction = recipes.load(recipes.DEFAULT)["instruction"]
    prompts = [gsm8k.prompt(question, instruction) for question, _, _ in PROBLEMS]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        digits = torch.randint(10, (len(prompts),), generator=generator).tolist()
        texts = [f"{p}\n#### {d}" for p, d in zip(prompts, digits, strict=True)]
        ids = chars(texts, padding=True, return_tensors="pt")["input_ids"]
        ids = torch.nn.functional.pad(ids, (0, 1), value=chars.eos_token_id)
        logits = model(ids, attention_mask=(ids != chars.pad_token_id).long()).logits[:, -9:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -8:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.to(dtype).eval().save_pretrained(folder)
    chars.save_pretrained(folder)
    return folder


def write_chat_model(model: Path, folder: Path) -> Path:
    """The same as a chat model, as Qwen2.5-7B-Instruct is one. A user's turn is its text, after which it has learned
    to answer."""
    shutil.copytree(model, folder)
    chars = tokenizer()
    chars.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    )
    chars.save_pretrained(folder)
    return folder
