"""PEFT, live: `patch_peft()` makes PEFT's TinyLoRA, LoRA, VeRA and AdaLoRA linear layers run the fused operator.

The forward of these classes is replaced, so that layers made later (add_adapter, load_adapter) are covered as well.
Each call decides from Python attributes alone, never from a tensor's values, whether it is the common case: one
active adapter on a plain torch.nn.Linear or a Linear4bit of bitsandbytes', not merged, no dropout acting. Everything
else goes to PEFT's own forward, unchanged, and is counted with its reason (`counts`). Nothing is cached from one call
to the next but constants: the factors are read from the layer every time, whatever an optimiser, a load or `.data =`
did to them.

    PEFT's layer     down      core                    up
    TinyLoRA         A         Σ v_i P_i               B
    LoRA             A         scaling · I             B
    VeRA             A[:, :K]  diag(lambda_d)          diag(lambda_b) B
    AdaLoRA          A         diag(E) scaling / rank  B

What is diagonal is handed over as its [r] numbers; in eager torch on a CPU it is a part of up, or a factor
(integrations/peft_on_cpu.py).

Every layer gives the dtype that PEFT's own gives, and rounds once where PEFT's rounds the base, the correction and
their sum. Under autocast, x, the base's weight and its bias are cast as F.linear's would be; the factors stay as they
are, where PEFT rounds them, and everything at rank r, to autocast's dtype. The gradient of a gradient does not exist
on this path.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from tinylora.integrations.optional import installed, needed
from tinylora.integrations.peft_on_cpu import linear_on_cpu
from tinylora.nn.four_bit import is_four_bit, packed_weight
from tinylora.ops.checks import CAST, autocasts, fits
from tinylora.ops.dispatch import interpreting
from tinylora.ops.four_bit import FourBit
from tinylora.ops.linear import unchecked, without_autocast

# Asked in every call, in which a look at a module of torch's is one more.
_is_compiling = torch.compiler.is_compiling
_grads = torch.is_grad_enabled
_autocasts = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_traces = torch._C._get_tracing_state

_TENSORS = (Tensor, nn.Parameter)


def _plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is F.linear on its parameters, or bitsandbytes' product, and nothing else."""
    return (
        (type(linear) is nn.Linear or is_four_bit(linear))
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        and "forward" not in linear.__dict__  # accelerate puts one there
    )


# Each of these computes a layer of PEFT's with the adapter `name`, or says why the operator cannot. x, weight and bias
# are of one dtype and device; `on_cpu` says that they are plain ones there and weight is frozen. A layer of a small
# model takes ten microseconds and its code is in no cache when its turn comes: calls of Python's and looks through
# nn.Module's __getattr__ or a container's __getitem__ would cost more, so `__dict__` and the registries are read
# directly, and conditions stand where they are asked. FSDP and DataParallel take parameters out of the registry and put
# their tensors into `__dict__`.


def _tinylora(layer, name, x, weight, bias, on_cpu) -> Tensor | str:
    modules = layer["_modules"]
    down = modules["tinylora_A"].__dict__["_buffers"].get(name)
    if down is None:
        return _ABSENT
    dropout = modules["tinylora_dropout"].__dict__["_modules"][name]
    if type(dropout) is not nn.Identity and _drops(dropout):
        return _DROPS
    if "_tinylora_v_key" in layer:
        key, own = layer["_tinylora_v_key"][name], modules["tinylora_v"].__dict__["_modules"][name].__dict__
        v = own["_parameters"].get(key, own.get(key))
    else:  # PEFT 0.21.0
        v = layer["_tinylora_v_ref"].get(name)
    if v is None:
        return "v is not a parameter of its own"
    up = modules["tinylora_B"].__dict__["_buffers"][name]
    basis = modules["tinylora_P"].__dict__["_buffers"][name]
    if (
        on_cpu
        and down.dtype is up.dtype is v.dtype is basis.dtype is torch.float32
        and down.is_cpu
        and up.is_cpu
        and v.is_cpu
        and basis.is_cpu
    ):
        return linear_on_cpu(x, weight, bias, down, v, up, basis=basis)
    return _operator(x, weight, down, v, up, bias, basis)


