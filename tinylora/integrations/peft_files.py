"""PEFT, on disk: adapter folders of PEFT read into our models, and ours written so that PEFT loads them.

A folder of PEFT is `adapter_config.json` and `adapter_model.safetensors`. Its tensors, by the layer's name:

    TinyLoRA  base_model.model.<layer>.tinylora_A [r, K], .tinylora_B [N, r], .tinylora_P [u, r, r];
              base_model.tinylora_v.<group> [u]
    LoRA      base_model.model.<layer>.lora_A.weight [r, K], .lora_B.weight [N, r]
    VeRA      base_model.model.<layer>.vera_lambda_b [N], .vera_lambda_d [r]; base_model.vera_A [r, K], .vera_B [N, r]
    AdaLoRA   base_model.model.<layer>.lora_A [r, K], .lora_B [N, r], .lora_E [r, 1]
    modules_to_save  base_model.model.<module>.<parameter>

The saved factors are the adapter: they are taken as they are, and nothing is decomposed or drawn again. What has no
exact counterpart on the other side is a ValueError that names it.
"""

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinylora.adapters import (
    AdaLoraConfig,
    AdapterConfig,
    LoraConfig,
    Site,
    TinyLoraConfig,
    VeraConfig,
    files,
)
from tinylora.adapters.factor_cache import digest
from tinylora.adapters.sharded import in_pieces
from tinylora.nn import checkpoint
from tinylora.nn.model import (
    adapter_names,
    as_always,
    attach,
    base_digests,
    layers_with,
    named_numbers,
    refuse_wrapped,
    saved_modules,
    shared_of,
)
from tinylora.nn.saved_module import lasting, whole_module
from tinylora.nn.targets import find_modules_to_save, find_targets, linear_layers, sites_of
from tinylora.nn.tensor_parallel import ParallelLinear

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMATS = ("tinylora", "peft", "lora")
_PREFIX = "base_model.model."

