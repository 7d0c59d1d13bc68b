"""Models in several processes (DDP, FSDP1, FSDP2, tensor parallelism, over gloo), and what accelerate writes of weights
in one storage.
"""

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


PARALLEL = """
import sys
import torch, torch.distributed as dist
import tinylora, tinylora.analysis
from transformers import AutoModelForCausalLM
from tinylora.integrations.trl import adapter_trainer
from tinylora.nn.model import trained_numbers
from trl import SFTConfig, SFTTrainer
from models import qwen2, tokens

folder = sys.argv[1]
dist.init_process_group("gloo")
x = tokens()


def pair():
    \"\"\"The model in two processes, and in one; its MLP is as wide as two cannot share evenly.\"\"\"
    yield AutoModelForCausalLM.from_pretrained(f"{folder}/base", tp_plan="auto")
    yield AutoModelForCausalLM.from_pretrained(f"{folder}/base")


def numbers(model):
    return list(trained_numbers(model).values())


def refused(call, what):
    try:
        call()
    except ValueError as error:
        assert what in str(error), error
    else:
        raise AssertionError(f"not refused: {what}")


if dist.get_rank() == 0:
    qwen2(intermediate_size=161).save_pretrained(f"{folder}/base")
dist.barrier()
for config in (tinylora.TinyLoraConfig(u=3, n_tie=4), tinylora.LoraXSConfig(r=3)):
    models = parallel, whole = [tinylora.apply(model, config) for model in pair()]
    for model in models:
        g = torch.Generator().manual_seed(3)
        for p in numbers(model):
            torch.nn.init.normal_(p, std=0.5, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(parallel(x).logits, whole(x).logits)
        with tinylora.disabled(whole):
            assert (parallel(x).logits - whole(x).logits).abs().max() > 0.01
        with tinylora.disabled(parallel), tinylora.disabled(whole):
            torch.testing.assert_close(parallel(x).logits, whole(x).logits)
    for checkpointed in (False, True):
        for model in models:
            model.zero_grad()
            if checkpointed:
                model.train().gradient_checkpointing_enable()
            model(x, labels=x, use_cache=False).loss.backward()
        for p, q in zip(*map(numbers, models), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    for model in models:
        model.eval()
    said = [m.generate(x, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in models]
    assert torch.equal(*said)
    a, b = map(tinylora.analysis.effective_weights, models)
    assert all(torch.equal(a[n], b[n]) for n in a), "analysis"

    # Files, ours with and without factors, go from one kind of model to the other.
    for factors in (False, True):
        path = f"{folder}/{config.kind} {factors} {dist.get_rank()}"
        tinylora.save(parallel, path, factors=factors)
        for model in pair():
            tinylora.load(model, path)
            torch.testing.assert_close(model(x).logits, whole(x).logits)
        tinylora.load(parallel, path)

    sets = [{n: torch.randn(p.shape, generator=g) for n, p in trained_numbers(whole).items()} for _ in range(3)]
    with torch.no_grad():
        ys = []
        for model in models:
            with tinylora.adapter_ids(tinylora.stack(model, sets), [2, 0]):
                ys.append(model(x).logits)
    torch.testing.assert_close(*ys)

    refused(lambda: tinylora.merge(parallel), "expected a whole one to merge into")
    refused(lambda: tinylora.save(parallel, path + " lora", format="lora"), "under tensor parallelism")
    args = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[])
    refused(lambda: adapter_trainer(SFTTrainer)(model=parallel, args=args), "(tensor parallelism)")
    parallel.model.layers[0].mlp.up_proj.batch_invariant = True
    refused(lambda: parallel(x), "batch_invariant is set")
for config, what in (
    (tinylora.LoraConfig(), "expected TinyLoraConfig or LoraXSConfig"),
    (tinylora.TinyLoraConfig(dropout=0.1), "no dropout"),
    (tinylora.TinyLoraConfig(modules_to_save=["norm"]), "no modules_to_save"),
):
    refused(lambda: tinylora.apply(next(pair()), config), what)

# What older transformers did: slices that say nothing of the rest.
model = qwen2()
own = model.model.layers[0].self_attn.q_proj
own.weight = torch.nn.Parameter(own.weight[:32])
refused(lambda: tinylora.apply(model, tinylora.TinyLoraConfig()), "a part of it, as FSDP1")
"""


def test_tensor_parallelism_of_transformers(tmp_path):
    """Two processes with a slice each have one's outputs, gradients and files, where the core alone trains."""
    _two_ranks(PARALLEL, tmp_path)


