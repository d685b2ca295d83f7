"""Perplexity of a language model, and how far its predictions are from those of another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchquant.errors import InputError
from torchquant.language.decoder import Decoder, is_decoder

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, over the tokens that were predicted.

    Args:
        tokens: how many were predicted.
        loss: mean cross-entropy, in nats.
        kl_divergence: mean of KL(reference || model) over the predictions, in nats; None without a reference.
        top1_agreement: share of predictions whose most likely token is that of the reference; None likewise.
    """

    tokens: int
    loss: float
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: Any, tokens: Any, *, reference: Any = None, window: int = 512, windows: int | None = None
) -> Evaluation:
    """Predict each token of a sequence from those before it in its window, and compare.

    Windows follow one another, each with an empty cache; the first token of each is not predicted. What is left at the
    end and fills no window is left out.

    Args:
        model: what `export_causal_lm` returned (prepared or converted or neither), the program lowered from it, a
            `Decoder`, a causal model of transformers, or a function of int64 (1, T) that returns logits (1, T,
            vocabulary). Exported with `logits="last"`, it runs token by token.
        tokens: int64 (N,) or (1, N), or a list of ids.
        reference: another such model, e.g. the float one.
        window: tokens in a window; 2 at least. A shorter sequence is one window.
        windows: how many windows to take; None: all.

    Raises:
        InputError: the tokens are no sequence of two ids or more, a window does not fit the model's cache, or the model
            and the reference have other vocabularies.
    """
    parts = list(_windows(tokens, window, windows))
    score, ideal = _logits_of(model), None if reference is None else _logits_of(reference)
    loss = divergence = 0.0
    agreeing = count = 0
    for part in parts:
        predicted, wanted = score(part)[:-1].float().log_softmax(-1), part[0, 1:]
        loss -= float(predicted.gather(1, wanted[:, None]).double().sum())
        count += len(wanted)
        if ideal is not None:
            exact = ideal(part)[:-1].float().log_softmax(-1)
            if exact.shape != predicted.shape:
                raise InputError(f"the model gives logits {tuple(predicted.shape)}, the reference {tuple(exact.shape)}")
            divergence += float((exact.exp() * (exact - predicted)).nan_to_num(0.0).sum(-1).double().sum())
            agreeing += int((exact.argmax(-1) == predicted.argmax(-1)).sum())
    if ideal is None:
        return Evaluation(count, loss / count)
    return Evaluation(count, loss / count, divergence / count, agreeing / count)


def _windows(tokens: Any, window: int, windows: int | None) -> Iterator[Tensor]:
    if isinstance(tokens, (list, tuple)) and tokens and all(type(t) is int for t in tokens):
        tokens = torch.tensor(tokens)
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.dtype not in (torch.int64, torch.int32):
        what = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"{tokens!r:.80}"
        raise InputError(f"tokens are one sequence of ids, int64 (N,), not {what}")
    if type(window) is not int or window < 2:
        raise InputError(f"window is a number of tokens, 2 or more, not {window!r}")
    if windows is not None and (type(windows) is not int or windows < 1):
        raise InputError(f"windows is a number of windows above 0 or None, not {windows!r}")
    if len(tokens) < 2:
        raise InputError("a sequence of two tokens at least is needed: the first one is not predicted")
    size = min(window, len(tokens))
    for i in range(min(len(tokens) // size, windows or len(tokens))):
        yield tokens[i * size : (i + 1) * size].to(torch.int64).unsqueeze(0)


def _logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """A function of int64 (1, T) that returns logits (T, vocabulary)."""
    if isinstance(model, Decoder) or is_decoder(model):
        decoder = model if isinstance(model, Decoder) else Decoder(model)
        return lambda tokens: _decoded(decoder, tokens)
    if not callable(model):
        raise InputError(f"evaluate takes a model, a graph, a program or a function of tokens, not {model!r:.80}")

    def scored(tokens: Tensor) -> Tensor:
        is_transformers = hasattr(model, "config") and hasattr(model, "generate")
        outputs = model(tokens, use_cache=False) if is_transformers else model(tokens)
        logits = getattr(outputs, "logits", outputs)
        if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.ndim != 3:
            raise InputError(f"a language model returns logits (1, {tokens.shape[1]}, vocabulary), not {logits!r:.80}")
        return logits[0]

    return scored


def _decoded(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits of a window: in one call, or token by token where the export gives the last logits only."""
    rows = tokens.expand(decoder.batch_size, -1)
    decoder.reset()
    logits = decoder.append(rows)
    if logits.shape[1] != tokens.shape[1]:
        decoder.reset()
        logits = torch.cat([decoder.append(token) for token in rows.split(1, dim=1)], 1)
    return logits[0]
