"""A different adapter in every row of a batch."""

import asyncio
import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import qwen2, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import tinylora
from tinylora import LoraConfig, LoraXSConfig, TinyLoraConfig

CONFIGS = [TinyLoraConfig(u=2, n_tie=5), TinyLoraConfig(u=1, n_tie=100), LoraXSConfig(r=3)]


def stacked(config, count, model=None, scale=0.5, seed=0):
    """A model with `count` random adapters in its stack, and these as mappings."""
    from tinylora.nn.model import named_numbers

    model = tinylora.apply(model or qwen2(), config)
    g = torch.Generator().manual_seed(seed)
    names = {n: p.shape for n, p in named_numbers(model).items()}
    sets = [{n: scale * torch.randn(shape, generator=g) for n, shape in names.items()} for _ in range(count)]
    return tinylora.stack(model, sets), sets


def use(model, numbers):
    """One adapter's numbers for the whole model."""
    from tinylora.nn.model import named_numbers

    with torch.no_grad():
        for n, p in named_numbers(model).items():
            p.copy_(numbers[n]) if numbers is not None else p.zero_()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_sequence_gets_its_own_adapter(config):
    model, sets = stacked(config, 5)
    ids, batch = [3, -1, 0, 3, 4, 1], tokens(batch=6)
    with tinylora.adapter_ids(model, ids):
        together = model(batch).logits
    for i, row, own in zip(ids, batch, together, strict=True):
        use(model, sets[i] if i >= 0 else None)
        torch.testing.assert_close(own, model(row[None]).logits[0], rtol=1e-4, atol=1e-5)
    assert torch.dist(together[0], together[3]) > 0.1  # two sequences of one adapter are still two
    use(model, None)
    outside = model(batch).logits
    with tinylora.disabled(model):
        assert torch.equal(model(batch).logits, outside)


@pytest.mark.parametrize("strategy", ["greedy", "beams", "samples"])
def test_generate_with_64_adapters_is_64_runs(strategy):
    """Prompts of different lengths, left-padded; beams and samples follow their prompt."""
    model, sets = stacked(TinyLoraConfig(u=2, n_tie=5), 64)
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(3, 12, (64,), generator=g).tolist()
    prompts = [torch.randint(1, 256, (n,), generator=g) for n in lengths]
    batch = torch.zeros(64, 12, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for i, prompt in enumerate(prompts):
        batch[i, 12 - len(prompt) :], mask[i, 12 - len(prompt) :] = prompt, 1
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if strategy == "beams":
        settings |= {"num_beams": 3, "num_return_sequences": 2}
    elif strategy == "samples":
        settings |= {"do_sample": True, "top_k": 1, "num_return_sequences": 3}  # top 1: sampling without chance
    each = settings.get("num_return_sequences", 1)
    order = torch.randperm(64, generator=g)
    with tinylora.adapter_ids(model, order):
        together = model.generate(batch, attention_mask=mask, **settings)[:, 12:]
    distinct = set()
    for i, prompt in enumerate(prompts):
        use(model, sets[order[i]])
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **settings)[:, len(prompt) :]
        assert torch.equal(together[i * each : (i + 1) * each], alone), i
        distinct.add(tuple(alone[0].tolist()))
    assert len(distinct) > 32  # the adapters do differ