# Settings of PEFT that change what a layer computes, and that nothing here has: expected to be absent or false.
_UNKNOWN = (
    "fan_in_fan_out", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config",
    "velora_config", "monteclora_config", "kasa_config", "layer_replication", "trainable_token_indices",
    "target_parameters",
)  # fmt: skip
# Starts of LoRA after which the base model is the one it was; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) change it.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    name: str = "default",
    *,
    factors: bool = False,
    format: str = "tinylora",
) -> Path:
    """Write the adapter `name` into `folder`, and return the path of its tensors.

    format: "tinylora" is `adapter.safetensors`: what trains, the rest rebuilt from the base on a load; with
            `factors` the frozen factors, (N + K) · r numbers a layer, stand in it as well.
            "peft" is the folder that PEFT's own TinyLoRA, LoRA, VeRA or AdaLoRA writes: PeftModel.from_pretrained
            takes it. "lora" is a plain LoRA for PEFT, vLLM and SGLang: A = down, B = up core, in fp32, without an SVD
            (a LoRA as it is, with its alpha).

    Whatever interrupts it, a reader finds the previous adapter or the new one, or an error, and never the config of one
    with the tensors of the other: a new folder appears whole; in one that exists files are written beside their places,
    and for the moment between two moves there is no adapter_config.json (PEFT's error; `load` finds the new pair).
    Merged or not, active or not, the adapter is the same.

    ValueError: no adapter of that name, or one that lost a layer; another format, or `factors` with PEFT's; a folder
    with an adapter in another format; a model in pieces (PEFT's formats; FSDP1's in ours, too); a TinyLoRA whose tying
    PEFT cannot express (its groups are floor(modules / groups) modules and the rest in the last one), an adapter that
    PEFT has not (LoRA-XS, Tied-LoRA), or a Linear by itself, whose parameters have no names: format="lora" takes all
    but the last.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    if format == "tinylora":
        theirs, _ = _pair(Path(folder))
        if theirs.is_file():
            raise ValueError(f"{folder} holds {theirs.name}, an adapter in PEFT's format: expected another folder")
        return checkpoint.save(model, folder, name, factors=factors)
    if factors:
        raise ValueError(f"factors is True, expected False with format={format!r}, whose files hold what PEFT's hold")
    shared = shared_of(model, name)
    if shared.sites[0].name == "":
        raise ValueError("a single Linear has no name that PEFT could find it by, expected a model")
    numbers = named_numbers(model, name)
    parallel = any(isinstance(layer, ParallelLinear) for layer in layers_with(model, name).values())
    if parallel or any(map(in_pieces, numbers.values())):
        raise ValueError(
            f"format is {format!r}, but the model is sharded (FSDP2, ZeRO-3) or under tensor parallelism: expected the "
            "default, which every process saves, and then `tinylora convert`"
        )
    layers = {site: layer.adapters[name] for site, layer in layers_with(model, name).items()}
    _refuse_what_peft_takes_for_experts(model, shared.sites, format)
    config, tensors = (_plain_lora if format == "lora" else _as_peft)(shared, layers)
    saved = {n.removeprefix("saved."): t for n, t in numbers.items() if n.startswith("saved.")}
    tensors = {n: t.detach().to("cpu", torch.float32).contiguous() for n, t in tensors.items()}
    # Copies, as some may be tied, which safetensors does not take.
    tensors |= {_PREFIX + n: t.detach().to("cpu", copy=True).contiguous() for n, t in saved.items()}
    chosen = shared.config.modules_to_save
    config |= {
        "target_modules": _names_for_peft(model, shared.sites),
        "modules_to_save": list(chosen) if chosen else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": _task(model, {path for path, m in saved_modules(model).items() if name in m.copies}),
    }
    return _write_folder(Path(folder), config, tensors)


def load(model: nn.Module, folder: str | os.PathLike, name: str = "default") -> nn.Module:
    """Put the adapter from `folder` on the model under `name`, active and trainable. Returns the model.

    The folder is one of `tinylora.save`, or one of PEFT (adapter_config.json and adapter_model.safetensors) with a
    TinyLoRA, LoRA, VeRA or AdaLoRA. If the model has an adapter of that name with the same config, a file of ours
    replaces its numbers. Frozen factors in the file of a new adapter are used as they are, and saved along from then
    on; a file without them has them rebuilt from the model's weights (from the disk cache, if these were decomposed
    before).

    ValueError, with the model left as it was: no file, one that is truncated or changed, another format version,
    another base model, an adapter of that name with another config or other frozen factors, or any of that name where
    the folder is PEFT's; a merged model; within `adapter_ids` or `disabled`; settings of PEFT without a counterpart
    here (DoRA and other variants, trained biases, save_projection=False, ...). Layers of a LoRA that rank_pattern or
    alpha_pattern scale differently have the quotient in their up.
    """
    if not is_peft_folder(folder):
        return checkpoint.load(model, folder, name)
    return load_peft(model, folder, name)


def is_peft_folder(folder: str | os.PathLike) -> bool:
    """Whether an adapter of PEFT lies in the folder. ValueError if one of ours lies there, too."""
    (theirs, _), ours = _pair(Path(folder)), Path(folder) / checkpoint.FILE
    if theirs.is_file() and ours.is_file():
        raise ValueError(f"{folder} holds both {CONFIG} (PEFT's) and {ours.name} (ours), expected one adapter")
    return theirs.is_file()


_NEW = ".new"  # files that are complete and not yet in their places


def _pair(folder: Path) -> tuple[Path, Path]:
    """Where config and tensors of the folder's adapter are: in their places, or on their way (`_write_folder`)."""
    config, tensors = folder / CONFIG, folder / TENSORS
    prepared, new = folder / (CONFIG + _NEW), folder / (TENSORS + _NEW)
    if config.is_file() or not prepared.is_file():
        return config, tensors
    return prepared, new if new.is_file() else tensors


