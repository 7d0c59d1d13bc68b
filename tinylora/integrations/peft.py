"""PEFT, live: `patch_peft()` makes PEFT's TinyLoRA, LoRA, VeRA and AdaLoRA linear layers run the fused operator.

The forward of four classes is replaced, so that layers made later (add_adapter, load_adapter) are covered as well.
Each call decides from Python attributes alone, never from a tensor's values, whether it is the common case: one
active adapter on a plain torch.nn.Linear, not merged, no dropout acting. Everything else goes to PEFT's own forward,
unchanged, and is counted with its reason (`counts`). Nothing is cached from one call to the next but constants: the
factors are read from the layer every time, whatever an optimiser, a load or `.data =` did to them.

    PEFT's layer     down      core                             up
    TinyLoRA         A         Σ v_i P_i                        B
    LoRA             A         scaling · I, none at 1           B (on a CPU: none, and scaling · B)
    VeRA             A[:, :K]  diag(lambda_d)                   diag(lambda_b) B[:N]
    AdaLoRA          diag(E · scaling / ranknum) A    none      B

Every layer gives the dtype that PEFT's own gives, and rounds once where PEFT's rounds the base, the correction and
their sum. The gradient of a gradient does not exist on this path.
"""

import functools
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tinylora.ops import eager
from tinylora.ops.checks import fits
from tinylora.ops.dispatch import interpreting
from tinylora.ops.linear import unchecked

_TENSORS = (Tensor, nn.Parameter)


def _plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is F.linear on its parameters and nothing else."""
    return (
        type(linear) is nn.Linear
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        and "forward" not in linear.__dict__  # accelerate puts one there
    )


# Each of these gives (down, core, up, basis, scale) of the adapter `name` in a layer of PEFT, or says why there is none
# that the operator could take. The registries of nn.Module are read directly: __getattr__ and the containers'
# __getitem__ cost a microsecond each, and a small layer costs ten.


def _tinylora(layer, name):
    modules = layer._modules
    down = modules["tinylora_A"]._buffers.get(name)
    if down is None:
        return "the active adapter is not in this layer"
    if _drops(modules["tinylora_dropout"]._modules[name]):
        return "dropout acts"
    v = modules["tinylora_v"]._modules[name]._parameters.get(layer._tinylora_v_key[name])
    if v is None:
        return "v is not a parameter of its own"
    return down, v, modules["tinylora_B"]._buffers[name], modules["tinylora_P"]._buffers[name], 1.0


def _lora(layer, name):
    modules = layer._modules
    down = modules["lora_A"]._modules.get(name)
    if down is None:
        return "the active adapter is not in this layer"
    if name in layer.lora_variant:
        return "a variant of LoRA (DoRA, aLoRA, ...)"
    if _drops(modules["lora_dropout"]._modules[name]):
        return "dropout acts"
    up = modules["lora_B"]._modules[name]
    if not _plain(down) or not _plain(up):
        return "lora_A or lora_B is not a plain torch.nn.Linear, or has hooks"
    if up._parameters["bias"] is not None:
        return "lora_bias"
    return down._parameters["weight"], None, up._parameters["weight"], None, layer.scaling[name]


def _vera(layer, name):
    modules = layer._modules
    d = modules["vera_lambda_d"]._parameters.get(name)
    if d is None:
        return "the active adapter is not in this layer"
    if layer.quantization_backend is not None:
        return "a quantised base layer"
    if _drops(modules["vera_dropout"]._modules[name]):
        return "dropout acts"
    b = modules["vera_lambda_b"]._parameters[name]
    A, B = modules["vera_A"]._buffers[name], modules["vera_B"]._buffers[name]
    if not A.device == B.device == b.device == d.device:
        return "operands on several devices"
    N, K, r = layer.out_features, layer.in_features, len(d)
    if 8 * r > min(N, K) and N * r > _VERA:
        return "a rank above an eighth of the layer's size: nothing to gain"
    return A[:, :K], torch.diag(d), b[:, None] * B[:N], None, 1.0


# diag(lambda_b) B, [N, r], is formed on every call, and the core's gradient is [r, r]: at a rank near the layer's own
# size that costs more than PEFT's passes over Y, unless all of it is a few numbers.
_VERA = 1 << 14


def _adalora(layer, name):
    modules = layer._modules
    down = modules["lora_A"]._parameters.get(name)
    if down is None:
        return "the active adapter is not in this layer"
    if _drops(modules["lora_dropout"]._modules[name]):
        return "dropout acts"
    E, ranknum = modules["lora_E"]._parameters[name], modules["ranknum"]._parameters[name]
    return down * (E * (layer.scaling[name] / (ranknum + 1e-5))), None, modules["lora_B"]._parameters[name], None, 1.0


def _drops(dropout: nn.Module) -> bool:
    if type(dropout) is nn.Identity:
        return False
    return type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)


_COVERED: dict[str, tuple[str, str, Callable]] = {
    "TinyLoRA": ("peft.tuners.tinylora.layer", "Linear", _tinylora),
    "LoRA": ("peft.tuners.lora.layer", "Linear", _lora),
    "VeRA": ("peft.tuners.vera.layer", "Linear", _vera),
    "AdaLoRA": ("peft.tuners.adalora.layer", "SVDLinear", _adalora),
}

FAST = "fast"
_counts: dict[str, dict[str, int]] = {kind: {FAST: 0} for kind in _COVERED}
_originals: dict[type, tuple[Callable, Callable]] = {}  # class -> (PEFT's forward, ours)


def _why_not(layer, x, args, kwargs, cls) -> str:
    """Which of `_forward_of`'s conditions fails."""
    if type(layer) is not cls:
        return "a subclass of PEFT's layer"
    if args or kwargs:
        return "further arguments (adapter_names, alora_offsets)"
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return "merged"
    names = layer.active_adapters
    if len(names) != 1:
        return "several active adapters" if names else "no active adapter"
    if not _plain(layer._modules["base_layer"]):
        return "the base layer is not a plain torch.nn.Linear, or has hooks"
    if not layer.__dict__.get("cast_input_dtype_enabled", True):
        return "casting of the input is off"
    weight = layer._modules["base_layer"]._parameters["weight"]
    if type(x) not in _TENSORS or type(weight) not in _TENSORS:
        return "a tensor subclass"
    if x.dtype is not weight.dtype or x.device != weight.device:
        return "x and the base weight differ in dtype or device"
    return "something looks at every call (global hooks, a dispatch mode, torch.func, torch.jit.trace)"


