"""Sibling groups: linear layers of one parent that receive one tensor run as one operator (`ops.siblings`).

Which layers those are is read off the parent's forward: `self.q_proj(x)` and `self.k_proj(x)` with one variable x, in
one branch, x not assigned in between. What was read is a guess and is never trusted: while the parent runs, the first
sibling that is called computes for all, and each of the others takes its share only if it is given that very tensor.
Outside its parent's forward a layer computes alone.

Only adapters whose core alone trains are grouped: their thin factors are frozen, so that the group's D and U are made
once. The group's weights are moved into one storage, of which each layer's `weight` is a view, under its own name.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinylora.adapters import Adapter, Factors
from tinylora.adapters.base import lay_together
from tinylora.adapters.sharded import of_zero3
from tinylora.nn.calls import called_together
from tinylora.nn.kept import Kept, Operands
from tinylora.nn.linear import Linear
from tinylora.ops.dispatch import MAX_RANK
from tinylora.ops.linear import by_torch_alone
from tinylora.ops.siblings import adapted_linears, joined, on_torch


def group(root: nn.Module) -> None:
    """Make the sibling groups of a model's adapted layers, from the ones that it has now."""
    ungroup(root)
    # Two parameters at one place are aliases: moving one would part them.
    places = Counter(p.data_ptr() for p in root.parameters())
    for parent in root.modules():
        if "forward" in parent.__dict__ or sum(isinstance(c, Linear) for c in parent.children()) < 2:
            continue
        for names in called_together(type(parent)):
            alike: dict[tuple, list[Linear]] = {}
            for layer in (parent._modules.get(name) for name in names):
                if type(layer) is Linear and places[layer.weight.data_ptr()] == 1:
                    kind = layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None
                    alike.setdefault(kind, []).append(layer)
            for layers in alike.values():
                if len(layers) > 1 and any(a.core_alone_trains for a in layers[0].adapters.values()):
                    Siblings(parent, layers)


def ungroup(root: nn.Module) -> None:
    """Every layer computes alone again. The weights stay where they are."""
    for module in root.modules():
        if isinstance(module, Linear):
            module.siblings = None
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Siblings)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


class Wide(NamedTuple):
    """The frozen factors of a group: D stacked, U with a block per sibling.

    basis: P side by side, [G, u, r, r], on a device of SIDE_BY_SIDE, where every sibling has its own v and as many
    numbers and ranks as the others; otherwise [u, R, R] with a block per sibling.
    one_v: whether all siblings have the same v; otherwise the group's is theirs one after another.
    parts: the siblings' own factors, views of these
    """

    down: Tensor
    up: Tensor
    basis: Tensor | None
    one_v: bool
    parts: list[Factors]


