"""A kernel with everything but its pointers: what is the same in every call on operands of one kind is found once.

Triton's launcher binds each argument by name, asks it for what the compiler specialises on, writes all of that into a
string and looks the string up: 20 microseconds and more per launch, several times a whole F.linear. Of what it asks,
only the pointers change between two calls on operands of the same shapes, strides and dtypes, and of a pointer the
compiler sees nothing but its type and whether 16 divides it. So a `Launch` stands for one such kind of operands: its
first call goes through Triton's launcher, which compiles and returns the compiled kernel, and later ones hand that
kernel what the launcher would have handed it.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

# In these versions JITFunction.run ends with the call that `Launch.__call__` makes, and takes a number for a pointer.
# In any other every launch goes through Triton's launcher.
KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))


class Plan(NamedTuple):
    """What a kernel does for operands of one kind.

    run:  a function of the operands
    bind: a function of those that stay, which gives a function of the others, or None where that cannot be
    """

    run: Callable
    bind: Callable


class Places:
    """The addresses of what `scratch.workspace` hands out, asked for once per stream."""

    __slots__ = ("kept",)

    def __init__(self):
        self.kept: tuple = None, ()

    def of(self, found: tuple[Tensor, ...]) -> tuple[int, ...]:
        kept = self.kept  # in one piece: another thread may put its own there
        if kept[0] is not found:
            self.kept = kept = found, tuple([t.data_ptr() for t in found])
        return kept[1]


def watched(kernel) -> bool:
    """Whether somebody looks at launches or changes what is compiled: profilers' hooks, debugging, instrumentation.

    Such a launch is left to Triton's launcher, which knows what that means.
    """
    runtime = knobs.runtime
    try:
        return bool(
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.debug
            or runtime.add_stages_inspection_hook
            or knobs.compilation.instrumentation_mode
            or kernel.pre_run_hooks
            or kernel.debug
        )
    except AttributeError:  # a hook of another kind than Triton's own chain
        return True


class Launch:
    """`kernel` on one grid of one device, for tensors of one kind each: called with those, in the kernel's order.

    numbers:   its arguments after the pointers
    constants: its compile-time constants and the launch's options, by name
    boxes:     (place, shape, strides, block) of each pointer that the kernel takes as a descriptor for bulk copies

    The tensors' dtypes and device, and which of them are None, must be the same in every call: whoever keeps a Launch
    keeps it by them. Whether 16 divides their addresses, it looks at itself.
    """

    __slots__ = ("boxes", "compiled", "constants", "device", "driver", "grid", "kernel", "numbers", "tail")

    def __init__(
        self, kernel, grid: tuple[int, ...], numbers: tuple[int, ...], constants: dict, boxes: Sequence[tuple] = ()
    ):
        self.kernel, self.grid, self.numbers, self.constants, self.boxes = kernel, grid, numbers, constants, boxes
        self.driver = None
        self.compiled: dict[bool | tuple[bool, ...], tuple] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        driver = triton.runtime.driver.active if self.driver is not None else None
        if driver is None or driver is not self.driver or watched(self.kernel):
            return self._through_triton(tensors)
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        known = self.compiled.get(aligned(pointers))
        if known is None:
            return self._through_triton(tensors)
        run, function, metadata, templates = known
        for place, template in templates:
            pointers[place] = descriptor(template, tensors[place])
        stream = driver.get_current_stream(self.device)
        run(*self.grid, stream, function, metadata, None, None, None, *pointers, *self.tail)

    def bound(self, tensors: Sequence[Tensor | None], free: Sequence[int]) -> Callable[..., bool] | None:
        """This launch on these tensors, but for those at the places `free`: a function of what lies there, tensors
        where the kernel takes a descriptor, else addresses that 16 divides. It launches, or returns False where
        `__call__` would have gone through Triton's launcher.

        None where that is what it would do now: the first call compiles. No tensor but a descriptor's is held: whoever
        calls it has seen that they are still there.
        """
        known = self.compiled.get(True)
        fixed = [0 if t is None else t.data_ptr() for t in tensors]
        if known is None or aligned(fixed) is not True:
            return None
        run, function, metadata, templates = known
        boxed = []
        for place, template in templates:
            if place in free:
                boxed.append((place, template))
            else:
                fixed[place] = descriptor(template, tensors[place])
        mine, device, (x, y, z), tail = self.driver, self.device, self.grid, self.tail

        def launch(*given: int | Tensor) -> bool:
            driver = triton.runtime.driver.active
            if driver is not mine or watched(self.kernel):
                return False
            pointers = fixed.copy()
            for place, one in zip(free, given, strict=True):
                pointers[place] = one
            for place, template in boxed:
                pointers[place] = descriptor(template, pointers[place])
            stream = driver.get_current_stream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *pointers, *tail)
            return True

        return launch

    def _through_triton(self, tensors: tuple[Tensor | None, ...]) -> None:
        """The launch as Triton makes it; what it compiled, or found, is kept for tensors that are aligned alike."""
        arguments, templates = [*tensors], []
        for place, shape, strides, block in self.boxes:
            arguments[place] = TensorDescriptor(tensors[place], shape, strides, block)
            templates.append((place, {k: v for k, v in vars(arguments[place]).items() if k != "base"}))
        compiled = self.kernel[self.grid](*arguments, *self.numbers, **self.constants)
        # The interpreter returns nothing, and so do tests that replace the launcher.
        if not (KNOWN and isinstance(compiled, CompiledKernel)) or watched(self.kernel):
            return
        driver = triton.runtime.driver.active
        if driver is not self.driver:
            self.compiled = {}
            self.driver, self.device = driver, driver.get_current_device()
            self.grid = (*self.grid, 1, 1)[:3]
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            self.tail = (*self.numbers, *(self.constants[name] for name in names))
        key = aligned([0 if t is None else t.data_ptr() for t in tensors])
        self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, templates


def aligned(pointers: list[int]) -> bool | tuple[bool, ...]:
    """What the compiler knows of these pointers: True if 16 divides all of them, else which it divides."""
    return reduce(or_, pointers) % 16 == 0 or tuple([p % 16 == 0 for p in pointers])


def descriptor(template: dict, base: Tensor) -> TensorDescriptor:
    """TensorDescriptor(base, ..) with the fields of one that was checked: the checks alone take a microsecond."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(template)
    made.base = base
    return made
