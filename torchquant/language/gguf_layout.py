"""How a GGUF file of an architecture is laid out: keys, names of tensors, order of rows.

The inverse of what transformers does when it reads one (`TENSOR_PROCESSORS`), and what llama.cpp's converter writes:
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import SchemeError, TorchquantWarning
from torchquant.language.libraries import gguf

__all__ = ["Layout", "keys_of", "layout_of", "names_of", "rope_factors", "rows_of"]

FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Layout:
    """What is particular to an architecture.

    Args:
        architecture: its name in GGUF.
        keys: ending of a key -> its value by the config of the model; int, float or None to leave it out.
        activation: of the feed-forward part; the file has no key for it.
        is_interleaved: rows of queries and keys lie in pairs that rotary embeddings turn together.
        norm_offset: what is added to the weights of norms.
    """

    architecture: str
    keys: Mapping[str, Callable[[Any], float | None]]
    activation: str
    is_interleaved: bool = False
    norm_offset: float = 0.0


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _context(config: Any) -> int:
    """How many positions the runtime may read: no more than a window that it would not keep."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window, longest = getattr(config, "sliding_window", None), int(config.max_position_embeddings)
    is_cut = window and window < longest and (kinds - {"full_attention"} or not kinds)
    return int(window or 0) if is_cut else longest


_COMMON: dict[str, Callable[[Any], float | None]] = {
    "context_length": _context,
    "embedding_length": lambda c: c.hidden_size,
    "block_count": lambda c: c.num_hidden_layers,
    "feed_forward_length": lambda c: c.intermediate_size,
    "attention.head_count": lambda c: c.num_attention_heads,
    "attention.head_count_kv": lambda c: c.num_key_value_heads,
    "attention.layer_norm_rms_epsilon": lambda c: float(c.rms_norm_eps),
    "attention.key_length": _head_dim,
    "attention.value_length": _head_dim,
    "rope.dimension_count": _head_dim,
    "rope.freq_base": lambda c: float(_rope(c)["rope_theta"]),
    "vocab_size": lambda c: c.vocab_size,
}
_GEMMA3 = {
    **_COMMON,
    "context_length": lambda c: c.max_position_embeddings,
    "attention.sliding_window": lambda c: c.sliding_window,
}
_GPT2: dict[str, Callable[[Any], float | None]] = {
    "context_length": lambda c: c.n_positions,
    "embedding_length": lambda c: c.n_embd,
    "block_count": lambda c: c.n_layer,
    "feed_forward_length": lambda c: c.n_inner or 4 * c.n_embd,
    "attention.head_count": lambda c: c.n_head,
    "attention.layer_norm_epsilon": lambda c: float(c.layer_norm_epsilon),
    "vocab_size": lambda c: c.vocab_size,
}
_LAYOUTS = {
    "llama": Layout("llama", _COMMON, "silu", is_interleaved=True),
    "mistral": Layout("llama", _COMMON, "silu", is_interleaved=True),
    "qwen2": Layout("qwen2", _COMMON, "silu"),
    "qwen3": Layout("qwen3", _COMMON, "silu"),
    "gemma3_text": Layout("gemma3", _GEMMA3, "gelu_pytorch_tanh", norm_offset=1.0),
    "gpt2": Layout("gpt2", _GPT2, "gelu_new"),
}
# what runtimes take for granted: model type -> (what, whether a config is so)
_GRANTED: dict[str, tuple[tuple[str, Callable[[Any], bool]], ...]] = {
    "gemma3_text": (
        ("every 6th layer attends to all", lambda c: c.layer_types == _gemma3_types(c.num_hidden_layers)),
        ("queries are divided by the root of head_dim", lambda c: c.query_pre_attn_scalar == c.head_dim),
        ("the base of local layers is 10000", lambda c: c.rope_parameters["sliding_attention"]["rope_theta"] == 10000),
        ("rotary frequencies are not scaled", lambda c: all(_is_plain(p) for p in c.rope_parameters.values())),
    ),
    "gpt2": (
        ("attention is scaled by the root of its size", lambda c: c.scale_attn_weights),
        ("attention is the same in all layers", lambda c: not c.scale_attn_by_inverse_layer_idx),
    ),
}