class Siblings:
    """One group. But for what is made of frozen tensors, its state lasts no longer than one forward of the parent."""

    def __init__(self, parent: nn.Module, layers: list[Linear]):
        self.layers = tuple(layers)
        self._forget()
        parent.register_forward_pre_hook(self._enter)
        handle = parent.register_forward_hook(self._leave, always_call=True)
        # By a name in place of a number of its own: torch.compile would compile each of a model's equal blocks anew.
        own = f"siblings {sum(str(key).startswith('siblings') for key in parent._forward_hooks)}"
        for hooks in (parent._forward_hooks, parent._forward_hooks_always_called):
            hooks[own] = hooks.pop(handle.id)
        self._join()
        self.share()

    def _forget(self) -> None:
        self.running = False
        self.mode: tuple | None = None  # in which the parent runs
        self.shares: tuple[Tensor, int, list[Tensor | None]] | None = None  # x, its version, what nobody took yet
        self.wide: dict[str, Wide] = {}
        self.places: list[int] = []  # where `share` has put the weights
        self.ready: Kept | None = None
        self.copied = False  # a copy's layers have storages of their own until it runs

    def __getstate__(self):
        return {"layers": self.layers}

    def __setstate__(self, state):
        self.layers = state["layers"]
        self._forget()
        self.copied = True

    def _join(self) -> None:
        for layer in self.layers:
            layer.siblings = self

    def _enter(self, parent: nn.Module, inputs: tuple) -> None:
        if _within_a_part_of_a_graph():
            return
        if self.copied and not torch.compiler.is_compiling():
            self._join()
            # What torch.func puts in the parameters' place for a call is its caller's, and stays where it is.
            if not by_torch_alone() and all(type(layer.weight) is nn.Parameter for layer in self.layers):
                self.copied = False
                self.share()
        self.mode, self.shares = _mode(), None  # of a forward that Ctrl-C ended
        # What a layer's own hooks do before it runs (gather its weight, compute it) comes too late for the group.
        self.running = not any(layer._forward_pre_hooks for layer in self.layers)

    def _leave(self, parent: nn.Module, inputs: tuple, output: object) -> None:
        if self.running:
            self.running, self.shares = False, None

    def share(self) -> None:
        """Move the weights into one storage, and make the group's factors; again after every `.to`.

        Nothing happens while the layers are on their way (some moved, some not yet).
        """
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not train later
            self._share()

    def _share(self) -> None:
        self.wide, self.places, self.ready = {}, [], None
        weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        if len({(w.device, w.dtype) for w in weights}) > 1 or weights[0].is_meta or any(map(of_zero3, weights)):
            return
        if any(w.untyped_storage().nbytes() < w.nbytes for w in weights):
            return  # a skeleton's weight, one number seen as many: a copy would be all the memory it was to save
        for parts in (weights, biases):
            if parts and joined(parts) is None:
                lay_together(parts)
        self.places = [w.data_ptr() for w in weights]
        for name in self.layers[0].adapters:
            if all(name in layer.adapters for layer in self.layers):
                wide = _wide([layer.adapters[name] for layer in self.layers])
                if wide is not None:
                    self.wide[name] = wide
                    if wide.basis is not None and not wide.one_v:
                        self._share_cores([layer.adapters[name].factors().core for layer in self.layers])

    @staticmethod
    def _share_cores(cores: list[Tensor]) -> None:
        """Put every v into one storage, unless somebody else has put it where it is."""
        alone = all(v.untyped_storage().nbytes() == v.nbytes for v in cores)
        if alone and len({(v.dtype, v.device, v.dim()) for v in cores}) == 1 and cores[0].dim() == 1:
            lay_together(cores)

    def output(self, layer: Linear, x: Tensor) -> Tensor | None:
        """The layer's Y for x, or None: then it computes alone."""
        if _mode() != self.mode or _within_a_part_of_a_graph():
            return None  # no_grad or a checkpoint around this layer alone
        place = 0
        while self.layers[place] is not layer:
            place += 1
        # Tensors of inference mode keep no count of their changes, and torch.compile cannot ask: what is assigned to
        # between two calls, nn/calls.py has seen.
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        held = self.shares
        if held is not None and held[0] is x and held[1] == version:
            y = held[2][place]
            if y is not None:
                held[2][place] = None
                return y
        ys = self._compute_ready(x) if self.ready is not None else None
        if ys is None:
            ys = self._compute(x)
        if ys is None:
            return None
        y = ys[place]
        ys[place] = None
        self.shares = (x, version, ys)
        return y

    def _compute_ready(self, x: Tensor) -> list[Tensor | None] | None:
        """`_compute`'s result where what it found last time still stands, or None."""
        if torch.compiler.is_compiling():
            return None
        kept = self.ready
        if not kept.stands():
            self.ready = None
            return None
        ys = kept.outputs(x)
        return None if ys is None else list(ys)

    def _make_ready(self, name: str, x: Tensor, weights, cores, biases) -> None:
        """Keep what `_compute` found, where it is of one piece and of our own making."""
        wide = self.wide[name]
        # FSDP's weights, which lie where it gathers them, must not be held here. What ends most calls is asked first.
        if on_torch(x, weights, wide.down, cores[0], wide.up):
            return
        core = cores[0] if len(cores) == 1 else joined(cores)
        if core is None or [w.data_ptr() for w in weights] != self.places:
            return
        weight, bias = joined(weights), joined(biases) if biases else None
        if weight is None or (biases and bias is None):
            return
        operands = Operands(weight, wide.down, core, cores, wide.up, bias, wide.basis, [len(w) for w in weights])
        self.ready = Kept.of(name, self.layers, operands)

    def _compute(self, x: Tensor) -> list[Tensor | None] | None:
        # Past nn.Module's __getattr__ and in as few steps as there are questions: this runs in every forward.
        first = self.layers[0]
        name = first.active
        wide = self.wide.get(name)
        if wide is None or by_torch_alone():
            return None
        weights, biases, cores = [], [], []
        graded = torch.is_grad_enabled()
        for layer, part in zip(self.layers, wide.parts, strict=True):
            if layer.active != name or layer.merged is not None or layer.batch_invariant:
                return None
            weight, bias = layer.base()
            if graded and (weight.requires_grad or (bias is not None and bias.requires_grad)):
                return None  # somebody thawed the base: the group's operator has no gradient for it
            adapter = layer._modules["adapters"]._modules[name]
            if adapter.dropout and first.training:
                return None
            own = adapter.factors()
            if own.down is not part.down or own.up is not part.up or own.basis is not part.basis:
                return None  # somebody put others there
            if graded and (own.down.requires_grad or own.up.requires_grad):
                return None
            weights.append(weight)
            cores.append(own.core)
            if bias is not None:
                biases.append(bias)
        weight = weights[0]
        if x.shape[-1:] != weight.shape[1:] or x.device != weight.device or len(biases) not in (0, len(weights)):
            return None
        if biases and biases[0].dtype != weight.dtype:
            return None
        rows = adapter.shared.rows
        ids = None
        if rows is not None:
            if wide.basis is None:
                return None
            ids = rows.of(x)
            cores = [layer._modules["adapters"]._modules[name].row_core() for layer in self.layers]
        cores = cores[:1] if wide.one_v else cores
        if ids is None and wide.basis is not None and not torch.compiler.is_compiling():
            self._make_ready(name, x, weights, cores, biases)
        operands = weights, wide.down, cores, wide.up, biases, ids, wide.basis
        device = weight.device.type
        if not torch.is_autocast_enabled(device):
            return list(adapted_linears(x, *operands)) if x.dtype == weight.dtype else None
        if weight.dtype != torch.get_autocast_dtype(device):
            return None
        with torch.autocast(device, enabled=False):
            return list(adapted_linears(x.to(weight.dtype), *operands))


