"""A decoder at work: what `export_causal_lm` exported, as a graph or lowered, run token by token over its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from torchquant.artifacts.program import Program
from torchquant.errors import InputError
from torchquant.fx.passes import copy_graph
from torchquant.fx.reading import observers
from torchquant.fx.signature import InputSpec, Signature
from torchquant.fx.states import own_states, set_states, states_of
from torchquant.language.sampling import Chooser, Sampling

__all__ = ["Decoder", "generate", "is_decoder"]

_INPUTS = ("tokens", "positions", "attended")


class Decoder:
    """Runs a causal language model with a static cache over one sequence after another.

    A program's state is reset. A graph is copied, so that its own state stays as it is; a prepared one is run without
    its observers, which see nothing of it.

    Args:
        program: what `export_causal_lm` returned, prepared or converted or neither, or the program lowered from it.

    Attributes:
        batch_size: sequences that are decoded together.
        max_cache_len: tokens that fit the cache.
        max_new_tokens: tokens that one call of the program takes.
        vocab_size: token ids are below it.
        length: tokens of the present sequences in the cache.

    Raises:
        InputError: it does not take tokens, positions and attended positions.
    """

    def __init__(self, program: Program | GraphModule) -> None:
        specs = _inputs_of(program)
        if not is_decoder(program):
            names = ", ".join(f"{s.name} {s.shape}" for s in specs) or "nothing"
            raise InputError(f"a decoder takes tokens, positions and attended positions; this takes {names}")
        tokens, _, attended = specs
        self.batch_size, self.max_new_tokens = int(tokens.shape[0] or 1), _largest(tokens, 1)
        self.max_cache_len = _largest(attended, 0)
        self._call, self._reset, self._device = _of(program)
        self._reset()
        self.length = 0
        self.vocab_size = self._step(torch.zeros(self.batch_size, 1, dtype=torch.int64)).shape[-1]
        self.reset()

    def reset(self) -> None:
        """Forget the present sequences: the state becomes that of the export."""
        self._reset()
        self.length = 0

    def append(self, tokens: Any) -> Tensor:
        """Take the next tokens of the present sequences, and return their logits.

        Args:
            tokens: int64 (batch_size, T), or a list of ids where batch_size is 1.

        Returns:
            (batch_size, T, vocab_size), or (batch_size, 1, vocab_size) if the export gives the last logits only.

        Raises:
            InputError: no tokens, another batch size, ids out of the vocabulary, or more tokens than still fit the
                cache; in all cases the cache is as it was.
        """
        tokens = self.checked(tokens)
        self._refuse_overflow(tokens.shape[1], f"{tokens.shape[1]} more tokens")
        parts = [self._step(part) for part in tokens.split(self.max_new_tokens, dim=1)]
        whole = sum(p.shape[1] for p in parts) == tokens.shape[1]
        return torch.cat(parts, 1) if whole else parts[-1]

    def stream(
        self,
        tokens: Any,
        max_new_tokens: int | None = None,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        go_on: bool = False,
    ) -> Iterator[Tensor]:
        """The continuation, token by token: int64 (batch_size,), one for each sequence.

        Args:
            tokens: the prompts, as for `append`; all have the same length.
            max_new_tokens: how many tokens at most; None: as many as the cache takes.
            do_sample, temperature, top_k, top_p, seed: see `Sampling`.
            eos_token_id: ids that end a sequence; the last token is one of them. None: nothing does.
            pad_token_id: what follows in a sequence that has ended before others; None: the first `eos_token_id`.
            go_on: append to what is in the cache, instead of a new sequence. The last token of an earlier
                continuation is not in the cache: it belongs to the front of `tokens`.

        Raises:
            InputError: at once: an argument out of bounds, or as `append`; also for a continuation that the cache
                cannot take. It takes all but the last token.
        """
        chooser = Chooser(Sampling(do_sample, temperature, top_k, top_p, seed))
        tokens = self.checked(tokens)
        if not go_on:
            self.reset()
        stops = self._ids("eos_token_id", eos_token_id)
        pads = self._ids("pad_token_id", pad_token_id) or stops[:1]
        count = self._count(tokens.shape[1], max_new_tokens)
        return self._continuation(tokens, count, chooser, stops, pads)

    def _continuation(
        self, tokens: Tensor, count: int, chooser: Chooser, stops: list[int], pads: list[int]
    ) -> Iterator[Tensor]:
        ended = torch.zeros(self.batch_size, dtype=torch.bool)
        for i in range(count):
            chosen = chooser(self.append(tokens)[:, -1])
            if pads:
                chosen = torch.where(ended, pads[0], chosen)
            ended |= torch.isin(chosen, torch.tensor(stops, dtype=torch.int64))
            yield chosen
            if bool(ended.all()) or i + 1 == count:
                return
            tokens = chosen[:, None]

    def generate(self, tokens: Any, max_new_tokens: int | None = None, **options: Any) -> Tensor:
        """Prompts and continuations: int64 (batch_size, T + new). Arguments and errors as for `stream`."""
        prompt = self.checked(tokens)
        return torch.cat([prompt, *(t[:, None] for t in self.stream(prompt, max_new_tokens, **options))], 1)

    def checked(self, tokens: Any) -> Tensor:
        """Tokens as int64 (batch_size, T); raises InputError unless they fit, whatever the cache holds."""
        if isinstance(tokens, Sequence) and tokens and all(type(t) is int for t in tokens):
            tokens = torch.tensor([tokens])
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2:
            what = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"{tokens!r:.80}"
            raise InputError(f"tokens are int64 ({self.batch_size}, T), not {what}")
        if tokens.shape[0] != self.batch_size:
            raise InputError(f"the decoder was exported for a batch of {self.batch_size}, and gets {tokens.shape[0]}")
        if tokens.shape[1] == 0:
            raise InputError("the prompt is empty: give one token at least, e.g. that of the beginning of a text")
        if tokens.shape[1] > self.max_cache_len:
            raise InputError(f"{tokens.shape[1]} tokens are more than the cache of {self.max_cache_len} takes")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= getattr(self, "vocab_size", high + 1):
            wrong = low if low < 0 else high
            raise InputError(f"token id {wrong} is out of the vocabulary of {self.vocab_size}")
        return tokens.to("cpu", torch.int64)

    def _ids(self, name: str, value: Any) -> list[int]:
        ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise InputError(f"{name} is an id below {self.vocab_size}, several, or None, not {value!r}")
        return ids

    def _count(self, new: int, max_new_tokens: int | None) -> int:
        if max_new_tokens is None:
            self._refuse_overflow(new, f"a prompt of {new} tokens")
            return self.max_cache_len - self.length - new + 1
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise InputError(f"max_new_tokens is a number of tokens above 0 or None, not {max_new_tokens!r}")
        text = f"a prompt of {new} tokens and {max_new_tokens} new ones"
        self._refuse_overflow(new + max_new_tokens - 1, text)
        return max_new_tokens

    def _refuse_overflow(self, rows: int, what: str) -> None:
        if self.length + rows > self.max_cache_len:
            taken = f", of which {self.length} are taken" if self.length else ""
            raise InputError(
                f"{what} do not fit the cache of {self.max_cache_len}{taken}; export with a greater max_cache_len"
            )

    def _step(self, tokens: Tensor) -> Tensor:
        end = self.length + tokens.shape[1]
        with torch.no_grad():
            positions, attended = (torch.arange(start, end, device=self._device) for start in (self.length, 0))
            logits = self._call(tokens.to(self._device), positions, attended).cpu()
        self.length = end
        return logits


def generate(program: Program | GraphModule | Decoder, tokens: Any, max_new_tokens: int, **options: Any) -> Tensor:
    """Continue prompts: int64 (batch_size, T) becomes (batch_size, T + new).

    Args:
        program: as for `Decoder`, or one; keep a `Decoder` to go on with a conversation or to see single tokens.
        tokens, max_new_tokens, options: as for `Decoder.stream`.

    Raises:
        InputError: as `Decoder` and `Decoder.stream`.
    """
    decoder = program if isinstance(program, Decoder) else Decoder(program)
    return decoder.generate(tokens, max_new_tokens, **options)


def is_decoder(program: Any) -> bool:
    """Whether something takes tokens, positions and attended positions, as `export_causal_lm` makes it."""
    specs = _inputs_of(program)
    return [s.name for s in specs] == [*_INPUTS] and [len(s.shape) for s in specs] == [2, 1, 1]


def _inputs_of(program: Any) -> tuple[InputSpec, ...]:
    if isinstance(program, Program):
        return program.inputs
    return Signature.of(program).tensors if isinstance(program, GraphModule) else ()


def _largest(spec: InputSpec, axis: int) -> int:
    """The largest size that an input may have on an axis."""
    fixed, size = spec.shape[axis], spec.sizes[axis] if spec.sizes else None
    if fixed is None and (size is None or size.maximum is None):
        raise InputError(f"{spec.name} has no largest size: export the decoder with export_causal_lm")
    return fixed if fixed is not None else int(size.maximum)  # type: ignore[union-attr, arg-type]


def _of(program: Program | GraphModule) -> tuple[Callable[..., Tensor], Callable[[], None], torch.device]:
    """What runs a step, what goes back to the first state, and where the state lies."""
    if isinstance(program, Program):
        return program, program.reset, _device_of(program.state)
    graph = copy_graph(program)
    for node, _ in list(observers(graph)):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.graph.erase_node(node)
    graph.recompile()
    own_states(graph)
    initial = {name: value.clone() for name, value in states_of(graph).items()}
    return graph, lambda: set_states(graph, initial), _device_of(initial)


def _device_of(states: Mapping[str, Tensor]) -> torch.device:
    return next((value.device for value in states.values()), torch.device("cpu"))
