"""GRPO with 13 numbers in TRL code of one's own: python docs/grpo.py MODEL TRAIN.JSONL OUT [STEPS]"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import tinylora
from tinylora.integrations.trl import adapter_trainer

name, data, out, steps = *sys.argv[1:4], int((*sys.argv, -1)[4])
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
tinylora.apply(model, tinylora.TinyLoraConfig(r=2, u=1, n_tie=16))


def right(completions, answer, **_):
    texts = [completion[-1]["content"] for completion in completions]
    last = [[text.split("####")[-1].strip() for text in both] for both in (texts, answer)]
    return [float(c == a) for c, a in zip(*last, strict=True)]


problems = load_dataset("json", data_files=data, split="train")
task = ' Let\'s think step by step and output the final answer after "####".'
problems = problems.map(lambda p: {"prompt": [{"role": "user", "content": p["question"] + task}]})
trainer = adapter_trainer(GRPOTrainer)(  # GRPOTrainer itself works, too; its checkpoints hold the whole model
    model=model,
    processing_class=AutoTokenizer.from_pretrained(name),
    reward_funcs=right,
    train_dataset=problems,
    args=GRPOConfig(output_dir=out, learning_rate=2e-4, lr_scheduler_type="constant", loss_type="grpo",
                    num_generations=4, max_completion_length=512,  # 4096 in the recipe, and 64 sequences a step
                    per_device_train_batch_size=16, max_steps=steps, logging_steps=1, report_to=[],
                    bf16=False),  # that is autocast, which a bf16 model does not need; v is fp32 either way
)  # fmt: skip
trainer.train()
tinylora.save(model, out)
