"""`python -m bench rollout`: generating with an adapter in place: tokens per second, and whether training agrees.

Models are built from real configs with random weights. Four questions:

Speed: tokens per second of greedy generate() by the base, by PEFT's TinyLoRA, by ours with one adapter, and by ours
with many different ones in the batch, and the median time of one step of decoding; providers alternate. On a GPU once
more with every step replayed from a CUDA graph, on a static cache, as rollout engines do: there the device's work
counts and not the host's. Factors are random: times do not depend on them, and to decompose random weights takes
seconds a layer.

Many: 1,024 sequences with a different adapter each, with one adapter for all of them, and by the base.

On a CPU transformers gives the head a slice that is not contiguous (the last position of every prompt), and torch then
copies the head's whole weight once per sequence: 78 % of a short generate() of Qwen2.5-0.5B at batch 8, in every
provider alike. Here a hook in every model, the base included, makes the head's input contiguous.

Agreement: the log-probability of every sampled token as generation computed it (token by token, with a cache) and as
the training forward computes it (all at once): rolled out with the adapter merged into bf16 weights, as RL stacks do,
with PEFT unmerged, with ours unmerged, and by the base, whose own difference no adapter can go below.

Then what it takes to make them equal, bit for bit: ours with every operation that depends on how many rows there are
replaced by one that does not, with each of those replacements taken back by itself, and by itself alone.

Operations: every operation of the model by itself, on random numbers: how many of its results differ between a step of
generation and a forward over the whole sequences.
"""

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import tinylora
from bench import providers as who
from bench import shapes, timing
from bench.check import WrongResult, reason, why_not
from bench.layer import CAPTURED, EAGER
from bench.linear import R, U
from bench.rows import Results, Row, Unusable, new_figure
from tinylora.adapters import lora_xs
from tinylora.adapters.factor_cache import cached_svd
from tinylora.ops import adapted_linear

MERGED = "merged"
INVARIANT = who.INVARIANT
# What of a transformer depends on how many rows are computed together; norms, rotations, the embedding and softmax
# treat every row by itself already.
LINEARS, ATTENTION, HEAD = PARTS = ("linears", "attention", "head")
SPEED, MANY, AGREEMENT, OPERATIONS = QUESTIONS = ("speed", "many", "agreement", "operations")
GENERATE = "generate"  # the rows of `speed` in a file
AGREED = 8  # tokens that agreement compares, at most
# How large v is when agreement is measured: a trained adapter's, not a broken model's.
SCALE = 0.05


def build(model: str, device: torch.device, blocks: int | None = None, vocabulary: int | None = None) -> nn.Module:
    """The model of bench/models/<model>.json in bf16, with random weights; of its first `blocks` blocks alone, with
    so many tokens in its vocabulary. Its head sees contiguous rows (see above)."""
    import transformers

    settings = dict(shapes.config(model))
    if vocabulary:
        settings["vocab_size"] = vocabulary
    if blocks:
        if blocks > settings["num_hidden_layers"]:
            raise Unusable(f"blocks is {blocks}, expected at most {model}'s {settings['num_hidden_layers']}")
        settings["num_hidden_layers"] = blocks
        settings.pop("layer_types", None)
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            built = transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    built.lm_head.register_forward_pre_hook(_contiguous)
    return built.eval().requires_grad_(False)


def _contiguous(head: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0].contiguous(),)


