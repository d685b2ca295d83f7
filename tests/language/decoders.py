"""Small decoders of several architectures with weights at random."""

from functools import cache

import pytest
import torch

import torchquant as tq
from torchquant.language.key_value_cache import KeyValueCache

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 128}

DECODERS = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2_sliding": ("Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 24}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 6}),
    "gemma3": (
        "Gemma3",
        {**SIZES, "num_key_value_heads": 1, "head_dim": 24, "sliding_window": 6, "layer_types": TYPES},
    ),
    "gpt2": ("GPT2", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "phi": ("Phi", {**SIZES, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", GROUPED),
    "gpt_neox": ("GPTNeoX", SIZES),
}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_MODELS = {"GPT2": "GPT2LMHeadModel"}


def decoder(name: str, **changes):
    """A model of this name, in float32 and eval mode; its logits differ clearly from token to token."""
    kind, sizes = DECODERS[name]
    config = getattr(transformers, _CONFIGS.get(kind, f"{kind}Config"))(**{**sizes, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, _MODELS.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


_ONE_LAYER = {"gpt2": {"n_layer": 1}, "gemma3": {"num_hidden_layers": 1, "layer_types": None}}


def small(name: str, **changes):
    """A decoder of one layer."""
    return decoder(name, **{**_ONE_LAYER.get(name, {"num_hidden_layers": 1}), **changes})


@cache
def quantized(name: str, scheme: str, **changes):
    """(checkpoint, converted graph) of a decoder of one layer, to be read only."""
    from torchquant.quantizers import X86Quantizer

    model = small(name, **changes)
    graph = tq.convert(tq.prepare(tq.export_causal_lm(model, 16), X86Quantizer(scheme)))
    return tq.Checkpoint(model, {}, {}), graph


def values_in(graph, model):
    """Name -> values of each parameter as the graph computes with it."""
    from torchquant.language.graph_weights import weights_of

    return {name: weight.values() for name, weight in weights_of(graph, model).items()}


def tokens_of(count: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 101, (batch_size, count), generator=torch.Generator().manual_seed(seed))


def step(graph, tokens: torch.Tensor, start: int):
    """Logits of tokens that stand at `start` and behind."""
    end = start + tokens.shape[1]
    with torch.no_grad():
        return graph(tokens, torch.arange(start, end), torch.arange(end))


class Own(torch.nn.Module):
    """One layer of attention over a cache of its own, with the inputs that a decoder takes."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)
        self.project = torch.nn.Linear(16, 48)
        self.cache = KeyValueCache([(2, 8, 8)], max_cache_len=12, batch_size=1, dtype=torch.float32)

    def forward(self, tokens, positions, attended):
        x = self.embed(tokens)
        query, key, value = self.project(x).view(1, -1, 6, 8).transpose(1, 2).split(2, dim=1)
        key, value = self.cache.update(0, key, value, positions, attended.shape[0])
        mask = attended <= positions[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        return self.head(x + mixed.transpose(1, 2).reshape(x.shape))

    @classmethod
    def exported(cls):
        torch.manual_seed(0)
        new, read = torch.export.Dim("new", min=1, max=12), torch.export.Dim("read", min=1, max=12)
        example = (torch.zeros(1, 3, dtype=torch.int64), torch.arange(3), torch.arange(5))
        return tq.export(cls().eval(), example, dynamic_shapes=({1: new}, {0: new}, {0: read}))