def test_static_cache_compiles_in_one_graph():
    """The gate for captured rollouts: fullgraph on the static cache, one graph, same tokens as eager."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, _ = stacked(TinyLoraConfig(u=2, n_tie=5), 3)
    generate = functools.partial(model.generate, tokens(batch=3), max_new_tokens=8, do_sample=False, pad_token_id=0)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    compile_config._compile_all_devices = True
    with tinylora.adapter_ids(model, [2, 0, 1]):
        eager = generate()
        torch._dynamo.utils.counters.clear()
        compiled = generate(cache_implementation="static", compile_config=compile_config)
    assert torch.equal(eager, compiled)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_who_is_not_within_is_served_by_nobody_elses_adapters():
    """A thread, or a task, that runs the model while another one is within."""
    model, _ = stacked(TinyLoraConfig(u=2, n_tie=5), 2)

    def run():
        with torch.no_grad():
            return model(tokens())

    with tinylora.adapter_ids(model, [0, 1]), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="entered by another thread or task than the one that runs the model"):
            pool.submit(run).result()
        run()

    async def within(entered, done):
        with tinylora.adapter_ids(model, [0, 1]):
            entered.set()
            await done.wait()

    async def beside(entered, done):
        await entered.wait()
        try:
            with pytest.raises(ValueError, match="another thread or task"):
                run()
        finally:
            done.set()

    async def both():
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(within(*events), beside(*events))

    asyncio.run(both())


def test_rows_that_only_happen_to_be_as_many_are_refused():
    class Encoder(nn.Module):  # tokens first, as torch's own is by default
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 32)
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(32, 4, 64)])

        def forward(self, input_ids):
            return self.layers[0](self.embed(input_ids).transpose(0, 1)).transpose(0, 1)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Module()])
            self.layers[0].experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    for model, message in ((Encoder().eval(), "batch_first is False"), (Experts(), "is one of several experts")):
        tinylora.apply(model, TinyLoraConfig(n_tie=9))
        tinylora.stack(model, [{"v_0": torch.ones(1)}] * 4)
        with pytest.raises(ValueError, match=message), tinylora.adapter_ids(model, [0, 1, 2, 3]):
            pass

    class TimeMajor(nn.Module):  # inside; its rows are the sequences' all the same
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Module()])
            self.layers[0].lstm, self.layers[0].fc = nn.LSTM(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.layers[0].fc(self.layers[0].lstm(x.transpose(0, 1))[0].transpose(0, 1))

    model = tinylora.apply(TimeMajor(), TinyLoraConfig(n_tie=9))
    tinylora.stack(model, [{"v_0": torch.ones(1)}] * 4)
    with tinylora.adapter_ids(model, [0, 1, 2, 3]):
        model(torch.randn(4, 4, 8))


def test_layers_that_were_taken_out_or_wrapped():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model, _ = stacked(TinyLoraConfig(u=2, n_tie=5), 2)
    model.model.layers[1].mlp.up_proj = Wrapper(model.model.layers[1].mlp.up_proj)
    model.model.layers = model.model.layers[1:]
    with tinylora.adapter_ids(model, [0, 1]):
        model(tokens(), use_cache=False)


def test_a_wrapped_layer_takes_a_file_and_a_stack(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tinylora.apply(qwen2(), CONFIGS[0])
    tinylora.save(model, tmp_path, factors=True)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    tinylora.load(model, tmp_path)
    tinylora.stack(model, [tmp_path])
    with tinylora.adapter_ids(model, [0, 0]):
        model(tokens())


def test_a_stack_that_fails_leaves_the_former():
    model, sets = stacked(LoraXSConfig(r=2), 2)
    before = {n: t for n, t in model.named_buffers() if "stacked_" in n}
    last = list(sets[0])[-1]
    with pytest.raises(NotImplementedError):
        tinylora.stack(model, [sets[0], sets[1] | {last: sets[1][last].to("meta")}])
    assert all(t is before[n] for n, t in model.named_buffers() if "stacked_" in n)


def test_a_backward_recomputes_in_whatever_thread():
    model, _ = stacked(TinyLoraConfig(u=2, n_tie=5), 2)
    embedded = model.model.embed_tokens(tokens()).detach().requires_grad_()
    with tinylora.adapter_ids(model, [0, 1]), ThreadPoolExecutor(1) as pool:
        loss = checkpoint(lambda e: model(inputs_embeds=e).logits.sum(), embedded, use_reentrant=False)
        pool.submit(loss.backward).result()
    assert embedded.grad.abs().max() > 0


def test_a_new_stack_leaves_what_somebody_holds_of_the_former():
    """A backward that is under way, and tensors that train."""
    model, sets = stacked(TinyLoraConfig(u=2, n_tie=5), 3)
    held = {n: (t, t.clone()) for n, t in model.named_buffers() if "stacked_" in n}
    embedded = model.model.embed_tokens(tokens(batch=3)).detach().requires_grad_()
    with tinylora.adapter_ids(model, [2, 0, 1]):
        loss = model(inputs_embeds=embedded).logits.sum()
    tinylora.stack(model, sets[::-1])
    loss.backward()
    assert embedded.grad.isfinite().all() and all(torch.equal(t, was) for t, was in held.values())


def test_thousand_adapters_from_files_and_their_place(tmp_path):
    config = TinyLoraConfig(u=1, n_tie=4)
    model, sets = stacked(config, 3)
    folders = []
    for i, numbers in enumerate(sets):
        use(model, numbers)
        tinylora.save(model, tmp_path / str(i))
        folders.append(tmp_path / str(i))
    other = tinylora.stack(tinylora.apply(qwen2(), config), [folders[i % 3] for i in range(1000)])
    ids, batch = [999, 500, 7], tokens(batch=3)
    with tinylora.adapter_ids(other, ids):
        got = other(batch).logits
    with tinylora.adapter_ids(model, [i % 3 for i in ids]):
        torch.testing.assert_close(got, model(batch).logits)
    other.bfloat16()
    assert {b.dtype for n, b in other.named_buffers() if "stacked" in n} == {torch.float32}
    assert not any("stacked" in n for n in other.state_dict())


def test_refusals(tmp_path):
    model, sets = stacked(CONFIGS[0], 2)
    cases = [
        (lambda: tinylora.stack(model, []), "adapters is empty"),
        (lambda: tinylora.stack(model, [sets[0], {"v_0": torch.zeros(2)}]), "adapters[1] does not fit 'default': v_1"),
        (lambda: tinylora.adapter_ids(model, [0, 2]).__enter__(), "expected -1 (no adapter) to 1"),
        (lambda: tinylora.adapter_ids(model, [-2]).__enter__(), "expected -1 (no adapter) to 1"),
        (lambda: tinylora.adapter_ids(model, [0.5]).__enter__(), "expected [B] integers"),
        (lambda: tinylora.adapter_ids(tinylora.apply(qwen2(), CONFIGS[0]), [0]).__enter__(), "has no stack"),
        (lambda: tinylora.stack(tinylora.apply(qwen2(), LoraConfig()), [{}]), "LoraConfig adapters differ in more"),
    ]
    tinylora.save(tinylora.apply(qwen2(), TinyLoraConfig(u=3)), tmp_path)
    cases.append((lambda: tinylora.stack(model, [tmp_path]), "has another config or base model"))
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value), error.value
    with tinylora.adapter_ids(model, [0, 1]):
        for batch in (3, 1):  # one sequence of many tokens is what continuous batching packs
            with pytest.raises(ValueError, match="adapter_ids came for 2 sequences"):
                model(tokens(batch=batch))
        assert model.model(tokens(batch=4))[0].shape[0] == 4  # past the model itself: two samples of each
        pickle.dumps(model)
    model(tokens(batch=3))


def test_an_adapter_that_does_not_run_is_refused():
    model, _ = stacked(CONFIGS[0], 2)
    tinylora.apply(model, TinyLoraConfig(seed=5), "other")
    for runs in ("other", None):
        tinylora.activate(model, runs)
        with pytest.raises(ValueError, match=r"adapter 'default' is not active .*expected tinylora\.activate"):
            tinylora.adapter_ids(model, [0, 1]).__enter__()
    tinylora.activate(model, "default")
    with tinylora.adapter_ids(model, [0, 1]):
        model(tokens())


def test_other_things_than_sequences_are_refused():
    """A layer may see images, or sequences second: a first dimension that two divides proves nothing."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16)])

        def forward(self, input_ids, images):
            return self.blocks[0](images)

    model, _ = stacked(TinyLoraConfig(u=2), 2, Model())
    with tinylora.adapter_ids(model, [0, 1]):
        assert model(tokens(batch=2), torch.randn(2, 5, 16)).shape == (2, 5, 16)
        for images in (4, 6):
            with pytest.raises(ValueError, match="expected a first dimension of 2"):
                model(tokens(batch=2), torch.randn(images, 5, 16))
        assert model(tokens(batch=4), torch.randn(4, 5, 16)).shape == (4, 5, 16)  # two samples of each


