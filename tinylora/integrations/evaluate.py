"""A model's answers to GSM8K's problems, scored strictly and leniently."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from tinylora.generation import ends_of_text, evaluating, own_settings, padded_left, until_end
from tinylora.integrations import processes, vllm
from tinylora.integrations.transformers import prompt_ids
from tinylora.tasks import gsm8k
from tinylora.tasks.gsm8k import Problem
from tinylora.tasks.intervals import wilson


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    cache: str | None = None,
) -> list[str]:
    """The model's greedy completion of every prompt, in their order: one `generate` a batch, longest prompts first, so
    that a static cache (`cache` is transformers' cache_implementation) serves, and is compiled for, all full batches.

    Each prompt is a user's turn of the chat template where there is one. Of the model's own generation settings its
    special tokens alone act: Qwen2.5's would penalise repetition even in a greedy search.
    """
    ids = [prompt_ids(tokenizer, text) for text in prompts]
    ends = ends_of_text(model, tokenizer)
    completions = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(ids[i]))
    device = next(model.parameters()).device
    silent = None if processes.rank() == 0 else True
    with evaluating(model), tqdm(total=len(prompts), desc="generating", unit="problem", disable=silent) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(ids[i]) for i in batch)
            rows, mask = padded_left([ids[i] for i in batch], tokenizer.pad_token_id, width, device)
            with own_settings(model):
                out = model.generate(
                    input_ids=rows, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                    eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id,
                    **({"cache_implementation": cache} if cache else {}),
                )  # fmt: skip
            for i, tokens in zip(batch, out[:, width:].tolist(), strict=True):
                completions[i] = tokenizer.decode(until_end(tokens, ends), skip_special_tokens=True)
            bar.update(len(batch))
    return completions


def _complete_by_vllm(answer, model: nn.Module, tokenizer, ids: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """`complete` of the prompts with these ids, where `answer` is of `vllm.engine`."""
    from vllm import SamplingParams

    ends = ends_of_text(model, tokenizer)
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens, stop_token_ids=sorted(ends), detokenize=False)
    return [tokenizer.decode(until_end(found, ends), skip_special_tokens=True) for found in answer(ids, greedy)]


def evaluate(
    model: nn.Module,
    tokenizer,
    problems: Sequence[Problem],
    *,
    instruction: str,
    max_completion_length: int,
    batch_size: int,
    cache: str | None = None,
    tensor_parallel: bool = False,
    by_vllm: bool = False,
) -> dict[str, Any]:
    """pass@1 by each scorer, with Wilson's 95 % interval, and every completion.

    Under torchrun each process answers its share of the problems, and each returns the whole. With tensor_parallel they
    answer all of them together, as parts of one model. by_vllm: vLLM answers (`vllm.engine`), in batches of its own.

    One greedy completion a problem. {"problems": n, "scores": {scorer: {"correct", "pass@1", "low", "high"}},
    "completions": [{"question", "final", "completion", scorer: bool, ...}]}.
    """
    prompts = [gsm8k.prompt(p.question, instruction) for p in problems]
    rank, count = (0, 1) if tensor_parallel else (processes.rank(), processes.count())
    texts = [""] * len(prompts)
    with contextlib.ExitStack() as until_gathered:
        if by_vllm:
            ids = [prompt_ids(tokenizer, text) for text in prompts]
            answer = until_gathered.enter_context(vllm.engine(model, max(map(len, ids)) + max_completion_length))
            mine = _complete_by_vllm(answer, model, tokenizer, ids[rank::count], max_completion_length)
        else:
            settings = {"max_new_tokens": max_completion_length, "batch_size": batch_size, "cache": cache}
            mine = complete(model, tokenizer, prompts[rank::count], **settings)
        for other, found in enumerate([mine] if tensor_parallel else processes.gathered(mine)):
            texts[other::count] = found
    records = [
        {"question": p.question, "final": p.final, "completion": text}
        | {name: score(text, p.final) for name, score in gsm8k.SCORERS.items()}
        for p, text in zip(problems, texts, strict=True)
    ]
    scores = {}
    for name in gsm8k.SCORERS:
        correct = sum(record[name] for record in records)
        low, high = wilson(correct, len(records))
        scores[name] = {"correct": correct, "pass@1": correct / len(records), "low": low, "high": high}
    return {"problems": len(records), "scores": scores, "completions": records}