PARALLELIZED = """
import copy
import torch, torch.distributed as dist
import tinylora
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32, bias=i)) for i in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


frozen = tinylora.TinyLoraConfig.frozen


def turned(*args):  # the second process finds a singular vector with the other sign
    found = frozen(*args)
    if dist.get_rank() == 1:
        found["down"][0] *= -1
        found["up"][:, 0] *= -1
    return found


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for sequences in (False, True):  # whether each process has its part of every sequence between the layers
    torch.manual_seed(0)
    whole = Model()
    parallel = copy.deepcopy(whole)
    outside = {"input_layouts": Shard(1)} if sequences else {}, {"output_layouts": Shard(1)} if sequences else {}
    for block in parallel.blocks:
        parallelize_module(block, mesh, {"0": ColwiseParallel(**outside[0]), "2": RowwiseParallel(**outside[1])})
    for model in (parallel, whole):
        tinylora.TinyLoraConfig.frozen = turned if model is parallel else frozen
        tinylora.apply(model, tinylora.TinyLoraConfig(u=3, n_tie=3))
        g = torch.Generator().manual_seed(1)
        for v in tinylora.adapter_parameters(model):
            nn.init.normal_(v, std=0.5, generator=g)

    def own(t):
        return t.chunk(2, 1)[dist.get_rank()].clone() if sequences else t.clone()

    x, dy = torch.randn(2, 2, 8, 32, generator=g)
    x_own, x = own(x).requires_grad_(), x.requires_grad_()
    y = whole(x)
    y.backward(dy)
    for again in (False, True):
        if again:
            parallel = copy.deepcopy(parallel)  # a copy sums by itself
            for v in tinylora.adapter_parameters(parallel):
                v.grad = None
        x_own.grad = None
        y_own = parallel(x_own)
        torch.testing.assert_close(y_own, own(y))
        y_own.backward(own(dy))
        torch.testing.assert_close(x_own.grad, own(x.grad))
        for v, w in zip(*map(tinylora.adapter_parameters, (parallel, whole)), strict=True):
            torch.testing.assert_close(v.grad, w.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(parallel(x_own), own(y))


def trained(model):
    tinylora.apply(model, tinylora.TinyLoraConfig(u=3, n_tie=3))
    for p in tinylora.adapter_parameters(model):
        nn.init.constant_(p, 0.3)
    return model


def alike(models, call, asked=tinylora.adapter_parameters):
    grads = []
    for model in models:
        for p in asked(model):
            p.grad = None
        call(model).backward()
        grads.append([p.grad for p in asked(model)])
        assert grads[-1] and all(g is not None for g in grads[-1])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# A layer that every process has whole beside one that is cut, one v in both; v beside the model in a loss, computed
# from another, or in a compiled graph, in which it stays right from call to call; gradients of a stack.
torch.manual_seed(0)
pair = Model(), Model()
pair[1].load_state_dict(pair[0].state_dict())
parallelize_module(pair[0].blocks[0], mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
models = [trained(model) for model in pair]
x = x.detach()
alike(models, lambda m: m(x).square().mean())
alike(models, lambda m: m(x).square().mean() + sum(v.square().sum() for v in tinylora.adapter_parameters(m)))
compiled = [torch.compile(model, backend="aot_eager") for model in models]
for _ in range(3):
    alike(models, lambda m: compiled[models.index(m)](x).square().mean())
    alike(models, lambda m: m(x).square().mean())
sets = [{n: torch.randn(3, generator=g) for n in ("v_0", "v_1")} for _ in range(2)]


def stacks(model):
    return [b.requires_grad_() for n, b in sorted(model.named_buffers()) if "stacked_" in n]


def with_ids(model):
    with tinylora.adapter_ids(model, [1, 0]):
        return model(x).square().mean()


for model in models:
    tinylora.stack(model, sets)
alike(models, with_ids, stacks)


class Half(nn.Module):
    def forward(self, v):
        return v / 2


for model in models:
    nn.utils.parametrize.register_parametrization(model.tinylora["default"], "v_0", Half())
alike(models, lambda m: m(x).square().mean(), lambda m: [p for p in m.parameters() if p.requires_grad])

# A weight that is spread and whose layer does not know of it. What cannot be adapted leaves the model as it was.
model = Model()
model.blocks[0][0].weight = nn.Parameter(distribute_tensor(model.blocks[0][0].weight, mesh, [Shard(0)]))
later, last = Model(), Model()
for block in (later.blocks[0], *last.blocks):
    parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
later.blocks[1][2].forward = last.blocks[1][2].forward = lambda x: x
invariant = Model()
parallelize_module(invariant.blocks[0], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
for model, what in (
    (model, "is spread"),
    (later, "blocks.1.2 has its forward replaced"),
    (last, "blocks.1.2 has its forward replaced"),
    (invariant, "batch_invariant is True"),
):
    try:
        tinylora.apply(model, tinylora.TinyLoraConfig(), batch_invariant=model is invariant)
        raise AssertionError(f"not refused: {what}")
    except ValueError as error:
        assert what in str(error), error
    assert not tinylora.adapter_names(model) and all(p.requires_grad for p in model.parameters())
"""


def test_tensor_parallelism_of_torch(tmp_path):
    """parallelize_module's layers, whose inputs and outputs are DTensors with and without gradients."""
    _two_ranks(PARALLELIZED, tmp_path)


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
