"""Two ways to run the kernels without a GPU, side by side in one process.

Whether Triton interprets or compiles is decided when a function is decorated, that is, at import. These two
decide at the launch instead: the kernels are imported as on a GPU machine (TRITON_INTERPRET unset), and
`JITFunction.run` is replaced for as long as a lane is open.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import interpreter_bf16
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import tinylora.kernels.decode
import tinylora.kernels.gemm
import tinylora.kernels.gradients
import tinylora.kernels.thin
from tinylora.ops import fused, ways

INTERPRETED_AT_IMPORT = isinstance(tinylora.kernels.thin.thin_kernel, InterpretedFunction)


@contextmanager
def _language_restored():
    """What Triton's interpreter patches in triton.language is put back afterwards: for functions that a kernel calls it
    does not do so itself, and what is compiled later in the same process would meet the interpreter's arithmetic."""
    owners = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    owners += [tl.core.tensor, tl.core.tensor_descriptor, tl.core.tensor_descriptor_base]
    before = [(owner, dict(vars(owner))) for owner in owners]
    try:
        yield
    finally:
        for owner, values in before:
            for name, value in values.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


@contextmanager
def interpreter():
    """Every launch runs in Triton's interpreter on CPU tensors, and bf16 there means bf16."""

    def run(self, *args, grid, warmup, **kwargs):
        return InterpretedFunction(self.fn)[grid](*args, **kwargs)

    def call(self, *args, **kwargs):  # one @triton.jit function calls another
        return InterpretedFunction(self.fn)(*args, **kwargs)

    with (
        nullcontext() if INTERPRETED_AT_IMPORT else _language_restored(),
        interpreter_bf16.installed(),
        patch.dict("os.environ", TRITON_INTERPRET="1"),
        patch.object(fused, "interpreter_has_bf16", lambda: True),
        nullcontext() if INTERPRETED_AT_IMPORT else patch.multiple(JITFunction, run=run, __call__=call),
    ):
        yield


class _Driver:
    """As much of a driver as the launcher asks before it compiles. One device index per architecture."""

    def __init__(self, capability: tuple[int, int]):
        self.arch = capability[0] * 10 + capability[1]

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@dataclass
class Launch:
    """One launch that did not happen: the kernel's name, its grid and the arguments."""

    name: str
    grid: tuple[int, ...]
    args: tuple
    options: dict
    compiled: object = field(default=None, repr=False)

    def _dump(self, what: str) -> str:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

    @cached_property
    def _resources(self) -> str:
        return self._dump("--dump-resource-usage")

    @property
    def registers(self) -> int:
        return int(re.search(r"REG:(\d+)", self._resources)[1])

    @property
    def stack(self) -> int:
        """Bytes of stack: 0 means that nothing spills."""
        return int(re.search(r"STACK:(\d+)", self._resources)[1])

    @property
    def shared(self) -> int:
        return self.compiled.metadata.shared

    @property
    def ptx(self) -> str:
        return self.compiled.asm["ptx"]

    @property
    def waits(self) -> set[int]:
        """How many groups of warpgroup MMAs stay in flight, at each wait."""
        return {int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", self.ptx)}

    @cached_property
    def main_loop(self) -> list[str]:
        """Opcodes of the shortest loop that multiplies on tensor cores, of those that load by bulk copies if one does;
        empty if there is none. Takes a second."""
        line = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);")
        code = [(int(m[1], 16), m[2], m[3]) for m in map(line.match, self._dump("-sass").splitlines()) if m]
        loops = []
        for at, opcode, rest in code:
            target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
            if target and int(target[1], 16) < at:
                body = [op for a, op, _ in code if int(target[1], 16) <= a <= at]
                if any(re.match(r"(HG|H|UTCH)MMA", op) for op in body):
                    loops.append(body)
        fed = [body for body in loops if any(op.startswith("UTMALDG") for op in body)]
        return min(fed or loops, key=len, default=[])


Launches = list  # a test may want to see each as it comes


@contextmanager
def compiler(capability: tuple[int, int], only_count: bool = False):
    """Every launch is compiled for `capability` as the launcher would, or only written down, and not run.

    Yields the list of launches. Operands are on the "meta" device: they have shapes, strides and dtypes.
    """
    launches: list[Launch] = Launches()
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        entry = Launch(self.fn.__name__, tuple(grid), args, kwargs)
        if not only_count:
            entry.compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(entry)

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        with patch.object(JITFunction, "run", run), patch.object(ways, "capability_of", lambda device: capability):
            yield launches
    finally:
        triton.runtime.driver._active = before
