"""`python -m bench peft`: small Qwen2 with PEFT's adapters: generate() and a training step, patched and not.

The smaller one in a small batch is where calls cost more than numbers; the larger is what somebody without a GPU may
train. The optimizer is transformers.Trainer's: AdamW, fused.
"""

import copy
import statistics
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import providers as who
from bench import timing
from bench.check import WrongResult, reason
from bench.linear import DTYPES
from bench.rows import Results, Row

SIZES = {  # hidden size, layers, tokens of each training step
    "Qwen2, 4 layers of 64": (64, 4, (256, 2048)),
    "Qwen2, 6 layers of 256": (256, 6, (512,)),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("TinyLoRA", "LoRA", "AdaLoRA", "VeRA")
PATCHED = "PEFT, patched"
GENERATE, STEP = "generate", "training step"
BAR = 0.85  # patched over unpatched, at most
PROMPT, NEW = 8, 16  # tokens


def model(dtype: torch.dtype, device: torch.device, hidden: int = 64, layers: int = 4) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return Qwen2ForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def adapter(kind: str):
    """(config of PEFT, its rank): the ranks that papers and defaults have, VeRA's no more than its layers carry."""
    import peft

    if kind == "TinyLoRA":
        return peft.TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules=TARGETS), 2
    if kind == "LoRA":
        return peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS), 8
    if kind == "AdaLoRA":
        return peft.AdaLoraConfig(init_r=8, target_r=4, total_step=1000, target_modules=TARGETS), 8
    return peft.VeraConfig(r=8, target_modules=TARGETS), 8