@pytest.mark.parametrize("several", [{"do_sample": True}, {"num_beams": 2}], ids=["samples", "beams"])
def test_fewer_prompts_than_ids_are_refused(several):
    """A loader's last batch: its rows with samples may be as many as ids."""
    model, _ = stacked(CONFIGS[0], 4)
    settings = {"max_new_tokens": 2, "pad_token_id": 0, "num_return_sequences": 2} | several
    with tinylora.adapter_ids(model, [2, 0, 1, 3]):
        for given in ({"input_ids": tokens()}, {"inputs_embeds": model.get_input_embeddings()(tokens())}):
            with pytest.raises(ValueError, match="has 2 prompts, expected as many as adapter_ids, 4"):
                model.generate(**given, **settings)
        assert len(model.generate(tokens(batch=4), **settings)) == 8


def test_audios_that_end_at_different_times_are_refused():
    """Whisper takes those that are done out of the batch."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=200, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_target_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None,
        suppress_tokens=None,
    )  # fmt: skip
    whisper = WhisperForConditionalGeneration(config).eval()
    for name, value in {
        "no_timestamps_token_id": 150,
        "is_multilingual": False,
        "max_initial_timestamp_index": 50,
    }.items():
        setattr(whisper.generation_config, name, value)
    model, sets = stacked(CONFIGS[0], 2, whisper, scale=6)
    audio = torch.randn(2, 8, 6000)
    there = torch.ones(2, 6000, dtype=torch.long)
    there[0, 1500:] = 0
    settings = {"return_timestamps": True, "max_new_tokens": 6, "do_sample": False}
    with tinylora.adapter_ids(model, [0, 1]):
        for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
            with pytest.raises(ValueError, match="an audio ends before the others and leaves the batch"):
                model.generate(audio, attention_mask=there, **settings, **more)
        with pytest.raises(ValueError, match="expected one number"):
            model.generate(audio, attention_mask=there, **settings | {"temperature": (0.0, 0.5)})
    use(model, sets[1])
    alone = model.generate(audio[1:], attention_mask=there[1:], **settings)
    with tinylora.adapter_ids(model, [1]):
        assert torch.equal(model.generate(audio[1:], attention_mask=there[1:], **settings), alone)


def test_a_batch_that_generate_doubles_for_guidance_is_refused():
    """Dia's and Janus's put a batch without the prompt after the one with it; beams lie side by side."""
    model, _ = stacked(CONFIGS[0], 2)
    original = model.prepare_inputs_for_generation

    def doubled(input_ids, **kwargs):
        inputs = original(input_ids, **kwargs)
        return inputs | {n: t.repeat(2, 1) for n, t in inputs.items() if isinstance(t, torch.Tensor)}

    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    with tinylora.adapter_ids(model, [0, 1]):
        model.generate(tokens(), num_beams=3, **settings)
        model.generate(tokens().repeat_interleave(2, 0), **settings)  # by the caller, as Whisper does
        copied = copy.deepcopy(model)
        model.prepare_inputs_for_generation = doubled
        with pytest.raises(ValueError, match="the model has put a second batch after the one of adapter_ids"):
            model.generate(tokens(), **settings)
    assert "generate" not in model.__dict__
    assert copied.generate(tokens(batch=3), **settings).shape == (3, 11)  # a copy made within is not within


def test_images_that_are_not_one_to_a_sequence_are_refused():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=99)
    model, _ = stacked(CONFIGS[0], 2, LlavaForConditionalGeneration(config).eval())
    ids = torch.randint(3, 90, (2, 12))
    one, two = ids.clone(), ids.clone()
    one[:, 1:5] = 99
    two[0, 1:9] = 99
    with tinylora.adapter_ids(model, [0, 1]):
        model(input_ids=one, pixel_values=torch.randn(2, 3, 16, 16))
        with pytest.raises(ValueError, match="sequences differ in how many images they have"):
            model(input_ids=two, pixel_values=torch.randn(2, 3, 16, 16))
        with pytest.raises(ValueError, match="sequences differ in how many images they have"):
            model.generate(two, pixel_values=torch.randn(2, 3, 16, 16), max_new_tokens=1)
        one[:, 5:9] = 99  # two in each
        model.generate(input_ids=one, pixel_values=torch.randn(4, 3, 16, 16), max_new_tokens=1, pad_token_id=0)


def test_videos_and_patches_that_are_as_many_as_sequences_are_refused():
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        SiglipVisionConfig,
    )

    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_index=98, video_token_index=99,
        image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1,
    )  # fmt: skip
    model, _ = stacked(CONFIGS[0], 2, LlavaOnevisionForConditionalGeneration(config).eval())
    two = torch.tensor([[5, 99, 99, 6, 99, 99, 7], [8] * 7])  # videos of one frame, both in the first sequence
    given = {"input_ids": two, "pixel_values_videos": torch.randn(2, 1, 3, 16, 16)}
    with tinylora.adapter_ids(model, [0, 1]):
        for call in (model, functools.partial(model.generate, max_new_tokens=1)):
            with pytest.raises(ValueError, match="sequences differ in how many images they have"):
                call(**given)

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=text | {"vocab_size": 128, "pad_token_id": 0, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=120, vision_start_token_id=121, vision_end_token_id=122, video_token_id=123,
    )  # fmt: skip
    model, _ = stacked(CONFIGS[0], 16, Qwen2VLForConditionalGeneration(config).eval())
    ids = torch.tensor([[5, 121, 120, 120, 120, 120, 122, 6, 7], *[[8] * 9] * 15])  # an image of 16 patches
    given = {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with tinylora.adapter_ids(model, range(16)), pytest.raises(ValueError, match="sequences differ in how many images"):
        model(input_ids=ids, mm_token_type_ids=(ids == 120).int(), **given)


def test_contexts_of_other_tasks_and_threads_are_refused():
    """Which adapters run is the model's state: two at once would run each other's, and leave it wrong."""
    model, _ = stacked(tinylora.TinyLoraConfig(u=2, n_tie=5), 3)
    want = model(tokens()).logits

    async def request(context):
        with context():
            await asyncio.sleep(0.01)

    def together(*contexts):
        async def both():
            return await asyncio.gather(*(request(c) for c in contexts), return_exceptions=True)

        return [e for e in asyncio.run(both()) if e is not None]

    def rows():
        return tinylora.adapter_ids(model, [0, 1])

    def off():
        return tinylora.disabled(model)

    for contexts, message in (((rows, rows), "adapter_ids of 'default' is in use"), ((off, off), "is disabled by")):
        (error,) = together(*contexts)
        assert isinstance(error, ValueError) and message in str(error)
        assert torch.equal(model(tokens()).logits, want)
    with rows(), ThreadPoolExecutor(1) as thread, pytest.raises(ValueError, match="by another thread or task"):
        thread.submit(lambda: rows().__enter__()).result()
    with rows(), rows(), off(), off():
        pass
    first, second = rows(), rows()
    first.__enter__(), second.__enter__()
    with pytest.raises(ValueError, match="ended before one that began within it"):
        first.__exit__(None, None, None)
    assert torch.equal(model(tokens()).logits, want)


def test_what_would_end_a_context_is_refused_and_copies_are_outside():
    model, _ = stacked(tinylora.TinyLoraConfig(u=2, n_tie=5), 3)
    tinylora.apply(model, tinylora.LoraConfig(r=2), "other")
    tinylora.activate(model, "default")
    want = model(tokens()).logits
    with tinylora.adapter_ids(model, [0, 1]):
        mixed = model(tokens()).logits
        for change in (tinylora.merge, lambda m: tinylora.activate(m, "other")):
            with pytest.raises(ValueError, match="within adapter_ids of 'default'"):
                change(model)
        assert torch.equal(model(tokens()).logits, mixed)
        copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens()).logits, want)


def test_what_cannot_be_stacked_is_said(tmp_path):
    config = tinylora.TinyLoraConfig(u=2, n_tie=5)
    model, sets = stacked(config, 2)
    for wrong in ("folder", tmp_path, sets[0]):
        with pytest.raises(ValueError, match=r"adapters is one .*, expected a sequence"):
            tinylora.stack(model, wrong)
    tinylora.stack(model, ({n: t.numpy() for n, t in s.items()} for s in sets))
    whole = tinylora.TinyLoraConfig(u=2, n_tie=5, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="has modules_to_save"):
        tinylora.stack(tinylora.apply(qwen2(tie_word_embeddings=False), whole), sets)
    other = tinylora.apply(qwen2(), config)
    for layer in tinylora.nn.model.adapted_layers(other).values():  # as another machine's decomposition may have them
        layer.adapters["default"].down.neg_()
    tinylora.save(other, tmp_path / "other", factors=True)
    with pytest.raises(ValueError, match="other frozen factors than the adapter on the model"):
        tinylora.stack(model, [tmp_path / "other"])
    with pytest.raises(ValueError, match="other frozen factors than the adapter on the model"):
        tinylora.load(model, tmp_path / "other")
    tinylora.load(model, tmp_path / "other", "another")
    tinylora.save(model, tmp_path / "own", factors=True)
    tinylora.stack(tinylora.load(model, tmp_path / "own"), [tmp_path / "own"])


def test_a_stack_made_in_inference_mode_trains_later():
    model, sets = stacked(tinylora.TinyLoraConfig(u=2, n_tie=5), 2)
    with torch.inference_mode():
        tinylora.stack(model, sets)
    with tinylora.adapter_ids(model, [0, 1]):
        embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=tokens()).loss.backward()
    assert embeddings.grad.abs().sum() > 0