def _watched() -> bool:
    """Whether something would see PEFT's own calls and not this one. Dynamo sees both."""
    return (
        _has_any_global_hook()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _forward_of(cls: type, kind: str, original: Callable, factors: Callable) -> Callable:
    counts = _counts[kind]

    @functools.wraps(original)
    def forward(self, x, *args, **kwargs):
        compiling = torch.compiler.is_compiling()
        name, base = self._active_adapter, self._modules["base_layer"]
        if type(name) is list and len(name) == 1:
            name = name[0]
        if (
            type(self) is cls
            and not args
            and not kwargs
            and not self._disable_adapters
            and not self.merged_adapters
            and type(name) is str
            and _plain(base)
            and self.__dict__.get("cast_input_dtype_enabled", True)
            and type(x) in _TENSORS
            and type(weight := base._parameters["weight"]) in _TENSORS
            and x.dtype is weight.dtype
            and x.device == weight.device
            and (compiling or not _watched())
        ):
            found = factors(self, name)
        else:
            found = _why_not(self, x, args, kwargs, cls)
        if type(found) is tuple:
            down, core, up, basis, scale = found
            y = _operator(x, weight, down, core, up, base._parameters["bias"], basis, scale, compiling)
            if type(y) is not str:
                if not compiling:
                    counts[FAST] += 1
                return y
            found = y
        if not compiling:  # a count in a compiled graph would be a guard on its value
            counts[found] = counts.get(found, 0) + 1
        return original(self, x, *args, **kwargs)

    return forward


def _operator(x, weight, down, core, up, bias, basis, scale, compiling) -> Tensor | str:
    """The fused operator with what PEFT's layer holds, or the reason why it does not take that."""
    device = x.device
    if (
        device.type == "cpu"
        and not compiling
        and not torch.is_grad_enabled()
        and weight.dtype in _FEW
        and down.dtype is up.dtype is torch.float32
        and down.device == up.device == device
        and (core is None or (core.dtype is torch.float32 and core.device == device))
        and (basis is None or (basis.dtype is torch.float32 and basis.device == device))
        and x.numel() <= _FEW[weight.dtype]
        and up.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not interpreting()
    ):
        return eager.infer(x, weight, down, eager.mix(core, basis), up, bias, scale)
    if scale != 1 and device.type == "cpu" and not compiling and up.dtype is torch.float32:
        up = (
            up * scale
        )  # N r numbers once, where a core would be three passes over [M, r]; a kernel has the core for free
    elif scale != 1:
        core = _scaled_identity(down.shape[0], scale, device)
    if torch.is_autocast_enabled(device.type):
        return "autocast"
    if not fits(x, weight, down, core, up, bias, None, basis):
        return "operands that do not fit (dtype, device, rank 0, not loaded)"
    return unchecked(x, weight, down, core, up, bias, None, basis)


# Up to so many numbers in x Python costs as much as arithmetic, and `eager.infer` is used.
_FEW = {torch.float32: 1 << 20, torch.bfloat16: eager.SMALL, torch.float16: eager.SMALL}


def _scaled_identity(r: int, scale: float, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return scale * torch.eye(r, device=device)
    return _constant(r, scale, device)


@functools.lru_cache(maxsize=1024)
def _constant(r: int, scale: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be kept for a backward later
        return scale * torch.eye(r, device=device)


def patch_peft() -> None:
    """From now on PEFT's TinyLoRA, LoRA, VeRA and AdaLoRA linear layers run the fused operator where it applies.

    Existing models and those made later; nothing else in PEFT changes. Calling it again is harmless. What is not
    covered (merged, disabled, several active adapters, mixed batches, dropout in training, DoRA and other variants,
    quantised or hooked base layers, convolutions, embeddings, ...) runs PEFT's own forward; `counts()` says how often.
    Models compiled before keep the graphs they have. ImportError without peft.
    """
    for kind, (cls, factors) in _classes().items():
        if cls not in _originals:
            original = cls.__dict__["forward"]
            ours = _forward_of(cls, kind, original, factors)
            _originals[cls] = original, ours
            cls.forward = ours


def unpatch_peft() -> None:
    """PEFT as it was before `patch_peft`; harmless without it.

    RuntimeError, with nothing undone, if somebody else has replaced a forward since: theirs would be lost.
    """
    for cls, (_, ours) in _originals.items():
        if cls.__dict__["forward"] is not ours:
            raise RuntimeError(
                f"{cls.__module__}.{cls.__name__}.forward was replaced after patch_peft, by "
                f"{cls.__dict__['forward']!r}: undo that first"
            )
    for cls, (original, _) in _originals.items():
        cls.forward = original
    _originals.clear()


def counts() -> dict[str, dict[str, int]]:
    """How many calls of each kind of layer took the operator ("fast") and how many PEFT's own forward, by reason.

    Since the process started or `reset_counts`. Calls inside compiled graphs are not counted.
    """
    return {kind: dict(found) for kind, found in _counts.items()}


def reset_counts() -> None:
    for found in _counts.values():
        found.clear()
        found[FAST] = 0


def covered() -> list[str]:
    """The layers that `patch_peft` covers, as PEFT names them."""
    return [f"{module.removesuffix('.layer')}.{cls}" for module, cls, _ in _COVERED.values()]


def _classes() -> dict[str, tuple[type, Callable]]:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("patch_peft needs peft: pip install tinylora[peft]") from error
    return {kind: (getattr(import_module(m), name), factors) for kind, (m, name, factors) in _COVERED.items()}