def _write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Both files, such that no moment shows one adapter's config beside another's tensors.

    In a folder that exists: both are written whole under names of their own; the old config goes, and with it the old
    adapter; the tensors move, then the new config, because it is what makes a folder an adapter. After an interruption
    the two are where `_pair` looks, and the next save moves them first.
    """
    ours = folder / checkpoint.FILE
    if ours.exists():
        raise ValueError(f"{folder} holds {ours.name}, an adapter in tinylora's format: expected another folder")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write(into: Path, suffix: str) -> None:
        path = into / (TENSORS + suffix)
        files.write_whole(path, lambda to: save_file(tensors, to, metadata={"format": "pt"}))
        try:
            files.write_whole(into / (CONFIG + suffix), lambda to: Path(to).write_text(text))
        except BaseException:
            path.unlink()
            raise

    if not folder.exists():
        with files.whole_folder(folder) as scratch:
            write(scratch, "")
        return folder / TENSORS
    _move_into_place(folder)
    write(folder, _NEW)
    (folder / CONFIG).unlink(missing_ok=True)
    _move_into_place(folder)
    return folder / TENSORS


def _move_into_place(folder: Path) -> None:
    """The second half of a save, if the first is done and the old config is gone."""
    config, tensors = _pair(folder)
    if config.name != CONFIG:
        if tensors.name != TENSORS:
            os.replace(tensors, folder / TENSORS)
        os.replace(config, folder / CONFIG)


def _names_for_peft(model: nn.Module, sites: tuple[Site, ...]) -> list[str]:
    """The modules' last names where these mean the very same modules to PEFT, else their full ones."""
    full = {site.name for site in sites}
    short = sorted({name.rpartition(".")[2] for name in full})
    matched = {n for n, m in model.named_modules() if n.rpartition(".")[2] in short and m is not model}
    return short if matched == full else [site.name for site in sites]


# PEFT's name of a task by the end of the class's name, and the ends of the heads' names that PEFT then reads, too.
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def _task(model: nn.Module, saved: set[str]) -> str | None:
    """PEFT's name of the model's task: AutoPeftModel takes its class by it. None for others, and where the adapter does
    not save a head that PEFT would look for."""
    for end, (task, heads) in _TASKS.items():
        if type(model).__name__.endswith(end):
            if getattr(model, "main_input_name", "input_ids") != "input_ids":
                return None  # PEFT's classes hand on token ids
            if task == "SEQ_2_SEQ_LM" and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                return None  # images to text
            return task if all(n in saved for n, _ in model.named_modules() if n.endswith(heads)) else None
    return None


def _refuse_what_peft_takes_for_experts(model: nn.Module, sites: tuple[Site, ...], format: str) -> None:
    """PEFT takes names that transformers' older mixtures of experts had (gate_proj, w1) for the fused experts of today,
    whatever module has the name now: it would load another adapter, without a word."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return
    kind = getattr(getattr(model, "config", None), "model_type", None)
    pattern = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
    names = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(pattern, {})
    taken = [site.name for site in sites if site.name.rpartition(".")[2] in names]
    if not taken:
        return
    what = f"PEFT takes {taken[0]} for the fused experts of a {kind} and would load another adapter"
    if format == "peft":
        raise ValueError(f"format is 'peft', but {what}: expected an adapter without such layers, or another format")
    warnings.warn(f"format='lora': {what}. Others that read the folder (vLLM, tinylora.load) do not", stacklevel=3)


def _plain_lora(shared, layers) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Any adapter as LoRA with scaling 1: A = down, B = up core; the product is taken in fp64 and rounded once. A LoRA
    as it is.
    """
    config, tensors = shared.config, {}
    if isinstance(config, LoraConfig):
        return _as_peft(shared, layers)
    ranks = set()
    with torch.no_grad():
        for site, adapter in layers.items():
            factors = adapter.factors()
            down, up = factors.down, factors.up_core(torch.float64)
            ranks.add(len(down))
            # copies: factors that layers share are one tensor, and safetensors refuses those
            tensors[f"{_PREFIX}{site}.lora_A.weight"] = down.float().clone()
            tensors[f"{_PREFIX}{site}.lora_B.weight"] = up.float().clone()
    (r,) = ranks
    return _lora_config(config, r, r, False), tensors


def _lora_config(config: AdapterConfig, r: int, alpha: float, rslora: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "lora_dropout": config.dropout,
        "init_lora_weights": True,
    }


