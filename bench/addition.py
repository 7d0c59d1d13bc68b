"""The task of the demo: addition that a model has seen done in three ways, in characters, small enough to train here.

    37+48=085

A model trained from scratch on such lines finds three kinds of answers there, drawn at random: the sum, 30 % of the
time; the sum without carries (075), 50 %; the difference (011), 20 %. Its most likely answer is therefore the
careless one, and what remains for an adapter to learn is mostly which of the ways is wanted. All pairs of numbers
below 100 are split once: the base learns from TRAIN alone, and so does whatever is trained on top of it; settings are
chosen on VALIDATION, and what is reported comes from TEST.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
MODES = {"sum": 0.3, "careless": 0.5, "difference": 0.2}  # how often the base's training answers so

ANSWER_TOKENS = 4  # three digits and <eos>

Pair = tuple[int, int]


def split() -> dict[str, list[Pair]]:
    """The 10000 pairs as "train" (8500), "validation" (500) and "test" (1000), always the same."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)
    return {"train": pairs[:8500], "validation": pairs[8500:9000], "test": pairs[9000:]}


def prompt(pair: Pair) -> str:
    return "{:02d}+{:02d}=".format(*pair)


def answer(pair: Pair, mode: str = "sum") -> str:
    a, b = pair
    if mode == "careless":
        return f"{10 * ((a // 10 + b // 10) % 10) + (a + b) % 10:03d}"
    return f"{a + b if mode == 'sum' else abs(a - b):03d}"


def demonstration(pair: Pair, noise: int, rng: random.Random) -> str:
    """The right answer after `noise` letters that mean nothing: what a demonstrator does, and a reward ignores."""
    return "".join(rng.choices(LETTERS, k=noise)) + answer(pair)


def reward(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 for a completion whose digits are the answer, wherever letters stand, else 0."""
    digits = ("".join(c for c in text if c in DIGITS) for text in completions)
    return [float(found == wanted) for found, wanted in zip(digits, answers, strict=True)]


def tokenizer():
    """Every character is a token; prompts start with <bos> and are padded on the left."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate([PAD, BOS, EOS, *DIGITS, "+", "=", *LETTERS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    inner.pre_tokenizer = Split("", "isolated")
    inner.decoder = Fuse()  # no spaces between
    inner.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )


def small_qwen2(words) -> nn.Module:
    """A Qwen2 of 126 thousand parameters with random weights, for the tokenizer `words`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 64}
    # twice the usual spread learns this in half the steps; five times in a third, but then 13 numbers move it less
    sizes["initializer_range"] = 0.04
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ends = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), **sizes, **heads, **ends))


def pretrain(
    words, pairs: Sequence[Pair], steps: int = 1000, batch: int = 256, lr: float = 3e-3, tick=None
) -> nn.Module:
    """A model trained from scratch on lines whose answers are drawn from MODES anew at every step.

    AdamW with a one-cycle rate. The prompt is not predicted, because its digits are chance. tick() is called at every
    step.
    """
    model = small_qwen2(words).train()
    ids = torch.stack([_lines(pairs, mode, words) for mode in MODES])
    labels = ids.clone()
    labels[..., :-ANSWER_TOKENS] = -100
    share = torch.tensor(list(MODES.values()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        which = torch.randint(len(pairs), (batch,), generator=g)
        mode = torch.multinomial(share, batch, replacement=True, generator=g)
        loss = model(input_ids=ids[mode, which], labels=labels[mode, which], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if tick:
            tick()
    return model.eval()


def _lines(pairs: Sequence[Pair], mode: str, words) -> Tensor:
    return words([prompt(p) + answer(p, mode) + EOS for p in pairs], return_tensors="pt").input_ids


@torch.no_grad()
def completions(model: nn.Module, words, pairs: Sequence[Pair], temperature: float, new: int = 12) -> list[str]:
    """What the model writes after each prompt: its likeliest text at temperature 0, else a sample."""
    was, model = model.training, model.eval()
    batch = words([prompt(p) for p in pairs], return_tensors="pt")
    chance = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new, **chance)
    model.train(was)
    return words.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def accuracy(model: nn.Module, words, pairs: Sequence[Pair], temperature: float, seed: int = 0) -> float:
    """The share of pairs that the model adds rightly. Sampling does not touch the caller's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts = completions(model, words, pairs, temperature)
    return sum(reward(texts, [answer(p) for p in pairs])) / len(pairs)
