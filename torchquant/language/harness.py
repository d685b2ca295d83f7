"""Decoders as models of EleutherAI's lm-evaluation-harness: its tasks on a graph or a program, exactly as it will run.

The cache is used as a cache: requests that begin alike are answered one after the other, and only what is new goes
through the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchquant.artifacts.program import Program
from torchquant.errors import InputError
from torchquant.language.decoder import Decoder
from torchquant.language.libraries import lm_eval

__all__ = ["harness_model"]

_MOST_NEW = 256  # tokens of a continuation for which a task sets no limit


def harness_model(program: Program | GraphModule | Decoder, tokenizer: Any) -> Any:
    """A model for `lm_eval.simple_evaluate(model=...)`.

    Args:
        program: as for `Decoder`, exported with `logits="all"` and a batch of one.
        tokenizer: of transformers, e.g. `checkpoint.tokenizer`.

    Raises:
        InputError: it decodes several sequences together, gives the last logits only, or the tokenizer has no id for
            the end of a text.
        MissingDependencyError: lm-eval is not installed.
    """
    decoder = program if isinstance(program, Decoder) else Decoder(program)
    if decoder.batch_size != 1:
        raise InputError(f"the harness takes one sequence at a time; the decoder was exported for {decoder.batch_size}")
    probe = min(2, decoder.max_cache_len, decoder.max_new_tokens)
    if decoder.append([0] * probe).shape[1] != probe:
        raise InputError('the harness needs the logits of all tokens: export with logits="all"')
    decoder.reset()
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no id for the end of a text (eos_token_id), which the harness begins with")
    return _model(decoder, tokenizer)


def _model(decoder: Decoder, tokenizer: Any) -> Any:
    library = lm_eval()
    template: Any = library.api.model.TemplateLM

    class DecoderModel(template):
        """Answers the three kinds of requests of the harness."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(tokenizer, "name_or_path", "")).replace("/", "__")

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            options = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
            return str(tokenizer.apply_chat_template(chat_history, **options))

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer(string, verbose=False, **options).input_ids)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            order = sorted(range(len(requests)), key=lambda i: [*requests[i][1], *requests[i][2]])
            answers: dict[int, tuple[float, bool]] = {}
            scorer = _Scorer(decoder)
            for i in order:
                answers[i] = scorer.score(*requests[i][1:3])
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
            return [answers[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            windows = library.utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=decoder.max_cache_len,
                context_len=1,
            )
            parts, scorer = map(library.utils.make_disjoint_window, windows), _Scorer(decoder)
            return sum(scorer.score(context, predicted)[0] for context, predicted in parts)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [_continuation(decoder, tokenizer, *request.args) for request in requests]

    return DecoderModel()


class _Scorer:
    """Log-likelihoods of continuations, one after the other; what the cache holds of the last is not computed again.

    Nobody else may use the decoder meanwhile.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._cached = decoder, list[int]()

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Sum of the log-probabilities of a continuation, and whether each of its tokens is the most likely one.

        Of a context that does not fit the cache the last tokens are taken, as the harness does.
        """
        if not continuation:
            return 0.0, True
        room = self._decoder.max_cache_len + 1  # the last token is predicted, and not read
        if len(continuation) >= room:
            raise InputError(f"{len(continuation)} tokens to be predicted do not fit the cache of {room - 1}")
        tokens = [*context, *continuation][-room:]
        self._go_back(tokens, len(tokens) - len(continuation) - 1)
        logits = self._decoder.append(tokens[self._decoder.length : -1])[0, -len(continuation) :].float()
        self._cached = tokens[:-1]
        wanted = torch.tensor(list(continuation))
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        return float(chosen.double().sum()), bool((logits.argmax(-1) == wanted).all())

    def _go_back(self, tokens: Sequence[int], most: int) -> None:
        """Leave in the cache what it has in common with `tokens`, `most` of them."""
        pairs = zip(self._cached, tokens, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._cached), len(tokens)))
        if common:
            self._decoder.length = min(common, most)
        else:
            self._decoder.reset()


def _continuation(decoder: Decoder, tokenizer: Any, context: str, options: dict[str, Any]) -> str:
    """Text up to the first of the strings `until`, greedy unless `do_sample`."""
    stops = options.get("until") or []
    stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    new = min(int(options.get("max_gen_toks", _MOST_NEW)), decoder.max_cache_len - 1)
    tokens = list(tokenizer(context, verbose=False).input_ids)[-(decoder.max_cache_len - new + 1) :]
    tokens = tokens or [int(tokenizer.eos_token_id)]  # an empty context, as for likelihoods
    sampling: dict[str, Any] = {k: options[k] for k in ("do_sample", "top_k", "top_p") if k in options}
    if options.get("do_sample") and options.get("temperature"):
        sampling["temperature"] = options["temperature"]
    ids: list[Tensor] = []
    text = ""
    for token in decoder.stream(tokens, new, eos_token_id=tokenizer.eos_token_id, **sampling):
        ids.append(token[0])
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if any(stop in text for stop in stops):
            break
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)