def values(count: int, scale: float = SCALE) -> list[Tensor]:
    return [scale * torch.randn(U, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def ours(base: nn.Module, model: str, batch_invariant: bool = False) -> nn.Module:
    """One v for the whole model, with numbers as training would leave them."""
    config = tinylora.TinyLoraConfig(r=R, u=U, n_tie=shapes.modules(model), sigma="split")
    adapted = tinylora.apply(base, config, batch_invariant=batch_invariant)
    (v,) = tinylora.adapter_parameters(adapted)
    with torch.no_grad():
        v.copy_(values(1)[0])
    return adapted


def peft(base: nn.Module) -> nn.Module:
    """PEFT's own model; only its full SVDs are replaced by ours of the same weights (see `python -m bench svd`),
    which takes minutes off."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.TinyLoraConfig(r=R, u=U, weight_tying=1.0, target_modules=targets)
    with mock.patch("torch.linalg.svd", lambda W, **_: cached_svd(W.bfloat16(), R, "PEFT's layer")):
        adapted = peft.get_peft_model(base, config).eval()
    (v,) = (p for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        v.copy_(values(1)[0])
    return adapted


def some_factors(weight: Tensor, r: int, *_) -> tuple[Tensor, Tensor, Tensor]:
    """What `cached_svd` returns, of no matrix: random orthonormal U and V, and ones."""
    g = torch.Generator(weight.device).manual_seed(r)
    sides = [torch.randn(n, r, generator=g, device=weight.device) for n in weight.shape]
    U, V = (torch.linalg.qr(side).Q for side in sides)
    return U, weight.new_ones(r, dtype=torch.float32), V.T.contiguous()


def query_by_query(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention [B, heads, queries, d] -> [B, queries, heads, d] with every query of every sequence in a call of
    its own, against the keys up to itself: the same call wherever it stands, and in any company. No padding."""
    batch, heads, queries, _ = query.shape
    before = key.shape[2] - queries
    attended = query.new_empty(batch, queries, heads, value.shape[-1])
    for b in range(batch):
        for i in range(queries):
            own, keys, values = (t[b : b + 1, :, at].contiguous() for t, at in (
                (query, slice(i, i + 1)), (key, slice(before + i + 1)), (value, slice(before + i + 1))
            ))  # fmt: skip
            one = F.scaled_dot_product_attention(own, keys, values, scale=scaling, enable_gqa=True)
            attended[b, i] = one[0, :, 0]
    return attended, None


def invariant(base: nn.Module, model: str, parts: tuple[str, ...] = PARTS) -> nn.Module:
    """`ours` with these parts of the model batch invariant: the adapted linear layers, the attention, the head."""
    from transformers import AttentionInterface

    adapted = ours(base, model, batch_invariant=LINEARS in parts)
    if ATTENTION in parts:
        AttentionInterface.register("query_by_query", query_by_query)
        adapted.set_attn_implementation("query_by_query")
    if HEAD in parts:
        adapted.lm_head = tinylora.Linear.wrap(adapted.lm_head)
        adapted.lm_head.batch_invariant = True
    return adapted


def prompts(batch: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def generate(model: nn.Module, tokens: Tensor, new: int, **settings):
    """`new` tokens after each prompt, whatever comes (random weights know no end)."""
    plain = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **plain | settings)


@contextlib.contextmanager
def any_factors() -> Iterator[None]:
    """Adapters are made around `some_factors`."""
    with mock.patch.object(lora_xs, "cached_svd", some_factors), mock.patch(f"{__name__}.cached_svd", some_factors):
        yield


class Steps:
    """Greedy decoding on a static cache, a step at a time: tokens, positions and the cache stay where they are, so that
    a CUDA graph of one step, replayed, is a rollout."""

    def __init__(self, model: nn.Module, prompt: Tensor, new: int):
        from transformers import StaticCache

        (batch, self.length), device = prompt.shape, prompt.device
        total = self.length + new
        self.model, self.new = model, new
        self.cache = StaticCache(config=model.config, max_cache_len=total)
        self.columns = torch.arange(total, device=device)
        self.position = torch.full((1,), self.length, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, new, dtype=torch.long, device=device)
        causal = self.columns[: self.length, None] >= self.columns
        self.first = self._next(prompt, causal.expand(batch, 1, -1, -1), self.columns[None, : self.length])
        self.token = self.first.clone()

    def _next(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The likeliest next token of every sequence, [batch, 1]. mask: [batch, 1, queries, keys], True is seen."""
        logits = self.model(
            tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).logits
        return logits[:, -1:].argmax(-1)

    def step(self) -> None:
        seen = (self.columns <= self.position).expand(len(self.token), 1, 1, -1)
        self.tokens.index_copy_(1, self.place, self.token)
        self.token.copy_(self._next(self.token, seen, self.position[None]))
        self.position.add_(1)
        self.place.add_(1)

    def back(self) -> None:
        """To the end of the prompt, whose keys and values are still there."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
        self.position.fill_(self.length)
        self.place.zero_()
        self.token.copy_(self.first)

    def all(self, step=None) -> Tensor:
        """The new tokens, [batch, new], the prompt's own first: each step takes the one before and gives the next."""
        self.back()
        for _ in range(self.new):
            (step or self.step)()
        return self.tokens

    def captured(self):
        """`all` by replays; WrongResult where they give other tokens than the steps themselves."""
        want = self.all().clone()
        self.back()
        graph = timing.captured(self.step)
        if not torch.equal(self.all(graph.replay), want):
            raise WrongResult("a replayed step gives other tokens")
        return lambda: self.all(graph.replay)


class Contest:
    """Generation by several models with the same random weights, timed in turns, a batch at a time.

    absent: why there is no model of this provider, a note in its rows
    """

    def __init__(self, model: str, device: torch.device, adapters: int, blocks: int | None, vocabulary: int | None):
        self.name, self.device, self.adapters = model, device, adapters
        base = build(model, device, blocks, vocabulary)
        self.vocabulary = base.config.vocab_size
        self.models, self.absent = {who.BARE: base}, {}
        self.add(who.OURS)

    def add(self, name: str) -> None:
        """Ours with stacked adapters, ours with batch-invariant layers, or PEFT's model."""
        try:
            base = copy.deepcopy(self.models[who.BARE])
            with any_factors():
                made = peft(base) if name == who.PEFT else ours(base, self.name, batch_invariant=name == INVARIANT)
            if name == who.OURS:
                tinylora.stack(made, [{"v_0": v} for v in values(self.adapters)])
            self.models[name] = made
        except Exception as error:  # one that cannot be made must not take the others' rows with it
            self.absent[name] = why_not(error)

    def run(
        self, results: Results, pass_: str, called: str, batch: int, counts: list[int], length: int, new: int,
        budget: float,
    ) -> None:  # fmt: skip
        """Rows of op "rollout": milliseconds per generate(), tokens per second, and a step of decoding by itself.

        counts: how many different adapters there are in a batch of ours, a row each
        """
        tokens = prompts(batch, length, self.vocabulary, self.device)
        cuda = self.device.type == "cuda"
        share = budget / 2 if cuda else budget
        chosen = {}
        if who.OURS in self.models:
            of_row = torch.arange(batch, device=self.device)
            chosen = {f"{who.OURS}, {count} adapters": of_row % count for count in counts}

        def row(mode: str, name: str, **values) -> None:
            what = f"{'generate' if mode == EAGER else 'decode'}, {new} tokens"
            of = {"r": R, "u": U, "dtype": "bf16", "mode": mode}
            results.add(Row("rollout", called, what, name, pass_, batch, **of, **values))

        def add(mode: str, times: dict[str, timing.Times], notes: dict[str, str]) -> None:
            base = times.get(who.BARE)
            for name, t in times.items():
                found = {"p50_ms": t.p50, "p20_ms": t.p20, "p80_ms": t.p80, "rounds": t.rounds}
                note = f"{batch * new / t.p50 * 1e3:.1f} tokens/s{notes.get(name, '')}"
                row(mode, name, **found, ratio_to_bare=base and t.over(base), note=note)

        for name, why in self.absent.items():
            for mode in (EAGER, CAPTURED) if cuda else (EAGER,):
                row(mode, name, note=why)

        steps: dict[str, list[float]] = {name: [] for name in (*self.models, *chosen)}
        calls = {name: self._call(model, tokens, new, steps[name]) for name, model in self.models.items()}
        for name, ids in chosen.items():
            calls[name] = self._call(self.models[who.OURS], tokens, new, steps[name], ids)
        with torch.no_grad():
            times = timing.alternate(
                calls, lambda i: None, 1, share, self.device, graphs=False,
                failed=lambda name, error: row(EAGER, name, note=reason(error)),
            )  # fmt: skip
        medians = {name: statistics.median(steps[name]) for name in times if steps[name]}
        about = {name: f"; a step of decoding {ms:.1f} ms" for name, ms in medians.items()}
        if who.BARE in medians:
            about = {n: f"{text}, {medians[n] / medians[who.BARE]:.2f} of the base's" for n, text in about.items()}
        add(EAGER, times, about)
        if not cuda:
            return
        calls = {}
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for name in steps:
                model = self.models[who.OURS if name in chosen else name]
                try:
                    if name in chosen:  # a graph reads its ids where they lie: they stay until the end
                        stack.enter_context(tinylora.adapter_ids(model, chosen[name]))
                    calls[name] = Steps(model, tokens, new).captured()
                except Exception as error:  # one that cannot be captured must not take the others' rows with it
                    row(CAPTURED, name, note=reason(error))
            times = timing.alternate(
                calls, lambda i: None, 1, share, self.device, graphs=False,
                failed=lambda name, error: row(CAPTURED, name, note=reason(error)),
            )  # fmt: skip
        add(CAPTURED, times, {name: f"; {t.p50 / new:.3f} ms a step" for name, t in times.items()})

    def _call(self, model: nn.Module, tokens: Tensor, new: int, steps: list[float], ids: Tensor | None = None):
        """generate(), which leaves the milliseconds from one call of the head to the next in `steps`."""
        head = model.get_output_embeddings()

        def call() -> Tensor:
            stamps: list[float] = []

            def mark(*_) -> None:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                stamps.append(time.perf_counter() * 1e3)

            handle = head.register_forward_pre_hook(mark)
            try:
                with contextlib.nullcontext() if ids is None else tinylora.adapter_ids(model, ids):
                    return generate(model, tokens, new)
            finally:
                handle.remove()
                steps.extend(after - before for before, after in itertools.pairwise(stamps))

        return call


def speed(
    model: str, results: Results, device, batches: list[int], adapters: list[int], new: int, budget: float,
    blocks: int | None,
) -> None:  # fmt: skip
    """Every provider at every batch, for `budget` seconds together."""
    with tqdm(total=3 + len(batches), desc=f"rollout {model}", unit="part", leave=False) as bar:
        contest = Contest(model, device, max(adapters), blocks, None)
        bar.update()
        for name in (INVARIANT, who.PEFT):
            contest.add(name)
            bar.update()
        called = _called(model, blocks)
        for batch in batches:
            counts = [count for count in adapters if count <= batch]
            contest.run(results, GENERATE, called, batch, counts, 8, new, budget / len(batches))
            bar.update()
        for count in adapters:
            if count > max(batches):
                what, name = f"generate, {new} tokens", f"{who.OURS}, {count} adapters"
                row = Row("rollout", called, what, name, GENERATE, r=R, u=U, dtype="bf16", mode=EAGER)
                row.note = f"not measured: no batch has room for {count} different adapters"
                results.add(row)


# What `many` measures: the parts of a model that adapters meet, at a batch whose logits alone would take 0.6 GB a step.
MANY_ROWS, MANY_BLOCKS, MANY_VOCABULARY, MANY_LENGTH, MANY_NEW = 1024, 2, 4096, 1, 8


def many(model: str, results: Results, device, rows: int, budget: float) -> None:
    """As many adapters as sequences, one adapter for all of them, and the base."""
    blocks, vocabulary = MANY_BLOCKS, MANY_VOCABULARY
    contest = Contest(model, device, rows, blocks, vocabulary)
    called = f"{_called(model, blocks)}, vocabulary of {vocabulary}"
    contest.run(results, MANY, called, rows, [1, rows], MANY_LENGTH, MANY_NEW, budget)


def _called(model: str, blocks: int | None) -> str:
    return f"{model}, {blocks} blocks" if blocks else model


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


def agreement(
    model: str, results: Results, out: Path, device, batch: int, new: int, blocks: int | None
) -> None:  # fmt: skip
    """|log p of generation - log p of the training forward|, of the sampled tokens: a row a provider, and a plot."""
    tokens = prompts(batch, 8, shapes.config(model)["vocab_size"], device)
    length = tokens.shape[1]
    base, called = build(model, device, blocks), _called(model, blocks)
    differences: dict[str, Tensor] = {}
    kept: dict[str, nn.Module] = {}  # what trains where a merged one rolls out

    def fresh() -> nn.Module:
        return copy.deepcopy(base)

    with tqdm(total=5 + 2 * len(PARTS), desc=f"agreement {model}", unit="model", leave=False) as bar:

        def measure(name, make, trainer=lambda: None):
            try:
                sampler = make()
                sequences, sampled = rolled_out(sampler, tokens, new)
                trained = log_probabilities(trainer() or sampler, sequences, length)
                differences[name] = d = (sampled - trained).abs().flatten().cpu()
                mean, top, largest = d.mean(), d.quantile(0.99), d.max()
                note = f"|Δ log p|: mean {mean:.3g}, p99 {top:.3g}, largest {largest:.3g} over {len(d)} tokens"
            except Exception as error:  # one that fails must not take the others' rows with it
                note = why_not(error)
            results.add(Row("rollout", called, "agreement", name, "log p", batch, None, None, R, U, "bf16", note=note))
            bar.update()

        measure(who.BARE, fresh)
        measure(who.PEFT, lambda: peft(fresh()))
        measure(who.OURS, lambda: kept.setdefault(who.OURS, ours(fresh(), model)))
        measure(MERGED, lambda: tinylora.merge(ours(fresh(), model)), lambda: kept[who.OURS])
        measure(INVARIANT, lambda: invariant(fresh(), model))
        for part in PARTS:
            others = tuple(p for p in PARTS if p != part)
            measure(f"{INVARIANT}, all but {part}", lambda parts=others: invariant(fresh(), model, parts))
            measure(f"{INVARIANT}, {part} alone", lambda part=part: invariant(fresh(), model, (part,)))
    plotted = {name: d for name, d in differences.items() if not name.startswith(f"{INVARIANT},")}
    _plot(plotted, out / "rollout-agreement.png", called)


def operations(model: str, device, batch: int, length: int, dtype: torch.dtype) -> dict[str, list[int]]:
    """{operation: how many of the batch * length tokens differ from a forward over all of them}, first where `batch`
    tokens are computed together, as in a step of generation, then where each is computed alone."""
    c = shapes.config(model)
    g = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    width = c["hidden_size"] // heads
    q, k, v = (normal(batch, n, length, width) for n in (heads, groups, groups))
    gate, up = (normal(batch, length, c["intermediate_size"]) for _ in range(2))
    hidden, vocabulary = normal(batch, length, c["hidden_size"]), normal(batch, length, c["vocab_size"]).float()
    found = {}

    def compare(name, step, whole):
        """step(b, t): position t of sequences b, [sequences, ...]; whole: [batch, length, ...]."""
        found[name] = [
            sum(int((step(b, t) != whole[b, t]).flatten(1).any(1).sum()) for t in range(length) for b in sequences)
            for sequences in ([slice(0, batch)], [slice(b, b + 1) for b in range(batch)])
        ]

    def rowwise(name, function, *operands):
        def step(b, t):
            return function(*(o[b, t : t + 1].contiguous() for o in operands))[:, 0]

        compare(name, step, function(*operands))

    linears = [(layer.name, layer.N, layer.K) for layer in shapes.layers(model)]
    for name, N, K in [*linears, ("the head, up to 16384", min(16384, c["vocab_size"]), c["hidden_size"])]:
        weight, down, upper = normal(N, K, scale=K**-0.5), normal(R, K, scale=K**-0.5), normal(N, R)
        x = normal(batch, length, K)
        rowwise(f"{name}, F.linear", lambda x, w=weight: F.linear(x, w), x)
        for fixed in (False, True):
            called = INVARIANT if fixed else who.OURS
            rowwise(
                f"{name}, {called}",
                lambda x, w=weight, d=down, u=upper, b=fixed: adapted_linear(x, w, d, None, u, batch_invariant=b),
                x,
            )

    def attended(b, t, function):
        """Position t as a step of generation sees it: the last query of t + 1."""
        return function(q[b, :, t : t + 1], *(o[b, :, : t + 1].contiguous() for o in (k, v)), False)[:, 0]

    def sdpa(query, key, value, causal):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True).transpose(1, 2)

    def alone(query, key, value, causal):
        return query_by_query(None, query, key, value, None, None)[0]

    for name, function in (("attention, sdpa", sdpa), ("attention, query by query", alone)):
        compare(name, lambda b, t, f=function: attended(b, t, f), function(q, k, v, True))
    rowwise("RMSNorm", lambda x: F.rms_norm(x.float(), x.shape[-1:]).to(dtype), hidden)
    rowwise("silu(gate) * up", lambda a, b: F.silu(a) * b, gate, up)
    rowwise("log_softmax, fp32", lambda x: x.log_softmax(-1), vocabulary)
    return found


def _plot(differences: dict[str, Tensor], path: Path, model: str) -> None:
    if not (figure := new_figure(7, 4)):
        return
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


def run(
    results: Results,
    out: Path,
    device,
    model: str,
    batches: list[int],
    adapters: list[int],
    new: int,
    budget: float,
    blocks: int | None = None,
    questions: tuple[str, ...] = QUESTIONS,
    rows: int = MANY_ROWS,
) -> None:
    """The questions that are asked; rows of op "rollout" and <out>/rollout-agreement.png.

    batches: of `speed`; the last one is also what `agreement` and `operations` take, with AGREED new tokens at most
    rows:    of `many`
    """
    if SPEED in questions:
        speed(model, results, device, batches, adapters, new, budget, blocks)
    if MANY in questions:
        many(model, results, device, rows, budget / 4)
    batch, new = batches[-1], min(new, AGREED)
    if OPERATIONS in questions:
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            total = batch * (8 + new)
            for name, (step, alone) in operations(model, device, batch, 8 + new, dtype).items():
                note = (
                    f"{step} of {total} tokens differ between {batch} rows and {total}, {alone} between 1 and {total}"
                )
                results.add(Row("rollout", model, "operation", name, "bits", batch, None, None, R, U, short, note=note))
    if AGREEMENT in questions:
        agreement(model, results, out, device, batch, new, blocks)
