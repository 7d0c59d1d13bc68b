"""PEFT, live: patched layers against PEFT's own in numbers and gradients, every way out, and what users do."""

import copy
import re
import statistics
import sys

import peft
import pytest
import torch
from models import qwen2, tokens
from peft_models import CONFIGS, adapted, dtypes, kinds, layer_of, only_fast, shake

import tinylora
from tinylora.cli import main
from tinylora.integrations.peft import counts, reset_counts

pytestmark = pytest.mark.usefixtures("unpatched_afterwards")


@kinds
@dtypes
def test_numbers_and_gradients(kind, dtype):
    """Output and gradients as close to the exact ones, in fp64, as twice PEFT's own error, in the middle of five texts:
    which of two equally good sums is nearer is luck, and another processor's other luck."""
    model = adapted(kind, dtype)
    exact = copy.deepcopy(model).double()
    trained = {m: [p for p in m.parameters() if p.requires_grad] for m in (model, exact)}

    def run(model, ids):
        logits = model(input_ids=ids).logits
        return [logits.detach(), *torch.autograd.grad(logits.double().square().mean(), trained[model])]

    texts = tokens(batch=10).split(2)
    want, theirs = [run(exact, ids) for ids in texts], [run(model, ids) for ids in texts]
    tinylora.patch_peft()
    ours = [run(model, ids) for ids in texts]
    only_fast(kind, 14 * len(texts))
    with torch.no_grad():
        inferred = [[model(input_ids=ids).logits] for ids in texts]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape

    def error(found, these=slice(None)):  # the largest of all tensors', each relative to its largest number
        def of_text(found, want):
            pairs = zip(found[these], want[these], strict=False)
            return max(((t.double() - w).abs().max() / w.abs().max()).item() for t, w in pairs)

        return statistics.median(map(of_text, found, want))

    floor, output = torch.finfo(dtype).eps, slice(1)
    assert error(inferred, output) <= 2 * error(theirs, output) + floor
    assert error(ours, output) <= 2 * error(theirs, output) + floor
    assert error(ours) <= 2 * error(theirs) + floor


@kinds
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_base_that_trains_gets_its_gradients(kind, autocast):
    """bias="all" of LoRA and VeRA, or a base layer that somebody unfroze: weight and bias have PEFT's gradients."""
    layer = layer_of(adapted(kind, layers=1))
    base = layer.base_layer
    for trained in ([base.bias], [base.weight], [base.weight, base.bias]):
        base.requires_grad_(False)
        for p in trained:
            p.requires_grad_()
        x = torch.randn(3, 5, 64)

        def run(trained=trained, x=x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return torch.autograd.grad(layer(x).float().square().sum(), trained)

        tinylora.unpatch_peft()
        theirs = run()
        tinylora.patch_peft()
        for a, b in zip(run(), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=b.abs().max().item() * (1e-2 if autocast else 1e-5))
    only_fast(kind, 3)


@kinds
@dtypes
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 600, 64), (0, 64)], ids=str)
def test_shapes_and_the_input_gradient(kind, dtype, shape):
    layer = layer_of(adapted(kind, dtype, layers=1))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)

    def run():
        y = layer(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), [x])
        with torch.no_grad():
            return y, dx, layer(x)

    theirs = run()
    tinylora.patch_peft()
    ours = run()
    only_fast(kind, 2)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=32 * torch.finfo(dtype).eps * scale)  # two sums of 64 numbers


@kinds
def test_the_output_may_be_changed_in_place(kind):
    tinylora.patch_peft()
    layer = layer_of(adapted(kind))
    x = torch.randn(2, 3, 64, requires_grad=True)
    (want,) = torch.autograd.grad((layer(x) + 1).relu().sum(), x)
    (got,) = torch.autograd.grad(layer(x).add_(1).relu_().sum(), x)
    only_fast(kind)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["TinyLoRA", "LoRA", "AdaLoRA"])
def test_adapters_in_the_models_own_dtype(kind):
    model = peft.get_peft_model(qwen2(dtype=torch.bfloat16), CONFIGS[kind](), autocast_adapter_dtype=False)
    shake(model)
    exact = copy.deepcopy(model).double()(input_ids=tokens()).logits
    theirs = model(input_ids=tokens()).logits
    tinylora.patch_peft()
    ours = model(input_ids=tokens()).logits
    only_fast(kind)
    assert ours.dtype == torch.bfloat16
    assert torch.dist(ours.double(), exact) <= 2 * torch.dist(theirs.double(), exact)


@kinds
def test_training_is_pefts(kind):
    curves = []
    for patched in (False, True):
        tinylora.patch_peft() if patched else tinylora.unpatch_peft()
        model = adapted(kind)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        curve = []
        for step in range(12):
            ids = tokens() if step % 2 else tokens().flip(0)
            loss = model.train()(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if kind == "AdaLoRA":
                model.base_model.update_and_allocate(step)
            curve.append(loss.item())
        curves.append(curve)
    only_fast(kind, 12 * 14)
    assert curves[0][-1] < curves[0][0]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-3 * curves[0][0], curves


# --- patching and undoing -------------------------------------------------------------------------------------------


def test_patch_and_unpatch():
    from peft.tuners.adalora.layer import SVDLinear
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tinylora.layer import Linear as TinyLinear
    from peft.tuners.vera.layer import Linear as VeraLinear

    classes = (SVDLinear, LoraLinear, TinyLinear, VeraLinear)
    before = [c.__dict__["forward"] for c in classes]
    tinylora.unpatch_peft()  # without a patch: nothing
    tinylora.patch_peft()
    patched = [c.__dict__["forward"] for c in classes]
    tinylora.patch_peft()  # twice: the same
    assert [c.__dict__["forward"] for c in classes] == patched
    assert not set(patched) & set(before) and all(p.__wrapped__ is b for p, b in zip(patched, before, strict=True))
    tinylora.unpatch_peft()
    assert all(c.__dict__["forward"] is b for c, b in zip(classes, before, strict=True))
    model = adapted("LoRA")
    model(input_ids=tokens())
    assert counts()["LoRA"] == {"fast": 0}


def test_somebody_elses_patch_is_not_lost(monkeypatch):
    from peft.tuners.lora.layer import Linear

    tinylora.patch_peft()
    ours = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: x)
    with pytest.raises(RuntimeError, match="forward was replaced after patch_peft"):
        tinylora.unpatch_peft()
    monkeypatch.undo()
    assert Linear.forward is ours