def _lora(layer, name, x, weight, bias, on_cpu) -> Tensor | str:
    modules = layer["_modules"]
    down = modules["lora_A"].__dict__["_modules"].get(name)
    if down is None:
        return _ABSENT
    if name in layer["lora_variant"]:
        return "a variant of LoRA (DoRA, aLoRA, ...)"
    dropout = modules["lora_dropout"].__dict__["_modules"][name]
    if type(dropout) is not nn.Identity and _drops(dropout):
        return _DROPS
    up = modules["lora_B"].__dict__["_modules"][name]
    a, b = down.__dict__, up.__dict__
    if (
        type(down) is not nn.Linear  # `_plain`, twice
        or type(up) is not nn.Linear
        or a["_forward_hooks"]
        or a["_forward_pre_hooks"]
        or a["_backward_hooks"]
        or a["_backward_pre_hooks"]
        or b["_forward_hooks"]
        or b["_forward_pre_hooks"]
        or b["_backward_hooks"]
        or b["_backward_pre_hooks"]
        or ("forward" in a and not _only_moves_x(a))
        or ("forward" in b and not _only_moves_x(b))
    ):
        return "lora_A or lora_B is not a plain torch.nn.Linear, or has hooks"
    scale = layer["scaling"][name]
    down, up = a["_parameters"].get("weight", a.get("weight")), b["_parameters"].get("weight", b.get("weight"))
    if b["_parameters"].get("bias", b.get("bias")) is not None:
        return "lora_bias"
    if isinstance(scale, Tensor):  # PEFT's hotswap makes it one, whose value changes in place
        return _operator(x, weight, down, scale.reshape(1).expand(down.shape[0]), up, bias)
    if (
        on_cpu
        and down.is_cpu
        and up.is_cpu
        and down.dtype is up.dtype is torch.float32
        and type(down) in _TENSORS
        and type(up) in _TENSORS
    ):
        return linear_on_cpu(x, weight, bias, down, None, up, scale)
    return _operator(x, weight, down, _every(down.shape[0], scale, x.device, down.dtype), up, bias)


def _vera(layer, name, x, weight, bias, on_cpu) -> Tensor | str:
    modules = layer["_modules"]
    d, b = modules["vera_lambda_d"].__dict__, modules["vera_lambda_b"].__dict__
    d, b = d["_parameters"].get(name, d.get(name)), b["_parameters"].get(name, b.get(name))
    if d is None:
        return _ABSENT
    if b is None:
        return _COMPUTED
    if layer.get("quantization_backend") is not None and type(weight) is not FourBit:
        return "a quantised base layer"
    dropout = modules["vera_dropout"].__dict__["_modules"][name]
    if type(dropout) is not nn.Identity and _drops(dropout):
        return _DROPS
    down = modules["vera_A"].__dict__["_buffers"][name]
    up = modules["vera_B"].__dict__["_buffers"][name]
    (N, K), (r, width) = weight.shape, down.shape
    if N * r > _VERA and 8 * r > min(N, K):
        return "a rank above an eighth of the layer's size: nothing to gain"
    if width != K:  # one call to torch, where narrow is two
        down = down.as_strided((r, K), down.stride())
    if up.shape[0] != N:
        up = up.as_strided((N, r), up.stride())
    if (
        on_cpu
        and down.is_cpu
        and up.is_cpu
        and d.is_cpu
        and b.is_cpu
        and down.dtype is up.dtype is d.dtype is b.dtype is torch.float32
        and type(d) in _TENSORS
        and type(b) in _TENSORS
    ):
        return linear_on_cpu(x, weight, bias, down, None, up, diagonals=(b, d))
    if not down.device == up.device == b.device == d.device:
        return "operands on several devices"
    return _operator(x, weight, down, d, b[:, None] * up, bias)


# The gradient of lambda_b takes one more product [N, M] [M, r] than PEFT's, which keeps Y's correction instead: at a
# rank near the layer's own size that costs more than PEFT's passes over Y, unless all of it is a few numbers.
_VERA = 1 << 14


