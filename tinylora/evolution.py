"""Training without gradients: evolution strategies over an adapter's few numbers, a whole generation per generate().

    v ← v + η / n · Σᵢ Fᵢ εᵢ         ε [n, d] ~ N(0, I) in pairs ±ε, F the fitness at v + σ εᵢ, standardised

d numbers (13, say) are so few that n perturbed adapters fit into one batch: row i·m + j runs adapter i on prompt j, by
`tinylora.stack` and `tinylora.adapter_ids`. There is no backward pass, no optimiser state and no log-probability, and
the reward need not be of the kind that sampling makes smooth: greedy answers can be scored as they are.

After Salimans et al., arXiv 1703.03864 (antithetic pairs; one step size). Standardising the fitness is GRPO's
advantage, taken over adapters in the place of completions: it makes η the length of a step where the fitness is linear.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinylora.adapters import noise
from tinylora.generation import ends_of_text, evaluating, own_settings, padded_left, until_end
from tinylora.nn.model import shared_of, trained_numbers
from tinylora.nn.rows import adapter_ids, own_stack, refuse_whole_modules

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Generation:
    """What one step saw and did: the perturbed adapters' mean and best reward and its spread, |Δv|, texts generated."""

    number: int
    reward: float
    best: float
    spread: float
    moved: float
    completions: int


