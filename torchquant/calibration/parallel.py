"""Data-parallel runs under `torchrun`: each process has its share of the batches, sums are taken over all.

Each exchange is a *meeting*: first the processes say whether one of them failed and what they are about to exchange;
only then do they exchange it. So an error in one process ends all of them at their next meeting, with its message, and
processes that went different ways find out instead of waiting for each other or adding up unlike things.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchquant.errors import ParallelError

__all__ = [
    "agree",
    "anywhere",
    "everywhere",
    "gathered",
    "is_parallel",
    "preceding",
    "rank",
    "together",
    "total",
    "total_",
    "total_all_",
    "world_size",
]

_T = TypeVar("_T")

_depth = 0  # of `together`


def is_parallel() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Processes that share the data."""
    return dist.get_world_size() if is_parallel() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if is_parallel() else 0


@contextmanager
def together(what: str) -> Iterator[None]:
    """A stretch of work that all processes do: an error in one ends all of them at their next meeting.

    Args:
        what: the work, for messages; processes that do other work at the same time are told so.

    Raises:
        ParallelError: another process failed, or is doing other work.
    """
    global _depth
    outermost, _depth = _depth == 0, _depth + 1
    try:
        if outermost:
            _wait(f"begin {what}")
        yield
        if outermost:
            _wait(f"end {what}")
    except ParallelError:
        raise
    except BaseException as error:
        if outermost and is_parallel():
            _tell(error)
        raise
    finally:
        _depth -= 1


def total_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if is_parallel():
        with _connected():
            _meet(f"sum of {tensor.dtype} {tuple(tensor.shape)}")
            dist.all_reduce(tensor)
    return tensor


def total_all_(tensors: Sequence[torch.Tensor]) -> None:
    """Sum several tensors of one dtype over all processes, in place and in one meeting."""
    if is_parallel() and tensors:
        flat = total_(torch.cat([t.reshape(-1) for t in tensors]))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def total(*values: float) -> list[float]:
    """Sums of numbers over all processes."""
    return total_(torch.tensor(values, dtype=torch.float64)).tolist() if is_parallel() else list(values)


def anywhere(condition: bool) -> bool:
    """Whether it holds in any process: they must go the same way."""
    return total(float(condition))[0] > 0


def everywhere(condition: bool) -> bool:
    """Whether it holds in all processes."""
    return total(float(condition))[0] == world_size()


def gathered(value: _T) -> list[_T]:
    """What each process has, in the order of their ranks; everything in it is on the CPU."""
    if not is_parallel():
        return [value]
    with _connected():
        _meet("gathering")
        return _gather(value)


def preceding(count: int) -> int:
    """The sum of `count` over the processes of lower rank."""
    return int(sum(gathered(count)[: rank()]))


def agree(digest: str, on: str) -> None:
    """Raise ParallelError in all processes unless they have the same digest.

    Args:
        on: what the digest is of, for the message.
    """
    digests = gathered(digest)
    if len(set(digests)) > 1:
        odd = [str(i) for i, other in enumerate(digests) if other != digests[0]]
        raise ParallelError(
            f"the {len(digests)} processes do not agree on {on}: {', '.join(odd)} differ from process 0. Each must be "
            "given the same model, Quantizer and options; an algorithm of your own must sum what it measures over the "
            "processes (torchquant.calibration.parallel)."
        )


# meetings ---------------------------------------------------------------------------------------------------------


def _wait(about: str) -> None:
    if is_parallel():
        with _connected():
            _meet(about)


def _meet(about: str) -> None:
    """Wait for all processes; raises ParallelError if one of them failed or came for something else."""
    tag = int.from_bytes(hashlib.blake2b(about.encode(), digest_size=7).digest(), "big")
    notice = torch.tensor([0, tag, -tag])
    dist.all_reduce(notice, dist.ReduceOp.MAX)
    failed, most, least = notice.tolist()
    if failed:
        raise ParallelError(_said(_gather(None)))
    if most != -least:
        raise ParallelError(
            "the processes went different ways: "
            + "; ".join(f"process {i} came for: {purpose}" for i, purpose in enumerate(_gather(about)))
            + ". Each must make the same calls with the same arguments; only the batches may differ."
        )


def _tell(error: BaseException) -> None:
    """Go to the next meeting of the other processes and say why this one stops; a lost connection says enough."""
    with suppress(ParallelError), _connected():
        dist.all_reduce(torch.tensor([1, -(2**62), -(2**62)]), dist.ReduceOp.MAX)
        _gather(f"{type(error).__name__}: {str(error)[:2000]}")


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _said(messages: Sequence[str | None]) -> str:
    failed = "; ".join(f"process {i} of {len(messages)} failed with {m}" for i, m in enumerate(messages) if m)
    return f"{failed}. This process stops with it."


@contextmanager
def _connected() -> Iterator[None]:
    """An exchange: whole, and with an error of ours where a process has ended or does not come in time."""
    try:
        with _uninterrupted():
            yield
    except ParallelError:
        raise
    except RuntimeError as error:
        raise ParallelError(
            f"another process has ended or does not answer ({str(error)[:500]}); this process stops"
        ) from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C comes after the exchange: the other processes are in it too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
    if came and callable(handler):
        handler(*came[0])