def _adalora(layer, name, x, weight, bias, on_cpu) -> Tensor | str:
    modules = layer["_modules"]
    down, up = modules["lora_A"].__dict__, modules["lora_B"].__dict__
    E, ranknum = modules["lora_E"].__dict__, modules["ranknum"].__dict__
    down, up = down["_parameters"].get(name, down.get(name)), up["_parameters"].get(name, up.get(name))
    E, ranknum = E["_parameters"].get(name, E.get(name)), ranknum["_parameters"].get(name, ranknum.get(name))
    if down is None:
        return _ABSENT
    if up is None or E is None or ranknum is None:
        return _COMPUTED
    dropout = modules["lora_dropout"].__dict__["_modules"][name]
    if type(dropout) is not nn.Identity and _drops(dropout):
        return _DROPS
    scale = layer["scaling"][name]
    if (
        on_cpu
        and down.is_cpu
        and up.is_cpu
        and E.is_cpu
        and ranknum.is_cpu
        and down.dtype is up.dtype is E.dtype is torch.float32
        and type(down) in _TENSORS
        and type(up) in _TENSORS
        and type(E) in _TENSORS
        and E.numel() > 0  # all of a layer's triplets may be pruned
    ):
        if not (ranknum.requires_grad and _grads()) and not isinstance(scale, Tensor):
            return linear_on_cpu(x, weight, bias, down, None, up * E.view(-1), scale / (ranknum.item() + 1e-5))
        # on a bf16 base PEFT's cast of the adapter to fp32 leaves ranknum trainable: its gradient is asked for, too
        return linear_on_cpu(x, weight, bias, down, None, up * (E.view(-1) * (scale / (ranknum + 1e-5))))
    return _operator(x, weight, down, E.view(-1) * (scale / (ranknum + 1e-5)), up, bias)


_ABSENT = "the active adapter is not in this layer"
_DROPS = "dropout acts"
_COMPUTED = "a parameter of the adapter is computed from others (a parametrization)"


def _only_moves_x(own: dict) -> bool:
    """Whether a lora_A's or lora_B's own forward is ms-swift's: torch.nn.Linear's, of x on the weight's device."""
    theirs, torchs = (getattr(own.get(name), "__func__", None) for name in ("forward", "forward_origin"))
    return (
        torchs is nn.Linear.forward
        and getattr(theirs, "__module__", "") == "swift.tuners.peft"
        and theirs.__name__ == "keep_device_forward"
    )


def _drops(dropout: nn.Module) -> bool:
    """Whether a dropout that is no nn.Identity changes anything."""
    return type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)


# kind: (module, class, what computes it, whether its result under autocast has x's dtype and not autocast's)
_COVERED: dict[str, tuple[str, str, Callable, bool]] = {
    "TinyLoRA": ("peft.tuners.tinylora.layer", "Linear", _tinylora, True),
    "LoRA": ("peft.tuners.lora.layer", "Linear", _lora, False),
    "VeRA": ("peft.tuners.vera.layer", "Linear", _vera, True),
    "AdaLoRA": ("peft.tuners.adalora.layer", "SVDLinear", _adalora, False),
    "LoRA, 4 bits": ("peft.tuners.lora.bnb", "Linear4bit", _lora, True),
    "AdaLoRA, 4 bits": ("peft.tuners.adalora.bnb", "SVDLinear4bit", _adalora, True),
}

OLDEST = 0, 18  # PEFT's, in which its layers hold what is read here
FAST = "fast"
_counts: dict[str, dict[str, int]] = {kind: {FAST: 0} for kind in _COVERED}
_originals: dict[type, tuple[Callable, Callable]] = {}  # class -> (PEFT's forward, ours)


def _why_not(layer, x, args, kwargs, cls) -> str:
    """Which of `_forward_of`'s conditions fails; "" where the base layer has four bits a number and none does."""
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
    base = layer._modules["base_layer"]
    if not _plain(base):
        return "the base layer is not a plain torch.nn.Linear, or has hooks"
    if not layer.__dict__.get("cast_input_dtype_enabled", True):
        return "casting of the input is off"
    weight = base._parameters.get("weight", base.__dict__.get("weight"))
    four_bit = is_four_bit(base)
    if type(x) not in _TENSORS or x.is_nested or (type(weight) not in _TENSORS and not four_bit):
        return "a tensor subclass, or a nested tensor"
    if four_bit and _is_compiling():
        return "4 bits in a compiled graph"
    if four_bit and not _watched():
        return ""
    return "something looks at every call (global hooks, a dispatch mode, torch.func, dual numbers, torch.jit.trace)"


