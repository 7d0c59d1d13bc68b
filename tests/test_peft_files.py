"""PEFT, on disk: adapters go both ways through files, with the installed PEFT on the other side."""

import copy
import json
import os

import peft
import pytest
import torch
import transformers
from models import qwen2, tokens
from peft_models import CONFIGS, TARGETS, adapted, kinds, shake
from safetensors.torch import load_file, save_file
from test_family import ADAPTERS, trained

import tinylora
from tinylora import AdaLoraConfig, LoraConfig, LoraXSConfig, TinyLoraConfig, VeraConfig
from tinylora.integrations import peft_files


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def base_logits(model=None):
    return (qwen2() if model is None else model)(tokens()).logits


def test_factors_are_not_in_pefts_files(tmp_path):
    with pytest.raises(ValueError, match="factors is True, expected False with format='peft'"):
        tinylora.save(tinylora.apply(qwen2(layers=1), LoraConfig(r=2)), tmp_path, factors=True, format="peft")


@kinds
@pytest.mark.parametrize("tying", [0.0, 0.55, 1.0])
def test_pefts_adapter_in_our_model(kind, tying, tmp_path):
    """Read, run, saved as ours and read again, written as PEFT's and read by PEFT: the same logits all along."""
    if kind != "TinyLoRA" and tying:
        return
    changes = {"weight_tying": tying} if kind == "TinyLoRA" else {}
    theirs = adapted(kind, **changes)
    want = theirs(input_ids=tokens()).logits
    assert torch.dist(want, base_logits()) > 1e-2 * want.norm()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tinylora.load(qwen2(), tmp_path / "theirs")
    close(base_logits(ours), want)
    assert ours.tinylora["default"].config.target_modules == tuple(sorted(TARGETS))
    count = sum(p.numel() for p in tinylora.adapter_parameters(ours))
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in tinylora.adapter_parameters(ours):
            p.mul_(1.5)
    changed = base_logits(ours)
    tinylora.save(ours, tmp_path / "ours")  # PEFT's factors are in the file: no seed gives them
    again = tinylora.load(qwen2(), tmp_path / "ours", "again")
    assert torch.equal(base_logits(again), changed)
    tinylora.save(again, tmp_path / "ours, again", "again")
    assert torch.equal(base_logits(tinylora.load(qwen2(), tmp_path / "ours, again")), changed)
    for format in ("peft", "lora"):
        tinylora.save(ours, tmp_path / format, format=format)
        back = peft.PeftModel.from_pretrained(qwen2(), tmp_path / format)
        close(back(input_ids=tokens()).logits, changed)
        close(base_logits(tinylora.load(qwen2(), tmp_path / format)), changed)
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_every_adapter_as_plain_lora(config, tmp_path):
    model = trained(qwen2(), config)
    want = base_logits(model)
    assert not torch.equal(want, base_logits())
    tinylora.save(model, tmp_path, format="lora")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    close(peft.PeftModel.from_pretrained(qwen2(), tmp_path)(input_ids=tokens()).logits, want)
    close(base_logits(tinylora.load(qwen2(), tmp_path)), want)


