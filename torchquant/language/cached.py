"""A Hugging Face causal model over a static cache: what `export_causal_lm` exports.

Keys and values live in buffers of fixed size. The model is handed the positions of the new tokens and the positions to
read, as tensors, so that nothing is counted inside of the graph: a call depends on its inputs and on the rows of the
cache before its own, and on nothing else.

Legend: B batch, T new tokens, S positions that are read, H heads, K key and value heads, D size of a head, L cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.errors import ExportError
from torchquant.language.key_value_cache import KeyValueCache
from torchquant.language.libraries import transformers
from torchquant.language.quantized_cache import QuantizedKeyValueCache
from torchquant.language.rotary import RotaryTable

__all__ = ["CachedDecoder"]

_NAME = "torchquant_static"  # of our attention among those of transformers


class CachedDecoder(nn.Module):
    """A causal model of transformers as a function of tokens and positions.

    Args:
        model: `...ForCausalLM`.
        max_cache_len: positions that the cache holds.
        batch_size: sequences that are decoded together; all have the same length.
        logits: `all`: of each new token; `last`: of the last one only.
        cache_bits: of keys and values, 8 or 4; None: they are in the dtype of the model.

    Raises:
        ExportError: attention that has no static form here (see `_shapes_of`).
    """

    def __init__(
        self, model: nn.Module, max_cache_len: int, batch_size: int, logits: str, cache_bits: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.keep = model, 1 if logits == "last" else 0
        self.max_cache_len, weight = max_cache_len, next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        rows = _shapes_of(model), max_cache_len, batch_size, self.dtype, self.device
        self.cache = KeyValueCache(*rows) if cache_bits is None else QuantizedKeyValueCache(*rows, cache_bits)

    def forward(self, tokens: Tensor, positions: Tensor, attended: Tensor) -> Tensor:
        """Logits (B, T, vocabulary), or (B, 1, vocabulary).

        Args:
            tokens: int64 (B, T).
            positions: int64 (T,): where the tokens stand, one after the other.
            attended: int64 (S,): 0, 1, ..., S - 1, at least up to the last of `positions`. Its size says how much of
                the cache is read.
        """
        cache = _cache_of(self.cache, positions, attended)
        outputs = self.model(
            input_ids=tokens,
            position_ids=positions.unsqueeze(0).expand(tokens.shape[0], -1),
            cache=cache,
            use_cache=True,
            logits_to_keep=self.keep,
        )
        logits: Tensor = outputs.logits
        return logits

    @contextmanager
    def set_up(self) -> Iterator[None]:
        """Our attention and tables of rotary embeddings in the model, inside the block."""
        _register(self.cache)
        modules: list[Any] = list(self.model.modules())
        configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}.values()
        before = [(config, config._attn_implementation) for config in configs]
        owners = [m for m in modules if isinstance(getattr(m, "rotary_emb", None), nn.Module)]
        tables = [(m, m.rotary_emb) for m in owners]
        try:
            for config, _ in before:
                config._attn_implementation = _NAME
            for module, rotary in tables:
                module.rotary_emb = RotaryTable(rotary, self.max_cache_len, self.dtype, self.device)
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation
            for module, rotary in tables:
                module.rotary_emb = rotary


def _shapes_of(model: nn.Module) -> list[tuple[int, int, int]]:
    """(K, size of a key, size of a value) of each layer, seen in a run on one token.

    Raises:
        ExportError: a layer keeps something else than keys and values, or none, or the model has no cache.
    """
    shapes: dict[int, tuple[int, int, int]] = {}

    class Watching(transformers().DynamicCache):  # type: ignore[misc]
        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            shapes[layer_idx] = (keys.shape[1], keys.shape[-1], values.shape[-1])
            return super().update(keys, values, layer_idx, *args, **kwargs)

    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
            model(input_ids=tokens, cache=Watching(config=model.config), use_cache=True)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} does not run on one token with a cache: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if sorted(shapes) != list(range(layers)):
        raise ExportError(
            f"{len(shapes)} of the {layers} layers of {type(model).__name__} keep keys and values of their own; layers "
            "that share them, or that keep another state, have no static form here"
        )
    return [shapes[i] for i in range(layers)]


def _cache_of(buffers: KeyValueCache, positions: Tensor, attended: Tensor) -> Any:
    """The cache as transformers asks for it: the positions stand in for its offsets, which only our mask reads."""

    class StaticRows(transformers("cache_utils").Cache):  # type: ignore[misc]
        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return buffers.update(layer_idx, keys, values, positions, attended.shape[0])

        def get_seq_length(self, layer_idx: int = 0) -> Tensor:
            return positions[0]

        def get_query_offset(self, layer_idx: int = 0) -> Tensor:
            return positions

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Tensor]:
            return attended.shape[0], attended

    layer = transformers("cache_utils").StaticLayer
    return StaticRows(layers=[layer(max_cache_len=1) for _ in range(buffers.layers)])


def _register(cache: KeyValueCache) -> None:
    transformers().AttentionInterface.register(_NAME, partial(_attention, cache))
    transformers().AttentionMaskInterface.register(_NAME, _mask)


def _mask(
    *,
    q_offset: Tensor,
    kv_offset: Tensor,
    mask_function: Callable[..., Tensor],
    dtype: torch.dtype,
    config: Any,
    **_: Any,
) -> Tensor:
    """Additive mask (1, 1, T G, S): 0 where a query reads a key, minus infinity elsewhere; G = H / K, see `_attention`.

    `mask_function` is transformers' own, of this kind of layer, e.g. causal within a sliding window; it takes indices
    of batch, head, query and key. The offsets are the positions of `StaticRows`.
    """
    first = q_offset.new_zeros(())
    allowed = mask_function(first, first, q_offset[None, None, :, None], kv_offset[None, None, None, :])
    mask = torch.where(allowed, 0.0, float("-inf")).to(dtype)
    shared = _shared_by(config)
    rows = mask.unsqueeze(3).expand(-1, -1, -1, shared, -1)
    return rows.reshape(1, 1, q_offset.shape[0] * shared, kv_offset.shape[0])


def _shared_by(config: Any) -> int:
    """G: how many heads share keys and values."""
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


def _attention(
    cache: KeyValueCache,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(Q Kᵀ scaling + mask) V as (B, T, H, D), of query (B, H, T, D), key and value (B, K, S, D).

    Keys and values are rotated as the cache rotates them.

    The G heads that share keys and values are further rows of one head, so that keys and values are read once and not
    repeated. Queries are laid out (B, T G, K, D), in which torch's kernel returns them.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ExportError(f"{type(module).__name__} has attention with {name}, which has no static form here")
    (batch, heads, new, size), kept = query.shape, key.shape[1]
    shared = _shared_by(module.config)
    if heads != kept * shared:
        raise ExportError(f"{type(module).__name__} has other numbers of heads ({heads}, {kept}) than its config says")
    parted = cache.rotated(query).view(batch, kept, shared, new, size)
    packed = parted.permute(0, 3, 2, 1, 4).reshape(batch, new * shared, kept, size)
    attend = nn.functional.scaled_dot_product_attention
    out = attend(packed.transpose(1, 2), key, value, attention_mask, scale=scaling).transpose(1, 2)
    parts = cache.restored(out).reshape(batch, new, shared, kept, value.shape[-1]).permute(0, 1, 3, 2, 4)
    return parts.reshape(batch, new, heads, value.shape[-1]), None