def _forward_of(cls: type, kind: str, original: Callable, compute: Callable, gives_dtype_of_x: bool) -> Callable:
    counts = _counts[kind]
    kernels_on_cpu = interpreting()

    @functools.wraps(original)
    def forward(self, x, *args, **kwargs):
        compiling = _is_compiling()
        layer = self.__dict__
        base = layer["_modules"]["base_layer"]
        name, own = self._active_adapter, base.__dict__
        if type(name) is list and len(name) == 1:
            name = name[0]
        if (
            not args
            and not kwargs
            and type(self) is cls
            and type(name) is str
            and not self._disable_adapters  # PEFT's class has a default of these three
            and not self.merged_adapters
            and layer.get("cast_input_dtype_enabled", True)
            and type(base) is nn.Linear  # from here to "forward": `_plain`
            and not own["_forward_hooks"]
            and not own["_forward_pre_hooks"]
            and not own["_backward_hooks"]
            and not own["_backward_pre_hooks"]
            and "forward" not in own
            and type(weight := own["_parameters"].get("weight", own.get("weight"))) in _TENSORS
            and type(x) in _TENSORS
            and not x.is_nested
            and (compiling or not _watched())
        ):
            bias = own["_parameters"].get("bias", own.get("bias"))
            if _autocasts() and autocasts(x.device.type):
                found = _under_autocast(compute, layer, name, x, weight, bias, compiling or kernels_on_cpu)
                if gives_dtype_of_x and type(found) is not str:
                    found = found.to(x.dtype)
            elif x.dtype is not weight.dtype:
                found = _DIFFER
            elif x.is_cpu and weight.is_cpu:
                on_cpu = not (compiling or kernels_on_cpu or (weight.requires_grad and _grads()))
                found = compute(layer, name, x, weight, bias, on_cpu)
            else:
                found = compute(layer, name, x, weight, bias, False) if x.device == weight.device else _DIFFER
        elif is_four_bit(base):
            found = _why_not(self, x, args, kwargs, cls) or _on_four_bits(compute, layer, name, x)
        else:
            found = _why_not(self, x, args, kwargs, cls)
        if type(found) is not str:
            if not compiling:  # a count in a compiled graph would be a guard on its value
                counts[FAST] += 1
            return found
        if not compiling:
            counts[found] = counts.get(found, 0) + 1
        return original(self, x, *args, **kwargs)

    return forward


_DIFFER = "x and the base weight differ in dtype or device"


def _watched() -> bool:
    """Whether something would see PEFT's own calls and not this one. Dynamo sees both."""
    return (
        _has_any_global_hook()
        or _dispatch_modes() > 0
        or _transforms() is not None
        or _traces() is not None
        or forward_ad._current_level >= 0
    )


def _under_autocast(compute, layer, name, x, weight, bias, traced) -> Tensor | str:
    """`compute` on what autocast makes of the base layer's operands, in autocast's dtype."""
    if x.dtype not in CAST or weight.dtype not in CAST or x.device != weight.device:
        return _DIFFER
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        trains = weight.requires_grad and _grads()
        cast = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return compute(layer, name, *cast, device == "cpu" and not (traced or trains))


def _on_four_bits(compute, layer, name, x) -> Tensor | str:
    """`compute` around bitsandbytes' Linear4bit, in its compute_dtype; the result has x's dtype, as its own has."""
    base = layer["_modules"]["base_layer"]
    if not base.compute_type_is_set:
        return "4 bits whose first call decides in what dtype they are computed"
    if x.is_cpu and not base.training:
        return "4 bits on a CPU in eval(): bitsandbytes packs them for it"
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        return "4 bits that bitsandbytes has packed for this CPU"
    dtype = base.compute_dtype or x.dtype
    if dtype.itemsize < x.dtype.itemsize and not autocasts(x.device.type):
        return "4 bits computed in less than x's dtype: PEFT adds the correction in that"
    with without_autocast(x.device.type):
        bias = None if base.bias is None else base.bias.to(dtype)
        found = compute(layer, name, x.to(dtype), packed_weight(base), bias, False)
    return found if type(found) is str else found.to(x.dtype)