@pytest.mark.parametrize(
    "config",
    [
        TinyLoraConfig(u=3, n_tie=7),  # 14 modules
        TinyLoraConfig(u=3, n_tie=14, sigma="right"),
        TinyLoraConfig(u=2, groups=[0] * 4 + [1] * 4 + [2] * 6),  # what PEFT makes of three groups
        LoraConfig(r=4, alpha=6),
        LoraConfig(r=4, alpha=6, rslora=True, dropout=0.25),
        VeraConfig(r=16),
        AdaLoraConfig(r=4, target_r=2, total_steps=100, alpha=6, orthogonality=0.0),
        LoraConfig(r=2, target_modules=["model.layers.1.mlp.up_proj", "q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=str,
)
def test_our_adapter_in_peft(config, tmp_path):
    model = trained(qwen2(), config)
    want = base_logits(model)
    path = tinylora.save(model, tmp_path, format="peft")
    assert path == tmp_path / "adapter_model.safetensors"
    theirs = peft.PeftModel.from_pretrained(qwen2(), tmp_path, is_trainable=True).eval()
    close(theirs(input_ids=tokens()).logits, want)
    mine = tinylora.adapter_parameters(model)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(p.numel() for p in mine)
    back = tinylora.load(qwen2(), tmp_path).tinylora["default"].config
    same = ("r", "alpha", "rslora", "u", "total_steps", "target_r", "dropout", "modules_to_save")
    for field in same:
        if hasattr(config, field):
            assert getattr(back, field) == pytest.approx(getattr(config, field))
    if isinstance(config, TinyLoraConfig):
        assert back.group_of(model.tinylora["default"].sites) == config.group_of(model.tinylora["default"].sites)


def test_a_bf16_base(tmp_path):
    theirs = adapted("TinyLoRA", torch.bfloat16)
    exact = adapted("TinyLoRA", torch.bfloat16).double()(input_ids=tokens()).logits
    theirs.save_pretrained(tmp_path / "peft")
    ours = tinylora.load(qwen2(dtype=torch.bfloat16), tmp_path / "peft")
    assert all(p.dtype == torch.float32 for p in tinylora.adapter_parameters(ours))
    own = torch.dist(theirs(input_ids=tokens()).logits.double(), exact)
    assert torch.dist(base_logits(ours).double(), exact) <= 2 * own
    tinylora.save(ours, tmp_path / "lora", format="lora")
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values())
    back = peft.PeftModel.from_pretrained(qwen2(dtype=torch.bfloat16), tmp_path / "lora")
    assert torch.dist(back(input_ids=tokens()).logits.double(), exact) <= 2 * own


@pytest.mark.parametrize("patterns", [{"alpha_pattern": {"q_proj": 3}}, {}, {"alpha_pattern": {"v_proj": 1}}], ids=str)
def test_a_lora_with_a_rank_pattern(patterns, tmp_path):
    """Ranks may differ, and scales; the zeros that fill ranks up stay zero in training."""
    theirs = adapted("LoRA", rank_pattern={"q_proj": 2}, **patterns)
    theirs.save_pretrained(tmp_path)
    ours = tinylora.load(qwen2(), tmp_path)
    want = theirs(input_ids=tokens()).logits
    close(base_logits(ours), want)
    for format in ("tinylora", "peft", "lora"):
        tinylora.save(ours, tmp_path / format, format=format)
        close(base_logits(tinylora.load(qwen2(), tmp_path / format)), want)
    ours(tokens(), labels=tokens()).loss.backward()
    adapter = ours.model.layers[0].self_attn.q_proj.adapters["default"]
    assert adapter.down.grad[:2].any() and not adapter.down.grad[2:].any() and not adapter.up.grad[:, 2:].any()


def test_an_adalora_after_its_allocation(tmp_path):
    """PEFT saves the triplets that were kept; here they stay the ones that train."""
    model, ids = adapted("AdaLoRA", total_step=20, tfinal=5), tokens()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    want = peft.PeftModel.from_pretrained(qwen2(), tmp_path)(input_ids=ids).logits
    ours = tinylora.load(qwen2(), tmp_path)
    close(base_logits(ours), want)
    layers = [m.adapters["default"] for m in ours.modules() if isinstance(m, tinylora.Linear)]
    kept = sum(int(a.kept.sum()) for a in layers)
    assert kept == 2 * len(layers)
    optimizer = torch.optim.Adam(tinylora.adapter_parameters(ours), lr=1e-2)
    ours(ids, labels=ids).loss.backward()
    optimizer.step()
    assert sum(int((a.lam != 0).sum()) for a in layers) <= kept


def test_modules_to_save(tmp_path):
    theirs = adapted("LoRA", modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path)
    ours = tinylora.load(qwen2(), tmp_path)
    close(base_logits(ours), theirs(input_ids=tokens()).logits)
    assert ours.lm_head.copies["default"].weight.requires_grad


def test_a_classifier_of_pefts(tmp_path):
    """For such a task PEFT lists every name that heads have."""
    from transformers import Qwen2ForSequenceClassification

    def base():
        torch.manual_seed(0)
        return Qwen2ForSequenceClassification(qwen2(num_labels=3, pad_token_id=0).config).eval()

    theirs = peft.get_peft_model(base(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == {"classifier", "score"}
    ours = tinylora.load(base(), tmp_path)
    close(ours(tokens()).logits, theirs(input_ids=tokens()).logits)
    assert ours.tinylora["default"].config.modules_to_save == ("score",)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "Seq2SeqLM"])
def test_the_task_by_which_peft_finds_its_class(task, tmp_path):
    torch.manual_seed(0)
    if task == "Seq2SeqLM":
        config = transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=256)
        base, target, head = transformers.T5ForConditionalGeneration(config), "q", None
    else:
        base = getattr(transformers, f"Qwen2For{task}")(qwen2(num_labels=3, pad_token_id=0).config)
        target, head = "q_proj", ["qa_outputs" if task == "QuestionAnswering" else "score"]
    base.save_pretrained(tmp_path / "base")
    automatic = getattr(peft, f"AutoPeftModelFor{task}")

    def written(config, folder):
        model = trained(type(base).from_pretrained(tmp_path / "base"), config)
        tinylora.save(model, tmp_path / folder, format="lora")
        return json.loads((tmp_path / folder / "adapter_config.json").read_text())["task_type"]

    assert written(LoraConfig(r=2, target_modules=[target], modules_to_save=head), "whole")
    assert type(automatic.from_pretrained(tmp_path / "whole")) is automatic._target_peft_class
    for i, targets in enumerate([[target], [target, *head]] if head else ()):
        assert written(LoraConfig(r=2, target_modules=targets), f"other {i}") is None  # PEFT would look for the head
        peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / f"other {i}")


