"""GRPO with 13 numbers in TRL code of one's own."""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import tinylora
from tinylora.integrations.trl import adapter_trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a model folder, or a name on the Hub")
parser.add_argument("data", help="GSM8K's train.jsonl")
parser.add_argument("out", help="a folder for checkpoints and the adapter")
parser.add_argument("--steps", type=int, default=-1, help="instead of three epochs")
given = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
tinylora.apply(model, tinylora.TinyLoraConfig(r=2, u=1, n_tie=16))


def right(completions, answer, **_):
    texts = [completion[-1]["content"] for completion in completions]
    last = [[text.split("####")[-1].strip() for text in both] for both in (texts, answer)]
    return [float(c == a) for c, a in zip(*last, strict=True)]


problems = load_dataset("json", data_files=given.data, split="train")
task = ' Let\'s think step by step and output the final answer after "####".'
problems = problems.map(lambda p: {"prompt": [{"role": "user", "content": p["question"] + task}]})
trainer = adapter_trainer(GRPOTrainer)(  # GRPOTrainer itself works, too; its checkpoints hold the whole model
    model=model,
    processing_class=AutoTokenizer.from_pretrained(given.model),
    reward_funcs=right,
    train_dataset=problems,
    args=GRPOConfig(output_dir=given.out, learning_rate=2e-4, lr_scheduler_type="constant", loss_type="grpo",
                    num_generations=4, max_completion_length=512,  # 4096 in the recipe, and 64 sequences a step
                    per_device_train_batch_size=16, max_steps=given.steps, logging_steps=1, report_to=[],
                    bf16=False),  # that is autocast, which a bf16 model does not need; v is fp32 either way
)  # fmt: skip
trainer.train()
if trainer.is_world_process_zero():
    tinylora.save(model, given.out)
