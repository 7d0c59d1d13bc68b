"""Models from Hugging Face configs, without their weights."""

import os

from torch import nn


def meta_model(config: str | os.PathLike) -> nn.Module:
    """The model that a config describes, on the meta device: all shapes, no memory.

    config: a config.json, a model folder, or the name of a model on the Hub. ValueError if there is no such config,
    ImportError without transformers.
    """
    import torch

    try:
        import transformers
    except ImportError as error:
        raise ImportError("reading a model's config needs transformers: pip install tinylora[transformers]") from error

    try:
        settings = transformers.AutoConfig.from_pretrained(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"config is {str(config)!r}, expected a config.json, a model folder or a Hub name: {reason}"
        ) from None
    named = [getattr(transformers, a, None) for a in settings.architectures or ()]
    if any(named):
        build = next(filter(None, named))._from_config
    elif type(settings) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        build = transformers.AutoModelForCausalLM.from_config
    else:
        build = transformers.AutoModel.from_config
    with torch.device("meta"):
        return build(settings)