def _as_peft(shared, layers) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter as PEFT's own class of the same name has it: (config, tensors)."""
    config, tensors = shared.config, {}

    def put(site: str, **parts: Tensor) -> None:
        tensors.update({f"{_PREFIX}{site}.{n.replace('__', '.')}": t for n, t in parts.items()})

    if isinstance(config, LoraConfig):
        for site, a in layers.items():
            put(site, lora_A__weight=a.down, lora_B__weight=a.up)
        return _lora_config(config, config.r, config.alpha, config.rslora), tensors
    if isinstance(config, TinyLoraConfig):
        groups = config.group_of(shared.sites)
        count, n = max(groups) + 1, len(groups)
        tying = 1 - count / n
        if peft_groups(n, tying) != groups:
            raise ValueError(
                f"PEFT's TinyLoRA cannot tie {n} modules as groups {config.groups}, n_tie {config.n_tie} and tying "
                f"{config.tying!r} do: its {count} groups have {n // count} modules each and the last the rest; "
                'format="lora" writes the same adapter as a plain LoRA'
            )
        for site, a in layers.items():
            put(site, tinylora_A=a.down, tinylora_B=a.up, tinylora_P=a.P)
        tensors.update({f"base_model.tinylora_v.{g}": getattr(shared, f"v_{g}") for g in range(count)})
        return {
            "peft_type": "TINYLORA",
            "r": config.r,
            "u": config.u,
            "weight_tying": tying,
            "save_projection": True,
            "projection_seed": config.seed,
            "tinylora_dropout": config.dropout,
        }, tensors
    if isinstance(config, VeraConfig):
        for site, a in layers.items():
            put(site, vera_lambda_b=a.b, vera_lambda_d=a.d)
        tensors |= {"base_model.vera_A": shared.down, "base_model.vera_B": shared.up}
        return {
            "peft_type": "VERA",
            "r": config.r,
            "d_initial": config.d_initial,
            "save_projection": True,
            "projection_prng_key": config.seed,
            "vera_dropout": config.dropout,
        }, tensors
    if isinstance(config, AdaLoraConfig):
        for site, a in layers.items():
            put(site, lora_A=a.down, lora_B=a.up, lora_E=a.lam[:, None])
        return {
            "peft_type": "ADALORA",
            "init_r": config.r,
            "target_r": config.target_r,
            "lora_alpha": _tidy(config.alpha * (config.r + _PEFTS_EPSILON) / config.r),
            "lora_dropout": config.dropout,
            "total_step": config.total_steps,
            "tinit": config.warmup_steps,
            "tfinal": config.final_steps,
            "deltaT": config.interval,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "orth_reg_weight": max(config.orthogonality, 1e-30),  # PEFT refuses 0
        }, tensors
    raise ValueError(f'PEFT has no {config.kind}, expected tinylora, lora, vera or adalora; format="lora" writes it')


_PEFTS_EPSILON = 1e-5  # PEFT's AdaLoRA divides by the rank plus this


def _tidy(number: float) -> float:
    """The integer that a product of floats stands beside, or the number itself."""
    return round(number) if abs(number - round(number)) < 1e-9 * abs(number) else number