def test_a_head_with_a_batch_norm(tmp_path):
    """What it has counted and averaged is of the adapter, too: on a load, on a second one, and in a merged folder."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from tinylora.integrations import folders

    kind, images = ResNetForImageClassification, torch.randn(4, 3, 32, 32)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "base")
    chosen = {"target_modules": ["classifier.1"], "modules_to_save": ["embedder.embedder"]}
    theirs = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(**chosen)).eval()
    shake(theirs)
    theirs.base_model.model.resnet.embedder.embedder.train()
    theirs(pixel_values=images)
    want = theirs.eval()(pixel_values=images).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tinylora.load(kind.from_pretrained(tmp_path / "base"), tmp_path / "theirs").eval()
    tinylora.load(ours, tmp_path / "theirs", "second")
    close(ours(images).logits, want)
    assert ours.resnet.embedder.embedder.copies["second"].normalization.num_batches_tracked == 1
    folders.merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    close(merged(images).logits, want)
    assert merged.resnet.embedder.embedder.normalization.num_batches_tracked == 1


def test_tied_heads_and_buffers_that_are_made_anew(tmp_path):
    """What PEFT takes of older folders, and safetensors not of ours."""
    base = transformers.BertForMaskedLM(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ).eval()
    twin = copy.deepcopy(base)
    chosen = {"target_modules": ["query"], "modules_to_save": ["cls", "bert.embeddings"]}
    ours, ids = trained(base, LoraConfig(r=2, **chosen)), tokens()
    want = ours(ids).logits
    tinylora.save(ours, tmp_path, format="lora")
    path = tmp_path / "adapter_model.safetensors"
    older = {"base_model.model.bert.embeddings.position_ids": torch.arange(512)[None]}
    save_file(load_file(path) | older, path, metadata={"format": "pt"})
    close(tinylora.load(twin, tmp_path)(ids).logits, want)


def test_a_speech_model_names_no_task(tmp_path):
    """PEFT's class for it would hand on token ids."""
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=256, num_mel_bins=8, max_source_positions=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
    )  # fmt: skip
    ours = trained(
        transformers.WhisperForConditionalGeneration(config).eval(), LoraConfig(r=2, target_modules=["q_proj"])
    )
    twin = transformers.WhisperForConditionalGeneration(config).eval()
    twin.load_state_dict(ours.state_dict(), strict=False)
    sound = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.tensor([[1, 5]])}
    tinylora.save(ours, tmp_path, format="lora")
    close(peft.PeftModel.from_pretrained(twin, tmp_path)(**sound).logits, ours(**sound).logits)