class Evolution:
    """Evolution strategies on a model with a TinyLoRA or LoRA-XS adapter; each `step` is one generation.

        es = Evolution(model, tokenizer, reward, max_new_tokens=256)
        for prompts, answers in batches:
            print(es.step(tokenizer(prompts).input_ids, answers))

    tokenizer:      has a pad_token; padding is done here, on the left
    reward:         (completions, answers), two lists of one length, to as many finite numbers
    population (n): perturbed adapters in a generation, even: they come in pairs v ± σ ε
    sigma (σ), lr (η): in the units of v. A step is about η long; σ is how far around v the reward is looked at
    temperature:    of the rollouts; 0 is greedy, and then the reward of greedy answers is what rises
    seed, number:   generation `number` draws its ε, and its samples, from (seed, number) alone: a run that is
                    continued with the numbers of the adapter and `number` is the run that was not interrupted
    max_new_tokens: of a rollout; name: of the adapter
    cache:          transformers' cache_implementation. "static": transformers compiles the decode step, on a GPU into
                    CUDA graphs, once for all generations of as many rows, and prompts are padded to a multiple of 128

    The generate() of a step has n · len(prompts) rows. The adapter's parameters are updated in place after it.
    ValueError: no adapter of that name, one of another kind, modules_to_save (they cannot differ by row), a merged
    model, an odd or non-positive population, sigma or lr not above 0, temperature below 0, no pad_token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        reward: Reward,
        *,
        max_new_tokens: int,
        population: int = 64,
        sigma: float = 0.1,
        lr: float = 0.1,
        temperature: float = 0.0,
        seed: int = 0,
        number: int = 0,
        cache: str | None = None,
        name: str = "default",
    ):
        shared = shared_of(model, name)
        kind = type(shared.config).__name__
        if not next(iter(shared.layers.values())).core_alone_trains:
            raise ValueError(f"adapter {name!r} is of {kind}, expected TinyLoraConfig or LoraXSConfig: see stack")
        refuse_whole_modules(shared, name)
        if population < 2 or population % 2:
            raise ValueError(f"population is {population}, expected an even number, 2 or more: pairs v ± σ ε")
        for what, value in (("sigma", sigma), ("lr", lr)):
            if not 0 < value < math.inf:
                raise ValueError(f"{what} is {value}, expected a number above 0")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or above")
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer has no pad_token, expected one: prompts of a batch differ in length")
        self.model, self.tokenizer, self.reward, self.name = model, tokenizer, reward, name
        self.population, self.sigma, self.lr, self.seed, self.number = population, sigma, lr, seed, number
        self.settings = {"max_new_tokens": max_new_tokens}
        self.ends = ends_of_text(model, tokenizer)
        self.settings |= {"pad_token_id": tokenizer.pad_token_id, "do_sample": temperature > 0}
        self.settings |= {"eos_token_id": sorted(self.ends)} if self.ends else {}
        if temperature > 0:
            self.settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if cache is not None:
            self.settings["cache_implementation"] = cache
        self.stack: dict = {}  # kept: a captured graph reads a generation where the first one lay

    def step(self, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> Generation:
        """One generation on these prompts (token ids), the same for every perturbed adapter, and the update.

        ValueError: no prompts, not as many answers, a reward that gives not as many numbers or one that is not finite.
        """
        mean = self.numbers()
        half = noise.normal(self.seed, f"generation {self.number}", self.population // 2, len(mean))
        epsilon = torch.cat((half, -half))
        rewards = self.rewards(mean + self.sigma * epsilon, prompts, answers)
        fitness = rewards.double().mean(1)
        spread = fitness.std(correction=0)
        step = torch.zeros_like(mean)
        if spread > 1e-6 * fitness.abs().max():  # otherwise all did equally well, and there is nowhere to go
            step = self.lr * (epsilon.T @ ((fitness - fitness.mean()) / spread).float()) / self.population
            self._write(mean + step)
        done = (fitness.mean(), fitness.max(), spread, step.norm())
        self.number += 1
        return Generation(self.number, *(float(x) for x in done), rewards.numel())

    def numbers(self) -> Tensor:
        """The adapter's d numbers, flat, fp32, on the CPU."""
        return torch.cat([p.detach().float().cpu().flatten() for p in self._parameters().values()])

    def rewards(self, adapters: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> Tensor:
        """What each of `adapters` [n, d] earns on each prompt, [n, m]: one generate() of n · m rows."""
        if len(prompts) != len(answers) or not prompts:
            raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers, expected as many, at least one")
        with own_stack(self.model, self.name, self._named(adapters), self.stack):
            out, width = self._generated(len(adapters), prompts)
        rows = [until_end(tokens, self.ends) for tokens in out[:, width:].tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        found = torch.tensor([float(r) for r in self.reward(texts, list(answers) * len(adapters))])
        if len(found) != len(texts) or not found.isfinite().all():
            raise ValueError(
                f"reward gave {len(found)} numbers for {len(texts)} completions, or one not finite: expected as many"
            )
        return found.view(len(adapters), len(prompts))

    def _generated(self, count: int, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """What `count` adapters make of the prompts, [count m, tokens], and how wide the prompts are in it."""
        width, device = max(map(len, prompts)), self._device()
        if self.settings.get("cache_implementation") == "static":  # of another length it would be compiled anew
            width += -width % 128
        decoder = getattr(self.model.config, "is_encoder_decoder", False)  # whose output begins with its start alone
        ids, mask = padded_left(prompts, self.tokenizer.pad_token_id, width, device)
        of_row = torch.arange(count, device=device).repeat_interleave(len(prompts))
        random = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with evaluating(self.model), random, torch.no_grad():
            torch.manual_seed(self.seed * 1_000_003 + self.number)
            with adapter_ids(self.model, of_row, self.name), own_settings(self.model):
                out = self.model.generate(
                    input_ids=ids.repeat(count, 1), attention_mask=mask.repeat(count, 1), **self.settings
                )
        return out, 1 if decoder else width

    def _parameters(self) -> dict[str, nn.Parameter]:
        return trained_numbers(self.model, self.name)

    def _named(self, adapters: Tensor) -> list[dict[str, Tensor]]:
        """Each of `adapters` [n, d] as `stack` takes it."""
        own = {n: p.shape for n, p in self._parameters().items()}
        sizes = [shape.numel() for shape in own.values()]
        return [
            {n: part.view(shape) for (n, shape), part in zip(own.items(), numbers.split(sizes), strict=True)}
            for numbers in adapters
        ]

    @torch.no_grad()
    def _write(self, numbers: Tensor) -> None:
        for value, p in zip(self._named(numbers[None])[0].values(), self._parameters().values(), strict=True):
            p.copy_(value)

    def _device(self) -> torch.device:
        return next(iter(self._parameters().values())).device