def peft_groups(modules: int, weight_tying: float) -> list[int]:
    """Which v each module has in PEFT's TinyLoRA: groups of floor(modules / groups), and the rest in the last."""
    groups = max(1, round(modules * (1 - weight_tying)))
    size = max(1, modules // groups)
    return [min(i // size, groups - 1) for i in range(modules)]


# --- reading --------------------------------------------------------------------------------------------------------


def read(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an adapter folder of PEFT. ValueError says what is missing, damaged or being replaced."""
    settings, path = pair = _pair(Path(folder))
    try:
        text = settings.read_text()
        config = json.loads(text)
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{settings} cannot be read, expected a config of PEFT: {error!r}") from None
    if kind not in _READERS:
        raise ValueError(f"{settings}: peft_type is {kind!r}, expected one of {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist, expected PEFT's adapter as safetensors")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # a safe_open is no mapping
            tensors = {n: file.get_tensor(n).clone() for n in names}  # what is the file's changes with it
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    if _pair(Path(folder)) != pair or settings.read_text() != text:
        raise ValueError(f"{folder} was written to while it was read, expected an adapter at rest: read it again")
    return config, tensors


class _Reader:
    """One adapter of PEFT: checks that nothing is lost, and gives config, frozen tensors and numbers of ours."""

    def __init__(self, folder: str | os.PathLike, model: nn.Module):
        self.folder, self.model = Path(folder), model
        self.config, tensors = read(folder)
        for key in _UNKNOWN:
            if self.config.get(key):
                raise self.refused(key, "none: nothing here computes that")
        if self.config.get("bias", "none") != "none":
            raise self.refused("bias", "'none': trained biases are not part of an adapter here")
        start = self.config.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise self.refused("init_lora_weights", "one that leaves the base as it is: convert it with PEFT first")
        self.left = dict(tensors)
        every = linear_layers(model)
        names = {n.removeprefix(_PREFIX).rpartition(self.marker)[0] for n in tensors if self.marker in n}
        lost = sorted(names - every.keys())
        if lost or not names:
            raise ValueError(
                f"{self.folder / TENSORS} adapts {lost[0] if lost else 'nothing'!r}, expected torch.nn.Linear modules "
                f"of {type(model).__name__}: {', '.join(list(every)[:3])}, ..."
            )
        self.layers = {n: m for n, m in every.items() if n in names}
        self.sites = sites_of(self.layers)

    def refused(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self.folder / CONFIG}: {key} is {self.config[key]!r}, expected {expected}")

    def take(self, key: str, *shape: int | None) -> Tensor:
        """The tensor of that name in fp32 if it is in fewer bits, of that shape (None: any size). It is then no longer
        left over."""
        if key not in self.left:
            raise ValueError(f"{self.folder / TENSORS} has no {key}, expected one of shape {shape}")
        t = self.left.pop(key)
        if t.dim() != len(shape) or any(want not in (None, got) for got, want in zip(t.shape, shape, strict=True)):
            raise ValueError(f"{self.folder / TENSORS}: {key} has shape {tuple(t.shape)}, expected {shape}")
        return t.float() if t.is_floating_point() and t.itemsize < 4 else t

    def of(self, site: Site, part: str, *shape: int | None) -> Tensor:
        return self.take(f"{_PREFIX}{site.name}.{part}", *shape)

    def common(self, dropout: str) -> dict[str, Any]:
        """Settings that all our configs have: the very modules that the file adapts, by short names if these do."""
        # Of a classifier PEFT lists every name that heads have ("classifier", "score") and takes what is there.
        chosen = self.config.get("modules_to_save") or ()
        chosen = [chosen] if isinstance(chosen, str) else chosen
        modules = [n for n, _ in self.model.named_modules()]
        chosen = [c for c in chosen if any(n == c or n.endswith(f".{c}") for n in modules)]
        asked = self.config.get("target_modules")
        targets: Any = tuple(s.name for s in self.sites)
        if isinstance(asked, list):
            try:
                found = find_targets(self.model, sorted(asked))
            except ValueError:  # modules that are no linear layers, or that PEFT finds in another way
                found = {}
            if found.keys() == self.layers.keys():
                targets = tuple(sorted(asked))
        return {
            "target_modules": targets,
            "dropout": self.config.get(dropout) or 0.0,
            "modules_to_save": tuple(chosen) if chosen else None,
        }


class _TinyLora(_Reader):
    marker = ".tinylora_A"

    def parts(self):
        if not self.config.get("save_projection", True):
            raise self.refused("save_projection", "True: PEFT would draw P again, and only its version of torch can")
        r, u = self.config["r"], self.config["u"]
        groups = peft_groups(len(self.sites), self.config.get("weight_tying", 0.0))
        frozen = {
            s.name: {
                "down": self.of(s, "tinylora_A", r, s.K),
                "up": self.of(s, "tinylora_B", s.N, r),
                "P": self.of(s, "tinylora_P", u, r, r),
            }
            for s in self.sites
        }
        config = TinyLoraConfig(
            r=r, u=u, sigma="split", groups=tuple(groups), seed=self.config.get("projection_seed") or 0,
            **self.common("tinylora_dropout"),
        )  # fmt: skip
        numbers = {f"v_{g}": self.take(f"base_model.tinylora_v.{g}", u) for g in range(max(groups) + 1)}
        return config, frozen, {}, numbers


class _Lora(_Reader):
    marker = ".lora_A.weight"

    def parts(self):
        factors = {
            s: (self.of(s, "lora_A.weight", None, s.K), self.of(s, "lora_B.weight", s.N, None)) for s in self.sites
        }
        ranks = {s: len(A) for s, (A, _) in factors.items()}
        for s, r in ranks.items():
            if r != self._of_pattern("rank_pattern", s, "r"):
                by = "r" if r != self.config["r"] else "rank_pattern"
                raise self.refused(by, f"{r} for {s.name}, the rank that its lora_A has")
        rslora = bool(self.config.get("use_rslora"))
        scales = {
            s: self._of_pattern("alpha_pattern", s, "lora_alpha") / (ranks[s] ** 0.5 if rslora else ranks[s])
            for s in self.sites
        }
        # One scale for all: where rank_pattern or alpha_pattern make another, the quotient goes into up.
        r = max(ranks.values())
        scale = max(Counter(scales.values()).items(), key=lambda found: (found[0] != 0, found[1]))[0]
        config = LoraConfig(
            r=r, alpha=_tidy(scale * (r**0.5 if rslora else r)), rslora=rslora, **self.common("lora_dropout")
        )
        numbers = {}
        for s, (A, B) in factors.items():  # lower ranks are filled with zeros, which get no gradient and stay zero
            B = B if scales[s] == scale else B * (scales[s] / scale)
            numbers[f"{s.name}.down"], numbers[f"{s.name}.up"] = _widen(A, r, 0), _widen(B, r, 1)
        return config, {}, {}, numbers

    def _of_pattern(self, patterns: str, site: Site, otherwise: str) -> float:
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", site.name):  # as PEFT matches
                return value
        return self.config[otherwise]


class _Vera(_Reader):
    marker = ".vera_lambda_d"

    def parts(self):
        if not self.config.get("save_projection", True):
            raise self.refused("save_projection", "True: PEFT would draw its matrices again, which only it can")
        r, N, K = self.config["r"], max(s.N for s in self.sites), max(s.K for s in self.sites)
        A, B = self.take("base_model.vera_A", None, None), self.take("base_model.vera_B", None, None)
        if A.shape[0] != r or B.shape[1] != r or A.shape[1] < K or B.shape[0] < N:
            raise ValueError(
                f"{self.folder / TENSORS}: vera_A and vera_B have shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                f"expected at least {(r, K)} and {(N, r)}"
            )
        config = VeraConfig(r=r, d_initial=self.config.get("d_initial", 0.1), **self.common("vera_dropout"))
        numbers = {}
        for s in self.sites:
            numbers[f"{s.name}.b"] = self.of(s, "vera_lambda_b", s.N)
            numbers[f"{s.name}.d"] = self.of(s, "vera_lambda_d", r)
        return config, {}, {"down": A[:, :K], "up": B[:N]}, numbers


class _AdaLora(_Reader):
    marker = ".lora_E"

    def parts(self):
        c = self.config
        r = c["init_r"]
        last = c["total_step"] - c.get("tfinal", 0)
        config = AdaLoraConfig(
            r=r, target_r=min(c["target_r"], r), alpha=c["lora_alpha"] * r / (r + _PEFTS_EPSILON),
            total_steps=c["total_step"], warmup_steps=c.get("tinit", 0), final_steps=c.get("tfinal", 0),
            interval=c.get("deltaT", 1), beta1=c["beta1"], beta2=c["beta2"], orthogonality=c["orth_reg_weight"],
            **self.common("lora_dropout"),
        )  # fmt: skip
        allocated = c.get("rank_pattern") is not None
        numbers: dict[str, Tensor] = {"steps": torch.tensor(float(last if allocated else 0))}
        for s in self.sites:  # after an allocation PEFT saves the triplets that were kept, and no others
            E = self.of(s, "lora_E", None, 1)
            if len(E) > r:
                raise ValueError(f"{self.folder / TENSORS}: {s.name} has {len(E)} triplets, expected at most {r}")
            numbers[f"{s.name}.lam"] = _widen(E[:, 0], r, 0)
            numbers[f"{s.name}.kept"] = _widen(torch.ones(len(E)), r, 0)
            numbers[f"{s.name}.down"] = _widen(self.of(s, "lora_A", len(E), s.K), r, 0)
            numbers[f"{s.name}.up"] = _widen(self.of(s, "lora_B", s.N, len(E)), r, 1)
        return config, {}, {}, numbers


def layers_of(model: nn.Module, folder: str | os.PathLike) -> dict[str, bool]:
    """The layers of the model that an adapter folder of PEFT's is for, and whether the base's weight lies there too."""
    reader = _READERS[read(folder)[0]["peft_type"]](folder, model)
    return {name: _base_weight(name) in reader.left for name in reader.layers}


def _base_weight(layer: str) -> str:
    return f"{_PREFIX}{layer}.base_layer.weight"  # PEFT writes an adapted lm_head's along


_READERS = {"TINYLORA": _TinyLora, "LORA": _Lora, "VERA": _Vera, "ADALORA": _AdaLora}


def _widen(t: Tensor, size: int, dim: int) -> Tensor:
    """Filled with zeros to `size` along `dim`."""
    if t.shape[dim] == size:
        return t
    shape = list(t.shape)
    shape[dim] = size - t.shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim)


@as_always()
def load_peft(
    model: nn.Module,
    folder: str | os.PathLike,
    name: str = "default",
    digests: Mapping[str, str] | None = None,
) -> nn.Module:
    """`load` of a folder of PEFT's; `digests` for a model whose weights lie elsewhere."""
    kind = read(folder)[0]["peft_type"]
    reader = _READERS[kind](folder, model)
    try:
        config, frozen, common, numbers = reader.parts()
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise ValueError(
            f"{reader.folder / CONFIG} is damaged or of a version of PEFT unknown here: {error!r}"
        ) from None
    modules = _saved_modules(model, config)
    for path, module in modules.items():
        for n, t in lasting(module).items():
            numbers[f"saved.{path}.{n}"] = reader.take(f"{_PREFIX}{path}.{n}", *t.shape)
        for n, _ in whole_module(module).named_buffers():  # those that are made anew, and that older versions saved
            reader.left.pop(f"{_PREFIX}{path}.{n}", None)
    refuse_wrapped(model, reader.layers)
    digests = digests or base_digests(reader.layers)
    for site in reader.layers:
        base = reader.left.pop(_base_weight(site), None)
        if base is not None and digest(base.to(torch.bfloat16)) != digests[site]:
            raise ValueError(
                f"{reader.folder / TENSORS} holds another weight for {site} than this {type(model).__name__} has, "
                "expected the base that it was saved with"
            )
    if reader.left:
        odd = sorted(reader.left)[0]
        raise ValueError(f"{reader.folder / TENSORS} holds {odd}, which nothing here can take, expected {kind} alone")
    if name in adapter_names(model):
        raise ValueError(f"name is {name!r}, but the model has an adapter of that name: expected another for PEFT's")
    frozen = {
        site: {n: t.to(layer.weight.device) for n, t in frozen.get(site, {}).items()}
        for site, layer in reader.layers.items()
    }
    shared = attach(model, reader.layers, config, name, frozen, digests)
    shared.foreign = any(frozen.values()) or bool(common)
    with torch.no_grad():
        for n, t in common.items():
            shared.get_buffer(n).copy_(t)
        for n, p in named_numbers(model, name).items():
            if n in numbers:
                p.copy_(numbers[n])
    return model


def _saved_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    return find_modules_to_save(model, config.modules_to_save, find_targets(model, config.target_modules))