class Run:
    """One model with what trains in it: tokens generated, and a step of an optimiser."""

    def __init__(self, model: nn.Module, prompts: Tensor, batch: Tensor):
        self.model, self.prompts, self.batch = model, prompts, batch
        self.trains = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trains, lr=1e-4, fused=True) if self.trains else None

    def generate(self) -> Tensor:
        return self.model.generate(
            input_ids=self.prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    def gradients(self) -> tuple[Tensor, ...]:
        with who.first_outputs(self.model, self.trains) as asked:
            loss = self.model(input_ids=self.batch, labels=self.batch).loss
        return torch.autograd.grad(loss, self.trains or asked)

    def step(self) -> None:
        grads = self.gradients()
        if self.optimizer:
            for p, grad in zip(self.trains, grads, strict=True):
                p.grad = grad
            self.optimizer.step()


def run(
    results: Results,
    device: torch.device,
    dtypes: tuple[str, ...] = ("bf16", "fp32"),
    kinds: tuple[str, ...] = KINDS,
    budget: float = 120.0,
    sizes: dict[str, tuple[int, int, tuple[int, ...]]] = SIZES,
    sequences: int = 4,
) -> None:
    """Rows of `peft`: every size, kind of adapter and dtype, the bare model, PEFT and PEFT patched in turns."""
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        results.add(Row("peft", "", "", "", "", note=f"not measured: {error}"))
        return
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 512, (sequences, PROMPT), generator=g).to(device)
    cells = sum(1 + len(steps) for _, _, steps in sizes.values()) * len(dtypes) * len(kinds)
    with tqdm(total=cells, desc="peft", unit="cell", dynamic_ncols=True) as bar:
        for size, (hidden, layers, steps) in sizes.items():
            batches = [torch.randint(0, 512, (tokens // 128, 128), generator=g).to(device) for tokens in steps]
            for dtype in dtypes:

                def make(dtype=dtype, hidden=hidden, layers=layers):
                    return model(DTYPES[dtype], device, hidden, layers)

                bare = make()
                for kind in kinds:
                    bar.set_postfix_str(f"{size} {dtype} {kind}")
                    _compare(results, size, dtype, kind, bare, make(), prompts, batches, budget / cells, device)
                    bar.update(1 + len(batches))


def _compare(results, size, dtype, kind, bare, plain, prompts, batches, budget, device) -> None:
    """The rows of one kind of adapter on one model: generate() and every step, `budget` seconds each."""
    import peft

    import tinylora
    from tinylora.integrations.peft import counts, reset_counts

    config, r = adapter(kind)
    adapted = peft.get_peft_model(plain, config)
    for batch in batches:
        pair = Run(bare, prompts, batch), Run(adapted, prompts, batch)
        tinylora.unpatch_peft()
        own = errors(pair[1], None)
        reset_counts()
        ours = errors(pair[1], tinylora)
        note = verdict(ours, own, DTYPES[dtype]) or ("" if set(counts()[kind]) == {"fast"} else "failed: fallback")
        passes = [(f"{STEP}, {batch.numel()} tokens", Run.step, batch.numel())]
        if batch is batches[0]:
            passes.insert(0, (GENERATE, Run.generate, len(prompts)))
        for name, call, M in passes:
            runs = {who.BARE: pair[0], who.PEFT: pair[1], PATCHED: pair[1]}
            calls = {provider: partial(call, run) for provider, run in runs.items()}

            def prepare(provider, calls=calls):
                # Users patch once and call a thousand times; a patch throws away what Python has specialised for the
                # classes, and another provider what lay in the caches. So a call that is timed is its second.
                tinylora.patch_peft() if provider == PATCHED else tinylora.unpatch_peft()
                calls[provider]()

            if note:
                del calls[PATCHED]
                results.add(Row("peft", size, kind, PATCHED, name, M, None, None, r, None, dtype, note=note))

            def failed(provider, error, name=name, M=M):
                results.add(Row("peft", size, kind, provider, name, M, None, None, r, None, dtype, note=reason(error)))

            times = timing.alternate(
                calls, lambda i: None, 1, budget, device, graphs=False, prepare=prepare, failed=failed
            )
            for provider, t in times.items():
                row = Row("peft", size, kind, provider, name, M, None, None, r, None, dtype)
                row.p50_ms, row.p20_ms, row.p80_ms, row.rounds = t.p50, t.p20, t.p80, t.rounds
                row.ratio_to_bare = t.over(times[who.BARE]) if who.BARE in times else None
                results.add(row)
    tinylora.unpatch_peft()


def errors(adapted: Run, patched) -> dict[str, float]:
    """Relative errors of logits and gradients against the same model in fp64, PEFT's own, away from the start."""
    shaken = copy.deepcopy(adapted.model)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in shaken.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g).to(p))
    exact = Run(copy.deepcopy(shaken).double(), adapted.prompts, adapted.batch)
    found = Run(shaken, adapted.prompts, adapted.batch)
    with torch.no_grad():
        y64 = exact.model(input_ids=exact.batch).logits
    grads64 = torch.cat([g.flatten() for g in exact.gradients()])
    try:
        if patched:
            patched.patch_peft()
        with torch.no_grad():
            y = found.model(input_ids=found.batch).logits.double()
        grads = torch.cat([g.double().flatten() for g in found.gradients()])
    finally:
        if patched:
            patched.unpatch_peft()
    return {
        "output": ((y - y64).abs().max() / y64.abs().max()).item(),
        "gradient": ((grads - grads64).norm() / grads64.norm()).item(),
    }


def verdict(ours: dict[str, float], own: dict[str, float], dtype: torch.dtype) -> str:
    """At most twice PEFT's own error, plus one unit in the last place; what is wrong, or ""."""
    for key, error in ours.items():
        allowed = 2 * own[key] + torch.finfo(dtype).eps
        if not error <= allowed:  # NaN must not pass
            return f"wrong: {WrongResult(f'{key}: relative error {error:.1e} against fp64, allowed {allowed:.1e}')}"
    return ""


def bars(rows: list[Row]) -> list[str]:
    """Patched over unpatched, both over the bare model in the same round, in each dtype, and whether the bar is met
    there: a line per size, kind and pass, and one for the geometric mean of the kinds."""
    cells: dict[tuple, dict[tuple, float]] = {}
    for r in rows:
        if r.op == "peft" and r.ratio_to_bare:
            cells.setdefault((r.model, r.pass_, r.layer), {})[r.dtype, r.provider] = r.ratio_to_bare
    lines, of_pass = [], {}
    for (size, pass_, kind), cell in cells.items():
        ratios = {d: cell[d, PATCHED] / cell[d, who.PEFT] for d, p in cell if p == PATCHED and (d, who.PEFT) in cell}
        for dtype, ratio in ratios.items():
            of_pass.setdefault((size, pass_), {}).setdefault(dtype, []).append(ratio)
        if ratios:
            lines.append(f"{size}, {kind}, {pass_}: {_met(ratios)}")
    for (size, pass_), found in of_pass.items():
        means = {dtype: statistics.geometric_mean(ratios) for dtype, ratios in found.items()}
        lines.append(f"{size}, all kinds, {pass_}: {_met(means)}")
    return lines


def _met(ratios: dict[str, float]) -> str:
    shown = ", ".join(f"{dtype} {ratio:.3f} {'met' if ratio <= BAR else 'MISSED'}" for dtype, ratio in ratios.items())
    return f"patched / PEFT, bar {BAR}: {shown}"
