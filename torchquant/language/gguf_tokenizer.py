"""The keys of a GGUF file for a tokenizer in `tokenizer.json`: byte-level BPE (GPT-2, Llama 3, Qwen) and the BPE with
bytes for what it does not know that sentencepiece makes (Llama 2, Mistral, Gemma).

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, under "Tokenizer".
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchquant.errors import SchemeError, TorchquantWarning
from torchquant.files.whole import reading
from torchquant.language.json_files import json_in

__all__ = ["keys_of_tokenizer"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how words are cut, as `_cuts` says it -> llama.cpp's name for it
_PRE_TOKENIZERS = {
    ("bytes with words",): "gpt-2",
    ("single digits", "bytes with words"): "smollm",
    (_WORDS + r"\p{N}" + _REST, "bytes"): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
}
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def keys_of_tokenizer(folder: Path | None, config: Any, pre_tokenizer: str | None) -> dict[str, Any]:
    """Key -> text, number, bool or list; without `tokenizer.`.

    Args:
        folder: of the checkpoint. Where it holds no `tokenizer.json`, or is None, the file will take and give ids.
        config: of the model.
        pre_tokenizer: llama.cpp's name for how words are cut; None: it is known.

    Raises:
        ArtifactError: a file is damaged.
        SchemeError: a tokenizer of another kind; it cuts words in a way that has no name here.
    """
    file = None if folder is None else folder / "tokenizer.json"
    if file is None or not file.is_file():
        text = "the checkpoint has no tokenizer.json: the file will have no tokenizer, and runtimes take and give ids"
        warnings.warn(text, TorchquantWarning, stacklevel=5)
        return {"ggml.model": "no_vocab", "ggml.tokens": [f"[PAD{i}]" for i in range(config.vocab_size)]}
    with reading(file, "a tokenizer", "download it again"):
        described, settings = json_in(file), _settings(file.parent)
        return _keys(described, settings, config, pre_tokenizer)


def _settings(folder: Path) -> dict[str, Any]:
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = json_in(file) if file.is_file() else {}
    if template.is_file():
        settings["chat_template"] = template.read_text("utf-8")
    return settings


def _keys(
    described: Mapping[str, Any], settings: Mapping[str, Any], config: Any, pre_tokenizer: str | None
) -> dict[str, Any]:
    model, added = described["model"], described.get("added_tokens") or []
    if model.get("type") != "BPE":
        raise SchemeError(f"a tokenizer of kind {model.get('type')!r} is not written as GGUF; BPE is")
    tokens, kinds = _tokens(model, added, config.vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    keys: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": kinds, "ggml.merges": merges}
    if model.get("byte_fallback"):
        first_space = any(part.get("type") == "Prepend" or _prepends(part) for part in _parts(described))
        keys |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": _scores(tokens, merges)}
        keys["ggml.add_space_prefix"] = first_space
    else:
        keys |= {"ggml.model": "gpt2", "ggml.pre": pre_tokenizer or _pre_tokenizer(described)}
    return {k: v for k, v in keys.items() if v != []} | _special(tokens, described, settings, config)


def _tokens(model: Mapping[str, Any], added: list[Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids of the model without a text are marked as unused."""
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    unknown = model.get("unk_token")
    for text, index in model["vocab"].items():
        _check_id(text, index, size)
        is_byte = model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(text)
        tokens[index], kinds[index] = text, _UNKNOWN if text == unknown else _BYTE if is_byte else _NORMAL
    for token in added:
        index = token["id"]
        _check_id(token["content"], index, size)
        tokens[index] = token["content"]
        if kinds[index] != _UNKNOWN:
            kinds[index] = _CONTROL if token.get("special") else _USER
    return tokens, kinds


def _check_id(text: Any, index: Any, size: int) -> None:
    if not isinstance(text, str) or not isinstance(index, int) or not 0 <= index < size:
        raise SchemeError(f"the tokenizer gives {text!r:.80} the id {index!r}, and the model knows {size}")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Such that the best score is the first merge, as sentencepiece merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks[token]) if token in ranks else 0.0 for token in tokens]


def _parts(described: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps in front of the model, one after the other."""
    for stage in ("normalizer", "pre_tokenizer"):
        step = described.get(stage) or {}
        yield from step.get("normalizers") or step.get("pretokenizers") or ([step] if step else [])


def _prepends(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"


def _pre_tokenizer(described: Mapping[str, Any]) -> str:
    cuts = tuple(_cut(part) for part in _parts({"pre_tokenizer": described.get("pre_tokenizer")}))
    if cuts not in _PRE_TOKENIZERS:
        raise SchemeError(
            f"how this tokenizer cuts words ({cuts!r:.300}) has no name here: pass pre_tokenizer=, llama.cpp's name "
            f"for it ({', '.join(_PRE_TOKENIZERS.values())} are known), or tokens may come out differently"
        )
    return _PRE_TOKENIZERS[cuts]


def _cut(part: Mapping[str, Any]) -> str:
    kind, pattern = part.get("type"), part.get("pattern")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes with words" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "single digits"
    if kind == "Split" and isinstance(pattern, Mapping) and part.get("behavior") == "Isolated":
        return str(pattern.get("Regex"))
    return str(part)


def _special(
    tokens: list[str], described: Mapping[str, Any], settings: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """Ids of special tokens, whether the first is put in front, and the template of a chat."""
    keys: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        text, index = settings.get(f"{name}_token"), getattr(config, f"{name}_token_id", None)
        text = text.get("content") if isinstance(text, Mapping) else text
        index = tokens.index(text) if text in tokens else index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < len(tokens):
            keys[f"ggml.{key}"] = index
    is_added = settings.get("add_bos_token")
    first = keys.get("ggml.bos_token_id")
    if is_added is None:
        is_added = first is not None and _begins_with(described.get("post_processor") or {}, tokens[first])
    keys["ggml.add_bos_token"] = bool(is_added)
    if isinstance(settings.get("chat_template"), str):
        keys["chat_template"] = settings["chat_template"]
    return keys


def _begins_with(processor: Mapping[str, Any], text: str) -> bool:
    """Whether a post-processor puts a token in front of a text."""
    steps = processor.get("processors") or [processor]
    firsts = [step["single"][0] for step in steps if step.get("single")]
    return any(first.get("SpecialToken", {}).get("id") == text for first in firsts)