def _mode() -> tuple:
    """What decides which graph a call becomes a part of."""
    if torch.compiler.is_compiling():  # a checkpoint is a part of the graph there
        return torch.is_grad_enabled(), None
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


def _within_a_part_of_a_graph() -> bool:
    """Whether torch.compile traces a part that it keeps by itself (a checkpoint, a region that is compiled once). There
    no state may outlast a call, and no two results may share memory: every layer computes alone.
    """
    return torch.compiler.is_dynamo_compiling() and _in_a_part()


def _in_a_part() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator  # here, because only a compiler needs it

    return InstructionTranslator.current_tx().output.current_tracer.parent is not None


_in_a_part._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which imports the compiler


# The kernels spare the zeros between siblings. For torch on a CPU they cost nothing, and C of blocks three more calls.
SIDE_BY_SIDE = ("cuda",)


def _wide(adapters: list[Adapter]) -> Wide | None:
    """The group's frozen factors, of which the adapters' own become views: a change of theirs is one of it.

    None where the factors train, or where the ranks add up to more than the kernels take.
    """
    if not all(a.core_alone_trains for a in adapters):
        return None
    factors = [a.factors() for a in adapters]
    ranks = [f.down.shape[0] for f in factors]
    sizes = [f.up.shape[0] for f in factors]
    if sum(ranks) > MAX_RANK:
        return None
    one_v = all(f.core is factors[0].core for f in factors)
    down = torch.cat([f.down for f in factors])
    up = torch.block_diag(*(f.up.T for f in factors)).T  # lies in memory as Uᵀ, as every frozen U does
    basis = factors[0].basis
    beside = basis is not None and basis.device.type in SIDE_BY_SIDE and not one_v
    beside = beside and all(f.basis.shape == basis.shape for f in factors)
    if beside:
        basis = torch.stack([f.basis for f in factors])
    elif basis is not None:
        u = len(basis) if one_v else sum(len(f.basis) for f in factors)
        basis = basis.new_zeros(u, sum(ranks), sum(ranks))
    at = i = n = 0
    parts = []
    for g, (adapter, own, r, size) in enumerate(zip(adapters, factors, ranks, sizes, strict=True)):
        views = own._replace(down=down[i : i + r], up=up[n : n + size, i : i + r])
        if beside:
            views = views._replace(basis=basis[g])
        elif basis is not None:
            u = len(own.basis)
            views = views._replace(basis=basis[at : at + u, i : i + r, i : i + r])
            views.basis.copy_(own.basis)
            at = at if one_v else at + u
        for old, new in zip(own, views, strict=True):
            if old is not new:
                adapter._buffers[next(name for name, t in adapter._buffers.items() if t is old)] = new
        parts.append(views)
        i, n = i + r, n + size
    return Wide(down, up, basis, one_v, parts)
