"""What generating with transformers takes beside its generate(): padding, settings, where a text ends."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def ends_of_text(model: nn.Module, tokenizer) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings, as in TRL."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in (tokenizer.eos_token_id, *ends) if end is not None}


@contextlib.contextmanager
def own_settings(model: nn.Module) -> Iterator[None]:
    """Of the model's generation settings the special tokens alone: what is asked of generate() acts, and nothing else.

    A checkpoint's own (Qwen2.5's penalise repetition, others forbid tokens) would act wherever a call leaves them out.
    """
    before = model.generation_config
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    model.generation_config = type(before)(**{name: getattr(before, name, None) for name in special})
    try:
        yield
    finally:
        model.generation_config = before


def padded_left(prompts: Sequence[Sequence[int]], pad: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), [m, width]: a prompt ends where its answer begins."""
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval(), and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """What comes before the first of `ends`."""
    return tokens[: next((k for k, t in enumerate(tokens) if t in ends), len(tokens))]
