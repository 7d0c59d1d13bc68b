"""What two processes under DeepSpeed do, for tests/test_deepspeed.py: torchrun --nproc-per-node 2 this OUT"""

import copy
import sys

import deepspeed
import torch
import torch.distributed as dist
from models import qwen2

import tinylora
from tinylora.adapters import AdaLoraConfig, LoraConfig, LoraXSConfig, TiedLoraConfig, TinyLoraConfig, VeraConfig

CONFIGS = (TinyLoraConfig(u=5, n_tie=7), LoraXSConfig(), LoraConfig(r=3), VeraConfig(r=4), TiedLoraConfig(r=3))
STEP = 20.0


def settings(stage):
    # Every layer's parameters are given back as soon as it has run; deepspeed clips gradients unless it is told not to.
    at_once = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    zero = {"stage": stage} | {f"stage3_{name}": 0 for name in at_once}
    optimizer = {"type": "SGD", "params": {"lr": STEP}}
    more = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "train_micro_batch_size_per_gpu": 2}
    return {"zero_optimization": zero, "optimizer": optimizer, **more}


def born_in_pieces(stage):
    """The model as transformers loads it for ZeRO-3, with the numbers of `qwen2()`."""
    whole = qwen2().state_dict()
    with deepspeed.zero.Init(config_dict_or_path=settings(stage)):
        model = qwen2()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(whole[name])
    return model


def same_as_one_process(config, stage, born, out):
    """Two steps give the loss and the numbers of a model that is whole, and the file that is saved holds them."""
    model = born_in_pieces(stage) if born else qwen2()
    tinylora.apply(model, config)
    own = tinylora.apply(qwen2(), config)
    start = copy.deepcopy(own)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=tinylora.adapter_parameters(model), config=settings(stage)
    )
    optimizer = torch.optim.SGD(tinylora.adapter_parameters(own), lr=STEP)
    g = torch.Generator().manual_seed(1)
    for _ in range(2):
        batches = torch.randint(0, 60, (2, 2, 12), generator=g)
        losses = [own(input_ids=b, labels=b).loss for b in batches]
        mine = batches[dist.get_rank()]
        loss = engine(input_ids=mine, labels=mine).loss
        torch.testing.assert_close(loss, losses[dist.get_rank()], rtol=1e-5, atol=0)
        engine.backward(loss), engine.step()
        optimizer.zero_grad(), (sum(losses) / 2).backward(), optimizer.step()
    weight = engine.module.model.layers[0].mlp.down_proj.weight
    assert weight.numel() == (0 if stage == 3 else weight.ds_numel if born else weight.numel())
    tinylora.save(engine.module, out)
    dist.barrier()
    if stage == 3:
        for action, message in (
            (lambda: tinylora.load(engine.module, out), "load it before deepspeed.initialize"),
            (lambda: tinylora.save(engine.module, f"{out}-lora", format="lora"), "sharded (FSDP2, ZeRO-3)"),
            (lambda: tinylora.merge(engine.module), "sharded (FSDP2, ZeRO-3"),
        ):
            try:
                action()
            except ValueError as error:
                assert message in str(error), error
            else:
                raise AssertionError(message)
    loaded = tinylora.load(qwen2(), out)
    with torch.no_grad():
        y, want, before = (m(input_ids=batches[0]).logits for m in (loaded, own, start))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=5e-5)  # two steps moved it by 1e-3 and more
    assert (want - before).abs().max() > 1e-3


def ada_lora_is_refused(stage):
    model = tinylora.apply(qwen2(), AdaLoraConfig(r=3, target_r=2, total_steps=10, warmup_steps=1, final_steps=1))
    trains = tinylora.adapter_parameters(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trains, config=settings(stage))
    ids = torch.randint(0, 60, (2, 12))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    try:
        engine.step()
    except ValueError as error:
        assert "AdaLoRA acts when an optimizer steps" in str(error)
    else:
        raise AssertionError("AdaLoRA stood still")
    del engine


def main(out):
    deepspeed.init_distributed("gloo")
    for config in CONFIGS:
        for stage, born in ((1, False), (3, False), (3, True)):
            same_as_one_process(config, stage, born, f"{out}/{config.kind}-{stage}-{born}")
    same_as_one_process(LoraXSConfig(modules_to_save=["lm_head"]), 3, False, f"{out}/head")
    for stage in (1, 3):
        ada_lora_is_refused(stage)
    print("all of it", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