def _operator(x, weight, down, core, up, bias, basis=None) -> Tensor | str:
    """The fused operator with what PEFT's layer holds, or the reason why it does not take that."""
    if not fits(x, weight.like(x) if type(weight) is FourBit else weight, down, core, up, bias, None, basis):
        return "operands that do not fit (dtype, device, rank 0, not loaded)"
    return unchecked(x, weight, down, core, up, bias, None, basis)


def _every(r: int, scale: float, device: torch.device, factors: torch.dtype) -> Tensor | None:
    """The diagonal of scale · I, [r], in fp32, or fp64 as the factors; None for I."""
    if scale == 1:
        return None
    dtype = torch.float64 if factors is torch.float64 else torch.float32
    if _is_compiling():
        return torch.full((r,), scale, device=device, dtype=dtype)
    key = r, scale, device, dtype
    found = _constants.get(key)
    if found is None:
        with torch.inference_mode(False):  # a tensor of inference mode could not be kept for a backward later
            found = torch.full((r,), scale, device=device, dtype=dtype)
        # What is made while a CUDA graph is captured has its numbers from the first replay on, in that graph's memory.
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            if len(_constants) >= 1024:
                _constants.clear()
            _constants[key] = found
    return found


_constants: dict[tuple, Tensor] = {}


def patch_peft() -> None:
    """From now on PEFT's TinyLoRA, LoRA, VeRA and AdaLoRA linear layers run the fused operator where it applies.

    Existing models and those made later; nothing else in PEFT changes. Calling it again is harmless. What is not
    covered (merged, disabled, several active adapters, mixed batches, dropout in training, DoRA and other variants,
    VeRA of a rank above an eighth of the layer's smaller side, which PEFT's 256 is below 2048, base layers that are
    hooked, or quantised otherwise than to bitsandbytes' four bits, those in eval() on a CPU or in a compiled graph,
    convolutions, embeddings, ...) runs PEFT's own forward; `counts()` says how often.
    Models compiled before keep the graphs they have. ImportError without peft, or with one before 0.18.
    """
    for kind, (cls, *how) in _classes().items():
        if cls not in _originals:
            original = cls.__dict__["forward"]
            ours = _forward_of(cls, kind, original, *how)
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
        found[FAST] = 0  # never without it: other threads count
        for reason in [r for r in found if r != FAST]:
            found.pop(reason, None)


def covered() -> list[str]:
    """The layers that `patch_peft` covers, as PEFT names them."""
    return [f"{module.removesuffix('.layer')}.{cls}" for module, cls, *_ in _here().values()]


def _classes() -> dict[str, tuple[type, Callable, bool]]:
    version = needed("peft", "peft", "patch_peft").__version__
    from packaging.version import Version  # which PEFT needs itself

    if Version(version).release < OLDEST:
        raise ImportError(f"peft is {version}, expected {'.'.join(map(str, OLDEST))} or newer for patch_peft")
    found = {kind: (getattr(import_module(m), name, None), *how) for kind, (m, name, *how) in _here().items()}
    return {kind: how for kind, how in found.items() if how[0] is not None}


def _here() -> dict[str, tuple]:
    """_COVERED, without what the installed PEFT has not (0.18 has no TinyLoRA), and without the layers of four bits
    where bitsandbytes is not installed: PEFT's modules import it."""
    four_bits = installed("bitsandbytes")
    return {k: how for k, how in _COVERED.items() if (four_bits or not how[0].endswith(".bnb")) and _is_there(how[0])}


def _is_there(module: str) -> bool:
    """Whether it could be imported, without importing the packages around it."""
    package, *inner = module.split(".")
    spec = find_spec(package) if installed(package) else None
    for i in range(len(inner)):
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(".".join([package, *inner[: i + 1]]), spec.submodule_search_locations)
    return spec is not None
