"""Fixtures, and what the whole run needs to be set first.

The kernels run in two lanes without a GPU, both in one process with TRITON_INTERPRET unset: test_kernels.py has
every launch interpreted, test_compile.py has every launch compiled, and tests/lanes.py says how. With
TRITON_INTERPRET=1 set, the same interpreter tests run and the compiler lane is skipped.
"""

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need no network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small problems: a second thread only waits, and on a busy machine ten times as long; the small matmuls of Triton's
# interpreter are 15 times slower with one. Subprocesses inherit it.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does; 3.10 turns it off

import pytest
import torch

# Without Triton (macOS, Windows) there are no kernels; the other files ask for it where they need it.
collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore = ["test_compile.py", "test_counts.py", "test_kernels.py", "test_launch.py"]


def pytest_report_header():
    return f"no Triton: {', '.join(collect_ignore)} are left out" if collect_ignore else None


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test has an SVD cache of its own, so that none passes on another's factors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny language model, the same as a chat model, and problems: model, chat, data."""
    import tiny_gsm8k

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_gsm8k.write_problems(folder / "data")
    tiny_gsm8k.write_chat_model(tiny_gsm8k.write_model(folder / "model"), folder / "chat")
    return folder


@pytest.fixture
def poison_empty(monkeypatch):
    """Every buffer that is allocated without a value starts as NaN: a tile that nobody writes fails the test."""

    def poisoned(make):
        def call(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def one_thread():
    """Two threads that wait for each other on a busy machine take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unpatched_afterwards():
    from tinylora import unpatch_peft
    from tinylora.integrations.peft import reset_counts

    reset_counts()
    yield
    unpatch_peft()


@pytest.fixture
def side_by_side(monkeypatch):
    """Siblings' P lie as they do on a card, and not as on a CPU."""
    monkeypatch.setattr("tinylora.nn.siblings.SIDE_BY_SIDE", ("cuda", "cpu"))


@pytest.fixture
def calls(monkeypatch):
    """How often a group computed, and how often a layer did so alone."""
    from tinylora.ops import linear
    from tinylora.ops.siblings import adapted_linears

    counted = {"group": 0, "alone": 0}

    def counting(what, function):
        def call(*args, **kwargs):
            counted[what] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("tinylora.nn.siblings.adapted_linears", counting("group", adapted_linears))
    monkeypatch.setattr("tinylora.nn.linear.unchecked", counting("alone", linear.unchecked))
    return counted
