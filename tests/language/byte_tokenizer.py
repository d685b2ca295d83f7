"""Folders with a small decoder and a small byte-level tokenizer."""

import torch
from decoders import small, transformers

TEXT = "the then, 12 them"


def byte_tokenizer(pre_tokenizer=None, size=300):
    """BPE over bytes with a few merges, 256 + 5 tokens and three special ones at its end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("the", "n"), ("1", "2")]
    words = [*alphabet, *("".join(m) for m in merges)]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|begin|>", "<|end|>", "<|pad|>")])
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def byte_folder(folder, name="llama", pre_tokenizer=None, **changes):
    """A checkpoint of a decoder of this name, as transformers writes it, that says no parts of characters."""
    model, tokenizer = small(name, **{"vocab_size": 300, **changes}), byte_tokenizer(pre_tokenizer)
    parts = [index for text, index in tokenizer.get_vocab().items() if not text.isascii()]
    with torch.no_grad():
        model.get_output_embeddings().weight[parts] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
