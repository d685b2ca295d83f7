"""Models of transformers from a config and weights, held against each other before anything big is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchquant.language.libraries import transformers

__all__ = ["check_size", "described_by", "filled", "without_values"]

_MOST_EXPERTS = 4096


def described_by(config: Any) -> Any:
    """The model of a config with no memory behind it."""
    with torch.device("meta"):
        return transformers().AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_size(config: Any, elements: int, tensors: int) -> None:
    """Raise ValueError if the model of a config is much larger than the weights that there are."""
    text = config.get_text_config()
    if not 0 < text.num_hidden_layers <= tensors:
        raise ValueError(f"{text.num_hidden_layers} layers, of {tensors} tensors")
    experts = [v for k, v in text.to_dict().items() if "expert" in k and isinstance(v, int)]
    if any(count > _MOST_EXPERTS for count in experts):
        raise ValueError(f"{max(experts)} experts")
    wanted = sum(p.numel() for p in described_by(config).parameters())
    if wanted > 2 * elements:  # a tied head may be counted twice
        raise ValueError(f"a model of {wanted:,} weights, of which there are {elements:,}")


def without_values(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config with weights that are yet to be filled."""
    with transformers("initialization").no_init_weights():
        return transformers().AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def filled(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """The model with its weights, in eval mode; raises ValueError if any is missing or has another shape."""
    model.tie_weights()
    places = model.state_dict()
    tied = {places[name].data_ptr() for name in weights if name in places}
    missing = [n for n, p in model.named_parameters() if n not in weights and p.data_ptr() not in tied]
    if missing:
        raise ValueError(f"missing weights: {', '.join(missing[:4])}")
    model.load_state_dict(weights, strict=False)
    return model.eval()