def test_fp8_numbers_are_scaled_in_fp32(tmp_path):
    def in_fp8(found):
        return {n: t.to(torch.float8_e4m3fn) for n, t in found.items()}

    ours = tinylora.load(qwen2(), saved(tmp_path, tensors=in_fp8, alpha_pattern={"q_proj": 3}))
    close(base_logits(ours), peft.PeftModel.from_pretrained(qwen2(), tmp_path)(input_ids=tokens()).logits)


def test_a_failed_save_leaves_the_previous_folder_whole(tmp_path, monkeypatch):
    model = trained(qwen2(), LoraConfig(r=2))
    tinylora.save(model, tmp_path, format="peft")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}
    trained(model, LoraConfig(r=3), "second")
    for broken in ("save_file", "json.dumps"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tinylora.integrations.peft_files.{broken}", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tinylora.save(model, tmp_path, "second", format="peft")
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def killed_before_step(n, model, folder):
    """Whether a process that saves the adapter `second` is killed before its n-th move or removal of a file."""
    child = os.fork()
    if not child:
        steps = []

        def counted(call):
            def before(*args, **kwargs):
                steps.append(call)
                if len(steps) == n:
                    os._exit(9)
                return call(*args, **kwargs)

            return before

        for name in ("replace", "rename", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            tinylora.save(model, folder, "second", format="peft")
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
@pytest.mark.parametrize("there", [True, False])
def test_kill_9_at_any_step_of_a_save_never_mixes_two_adapters(there, tmp_path):
    """Two adapters of the same shapes and other scales: one's config with the other's tensors would load unnoticed."""
    model = trained(trained(qwen2(), LoraConfig(r=2, alpha=1)), LoraConfig(r=2, alpha=8), "second")
    logits = {}
    for name in ("default", "second"):
        tinylora.save(model, tmp_path / name, name, format="peft")
        logits[name] = base_logits(tinylora.load(qwen2(), tmp_path / name))
    seen, n = [], 1
    while True:
        folder = tmp_path / f"killed {n}"
        if there:
            tinylora.save(model, folder, format="peft")
        killed = killed_before_step(n, model, folder)

        def adapter(load, folder=folder):
            try:
                found = load(folder)
            except (ValueError, OSError) as error:
                assert "adapter_config.json" in str(error) or "expected an adapter" in str(error)
                return None
            (which,) = (name for name, want in logits.items() if torch.equal(found, want))
            return which

        ours = adapter(lambda folder: base_logits(tinylora.load(qwen2(), folder)))
        config = folder / "adapter_config.json"
        theirs = ours if config.exists() else adapter(lambda f: peft.PeftModel.from_pretrained(qwen2(), str(f)))
        assert theirs in (ours, None)
        seen.append((ours, theirs))
        tinylora.save(
            model, folder, format="peft"
        )  # whatever was left behind, the next save and what it leaves are whole
        assert sorted(p.name for p in folder.iterdir() if ".tmp" not in p.name) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert adapter(lambda folder: base_logits(tinylora.load(qwen2(), folder))) == "default"
        if not killed:
            break
        n += 1
    before = "default" if there else None
    assert seen[0] == (before, before) and seen[-1] == ("second", "second")
    assert (("second", None) in seen) == there  # both files whole, and the config away


def test_an_adapter_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    model = trained(trained(qwen2(), LoraConfig(r=2, alpha=1)), LoraConfig(r=2, alpha=8), "second")
    tinylora.save(model, tmp_path, format="peft")
    open_now = peft_files.safe_open

    def late(*args):
        tinylora.save(model, tmp_path, "second", format="peft")
        return open_now(*args)

    monkeypatch.setattr(peft_files, "safe_open", late)
    with pytest.raises(ValueError, match="was written to while it was read"):
        tinylora.load(qwen2(), tmp_path)


def saved(tmp_path, kind="LoRA", config=(), tensors=lambda found: found, **changes):
    """A folder of PEFT's with its config and its tensors changed."""
    adapted(kind, **changes).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
    return tmp_path


def without_one(found):
    return {n: t for n, t in found.items() if not n.endswith("layers.0.mlp.up_proj.lora_B.weight")}


def with_a_stranger(found):
    return found | {"base_model.model.model.embed_tokens.weight": torch.zeros(2)}


def of_another_shape(found):
    return {n: t[:, :-1].contiguous() if n.endswith("lora_A.weight") else t for n, t in found.items()}


def of_another_model(found):
    return {n.replace("q_proj", "query"): t for n, t in found.items()}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, "use_dora is True, expected none: nothing here computes that"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected one that leaves the base"),
        ({"kind": "TinyLoRA", "save_projection": False}, "save_projection is False, expected True"),
        ({"kind": "VeRA", "save_projection": False}, "save_projection is False, expected True"),
        ({"config": {"alpha_pattern": ["q_proj"]}}, "adapter_config.json is damaged"),
        ({"config": {"alpha_pattern": {"*q": 3}}}, "adapter_config.json is damaged"),
        ({"config": {"r": 8}}, "r is 8, expected 4 for model.layers.0.self_attn.q_proj, the rank that"),
        (
            {"config": {"rank_pattern": {"up_proj": 2}}},
            "rank_pattern is {'up_proj': 2}, expected 4 for model.layers.0.mlp.up_proj",
        ),
        ({"config": {"peft_type": ["LORA"]}}, "peft_type is \"['LORA']\", expected one of TINYLORA, LORA"),
        ({"config": {"peft_type": "LOKR"}}, "peft_type is 'LOKR', expected one of TINYLORA, LORA"),
        ({"config": {"r": 3}, "kind": "TinyLoRA"}, "tinylora_A has shape (2, 64), expected (3, 64)"),
        ({"tensors": without_one}, "has no base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
        ({"tensors": with_a_stranger}, "holds base_model.model.model.embed_tokens.weight, which nothing here can take"),
        ({"tensors": of_another_shape}, "lora_A.weight has shape (4, 63), expected (None, 64)"),
        ({"tensors": of_another_model}, "query', expected torch.nn.Linear modules of Qwen2ForCausalLM"),
    ],
)
def test_what_cannot_be_read(settings, message, tmp_path):
    folder = saved(tmp_path, **settings)
    model = qwen2()
    with pytest.raises(ValueError) as error:
        tinylora.load(model, folder)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert torch.equal(base_logits(model), base_logits()) and not hasattr(model, "tinylora")


def test_files_that_are_not_whole(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="truncated or damaged"):
        tinylora.load(qwen2(), tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist, expected PEFT's adapter as safetensors"):
        tinylora.load(qwen2(), tmp_path)
    path.write_bytes(whole)
    for text in (b"{", b'{"peft_type": "LORA\xff"}'):
        (tmp_path / "adapter_config.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read, expected a config of PEFT"):
            tinylora.load(qwen2(), tmp_path)
    with pytest.raises(ValueError, match="does not exist, expected an adapter that"):
        tinylora.load(qwen2(), tmp_path / "nowhere")
    named = peft.get_peft_model(qwen2(), CONFIGS["LoRA"](), adapter_name="mine")
    named.save_pretrained(tmp_path / "several")  # each in a folder of its name
    with pytest.raises(ValueError, match=r"expected an adapter .* \(one of PEFT's is in 'mine' there\)"):
        tinylora.load(qwen2(), tmp_path / "several")


def test_what_cannot_be_written(tmp_path):
    model = trained(qwen2(), TinyLoraConfig(n_tie=4))  # ceil(14 / 4): 4, 4, 4, 2; PEFT has 3, 3, 3, 5
    with pytest.raises(ValueError, match="PEFT's TinyLoRA cannot tie 14 modules") as error:
        tinylora.save(model, tmp_path, format="peft")
    assert 'format="lora"' in str(error.value)
    trained(model, LoraXSConfig(), "xs")
    with pytest.raises(ValueError, match="PEFT has no lora-xs"):
        tinylora.save(model, tmp_path, "xs", format="peft")
    with pytest.raises(ValueError, match="format is 'onnx', expected one of tinylora, peft, lora"):
        tinylora.save(model, tmp_path, format="onnx")
    layer = tinylora.Linear.from_linear(torch.nn.Linear(8, 8), LoraConfig())
    with pytest.raises(ValueError, match="expected a model"):
        tinylora.save(layer, tmp_path, format="lora")
    assert not list(tmp_path.iterdir())
    tinylora.save(model, tmp_path)
    with pytest.raises(ValueError, match="an adapter in tinylora's format"):
        tinylora.save(model, tmp_path, format="lora")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected one adapter"):
        tinylora.load(qwen2(), tmp_path)
    tinylora.save(model, tmp_path / "theirs", format="lora")
    before = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}
    with pytest.raises(ValueError, match=r"holds adapter_config.json, an adapter in PEFT's format"):
        tinylora.save(model, tmp_path / "theirs")
    assert {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()} == before


def test_names_in_use(tmp_path):
    adapted("TinyLoRA").save_pretrained(tmp_path / "peft")
    model = tinylora.load(qwen2(), tmp_path / "peft")
    with pytest.raises(ValueError, match="name is 'default', but the model has an adapter of that name"):
        tinylora.load(model, tmp_path / "peft")
    tinylora.save(model, tmp_path / "ours")
    with pytest.raises(ValueError, match="has an adapter of that name with other factors"):
        tinylora.load(model, tmp_path / "ours")
    tinylora.load(model, tmp_path / "ours", "second")


def test_pefts_groups():
    """The formula against PEFT itself, for every tying of a model with 14 modules."""
    for groups in range(1, 15):
        model = peft.get_peft_model(qwen2(hidden=16), CONFIGS["TinyLoRA"](r=1, weight_tying=1 - groups / 14))
        layers = [m for m in model.modules() if hasattr(m, "_tinylora_v_key")]
        assert [int(m._tinylora_v_key["default"]) for m in layers] == peft_files.peft_groups(14, 1 - groups / 14)


def test_shaken_is_shaken():
    model = adapted("VeRA")
    before = model(input_ids=tokens()).logits
    shake(model, seed=9)
    assert not torch.equal(model(input_ids=tokens()).logits, before)


def test_what_peft_would_take_for_fused_experts_is_said(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=256, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    named = tinylora.LoraConfig(r=2, target_modules=["o_proj", "mlp.up_proj"])
    model = tinylora.apply(DeepseekV3ForCausalLM(config), named)
    with pytest.raises(ValueError, match=r"PEFT takes model\.layers\.0\.mlp\.up_proj for the fused experts"):
        tinylora.save(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
    with pytest.warns(UserWarning, match="would load another adapter"):
        tinylora.save(model, tmp_path / "lora", format="lora")
    attention = tinylora.apply(DeepseekV3ForCausalLM(config), tinylora.LoraConfig(r=2, target_modules=["o_proj"]))
    tinylora.save(attention, tmp_path / "peft", format="peft")


def test_an_adapted_head_comes_with_its_weight(tmp_path):
    """PEFT writes lm_head's weight beside the adapter that is on it."""
    model = adapted("LoRA", target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "head")
    held = load_file(tmp_path / "head" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in held
    ours = tinylora.load(qwen2(), tmp_path / "head")
    torch.testing.assert_close(ours(tokens()).logits, model(tokens()).logits)
    held["base_model.model.lm_head.base_layer.weight"] = held["base_model.model.lm_head.base_layer.weight"] + 1
    save_file(held, tmp_path / "head" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds another weight for lm_head than this Qwen2ForCausalLM has"):
        tinylora.load(qwen2(), tmp_path / "head")
