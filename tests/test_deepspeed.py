"""DeepSpeed's ZeRO, two gloo processes on a CPU: `make deepspeed-test` installs it, other test runs skip this."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_zero_1_and_3(tmp_path):
    pytest.importorskip("deepspeed")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    # deepspeed compiles a part of its own, which needs ninja: of the same environment as python
    found = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [*start, str(ROOT / "tests" / "zero_ranks.py"), str(tmp_path)], capture_output=True, text=True, timeout=500,
        env=os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": found},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("all of it") == 2, done.stdout[-2000:] + done.stderr[-5000:]
