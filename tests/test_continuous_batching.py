"""A different adapter for every request of transformers' generate_batch(): each gives what it gives by itself."""

import pytest
import torch
from models import qwen2
from test_rows import stacked, use
from transformers import ContinuousBatchingConfig, GenerationConfig

import tinylora
from tinylora import TinyLoraConfig

CONFIG = TinyLoraConfig(u=2, n_tie=5)
NEW = 6


def settings(**changes):
    """Pages of four tokens, and few enough tokens in a batch that prompts are cut and decoding goes on beside them."""
    return ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 200, "max_batch_tokens": 24} | changes)


def generation(**changes):
    return GenerationConfig(
        **{"do_sample": False, "max_new_tokens": NEW, "eos_token_id": -1, "pad_token_id": 0} | changes
    )


def prompts_of(lengths, common=0, seed=5):
    """Random prompts, the first `common` tokens the same in all."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 256, (common,), generator=g).tolist()
    return [first + torch.randint(1, 256, (n,), generator=g).tolist() for n in lengths]


def answers(model, prompts, changes=(), **generating):
    found = model.generate_batch(
        prompts,
        generation_config=generation(**generating),
        continuous_batching_config=settings(**dict(changes)),
        warmup=False,
    )
    assert all(r.error is None for r in found.values())
    return [r.generated_tokens for r in found.values()]


def alone(model, sets, ids, prompts):
    """generate() of every prompt by itself, with its adapter's numbers in the model."""
    found = []
    for i, prompt in zip(ids, prompts, strict=True):
        use(model, sets[i] if i >= 0 else None)
        tokens = torch.tensor([prompt])
        done = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=generation())
        found.append(done[0, len(prompt) :].tolist())
    use(model, None)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_request_gets_its_own_adapter(attention):
    model, sets = stacked(CONFIG, 6, qwen2(attn_implementation=attention))
    lengths = [3, 40, 11, 7, 1, 29, 11, 5, 17, 2]
    ids = [5, 0, 3, -1, 2, 1, 4, 0, 3, 5]
    prompts = prompts_of(lengths)
    want = alone(model, sets, ids, prompts)
    with tinylora.adapter_ids(model, ids):
        got = answers(model, prompts)
    assert got == want
    others = alone(model, sets, [0] * len(ids), prompts)
    assert sum(a != b for a, b in zip(got, others, strict=True)) > 5  # the adapters do differ
    with tinylora.adapter_ids(model, [0] * len(ids)):
        assert answers(model, prompts) == others


def test_a_common_prefix_is_not_shared_between_adapters():
    """One request after the other, so that the first one's pages are complete when the others look for a prefix."""
    model, sets = stacked(CONFIG, 4)
    prompts, ids = prompts_of([2, 2, 2, 2], common=24), [0, 1, 2, 3]
    prompts[1] = prompts[3] = list(prompts[0])
    want = alone(model, sets, ids, prompts)
    assert want[0] != want[1]
    with tinylora.adapter_ids(model, ids):
        assert answers(model, prompts, {"max_requests_per_batch": 1}) == want
        assert answers(model, prompts, {"max_requests_per_batch": 1, "allow_block_sharing": True}) == want


def test_several_sequences_of_one_prompt_use_its_adapter():
    model, sets = stacked(CONFIG, 4)
    prompts, ids = prompts_of([9, 14, 3]), [2, 0, 3]
    want = alone(model, sets, ids, prompts)
    with tinylora.adapter_ids(model, ids):  # top 1: sampling without chance
        got = answers(model, prompts, num_return_sequences=3, do_sample=True, top_k=1)
    assert got == [answer for answer in want for _ in range(3)]


def test_a_cache_too_small_for_all_requests():
    """Requests are then thrown out, and begin again with what they had generated as a part of the prompt."""
    model, sets = stacked(CONFIG, 4)
    prompts, ids = prompts_of([9, 8, 10, 7]), [3, 1, 0, 2]
    want = alone(model, sets, ids, prompts)
    with tinylora.adapter_ids(model, ids):
        assert answers(model, prompts, {"num_blocks": 9, "safety_margin": 0.0}) == want


def test_ids_are_read_again_for_every_batch_and_end_with_the_context():
    model, sets = stacked(CONFIG, 3)
    prompts = prompts_of([6, 9])
    ids = torch.tensor([0, 1])
    methods = type(model).generate_batch, type(model).init_continuous_batching
    want = {pair: alone(model, sets, pair, prompts) for pair in ((0, 1), (2, 0), (1, 1))}
    with tinylora.adapter_ids(model, ids):
        assert answers(model, prompts) == want[0, 1]
        ids.copy_(torch.tensor([2, 0]))
        assert answers(model, prompts) == want[2, 0]
        with tinylora.adapter_ids(model, [1, 1]):
            assert answers(model, prompts) == want[1, 1]
        assert answers(model, prompts) == want[2, 0]
    assert (model.generate_batch.__func__, model.init_continuous_batching.__func__) == methods
    assert not model._forward_pre_hooks and not model._forward_hooks
    use(model, sets[1])
    assert answers(model, prompts) == want[1, 1]


def test_requests_that_are_left_behind_fail():
    model, _ = stacked(CONFIG, 2)
    with tinylora.adapter_ids(model, [0, 1]):
        manager = model.init_continuous_batching(generation(max_new_tokens=10_000), settings(num_blocks=5000))
        manager.start()
        manager.add_requests(prompts_of([3, 4]), streaming=True)
        manager.get_result(timeout=60)  # both are on their way
    assert not manager.is_running()
    results = list(manager.output_router.output_queue.queue)
    assert {r.request_id for r in results if r.error and "before this request completed" in r.error} == {
        "req_0",
        "req_1",
    }


def test_refusals():
    model, _ = stacked(CONFIG, 2)
    prompts = prompts_of([3, 4])

    def call(prompts=prompts, config=None, **kwargs):
        return lambda: model.generate_batch(prompts, generation(), config or settings(), warmup=False, **kwargs)

    def add_request():
        model.init_continuous_batching(generation(), settings()).add_request(prompts[0])

    from transformers import CompileConfig

    cases = [
        (call(prompts * 2), "there are 4 prompts, expected one for each of 2 adapter_ids"),
        (call(persistent_manager=True), "persistent_manager is True"),
        (call(config=settings(use_async_batching=True)), "use_async_batching is True"),
        (call(config=settings(use_cuda_graph=(True, False))), "use_cuda_graph is (True, False)"),
        (call(config=settings(varlen_compile_config=CompileConfig())), "varlen_compile_config is set"),
        (add_request, "add_request does not say which of adapter_ids"),
    ]
    with tinylora.adapter_ids(model, [0, 1]):
        for refused, message in cases:
            with pytest.raises(ValueError) as error:
                refused()
            assert message in str(error.value), error.value
    outside = model.init_continuous_batching(generation(max_new_tokens=10_000), settings(num_blocks=5000))
    outside.start()
    with tinylora.adapter_ids(model, [1]):
        outside.add_request(prompts[0])
        failed = outside.output_router.output_queue.get(timeout=20)
        assert "a manager from outside of adapter_ids" in failed.error
    outside.stop(hard_stop=True)
    call(persistent_manager=True)()
    with tinylora.adapter_ids(model, [0, 1]), pytest.raises(ValueError, match="has a persistent manager"):
        call()()
    model.destroy_cached_continuous_batching_manager()
