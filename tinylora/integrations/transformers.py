"""Models of Hugging Face's, without their weights or with them, and prompts as their tokenizers have them."""

import os

from torch import nn

from tinylora.integrations import processes
from tinylora.integrations.optional import needed


def meta_model(config: str | os.PathLike) -> nn.Module:
    """The model that a config describes, on the meta device: all shapes, no memory.

    config: a config.json, a model folder, or the name of a model on the Hub. ValueError if there is no such config or
    its values make no model, ImportError without transformers.
    """
    import torch

    transformers = needed("transformers", "transformers", "reading a model's config")
    try:
        settings = transformers.AutoConfig.from_pretrained(config)
        named = [getattr(transformers, a, None) for a in settings.architectures or ()]
        if any(named):
            build = next(filter(None, named))._from_config
        elif type(settings) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            build = transformers.AutoModelForCausalLM.from_config
        else:
            build = transformers.AutoModel.from_config
        with torch.device("meta"):
            return build(settings)
    except ImportError:
        raise
    except Exception as error:  # a wrong value may surface in any line of transformers
        reason = " ".join(" ".join(str(error).strip().splitlines()[:2]).split())
        raise ValueError(
            f"config is {str(config)!r}, expected a config.json, a model folder or a Hub name, of a model that can be "
            f"built: {type(error).__name__}: {reason}"
        ) from None


def load_model(name: str | os.PathLike, dtype: str, tensor_parallel: bool = False):
    """(model, tokenizer) of a causal language model from a folder or the Hub, on the process's GPU where there is one.

    dtype: of the weights, "bfloat16", "float16" or "float32", or "nf4": the linear layers of the blocks in four bits a
    number, quantised twice, and all else in bfloat16 (QLoRA, arXiv 2305.14314).
    tensor_parallel: all processes hold one model together, each with its slices (transformers' tp_plan).
    ValueError if there is no such model, it has no tokenizer, or no plan that fits the processes; ImportError without
    transformers, or bitsandbytes for nf4.
    """
    import torch

    transformers = needed("transformers", "transformers", "loading a model")
    if dtype not in ("bfloat16", "float16", "float32", "nf4"):
        raise ValueError(f"dtype is {dtype!r}, expected bfloat16, float16, float32 or nf4")
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    how = {"dtype": torch.bfloat16 if dtype == "nf4" else getattr(torch, dtype)}
    if dtype == "nf4":
        needed("bitsandbytes", "qlora", "nf4")
        how["device_map"] = {"": device}
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if tensor_parallel:
        if processes.count() == 1:
            raise ValueError("tensor_parallel is asked for in one process, expected several: torchrun --nproc-per-node")
        if dtype == "nf4":
            raise ValueError("tensor_parallel is asked for with nf4, expected a base of 16 or 32 bits")
        try:
            how["distributed_config"] = transformers.distributed.DistributedConfig(tp_plan="auto")
        except (AttributeError, TypeError):
            raise ImportError("tensor_parallel needs a newer transformers (tried with 5.23)") from None
    if processes.rank() > 0:
        transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **how)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model is {str(name)!r}, expected a model folder with a tokenizer, or a name on the Hub: {reason}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {str(name)!r} has a tokenizer without an end of text, expected an eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model if dtype == "nf4" or tensor_parallel else model.to(device), tokenizer


def as_prompt(tokenizer, text: str):
    """The text as a user's turn where the tokenizer has a chat template (TRL's form), and as it is where not."""
    return text if tokenizer.chat_template is None else [{"role": "user", "content": text}]


def prompt_ids(tokenizer, text: str) -> list[int]:
    """The text's token ids as `as_prompt` puts it to the model, ready for the answer to follow."""
    turn = as_prompt(tokenizer, text)
    if not isinstance(turn, str):
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    # a chat template writes its own special tokens
    found = tokenizer(text, add_special_tokens=isinstance(turn, str))["input_ids"]
    if not found:
        raise ValueError(f"{type(tokenizer).__name__} makes no token of {text[:40]!r}, expected the model's tokenizer")
    return found