@kinds
def test_what_users_do(kind, tmp_path):
    """Adapters added, switched, disabled, merged, deleted, saved and loaded: patched as unpatched."""

    def session(folder):
        ids, seen = tokens(), []
        model = adapted(kind)

        def look():
            with torch.no_grad():
                seen.append(model(input_ids=ids).logits)

        look()
        model.add_adapter("second", CONFIGS[kind](**({"inference_mode": True} if kind == "AdaLoRA" else {})))
        model.set_adapter("second")
        shake(model, seed=5)
        look()
        with model.disable_adapter():
            look()
        model.set_adapter("default")
        look()
        model.merge_adapter()
        look()
        model.unmerge_adapter()
        look()
        model.save_pretrained(folder)
        model.delete_adapter("second")
        look()
        model = peft.PeftModel.from_pretrained(qwen2(), folder)
        look()
        model = copy.deepcopy(model)
        look()
        model = model.merge_and_unload()
        look()
        return seen

    theirs = session(tmp_path / "theirs")
    tinylora.patch_peft()
    ours = session(tmp_path / "ours")
    found = counts()[kind]
    assert found["fast"] >= 14 * 5 and set(found) == {"fast", "adapters disabled", "merged"}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@kinds
def test_generates_the_same_tokens(kind):
    model, ids = adapted(kind), tokens()
    settings = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(**settings)
    tinylora.patch_peft()
    assert torch.equal(model.generate(**settings), theirs)
    only_fast(kind)


@kinds
@pytest.mark.parametrize("train", [False, True])
def test_compiles_in_one_graph(kind, train):
    torch._dynamo.reset()
    model, ids = adapted(kind, layers=1).train(train), tokens()
    tinylora.patch_peft()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.set_grad_enabled(train):
        eager = model(input_ids=ids).logits
        reset_counts()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(input_ids=ids).logits
        torch.testing.assert_close(logits, eager)
        if train:
            for a, b in zip(*(torch.autograd.grad(y.square().sum(), trained) for y in (logits, eager)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counts()[kind] == {"fast": 0}  # a compiled graph counts nothing


def test_compiled_graphs_hold_the_operator_and_see_new_numbers():
    torch._dynamo.reset()
    tinylora.patch_peft()
    model, ids, graphs = adapted("TinyLoRA", layers=1), tokens(), []
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
        first = compiled(input_ids=ids).logits
        shake(model)
        second = compiled(input_ids=ids).logits
        assert len(graphs) == 1 and "tinylora.adapted_linear" in str(graphs[0].graph)
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, model(input_ids=ids).logits)


def test_nothing_is_cached_between_calls():
    """A fused optimiser and `.data =` change numbers without telling anybody."""
    tinylora.patch_peft()
    for kind in CONFIGS:
        model, ids = adapted(kind, layers=1), tokens()
        layer = layer_of(model)
        for change in (lambda p: p.data.mul_(2), lambda p: setattr(p, "data", p.data + 0.1)):
            for p in model.parameters():
                if p.requires_grad:
                    change(p)
            with torch.no_grad():
                ours = model(input_ids=ids).logits
                tinylora.unpatch_peft()
                theirs = model(input_ids=ids).logits
                tinylora.patch_peft()
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        if kind == "LoRA":
            x = torch.randn(3, 64)
            layer.set_scale("default", 3.0)
            tripled = layer(x)
            tinylora.unpatch_peft()
            torch.testing.assert_close(tripled, layer(x))
            tinylora.patch_peft()


def test_inference_mode_before_training():
    tinylora.patch_peft()
    model, ids = adapted("LoRA"), tokens()
    with torch.inference_mode():
        model(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    only_fast("LoRA", 28)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    grads = []
    for patched in (False, True):
        tinylora.patch_peft() if patched else tinylora.unpatch_peft()
        model = adapted("LoRA").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_bitsandbytes_there_are_no_four_bits(monkeypatch):
    from tinylora.integrations.peft import covered

    model = adapted("LoRA", layers=1)  # PEFT remembers that it is there
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes" or n.endswith(".bnb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    tinylora.patch_peft()
    model(input_ids=tokens())
    only_fast("LoRA", 7)
    assert "peft.tuners.lora.Linear" in covered() and not any("4bit" in name for name in covered())


def test_a_scale_made_within_a_capture_is_kept_by_nobody(monkeypatch):
    """Its memory is that graph's, and its numbers are there from the first replay on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tinylora.integrations.peft import _every

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        first, second = (_every(2, 3.0, torch.device("cuda", 0), torch.float32) for _ in range(2))
    assert first is not second


def test_info_shows_what_ran_in_this_process_and_why(capsys):
    model = adapted("VeRA")
    tinylora.patch_peft()
    reset_counts()
    assert main(["info"]) == 0
    assert "counted in the process that patches" in capsys.readouterr().out
    model(input_ids=tokens())
    with model.disable_adapter():
        model(input_ids=tokens())
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"calls of VeRA\s+14 fast, 14 adapters disabled", shown)
