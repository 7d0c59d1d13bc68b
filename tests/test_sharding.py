"""Models in several processes (DDP, FSDP1, FSDP2 over gloo), and what accelerate writes of weights in one storage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import qwen2, tokens
from torch import nn

import tinylora


def test_two_processes_train_alike_and_ddp_shares_v(tmp_path):
    """DDP and FSDP2 over two gloo ranks: the tied v's gradient is the mean of the ranks', and equal on both.

    What is saved of a sharded v is all of it, and loads.
    """
    done = _two_ranks(DDP, tmp_path)
    assert done.stdout.count("agrees") == 6, done.stdout
    assert done.stdout.count("comes back") == 6, done.stdout


def _two_ranks(source, tmp_path):
    """What two processes of this script print, which are given the folder."""
    root = Path(__file__).parent
    script = tmp_path / "script.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": f"{root.parent}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


DDP = """
import sys, torch, torch.distributed as dist, tinylora
from models import qwen2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
ids = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(7))

def model():
    m = tinylora.apply(qwen2(), tinylora.TinyLoraConfig(u=2, n_tie=5))
    for v in tinylora.adapter_parameters(m):
        torch.nn.init.constant_(v, 0.05)
    return m

whole = model()
whole(ids, labels=ids).loss.backward()
want = [v.grad for v in tinylora.adapter_parameters(whole)]
for kind in ("ddp", "fsdp per layer", "fsdp root"):
    m = model()
    if kind == "ddp":
        run = DistributedDataParallel(m)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in m.model.layers if kind == "fsdp per layer" else ():
            fully_shard(layer, mesh=mesh)
        run = fully_shard(m, mesh=mesh)
    run(ids[2 * rank : 2 * rank + 2], labels=ids[2 * rank : 2 * rank + 2]).loss.backward()
    grads = [v.grad for v in tinylora.adapter_parameters(m)]
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    torch.testing.assert_close(grads, want, rtol=1e-4, atol=1e-6)
    print(kind, "agrees", flush=True)
    folder = f"{sys.argv[1]}/{kind}"
    with torch.no_grad():
        for i, v in enumerate(tinylora.adapter_parameters(m)):
            v.fill_(0.1).mul_(i + 1)
    tinylora.save(m, folder)
    dist.barrier()
    with torch.no_grad():
        for v in tinylora.adapter_parameters(m):
            v.fill_(7)
    tinylora.load(m, folder)
    for model_ in (m, tinylora.load(model(), folder)):
        for i, v in enumerate(tinylora.adapter_parameters(model_)):
            v = v.full_tensor() if hasattr(v, "full_tensor") else v
            assert torch.equal(v, torch.full_like(v, 0.1) * (i + 1))
    with torch.no_grad():
        sharded, plain = run(ids).logits, tinylora.load(model(), folder)(ids).logits
    torch.testing.assert_close(sharded, plain)
    # That forward had no backward: FSDP2 leaves the root's numbers whole, and frees them when it shards them again.
    tinylora.save(m, folder + " after")
    tinylora.load(m, folder + " after")
    step = torch.optim.SGD(tinylora.adapter_parameters(m), lr=1.0)
    before = [v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for v in tinylora.adapter_parameters(m)]
    run(ids, labels=ids).loss.backward()
    step.step()
    after = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in tinylora.adapter_parameters(m)]
    assert all((a - b).abs().max() > 0 for a, b in zip(after, before, strict=True))
    if kind != "ddp":
        try:
            tinylora.save(m, folder + " peft", format="lora")
            raise AssertionError("a sharded model was written as a LoRA")
        except ValueError as error:
            assert "the model is sharded (FSDP2, ZeRO-3)" in str(error)
    print(kind, "comes back", flush=True)
dist.destroy_process_group()
"""


FSDP1 = """
import sys
import torch, torch.distributed as dist
import tinylora
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
from models import qwen2, tokens
dist.init_process_group("gloo")
model = tinylora.apply(qwen2(), tinylora.LoraConfig(r=3))
sharded = FSDP(model, device_id=torch.device("cpu"), use_orig_params=True)
sharded(input_ids=tokens(), labels=tokens()).loss.backward()
folder = f"{sys.argv[1]}/{dist.get_rank()}"
try:
    tinylora.save(model, folder)
    raise AssertionError("a shard was saved")
except ValueError as error:
    assert "summon_full_params" in str(error), error
with FSDP.summon_full_params(sharded):
    tinylora.save(model, folder)
try:
    tinylora.load(fully_shard(qwen2(), mesh=init_device_mesh("cpu", (2,))), folder)
    raise AssertionError("onto a sharded model")
except ValueError as error:
    assert "is sharded (FSDP2" in str(error), error
loaded = tinylora.load(qwen2(), folder)
with torch.no_grad():
    torch.testing.assert_close(loaded(tokens()).logits, sharded(input_ids=tokens()).logits)
"""


def test_fsdp1_is_saved_as_a_whole_or_not_at_all(tmp_path):
    _two_ranks(FSDP1, tmp_path)


def test_accelerate_writes_every_tensor_of_siblings(tmp_path):
    """Siblings' weights, and their v, lie in one storage, by which accelerate and safetensors tell tensors apart."""
    from accelerate import Accelerator
    from safetensors.torch import load_file

    model = tinylora.apply(qwen2(), tinylora.TinyLoraConfig(r=2, u=3))
    for v in tinylora.adapter_parameters(model):
        nn.init.normal_(v)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    want = model(tokens()).logits
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(model, tmp_path / "model")
    for file in ("state", "model"):
        found = load_file(tmp_path / file / "model.safetensors")
        assert (
            found.keys() == model.state_dict().keys() - {"lm_head.weight"} or found.keys() == model.state_dict().keys()
        )
    state = model.state_dict()
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    assert all(t.data_ptr() == pointers.get(n, t.data_ptr()) for n, t in state.items()), "no copies"
    assert all(model.state_dict(keep_vars=True)[n] is p for n, p in model.named_parameters())
    with pytest.MonkeyPatch.context() as patched:  # torch says of every CUDA tensor that it is shared
        patched.setattr(torch.Tensor, "is_cpu", property(lambda t: False))
        patched.setattr(torch.Tensor, "is_shared", lambda t: True)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in model.state_dict().values())
    with torch.inference_mode():
        inferred = model.state_dict()
    copied = tinylora.apply(qwen2(seed=1), tinylora.TinyLoraConfig(r=2, u=3))
    copied.load_state_dict(inferred, assign=True)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model(tokens()).logits, want)
