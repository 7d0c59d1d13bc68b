"""Times of several providers, taken in turns so that whatever else the machine does hits all of them alike."""

import contextlib
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows; there a busy machine only widens the spread
    resource = None

MIN_ROUNDS, MAX_ROUNDS = 5, 400
SHORT = 5e-3  # seconds
UNEVEN = 0.5  # shares of calls left alone that lie further apart are worth a warning


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: median, the spread around it and the shortest, over `rounds` measurements."""

    p50: float
    p20: float
    p80: float
    best: float
    rounds: int
    seconds: tuple[float, ...] = field(default=(), repr=False, compare=False)  # of every call, in their order

    @classmethod
    def of(cls, seconds: list[float], every: list[float] = ()) -> "Times":
        ms = torch.tensor(seconds, dtype=torch.float64) * 1e3
        p50, p20, p80 = (ms.quantile(q).item() for q in (0.5, 0.2, 0.8))
        return cls(p50, p20, p80, ms.min().item(), len(seconds), tuple(every))

    def over(self, other: "Times") -> float:
        """The median of this time over the other's in the same round.

        Where the whole machine is now slower and now faster, the medians of two providers may come from different
        times: a quotient of them was 0.79 in one run and 0.94 in the next, of the same code.
        """
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def alternate(
    calls: dict[str, Callable[[], object]],
    rotate: Callable[[int], None],
    buffers: int,
    budget: float,
    device: torch.device,
    graphs: bool = True,
    each: int = 1,
    prepare: Callable[[str], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Times]:
    """Times of every call in `calls`, at least MIN_ROUNDS each and about `budget` seconds together.

    calls:   what to time, by provider
    rotate:  rotate(i) puts the i-th of `buffers` sets of operands in place, outside the timed region
    each:    how many calls one of `calls` makes: times are of one
    prepare: prepare(provider) comes before every call of its, outside the timed region
    failed:  failed(provider, error) is told of one that raises, which has no times then; without it the error is raised
    graphs:  on CUDA, time CUDA graphs (the device's work alone) and not eager calls (launches and Python as well)
    """
    prepare = prepare or _nothing
    timers: dict[str, Callable[[], float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    quiet: dict[str, list[float]] = {name: [] for name in calls}

    @contextlib.contextmanager
    def alone(name: str) -> Iterator[None]:
        """One that raises in here leaves the others alone."""
        try:
            yield
        except Exception as error:
            if failed is None:
                raise
            for of in (timers, seconds, quiet):
                of.pop(name, None)
            failed(name, error)

    for name, call in calls.items():
        with alone(name):
            cuda = device.type == "cuda"
            timers[name] = _on_device(call, rotate, buffers, graphs) if cuda else _on_host(call)
    if device.type == "cuda":
        rotate, buffers = _nothing, 1
    slowest = 0.0
    for i, (name, timer) in enumerate(list(timers.items())):
        with alone(name):
            for _ in range(2):  # the second call counts: the first compiles, loads and allocates
                rotate(i % buffers)
                prepare(name)
                took = timer()
            slowest = max(slowest, took)
    # In a model the layer before ran the same code, on other weights: a short call is timed after an untimed one of
    # its own provider. Straight after another's, its code is not in the caches, and a call of 0.5 ms takes 6 % longer.
    untimed, timed = (1, 2) if slowest < SHORT else (0, 1)
    names, turn, order = list(calls), count(), random.Random(0)
    deadline = time.perf_counter() + budget
    for round_ in range(MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        # Nobody always runs after the same neighbour, whose memory and caches it takes over.
        order.shuffle(names)
        for name in [name for name in names if name in timers]:
            with alone(name):
                for repeat in range(untimed + timed):
                    rotate(next(turn) % buffers)
                    prepare(name)
                    before = _preemptions()
                    elapsed = timers[name]()
                    if repeat >= untimed:
                        seconds[name].append(elapsed)
                        if _preemptions() == before:
                            quiet[name].append(elapsed)
    found = _counted(seconds, quiet)
    return {name: Times.of([s / each for s in counted], seconds[name]) for name, counted in found.items()}


def _counted(seconds: dict[str, list[float]], quiet: dict[str, list[float]]) -> dict[str, list[float]]:
    """The calls that count: of everybody those that were left alone, or of everybody all.

    A call during which the kernel gave one of our cores to somebody else measures that somebody (two threads then wait
    for each other for whole scheduler ticks). Where one provider has hardly any other call, though, its were all slow,
    and the others' quick ones would be no comparison.
    """
    shares = {name: len(quiet[name]) / len(calls) for name, calls in seconds.items()}
    least, most = min(shares, key=shares.get, default=None), max(shares, key=shares.get, default=None)
    enough = all(len(calls) >= 2 * MIN_ROUNDS for calls in seconds.values())  # a share of fewer is chance
    if shares and enough and shares[most] - shares[least] > UNEVEN:
        said = f"{shares[most]:.0%} of {most}'s, {shares[least]:.0%} of {least}'s"
        warnings.warn(f"a busy machine, unevenly: calls that nobody interrupted: {said}", stacklevel=3)
    return quiet if all(len(left) >= MIN_ROUNDS for left in quiet.values()) else seconds


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def _nothing(which: int | str) -> None:
    pass


def _on_host(call) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        del result  # freed outside the timed region
        return elapsed

    return seconds


def _on_device(call, rotate, buffers, graphs) -> Callable[[], float]:
    """Events around one call on each of the sets of operands, divided by their number, so that no set is still in L2
    when its turn comes again; with `graphs` all of it in one CUDA graph, so that launches leave no gaps."""

    def sweep():
        for i in range(buffers):
            rotate(i)
            call()

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work = captured(sweep).replay if graphs else sweep

    def seconds() -> float:
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / buffers

    return seconds


def captured(sweep) -> torch.cuda.CUDAGraph:
    """A CUDA graph of this call, after three calls of it."""
    side, own = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(own)
    with torch.cuda.stream(side):  # lazy handles and compilation must happen before the capture
        for _ in range(3):
            sweep()
    own.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            sweep()
    finally:
        torch.cuda.set_stream(own)  # a capture that fails leaves its own stream behind, and everybody else on it
    return graph


def idle_cores(seconds: float = 0.5) -> float:
    """Cores that nobody has used for this long, from /proc/stat; all of them where there is none."""
    stat, ticks = Path("/proc/stat"), os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    if not stat.exists():
        return os.cpu_count()

    def idle() -> int:
        fields = stat.read_text().split("\n", 1)[0].split()
        return int(fields[4]) + int(fields[5])  # idle and waiting for I/O

    before, start = idle(), time.perf_counter()
    time.sleep(seconds)
    return (idle() - before) / ticks / (time.perf_counter() - start)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call that is too long, or too much a start-up, to repeat."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache before memory: L2 of a GPU, L3 of a CPU (32 MiB where Linux does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(s.read_text().strip().removesuffix("K")) << 10 for s in sizes), default=32 << 20)


def buffers_past_cache(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of operands to rotate so that none is still cached when its turn comes again, as in a model,
    where the other layers' weights come between; at most 64."""
    return min(64, max(2, -(-2 * last_level_cache(device) // bytes_per_call)))


def peak_mb(call: Callable[[], object], device: torch.device) -> float | None:
    """What a call allocates at most beyond what is there, in 2^20 bytes; None but on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