def _gemma3_types(layers: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)]


def _is_plain(rope: Mapping[str, Any]) -> bool:
    return rope.get("rope_type", "default") == "default"


def _rope(config: Any) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def layout_of(config: Any) -> Layout:
    """The layout of a model; raises SchemeError where GGUF has none for it, or could not say what is special in it."""
    kind = config.model_type
    if kind not in _LAYOUTS:
        known = ", ".join(_LAYOUTS)
        raise SchemeError(
            f"models of type {kind!r} are not written as GGUF; {known} are. Take format='compressed-tensors'"
        )
    layout = _LAYOUTS[kind]
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    activation = getattr(config, "activation_function", activation) if kind == "gpt2" else activation
    if kind == "gemma3_text":
        activation = config.hidden_activation
    granted = (
        (f"the activation is {layout.activation}", lambda c: activation == layout.activation),
        ("all of a head is turned", lambda c: (getattr(c, "partial_rotary_factor", None) or 1.0) == 1.0),
        *_GRANTED.get(kind, ()),
    )
    for what, holds in granted:
        if not holds(config):
            raise SchemeError(f"runtimes of GGUF take for granted that {what} in {kind}; this model is otherwise")
    return layout


def keys_of(layout: Layout, config: Any) -> dict[str, float]:
    """Key -> int or float. Warns where a runtime would not keep to the model's sliding window."""
    values = {ending: value(config) for ending, value in layout.keys.items()}
    longest = getattr(config, "max_position_embeddings", values["context_length"])
    if values["context_length"] != longest:
        text = f"runtimes of GGUF know no sliding window in {layout.architecture}; the context is cut to the window"
        warnings.warn(f"{text} of {values['context_length']} tokens", TorchquantWarning, stacklevel=4)
    return {f"{layout.architecture}.{ending}": v for ending, v in values.items() if v is not None}


def names_of(layout: Layout, layers: int, parameters: list[str]) -> dict[str, str]:
    """Parameter -> name in the file; raises SchemeError for one that has none."""
    library = gguf()
    kind = next(k for k, name in library.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    known = library.get_tensor_name_map(kind, layers)
    names = {name: known.get_name(name, (".weight", ".bias")) for name in parameters}
    odd = [p for p, n in names.items() if n is None or (layout.is_interleaved and p.endswith(".bias"))]
    if odd:
        raise SchemeError(
            f"a GGUF of {layout.architecture} has no place for {odd[0]}; take format='compressed-tensors'"
        )
    return names


def rows_of(layout: Layout, config: Any, name: str, count: int) -> Tensor | None:
    """The order of rows in which a tensor is stored; None for as they are."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if not layout.is_interleaved or part not in heads:
        return None
    return torch.arange(count).view(heads[part], 2, -1).transpose(1, 2).reshape(-1)


def rope_factors(layout: Layout, model: Any) -> Tensor | None:
    """Divisors of the rotary frequencies, where they are others than the base gives.

    Raises:
        SchemeError: only Llama has a place for them, and none has one for a scale of the embeddings.
    """
    rotary = [m for name, m in model.named_modules() if name.endswith("rotary_emb") and hasattr(m, "inv_freq")]
    if not rotary:
        return None
    frequencies, size = rotary[0].inv_freq.detach().cpu(), _head_dim(model.config)
    plain = 1.0 / float(_rope(model.config)["rope_theta"]) ** (torch.arange(0, size, 2).double() / size)
    factors = (plain / frequencies.double()).float() if plain.shape == frequencies.shape else None
    # of a model that was cast as a whole they are rounded
    is_plain = factors is not None and torch.allclose(plain.to(frequencies.dtype), frequencies, rtol=1e-5)
    if (not is_plain and (factors is None or not layout.is_interleaved)) or rotary[0].attention_scaling != 1.0:
        raise SchemeError(f"a GGUF of {layout.architecture} cannot hold this model's scaled rotary embeddings")
    return None if is_plain else factors
