"""`python -m bench rollout`: generating with an adapter in place: tokens per second, and whether training agrees.

Models are built from real configs with random weights. Two questions:

Speed: tokens per second of greedy generate() by the base, by PEFT's TinyLoRA, by ours with one adapter, and by ours
with many different ones in the batch; providers alternate.

Agreement: the log-probability of every sampled token as generation computed it (token by token, with a cache) and as
the training forward computes it (all at once): rolled out with the adapter merged into bf16 weights, as RL stacks do,
with PEFT unmerged, with ours unmerged, and by the base, whose own difference no adapter can go below.
"""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tinylora
from bench import providers as who
from bench import shapes, timing
from bench.rows import Results, Row
from tinylora.adapters.svd import truncated_svd

MERGED = "merged"
R, U = 2, 13
# How large v is when agreement is measured: a trained adapter's, not a broken model's.
SCALE = 0.05


def build(model: str, device: torch.device) -> nn.Module:
    """The model of bench/models/<model>.json in bf16, with random weights."""
    import transformers

    config = transformers.AutoConfig.for_model(**shapes.config(model))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            built = transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return built.eval().requires_grad_(False)


def values(count: int, scale: float = SCALE) -> list[Tensor]:
    return [scale * torch.randn(U, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def ours(base: nn.Module, model: str) -> nn.Module:
    """One v for the whole model, with numbers as training would leave them."""
    adapted = tinylora.apply(base, tinylora.TinyLoraConfig(r=R, u=U, n_tie=shapes.modules(model), sigma="split"))
    (v,) = tinylora.adapter_parameters(adapted)
    with torch.no_grad():
        v.copy_(values(1)[0])
    return adapted


def peft(base: nn.Module) -> nn.Module:
    """PEFT's own model; only its full SVDs are cut short (see `python -m bench svd`), which takes minutes off."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.TinyLoraConfig(r=R, u=U, weight_tying=1.0, target_modules=targets)
    with mock.patch("torch.linalg.svd", lambda W, **_: truncated_svd(W, R)):
        adapted = peft.get_peft_model(base, config).eval()
    (v,) = (p for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        v.copy_(values(1)[0])
    return adapted


def prompts(batch: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def generate(model: nn.Module, tokens: Tensor, new: int, **settings):
    """`new` tokens after each prompt, whatever comes (random weights know no end)."""
    plain = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **plain | settings)


def speed(model: str, results: Results, device, batch: int, adapters: list[int], new: int, budget: float) -> None:
    """Rows of op "rollout": milliseconds per generate() and tokens per second."""
    calls: dict[str, Callable[[], object]] = {}
    base = build(model, device)
    tokens = prompts(batch, 8, base.config.vocab_size, device)
    calls[who.BARE] = lambda: generate(base, tokens, new)
    with tqdm(total=3, desc=f"rollout {model}", unit="model", leave=False) as bar:
        adapted = ours(build(model, device), model)
        bar.update()
        calls[who.OURS] = lambda: generate(adapted, tokens, new)
        for count in adapters:
            stacked = tinylora.stack(ours(build(model, device), model), [{"v_0": v} for v in values(count)])
            ids = torch.arange(batch) % count

            def many(stacked=stacked, ids=ids):
                with tinylora.adapter_ids(stacked, ids):
                    return generate(stacked, tokens, new)

            calls[f"{who.OURS}, {count} adapters"] = many
        bar.update()
        theirs = peft(build(model, device))
        calls[who.PEFT] = lambda: generate(theirs, tokens, new)
        bar.update()
    with torch.no_grad():
        times = timing.alternate(calls, lambda i: None, 1, budget, device, graphs=False)
    for name, t in times.items():
        results.add(
            Row(
                "rollout", model, f"generate, {new} tokens", name, "generate", batch, None, None, R, U, "bf16",
                p50_ms=t.p50, p20_ms=t.p20, p80_ms=t.p80, rounds=t.rounds,
                ratio_to_bare=t.p50 / times[who.BARE].p50,
                note=f"{batch * new / t.p50 * 1e3:.1f} tokens/s",
            )
        )  # fmt: skip


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """Of every token after the prompt, by one forward over the whole sequence: [batch, new], fp32."""
    logits = model(tokens, use_cache=False).logits[:, prompt - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, prompt:, None]).squeeze(-1)


@torch.no_grad()
def rolled_out(model: nn.Module, tokens: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """(sequences, the log-probabilities that generation itself computed for the sampled tokens)."""
    torch.manual_seed(1)
    done = generate(model, tokens, new, do_sample=True, top_k=0, return_dict_in_generate=True, output_logits=True)
    logits = torch.stack(done.logits, 1).float()
    sampled = done.sequences[:, tokens.shape[1] :]
    return done.sequences, logits.log_softmax(-1).gather(-1, sampled.unsqueeze(-1)).squeeze(-1)


def agreement(model: str, out: Path, device, batch: int, new: int) -> dict[str, Tensor]:
    """|log p of generation - log p of the training forward|, per sampled token, by provider; prints and plots them."""
    tokens = prompts(batch, 8, shapes.config(model)["vocab_size"], device)
    length = tokens.shape[1]
    differences = {}

    def measure(name, sampler, trainer=None):
        sequences, sampled = rolled_out(sampler, tokens, new)
        differences[name] = (sampled - log_probabilities(trainer or sampler, sequences, length)).abs().flatten().cpu()

    with tqdm(total=4, desc=f"agreement {model}", unit="model", leave=False) as bar:
        measure(who.BARE, build(model, device))
        bar.update()
        measure(who.PEFT, peft(build(model, device)))
        bar.update()
        trainer = ours(build(model, device), model)
        measure(who.OURS, trainer)
        bar.update()
        measure(MERGED, tinylora.merge(ours(build(model, device), model)), trainer)
        bar.update()
    _plot(differences, out / "rollout-agreement.png", model)
    return differences


def _plot(differences: dict[str, Tensor], path: Path, model: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    for name, d in differences.items():
        values = d.clamp(min=1e-6).sort().values
        share = torch.linspace(1, 0, len(values))
        axis.plot(values, share, label=f"{name}: mean {d.mean():.2g}, largest {d.max():.2g}")
    axis.set(
        xscale="log", xlabel="|log p in generation - log p in the training forward|", ylabel="share of tokens above",
        title=f"{model}, bf16, random weights",
    )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def run(results: Results, out: Path, device, model: str, batch: int, adapters: list[int], new: int, budget: float):
    """Both questions; rows of op "rollout" and <out>/rollout-agreement.png."""
    speed(model, results, device, batch, adapters, new, budget)
    for name, d in agreement(model, out, device, batch, new).items():
        note = f"|Δ log p|: mean {d.mean():.3g}, p99 {d.quantile(0.99):.3g}, largest {d.max():.3g} over {len(d)} tokens"
        results.add(Row("rollout", model, "agreement", name, "log p", batch, None, None, R, U, "bf16", note=note))
