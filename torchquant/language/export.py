"""A causal language model as a graph with a static cache, whose number of new tokens may vary."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from torchquant.errors import ExportError, InputError
from torchquant.flow import export
from torchquant.language.cached import CachedDecoder
from torchquant.language.libraries import transformers

__all__ = ["export_causal_lm"]


def export_causal_lm(
    model: nn.Module,
    max_cache_len: int,
    *,
    batch_size: int = 1,
    max_new_tokens: int | None = None,
    logits: Literal["all", "last"] = "all",
    cache_bits: Literal[8, 4] | None = None,
) -> GraphModule:
    """Export a causal model of transformers with a static cache of keys and values, as state of the graph.

    The graph takes `tokens` int64 (batch_size, T), `positions` int64 (T,) at which they stand in their sequences, and
    `attended` int64 (S,), which is 0, 1, ..., S - 1 with S greater than the last position: how much of the cache is
    read. T and S may vary from call to call. It returns logits (batch_size, T, vocabulary), or (batch_size, 1,
    vocabulary). `Generator` and `generate` call it so.

    Args:
        model: a decoder such as LlamaForCausalLM, with weights of one dtype; it is not changed.
        max_cache_len: how many positions the cache holds, prompt and continuation together; 2 at least.
        batch_size: sequences that are decoded together.
        max_new_tokens: how many tokens a single call may take; longer prompts are taken in parts. None: max_cache_len.
        logits: `last` computes the logits of the last token only, which makes prompts faster and is all that
            generation needs; `all` is what evaluation needs.
        cache_bits: store keys and values in 8 or 4 bits, with a scale for 32 features of a head and behind a Hadamard
            rotation of the head; None: in the model's dtype.

    Raises:
        InputError: an argument is out of bounds; the model is none of transformers.
        ExportError: torch cannot capture the model, or its attention has no static form.
        MissingDependencyError: transformers is not installed.
    """
    longest = max_cache_len if max_new_tokens is None else max_new_tokens
    _check(model, max_cache_len, batch_size, longest, logits, cache_bits)
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        decoder = CachedDecoder(model, max_cache_len, batch_size, logits, cache_bits).eval()
        with decoder.set_up():
            exported = _exported(decoder, max_cache_len, batch_size, longest)
    finally:
        for module, training in modes.items():
            module.training = training
    return exported


def _exported(decoder: CachedDecoder, max_cache_len: int, batch_size: int, longest: int) -> GraphModule:
    new, read = min(3, longest), min(5, max_cache_len)
    device = decoder.device
    tokens_like = torch.zeros(batch_size, new, dtype=torch.int64, device=device)
    example = (tokens_like, torch.arange(new, device=device), torch.arange(read, device=device))
    tokens = torch.export.Dim("tokens", min=1, max=longest) if longest > 1 else None
    attended = torch.export.Dim("attended", min=1, max=max_cache_len)
    varying = {} if tokens is None else {0: tokens}
    shapes: Any = ({} if tokens is None else {1: tokens}, varying, {0: attended})
    return export(decoder, example, dynamic_shapes=shapes)


def _check(model: Any, max_cache_len: int, batch_size: int, longest: int, logits: str, cache_bits: int | None) -> None:
    library = transformers()
    if not isinstance(model, library.PreTrainedModel) or not model.can_generate():
        raise InputError(
            f"export_causal_lm takes a causal model of transformers (LlamaForCausalLM), not {type(model).__name__}; "
            "other modules go through torchquant.export, with caches in buffers of their own"
        )
    for name, value, least in (("max_cache_len", max_cache_len, 2), ("batch_size", batch_size, 1)):
        if type(value) is not int or value < least:
            raise InputError(f"{name} is an int of {least} or more, not {value!r}")
    if type(longest) is not int or not 1 <= longest <= max_cache_len:
        raise InputError(f"max_new_tokens is an int from 1 to max_cache_len ({max_cache_len}), not {longest!r}")
    if logits not in ("all", "last"):
        raise InputError(f"logits is 'all' or 'last', not {logits!r}")
    if cache_bits not in (None, 8, 4) or isinstance(cache_bits, bool):
        raise InputError(f"cache_bits is 8, 4 or None, not {cache_bits!r}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    is_rotary = any(hasattr(m, "rotary_emb") for m in model.modules())
    if not is_rotary and limit is not None and max_cache_len > limit:
        raise ExportError(
            f"{type(model).__name__} has {limit} learned positions; max_cache_len={max_cache_len} is more"
        )
